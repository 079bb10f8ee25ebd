"""What a run knows of the sweep that it is a trial of: where to report, when to stop, and how it ended.

A trial is an ordinary run with `HYDRATUNE_TRIAL` naming its description; without it nothing here does anything. The
run reports values and writes its result; the study's outcome is told by the supervisor alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydratune.errors import Interrupted, OutOfMemory, Pruned, TrainingFailed, UserError, Violation
from hydratune.objective import FACTS, Objective, fact

if TYPE_CHECKING:
    from hydratune.sweep.study import Outcome

VARIABLE = "HYDRATUNE_TRIAL"
FILE = "trial.json"
_BOUND = re.compile(r"\s*([\w/.]+)\s*(<=|>=)\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class TrialSpec:
    """A trial as it is handed to a process, here or on another machine: plain values."""

    study: str
    storage: str
    trial_id: int
    number: int
    attempt: int
    directory: str
    settings: dict[str, Any]
    objectives: list[str]
    directions: list[str]
    constraints: list[str] = field(default_factory=list)
    sampler: str = ""
    pruner: str = "none"
    pruner_options: dict[str, Any] = field(default_factory=dict)
    prune_on: str | None = None
    uid: str = ""  # of the study, which may share its name with another one

    def write(self) -> Path:
        path = Path(self.directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Bound:
    """`METRIC <= NUMBER` or `METRIC >= NUMBER`, which a good trial keeps."""

    metric: str
    at_most: bool
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """
        Raises:
            UserError: the text is no such bound.
        """
        found = _BOUND.fullmatch(str(text))
        if found is None:
            raise UserError(
                Violation(
                    "sweep.constraints",
                    text,
                    "is no bound",
                    "write METRIC <= NUMBER, e.g. 'peak_memory_gib <= 20'",
                )
            )
        return cls(found[1], found[2] == "<=", float(found[3]))

    def excess(self, value: float | None) -> float:
        """How far a value is beyond the limit, at most 0 where the bound is kept; a missing value breaks it."""
        if value is None or not math.isfinite(value):
            return 1.0
        return value - self.limit if self.at_most else self.limit - value


class CurrentTrial:
    """The trial that this process runs.

    Attributes:
        pruned: whether the study has ended it early.
    """

    def __init__(self, spec: TrialSpec):
        self.spec, self.pruned = spec, False
        self._handle: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.spec.settings)

    @property
    def directory(self) -> Path:
        return Path(self.spec.directory)

    def report(self, value: float, step: int) -> bool:
        """Report a value of the objective while training; gives whether the trial should stop (raise `Pruned` then).

        A value that is not finite, or of a study with several objectives, is not reported: pruners cannot judge it.
        """
        if len(self.spec.objectives) > 1 or not math.isfinite(value):
            return False
        trial = self._trial()
        if step not in trial.storage.get_trial(self.spec.trial_id).intermediate_values:
            trial.report(float(value), step)
        return self.spec.pruner != "none" and bool(trial.should_prune())

    def _trial(self) -> Any:
        if self._handle is None:
            import optuna

            from hydratune.sweep.search import make_pruner
            from hydratune.sweep.storage import open_storage

            pruner = make_pruner(self.spec.pruner, self.spec.pruner_options)
            storage = open_storage(self.spec.storage, create=False)
            study = optuna.load_study(study_name=self.spec.study, storage=storage, pruner=pruner)
            self._handle = optuna.trial.Trial(study, self.spec.trial_id)
        return self._handle

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that reports the metric wherever it is logged, and stops a pruned trial."""
        from transformers import TrainerCallback

        current, metric = self, self.spec.prune_on or Objective.parse(self.spec.objectives[0]).metric

        class _Report(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
                value = (logs or {}).get(metric)
                if value is None:
                    return control
                stop = _for_all(
                    lambda: current.report(float(value), state.global_step), state.is_world_process_zero
                )
                if (
                    stop and state.global_step < state.max_steps
                ):  # one that is at its end is not stopped any more
                    current.pruned = control.should_training_stop = True
                    control.should_save = control.should_evaluate = False
                return control

        return _Report()

    def wandb(self) -> dict[str, Any]:
        """How W&B shall file the run: grouped by study, under a stable id, so that a resumed trial continues."""
        shown = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.spec.settings.items())
        return {
            "group": self.spec.study,
            "job_type": "trial",
            "name": f"{self.spec.number:03} {shown}"[:128],
            "id": re.sub(r"[^\w-]", "-", f"{self.spec.study}-{self.spec.uid}-{self.spec.number}")[-128:],
            "resume": "allow",
            "tags": [f"sampler:{self.spec.sampler}"] if self.spec.sampler else [],
            "config": {
                "sweep": {"study": self.spec.study, "trial": self.spec.number},
                "params": self.settings,
            },
        }

    def judge(self, task: Callable[[], Any]) -> Any:
        """Run the trial and write how it ended; every error becomes an outcome, and is raised again."""
        from hydratune.sweep.study import Outcome

        start = time.monotonic()
        outcome = Outcome("failed")
        try:
            value = task()
            outcome = Outcome("pruned") if self.pruned else self._complete(value)
            return value
        except BaseException as error:
            outcome = Outcome(*_kind(error))
            if outcome.state == "failed":
                traceback.print_exc()
            raise
        finally:
            outcome.attempt, outcome.study = self.spec.attempt, self.spec.uid
            outcome.seconds.setdefault("total", round(time.monotonic() - start, 3))
            if _is_main_process():
                outcome.write(self.directory)

    def _complete(self, value: Any) -> Outcome:
        from hydratune.sweep.study import Outcome

        summary = _read_summary(self.directory)
        metrics = {
            k: v for k, v in summary.get("metrics", {}).get("final", {}).items() if isinstance(v, int | float)
        }
        metrics |= {name: v for name in FACTS if (v := fact(name, summary)) is not None}
        if isinstance(value, Mapping):
            metrics |= {str(k): float(v) for k, v in value.items()}
            value = [metrics.get(Objective.parse(o).metric) for o in self.spec.objectives]
        given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        names = self.spec.objectives
        if len(given) != len(names):
            return Outcome(
                "failed", reason=f"{len(given)} values came back for the objectives {', '.join(names)}"
            )
        try:
            values = [math.nan if v is None else float(v) for v in given]
        except (TypeError, ValueError):
            return Outcome("failed", reason=f"the objective is {value!r}, which is not a number")
        bounds = [Bound.parse(c) for c in self.spec.constraints]
        excess = {
            str(c): b.excess(metrics.get(b.metric))
            for c, b in zip(self.spec.constraints, bounds, strict=True)
        }
        bad = [n for n, v in zip(names, values, strict=True) if not math.isfinite(v)]
        seconds = dict(summary.get("seconds", {}))
        if bad:
            why = f"{', '.join(bad)} is not finite, or was never logged"
            return Outcome("diverged", reason=why, seconds=seconds, metrics=metrics)
        return Outcome("complete", values, constraints=excess, seconds=seconds, metrics=metrics)


def _kind(error: BaseException) -> tuple[str, list[float] | None, str]:
    """State, no values, and the reason, of an error that ended a trial."""
    import sys

    said = str(error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    if isinstance(error, Pruned) or type(error).__name__ == "TrialPruned":
        return "pruned", None, ""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "interrupted", None, first
    torch = sys.modules.get("torch")
    memory = (MemoryError, OutOfMemory) + ((torch.OutOfMemoryError,) if torch else ())
    if isinstance(error, memory) or (
        isinstance(error, RuntimeError) and re.search(r"out of memory|can't allocate", said)
    ):
        return "out of memory", None, first
    if isinstance(error, TrainingFailed):
        return "diverged", None, first
    if isinstance(error, UserError):
        return "invalid", None, "; ".join(f"{v.key}: {v.why}" for v in error.violations)
    return "failed", None, f"{type(error).__name__}: {first}"


def current() -> CurrentTrial | None:
    """The trial that this process runs, None outside of a sweep."""
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    if path not in _CURRENT:
        _CURRENT.clear()
        _CURRENT[path] = CurrentTrial(TrialSpec(**json.loads(Path(path).read_text(encoding="utf-8"))))
    return _CURRENT[path]


_CURRENT: dict[str, CurrentTrial] = {}


def _read_summary(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _for_all(decide: Callable[[], bool], main: bool) -> bool:
    """The main process decides, and every process of the trial does the same."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    decision = [decide() if main or not together else False]
    if together:
        dist.broadcast_object_list(decision, src=0)
    return decision[0]
