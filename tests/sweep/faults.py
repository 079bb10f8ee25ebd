"""Kills a sweep's processes at random moments until its study is complete, and checks that nothing was lost or done twice.

    python tests/sweep/faults.py --kills 30 [--workers 2] [--storage URL] [--seed 0]

Several supervisors work on one study; every few tenths of a second one process of theirs (a trial, a fork server, a
supervisor) or all of them are killed with SIGKILL. Supervisors that were killed are started again, as a user would.
Each trial appends a line to a file when it begins and when it ends, so that what the study says can be held against
what happened. Exits 0 when the study is complete and consistent, 1 with the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hydratune import sweep
from hydratune.settings import SweepSettings
from hydratune.sweep.storage import open_storage
from hydratune.sweep.study import records

POINTS = 12


def task(settings: dict) -> float:
    trial = sweep.current()
    note = trial.directory / "events"
    with note.open("a") as file:
        file.write(f"begin {trial.spec.attempt}\n")
    state = trial.directory / "checkpoint"
    done = int(state.read_text()) if state.is_file() else 0
    for step in range(done, 5):
        time.sleep(0.05)
        trial.report(settings["i"] + 1 / (step + 1), step)
        part = state.with_suffix(".part")
        part.write_text(str(step + 1))
        part.replace(state)
    with note.open("a") as file:
        file.write(f"end {trial.spec.attempt}\n")
    return float(settings["i"])


def supervise(folder: Path, storage: str | None, workers: int) -> None:
    settings = SweepSettings(
        workers=workers, max_retries=1000, max_failures=1000, storage=storage, direction="minimize"
    )
    sweep.Sweep(task, {"i": list(range(POINTS))}, settings, objectives=["objective"], directory=folder).run()


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        direct = [int(c) for c in children.read_text().split()]
    except OSError:
        return []
    return direct + [d for c in direct for d in descendants(c)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def check(folder: Path, storage: str) -> list[str]:
    """What is wrong with the study, against what its trials noted."""
    import optuna

    study = optuna.load_study(study_name=folder.name, storage=open_storage(storage))
    trials, wrong = records(study.get_trials()), []
    if [t.settings["i"] for t in trials] != list(range(POINTS)):
        wrong.append(f"points: {[t.settings.get('i') for t in trials]}")
    for t in trials:
        events = (folder / str(t.number) / "events").read_text().split("\n")[:-1]
        if t.state != "complete" or t.values != [float(t.settings["i"])]:
            wrong.append(f"trial {t.number}: {t.state} {t.values}")
        attempts = [int(e.split()[1]) for e in events if e.startswith("begin")]
        if attempts != sorted(set(attempts)):
            wrong.append(f"trial {t.number}: attempts overlap: {events}")
        if t.attempts <= max(attempts):
            wrong.append(f"trial {t.number}: the study knows of {t.attempts} attempts, it began {events}")
        if list(t.intermediate) != list(range(5)):
            wrong.append(f"trial {t.number}: reported at {list(t.intermediate)}")
        # a result that was written is never computed again
        result = json.loads((folder / str(t.number) / "result.json").read_text())
        if result["attempt"] != t.attempts - 1:
            wrong.append(f"trial {t.number}: result of attempt {result['attempt']} of {t.attempts}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--supervisors", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    parser.add_argument("--supervise", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.supervise:
        supervise(Path(given.folder), given.storage, given.workers)
        return 0
    rng, killed, sweeps = random.Random(given.seed), 0, 0
    while killed < given.kills:
        folder = Path(given.folder or tempfile.mkdtemp(prefix="faults-")) / f"study-{given.seed}-{sweeps}"
        folder.mkdir(parents=True)
        sweeps += 1
        killed += ordeal(folder, given, rng, given.kills - killed)
        if wrong := check(folder, given.storage or str(folder / "journal.log")):
            print("\n".join([f"{folder}:", *wrong]))
            return 1
    print(
        f"{sweeps} sweeps of {POINTS} trials, {killed} kills: every trial complete, each told once, none lost"
    )
    return 0


def ordeal(folder: Path, given: argparse.Namespace, rng: random.Random, most: int) -> int:
    """One sweep under fire; gives how many times something was killed."""
    command = [
        sys.executable,
        __file__,
        "--supervise",
        "--folder",
        str(folder),
        "--workers",
        str(given.workers),
    ]
    command += ["--storage", given.storage] if given.storage else []

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)

    running, kills = [start() for _ in range(given.supervisors)], 0
    until = time.monotonic() + 240
    while running:
        if time.monotonic() > until:
            for process in running:
                process.kill()
            print(f"{folder}: the sweep did not end")
            sys.exit(1)
        time.sleep(rng.uniform(0.2, 3.0))
        if kills < min(most, 10):
            everything = [p for s in running for p in [s.pid, *descendants(s.pid)]]
            for pid in everything if rng.random() < 0.2 else rng.sample(everything, min(1, len(everything))):
                kill(pid)
            kills += 1
        for process in list(running):
            code = process.poll()
            if code is not None:
                running.remove(process)
                if code != 0:
                    running.append(start())
    return kills


if __name__ == "__main__":
    sys.exit(main())
