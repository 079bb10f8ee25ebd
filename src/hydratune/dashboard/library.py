"""What the pages show of the runs under a folder: rows of a table, points of curves, completions by prompt."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import threading
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hydratune.dashboard.drawn import can_draw
from hydratune.objective import default
from hydratune.report import CHARTS
from hydratune.runs import Run, curve, find_runs, matching, metric_names

_LOOK = 1.0  # seconds between two looks at the folder
_COLUMNS = 8  # of settings in the table
_POINTS = 40_000  # of all curves of a chart
_NO_COLUMN = (
    "output_dir",
    "run_name",
    "resume",
    "debug",
    "algo",
    "model",
    "data",
    "peft",
    "tracking",
    "sweep",
)
_SIGN = re.compile(r"<=|>=|!=|<|>|=|~")
_SPACES = re.compile(rf"""('[^']*'|"(?:[^"\\]|\\.)*"|\\.)|\s*({_SIGN.pattern})\s*""")  # none in quotes


class _Read(Run):
    """A run whose metrics are read anew only when they have changed."""

    @property
    def events(self) -> list[dict[str, Any]]:
        return _events(self.path, _stat(self.path / "metrics.jsonl"))


@lru_cache(maxsize=256)
def _events(folder: Path, stat: tuple[int, int]) -> list[dict[str, Any]]:
    return Run(folder, "").events


class Library:
    """The runs below a folder, as they are now."""

    def __init__(self, home: Path):
        self.home = home
        self._lock, self._looked = threading.Lock(), float("-inf")
        self._runs: dict[str, Run] = {}

    def runs(self) -> list[Run]:
        """The one that wrote last first."""
        with self._lock:
            if time.monotonic() - self._looked > _LOOK:
                self._runs = {run.name: self._known(run) for run in find_runs(self.home)}
                self._looked = time.monotonic()
            return list(self._runs.values())

    def _known(self, run: Run) -> Run:
        """The run with what was read of it before, when it has ended and has written nothing since."""
        before = self._runs.get(run.name)
        same = before is not None and before.last_sign == run.last_sign and before.status != "running"
        return before if same and before is not None else _Read(run.path, run.name)

    def some(self, names: Iterable[str]) -> list[Run]:
        """Those runs of these names that there are."""
        self.runs()
        with self._lock:
            return [self._runs[name] for name in names if name in self._runs]


def filters(text: str) -> list[str]:
    """A line of filters as `runs.matching` takes them; a word without a comparison is looked for in the name.

    Raises:
        ValueError: a quote is not closed.
    """
    words = shlex.split(_SPACES.sub(lambda found: found[1] or found[2], text))
    return [word if _SIGN.search(word) else f"name~{word}" for word in words]


def below(path: str) -> str:
    """The address of our page with the runs below a folder, by its path below ours; all of them for an empty one."""
    return f"/?filter={quote(f'name~{shlex.quote(path)}')}" if path else "/"


def chosen(runs: list[Run], text: str) -> list[Run]:
    """The runs for which a line of filters holds.

    Raises:
        ValueError: it cannot be read, or names what no run has (UserError).
    """
    return matching(runs, filters(text)) if text.strip() else runs


def row(run: Run) -> dict[str, Any]:
    """The facts of a run for the table; of one that has not ended, what it has logged so far."""
    facts: dict[str, Any] = {"name": run.name, "status": run.status, "started": run.started.replace("T", " ")}
    facts |= {group: run.value(group) or "" for group in ("algo", "model", "data", "peft")}
    metric, value = run.objective
    steps, speed = run.summary.get("steps"), run.summary.get("tokens_per_second")
    if not run.ended:
        steps, speed = run.value("steps"), run.final.get("tokens_per_second")
        if not metric:
            metric = default(run.final)
            value = run.final.get(metric)
    facts |= {"metric": metric, "objective": value, "steps": steps, "speed": speed}
    facts["report"] = can_draw(run)
    return facts


def setting_columns(runs: Sequence[Run]) -> list[str]:
    """The settings that tell the runs apart: set on a command line and not the same in all, the most frequent first."""
    count: dict[str, int] = {}
    for run in runs:
        for key in run.typed:
            if key.partition(".")[0] not in _NO_COLUMN:
                count[key] = count.get(key, 0) + 1
    differing = [key for key in count if len({str(setting(run, key)) for run in runs}) > 1]
    return sorted(differing, key=lambda key: -count[key])[:_COLUMNS]


def setting(run: Run, key: str) -> Any:
    value = run.config.get(key, run.choices.get(key))
    if isinstance(value, str):
        try:
            return float(value) if "." in value or "e" in value.lower() else value  # YAML reads 1e-4 as text
        except ValueError:
            return value
    return value if value is None or isinstance(value, bool | int | float) else json.dumps(value)


def ordered_metrics(runs: Sequence[Run]) -> list[str]:
    """Every metric that was logged, those of the report first."""
    logged = metric_names(runs)
    known = [name for _, names in CHARTS for name in names if name in logged]
    return [*known, *sorted(set(logged) - set(known))]


def first_metrics(metrics: Sequence[str]) -> list[str]:
    """What is drawn before anything is picked: training and evaluation of what the report begins with."""
    pairs = [[name for name in names if name in metrics] for _, names in CHARTS]
    return list(itertools.chain.from_iterable(pair for pair in pairs if pair))[:4]


def points(
    run: Run, metric: str, along: str, smoothing: float, room: int
) -> tuple[list[float], list[float], list[float]]:
    """A curve: x, the values, and the values smoothed by an exponential mean that is not drawn to its start.

    Args:
        room: about how many points to return; the least and the largest value of each stretch are kept.
    """
    x, y = curve(run, metric, along)
    smooth, mean, weight = [], 0.0, 0.0
    for value in y:
        mean = smoothing * mean + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        smooth.append(mean / weight)
    if len(x) > room:
        width = 2 * len(x) / room
        kept = {0, len(x) - 1}
        for i in range(room // 2):
            stretch = range(int(i * width), min(len(y), int((i + 1) * width)))
            kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)} if stretch else set()
        places = sorted(kept)
        x, y, smooth = ([values[i] for i in places] for values in (x, y, smooth))
    return x, y, smooth


def room(curves: int) -> int:
    """Points for each of so many curves."""
    return max(60, min(1500, _POINTS // max(1, curves)))


def completions(runs: Sequence[Run], source: str) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Prompts, and what each run said to them, None where it was not asked; what most runs were asked first.

    Args:
        source: "samples", in their order, or "generations", the newest first and of each prompt the last.
    """
    said: dict[str, list[dict[str, Any] | None]] = {}
    for i, run in enumerate(runs):
        for answer in _rows(run.path / f"{source}.jsonl"):
            prompt = str(answer.get("prompt", ""))
            if source == "generations" and prompt in said:
                said[prompt] = said.pop(prompt)  # at the end, where the newest are
            said.setdefault(prompt, [None] * len(runs))[i] = answer
    found = list(said.items()) if source == "samples" else list(said.items())[::-1]
    return sorted(found, key=lambda item: sum(answer is None for answer in item[1]))


def stamp(runs: Iterable[Run], *files: str) -> str:
    """Changes when one of the files of one of the runs does, or its state."""
    seen = [(run.name, run.status, *(_stat(run.path / file) for file in files)) for run in runs]
    return f"{hash(tuple(seen)):x}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return _read_rows(path, _stat(path))


@lru_cache(maxsize=256)
def _read_rows(path: Path, stat: tuple[int, int]) -> list[dict[str, Any]]:
    rows = []
    if stat[1]:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # being written
                continue
    return [row for row in rows if isinstance(row, dict)]


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
