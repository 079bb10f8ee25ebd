"""Whole runs through `python train.py`, as a user starts them: what they leave, print and return."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, events, train
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ["data.size=64", "max_steps=6", "batch_size=8", "tracking.samples=2", "tracking.sample_tokens=8"]


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    return {e["step"]: e[key] for e in events(folder) if key in e}


def test_the_default_leaves_a_whole_run_directory(tmp_path):
    out = tmp_path / "run"
    start = time.perf_counter()
    done = train(*QUICK, f"output_dir={out}", "trainer.logging_steps=1")
    took = time.perf_counter() - start
    present = {p.name for p in out.iterdir()}
    assert {"config.yaml", ".hydra", "metrics.jsonl", "summary.json", "train.log", "model", "checkpoints", "report.html",
            "curves.png", "samples.jsonl", "wandb"} <= present  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["algo"]) == ("completed", 6, "sft")
    assert summary["objective"]["name"] == "eval_loss" and summary["objective"]["value"] > 0
    seconds = summary["seconds"]
    assert {"config", "imports", "data", "model", "training", "saving"} <= seconds.keys()
    before = sum(seconds[phase] for phase in ("config", "imports", "data", "model"))
    assert before < summary["seconds_to_first_step"] < took
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6]
    assert losses(out, "eval_loss")
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert (out / "model" / "README.md").is_file() and (out / "model" / "chat_template.jinja").is_file()
    assert len(list(out.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert len(re.findall("wandb sync", done.stderr)) == 1
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.model_type == "qwen2"
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == "<|im_end|>"


def test_an_adapter_run_reloads_in_plain_peft_and_merges(tmp_path):
    out, merged = tmp_path / "run", tmp_path / "merged"
    train("algo=sft", "peft=lora", "tracking=none", *QUICK, f"output_dir={out}")
    subprocess.run(
        [str(Path(sys.executable).parent / "hydratune"), "merge", str(out), str(merged)], check=True
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(out / "model").eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=ids).logits
    assert torch.allclose(adapted, plain, atol=1e-4)
    assert not (out / "wandb").exists()


def test_check_prints_the_plan_and_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    done = train("check=true", *QUICK, "peft=lora", "algo.assistant_only_loss=true", f"output_dir={out}")
    for word in ("sft", "trainable", "steps", "memory", "rows"):
        assert word in done.stdout.lower(), word
    assert not out.exists()


def test_the_same_command_gives_the_same_run(tmp_path):
    for name in "ab":
        train(*QUICK, "tracking=none", "trainer.logging_steps=1", f"output_dir={tmp_path / name}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_interrupted_and_resumed_gives_the_losses_of_no_stop(tmp_path):
    options = [
        "data.size=256",
        "max_steps=60",
        "batch_size=8",
        "tracking=none",
        "trainer.logging_steps=1",
        "tracking.samples=0",
    ]
    train(*options, f"output_dir={tmp_path / 'whole'}")
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command(*options, f"output_dir={out}"), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").is_file() and len(losses(out)) >= 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert f"resume={out}" in errors
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    stopped_at = max(losses(out))
    assert stopped_at < 60
    train(f"resume={out}")
    assert json.loads((out / "summary.json").read_text())["status"] == "completed"
    whole, resumed = losses(tmp_path / "whole"), losses(out)
    assert sorted(resumed) == sorted(whole)
    assert list(resumed.values()) == pytest.approx(list(whole.values()), abs=1e-5)
    assert losses(out, "num_tokens") == losses(tmp_path / "whole", "num_tokens")


def test_a_loss_that_is_not_finite_ends_with_3(tmp_path):
    out = tmp_path / "run"
    done = train(*QUICK, "tracking=none", "lr=1e9", "max_steps=40", "trainer.optim=sgd", "trainer.max_grad_norm=0",
                 "trainer.logging_steps=1", f"output_dir={out}", code=3)  # fmt: skip
    assert "lower lr" in done.stderr
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_real_conversations_with_the_real_tokenizer(peft, shared_data, tmp_path):
    """A Qwen2 with Qwen2.5's vocabulary on the Capybara-like conversations: the loss falls, evaluation runs."""
    out = tmp_path / "run"
    train(
        f"peft={peft}", "lr=3e-3", "data=local", f"data.path={shared_data / 'sft' / 'capybara_like.jsonl'}",
        f"model.tokenizer={shared_data / 'tokenizer' / 'qwen2.5'}", f"model.chat_template_path={shared_data / 'tokenizer' / 'qwen2.5' / 'chatml_generation.jinja'}",
        "model.architecture.hidden_size=64", "model.architecture.intermediate_size=128", "model.architecture.num_hidden_layers=2",
        "data.max_samples=120", "data.max_eval_samples=8", "algo.assistant_only_loss=true", "algo.packing=true", "algo.max_length=512",
        "max_steps=24", "batch_size=2", "trainer.logging_steps=1", "tracking=offline", "tracking.samples=1", "tracking.sample_tokens=4",
        f"output_dir={out}",
    )  # fmt: skip
    values = list(losses(out).values())
    first, last = sum(values[:4]) / 4, sum(values[-4:]) / 4
    assert last < first - (0.5 if peft == "none" else 0.001)
    assert losses(out, "eval_loss")
    assert (out / "report.html").is_file() and list(out.glob("wandb/offline-run-*"))
    assert (
        out / "model" / ("model.safetensors" if peft == "none" else "adapter_model.safetensors")
    ).is_file()


def test_the_users_own_file_and_columns(tmp_path):
    rows = [{"question": f"What is {i} + 1?", "reply": str(i + 1)} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train(*QUICK, "tracking=none", "model=tiny", "data=local", "data.path=mine.jsonl", "data.columns={prompt: question, completion: reply}",
          "output_dir=run", cwd=tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data"] == "local"


def test_a_model_of_ones_own_directory(tmp_path):
    from hydratune.models import ModelRecipe, byte_tokenizer

    architecture = {"model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    ModelRecipe(architecture=architecture).build().save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    train(
        *QUICK,
        "tracking=none",
        f"model.name_or_path={tmp_path / 'llama'}",
        "peft=dora",
        "lr=1e-3",
        f"output_dir={tmp_path / 'run'}",
    )
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["use_dora"] and config["base_model_name_or_path"] == str(tmp_path / "llama")
