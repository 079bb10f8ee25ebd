"""Completions from a vLLM server in the place of our own sampler: plain HTTP, and weights by way of a directory.

Ways of vLLM that are used, all documented: `/v1/models`; `/v1/completions` with token ids in and out; an adapter by
`/v1/load_lora_adapter`, under a new name each time; whole weights by `/collective_rpc` of `reload_weights`. The server
reads what the trainer writes, so both see one directory under one path. What it has computed for older weights is not
used again, because the weights' name is the cache's salt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from hydratune.adapters import starts_as_nothing
from hydratune.errors import TrainingFailed, UserError, Violation
from hydratune.reference import sums_of
from hydratune.rollout import Completions, Sampling, check_prompts

log = logging.getLogger("hydratune")
KEY = "algo.vllm_server_base_url"
START = {
    True: "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {} --enable-lora --max-lora-rank RANK",
    False: "VLLM_SERVER_DEV_MODE=1 vllm serve {}",
}  # by whether there is an adapter
_ROUTE = {True: "/v1/load_lora_adapter", False: "/collective_rpc"}
_PING = 10.0  # seconds a server has to say what it serves


class Refused(Exception):
    """The server gave no answer, or one that is of no use; says which."""

    status: int | None = None


class VLLMServer:
    """A server that completes prompts with the weights that it was last sent.

    Args:
        url: where it listens.
        timeout: seconds that a request may take.
        folder: that it sees under the same path; weights lie there while they are sent.
        adapter: it is sent a LoRA adapter; else whole weights.
        run: tells this run's weights from those of others on the server; the same on all its processes.
    """

    def __init__(self, url: str, *, timeout: float, folder: Path, adapter: bool, run: str = "") -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.folder, self.adapter = folder.expanduser().resolve(), adapter
        own = _is_loopback(self.url)  # no proxy leads there
        self._open = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if own else [])).open
        self.version = ""  # of the weights that it has; the name of the adapter too
        self._prefix = "hydratune-" + (hashlib.sha256(run.encode()).hexdigest()[:8] + "-" if run else "")
        self._base, self._context = "", 0
        self._lying: Path | None = (
            None  # the adapter's directory: the server may read it anew while it has it
        )

    # -- what it is ----------------------------------------------------------------------------------------------

    def check(self, model: str) -> list[Violation]:
        """What is wrong with the server for a policy that was loaded from `model` (directory or hub id)."""
        start = START[self.adapter].format(model or "MODEL")
        if not model:
            why = "the policy has random weights, which no server can have"
            return [Violation(KEY, self.url, why, "train it first (algo=sft), then give model.name_or_path")]
        try:
            served = self._models(_PING)
            known = self._knows(_ROUTE[self.adapter])
        except Refused as error:
            return [Violation(KEY, self.url, str(error), f"start it ({start}), or leave {KEY} out")]
        names = {str(name) for one in served for name in (one.get("id"), one.get("root")) if name}
        if not any(_same(model, name) for name in names):
            why = f"serves {', '.join(sorted(names)) or 'nothing'}, and the policy is {model}"
            return [
                Violation(KEY, self.url, why, f"{start} (--served-model-name if it lies elsewhere there)")
            ]
        if not known:
            why = f"takes no weights: it has no {_ROUTE[self.adapter]}"
            return [Violation(KEY, self.url, why, f"start it so: {start}")]
        return []

    def offers(self) -> tuple[list[str], bool, bool]:
        """Names of the models that it serves; whether it takes whole weights, and adapters.

        Raises:
            Refused: it does not answer, or is no vLLM server.
        """
        names = [str(one["id"]) for one in self._models(_PING)]
        return names, self._knows(_ROUTE[False]), self._knows(_ROUTE[True])

    def _models(self, timeout: float) -> list[dict[str, Any]]:
        """The served models, adapters left out; the first one is what requests name."""
        found = self._ask("/v1/models", None, timeout)
        listed = found.get("data") if isinstance(found, dict) else None
        if not isinstance(listed, list) or not all(isinstance(one, dict) and one.get("id") for one in listed):
            raise Refused("its /v1/models is not that of a vLLM server")
        served = [one for one in listed if not one.get("parent")]
        if served:
            self._base, self._context = str(served[0]["id"]), int(served[0].get("max_model_len") or 0)
        return served

    def _knows(self, path: str) -> bool:
        """Whether there is such a route to post to, found out without posting."""
        try:
            self._ask(path, None, _PING)
        except Refused as error:
            if error.status is None:
                raise
            return error.status != 404
        return True

    # -- weights -------------------------------------------------------------------------------------------------

    def follow(self, policy: Any, *, sends: bool = True) -> None:
        """Have the server use the policy's weights, which are sent if they are not what it has.

        Args:
            policy: unwrapped.
            sends: this process is the one that does it; the others only learn the version.

        Raises:
            TrainingFailed: the server does not take them.
        """
        parameters = [p for p in policy.parameters() if p.requires_grad or not self.adapter]
        version = self._prefix + sums_of(parameters).hexdigest()[:16]
        if version == self.version and (self._lying is not None or not (self.adapter and sends)):
            return
        try:
            served = self._models(self.timeout)
            if not served:
                raise Refused("it serves no model")
            if sends:
                self._send(policy, version)
        except Refused as error:
            raise TrainingFailed(
                f"the vLLM server {self.url} did not take the policy's weights: {error}; it must see {self.folder} "
                f"(algo.vllm_server_folder), and be started so: {START[self.adapter].format(self._base or 'MODEL')}; "
                "then resume"
            ) from error
        self.version = version

    def _send(self, policy: Any, version: str) -> None:
        target = self.folder / version
        if not self.adapter:
            try:
                policy.save_pretrained(target)
                call = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
                self._ask(_ROUTE[False], call, self.timeout, text=True)
            finally:
                shutil.rmtree(target, ignore_errors=True)
            return
        try:
            active = policy.active_adapter
            policy.save_pretrained(target, selected_adapters=[active])
            path = target if active == "default" else target / active
            listed = self._ask("/v1/models", None, self.timeout)["data"]
            if not any(one.get("id") == version for one in listed):
                self._ask(
                    _ROUTE[True], {"lora_name": version, "lora_path": str(path)}, self.timeout, text=True
                )
            if self.version not in ("", version):
                self._unload()
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        if target != self._lying:
            self.tidy()
        self._lying = target

    def _unload(self) -> None:
        try:
            self._ask("/v1/unload_lora_adapter", {"lora_name": self.version}, self.timeout, text=True)
        except Refused as error:
            if error.status != 404:
                raise
            log.info("the vLLM server %s has no %s any more", self.url, self.version)

    def tidy(self) -> None:
        """Remove the adapter's directory; it is written anew if completions are wanted again."""
        if self._lying is not None:
            shutil.rmtree(self._lying, ignore_errors=True)
            self._lying = None

    # -- completions ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        context: int | None,
        copies: int = 1,
        at_once: int = 64,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """Complete each prompt `copies` times, as `rollout.generate` does; each prompt has a seed of its own.

        Args:
            context: of the policy; that of the server may be smaller.
            at_once: completions under way at a time.

        Returns:
            Completions whose `logps` are the server's where they mean what ours do (temperature 1), else None. They are
            for comparison: its kernels and dtypes are not those of training.

        Raises:
            UserError: a prompt is empty or leaves no room.
            TrainingFailed: the server fails, or does not stop by our rule.
        """
        room = min(size for size in (context, self._context or None, 2**31) if size is not None)
        check_prompts(prompts, room, copies, at_once)
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
        shared = {
            "model": self.version if self.adapter else self._base,
            "n": copies,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p or 0.0,
            # said, because a server else goes by the model's generation_config.json
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": self.version,
        }
        limits = [min(sampling.max_new_tokens, room - len(prompt)) for prompt in prompts]

        def one(i: int) -> list[tuple[np.ndarray, np.ndarray]]:
            ids = [int(token) for token in prompts[i]]
            asked = {**shared, "prompt": ids, "max_tokens": limits[i], "seed": seeds[i]}
            return self._completions(asked, sampling)

        pool = ThreadPoolExecutor(max(1, at_once // copies))
        try:
            made = [pair for found in pool.map(one, range(len(prompts))) for pair in found]
        except Refused as error:
            raise TrainingFailed(
                f"the vLLM server {self.url} gave no completions: {error}; see to it, then resume"
            ) from error
        finally:  # a failure or Ctrl-C does not wait for the requests that are under way
            pool.shutdown(wait=False, cancel_futures=True)
        stops = {*sampling.stop_token_ids}
        stopped = np.array([int(ids[-1]) in stops for ids, _ in made], dtype=bool)
        logps = [found for _, found in made] if sampling.temperature == 1 else None
        return Completions([ids for ids, _ in made], stopped, logps)

    def _completions(self, asked: dict[str, Any], sampling: Sampling) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and log-probs of each copy of one prompt."""
        found = self._ask("/v1/completions", asked, self.timeout)
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            made = [
                (
                    np.asarray(choice["token_ids"], dtype=np.int64),
                    np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32),
                )
                for choice in choices
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                "it returns no token ids with their log-probs: it is too old, or no vLLM"
            ) from error
        if len(made) != asked["n"] or any(len(ids) != len(logps) or not len(ids) for ids, logps in made):
            raise Refused(f"it returned {len(made)} completions for {asked['n']}, or empty ones")
        stops, size = sampling.stop_token_ids, sampling.vocab_size
        for ids, _ in made:
            if size is not None and int(ids.max()) >= size:
                raise Refused(
                    f"it sampled the token id {int(ids.max())}, and the tokenizer has {size:,} tokens: the model "
                    "embeds more than those; a lower algo.temperature or algo.top_p makes such ids unlikely"
                )
            ends = np.flatnonzero(np.isin(ids, stops))
            whole = len(ids) == asked["max_tokens"] and not len(ends)
            if not whole and (not len(ends) or ends[0] + 1 != len(ids)):
                raise Refused(
                    f"it ended a completion after {len(ids)} of {asked['max_tokens']} tokens, not at the first of the "
                    f"stop tokens {list(stops)}"
                )
        return made

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def _ask(self, path: str, body: dict[str, Any] | None, timeout: float, *, text: bool = False) -> Any:
        """A server's answer; GET without a body.

        Raises:
            Refused: there is none, or it is an error.
        """
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._open(request, timeout=timeout) as response:
                answer = response.read().decode()
            return answer if text else json.loads(answer)
        except urllib.error.HTTPError as error:
            refused = Refused(f"{path} answers {error.code}{_said(error)}")
            refused.status = error.code
            raise refused from error
        except TimeoutError as error:
            why = f"{path} gave nothing within {timeout:g} s (algo.vllm_server_timeout)"
            raise Refused(why) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                why = f"nothing answers within {timeout:g} s (algo.vllm_server_timeout)"
                raise Refused(why) from error
            raise Refused(f"nothing answers there ({reason})") from error
        except ValueError as error:
            raise Refused(f"{path} answers with something else than JSON: it is no vLLM server") from error


def _is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _said(error: urllib.error.HTTPError) -> str:
    """What a server gives as the reason of an error."""
    try:
        text = error.read().decode(errors="replace")
        found = json.loads(text)
        text = found.get("message") or (found.get("error") or {}).get("message") or text
    except (ValueError, AttributeError, OSError):
        pass
    return f" ({' '.join(str(text).split())[:300]})" if text else ""


def _same(model: str, served: str) -> bool:
    """Whether a policy's directory or hub id is what a server names."""
    one, other = (Path(name).expanduser() for name in (model, served))
    return model == served or (one.is_dir() and one.resolve() == other.resolve())


def require_plain_lora(adapter: Any) -> None:
    """
    Args:
        adapter: a `peft.PeftConfig`, or None.

    Raises:
        UserError: vLLM serves no such adapter.
    """
    if adapter is None:
        return
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    odd = [
        name
        for name in (
            "use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern",
            "layer_replication", "lora_bias",
        )
        if getattr(adapter, name, None)
    ]  # fmt: skip
    odd += [f"bias={bias}"] if (bias := getattr(adapter, "bias", "none")) != "none" else []
    init = getattr(adapter, "init_lora_weights", True)
    if not isinstance(init, bool) and not starts_as_nothing(adapter):  # the server's base is as it was
        odd.append(f"init_lora_weights={init}")
    if kind != "LORA" or odd:
        why = f"vLLM serves plain LoRA adapters, not {', '.join([kind, *odd])}"
        raise UserError(Violation(KEY, None, why, f"use peft=lora or peft=none, or leave {KEY} out"))
