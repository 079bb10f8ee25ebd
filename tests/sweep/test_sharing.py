"""Several processes on one study: in a journal file and in PostgreSQL; and under fire."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = str(Path(__file__).with_name("faults.py"))

WORKER = """
import sys, time
from pathlib import Path
from hydratune import sweep
def task(settings):
    time.sleep(0.05)
    with (sweep.current().directory / "ran").open("a") as file:
        file.write("x")
    return float(settings["i"])
storage = None if sys.argv[2] == "journal" else sys.argv[2]
sweep.run(task, {"i": list(range(24))}, output_dir=sys.argv[1], storage=storage, workers=2, quiet=True, name=Path(sys.argv[1]).parent.name)
"""


@pytest.fixture(params=["journal", "postgres"])
def storage(request):
    return "journal" if request.param == "journal" else request.getfixturevalue("postgres")


@pytest.mark.parametrize("processes", [2, 4])
def test_every_trial_exactly_once_and_none_lost(processes, storage, tmp_path):
    folder = tmp_path / "study"
    command = [sys.executable, "-c", WORKER, str(folder), storage]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(processes)]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    trials = json.loads((folder / "study.json").read_text())["trials"]
    assert [t["settings"]["i"] for t in trials] == list(range(24))
    assert [(t["state"], t["attempts"], t["values"]) for t in trials] == [
        ("complete", 1, [float(i)]) for i in range(24)
    ]
    assert all((folder / str(i) / "ran").read_text() == "x" for i in range(24))


def test_processes_killed_at_random_moments(storage, tmp_path):
    """A short form of `faults.py --kills 30`, whose run is in docs/log.md."""
    given = [] if storage == "journal" else ["--storage", storage]
    command = [sys.executable, FAULTS, "--kills", "6", "--folder", str(tmp_path), "--seed", "1", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
