"""Regional compilation: each of a model's repeated layers by itself, which costs the compiler one layer instead of all.

The rest of a step, above all the fused head and the choice of rows, stays as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the layers that a model repeats, in place: no module is wrapped, so that names of weights stay.

    Lengths of batches may vary without compiling again. The compiler runs in the first step.

    Args:
        backend: of `torch.compile`.

    Returns:
        How many layers there are.
    """
    import torch

    repeated = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    inside: set[Any] = {inner for layer in repeated for inner in layer.modules() if inner is not layer}
    kinds = Counter(map(type, repeated))
    layers = [layer for layer in repeated if kinds[type(layer)] > 1 and layer not in inside]
    # one code object serves all layers, and each asks for its own place in the cache
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(layers) + 8)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
