"""A model's layers made quick: fused (`fused_layers.py`), or compiled.

Regional compilation compiles each of a model's repeated layers by itself, which costs the compiler one layer instead of all.

The rest of a step, above all the fused head and the choice of rows, stays as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import nn

from hydratune.fused_layers import fuse

uncompiled = torch.compiler.set_stance("force_eager")
"""Decorates what runs a model a few times, in shapes of its own, for which no compiler should run: probes, completions."""


def make_quick(model: nn.Module, args: Any) -> None:
    """What the arguments ask for, in place. A model has it in all its roles, so that policy and reference round alike."""
    if args.compile_layers:
        compile_layers(model)
    elif fuses(args):
        fuse(model)


def fuses(args: Any) -> bool:
    """Whether layers are fused: not where FSDP or DeepSpeed gathers weights for the modules that own them.

    `accelerate launch` says in the environment that they do.
    """
    asked = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED"))
    sharded = bool(args.fsdp) or bool(args.deepspeed) or "true" in asked
    others = args.compile_layers or args.torch_compile or args.use_liger_kernel
    return args.fused_layers and not (others or sharded)


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the layers that a model repeats, in place: no module is wrapped, so that names of weights stay.

    Padded batches of any length share what the compiler makes, which it does when it first sees a batch: of training, and of
    evaluation again. With our own attention on a CPU each new set of documents compiles again.

    Args:
        backend: of `torch.compile`.

    Returns:
        How many layers there are.
    """
    repeated = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    inside: set[Any] = {inner for layer in repeated for inner in layer.modules() if inner is not layer}
    kinds = Counter(map(type, repeated))
    layers = [layer for layer in repeated if kinds[type(layer)] > 1 and layer not in inside]
    # one code object serves all layers, and each asks for its own place in the cache
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(layers) + 8)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
