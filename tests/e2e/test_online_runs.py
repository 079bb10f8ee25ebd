"""PPO and GRPO through `python train.py`, as a user starts them: rewards from a verifier, a function, a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import entry, events, train

SMALL = ["data.size=96", "batch_size=8", "lr=1e-3", "trainer.logging_steps=1", "trainer.save_steps=3", "tracking.samples=2",
         "trainer.lr_scheduler_type=constant"]  # fmt: skip
SHORT = {
    "ppo": ["algo.response_length=10", "algo.num_ppo_epochs=2"],
    "grpo": ["algo.max_completion_length=10"],
}


@pytest.mark.parametrize("algo,peft", [("ppo", "none"), ("grpo", "lora")])
def test_a_run_is_whole_and_resumes_in_the_midst_of_a_rollout(algo, peft, tmp_path):
    base = [f"algo={algo}", f"peft={peft}", *SMALL, *SHORT[algo], "tracking=offline"]
    base += ["algo.num_iterations=2"] if algo == "grpo" else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = train(*base, "max_steps=5", f"output_dir={whole}", cwd=tmp_path)
    assert "verified answers" in said.stdout
    train(*base, "max_steps=3", f"output_dir={parts}", cwd=tmp_path)
    train(f"resume={parts}", "max_steps=5", cwd=tmp_path)
    present = {p.name for p in whole.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "model",
        "report.html",
        "generations.jsonl",
        "wandb",
    } <= present
    other_algo = {"ppo": "grpo", "grpo": "sft"}[algo]
    assert f"is of algo={algo}" in train(f"resume={parts}", f"algo={other_algo}", cwd=tmp_path, code=2).stderr
    name = {"ppo": "objective/scores", "grpo": "reward"}[algo]
    one, other = (
        [(e["step"], e["loss"], e.get(name, 0.0)) for e in events(out) if "loss" in e]
        for out in (whole, parts)
    )
    assert [step for step, *_ in one] == [1, 2, 3, 4, 5]
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    final = json.loads((whole / "summary.json").read_text())["metrics"]["final"]
    assert {"eval_reward", "eval_verified_accuracy", "verified_accuracy"} <= final.keys()
    rows = [json.loads(line) for line in (whole / "generations.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "reward", "step"} <= {*rows[0]}
    assert (whole / "model" / "value_model").is_dir() == (algo == "ppo")


def test_rewards_from_a_trained_model_and_a_function(tmp_path):
    """`algo=reward` trains what `algo=ppo algo.reward_model=RUN` takes; a function of a module here comes on top."""
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-len(c[0]['content']) / 100 for c in completions]\n"
    )
    judge = tmp_path / "judge"
    train("algo=reward", *SMALL, "max_steps=3", "tracking=none", f"output_dir={judge}", cwd=tmp_path)
    out = tmp_path / "out"
    rewards = [f"algo.reward_model={judge}", "algo.reward_funcs=[mine.short]", "algo.reward_weights=[1,0.5]"]
    train(
        "algo=ppo",
        *SMALL,
        *SHORT["ppo"],
        *rewards,
        "max_steps=2",
        "tracking=none",
        f"output_dir={out}",
        cwd=tmp_path,
    )
    first = next(e for e in events(out) if "objective/scores" in e)
    judged, shortness = first["rewards/judge/mean"], first["rewards/short/mean"]
    assert shortness < 0 and first["objective/scores"] == pytest.approx(judged + 0.5 * shortness, abs=1e-4)
    assert "starts from the reward model's weights" in (out / "train.log").read_text()


@pytest.mark.parametrize(
    "wrong,key,way_out",
    [
        (["algo=ppo", "algo.reward_model=nowhere"], "algo.reward_model", "algo=reward"),
        (["algo=ppo", "data.path=bare.jsonl"], "algo.reward_funcs", "algo=reward"),
        (["algo=grpo", "algo.reward_funcs=[math.sqroot]"], "algo.reward_funcs", "sqrt"),
        (["algo=grpo", "batch_size=6"], "algo.num_generations", "batch_size=8"),
        (["algo=grpo", "algo.loss_type=cispo"], "algo.epsilon_high", "algo.epsilon_high=5"),
        (["algo=ppo", "algo.missing_eos_penalty=1", "algo.stop_token=null"], "algo.missing_eos_penalty", "stop_token=eos"),
        (["algo=ppo", "algo.total_episodes=64", "max_steps=3"], "max_steps", "keep one"),
        (["algo=ppo", "data.path=long.jsonl"], "row 2", "algo.max_prompt_length"),
        (["algo=ppo", "algo.max_prompt_length=2"], "train", "raise algo.max_prompt_length"),
        (["algo=grpo", "data.streaming=true", "max_steps=3"], "data.streaming", "data.streaming=false"),
    ],
)  # fmt: skip
def test_wrong_commands_leave_nothing(wrong, key, way_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bare.jsonl").write_text('{"prompt": "a"}\n' * 8)
    long = {"prompt": "x" * 4000, "answer": "1"}
    Path("long.jsonl").write_text("\n".join(json.dumps(r) for r in ({"prompt": "a", "answer": "2"}, long)))
    extra = ["data.eval_fraction=0"] if any("jsonl" in w for w in wrong) else []
    assert entry.main([*wrong, *extra, "tracking=none", "output_dir=run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and key in err and way_out in err and "Traceback" not in err
    assert not Path("run").exists()


def test_a_reward_that_breaks_in_training_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def odd(completions, **_):\n    return [float('nan')] * len(completions)\n"
    )
    run = [
        "algo=grpo",
        *SMALL,
        *SHORT["grpo"],
        "algo.reward_funcs=[mine.odd]",
        "tracking=none",
        "output_dir=run",
    ]
    done = train(*run, cwd=tmp_path, code=3)
    assert "odd returned nan for row 1 of 8" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_sweep_of_grpo(tmp_path):
    small = ["algo=grpo", *SMALL, *SHORT["grpo"], "max_steps=2", "tracking=none", "objective=eval_reward"]
    done = train("-m", "lr=1e-4,1e-3", *small, "output_dir=study", cwd=tmp_path)
    assert "eval_reward" in done.stdout
    rows = (tmp_path / "study" / "trials.csv").read_text().splitlines()
    assert len(rows) == 3
