"""`python train.py …` for tests: as a process, as a user starts it, or in this process by its `main`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("train_entry", ROOT / "train.py")
entry = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(entry)


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def train(
    *overrides: str, cwd: Path = ROOT, code: int = 0, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, which must be with this exit code and without a traceback."""
    done = subprocess.run(command(*overrides), capture_output=True, text=True, timeout=timeout, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def events(run: Path) -> list[dict]:
    """What a run logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
