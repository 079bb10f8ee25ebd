"""A sweep on the terminal: the plan, a live table, and what was found; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hydratune.amounts import duration
from hydratune.sweep.study import Outcome, Record, StudyConfig, Ticket

_ROWS = 14  # trials in the live table: those that run, the best, and the newest
_STYLES = {"running": "cyan", "complete": "green", "pruned": "yellow", "waiting": "dim"}


class Outlet:
    """A text file to show things in, of which nothing is heard any more once it cannot be written.

    A terminal that was closed (EIO) or a reader that has left (EPIPE) must not end the sweep. The descriptor is given to
    /dev/null then, so that what others write there, up to the interpreter's last flush, is no error either.
    """

    def __init__(self, file: Any):
        self._file, self.lost = file, False

    def write(self, text: str) -> int:
        if not self.lost:
            try:
                self._file.write(text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        if not self.lost:
            try:
                self._file.flush()
            except OSError:
                self._lose()

    def _lose(self) -> None:
        self.lost = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class View:
    """Shows one sweep; `with view:` around it. When the terminal goes, it is quiet and the sweep goes on."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self._console = console or Console(stderr=True, quiet=quiet)
        self._outlet = Outlet(self._console.file)
        self._console.file = self._outlet  # type: ignore[assignment]  # all that Rich asks of a file it has
        self._live: Live | None = None
        self._config: StudyConfig | None = None
        self._start, self._before, self._refreshed = time.monotonic(), 0, 0.0

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def begin(self, plan: Mapping[str, str], trials: Sequence[Record], config: StudyConfig) -> None:
        self._config = config
        self._before = sum(t.finished for t in trials)
        show_plan(plan, self._console)
        if self._before:
            self.say(f"going on: {self._before} trials are there already")
        if self._console.is_terminal and not self._console.quiet:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def started(self, ticket: Ticket) -> None:
        if self._live is None:
            again = f", attempt {ticket.attempt + 1}" if ticket.attempt else ""
            self.say(f"trial {ticket.number} starts{again}: {words(ticket.settings)}")

    def told(
        self, record: Record, outcome: Outcome, trials: Sequence[Record], front: Sequence[Record]
    ) -> None:
        if self._live is not None:
            self._live.update(self._table(trials, front))
            return
        assert self._config is not None
        facts = [record.state if record.finished else f"{outcome.state}, will be taken up again"]
        if record.values:
            facts.append(numbers(self._config.objectives, record.values))
        if why := record.reason or outcome.reason:
            facts.append(why)
        if len(front) == 1 and front[0].values:
            facts.append(f"best {front[0].values[0]:.6g} (trial {front[0].number})")
        self.say(f"trial {record.number} {' · '.join(facts)} · {self._progress(trials)}")

    def update(self, read: Callable[[], Sequence[Record]]) -> None:
        """Draw the table anew, at most once in two seconds; reads the study only where it is shown."""
        if self._live is None or self._config is None or time.monotonic() - self._refreshed < 2:
            return
        if self._outlet.lost:
            self._stop()
            return
        self._refreshed = time.monotonic()
        from hydratune.sweep.study import best

        trials = read()
        self._live.update(self._table(trials, best(trials, self._config.directions)))

    def _progress(self, trials: Sequence[Record]) -> str:
        done, now = sum(t.finished for t in trials), time.monotonic()
        wanted = self._config.n_trials if self._config else None
        text = f"{done} of {wanted} done" if wanted else f"{done} done"
        mine = done - self._before
        if wanted and mine and done < wanted:
            seconds = (now - self._start) / mine * (wanted - done)
            text += f", {duration(seconds)} left"
        return text

    def _table(self, trials: Sequence[Record], front: Sequence[Record]) -> Table:
        assert self._config is not None
        names = list(dict.fromkeys(name for t in trials for name in t.settings))
        table = Table(
            title=f"{self._config.name}: {self._progress(trials)}",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for name in ["", "trial", "state", *self._config.objectives, *names, "time", ""]:
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        bests = {r.number for r in front}
        running = [t for t in trials if t.state == "running"]
        done = [t for t in trials if t.finished]
        chosen = {t.number: t for t in [*running, *front[:3], *done[::-1]][:_ROWS]}
        for number in sorted(chosen):
            t = chosen[number]
            last = [*t.intermediate.values()][-1:] if not t.values else []
            values = [f"{v:.5g}" for v in t.values or last] or [""]
            values += [""] * (len(self._config.objectives) - len(values))
            spent = t.seconds if t.seconds is not None else time.time() - (t.started or time.time())
            state = Text(t.state, style=_STYLES.get(t.state, "red"))
            settings = [Text(_short(t.settings.get(n, ""))) for n in names]
            table.add_row(
                "★" if number in bests else "",
                str(number),
                state,
                *values,
                *settings,
                duration(spent),
                Text(t.reason),
            )
        return table

    def end(self, trials: Sequence[Record], front: Sequence[Record], importance: Mapping[str, float]) -> None:
        assert self._config is not None
        if self._live is not None:
            self._live.update(self._table(trials, front))
        self._stop()
        states: dict[str, int] = {}
        for t in trials:
            states[t.state] = states.get(t.state, 0) + 1
        self.say("trials: " + ", ".join(f"{n} {state}" for state, n in states.items()))
        if importance:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in importance.items())
            self.say(f"importance for {self._config.objectives[0]}: {shares}")
        if not front:
            self.say("no trial has completed within the constraints")
        for r in front:
            title = "best" if len(self._config.directions) == 1 else "on the Pareto front"
            self.say(
                f"{title}: trial {r.number}, {numbers(self._config.objectives, r.values or [])}: {words(r.settings)}"
            )


def show_plan(plan: Mapping[str, str], console: Console | None = None) -> None:
    """The lines of a plan, names and values aligned."""
    console = console or Console(stderr=True)
    width = max(len(name) for name in plan)
    for name, text in plan.items():
        console.print(f"{name:<{width}}  {text}", highlight=False, soft_wrap=True, markup=False)


def words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={_short(v)}" for k, v in settings.items())


def numbers(objectives: Sequence[str], values: Sequence[float]) -> str:
    return ", ".join(f"{o} {v:.6g}" for o, v in zip(objectives, values, strict=False))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
