"""The algorithms: one module each, holding its config class and its trainer class.

The registry is the folder itself: `algos/<name>.py` with `conf/algo/<name>.yaml` is all that an algorithm needs.
The module defines exactly one class whose name ends in Config and one whose name ends in Trainer.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_SHARED = {
    "__init__",
    "arguments",
    "base",
    "judge",
    "online",
    "online_config",
    "online_evaluation",
    "online_sampling",
    "policy",
}


def names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _SHARED)


def classes(name: str) -> tuple[type[Any], type[Any]]:
    """The config class and the trainer class of an algorithm (imports torch)."""
    module = import_module(f"hydratune.algos.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    (config,) = [c for c in own if c.__name__.endswith("Config")]
    (trainer,) = [c for c in own if c.__name__.endswith("Trainer")]
    return config, trainer
