"""A search, from what is asked to what was found: `Sweep` plans and checks it, `run` is the way in from Python."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation
from hydratune.objective import Objective, direction
from hydratune.secrets import hide_password
from hydratune.settings import SweepSettings
from hydratune.sweep.executors import devices, make_executor, slots
from hydratune.sweep.export import Exporter
from hydratune.sweep.job import Command, pack
from hydratune.sweep.search import SamplerFactory, make_pruner
from hydratune.sweep.space import Dimension, Space, as_space, overlaps
from hydratune.sweep.storage import can_be_shared, is_url
from hydratune.sweep.study import Study, StudyConfig
from hydratune.sweep.supervisor import Result, Supervisor, near
from hydratune.sweep.trial import Bound
from hydratune.sweep.view import View

_ON_A_CLUSTER = 8  # trials at the same time, unless told


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
            storage=_absolute(settings.storage) or str(self.directory / "journal.log"),
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
        settings, wrong = self.settings, overlaps(self.space.dimensions)
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
        if settings.executor == "local" and settings.executor_options:
            why = "the local executor has none"
            wrong.append(Violation("sweep.executor_options", settings.executor_options, why, "leave it out"))
        if settings.n_trials is not None and settings.n_trials < 1:
            wrong.append(Violation("sweep.n_trials", settings.n_trials, "is out of range", "give 1 or more"))
        checks: list[Callable[[], Any]] = [
            *(partial(Bound.parse, text) for text in settings.constraints),
            *(partial(self.space.parameters, point) for point in settings.enqueue),
            partial(make_pruner, settings.pruner, settings.pruner_options),
            lambda: SamplerFactory(self.sampler, settings.sampler_options, 0).make(0),
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
        lines = {"study": config.name, "directory": near(self.directory)}
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
            lines["storage"] = hide_password(config.storage)
        return lines

    def run(self, view: View | None = None, accepted: Callable[[], None] | None = None) -> Result:
        """Carry the search out, or go on with it.

        Args:
            view: what shows it; None: the terminal.
            accepted: called when the study has turned out to be this search's.

        Raises:
            UserError: the study was begun with another search, or its storage does not open.
            Interrupted: Ctrl-C; running trials have saved a checkpoint, and the same command goes on.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        study = Study(self.config, self.directory)
        if accepted is not None:
            accepted()
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
                supervisor = Supervisor(study, self.task, self.settings, self.slots, executor, exporter, view)
                return supervisor.run(self.plan())
        finally:
            executor.close()


def run(
    task: Callable[[dict[str, Any]], Any],
    space: Mapping[str, Dimension | Sequence[Any]] | Space,
    *,
    objective: str | Sequence[str] = "objective",
    direction: str | Sequence[str] | None = None,
    output_dir: str | Path | None = None,
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
        output_dir: of the study, which the same call with the same directory goes on with. None: below outputs/sweeps,
            under a name made from the function, its source and the space.
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
    space = as_space(space)
    directory = Path(output_dir or Path("outputs/sweeps") / _name(task, space, names))
    sweep = Sweep(task, space, chosen, objectives=names, directory=directory, seed=seed)
    return sweep.run(View(quiet=quiet))


def _name(task: Any, space: Space, objectives: Sequence[str]) -> str:
    """A study's name that changes with what is searched and how: another function is another study."""
    try:
        source = inspect.getsource(task)
    except (OSError, TypeError):  # typed into a prompt, or no plain function
        source = ""
    facts = json.dumps([source, space.describe(), list(objectives)])
    return (
        f"{getattr(task, '__name__', 'study').strip('<>')}-{hashlib.sha256(facts.encode()).hexdigest()[:6]}"
    )


def _absolute(storage: str | None) -> str | None:
    """A journal's path as every process of the study can use it."""
    return storage if storage is None or is_url(storage) else str(Path(storage).expanduser().absolute())


def _known(name: str) -> str | None:
    return direction(Objective.parse(name).metric)


def _directions(objectives: Sequence[str], given: Any) -> tuple[str, ...]:
    """
    Raises:
        UserError: a direction that is neither given nor told by the metric's name.
    """
    listed = list(given) if isinstance(given, list | tuple) else [given] * len(objectives)
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
