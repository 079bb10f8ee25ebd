"""`python train.py …` and `hydratune …` for tests: as a process, as a user starts it, or in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from typer.testing import CliRunner

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


def run(*arguments: Any, code: int = 0, stdin: str | None = None) -> tuple[str, str]:
    """Output of `hydratune …` in this process, and what it says on the side."""
    from hydratune.cli import app

    done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, done.stderr


def greedy(folder: Path, messages: list[dict], tokens: int) -> str:
    """What plain transformers answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def made_once(factory: Any, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that is filled once in a test session, by whichever of its workers comes first; the others wait."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, made = root / name, root / f"{name}.made"
    with FileLock(f"{folder}.lock"):
        if not made.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
