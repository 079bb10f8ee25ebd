"""What a study leaves for people after every trial: the best settings, a table, a page. Each file is whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hydratune.sweep.job import Command, Job
from hydratune.sweep.study import Record, Study
from hydratune.whole import write_whole

FILE = "study.json"
_NOT_KEPT = ("output_dir", "resume", "run_name", "check", "sweep")  # of a trial's config, in best.yaml


class Exporter:
    """Writes the files of a study; pages are drawn by a process of low priority, off the path of the trials."""

    def __init__(self, study: Study, task: Any, keep: str):
        self._study, self._keep = study, keep
        self._task = task if isinstance(task, Command) else None
        self._drawing: subprocess.Popen[bytes] | None = None

    @property
    def _directory(self) -> Path:
        return self._study.directory

    def begin(self, job: Job) -> None:
        """The command of a trial, in its directory, with the variables that it has too: threads decide the last digits."""
        if self._task is not None:
            folder = Path(job.spec.directory)
            folder.mkdir(parents=True, exist_ok=True)
            _script(folder / "command.sh", self._task.shell(job.spec.settings, job.env))

    def after(self, record: Record, trials: Sequence[Record], front: Sequence[Record]) -> None:
        """Everything again, now that a trial has ended."""
        self.write(trials, front)
        self._tidy(record, trials, front)
        if self._drawing is None:
            self._drawing = subprocess.Popen(
                [sys.executable, "-m", "hydratune.sweep.page", str(self._directory)],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def write(
        self, trials: Sequence[Record], front: Sequence[Record], importance: dict[str, float] | None = None
    ) -> None:
        directory, config = self._directory, self._study.config
        write_whole(directory / "trials.csv", table(trials, config.objectives))
        facts = {
            "name": config.name,
            "objectives": list(config.objectives),
            "directions": list(config.directions),
            "space": config.space.describe(),
            "sampler": config.sampler,
            "pruner": config.pruner,
            "n_trials": config.n_trials,
            "front": [r.number for r in front],
            "importance": importance or {},
            "commands": {r.number: self._task.line(r.settings) for r in trials if self._task and r.settings},
            "trials": [asdict(r) for r in trials],
        }
        write_whole(directory / FILE, json.dumps(facts))
        if front:
            self._write_best(front)
        write_whole(directory / "study.md", summary(facts, trials, front))

    def _write_best(self, front: Sequence[Record]) -> None:
        best = front[0]
        if self._task is None:
            write_whole(self._directory / "best.yaml", yaml.safe_dump(best.settings, sort_keys=False))
            return
        others = "".join(
            f"# also on the Pareto front, {r.number}: {self._task.line(r.settings)}\n" for r in front[1:]
        )
        with contextlib.suppress(OSError):  # with the variables that this trial had
            shell = (self._directory / str(best.number) / "command.sh").read_text(encoding="utf-8")
            head, _, rest = shell.partition("\n")
            _script(self._directory / "best.sh", f"{head}\n{others}{rest}")
        trial = self._directory / str(best.number)
        with contextlib.suppress(OSError):
            resolved = yaml.safe_load((trial / "config.yaml").read_text(encoding="utf-8"))
            chosen = yaml.safe_load((trial / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))
            choices = chosen["hydra"]["runtime"]["choices"]
            write_whole(
                self._directory / "best.yaml",
                composable(resolved, choices, f"trial {best.number} of {self._study.config.name}"),
            )

    def _tidy(self, record: Record, trials: Sequence[Record], front: Sequence[Record]) -> None:
        """Free the disk of models that are not to be kept."""
        if self._keep == "all":
            return
        kept = {r.number for r in front} if self._keep == "best" else set()
        for trial in trials:
            if trial.finished and trial.number not in kept:
                for name in ("model", "base", "checkpoints"):
                    shutil.rmtree(self._directory / str(trial.number) / name, ignore_errors=True)

    def close(self, trials: Sequence[Record], front: Sequence[Record], importance: dict[str, float]) -> None:
        """The last state of everything; waits until the pages are drawn."""
        if any(t.finished for t in trials):
            self.write(trials, front, importance)
        if self._drawing is not None:
            assert self._drawing.stdin is not None
            self._drawing.stdin.close()
            self._drawing.wait()
            self._drawing = None


def composable(resolved: dict[str, Any], choices: dict[str, Any], what: str) -> str:
    """A run's resolved config as a primary config for `--config-dir DIR --config-name NAME`."""
    groups = [{f"override /{g}": c} for g, c in choices.items() if "/" not in g and g != "sweep" and c]
    body = {k: v for k, v in resolved.items() if k not in _NOT_KEPT}
    if body.get("peft") is None:
        body["peft"] = {"type": None}
    text = yaml.safe_dump(
        {"defaults": ["train", *groups, "_self_"], **body}, sort_keys=False, allow_unicode=True
    )
    return f"# {what}; python train.py --config-dir THIS_FOLDER --config-name best\n{text}"


def table(trials: Sequence[Record], objectives: Sequence[str]) -> str:
    """trials.csv: one row a trial."""
    names = list(dict.fromkeys(name for t in trials for name in t.settings))
    metrics = list(dict.fromkeys(name for t in trials for name in t.metrics if name not in objectives))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        ["number", "state", *objectives, *names, "seconds", "attempts", "feasible", "reason", *metrics]
    )
    for t in trials:
        values: list[Any] = t.values or [""] * len(objectives)
        settings = [t.settings.get(n, "") for n in names]
        facts = ["" if t.seconds is None else round(t.seconds, 3), t.attempts, t.feasible, t.reason]
        writer.writerow(
            [t.number, t.state, *values, *settings, *facts, *(t.metrics.get(m, "") for m in metrics)]
        )
    return out.getvalue()


def summary(facts: dict[str, Any], trials: Sequence[Record], front: Sequence[Record]) -> str:
    """study.md: the state of the study on one page."""
    states: dict[str, int] = {}
    for t in trials:
        states[t.state] = states.get(t.state, 0) + 1
    lines = [f"# {facts['name']}", "", ", ".join(f"{n} {s}" for s, n in states.items()), ""]
    for r in front:
        values = ", ".join(f"{o} {v:.6g}" for o, v in zip(facts["objectives"], r.values or [], strict=False))
        lines += [f"**{'Best' if len(front) == 1 else 'Pareto front'}: trial {r.number}**, {values}", ""]
        if command := facts["commands"].get(r.number):
            lines += ["```bash", command, "```", ""]
    if facts["importance"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in facts["importance"].items())
        lines += [f"Importance for {facts['objectives'][0]}: {shares}", ""]
    names = list(dict.fromkeys(name for t in trials for name in t.settings))
    head = ["trial", "state", *facts["objectives"], *names, "seconds", "reason"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for t in trials:
        shown = [f"{v:.6g}" for v in t.values] if t.values else [""] * len(facts["objectives"])
        cells = [t.number, t.state, *shown, *(t.settings.get(n, "") for n in names)]
        cells += ["" if t.seconds is None else f"{t.seconds:.1f}", t.reason]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _script(path: Path, text: str) -> None:
    write_whole(path, text)
    path.chmod(0o755)
