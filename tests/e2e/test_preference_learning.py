"""What docs/preference.md says that preference alone can teach: a model that was trained by SFT for a short time verifies
more answers after DPO, and after KTO, on the built-in rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import events, train


def accuracy(out: Path, *overrides: str) -> float:
    """Of 256 held-out rows, the share whose completion was verified at the end of the run."""
    line = ["data.size=4096", "data.eval_fraction=0.1", "batch_size=32", "tracking=none", f"output_dir={out}"]
    train(*line, *overrides, timeout=900)
    (found,) = [e["verified_accuracy"] for e in events(out) if "verified_accuracy" in e]
    return found


@pytest.mark.timeout(1500)  # minutes of training, twice as many where others use the machine
def test_dpo_and_kto_raise_the_verified_accuracy(tmp_path):
    before = accuracy(tmp_path / "base", "epochs=4")
    policy = f"model.name_or_path={tmp_path / 'base' / 'model'}"
    once = "algo.precompute_ref_log_probs=true"  # the same losses in less time
    assert 0.1 < before < 0.5
    dpo = ["algo=dpo", "lr=5e-4", "epochs=3", "algo.loss_type=nca_pair", "algo.beta=0.5"]
    assert accuracy(tmp_path / "dpo", policy, once, *dpo) > before + 0.03
    kto = ["algo=kto", "lr=5e-4", "epochs=4", "algo.beta=0.5", "algo.undesirable_weight=0.1"]
    assert accuracy(tmp_path / "kto", policy, once, *kto) > before + 0.03
