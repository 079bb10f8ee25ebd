"""Completions from a server: what it is asked, the weights it has, and what is told when it fails. The server is a fake."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from threading import Event

import pytest
import torch
from commands import entry
from fake_vllm import FakeVLLM
from peft import LoraConfig
from test_online import LORA, recipe, rows, trainer, trajectory

from hydratune import UserError
from hydratune.errors import TrainingFailed
from hydratune.models import byte_tokenizer
from hydratune.rollout import Sampling
from hydratune.vllm_server import Refused, VLLMServer, require_plain_lora

FULL, ADAPTER = ("/collective_rpc",), ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A policy on disk, which the server serves and the trainer loads."""
    folder = tmp_path_factory.mktemp("policy")
    recipe().build().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def served(home, tmp_path):
    """`served(algo, routes=…, **options)`: a server, and a trainer that samples on it."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(algo: str, *, routes=FULL, name=None, **options):
            fake = FakeVLLM(home, name, routes)
            url = stack.enter_context(fake.listening())
            options = {"temperature": 1.0, "vllm_server_base_url": url, "vllm_server_timeout": 60} | options
            return fake, trainer(algo, tmp_path / "out", **{"model": str(home)} | options)

        yield start


# ------------------------------------------------------------------ what it is asked, and with which weights


@pytest.mark.parametrize("algo,adapter", [("grpo", False), ("grpo", True), ("ppo", False), ("ppo", True)])
def test_every_rollout_is_of_the_policy_as_it_is(algo, adapter, served, tmp_path):
    """The server's log-probs are those of the weights that it was sent last, and the policy's own are the same."""
    fake, run = served(
        algo, routes=ADAPTER if adapter else FULL, peft_config=LORA if adapter else None, max_steps=12
    )
    found = trajectory(run)
    assert run.rollouts == 3 and len(found["completions/logp_gap"]) == 3
    assert max(found["completions/logp_gap"]) < 1e-4
    sent = [path for path, _ in fake.posted if path in ("/collective_rpc", "/v1/load_lora_adapter")]
    assert len(sent) == 3 and [*fake.adapters] == [run._server.version] * adapter
    assert not [*(tmp_path / "out").glob("hydratune-*")]
    if algo == "ppo":
        assert found["val/ratio"][0] == pytest.approx(1, abs=1e-5)


def test_what_a_request_says(served):
    options = {"top_k": 7, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8, "num_generations": 4}
    fake, run = served("grpo", max_steps=1, **options)
    run.train()
    prompts = [row["prompt_ids"] for row in run.train_dataset]
    assert len(fake.asked) == 4 and len({body["seed"] for body in fake.asked}) == 4
    for body in fake.asked:
        assert body["prompt"] in prompts and body["n"] == 4 and body["max_tokens"] == 12
        assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (0.8, 7, 0.9, 0.05)
        assert body["ignore_eos"] and body["stop_token_ids"] == [*run.stop_tokens] and run.stop_tokens
        assert body["return_token_ids"] and body["cache_salt"] == run._server.version
        assert body["repetition_penalty"] == 1 and body["model"] == fake.name
    # its log-probs are those at temperature 1, so that they are compared with nothing
    assert not any("completions/logp_gap" in entry for entry in run.state.log_history)
    episodes = run.episodes
    assert all(
        bool(s) == (int(c[-1]) in run.stop_tokens)
        for s, c in zip(episodes.stopped, episodes.completions, strict=True)
    )


def test_a_rollout_depends_on_seed_and_weights_alone(served, tmp_path):
    one, other = (served("grpo", max_steps=4)[1] for _ in range(2))
    one.train()
    other.train()
    assert all(
        (a == b).all() for a, b in zip(one.episodes.completions, other.episodes.completions, strict=True)
    )


def test_weights_are_sent_once(served):
    """Not again for an evaluation after no step; again after one; and the folder need not be the output's."""
    fake, run = served("grpo", evaluation=rows(4), max_steps=1)
    first, second = run.evaluate(), run.evaluate()
    assert len(fake.posted) == 1 and first["eval_reward"] == second["eval_reward"]
    run.train()
    assert len(fake.posted) == 1
    run.evaluate()
    assert len(fake.posted) == 2


def test_processes_that_send_nothing_know_the_version(home, tmp_path):
    fake = FakeVLLM(home, routes=FULL)
    with fake.listening() as url:
        both = [VLLMServer(url + "/v1/", timeout=5, folder=tmp_path, adapter=False) for _ in range(2)]
        both[1].follow(fake.model, sends=False)
        assert both[1].version and not fake.posted
        both[0].follow(fake.model)
        assert both[0].version == both[1].version and len(fake.posted) == 1


def test_two_runs_with_the_same_weights_share_a_server(home, tmp_path, caplog):
    """Each has an adapter of its own, whose directory stays while the server has it; one that is gone is no error."""
    fake, options = FakeVLLM(home, routes=ADAPTER), {"model": str(home), "temperature": 1.0}
    with fake.listening() as url:
        runs = [
            trainer(
                "grpo", tmp_path / name, peft_config=LORA, vllm_server_base_url=url, **options
            )
            for name in "ab"
        ]  # fmt: skip
        for run in runs:
            run.send_weights()
        names = [run._server.version for run in runs]
        assert {*names} == {*fake.adapters} and len({*names}) == 2
        assert all((tmp_path / name / version).is_dir() for name, version in zip("ab", names, strict=True))
        del fake.adapters[names[0]]  # another one saw to it
        with torch.no_grad():
            next(p for p in runs[0].model.parameters() if p.requires_grad).add_(1)
        with caplog.at_level("INFO", "hydratune"):
            runs[0].send_weights()
        assert f"has no {names[0]}" in caplog.text
        assert {*fake.adapters} == {names[1], runs[0]._server.version}
        assert [f.name for f in (tmp_path / "a").glob("hydratune-*")] == [runs[0]._server.version]


def test_a_process_without_rows_waits_for_the_weights_too(served, monkeypatch):
    """Of two processes and one row the second samples nothing; the first would wait for it for ever."""
    _, run = served("grpo", evaluation=rows(1))
    waited = []
    monkeypatch.setattr(run.accelerator, "wait_for_everyone", lambda: waited.append(1))
    monkeypatch.setattr(type(run.args), "world_size", property(lambda _: 2))
    monkeypatch.setattr(type(run.args), "process_index", property(lambda _: 1))
    run.evaluation_loop(run.get_eval_dataloader(), "", prediction_loss_only=True)
    assert waited == [1]


def test_a_server_with_other_weights_is_told(served, caplog):
    fake, run = served("grpo", max_steps=2)
    post = fake.post
    fake.post = lambda path, body: post(path, body) if path == "/v1/completions" else {}  # takes none
    with torch.no_grad():
        run.model.model.norm.weight.mul_(3.0)
    with caplog.at_level("WARNING", "hydratune"):
        run.train()
    assert caplog.text.count("the server's log-probs are") == 1


# ------------------------------------------------------------------ what is told


@pytest.mark.parametrize(
    "how,told",
    [
        ({"vllm_server_base_url": "http://127.0.0.1:9"}, "nothing answers there"),
        ({"vllm_server_base_url": "127.0.0.1:8000"}, "begin with http://"),
        ({"name": "someone/else"}, "serves someone/else, and the policy is"),
        ({"routes": ()}, "takes no weights: it has no /collective_rpc"),
        ({"routes": FULL, "peft_config": LORA}, "it has no /v1/load_lora_adapter"),
        ({"model": None}, "the policy has random weights"),
        (
            {
                "peft_config": LoraConfig(
                    task_type="CAUSAL_LM", r=2, use_dora=True, target_modules="all-linear"
                )
            },
            "plain LoRA adapters, not LORA, use_dora",
        ),
    ],
    ids=[
        "not there",
        "no address",
        "another model",
        "no route",
        "no route for adapters",
        "random weights",
        "DoRA",
    ],
)
def test_a_server_that_cannot_serve_is_told_before_training(how, told, served):
    with pytest.raises(UserError, match=told) as raised:
        served("grpo", **how)
    assert len(raised.value.violations) == 1


@pytest.mark.parametrize(
    "fault,told",
    [
        ("error", "answers 500 .EngineCore encountered an issue"),
        ("slow", "nothing within 1.5 s .algo.vllm_server_timeout"),
        ("garbage", "something else than JSON"),
        ("old", "returns no token ids"),
        ("few", "returned 1 completions for 4"),
        ("no stop", "not at the first of the stop tokens"),
    ],
)
def test_a_server_that_fails_ends_the_run_with_one_error(fault, told, served):
    patience = {"vllm_server_timeout": 1.5} if fault == "slow" else {}
    fake, run = served("grpo", max_steps=4, max_completion_length=60, **patience)
    fake.fault = fault
    if fault == "no stop":  # so that a stop token comes
        with torch.no_grad():
            fake.model.model.norm.weight.zero_()
            run.model.model.norm.weight.zero_()
    with pytest.raises(TrainingFailed, match=told):
        run.train()


@pytest.mark.parametrize(
    "field,value",
    [
        ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}), ("bias", "all"), ("lora_bias", True),
        ("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
    ],
)  # fmt: skip
def test_adapters_that_vllm_does_not_serve_are_refused(field, value):
    require_plain_lora(LoraConfig(init_lora_weights="gaussian"))
    with pytest.raises(UserError, match=f"plain LoRA adapters, not LORA, {field}"):
        require_plain_lora(LoraConfig(**{field: value}))


def test_token_ids_that_the_tokenizer_does_not_have_are_refused(home, tmp_path):
    """Embeddings often have more rows than the tokenizer has tokens, and a server samples among all of them."""
    with FakeVLLM(home).listening() as url:
        server = VLLMServer(url, timeout=30, folder=tmp_path, adapter=False)
        server._models(30)
        with pytest.raises(TrainingFailed, match=r"sampled the token id .* the tokenizer has 40 tokens"):
            server.generate([[1, 2]], Sampling(64, vocab_size=40), context=200)


def test_a_failure_does_not_wait_for_other_requests(tmp_path):
    server, going, ended = VLLMServer("http://x", timeout=9, folder=tmp_path, adapter=False), Event(), []

    def ask(path, body, timeout, *, text=False):
        if body["prompt"] == [0]:
            raise Refused("it is gone")
        going.wait(5)
        ended.append(body)
        raise Refused("it is gone")

    server._ask = ask
    try:
        with pytest.raises(TrainingFailed, match="it is gone"):
            server.generate([[i] for i in range(8)], Sampling(4), context=None, at_once=4)
        assert not ended
    finally:
        going.set()


def test_no_proxy_leads_to_this_machine(home, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # one that was made before
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with FakeVLLM(home, routes=FULL).listening() as url:
        for address in (url, url.replace("127.0.0.1", "localhost")):
            assert not VLLMServer(address, timeout=5, folder=tmp_path, adapter=False).check(str(home))


def test_weights_that_it_cannot_read_are_told(served, tmp_path):
    fake, run = served("grpo", max_steps=4)
    fake.routes.discard("/collective_rpc")  # it was started anew, in another way
    with pytest.raises(
        TrainingFailed, match="did not take the policy's weights: /collective_rpc answers 404"
    ):
        run.train()


def test_the_command_line(home, tmp_path, monkeypatch, capsys):
    """Checked before anything is written, with check=true too; then sampled there; and exit code 3 when it goes away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("sevens.py").write_text(
        "def seen(completions, **_):\n    return [c[0]['content'].count('7') + len(c[0]['content']) for c in completions]\n"
    )
    fake = FakeVLLM(home, routes=FULL)
    base = ["algo=grpo", f"model.name_or_path={home}", "data.size=32", "batch_size=8", "algo.max_completion_length=6",
            "tracking=none", "tracking.samples=2", "output_dir=run", "max_steps=1", "algo.reward_funcs=[sevens.seen]",
            "trainer.lr_scheduler_type=constant", "lr=1e-3"]  # fmt: skip
    assert entry.main([*base, "algo.vllm_server_base_url=http://127.0.0.1:9"]) == 2
    assert "nothing answers there" in capsys.readouterr().err and not Path("run").exists()
    with fake.listening() as url:
        assert entry.main([*base, f"algo.vllm_server_base_url={url}", "check=true"]) == 0
        assert f"sampled by the vLLM server at {url}" in " ".join(capsys.readouterr().out.split())
        assert entry.main([*base, f"algo.vllm_server_base_url={url}"]) == 0
        assert fake.asked and len(fake.posted) == 2  # before the step, and after it for the evaluation
        fake.fault = "error"
        assert entry.main([*base, "output_dir=failed", f"algo.vllm_server_base_url={url}"]) == 3
    assert json.loads(Path("failed/summary.json").read_text())["status"] == "failed"
