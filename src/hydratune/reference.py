"""The reference policy: what a trained policy is held against, with as few weights in memory as it takes.

With an adapter the reference is the policy with its adapter off, or with the adapter as it was at the start where that
changes something or has changed the base; without one it is a frozen copy, or the model that is given. Log-probs that were computed before training need no reference at all.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from hydratune.adapters import starts_as_nothing

Kind = Literal["adapter off", "first adapter", "frozen copy", "given", "policy itself"]
_FIRST = "reference"  # name of the adapter that is kept as it was
_PART = 2**24  # values that are summed in fp64 at a time


def without_dropout(model: nn.Module) -> None:
    """Dropout off for good, so that policy and reference differ by their weights alone.

    In layers, in attention, and in the config, which some families read in every forward pass.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            # attention_dropout, hidden_dropout, attn_pdrop, layerdrop, …
            for name, value in [*getattr(owner, "__dict__", {}).items()]:
                if isinstance(value, float) and "drop" in name:
                    setattr(owner, name, 0.0)


def frozen(model: Any) -> Any:
    """A model for inference alone."""
    return model.requires_grad_(False).eval()


def on_host(model: Any) -> dict[str, torch.Tensor]:
    """A copy of a model's state, in the host's memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def sums_of(parameters: Iterable[torch.Tensor]) -> Any:
    """A digest of parameters: of each a few of its values, the sum of all, and that of their squares, in fp64."""
    sums = []
    for parameter in parameters:
        flat = parameter.detach().flatten()
        sums.append(flat[:: max(1, len(flat) // 64)].double().sum())
        for part in flat.split(_PART):  # no whole tensor in fp64
            part = part.double()
            sums += [part.sum(), part.square().sum()]
    return hashlib.sha256(torch.stack([s.cpu() for s in sums]).numpy().tobytes())


class Reference:
    """A reference policy.

    Args:
        policy: the policy before training, unwrapped.
        given: the reference itself, if there is one.
        ours: whether the policy's adapter was made here; it changes nothing yet, unless its init says otherwise.
        lasting: whether it is needed once the policy has changed; else nothing is copied.
    """

    def __init__(self, policy: Any, given: Any = None, *, ours: bool = True, lasting: bool = True) -> None:
        self.model: Any = None
        if given is not None:
            self.kind: Kind = "given"
            self.model = frozen(given)
        elif (
            hasattr(policy, "peft_config")
            and ours
            and starts_as_nothing(policy.peft_config[policy.active_adapter])
        ):
            self.kind = "adapter off"
        elif not lasting:
            self.kind = "policy itself"
        elif not hasattr(policy, "peft_config"):
            self.kind = "frozen copy"
            self.model = frozen(copy.deepcopy(policy))
        else:
            self.kind = "first adapter"
            _keep_adapter(policy)

    @contextmanager
    def of(self, policy: Any) -> Iterator[Any]:
        """The module to run for the reference's results, without gradients.

        Args:
            policy: unwrapped; of its adapters none, or the first one, is on meanwhile.
        """
        with torch.no_grad():
            if self.kind == "policy itself" or self.model is not None:
                yield self.model or policy
            elif self.kind == "adapter off":
                with policy.disable_adapter():
                    yield policy
            else:
                active = policy.active_adapter
                policy.set_adapter(_FIRST)
                try:
                    yield policy
                finally:
                    policy.set_adapter(active)

    def fingerprint(self, policy: Any) -> str:
        """A key of its parameters: of each its name, shape, sum and sum of squares in fp64."""
        model = self.model or policy
        kept = [
            (name, p)
            for name, p in model.named_parameters()
            if self.kind != "adapter off" or not p.requires_grad
        ]
        digest = sums_of([p for _, p in kept])
        shapes = [f"{name}{tuple(p.shape)}{p.dtype}" for name, p in kept]
        digest.update("".join([self.kind, *shapes]).encode())
        return digest.hexdigest()

    def follow(self, policy: Any, share: float) -> None:
        """π_ref ← share·π + (1 − share)·π_ref (TR-DPO, arXiv:2404.09656, eq. 7), of a separate reference."""
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            pairs = [(own[name], p) for name, p in policy.named_parameters() if name in own]
            torch._foreach_lerp_([r for r, _ in pairs], [p.detach().to(r.dtype) for r, p in pairs], share)


def _keep_adapter(policy: Any) -> None:
    """A second adapter with the values of the first, which is never trained."""
    name = policy.active_adapter
    config = copy.deepcopy(policy.peft_config[name])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # an init like PiSSA would change the base once more
    policy.add_adapter(_FIRST, config)
    state = dict(policy.named_parameters())
    with torch.no_grad():
        for key, value in state.items():
            parts = key.split(".")  # of embeddings the adapter's name is the last one
            if _FIRST in parts:
                value.copy_(state[".".join(name if part == _FIRST else part for part in parts)])
    policy.set_adapter(name)
