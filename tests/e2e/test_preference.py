"""Reward models, DPO and KTO through `python train.py`, on real rows, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import events, train

ROWS = {
    "reward": "preference/kto_mix_pairs.jsonl",
    "dpo": "preference/dpo_en.jsonl",
    "kto": "kto/kto_en.jsonl",
}
METRICS = {
    "reward": {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    "dpo": {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"},
    "kto": {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/rejected", "entropy"},
}


@pytest.mark.parametrize("algo", ["reward", "dpo", "kto"])
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_on_real_rows_is_whole_and_resumes(algo, peft, shared_data, tmp_path):
    """A run that ends after step 3 and is resumed logs what one of six steps logs; W&B's files are offline."""
    base = [
        f"algo={algo}", f"peft={peft}", f"data.path={shared_data / ROWS[algo]}", "data.max_samples=48",
        "data.max_eval_samples=8", "algo.max_length=1200", "batch_size=4", "lr=1e-3", "tracking=offline",
        "tracking.samples=2", "tracking.sample_tokens=4", "trainer.logging_steps=1", "trainer.save_steps=3",
        "trainer.lr_scheduler_type=constant", "model.architecture.num_hidden_layers=2",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*base, "max_steps=6", f"output_dir={whole}", cwd=tmp_path)
    train(*base, "max_steps=3", f"output_dir={parts}", cwd=tmp_path)
    train(f"resume={parts}", "max_steps=6", cwd=tmp_path)
    present = {p.name for p in whole.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "model",
        "report.html",
        "samples.jsonl",
        "wandb",
    } <= present
    logged = [e for e in events(whole) if "loss" in e]
    assert [e["step"] for e in logged] == [1, 2, 3, 4, 5, 6]
    assert METRICS[algo] <= {k for e in logged for k in e}
    assert {f"eval_{m}" for m in METRICS[algo]} <= {k for e in events(whole) for k in e}
    again = {e["step"]: e["loss"] for e in events(parts) if "loss" in e}
    assert [again[e["step"]] for e in logged] == pytest.approx([e["loss"] for e in logged], abs=1e-5)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and ("score_chosen" if algo == "reward" else "completion") in samples[0]
    assert len(list(whole.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_trained_reward_adapter_is_a_reward_model_after_merging(shared_data, tmp_path):
    """Its score head is trained, saved and merged: plain transformers gives the scores that the run wrote."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "run"
    train(
        "algo=reward", "peft=lora", "data.size=256", "epochs=4", "batch_size=16", "tracking=none",
        f"output_dir={out}", cwd=tmp_path,
    )  # fmt: skip
    subprocess.run(
        [Path(sys.executable).parent / "hydratune", "merge", str(out), str(tmp_path / "merged")], check=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 1
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    question = sample["prompt"].split("\n")[1]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": sample["chosen"].strip()}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        assert model(ids).logits.item() == pytest.approx(sample["score_chosen"], abs=2e-3)


@pytest.mark.parametrize("algo", ["reward", "dpo", "kto"])
def test_the_plan_shows_a_row_and_what_it_is_held_against(algo, tmp_path):
    done = train(f"algo={algo}", "peft=lora", "check=true", cwd=tmp_path)
    assert "What is" in done.stdout and f"algorithm   {algo}" in done.stdout
    assert ("the policy with its adapter off" in done.stdout) == (algo != "reward")
    assert ("[chosen] ⟦" in done.stdout) == (algo != "kto")
    assert not [p for p in tmp_path.iterdir() if p.name != "hydratune-cache"]


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_policy_and_reference_are_shown_side_by_side(peft, tmp_path):
    """With a high rate they part; the reference says the same at every evaluation."""
    out = tmp_path / "run"
    train(
        "algo=dpo", f"peft={peft}", "data.size=128", "batch_size=8", "max_steps=6", "lr=1e-1", "tracking=offline",
        "trainer.eval_strategy=steps", "trainer.eval_steps=3", "algo.generate_during_eval=true", "tracking.samples=0",
        f"output_dir={out}", cwd=tmp_path,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3] * 4 + [6] * 4
    first, last = rows[:4], rows[4:]
    assert [r["reference"] for r in first] == [r["reference"] for r in last]
    assert all("What is" in r["prompt"] for r in rows)
    assert [r["policy"] for r in last] != [r["reference"] for r in last]


def test_an_imbalance_is_told_with_the_weights_that_mend_it(shared_data, tmp_path):
    """563 desirable and 1037 undesirable rows: the paper advises a desirable weight of 1.84 to 2.46."""
    line = [
        "algo=kto",
        f"data.path={shared_data / 'kto/kto_gsm8k.jsonl'}",
        "data.eval_fraction=0",
        "check=true",
    ]
    done = train(*line, cwd=tmp_path)
    assert "563 desirable, 1,037 undesirable" in done.stdout
    assert "algo.desirable_weight between 1.84 and 2.46" in done.stdout
    assert "advises" not in train(*line, "algo.desirable_weight=2", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "rows,algo,said",
    [
        ([{"prompt": "a", "completion": "b", "label": True}] * 4, "kto", "all 4 rows are desirable"),
        ([{"prompt": "a", "completion": "b", "label": "maybe"}] * 4, "kto", "line 1, column label"),
        ([{"prompt": "a", "completion": "", "label": True}] * 4, "kto", "line 1, column completion"),
        ([{"prompt": "a", "completion": "b"}] * 4, "kto", "add a column label"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 4, "dpo", "algo=kto"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4, "dpo", "chosen equals rejected"),
        ([{"prompt": "a", "chosen": "b"}] * 4, "reward", "chosen: better"),
        ([{"prompt": "a", "chosen": "b " * 2000, "rejected": "c"}] * 4, "reward", "longer than max_length"),
        ([{"chosen": [], "rejected": []}] * 4, "dpo", "empty list of messages"),
    ],
)
def test_bad_rows_are_one_clear_error(rows, algo, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(f"algo={algo}", f"data.path={path}", "data.eval_fraction=0", cwd=tmp_path, code=2)
    assert done.stderr.count("error: ") == 1 and said in done.stderr, done.stderr
    assert "→" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"rows.jsonl", "hydratune-cache"}
