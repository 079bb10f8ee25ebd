"""Log-probs of tokens from hidden states and the LM head, for losses that weigh whole sequences.

`fused_head.py` makes a loss and its gradients in one pass over the logits. Where a token's share of the gradient is known
only once all log-probs of its sequence are, a frozen head can still have its gradients made at once, to be scaled later;
a trained one projects a second time in the backward pass. Logits of more than a chunk never exist.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hydratune.fused_head import Head, chunk_rows, in_one_dtype, project, rows_at


@dataclass
class TokenStats:
    """By-products of each token, [N], without gradient; None where not asked for.

    Attributes:
        entropy: of the next-token distribution, nats.
        mean_logit: mean of the logits over the vocabulary.
        correct: whether the token was the likeliest.
        log_sum_square: log Σ p².
    """

    entropy: torch.Tensor | None = None
    mean_logit: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    log_sum_square: torch.Tensor | None = None


STATS = tuple(TokenStats.__dataclass_fields__)


def _stats_of(
    logits: torch.Tensor, targets: torch.Tensor, norm: torch.Tensor, wanted: Collection[str]
) -> list:
    """The wanted ones of `STATS` from logits [n, V], targets [n, 1] and log Σ exp [n, 1]; None for the others."""
    made: dict[str, torch.Tensor] = {}
    if "entropy" in wanted:
        made["entropy"] = norm.squeeze(1) - (torch.softmax(logits, dim=-1) * logits).sum(-1)
    if "mean_logit" in wanted:
        made["mean_logit"] = logits.mean(-1)
    if "correct" in wanted:
        made["correct"] = (logits.argmax(dim=-1, keepdim=True) == targets).squeeze(1)
    if "log_sum_square" in wanted:
        made["log_sum_square"] = torch.logsumexp(2 * (logits - norm), dim=-1)
    return [made.get(name) for name in STATS]


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
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        want_rows, want_weight, want_bias = (want_gradients and need for need in ctx.needs_input_grad[:3])
        frozen = not (want_weight or want_bias)
        d_rows = torch.empty_like(rows) if want_rows and frozen else None
        kept = None
        logps, norms = (torch.empty(len(rows), dtype=exact, device=rows.device) for _ in range(2))
        stats: list[list[torch.Tensor]] = [[] for _ in STATS]
        for start in range(0, len(rows), chunk):
            part, wanted_ids = rows[start : start + chunk], targets[start : start + chunk, None]
            logits = project(part, weight, bias, softcap, exact)
            norm = logits.logsumexp(dim=-1, keepdim=True)
            logps[start : start + chunk] = (logits.gather(1, wanted_ids) - norm).squeeze(1)
            norms[start : start + chunk] = norm.squeeze(1)
            for found, more in zip(stats, _stats_of(logits, wanted_ids, norm, wanted), strict=True):
                if more is not None:
                    found.append(more)
            if d_rows is not None:
                slopes = _slopes(logits, wanted_ids, norm, softcap)
                torch.mm(slopes.to(rows.dtype), weight, out=d_rows[start : start + chunk])
            elif want_gradients and not frozen and len(rows) <= chunk:
                kept = logits
        ctx.save_for_backward(*((d_rows,) if frozen else (rows, weight, bias, targets, norms, kept)))
        ctx.frozen, ctx.softcap, ctx.chunk, ctx.needs = (
            frozen,
            softcap,
            chunk,
            (want_rows, want_weight, want_bias),
        )
        empty = rows.new_empty(0)
        made = [
            torch.cat(found) if found else (empty if n in wanted else None)
            for n, found in zip(STATS, stats, strict=True)
        ]
        ctx.mark_non_differentiable(*(m for m in made if m is not None))
        return logps, *made

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        rest = (None,) * 5
        if ctx.frozen:
            (d_rows,) = ctx.saved_tensors
            return (None if d_rows is None else (grad[:, None] * d_rows).to(d_rows.dtype), None, None, *rest)
        rows, weight, bias, targets, norms, kept = ctx.saved_tensors
        want_rows, want_weight, want_bias = ctx.needs
        d_rows = torch.empty_like(rows) if want_rows else None
        d_weight = torch.zeros_like(weight, dtype=norms.dtype) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=norms.dtype) if want_bias else None
        for start in range(0, len(rows), ctx.chunk):
            of = slice(start, start + ctx.chunk)
            part = rows[of]
            logits = kept if kept is not None else project(part, weight, bias, ctx.softcap, norms.dtype)
            slopes = _slopes(logits, targets[of, None], norms[of, None], ctx.softcap).mul_(grad[of, None])
            low = slopes.to(rows.dtype)
            if d_rows is not None:
                torch.mm(low, weight, out=d_rows[of])
            if d_weight is not None:
                if d_weight.dtype == low.dtype:
                    d_weight.addmm_(low.t(), part)
                else:
                    d_weight += low.t() @ part
            if d_bias is not None:
                d_bias += slopes.sum(0)
        return (
            d_rows,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *rest,
        )


def _slopes(
    logits: torch.Tensor, targets: torch.Tensor, norm: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """The gradient of the targets' log-probs in the uncapped logits, in the memory of the logits."""
    cap = 1 - (logits / softcap).square() if softcap is not None else None
    slopes = logits.sub_(norm).exp_().neg_()
    slopes.scatter_add_(1, targets, torch.ones_like(norm))
    return slopes if cap is None else slopes.mul_(cap)


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
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        logps, *made = _TokenLogps.apply(
            rows, weight, bias, targets, softcap, tuple(stats), torch.is_grad_enabled(), chunk
        )
    return logps, TokenStats(*made)


class LogpsHead(Head):
    """`with LogpsHead(model, length, positions, targets) as head: model(**batch)`, then `head.logps` and `head.stats`.

    Args:
        model: as for `FusedHead`.
        length: T of the batch's ids [R, T]; of more hidden states only the last T count (virtual tokens come first).
        positions: [N], of the states that predict the targets, in the flattened [R·T].
        targets: token ids [N].
        stats: as for `token_logps`.
        temperature: divides the logits.
    """

    logps: torch.Tensor
    stats: TokenStats

    def __init__(
        self,
        model: nn.Module,
        length: int,
        positions: torch.Tensor,
        targets: torch.Tensor,
        stats: Collection[str] = (),
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model)
        self._temperature = temperature
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
            self.logps, self.stats = token_logps(
                rows, weight, self._targets, bias, softcap=self._softcap, stats=self._wanted
            )
        else:
            logits = self._logits(rows, *args, **kwargs)
            self.logps, self.stats = logps_of(logits / self._temperature, self._targets, self._wanted)
        return self.logps.sum().reshape(1, 1, 1)


def logps_of(
    logits: torch.Tensor, targets: torch.Tensor, stats: Collection[str] = ()
) -> tuple[torch.Tensor, TokenStats]:
    """`token_logps` from logits [N, V] that are there already."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    logps = (logits.gather(1, targets[:, None]) - norm).squeeze(1)
    with torch.no_grad():
        made = _stats_of(logits, targets[:, None], norm, stats)
    return logps, TokenStats(*made)
