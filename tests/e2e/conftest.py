"""Runs that were trained here, made once for all workers of a test session."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import entry, made_once


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Five runs: a whole model that is sometimes right, an adapter, a reward model, one of DPO, one of GRPO."""
    return made_once(tmp_path_factory, "outputs", _train)


def _train(home: Path) -> None:
    common = ["tracking=none", "data.size=160", "data.eval_fraction=0.4", "batch_size=16", "lr=2e-3"]
    runs = {
        "whole": [
            "max_steps=30",
            "trainer.logging_steps=10",
            "tracking.samples=2",
            "tracking.sample_tokens=12",
        ],
        "adapter": ["peft=lora", "max_steps=4", "lr=0.02", "tracking.samples=0"],
        "online": ["algo=grpo", f"model.name_or_path={home / 'whole' / 'model'}", "max_steps=2", "lr=1e-5",
                   "algo.num_generations=4", "algo.max_completion_length=12", "tracking.sample_tokens=12"],
        "judge": ["algo=reward", "max_steps=3", "peft=lora"],
        "preference": ["algo=dpo", "max_steps=3", "tracking.samples=0"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRATUNE_CACHE", str(home.parent / "cache"))
        for name, own in runs.items():
            assert entry.main([*common, *own, f"output_dir={home / name}"]) == 0
