"""What a warm process does before trials are forked from it: imports, tokenised data, base weights.

Trials find data and weights through `hydratune.held`; one that wants others than those held here reads them itself.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydratune import algos
from hydratune.config import SECTIONS, SHORTCUTS
from hydratune.errors import UserError, Violation
from hydratune.processes import quick_imports
from hydratune.sweep.job import Command, load_script

_IMPORTS = (
    "accelerate", "datasets", "optuna", "peft", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "hydratune.sweep.study", "hydratune.card", "hydratune.progress", "hydratune.samples", "hydratune.plan",
    "hydratune.interrupt", "hydratune.run", "hydratune.attention", "hydratune.data.pipeline", "hydratune.data.load", "hydratune.data.collate",
    "hydra._internal.logging_config",
)  # fmt: skip


def _of_the_data(violation: Violation) -> bool:
    """Whether rows, files, `data.…` or `model.…` are wrong, and no other setting, which may be one that is swept."""
    head = violation.key.partition(".")[0]
    return head in ("data", "model") or head not in (*SECTIONS, *SHORTCUTS)


def import_all() -> None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its thread would not be there in a child
    with quick_imports():
        for name in [*_IMPORTS, *(f"hydratune.algos.{algo}" for algo in algos.names())]:
            import_module(name)


def _for_its_data(refusal: UserError | None) -> bool:
    return refusal is not None and all(map(_of_the_data, refusal.violations))


def _refusal(task: Command, arguments: Sequence[str]) -> UserError | None:
    """Read ahead what a command line wants; gives why it cannot work."""
    try:
        load_script(task.script).warm(list(arguments))
    except UserError as error:
        return error
    return None


def warm(task: Any) -> None:
    """Import what every trial imports; for a `Command`, also read what its first trials will want.

    Raises:
        UserError: none of them can work.
    """
    import_all()
    if isinstance(task, Command):
        with quick_imports():  # nor does a collection walk all that was imported while this is read
            _read_ahead(task)
    gc.freeze()  # a collection in a child looks at its own objects alone, and copies none of these pages


def _read_ahead(task: Command) -> None:
    refused = [_refusal(task, arguments) for arguments in task.warm_with]
    if refused and task.decided_by and all(map(_for_its_data, refused)):
        others = [arguments for arguments in task.decided_by if arguments not in task.warm_with]
        if all(_for_its_data(_refusal(task, arguments)) for arguments in others):
            assert refused[0] is not None
            raise refused[0]
