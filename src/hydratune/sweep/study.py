"""A study: what was asked, what came back, and who is at work on what. Only the supervisor writes outcomes here.

Everything that decides something (handing out a trial, telling its outcome, taking over what a dead worker left)
happens under one lock for all workers of the study, which dies with its holder. So a trial has one owner at any time,
is told once, and keeps its number and directory when it is taken up again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from hydratune.errors import UserError, Violation
from hydratune.secrets import hide_password
from hydratune.sweep.search import SamplerFactory, make_pruner
from hydratune.sweep.space import Point, Space
from hydratune.sweep.storage import exclusive, is_url, open_storage

RESULT = "result.json"
_MARK = ".study"  # in a study's folder: whose it is
_TELLS = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "crashed": TrialState.FAIL,
}
_ENOUGH = 4  # complete trials, for an importance to mean anything
_INFEASIBLE = (
    "diverged",
    "out of memory",
    "invalid",
)  # told as pruned with a violated constraint: TPE learns from these


@dataclass(frozen=True)
class StudyConfig:
    """What makes a study, as plain values."""

    name: str
    storage: str
    space: Space
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    base: tuple[str, ...] = ()  # what every trial has in common, for the fingerprint
    constraints: tuple[str, ...] = ()
    n_trials: int | None = None
    sampler: str = "tpe"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    pruner: str = "none"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    enqueue: tuple[Mapping[str, Any], ...] = ()
    seed: int = 42
    max_retries: int = 2
    lease: float = 120.0

    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a study goes on."""
        return {
            "space": self.space.describe(),
            "base": list(self.base),
            "objectives": dict(zip(self.objectives, self.directions, strict=True)),
            "constraints": list(self.constraints),
        }


@dataclass(frozen=True)
class Ticket:
    """A trial that was handed out."""

    trial_id: int
    number: int
    settings: Point
    attempt: int  # counts from 0; above it, the trial was begun before


@dataclass
class Outcome:
    """How one attempt at a trial ended.

    state: complete, pruned, diverged, out of memory, invalid (the settings cannot work together), failed (an
    exception), crashed (the process died), interrupted.
    """

    state: str
    values: list[float] | None = None
    reason: str = ""
    constraints: dict[str, float] = field(default_factory=dict)  # at or below 0 where the bound is kept
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    attempt: int = 0
    study: str = ""  # whose trial it was, by its uid

    def write(self, directory: Path) -> None:
        """Whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{RESULT}.part"
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(directory / RESULT)

    @classmethod
    def read(cls, directory: Path, attempt: int, study: str) -> Outcome | None:
        """What this attempt of this study's wrote, if it came that far."""
        try:
            outcome = cls(**json.loads((directory / RESULT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return outcome if (outcome.attempt, outcome.study) == (attempt, study) else None


@dataclass(frozen=True)
class Record:
    """One trial as people see it."""

    number: int
    state: str  # running, waiting, or the state of its outcome
    values: list[float] | None
    settings: dict[str, Any]
    params: dict[str, Any]
    reason: str
    seconds: float | None
    attempts: int
    intermediate: dict[int, float]
    started: float | None
    ended: float | None
    feasible: bool
    metrics: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.state not in ("running", "waiting")


class Study:
    """A study in its storage, seen by one worker.

    Raises:
        UserError: the storage does not open, or the study was begun with another space or base.
    """

    def __init__(self, config: StudyConfig, directory: Path):
        self.config, self.directory = config, directory
        self.pruner = make_pruner(config.pruner, config.pruner_options)
        self._samplers = SamplerFactory(config.sampler, config.sampler_options, config.seed)
        self._check_folder()
        self.storage: BaseStorage = open_storage(config.storage)
        self.worker = f"{_here()}:{os.getpid()}:{_process_started(os.getpid())}:{uuid.uuid4().hex[:8]}"
        self._seen: dict[
            str, tuple[Any, float]
        ] = {}  # other workers' signs of life, and when they last changed
        self._beat = 0.0
        self.exhausted = False  # whether the sampler knows of nothing more to try
        with self._lock():
            self._check_folder()  # before anything is created in the storage
            self.optuna = optuna.create_study(
                storage=self.storage, study_name=config.name, directions=list(config.directions),
                pruner=self.pruner, load_if_exists=True,
            )  # fmt: skip
            self._check_fingerprint()
            if "uid" not in self.optuna.user_attrs:  # tells it from another study of this name, e.g. in W&B
                self.optuna.set_user_attr("uid", uuid.uuid4().hex[:6])
            self.uid: str = self.optuna.user_attrs["uid"]
            self._sign_folder()
            self._enqueue()
        self.keep_alive(force=True)

    def _lock(self) -> AbstractContextManager[None]:
        return exclusive(self.storage, self.config.storage, self.config.name)

    def _check_fingerprint(self) -> None:
        now, then = self.config.fingerprint(), self.optuna.user_attrs.get("fingerprint")
        if then is None:
            self.optuna.set_user_attr("fingerprint", now)
            return
        changes = []
        for part in now:
            if isinstance(now[part], dict):
                keys = [*dict.fromkeys([*then.get(part, {}), *now[part]])]
                pairs = [(k, then.get(part, {}).get(k), now[part].get(k)) for k in keys]
                changes += [f"{part} {k}: was {a}, is {b}" for k, a, b in pairs if a != b]
            elif now[part] != then.get(part):
                old = then.get(part, [])
                changes += [f"{part}: {o} is gone" for o in old if o not in now[part]]
                changes += [f"{part}: {o} is new" for o in now[part] if o not in old]
        if changes:
            raise UserError(
                Violation(
                    "sweep.name",
                    self.config.name,
                    "this study was begun with another search; " + "; ".join(changes),
                    "give this search a folder of its own (output_dir=…), or run the study's own command",
                )
            )

    def _owner(self) -> str:
        """The uid of the study whose trials the folder holds; empty when it holds none."""
        mark = self.directory / _MARK
        return mark.read_text(encoding="utf-8").strip() if mark.is_file() else ""

    def _check_folder(self) -> None:
        """Its trials' folders must not hold another study's checkpoints and results.

        Before the storage is opened, a journal that is not there yet tells as much.
        """
        owner, uid = self._owner(), None
        if not owner:
            return
        if hasattr(self, "storage"):
            with contextlib.suppress(KeyError):
                study = self.storage.get_study_id_from_name(self.config.name)
                uid = self.storage.get_study_user_attrs(study).get("uid")
        elif is_url(self.config.storage) or Path(self.config.storage).expanduser().is_file():
            return
        if owner != uid:
            why = "this folder holds the trials of another study"
            fix = "give output_dir=… a folder of its own, or remove this one"
            raise UserError(Violation("output_dir", str(self.directory), why, fix))

    def _sign_folder(self) -> None:
        if not self._owner():
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / _MARK).write_text(f"{self.uid}\n", encoding="utf-8")

    def _enqueue(self) -> None:
        """The points of a grid in order, or the known good ones; those that are there already are left."""
        if self.config.sampler == "grid":
            points = [*self.config.space.grid()]
        else:
            points = [self.config.space.parameters(p) for p in self.config.enqueue]
        # As the storage keeps them: lists for tuples. Who enqueued a point elsewhere left only Optuna's own note of it
        kept = [t.user_attrs.get("point") or t.system_attrs.get("fixed_params") for t in self.trials()]
        there = {_as_kept(point) for point in kept}
        for point in points:
            if (key := _as_kept(point)) not in there:
                there.add(key)
                self.optuna.enqueue_trial(point, user_attrs={"point": point})

    # -- handing out and taking back

    def next_trial(self) -> Ticket | None:
        """The next trial to run, this worker's from now on; None when the budget is spent or handed out."""
        with self._lock():
            trials = self.trials()
            taken = sum(t.state != TrialState.WAITING for t in trials)
            if self.exhausted or (self.config.n_trials is not None and taken >= self.config.n_trials):
                return None
            self.optuna.sampler = self._samplers.make(len(trials))
            trial = self.optuna.ask()
            attempt = int(trial.user_attrs.get("attempt", -1)) + 1
            trial.set_user_attr("owner", self.worker)
            trial.set_user_attr("attempt", attempt)
            try:
                settings = trial.user_attrs.get("settings") or self.config.space.suggest(trial)
            except BaseException as error:
                self.optuna.tell(trial, state=TrialState.FAIL)
                if isinstance(error, UserError) or not isinstance(error, Exception):
                    raise
                why = f"raised {type(error).__name__}: {error}"
                if self.config.space.function is None:
                    fix = "choose another one: this cannot search this space or these objectives"
                    raise UserError(Violation("sweep.sampler", self.config.sampler, why, fix)) from error
                raise UserError(Violation("sweep.space_function", None, why, "mend the function")) from error
            trial.set_user_attr("settings", settings)
            return Ticket(trial._trial_id, trial.number, settings, attempt)

    def tell(self, ticket: Ticket, outcome: Outcome) -> bool:
        """Record an outcome; false when the trial is no longer this worker's."""
        with self._lock():
            trial = self.storage.get_trial(ticket.trial_id)
            if trial.state != TrialState.RUNNING or trial.user_attrs.get("owner") != self.worker:
                return False
            self._tell(trial, outcome)
            return True

    def _tell(self, trial: FrozenTrial, outcome: Outcome) -> None:
        if outcome.state in ("interrupted", "crashed"):
            self._attr(trial, "owner", "")  # whoever takes it up next may die before it can sign
        if outcome.state == "interrupted":
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            return
        if outcome.state == "crashed":
            crashes = int(trial.user_attrs.get("crashes", 0)) + 1
            self._attr(trial, "crashes", crashes)
            if crashes <= self.config.max_retries:
                self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                return
        for name in ("state", "reason", "seconds", "metrics"):
            if value := getattr(outcome, name):
                self._attr(trial, "outcome" if name == "state" else name, value)
        handle = optuna.trial.Trial(self.optuna, trial._trial_id)
        # Every trial has the constraint: one without it would count as a violation
        for name, value in {"runs": float(outcome.state in _INFEASIBLE), **outcome.constraints}.items():
            if f"constraints:{name}" not in trial.system_attrs:
                handle.set_constraint(name, value)
        state = _TELLS.get(outcome.state, TrialState.PRUNED)
        try:
            values = outcome.values if state == TrialState.COMPLETE else None
            self.optuna.tell(trial.number, values, state=state)
        except (
            RuntimeError
        ) as error:  # the sampler has tried everything; the outcome is in the storage by then
            if "Study.stop" not in str(error):
                raise
            self.exhausted = True

    def _attr(self, trial: FrozenTrial, name: str, value: Any) -> None:
        self.storage.set_trial_user_attr(trial._trial_id, name, value)

    # -- signs of life

    def keep_alive(self, *, force: bool = False) -> None:
        """Tell workers on other machines that this one lives."""
        if force or time.monotonic() - self._beat > self.config.lease / 4:
            self._beat = time.monotonic()
            self.optuna.set_user_attr(f"alive:{self.worker}", time.time())

    def reap(self) -> list[int]:
        """Take over running trials of workers that are no more; gives their numbers.

        A trial that had written its result is told, any other one waits to be taken up again from its checkpoint.
        """
        with self._lock():
            taken = []
            beats = self.optuna.user_attrs
            for trial in self.trials():
                owner = trial.user_attrs.get("owner")
                if (
                    trial.state != TrialState.RUNNING
                    or owner == self.worker
                    or (owner and self._lives(owner, beats))
                ):
                    continue
                attempt = int(trial.user_attrs.get("attempt", 0))
                outcome = Outcome.read(self.directory / str(trial.number), attempt, self.uid)
                self._tell(trial, outcome or Outcome("interrupted"))
                taken.append(trial.number)
            return taken

    def _lives(self, worker: str, beats: Mapping[str, Any]) -> bool:
        here, pid, started, _ = worker.split(":")
        if here == _here():
            return _process_started(int(pid)) == started
        beat, now = beats.get(f"alive:{worker}"), time.monotonic()
        if worker not in self._seen or self._seen[worker][0] != beat:
            self._seen[worker] = (beat, now)  # clocks of machines differ, so its change is timed here
        return now - self._seen[worker][1] < self.config.lease

    # -- reading

    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def finished(self) -> int:
        return sum(t.state.is_finished() for t in self.trials())

    def running_elsewhere(self) -> int:
        return sum(
            t.state == TrialState.RUNNING and t.user_attrs.get("owner") != self.worker for t in self.trials()
        )

    def records(self) -> list[Record]:
        return records(self.trials())

    def importance(self) -> dict[str, float]:
        """How much each parameter decides the first objective (PED-ANOVA, arXiv:2304.10255), the most first.

        Empty when there is nothing to say: too few trials are complete, their objectives are the same, or fewer than
        two parameters were varied, of which shares could be given.
        """
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        tried: dict[str, set[Any]] = {}
        for trial in complete:
            for name, value in trial.params.items():
                tried.setdefault(name, set()).add(value)
        varied = [name for name, values in tried.items() if len(values) > 1]
        if len(complete) < _ENOUGH or len(varied) < 2 or len({t.values[0] for t in complete}) == 1:
            return {}
        target = None
        if len(self.config.directions) > 1:  # the measure looks at what makes the target low
            sign = 1.0 if self.config.directions[0] == "minimize" else -1.0
            target = lambda trial: sign * trial.values[0]  # noqa: E731
        try:
            return optuna.importance.get_param_importances(self.optuna, params=varied, target=target)
        except (ValueError, RuntimeError):
            return {}

    def __repr__(self) -> str:
        return f"Study({self.config.name!r}, {hide_password(self.config.storage)!r})"


def _as_kept(point: Mapping[str, Any] | None) -> str:
    return json.dumps(point, sort_keys=True)


def records(trials: Sequence[FrozenTrial]) -> list[Record]:
    """Trials of a storage as people see them."""
    found = []
    for t in trials:
        told = t.user_attrs.get("outcome") if t.state.is_finished() else None
        state = told or {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(
            t.state.name, t.state.name.lower()
        )
        seconds = t.duration.total_seconds() if t.duration else None
        bounds = [v for k, v in t.system_attrs.items() if k.startswith("constraints:")]
        found.append(
            Record(
                number=t.number,
                state=state,
                values=t.values if t.state == TrialState.COMPLETE else None,
                settings=dict(t.user_attrs.get("settings") or t.system_attrs.get("fixed_params") or {}),
                params=dict(t.params),
                reason=str(t.user_attrs.get("reason", "")),
                seconds=seconds,
                attempts=int(t.user_attrs.get("attempt", -1)) + 1,
                intermediate=dict(sorted(t.intermediate_values.items())),
                started=t.datetime_start.timestamp() if t.datetime_start else None,
                ended=t.datetime_complete.timestamp() if t.datetime_complete else None,
                feasible=all(b <= 0 for b in bounds),
                metrics=dict(t.user_attrs.get("metrics") or {}),
            )
        )
    return found


def best(trials: Sequence[Record], directions: Sequence[str]) -> list[Record]:
    """The best complete trial that keeps all bounds; with several objectives the Pareto front, by number."""
    signs = [1.0 if d == "minimize" else -1.0 for d in directions]
    able = [
        (t, [s * v for s, v in zip(signs, t.values, strict=True)]) for t in trials if t.values and t.feasible
    ]
    if len(signs) == 1:
        return [min(able, key=lambda pair: (pair[1][0], pair[0].number))[0]] if able else []

    def dominated(mine: list[float]) -> bool:
        return any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for _, other in able
        )

    return [t for t, mine in able if not dominated(mine)]


def _here() -> str:
    """This machine and process namespace: where a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        boot, space = "", 0
    return f"{socket.gethostname()}-{boot[:8]}-{space}"


def _process_started(pid: int) -> str:
    """When a living process was started, in kernel ticks; empty for none: numbers are used again, with this not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in ("Z", "X") else rest[18]
