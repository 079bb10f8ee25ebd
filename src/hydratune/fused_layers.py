"""A model's layers on the operations of `fused_ops`, where these give what the layers' own forward gives.

Norms, gated MLPs and attention of the usual make (Llama, Qwen, Mistral, Gemma and what is built like them) are known by the
names of their parts, and each is tried once against its own forward pass, attention also in what it asks of the function
that attends; whatever differs keeps that. A forward pass that is not plain (a cache, hooks, an adapter with dropout, weights
of another kind) goes the layer's own way too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hydratune.fused_ops import (
    GELU_TANH,
    SILU,
    Projection,
    dtype_of_products,
    gated_mlp,
    project,
    rms_norm,
    rotate,
)
from hydratune.modes import still

_ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELUTanh": GELU_TANH}
_OF_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "config", "head_dim", "scaling", "attention_dropout"}
# more than that a layer may have; one with anything else does something that is not known here
_ALSO = {
    "hidden_size", "intermediate_size", "config", "layer_idx", "layer_type", "num_key_value_groups", "is_causal",
    "sliding_window", "q_norm", "k_norm",
}  # fmt: skip
_PROBE = 5  # tokens with which a layer is tried
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the largest value; of halves `_ROUGH`
_ROUGH = 0.03


def fuse(model: nn.Module) -> int:
    """Put a model's layers on fused operations, in place; names of weights stay.

    Returns:
        How many modules of it are.
    """
    found = 0
    for module in model.modules():
        for forward in _forwards(module):
            if _gives_the_same(module, forward):
                kind: Any = type(module)
                module.__class__ = _fused(kind, forward.__name__)
                found += 1
                break
    return found


def known_parts(model: Any) -> tuple[bool, bool]:
    """Whether the MLPs of all of a model's layers would be fused in training, and their attention too.

    An outline will do. No MLP is known where there are experts, which keep more than the MLP beside them.
    """
    layers = model.config.get_text_config().num_hidden_layers
    mlps = _in_training(model, _mlp, "gate_proj", "up_proj", "down_proj")
    if len(mlps) != layers or any("expert" in name for name, _ in model.named_modules()):
        return False, False
    attention = _in_training(model, _attention, "q_proj", "k_proj", "v_proj")
    if len(attention) != layers:
        return True, False
    one = attention[0]
    if hasattr(one, "plain"):
        return True, True
    one = _filled(one)  # to be tried, for names do not tell how it rotates
    return True, any(_gives_the_same(one, forward) for forward in _forwards(one))


def _in_training(model: nn.Module, forward: Callable[..., Any], *parts: str) -> list[nn.Module]:
    """Modules that have a forward pass of ours or might, and whose parts it would take with dropout on."""

    def taken(part: Any) -> bool:
        return part is not None and _projection(part, training=True) is not None

    found = [m for m in model.modules() if hasattr(m, "plain") or forward in _forwards(m)]
    return [m for m in found if all(taken(getattr(m, part, None)) for part in parts)]


def _forwards(module: Any) -> tuple[Callable[..., Any], ...]:
    """Forward passes that might be a module's."""
    if "forward" in vars(module) or hasattr(type(module), "plain"):
        return ()
    names = {*vars(module), *module._modules, *module._parameters} - vars(nn.Module()).keys()
    parts = {name for name in names if not name.startswith("_")}
    kind = type(module).__name__
    if kind.endswith("RMSNorm") and "weight" in parts and parts <= {"weight", "variance_epsilon", "eps"}:
        return (_norm, _shifted_norm)
    if _OF_MLP <= parts <= _OF_MLP | _ALSO:
        return (_mlp,) if type(module.act_fn).__name__ in _ACTIVATIONS else ()
    if _OF_ATTENTION <= parts <= _OF_ATTENTION | _ALSO:
        return () if getattr(module.config, "clip_qkv", None) else (_attention, _masked_attention)
    return ()


@cache
def _fused(plain: Any, name: str) -> type:
    """A module's class with another forward pass, and its own where that one is not for the case."""
    quick = globals()[name]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = quick(self, *args, **kwargs)
        return plain.forward(self, *args, **kwargs) if made is None else made

    # copies and pickles need a class that they find by its name
    def reduced(self: Any, protocol: int) -> Any:
        return _empty, (plain, name), self.__getstate__()

    own = {"forward": forward, "plain": plain, "__reduce_ex__": reduced, "__module__": plain.__module__}
    return type(plain.__name__, (plain,), own)


def _empty(plain: Any, name: str) -> Any:
    return object.__new__(_fused(plain, name))


# -- forward passes: None where a case is not for them -----------------------------------------------------------


def _eps(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, _eps(self))


def _shifted_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, _eps(self), shifted=True)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor | None:
    parts = _projections(x, self.gate_proj, self.up_proj, self.down_proj)
    if parts is None or _is_watched(self.act_fn):
        return None
    gate, up, down = parts
    return gated_mlp(x, gate, up, down, _ACTIVATIONS[type(self.act_fn).__name__])


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    windowed: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Attention in the interface of transformers' layers, [B, T, H] → [B, T, H].

    Args:
        windowed: the function that attends is told of a window.
    """
    # of implementations that are not registered the layer itself knows
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    if past_key_values is not None or position_embeddings is None or attend is None:
        return None
    parts = _projections(hidden_states, self.q_proj, self.k_proj, self.v_proj)
    if parts is None:
        return None
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (states.view(shape) for states in project(hidden_states, parts))
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    if windowed and window is not None:
        kwargs["sliding_window"] = window
    made, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **kwargs,
    )
    made = made.reshape(*hidden_states.shape[:-1], -1)
    out = _projections(made, self.o_proj)
    return (self.o_proj(made) if out is None else project(made, out)[0]), weights


def _masked_attention(
    self: Any, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Of layers that leave a window to the mask (Qwen2-MoE, Phi-MoE)."""
    return _attention(self, *args, **kwargs | {"windowed": False})


def _projections(x: torch.Tensor, *modules: nn.Module) -> list[Projection] | None:
    """The modules' weights, if all are plain linear layers of the input's dtype, each with a LoRA or without."""
    # a step of generation casts as many weights as a batch: the module's own way finds them cast in autocast's cache
    step = not torch.is_grad_enabled() and x.shape[-2] == 1
    cast, dtype = torch.is_autocast_enabled(x.device.type) and not step, dtype_of_products(x)
    parts = []
    for module in modules:
        part = _projection(module)
        if part is None or not (cast or all(t is None or t.dtype == dtype for t in part.tensors)):
            return None
        parts.append(part)
    return parts


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and not _is_watched(module)


def _is_watched(module: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


def _projection(module: Any, training: bool | None = None) -> Projection | None:
    """
    Args:
        training: whether dropout is on; None: as the module has it.
    """
    if _is_plain(module):
        return Projection(module.weight, module.bias)
    if type(module).__name__ != "Linear" or type(module).__module__ != "peft.tuners.lora.layer":
        return None
    base = module.base_layer
    if not _is_plain(base) or module.merged or _is_watched(module):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return Projection(base.weight, base.bias)
    name = active[0]
    dropout, down, up = (part[name] for part in (module.lora_dropout, module.lora_A, module.lora_B))
    training = module.training if training is None else training
    drops = training and getattr(dropout, "p", 0.0) > 0
    watched = any(map(_is_watched, (dropout, down, up)))
    if len(active) > 1 or drops or watched or name in module.lora_variant or up.bias is not None:
        return None
    return Projection(base.weight, base.bias, down.weight, up.weight, module.scaling[name])


# -- trying them -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _gives_the_same(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a forward pass in the place of a module's own gives the same result, on a few random states."""
    weight: Any = next(module.parameters(), None)
    if type(weight) is not nn.Parameter or weight.device.type == "meta":
        return False
    if any(_is_watched(inner) for inner in module.modules() if inner is not module):  # who is not to see this
        return False
    states, more = _arguments(module, weight)
    # an adapter in fp32 on a base of halves meets it under autocast alone
    mixed = len({p.dtype for p in module.parameters()}) > 1
    meeting = torch.autocast(weight.device.type, weight.dtype, enabled=mixed)
    with still(module), meeting, _listening() as calls:
        try:
            found = forward(module, states, **more)
            if found is None:
                return False
            asked = calls.copy()
            calls.clear()
            expected = type(module).forward(module, states, **more)
        except Exception:  # of many kinds: it wants other arguments, or is made in another way
            return False
    return _agree((expected, calls), (found, asked))


@contextmanager
def _listening() -> Iterator[list[Any]]:
    """What functions that attend are called with meanwhile; they give the values back, as they come.

    So no kernel has to take the states of a trial, and what one would leave out of account (a window, a cap) is compared.
    """
    calls: list[Any] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        calls.append((query, key, value, mask, {k: v for k, v in kwargs.items() if v is not None}))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    over = ALL_ATTENTION_FUNCTIONS._local_mapping  # goes before what is registered
    before = over.copy()
    over.update(dict.fromkeys(ALL_ATTENTION_FUNCTIONS, attend))
    try:
        yield calls
    finally:
        over.clear()
        over.update(before)


def _agree(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_agree(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_agree, one, other))
    if not isinstance(one, torch.Tensor):
        return one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool((one - other).abs().amax() <= _CLOSE.get(one.dtype, _ROUGH) * one.abs().amax())


def _filled(module: nn.Module) -> nn.Module:
    """A module, of an outline a copy with weights: rows of one random value each, which take no memory."""
    if next(module.parameters()).device.type != "meta":
        return module
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is not None:
                values = torch.randn(len(weight), *[1] * (weight.dim() - 1), generator=generator)
                owner._parameters[name] = nn.Parameter(values.expand(weight.shape))
    return module


def _arguments(module: Any, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(size: int) -> torch.Tensor:
        return torch.randn(1, _PROBE, size, generator=generator).to(weight.device, weight.dtype)

    if hasattr(module, "gate_proj"):
        return random(module.gate_proj.in_features), {}
    if not hasattr(module, "q_proj"):
        return random(len(weight)), {}
    turn = random(module.head_dim // 2).repeat(1, 1, 2)
    more = {"position_embeddings": (turn.cos(), turn.sin()), "attention_mask": None}
    return random(module.q_proj.in_features), more
