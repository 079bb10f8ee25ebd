"""What docs/online.md says that rewards alone can teach: after a short SFT, GRPO and PPO raise the accuracy on questions that
no training has seen. The same recipe as bench/learning.py, with fewer episodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = ["data.size=4096", "data.distinct=true", "data.eval_fraction=0.125", "data.seed=42"]  # 512 held out


def train(out: Path, *overrides: str) -> list[dict]:
    line = [*ROWS, "trainer.save_strategy=no", "tracking=none", f"output_dir={out}", *overrides]
    command = [sys.executable, str(ROOT / "train.py"), *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def test_grpo_and_ppo_raise_the_accuracy_on_new_questions(tmp_path):
    train(
        tmp_path / "base",
        *("algo.assistant_only_loss=true", "model.architecture.num_hidden_layers=2", "epochs=12"),
        *("trainer.lr_scheduler_type=constant_with_warmup", "trainer.eval_strategy=no"),
    )
    arms = {
        "grpo": ["algo.max_completion_length=16"],
        "ppo": ["algo.response_length=16", "algo.temperature=1", "algo.num_ppo_epochs=1"],
    }
    for algo, own in arms.items():
        found = train(
            tmp_path / algo,
            *(f"algo={algo}", f"model.name_or_path={tmp_path / 'base' / 'model'}", *own, "seed=1"),
            *("batch_size=256", "max_steps=12", "lr=3e-4", "trainer.lr_scheduler_type=linear"),
            *("trainer.warmup_steps=3", "trainer.eval_on_start=true", "trainer.eval_strategy=epoch"),
        )
        before, *_, after = [e["eval_verified_accuracy"] for e in found if "eval_verified_accuracy" in e]
        assert 0.2 < before < 0.65, (algo, before)
        # the same random numbers each time, so that a standard error is about 2 points
        assert after > before + 0.08, (algo, before, after)
