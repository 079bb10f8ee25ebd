"""Log-probs of tokens from hidden states and the LM head's weight, and losses of them, without logits of all tokens.

Where a token's loss is a function of its own log-prob alone, loss and gradients are made in one pass over the logits
(`token_losses`: three products, two with a frozen head, one without gradients). Where its share of the gradient is known
only once all log-probs of its sequence are (`token_logps`), a frozen head can still have its gradients made at once, to be
scaled later; a trained one projects a second time in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from hydratune.vocabulary import (
    STATS,
    BlockedSoftmax,
    Chunks,
    Gradients,
    Head,
    Softmax,
    TokenStats,
    chunk_rows,
    exact_of,
)

Loss = Callable[[torch.Tensor], torch.Tensor]
"""Log-probs [N] → their summed loss, in which each token's share is a function of its own log-prob alone."""


def _joined(
    ctx: Any, parts: list[TokenStats], like: torch.Tensor, wanted: Collection[str]
) -> list[torch.Tensor | None]:
    """Stats of all chunks, each without gradient."""
    made = []
    for name in STATS:
        found = [getattr(part, name) for part in parts]
        made.append((torch.cat(found) if found else like.new_empty(0)) if name in wanted else None)
    ctx.mark_non_differentiable(*(m for m in made if m is not None))
    return made


_NOTHING = (False, False, False)  # of rows, weight and bias has a gradient


class _TokenLosses(torch.autograd.Function):
    """Summed loss of rows' log-probs, with gradients made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        loss: Loss,
        wanted: tuple[str, ...],
        want_gradients: bool,
        chunk: int,
    ) -> tuple[torch.Tensor | None, ...]:
        needs = [want_gradients and need for need in ctx.needs_input_grad[:3]]
        head = Head(weight, bias, softcap)
        gradients = Gradients(rows, head, needs)
        logps = torch.zeros(len(rows), dtype=exact_of(rows.dtype), device=rows.device)
        stats = []
        for of, softmax in Chunks(rows, head, targets, chunk).softmaxes(wanted, needs):
            logps[of] = softmax.logps
            stats.append(softmax.stats(wanted))
            if any(needs):
                with torch.enable_grad():  # of all tokens, of which only those of the chunk are looked at
                    every = logps.detach().requires_grad_()
                    (factors,) = torch.autograd.grad(loss(every), every)
                softmax.add_to(gradients, of, factors[of])
        ctx.save_for_backward(*gradients.all())
        made = _joined(ctx, stats, logps, wanted)
        ctx.mark_non_differentiable(logps, *(m for m in made if m is not None))
        return loss(logps), logps, *made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        # in the loss's precision: 1/3 rounded to bf16 would be off by a whole rounding. A GPU needs a vector for that; a CPU
        # would make a copy in fp32 of what it scales by a vector
        factor = grad if grad.device.type == "cpu" else grad.reshape(1)
        scaled = (
            None if saved is None else torch.mul(saved, factor, out=torch.empty_like(saved))
            for saved in ctx.saved_tensors
        )
        return (*scaled, *(None,) * 6)


class _TokenLogps(torch.autograd.Function):
    """log softmax(rows @ weightᵀ + bias)[target] of each row, [N].

    With a frozen head the rows' gradients are made in the forward pass, one product, and only scaled later. A trained
    one needs each row's own factor inside its product, so the logits are made again; unless one chunk held them all.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        wanted: tuple[str, ...],
        want_gradients: bool,
        chunk: int,
    ) -> tuple[torch.Tensor | None, ...]:
        needs = [want_gradients and need for need in ctx.needs_input_grad[:3]]
        frozen, head = not (needs[1] or needs[2]), Head(weight, bias, softcap)
        keep = want_gradients and not frozen and len(rows) <= chunk
        gradients = Gradients(rows, head, [needs[0] and frozen, False, False])
        logps = torch.empty(len(rows), dtype=exact_of(rows.dtype), device=rows.device)
        stats, ctx.kept = [], None
        for of, softmax in Chunks(rows, head, targets, chunk).softmaxes(
            wanted, needs if frozen or keep else _NOTHING
        ):
            logps[of] = softmax.logps
            stats.append(softmax.stats(wanted))
            if gradients.rows is not None:
                softmax.add_to(gradients, of, None)
            elif keep:
                ctx.kept = softmax
        ctx.save_for_backward(*((gradients.rows,) if frozen else (rows, weight, bias, targets)))
        ctx.frozen, ctx.softcap, ctx.chunk, ctx.needs = frozen, softcap, chunk, needs
        return logps, *_joined(ctx, stats, logps, wanted)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        rest = (None,) * 5
        if ctx.frozen:
            (d_rows,) = ctx.saved_tensors
            return (None if d_rows is None else (grad[:, None] * d_rows).to(d_rows.dtype), None, None, *rest)
        rows, weight, bias, targets = ctx.saved_tensors
        head = Head(weight, bias, ctx.softcap)
        gradients = Gradients(rows, head, ctx.needs)
        kept, ctx.kept = ctx.kept, None  # its memory is used up here
        found: Iterable[tuple[slice, Softmax | BlockedSoftmax]] = (
            Chunks(rows, head, targets, ctx.chunk).softmaxes(needs=ctx.needs)
            if kept is None
            else [(slice(0, len(rows)), kept)]
        )
        for of, softmax in found:
            softmax.add_to(gradients, of, grad[of])
        return (*gradients.all(), *rest)


def token_logps(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    stats: Collection[str] = (),
    chunk: int | None = None,
) -> tuple[torch.Tensor, TokenStats]:
    """log softmax(rows @ weightᵀ + bias)[target] of each row without keeping logits.

    Args: see `linear_cross_entropy`; and
        stats: which of `STATS` are wanted too.

    Returns:
        Log-probs [N] in fp32 (fp64 of fp64), differentiable once in rows, weight and bias; and `TokenStats`.
    """
    rows, weight, bias = in_one_dtype(rows, weight, bias)
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device, rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        logps, *made = _TokenLogps.apply(
            rows, weight, bias, targets, softcap, tuple(stats), torch.is_grad_enabled(), chunk
        )
    return logps, TokenStats(*made)


def token_losses(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: Loss,
    bias: torch.Tensor | None = None,
    *,
    softcap: float | None = None,
    stats: Collection[str] = (),
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, TokenStats]:
    """A loss of the log-probs of `token_logps`, in three products (two with a frozen head) instead of four.

    Args: as there, and
        loss: called once a chunk, with 0 in the place of log-probs that are still to come.

    Returns:
        The summed loss, differentiable once in rows, weight and bias; log-probs [N] without gradient; `TokenStats`.
    """
    rows, weight, bias = in_one_dtype(rows, weight, bias)
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device, rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        total, logps, *made = _TokenLosses.apply(
            rows, weight, bias, targets, softcap, loss, tuple(stats), torch.is_grad_enabled(), chunk
        )
    return total, logps, TokenStats(*made)


def in_one_dtype(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As autocast has it, else the weight's."""
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return rows.to(weight.dtype), weight, bias


def logps_of(
    logits: torch.Tensor, targets: torch.Tensor, stats: Collection[str] = ()
) -> tuple[torch.Tensor, TokenStats]:
    """`token_logps` from logits [N, V] that are there already."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    logps = (logits.gather(1, targets[:, None]) - norm).squeeze(1)
    with torch.no_grad():
        made = Softmax(logits, None, targets).stats(stats) if stats else TokenStats()
    return logps, made
