"""The sweeper that `python train.py -m …` uses. Hydra imports this on every start, so nothing heavy is imported here.

No `from __future__ import annotations`: Hydra executes this file outside of sys.modules, where dataclasses cannot
resolve such annotations.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

_BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@dataclass
class HydratuneSweeperConf:
    """Its options are the run's own group `sweep`."""

    _target_: str = "hydra_plugins.hydratune_sweeper.sweeper.HydratuneSweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="hydratune", node=HydratuneSweeperConf, provider="hydratune"
)


class HydratuneSweeper(Sweeper):
    """Reads the space from the overrides and hands it to `hydratune.sweep`.

    With a launcher of Hydra's (`hydra/launcher=joblib`, …) it is a plain multirun: Hydra's own sweeper runs the grid.
    """

    def __init__(self) -> None:
        self._context: HydraContext | None = None
        self._task: TaskFunction | None = None
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        assert self._context is not None and self._task is not None and self._config is not None
        if self._config.hydra.launcher._target_ != _BASIC_LAUNCHER:
            from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

            plain = BasicSweeper(max_batch_size=None)
            plain.setup(hydra_context=self._context, task_function=self._task, config=self._config)
            return plain.sweep(arguments)
        from hydra_plugins.hydratune_sweeper import _search

        return _search.run(arguments, self._config, self._context)
