"""The runs and trials under a folder, read from what they left there: for `hydratune runs`, `compare` and the dashboard.

Only files are read, so that runs of other processes and machines are seen while they train, and hundreds of them at once.
"""

from __future__ import annotations

import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation, nearest
from hydratune.objective import Objective, last_values
from hydratune.summary import read_summary

HOME = Path("outputs")
STATES = ("running", "completed", "pruned", "failed", "interrupted", "stopped")
_QUIET = (
    300  # seconds without a line of metrics or log after which a run that has not ended is taken for dead
)
_TAIL = 2**14  # bytes of metrics.jsonl that tell how far a run is
_NAMES = {"output_dir", "run_name", "resume", *(f"trainer.{name}" for name in ("output_dir", "run_name"))}
_GROUPS = ("algo", "model", "data", "peft")
_RUN = {"config.yaml", "summary.json"}
_STUDY = {".study", "study.json"}  # the second is there after a first result
_NEVER_RUNS = {"wandb", ".hydra"}  # of which the latter has a config.yaml too
_PARTS = {"checkpoints", "model", "base", "artifacts"}  # unless it is a run that was called so
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "~": lambda value, part: str(part).lower() in str(value).lower(),
}
_ORDERED = ("<", ">", "<=", ">=")
_FILTER = re.compile(r"\s*([\w./\-]+)\s*(<=|>=|!=|<|>|=|~)\s*(.*?)\s*")


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: the directory.
        name: the directory below the folder that was searched, what commands and pages call the run.
    """

    path: Path
    name: str

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run trains for the first time, or when it was killed."""
        return read_summary(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml with dotted keys: {"algo.beta": 0.1, "lr": 1e-4, …}."""
        found = _yaml(self.path / "config.yaml")
        return dict(_flat(found)) if isinstance(found, dict) else {}

    @property
    def events(self) -> list[dict[str, Any]]:
        """metrics.jsonl, read anew each time; a line that is being written is left out."""
        from hydratune.tracking import read_metrics  # imports more than a list of runs has time for

        return read_metrics(self.path)

    @cached_property
    def last_sign(self) -> float:
        """When the run last wrote metrics, log or summary, seconds since the epoch; 0 when it never did."""
        return max(_modified(self.path / name) for name in ("metrics.jsonl", "train.log", "summary.json"))

    @cached_property
    def _newest(self) -> list[dict[str, Any]]:
        """The last events, from the end of metrics.jsonl alone, for there may be hundreds of runs."""
        from hydratune.rowfile import last_rows

        return [e for e in last_rows(self.path / "metrics.jsonl", _TAIL) if isinstance(e.get("step"), int)]

    @cached_property
    def ended(self) -> bool:
        """Whether the summary is the last word: no event is of a later step, as those of a resumed run are."""
        if not self.summary:
            return False
        if self.summary.get("logged_bytes") == _size(self.path / "metrics.jsonl"):
            return True  # nothing was logged since, for which no metrics need to be read
        if not self._newest or self._newest[-1]["step"] <= (self.summary.get("steps") or 0):
            return True
        # a run that failed before it knew its steps
        return not self.summary.get("steps") and _modified(self.path / "metrics.jsonl") <= _modified(
            self.path / "summary.json"
        )

    @cached_property
    def status(self) -> str:
        """One of `STATES`: that of the summary; of a run that has not ended, whether it still writes: "stopped" was killed."""
        if self.ended:
            return str(self.summary.get("status", "stopped"))
        times = [e["time"] for e in self._newest if isinstance(e.get("time"), int | float)]
        gap = max((late - early for early, late in pairwise(times)), default=0.0)
        return "running" if time.time() - self.last_sign < max(_QUIET, 3 * gap) else "stopped"

    @cached_property
    def final(self) -> dict[str, float]:
        """The last value of each metric: of the summary, or of the events of a run that has not ended."""
        known = (self.summary.get("metrics") or {}).get("final") if self.ended else None
        return last_values(self.events if known is None else [known])

    @property
    def started(self) -> str:
        """As in the summary, else the time of the config: ISO 8601 to the second."""
        known = self.summary.get("started")
        made = _modified(self.path / "config.yaml")
        return str(known)[:19] if known else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(made))

    @property
    def objective(self) -> tuple[str, float | None]:
        """Name and value; ("", None) before there is one. Of a resumed run what it has logged by now."""
        found = self.summary.get("objective") or {}
        name = str(found.get("name", ""))
        if not name or self.ended:
            return name, found.get("value")
        try:
            value = Objective.parse(name).value(self.events, self.summary)
        except (ValueError, TypeError):  # a damaged file
            value = None
        return name, None if value is None or not math.isfinite(value) else value

    @property
    def trial_of(self) -> Path | None:
        """The folder of the study that the run is a trial of."""
        return self.path.parent if is_study(self.path.parent) else None

    @cached_property
    def choices(self) -> dict[str, str]:
        """The entry picked of each group, from Hydra's own file, which is there when the run starts: {"peft": "lora", …}."""
        found = _yaml(self.path / ".hydra" / "hydra.yaml")
        try:
            return {str(k): str(v) for k, v in found["hydra"]["runtime"]["choices"].items()}
        except (KeyError, TypeError, AttributeError):
            return {}

    @cached_property
    def typed(self) -> list[str]:
        """The keys that were set on the command line, in its order."""
        found = _yaml(self.path / ".hydra" / "overrides.yaml")
        return [str(o).partition("=")[0].lstrip("+~") for o in found] if isinstance(found, list) else []

    def value(self, key: str) -> Any:
        """A fact of the run by name: status, name, started, objective, a field of the summary (seconds, steps, …), a final
        metric (eval_loss), or a setting (lr, algo.beta; a group's entry as `peft`). None when it has none."""
        if key in ("name", "status", "started"):
            return getattr(self, key)
        if key == "objective":
            return self.objective[1]
        if key == "seconds":
            return sum(self.summary["seconds"].values()) if "seconds" in self.summary else None
        if key == "steps" and not self.ended:
            return self._newest[-1]["step"] if self._newest else None
        # before there is a summary
        groups = {} if self.summary else {g: self.choices.get(g) for g in _GROUPS}
        told = (self.summary, self.final) if self.ended else (self.final, self.summary)
        for facts in (*told, groups, self.config):
            if facts.get(key) is not None and not isinstance(facts[key], dict | list):
                return facts[key]
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _yaml(path: Path) -> Any:
    return _parsed(path, _modified(path))


@lru_cache(maxsize=4096)
def _parsed(path: Path, modified: float) -> Any:
    """A file of YAML; None when it is not there or torn. Those of a run that trains are asked for every second."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as quick where libyaml is there
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_runs(home: Path = HOME) -> list[Run]:
    """Every run and trial below a folder, the one that wrote last first; the folder itself when it is one.

    Links are not followed: a run is listed once, where it lies, and nothing that lies elsewhere.
    """
    found = [
        Run(folder, str(folder.relative_to(home)) if folder != home else home.name)
        for folder, is_run in _walk(home)
        if is_run
    ]
    return sorted(found, key=lambda run: (-run.last_sign, run.name))


def find_studies(home: Path = HOME) -> list[Path]:
    """The folder of every study below a folder, or that folder itself, begun or done."""
    return [folder for folder, is_run in _walk(home) if not is_run]


def is_study(folder: Path) -> bool:
    """Whether a folder is a study's, begun or done."""
    return any((folder / mark).is_file() for mark in _STUDY)


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of runs (True) and of studies (False)."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    names = {entry.name for entry in entries}
    if _RUN & names:
        yield folder, True
        return
    if _STUDY & names:
        yield folder, False
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in _NEVER_RUNS:
            inner = folder / entry.name
            if entry.name not in _PARTS or any((inner / mark).is_file() for mark in _RUN):
                yield from _walk(inner)


def find_run(name: str, home: Path = HOME, known: Callable[[], list[Run]] | None = None) -> Run:
    """The run of a directory, or of a name (its end or another part is enough) below `home`; `latest` wrote last.

    Args:
        known: the runs below `home`, for those who ask for many names; default: they are looked for.

    Raises:
        UserError: there is none, or several have that name.
    """
    given = Path(name).expanduser()
    if given.is_dir() and next(_walk(given), None) == (given, True):
        return Run(given, name)
    runs = known() if known is not None else find_runs(home)
    if name == "latest" and runs:
        return runs[0]
    fitting = [r for r in runs if r.name == name] or [r for r in runs if r.name.endswith(name)]
    fitting = fitting or [r for r in runs if name in r.name]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        shown = ", ".join(r.name for r in fitting[:5])
        raise UserError(Violation("RUN", name, f"fits {len(fitting)} runs: {shown}", "give more of the name"))
    fix = nearest(name, [r.name for r in runs]) if runs else "train one first: python train.py"
    raise UserError(Violation("RUN", name, f"there is no such run under {home}", fix))


def matching(runs: Iterable[Run], filters: Iterable[str]) -> list[Run]:
    """The runs for which every filter holds.

    Args:
        filters: `KEY OP VALUE` with a key of `Run.value` and one of = != < <= > >= ~ (contains), e.g. "lr<1e-4", "peft=lora".

    Raises:
        UserError: a filter cannot be read, asks for more or less than what is no number, or no run knows its key.
    """
    everything = runs = list(runs)
    for text in filters:
        parsed = _FILTER.fullmatch(text)
        if parsed is None:
            why, fix = "is no filter", "KEY=VALUE, or with != < <= > >= or ~ (contains), e.g. 'lr<1e-4'"
            raise UserError(Violation("filter", text, why, fix))
        key, sign, wanted = parsed[1], parsed[2], _plain(parsed[3])
        values = {id(run): run.value(key) for run in everything}
        if everything and all(value is None for value in values.values()):
            known = {k for run in everything for k in run.config} | {"status", "name", "objective", "started"}
            raise UserError(Violation("filter", text, f"no run has {key!r}", nearest(key, sorted(known))))
        if sign in _ORDERED and not isinstance(wanted, float):
            if not parsed[3]:
                raise UserError(Violation("filter", text, "ends without a value", "give one, e.g. 'lr<1e-4'"))
            if any(_is_number(value) for value in values.values()):
                why = f"{parsed[3]!r} is no number, and {key} is one"
                raise UserError(Violation("filter", text, why, "give one, e.g. 'lr<1e-4'"))
        runs = [run for run in runs if _holds(_COMPARE[sign], values[id(run)], wanted)]
    return runs


def _is_number(value: Any) -> bool:
    return isinstance(_plain(value) if isinstance(value, str) else value, int | float)


def _plain(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _holds(compare: Callable[[Any, Any], bool], value: Any, wanted: Any) -> bool:
    if isinstance(value, str):
        value = _plain(value)  # YAML reads 1e-4 as text
    try:
        return compare(value, wanted)
    except TypeError:  # None, or text against a number
        return False


def differences(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with their values; None where a run does not have one.

    Where a run wrote its output and what it was called is not a setting. What another one tells is not told again: lr is
    trainer.learning_rate, and of runs with and without an adapter peft.type tells that the rest of peft is there or not;
    so does model_type of an architecture.
    """
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    found = {key: [config.get(key) for config in configs] for key in keys if key not in _NAMES}
    found = {key: values for key, values in found.items() if any(other != values[0] for other in values)}
    short = [values for key, values in found.items() if "." not in key]
    for part, kind in (("peft.", "peft.type"), ("model.architecture.", "model.architecture.model_type")):
        for key in [k for k in found if k.startswith(part) and k != kind and kind in found]:
            given = [v for v, there in zip(found[key], found[kind], strict=True) if there is not None]
            if all(v == given[0] for v in given):
                del found[key]
    return {k: v for k, v in found.items() if not (k.startswith("trainer.") and v in short)}


def metric_names(runs: Iterable[Run]) -> list[str]:
    """Every metric that the runs have logged, in the order in which they came."""
    seen: dict[str, None] = {}
    for run in runs:
        for event in run.events:
            seen.update(dict.fromkeys(k for k, v in event.items() if isinstance(v, int | float)))
    return [name for name in seen if name not in ("step", "epoch", "time")]


def curve(run: Run, metric: str, along: str = "step") -> tuple[list[float], list[float]]:
    """The points of a metric along `step`, `epoch` or `time` (seconds since the start)."""
    return points(run.events, metric, along)


def points(
    events: Iterable[dict[str, Any]], metric: str, along: str = "step"
) -> tuple[list[float], list[float]]:
    """The points of a metric in events."""
    found = [(e[along], e[metric]) for e in events if isinstance(e.get(metric), int | float) and along in e]
    return [x for x, _ in found], [y for _, y in found]
