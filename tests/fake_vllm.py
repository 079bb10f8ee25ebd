"""A server that speaks what we use of vLLM's HTTP, and samples with the weights it was sent: no vLLM, no GPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hydratune.rollout import Sampling, generate


class FakeVLLM:
    """
    Args:
        home: directory of the served model.
        name: under which it is served; None: the directory.
        routes: that exist besides those for models and completions.

    Attributes:
        asked: bodies of requests for completions; posted: (path, body) of all others.
        fault: what is wrong with the next answers to requests for completions.
    """

    def __init__(self, home: Path, name: str | None = None, routes: tuple[str, ...] = ()) -> None:
        self.home, self.name, self.routes = home, name or str(home), {*routes, "/v1/completions"}
        self.model = AutoModelForCausalLM.from_pretrained(home)
        self.adapters: dict[str, Any] = {}
        self.asked: list[dict] = []
        self.posted: list[tuple[str, dict]] = []
        self.fault = ""
        self.lock, self.closing = threading.Lock(), threading.Event()

    def models(self) -> list[dict]:
        base = {"id": self.name, "object": "model", "root": self.name, "parent": None, "max_model_len": 200}
        return [base, *({"id": a, "object": "model", "root": a, "parent": self.name} for a in self.adapters)]

    def post(self, path: str, body: dict) -> Any:
        if path == "/v1/completions":
            self.asked.append(body)
            return self.complete(body)
        self.posted.append((path, body))
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                raise ValueError("has already been loaded")
            base = AutoModelForCausalLM.from_pretrained(self.home)
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"])
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        del self.adapters[body["lora_name"]]
        return "Success"

    def complete(self, body: dict) -> Any:
        if self.fault == "error":
            raise ValueError("EngineCore encountered an issue")
        if self.fault == "slow":
            self.closing.wait(3)
        if self.fault == "garbage":
            return "<html>welcome</html>"
        model = self.model if body["model"] == self.name else self.adapters[body["model"]]
        sampling = Sampling(
            body["max_tokens"], body["temperature"], None if body["top_k"] == -1 else body["top_k"], body["top_p"],
            body["min_p"] or None, stop_token_ids=() if self.fault == "no stop" else tuple(body["stop_token_ids"]),
        )  # fmt: skip
        seeded = torch.Generator().manual_seed(body["seed"])
        made = generate(model, [body["prompt"]], sampling, copies=body["n"], generator=seeded)
        choices = []
        for i, (ids, stopped, logps) in enumerate(zip(made.ids, made.stopped, made.logps, strict=True)):
            choices.append(
                {
                    "index": i,
                    "text": "",
                    "token_ids": ids.tolist(),
                    "finish_reason": "stop" if stopped else "length",
                    "logprobs": {"token_logprobs": logps.tolist(), "tokens": [f"token_id:{t}" for t in ids]},
                }
            )
        if self.fault == "old":
            for choice in choices:
                del choice["token_ids"]
        return {"object": "text_completion", "choices": choices[: 1 if self.fault == "few" else None]}

    @contextmanager
    def listening(self) -> Iterator[str]:
        """The address while it runs."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, made: Any) -> None:
                body = (made if isinstance(made, str) else json.dumps(made)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    return self.answer(200, {"object": "list", "data": fake.models()})
                known = self.path in fake.routes
                self.answer(405 if known else 404, {"detail": "Method Not Allowed" if known else "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path not in fake.routes:
                    return self.answer(404, {"detail": "Not Found"})
                with fake.lock:
                    try:
                        self.answer(200, fake.post(self.path, body))
                    except BrokenPipeError:  # the client did not wait
                        pass
                    except KeyError as error:  # an adapter that it does not have
                        self.answer(404, {"error": {"message": str(error), "type": "NotFoundError"}})
                    except Exception as error:
                        self.answer(500, {"error": {"message": str(error), "type": "Error"}})

        class Server(ThreadingHTTPServer):
            daemon_threads = False  # closing waits for them
            request_queue_size = 128  # as many connections as come at once

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.closing.set()
            server.shutdown()
            server.server_close()
            thread.join()
