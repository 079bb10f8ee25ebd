"""Modes that a model is in for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Forward passes without noise (dropout of any adapter, NEFTune); each module's own mode comes back after."""
    noisy = [m for m in model.modules() if m.training]
    for module in noisy:
        module.training = False
    try:
        yield
    finally:
        for module in noisy:
            module.training = True
