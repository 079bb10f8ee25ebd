"""The runs and trials under a folder, read from what they left there: for `hydratune runs`, `compare` and the dashboard.

Only files are read, so that runs of other processes and machines are seen while they train, and hundreds of them at once.
"""

from __future__ import annotations

import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation, nearest

HOME = Path("outputs")
STATES = ("running", "completed", "pruned", "failed", "interrupted", "stopped")
_QUIET = 300  # seconds without a line of metrics or log after which a run without a summary is taken for dead
_NAMES = {"output_dir", "run_name", "resume", *(f"trainer.{name}" for name in ("output_dir", "run_name"))}
_NOT_RUNS = {"checkpoints", "model", "base", "wandb", ".hydra", "artifacts"}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "~": lambda value, part: str(part).lower() in str(value).lower(),
}
_FILTER = re.compile(r"\s*([\w./\-]+)\s*(<=|>=|!=|<|>|=|~)\s*(.*?)\s*")
_PAIR = re.compile(r"( *)([A-Za-z_][\w./-]*):(?: (.+))?")
_ITEM = re.compile(r"( *)- (.+)")
_INT = re.compile(r"-?(0|[1-9]\d*)")
_FLOAT = re.compile(r"-?\d+\.\d*(e[+-]\d+)?")
_TEXT = re.compile(r"[A-Za-z/][\w./+=-]*( [\w./+=-]+)*")
_WORDS: dict[str, Any] = {"null": None, "true": True, "false": False, "{}": {}, "[]": []}
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


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
        try:
            found = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml with dotted keys: {"algo.beta": 0.1, "lr": 1e-4, …}."""
        try:
            text = (self.path / "config.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return {}
        quick = _quickly(text)
        return _slowly(text) if quick is None else quick

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
    def status(self) -> str:
        """One of `STATES`: that of the summary, unless a resumed run has written metrics after it; "stopped" was killed."""
        ended = _modified(self.path / "summary.json")
        if ended and _modified(self.path / "metrics.jsonl") <= ended:
            return str(self.summary.get("status", "stopped"))
        return "running" if time.time() - self.last_sign < _QUIET else "stopped"

    @property
    def started(self) -> str:
        """As in the summary, else the time of the config: ISO 8601 to the second."""
        known = self.summary.get("started")
        made = _modified(self.path / "config.yaml")
        return str(known)[:19] if known else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(made))

    @property
    def objective(self) -> tuple[str, float | None]:
        """Name and value; ("", None) before there is one."""
        found = self.summary.get("objective") or {}
        return str(found.get("name", "")), found.get("value")

    @property
    def trial_of(self) -> Path | None:
        """The folder of the study that the run is a trial of."""
        return self.path.parent if (self.path.parent / "study.json").is_file() else None

    def value(self, key: str) -> Any:
        """A fact of the run by name: status, name, started, objective, a field of the summary (seconds, steps, …), a final
        metric (eval_loss), or a setting (lr, algo.beta; a group's entry as `peft`). None when it has none."""
        if key in ("name", "status", "started"):
            return getattr(self, key)
        if key == "objective":
            return self.objective[1]
        if key == "seconds":
            return sum(self.summary["seconds"].values()) if "seconds" in self.summary else None
        final = (self.summary.get("metrics") or {}).get("final") or {}
        for facts in (self.summary, final, self.config):
            if facts.get(key) is not None and not isinstance(facts[key], dict | list):
                return facts[key]
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _slowly(text: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as quick where libyaml is there
    try:
        loaded = yaml.load(text, Loader=loader)
    except yaml.YAMLError:
        return {}
    return dict(_flat(loaded)) if isinstance(loaded, dict) else {}


def _quickly(text: str) -> dict[str, Any] | None:
    """The same in a tenth of the time for what `yaml.safe_dump` makes of plain settings; None for anything else."""
    found: dict[str, Any] = {}
    above: list[tuple[int, str]] = []  # the keys that a line stands below, with their indents
    indents = [0]  # of the sections that are open
    opened = ""  # a key without a value, which its next line explains
    for line in text.splitlines():
        item = _ITEM.fullmatch(line)
        if item and opened and len(item[1]) == above[-1][0]:
            known, value = _scalar(item[2])
            if not known or isinstance(value, dict | list):
                return None
            found.setdefault(opened, []).append(value)
            continue
        pair = _PAIR.fullmatch(line)
        if pair is None:
            return None
        indent = len(pair[1])
        if opened and opened not in found:
            if indent <= indents[-1]:
                return None
            indents.append(indent)
        while indents[-1] > indent:
            indents.pop()
        if indents[-1] != indent:
            return None
        while above and above[-1][0] >= indent:
            above.pop()
        name = ".".join([*(key for _, key in above), pair[2]])
        if pair[3] is None:
            above.append((indent, pair[2]))
            opened = name
            continue
        known, found[name] = _scalar(pair[3])
        if not known:
            return None
        opened = ""
    return None if opened and opened not in found else found


def _scalar(text: str) -> tuple[bool, Any]:
    """A plain value, if it is one that can mean nothing else."""
    if text in _WORDS:
        return True, _WORDS[text]
    if _INT.fullmatch(text):
        return True, int(text)
    if _FLOAT.fullmatch(text):
        return True, float(text)
    return _TEXT.fullmatch(text) is not None and text.lower() not in _NOT_TEXT, text


def find_runs(home: Path = HOME) -> list[Run]:
    """Every run and trial below a folder, the one that wrote last first; the folder itself when it is one."""
    found = [
        Run(folder, str(folder.relative_to(home)) if folder != home else home.name) for folder in _walk(home)
    ]
    return sorted(found, key=lambda run: (-run.last_sign, run.name))


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if {"config.yaml", "summary.json"} & {entry.name for entry in entries}:
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in _NOT_RUNS:
            yield from _walk(folder / entry.name)


def find_run(name: str, home: Path = HOME) -> Run:
    """The run of a directory, or of a name (its end or another part is enough) below `home`; `latest` wrote last.

    Raises:
        UserError: there is none, or several have that name.
    """
    given = Path(name).expanduser()
    if given.is_dir() and next(_walk(given), None) == given:
        return Run(given, name)
    runs = find_runs(home)
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
        UserError: a filter cannot be read, or no run knows its key.
    """
    runs = list(runs)
    for text in filters:
        parsed = _FILTER.fullmatch(text)
        if parsed is None:
            why, fix = "is no filter", "KEY=VALUE, or with != < <= > >= or ~ (contains), e.g. 'lr<1e-4'"
            raise UserError(Violation("filter", text, why, fix))
        key, sign, wanted = parsed[1], parsed[2], _plain(parsed[3])
        values = [run.value(key) for run in runs]
        if runs and all(value is None for value in values):
            known = {k for run in runs for k in run.config} | {"status", "name", "objective", "started"}
            raise UserError(Violation("filter", text, f"no run has {key!r}", nearest(key, sorted(known))))
        runs = [run for run, value in zip(runs, values, strict=True) if _holds(_COMPARE[sign], value, wanted)]
    return runs


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
    points = [
        (e[along], e[metric]) for e in run.events if isinstance(e.get(metric), int | float) and along in e
    ]
    return [x for x, _ in points], [y for _, y in points]
