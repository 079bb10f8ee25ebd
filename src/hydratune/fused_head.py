"""The LM head and the loss as one operation: only positions that count are projected, a chunk at a time (`logps.py`).

`FusedHead` (cross-entropy) and `LogpsHead` (log-probs, and losses of them) put this inside a model's own forward: for that
time the head module takes hidden states and gives back the loss. Wrappers that watch a forward pass (data parallel,
sharding) so see every parameter take part.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hydratune.compiling import uncompiled
from hydratune.logps import Loss, logps_of, token_logps, token_losses
from hydratune.losses import token_loss
from hydratune.vocabulary import TokenStats

IGNORED = -100
_WANTED = ("entropy", "correct")  # of `Stats`
_PROBE, _LOUD = 8, 40.0  # tokens, and the spread of their logits, of `is_exact`


@dataclass
class Stats:
    """By-products over the labelled tokens: scalars on the device, and the log-prob of each, [N], without gradient.

    Entropy (nats) and hits are there only when asked for.
    """

    count: torch.Tensor
    logps: torch.Tensor
    entropy_sum: torch.Tensor | None = None
    correct: torch.Tensor | None = None


def select(
    hidden: torch.Tensor, labels: torch.Tensor, labelled: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict a labelled token, and those tokens.

    Args:
        hidden: [B, S, H]; of S > T only the last T belong to `labels` (virtual tokens of an adapter come first).
        labels: unshifted, [B, T], -100 outside the loss and on what nothing predicts.
        labelled: how many labels there are; None: found here, for which a GPU is waited for.

    Returns:
        rows [N, H] and targets [N].
    """
    length = labels.shape[1]
    shifted, positions = _labelled(labels, labelled)
    rows = hidden[:, -length:].reshape(-1, hidden.shape[-1])
    return rows.index_select(0, positions), shifted.index_select(0, positions)


def _labelled(labels: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as what each position predicts, [B·T], and the positions [N] that predict a labelled token."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    there = shifted != IGNORED
    positions = there.nonzero() if count is None else there.nonzero_static(size=count)
    return shifted, positions.squeeze(1)


def by_document(
    values: torch.Tensor, labels: torch.Tensor, boundaries: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and numbers of what each labelled token gave, by the document that the token is of.

    Args:
        values: [N], in the order of `select`.
        labels: unshifted, [B, T].
        boundaries: [D + 1], where documents begin and end that are laid end to end in one row; None: a row is one.

    Returns:
        Sums and counts, [D] or [B], fp64.
    """
    _, positions = _labelled(labels, len(values))
    if boundaries is None:
        owner, many = positions // labels.shape[1], len(labels)
    else:
        owner, many = torch.bucketize(positions, boundaries[1:], right=True), len(boundaries) - 1
    empty = torch.zeros(many, dtype=torch.float64, device=values.device)
    values = values.double()
    return empty.index_add(0, owner, values), empty.index_add(0, owner, torch.ones_like(values))


def rows_at(states: torch.Tensor, length: int, positions: torch.Tensor) -> torch.Tensor:
    """[R, S, …] → [N, …]: the states at positions in the last `length` of S, flattened over R."""
    return states[:, -length:].flatten(0, 1).index_select(0, positions)


def linear_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    loss_type: str = "nll",
    want_stats: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Σ loss(log softmax(rows @ weightᵀ + bias)[target]) without keeping logits.

    Args:
        rows: hidden states [N, H]; weight: [V, H]; targets: token ids [N]; bias: [V] or None.
        softcap: logits become softcap·tanh(logits / softcap) first (Gemma 2, arXiv:2408.00118).
        loss_type: see `losses.token_loss`.
        want_stats: entropy and top-1 hits too.
        chunk: rows projected at a time; None: as `chunk_rows` says.

    Returns:
        The summed loss, a scalar in fp32 (fp64 of fp64), differentiable once in rows, weight and bias; and `Stats`.
        Of no rows the loss is 0 and all gradients are zero.
    """
    loss, logps, found = token_losses(
        rows, weight, targets, lambda logps: token_loss(logps, loss_type).sum(), bias,
        softcap=softcap, stats=_WANTED if want_stats else (), chunk=chunk,
    )  # fmt: skip
    return loss, _summed(found, logps)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, loss_type: str, want_stats: bool
) -> tuple[torch.Tensor, Stats]:
    """The same from logits [N, V] that are there already: for heads that are not a plain linear layer."""
    logps, found = logps_of(logits, targets, _WANTED if want_stats else ())
    return token_loss(logps, loss_type).sum(), _summed(found, logps.detach())


def _summed(found: TokenStats, logps: torch.Tensor) -> Stats:
    count = torch.full((), len(logps), device=logps.device)
    if found.entropy is None or found.correct is None:
        return Stats(count, logps)
    return Stats(count, logps, found.entropy.sum(), found.correct.sum())


def base_of(model: nn.Module) -> Any:
    """The causal LM inside wrappers and adapters."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class Replaced:
    """While it is open, a module's forward is our own; `self._project` is the module's."""

    def __init__(self, module: nn.Module) -> None:
        self._head: Any = module

    def __enter__(self) -> Any:
        self._own = self._head.__dict__.get("forward")  # a hook library may have put one there
        self._project = self._head.forward
        self._head.forward = self._forward
        return self

    def __exit__(self, *exc: object) -> None:
        if self._own is None:
            del self._head.forward
        else:
            self._head.forward = self._own

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class Head(Replaced):
    """The head of a causal LM, taking hidden states and giving what is made of some of them."""

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        super().__init__(base.get_output_embeddings())
        config = base.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )

    def _linear(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """The rows as the head's weight and bias shall see them, when the head is a plain linear layer."""
        head = self._head
        if type(head) is not nn.Linear or self._own is not None:
            return None
        if self._scale == 1.0:
            return rows, head.weight, head.bias
        return rows * self._scale, head.weight, None if head.bias is None else head.bias * self._scale

    def _logits(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self._project(rows, *args, **kwargs) * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


class FusedHead(Head):
    """`with FusedHead(model, labels) as head: model(**batch)`, then `head.loss_sum` and `head.stats`.

    While it is open the model's forward computes no logits: its head turns hidden states [B, S, H] into the summed loss,
    which stands as [1, 1, 1] where the output has its logits. Capped and scaled logits (Gemma 2; Cohere, Granite) and
    heads with an adapter, a trained copy or quantised weights are handled.

    Args:
        model: a causal LM, wrapped in an adapter or a parallel wrapper or not.
        labels: unshifted, [B, T], -100 outside the loss.
        loss_type, want_stats: as for `linear_cross_entropy`.
        labelled: as for `select`.
    """

    loss_sum: torch.Tensor
    stats: Stats

    def __init__(
        self,
        model: nn.Module,
        labels: torch.Tensor,
        loss_type: str = "nll",
        want_stats: bool = False,
        labelled: int | None = None,
    ) -> None:
        super().__init__(model)
        self._labelled = labelled
        self._labels, self._loss_type, self._want_stats = labels, loss_type, want_stats

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows, targets = select(hidden, self._labels, self._labelled)
        if plain := self._linear(rows):
            rows, weight, bias = plain
            self.loss_sum, self.stats = linear_cross_entropy(
                rows, weight, targets, bias,
                softcap=self._softcap, loss_type=self._loss_type, want_stats=self._want_stats,
            )  # fmt: skip
        else:
            logits = self._logits(rows, *args, **kwargs)
            self.loss_sum, self.stats = cross_entropy(logits, targets, self._loss_type, self._want_stats)
        return self.loss_sum.reshape(1, 1, 1)


class LogpsHead(Head):
    """`with LogpsHead(model, length, positions, targets) as head: model(**batch)`, then `head.logps` and `head.stats`.

    Args:
        model: as for `FusedHead`.
        length: T of the batch's ids [R, T]; of more hidden states only the last T count (virtual tokens come first).
        positions: [N], of the states that predict the targets, in the flattened [R·T].
        targets: token ids [N].
        stats: as for `token_logps`.
        temperature: divides the logits.
        loss: as for `token_losses`; then `head.loss` is the summed loss, and the log-probs have no gradient.
    """

    logps: torch.Tensor
    stats: TokenStats
    loss: torch.Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        length: int,
        positions: torch.Tensor,
        targets: torch.Tensor,
        stats: Collection[str] = (),
        temperature: float = 1.0,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(model)
        self._temperature, self._loss = temperature, loss
        self._length, self._positions, self._targets, self._wanted = length, positions, targets, stats

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = rows_at(hidden, self._length, self._positions)
        cools = self._temperature != 1.0
        plain = None if cools and self._softcap is not None else self._linear(rows)
        if plain is not None:
            rows, weight, bias = plain
            if cools:  # the head is linear, so that its input may be divided
                rows = rows / self._temperature
                bias = None if bias is None else bias / self._temperature
            given: dict[str, Any] = {"softcap": self._softcap, "stats": self._wanted}
            if self._loss is None:
                self.logps, self.stats = token_logps(rows, weight, self._targets, bias, **given)
            else:
                self.loss, self.logps, self.stats = token_losses(
                    rows, weight, self._targets, self._loss, bias, **given
                )
        else:
            logits = self._logits(rows, *args, **kwargs) / self._temperature
            self.logps, self.stats = logps_of(logits, self._targets, self._wanted)
            if self._loss is not None:
                self.loss, self.logps = self._loss(self.logps), self.logps.detach()
        return (self.logps.sum() if self.loss is None else self.loss).reshape(1, 1, 1)


@uncompiled
@torch.no_grad()
def is_exact(model: nn.Module) -> bool:
    """Whether `FusedHead` gives the loss of the model's own logits, tried on a few tokens.

    A model may do to its logits what no name in its config tells: scale, cap, shift. So both are computed, with the
    head's input scaled up until a cap would show, and with the least likely tokens as labels, whose loss a wrong
    scale changes most. Random states and the training mode stay as they were.

    Args:
        model: as for `FusedHead`.

    Returns:
        Also false for a model that cannot be run on token ids alone.
    """
    head = base_of(model).get_output_embeddings()
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + _PROBE, device=device)[None] % max(2, len(head.weight))
    training, gain = model.training, 1.0

    def louder(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * gain, *given[1:])

    hook = head.register_forward_pre_hook(louder)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            spread = model(input_ids=ids, use_cache=False).logits.float().std().item()
            gain = _LOUD / spread if spread > 0 else 1.0
            logits = model(input_ids=ids, use_cache=False).logits.float()
            labels = torch.cat((ids[:, :1], logits[:, -_PROBE:-1].argmin(-1)), dim=1)
            rows, targets = select(logits, labels)
            with FusedHead(model, labels) as fused:
                model(input_ids=ids, use_cache=False)
    except Exception:  # of many kinds: this model wants other inputs, or its head is no plain module
        return False
    finally:
        model.train(training)
        hook.remove()
    expected = F.cross_entropy(rows, targets, reduction="sum")
    return bool((fused.loss_sum.float() - expected).abs() <= 0.02 * expected.abs() + 0.05)
