"""Runs a study: asks it for trials, starts each the moment a slot is free, tells what came back.

It holds nothing that is not in the study or in a trial's directory, so that it may be killed at any moment: the same
command goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydratune.errors import Interrupted, UserError, Violation
from hydratune.objective import Objective, direction
from hydratune.settings import SweepSettings
from hydratune.sweep.executors import Executor, devices, make_executor, slots
from hydratune.sweep.export import Exporter
from hydratune.sweep.job import Command, Job, pack
from hydratune.sweep.search import SamplerFactory, make_pruner
from hydratune.sweep.space import Dimension, Space, as_space
from hydratune.sweep.storage import can_be_shared
from hydratune.sweep.study import Outcome, Record, Study, StudyConfig, Ticket, best
from hydratune.sweep.trial import Bound, TrialSpec
from hydratune.sweep.view import View

_PATIENCE = 1.0  # seconds between looks at what other workers have done
_REAP_EVERY = 5.0  # seconds
_ON_A_CLUSTER = 8  # trials at the same time, unless told
_COUNTED = ("failed", "crashed")  # what max_failures counts; the rest is what a search may well run into


@dataclass(frozen=True)
class Result:
    """What a sweep found.

    Attributes:
        trials: all of them, by number.
        front: the best trial that kept all bounds, or the Pareto front; empty when none did.
        directory: of the study.
    """

    trials: list[Record]
    front: list[Record]
    directory: Path

    @property
    def best(self) -> Record:
        """
        Raises:
            LookupError: no trial came to its end within the bounds.
        """
        if not self.front:
            raise LookupError("no trial has completed within the constraints")
        return self.front[0]


class Sweep:
    """A search, planned and checked; `run` carries it out.

    Args:
        task: a `Command`, or a function from a trial's settings to its objective (a number, a list for several
            objectives, or a mapping of metrics).
        space: settings by name.
        settings: how to search.
        objectives: metrics, as `objective.Objective` reads them.
        directory: of the study; a trial's is the folder below with its number.
        seed: of the sampler.

    Raises:
        UserError: with all that is wrong with them.
    """

    def __init__(
        self,
        task: Command | Callable[[dict[str, Any]], Any],
        space: Space | Mapping[str, Any],
        settings: SweepSettings,
        *,
        objectives: Sequence[str],
        directory: Path,
        seed: int = 42,
        base: Sequence[str] = (),
    ):
        self.task, self.settings, self.directory = task, settings, directory.absolute()
        self.space = as_space(space)
        self.sampler = self._sampler()
        self.config = StudyConfig(
            name=settings.name or self.directory.name,
            storage=settings.storage or str(self.directory / "journal.log"),
            space=self.space,
            objectives=tuple(objectives),
            directions=_directions(objectives, settings.direction),
            base=tuple(base),
            constraints=tuple(settings.constraints),
            n_trials=self._budget(),
            sampler=self.sampler,
            sampler_options=settings.sampler_options,
            pruner=settings.pruner,
            pruner_options=settings.pruner_options,
            enqueue=tuple(settings.enqueue),
            seed=seed,
            max_retries=settings.max_retries,
            lease=settings.lease,
        )
        self.gpus = devices() if settings.executor == "local" else []
        workers = settings.workers
        if workers == "auto" and settings.executor != "local":
            workers = min(_ON_A_CLUSTER, self.config.n_trials or _ON_A_CLUSTER)
        self.slots = slots(workers, self.gpus, settings.gpus_per_trial, settings.trials_per_gpu)
        self._check()

    def _sampler(self) -> str:
        chosen, wanted = self.settings.sampler, self.settings.n_trials
        if chosen != "auto":
            return chosen
        return "grid" if self.space.finite and (wanted is None or wanted >= len(self.space)) else "tpe"

    def _budget(self) -> int | None:
        wanted = self.settings.n_trials
        if self.sampler != "grid" or not self.space.finite:
            return wanted
        return len(self.space) if wanted is None else min(wanted, len(self.space))

    def _check(self) -> None:
        settings, wrong = self.settings, []
        if not self.space.dimensions and self.space.function is None:
            wrong.append(
                Violation(
                    "sweep.space", None, "nothing is searched", "give several values, e.g. lr=1e-5,2e-5"
                )
            )
        if self.sampler == "grid" and not self.space.finite:
            endless = [k for k, d in self.space.describe().items() if not d.startswith(("choice", "paired"))]
            why = f"a grid needs finitely many values, these have no end: {', '.join(endless)}"
            wrong.append(
                Violation("sweep.sampler", "grid", why, "give values (1e-5,2e-5), or use sampler=random")
            )
        elif self.config.n_trials is None and settings.timeout is None:
            why = "a search needs to know when it has tried enough"
            wrong.append(
                Violation("sweep.n_trials", None, why, "set sweep.n_trials=30, or sweep.timeout in seconds")
            )
        if len(self.config.objectives) > 1 and settings.pruner != "none":
            why = "trials with several objectives cannot be compared while they run"
            wrong.append(
                Violation("sweep.pruner", settings.pruner, why, "use sweep.pruner=none, or one objective")
            )
        if len(self.slots) > 1 and not can_be_shared(self.config.storage):
            why = "SQLite serves one worker"
            wrong.append(
                Violation(
                    "sweep.storage", settings.storage, why, "use a journal file or PostgreSQL, or workers=1"
                )
            )
        if settings.n_trials is not None and settings.n_trials < 1:
            wrong.append(Violation("sweep.n_trials", settings.n_trials, "is out of range", "give 1 or more"))
        checks: list[Callable[[], Any]] = [
            *(partial(Bound.parse, text) for text in settings.constraints),
            *(partial(self.space.parameters, point) for point in settings.enqueue),
            partial(make_pruner, settings.pruner, settings.pruner_options),
            partial(SamplerFactory(self.sampler, settings.sampler_options, 0).make, 0),
        ]
        for check in checks:
            with _gather(wrong):
                check()
        if wrong:
            raise UserError(wrong)

    def plan(self) -> dict[str, str]:
        """What will happen, as the lines that are shown before it does."""
        config, settings = self.config, self.settings
        trials = "until the time is up" if config.n_trials is None else f"{config.n_trials}"
        if settings.timeout is not None:
            trials += f", none begun after {settings.timeout:g} s"
        where = (
            self.gpus
            and f"GPU {', '.join(dict.fromkeys(s.get('CUDA_VISIBLE_DEVICES', '?') for s in self.slots))}"
        )
        lines = {"study": config.name, "directory": _near(self.directory)}
        lines |= {f"  {name}": text for name, text in self.space.describe().items()}
        lines["objective"] = ", ".join(
            f"{d} {o}" for o, d in zip(config.objectives, config.directions, strict=True)
        )
        if config.constraints:
            lines["constraints"] = ", ".join(config.constraints)
        lines["trials"] = trials
        lines["sampler"] = "grid, in order" if self.sampler == "grid" else self.sampler
        lines["pruner"] = settings.pruner
        places = where or ("the CPU" if settings.executor == "local" else settings.executor)
        lines["workers"] = f"{len(self.slots)} on {places}"
        if config.storage != str(self.directory / "journal.log"):
            from hydratune.sweep.storage import hide_password

            lines["storage"] = hide_password(config.storage)
        return lines

    def run(self, view: View | None = None) -> Result:
        """Carry the search out, or go on with it.

        Raises:
            UserError: the study was begun with another search, or its storage does not open.
            Interrupted: Ctrl-C; running trials have saved a checkpoint, and the same command goes on.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        study = Study(self.config, self.directory)
        view = view or View()
        executor = make_executor(
            self.settings.executor,
            self.settings.executor_options,
            fork=self.settings.fork,
            warm_with=pack(self.task),
            directory=self.directory,
        )
        exporter = Exporter(study, self.task, self.settings.keep)
        try:
            with view:
                return _Loop(self, study, executor, exporter, view).run()
        finally:
            executor.close()


class _Loop:
    def __init__(self, sweep: Sweep, study: Study, executor: Executor, exporter: Exporter, view: View):
        self.sweep, self.study, self.executor = sweep, study, executor
        self.exporter, self.view = exporter, view
        self.free = list(sweep.slots)
        self.running: dict[int, tuple[Ticket, dict[str, str]]] = {}
        self.signals = 0
        self.failures, self.stopped_by = 0, ""
        self.started, self.reaped = time.monotonic(), 0.0

    def run(self) -> Result:
        with self._signals():
            self.view.begin(self.sweep.plan(), self.study.records(), self.sweep.config)
            while True:
                self.study.keep_alive()
                if time.monotonic() - self.reaped > _REAP_EVERY:
                    self.reaped = time.monotonic()
                    self.study.reap()
                waiting = not self._ends() and self._fill()
                if not self.running and not waiting:
                    break
                if self.signals:  # again: a trial may have been on its way when the signal came
                    self.executor.stop(now=self.signals > 1)
                for key, how in self.executor.wait(_PATIENCE):
                    self._finish(key, how)
                self.view.update(self.study.records)
        result = self._result()
        self.exporter.close(result.trials, result.front)
        if self.signals:
            left = (
                ""
                if self.sweep.config.n_trials is None
                else f" ({self.study.finished()} of {self.sweep.config.n_trials} done)"
            )
            raise Interrupted(
                f"stopped{left}; the same command goes on, or: python train.py resume={_near(self.study.directory)}"
            )
        if self.stopped_by:
            self.view.say(self.stopped_by)
        self.view.end(result.trials, result.front)
        return result

    def _ends(self) -> bool:
        """Whether no further trial shall start."""
        limit, timeout = self.sweep.settings.max_failures, self.sweep.settings.timeout
        if self.failures >= limit and not self.stopped_by:
            last = [r for r in self.study.records() if r.state in _COUNTED][-1:]
            why = f"the last: {last[0].reason}" if last else ""
            self.stopped_by = (
                f"stopped: {self.failures} trials in a row failed (sweep.max_failures={limit}); {why}"
            )
        elif timeout is not None and time.monotonic() - self.started > timeout and not self.stopped_by:
            self.stopped_by = f"stopped: the time is up (sweep.timeout={timeout:g})"
        return bool(self.signals or self.stopped_by)

    def _fill(self) -> bool:
        """Start trials while there are free slots; gives whether there may be more to do later."""
        while self.free:
            ticket = self.study.next_trial()
            if ticket is None:
                return self.study.running_elsewhere() > 0
            slot = self.free.pop(0)
            self.running[ticket.number] = (ticket, slot)
            job = self._job(ticket, slot)
            self.exporter.begin(job)
            self.executor.start(ticket.number, job)
            self.view.started(ticket)
        return True

    def _job(self, ticket: Ticket, slot: dict[str, str]) -> Job:
        config = self.study.config
        spec = TrialSpec(
            study=config.name, storage=config.storage, trial_id=ticket.trial_id, number=ticket.number,
            attempt=ticket.attempt, directory=str(self.study.directory / str(ticket.number)),
            settings=ticket.settings, objectives=list(config.objectives), directions=list(config.directions),
            constraints=list(config.constraints), sampler=config.sampler, pruner=config.pruner,
            pruner_options=dict(config.pruner_options), prune_on=self.sweep.settings.prune_on, uid=self.study.uid,
        )  # fmt: skip
        each = threads(len(self.sweep.slots), self.sweep.settings)
        return Job(
            spec, self.sweep.task, slot | ({"OMP_NUM_THREADS": str(each)} if each else {}), threads=each
        )

    def _finish(self, number: int, how: str) -> None:
        ticket, slot = self.running.pop(number)
        self.free.append(slot)
        outcome = Outcome.read(self.study.directory / str(number), ticket.attempt)
        if outcome is None:
            # a process that came to its own end without a result would do so again
            state = "interrupted" if self.signals else "crashed" if how else "failed"
            said = last_line(self.study.directory / str(number) / "console.log")
            outcome = Outcome(state, reason=how or f"it ended without a result; its last line: {said}")
        elif outcome.state == "interrupted" and not self.signals:
            outcome = Outcome("crashed", reason="it was told to stop from outside")
        if not self.study.tell(ticket, outcome):
            return
        trials = self.study.records()
        record = trials[number]
        self.failures = (
            self.failures + 1 if record.state in _COUNTED else 0 if record.finished else self.failures
        )
        front = best(trials, self.study.config.directions)
        self.view.told(record, outcome, trials, front)
        if record.finished:
            self.exporter.after(record, trials, front)

    def _result(self) -> Result:
        trials = self.study.records()
        return Result(trials, best(trials, self.study.config.directions), self.study.directory)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal lets running trials save and stop, the second ends them."""

        def handle(*_: Any) -> None:
            self.signals += 1
            self.executor.stop(now=self.signals > 1)
            note = (
                "ending the running trials"
                if self.signals > 1
                else "stopping: running trials save a checkpoint (again: at once)"
            )
            self.view.say(note)

        try:
            before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs it there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    task: Callable[[dict[str, Any]], Any],
    space: Mapping[str, Dimension | Sequence[Any]] | Space,
    *,
    objective: str | Sequence[str] = "objective",
    direction: str | Sequence[str] | None = None,
    output_dir: str | Path = "outputs/sweeps/python",
    seed: int = 42,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Search over the settings of a function; every call runs in a fresh process.

    Args:
        task: from a trial's settings to a number, a list of numbers, or a mapping of metrics. `sweep.current()` in it
            gives the running trial, whose `callback()` reports to the pruner what a `Trainer` logs.
        space: settings by name: a list of values, `Float`, `Int`, `Choice` or `Paired`.
        objective: name of the value, or of several.
        direction: minimize or maximize for each; None: told from the name, else minimize.
        output_dir: of the study. The same call with the same directory goes on.
        seed: of the sampler.
        quiet: show nothing.
        **settings: fields of `SweepSettings`: n_trials, sampler, pruner, workers, …

    Raises:
        UserError: with all that is wrong.
        Interrupted: Ctrl-C.
    """
    names = [objective] if isinstance(objective, str) else list(objective)
    try:
        chosen = SweepSettings(**{"direction": direction, **settings})
    except TypeError as error:
        raise UserError(
            Violation("sweep", None, str(error), "see hydratune.settings.SweepSettings")
        ) from error
    if direction is None and all(_known(n) is None for n in names):
        chosen.direction = "minimize"
    sweep = Sweep(task, space, chosen, objectives=names, directory=Path(output_dir), seed=seed)
    return sweep.run(View(quiet=quiet))


def last_line(path: Path) -> str:
    """The last line of a file that says something, or nothing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def threads(workers: int, settings: SweepSettings) -> int | None:
    """CPU threads of each trial, when several share this machine."""
    if workers == 1 or settings.executor != "local" or os.environ.get("OMP_NUM_THREADS"):
        return None
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _known(name: str) -> str | None:
    return direction(Objective.parse(name).metric)


def _directions(objectives: Sequence[str], given: Any) -> tuple[str, ...]:
    """
    Raises:
        UserError: a direction that is neither given nor told by the metric's name.
    """
    listed = [given] * len(objectives) if given is None or isinstance(given, str) else list(given)
    wrong = []
    if len(listed) != len(objectives):
        why = f"there are {len(objectives)} objectives and {len(listed)} directions"
        wrong.append(Violation("sweep.direction", given, why, "give one for each objective"))
    found = []
    for name, chosen in zip(objectives, listed, strict=False):
        one = chosen or _known(name)
        if one not in ("minimize", "maximize"):
            why = (
                "is neither minimize nor maximize"
                if chosen
                else f"the name of {name} does not tell whether less is better"
            )
            wrong.append(
                Violation("sweep.direction", chosen, why, "set sweep.direction=minimize or maximize")
            )
        found.append(str(one))
    if wrong:
        raise UserError(wrong)
    return tuple(found)


@contextlib.contextmanager
def _gather(into: list[Violation]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        into += error.violations


def _near(path: Path) -> str:
    """The path from here, where it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
