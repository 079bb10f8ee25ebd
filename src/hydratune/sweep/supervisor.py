"""Runs a study: asks it for trials, starts each the moment a slot is free, tells what came back.

It holds nothing that is not in the study or in a trial's directory, so that it may be killed at any moment: the same
command goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratune.errors import Interrupted
from hydratune.settings import SweepSettings
from hydratune.sweep.executors import Executor
from hydratune.sweep.export import Exporter
from hydratune.sweep.job import Job
from hydratune.sweep.study import Outcome, Record, Study, Ticket, best
from hydratune.sweep.trial import TrialSpec
from hydratune.sweep.view import View

_PATIENCE = 1.0  # seconds between looks at what other workers have done
_REAP_EVERY = 5.0  # seconds
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


class Supervisor:
    """Carries out one search on one machine.

    Args:
        study: which hands out the trials.
        task: what a trial runs.
        settings: how to search.
        slots: the places in which trials run at the same time; the variables that each gives its trial.
        executor, exporter, view: where trials run, what is written, what is shown.
    """

    def __init__(
        self, study: Study, task: Any, settings: SweepSettings, slots: Sequence[dict[str, str]],
        executor: Executor, exporter: Exporter, view: View,
    ):  # fmt: skip
        self.study, self.task, self.settings = study, task, settings
        self.executor, self.exporter, self.view = executor, exporter, view
        self.free = list(slots)
        self.threads = threads(len(slots), settings)
        self.running: dict[int, tuple[Ticket, dict[str, str]]] = {}
        self.signals = 0
        self.failures, self.stopped_by = 0, ""
        self.started, self.reaped = time.monotonic(), 0.0

    def run(self, plan: Mapping[str, str]) -> Result:
        """
        Raises:
            UserError: no trial could work.
            Interrupted: a signal came; running trials have saved a checkpoint.
        """
        with self._signals():
            self.view.begin(plan, self.study.records(), self.study.config)
            wanted = self.study.config.n_trials
            if wanted is None or self.study.finished() < wanted:
                self.executor.prepare(lambda: self.signals > 0)
            self.started = (
                time.monotonic()
            )  # of the time limit, which the start of the warm process does not use up
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
        importance = self.study.importance()
        self.exporter.close(result.trials, result.front, importance)
        if self.signals:
            left = (
                ""
                if self.study.config.n_trials is None
                else f" ({self.study.finished()} of {self.study.config.n_trials} done)"
            )
            raise Interrupted(
                f"stopped{left}; the same command goes on, or: python train.py resume={near(self.study.directory)}"
            )
        if self.stopped_by:
            self.view.say(self.stopped_by)
        self.view.end(result.trials, result.front, importance)
        return result

    def _ends(self) -> bool:
        """Whether no further trial shall start."""
        limit, timeout = self.settings.max_failures, self.settings.timeout
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
            pruner_options=dict(config.pruner_options), prune_on=self.settings.prune_on, uid=self.study.uid,
        )  # fmt: skip
        each = self.threads
        return Job(spec, self.task, slot | ({"OMP_NUM_THREADS": str(each)} if each else {}), threads=each)

    def _finish(self, number: int, how: str) -> None:
        ticket, slot = self.running.pop(number)
        self.free.append(slot)
        outcome = Outcome.read(self.study.directory / str(number), ticket.attempt, self.study.uid)
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
            wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # but not what nohup has turned off
            before = {
                n: signal.signal(n, handle) for n in wanted if signal.getsignal(n) is not signal.SIG_IGN
            }
        except ValueError:  # not the main thread: whoever runs it there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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


def near(path: Path) -> str:
    """The path from here, where it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
