"""Sweeps: a search over settings, each trial in a process of its own, that survives whatever happens to it.

    from hydratune import sweep

    result = sweep.run(objective, {"lr": sweep.Float(1e-5, 1e-2, log=True), "r": [4, 8]}, n_trials=20, workers=2)
    print(result.best.settings, result.best.values)

This package knows Optuna, not Hydra; `hydra_plugins.hydratune_sweeper` puts `python train.py -m …` in front of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Choice": "space",
    "Float": "space",
    "Int": "space",
    "Paired": "space",
    "Pruned": "trial",
    "Result": "supervisor",
    "Space": "space",
    "Sweep": "sweep",
    "current": "trial",
    "run": "sweep",
}
__all__ = ["Choice", "Float", "Int", "Paired", "Pruned", "Result", "Space", "Sweep", "current", "run"]

if TYPE_CHECKING:
    from hydratune.sweep.space import Choice, Float, Int, Paired, Space
    from hydratune.sweep.supervisor import Result
    from hydratune.sweep.sweep import Sweep, run
    from hydratune.sweep.trial import Pruned, current


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"hydratune.sweep.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'hydratune.sweep' has no attribute '{name}'")
