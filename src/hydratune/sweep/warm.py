"""What a warm process does before trials are forked from it: imports, tokenised data, base weights.

Trials find data and weights through `hydratune.held`; one that wants others than those held here reads them itself.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

from hydratune import algos
from hydratune.errors import UserError, Violation
from hydratune.sweep.job import Command, load_script

_IMPORTS = (
    "accelerate", "datasets", "optuna", "peft", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "hydratune.sweep.study", "hydratune.card", "hydratune.progress", "hydratune.samples", "hydratune.plan",
    "hydratune.interrupt", "hydratune.run", "hydratune.attention", "hydratune.data.pipeline", "hydratune.data.load", "hydratune.data.collate",
    "hydra._internal.logging_config",
)  # fmt: skip


def _of_the_data(violation: Violation) -> bool:
    return violation.key.partition(".")[0] not in ("algo", "peft", "trainer", "lr", "batch_size")


def import_all() -> None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its thread would not be there in a child
    for name in [*_IMPORTS, *(f"hydratune.algos.{algo}" for algo in algos.names())]:
        import_module(name)


def warm(task: Any) -> None:
    """Import what every trial imports; for a `Command`, also read what its first trials will want.

    Raises:
        UserError: none of them can work.
    """
    import_all()
    if isinstance(task, Command):
        script, refused = load_script(task.script), []
        for arguments in task.warm_with:
            try:
                script.warm(list(arguments))
            except UserError as error:
                refused.append(error)
        # What is wrong with the data is wrong for every trial; what is wrong with a swept setting is not
        if (
            refused
            and len(refused) == len(task.warm_with)
            and all(_of_the_data(v) for v in refused[0].violations)
        ):
            raise refused[0]
    gc.collect()
    gc.freeze()  # a collection in a child looks at its own objects alone, and copies none of these pages
