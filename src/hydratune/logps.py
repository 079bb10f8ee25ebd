"""Log-probs of tokens from hidden states and the LM head's weight, and losses of them, without logits of all tokens.

Where a token's loss is a function of its own log-prob alone, loss and gradients are made in one pass over the logits
(`token_losses`: three products, two with a frozen head, one without gradients). Where its share of the gradient is known
only once all log-probs of its sequence are (`token_logps`), a frozen head can still have its gradients made at once, to be
scaled later; a trained one projects a second time in the backward pass. Logits of more than a chunk never exist, and chunks
share their memory. Products run in the input's dtype, sums and softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F

_CPU_LOGIT_BYTES = 128 * 2**20  # smaller blocks of logits re-read the weight too often
_CPU_TOKENS = 2048  # of the vocabulary that are projected at a time, so that their weights stay in the cache
_GPU_LOGIT_BYTES = 2 * 2**30
_GPU_LEAST_ROWS = 4096


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


Loss = Callable[[torch.Tensor], torch.Tensor]
"""Log-probs [N] → their summed loss, in which each token's share is a function of its own log-prob alone."""


class _Softmax:
    """Of logits [n, V].

    torch's softmax keeps a row in the cache from its maximum to its division, and its exponential is quick: on a CPU it takes a
    fifth of the time of these steps one after another.

    Attributes:
        shares: probabilities, [n, V].
        norm: log Σ exp(logits), [n, 1].
        logps: log-probs of the targets, [n].
    """

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, out: torch.Tensor | None = None) -> None:
        self.logits, self.targets = logits, targets[:, None]
        self.shares = torch.softmax(logits, -1, out=out)
        # the largest share is 1 / Σ exp(logit − largest logit), and never small
        self.norm = logits.amax(dim=-1, keepdim=True) - self.shares.amax(dim=-1, keepdim=True).log()
        self.logps = (logits.gather(1, self.targets) - self.norm).squeeze(1)

    def stats(self, wanted: Collection[str]) -> list:
        """The wanted ones of `STATS`, None for the others."""
        made: dict[str, torch.Tensor] = {}
        if "entropy" in wanted:
            made["entropy"] = self.norm.squeeze(1) - _row_dots(self.shares, self.logits)
        if "mean_logit" in wanted:
            made["mean_logit"] = self.logits.mean(-1)
        if "correct" in wanted:
            made["correct"] = (self.logits.argmax(dim=-1, keepdim=True) == self.targets).squeeze(1)
        if "log_sum_square" in wanted:
            made["log_sum_square"] = _row_dots(self.shares, self.shares).log()
        return [made.get(name) for name in STATS]

    def slopes(self, factors: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
        """The gradient of Σ factor · log-prob in the uncapped logits, in the memory of `shares`; factors [n], None: 1."""
        own = torch.ones_like(self.norm) if factors is None else factors[:, None]
        return _slopes(self.shares, own, self.logits, self.targets, softcap)


def _row_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nv,nv->n", one, other)


def _slopes(
    shares: torch.Tensor,
    own: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    shares.mul_(-own).scatter_add_(1, targets, own)
    return shares if softcap is None else shares.mul_(1 - (logits / softcap).square())


class _Chunks:
    """Logits of rows, chunk by chunk, in memory that all chunks share."""

    def __init__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        chunk: int,
    ) -> None:
        self.rows, self.weight, self.bias, self.targets = rows, weight, bias, targets
        self.softcap, self.chunk = softcap, chunk
        self.exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        shape = (2, min(chunk, len(rows)), len(weight))
        self.memory = torch.empty(shape, dtype=self.exact, device=rows.device)

    def logits(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Where a chunk is, its logits, and as much memory."""
        for start in range(0, len(self.rows), self.chunk):
            of = slice(start, start + self.chunk)
            part = self.rows[of]
            first, second = self.memory[:, : len(part)]
            yield of, project(part, self.weight, self.bias, self.softcap, self.exact, first), second

    def softmaxes(self) -> Iterator[tuple[slice, _Softmax]]:
        for of, logits, memory in self.logits():
            yield of, _Softmax(logits, self.targets[of], memory)


class _Gradients:
    """Gradients of rows, weight and bias that chunks add to; None where not wanted.

    The weight's is summed over chunks in fp32; of one chunk it is the product itself. With fp16 it stays in fp32 throughout,
    because a sum over rows is beyond its range before the loss's mean and scale are applied.
    """

    def __init__(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: Collection[bool]
    ) -> None:
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        want_rows, want_weight, want_bias = needs
        self._rows, self._low = rows, rows.dtype
        self._weight_itself, self._bias_itself = weight, bias
        self.rows = torch.empty_like(rows) if want_rows else None
        self._exact, self._want_weight = exact, want_weight
        self.weight: torch.Tensor | None = None
        self.bias = torch.zeros_like(bias, dtype=exact) if want_bias and bias is not None else None

    def add(self, of: slice, slopes: torch.Tensor) -> None:
        """From the gradient in the logits of a chunk."""
        low = slopes.to(self._low)
        if self.rows is not None:
            torch.mm(low, self._weight_itself, out=self.rows[of])
        if self._want_weight:
            self._add_to_weight(slopes if low.dtype == torch.float16 else low, self._rows[of])
        if self.bias is not None:
            self.bias += slopes.sum(0)

    def _add_to_weight(self, slopes: torch.Tensor, part: torch.Tensor) -> None:
        part = part.to(slopes.dtype)
        if self.weight is None:
            product = slopes.t() @ part
            self.weight = product if len(part) == len(self._rows) else product.to(self._exact)
        elif self.weight.dtype == slopes.dtype:
            self.weight.addmm_(slopes.t(), part)
        else:
            self.weight += slopes.t() @ part

    def all(self) -> tuple[torch.Tensor | None, ...]:
        """In the dtypes of what they are of, but for fp16."""
        if self._want_weight and self.weight is None:  # there are no rows
            self.weight = torch.zeros_like(self._weight_itself)
        kept = self._exact if self._low == torch.float16 else self._weight_itself.dtype
        return (
            self.rows,
            None if self.weight is None else self.weight.to(kept),
            None if self.bias is None or self._bias_itself is None else self.bias.to(self._bias_itself.dtype),
        )


def _joined(
    ctx: Any, parts: list[list[torch.Tensor | None]], like: torch.Tensor, wanted: Collection[str]
) -> list[torch.Tensor | None]:
    """Stats of all chunks, each without gradient."""
    made = []
    for number, name in enumerate(STATS):
        found = [part[number] for part in parts]
        made.append((torch.cat(found) if found else like.new_empty(0)) if name in wanted else None)
    ctx.mark_non_differentiable(*(m for m in made if m is not None))
    return made


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
        chunks, gradients = (
            _Chunks(rows, weight, bias, targets, softcap, chunk),
            _Gradients(rows, weight, bias, needs),
        )
        logps = torch.zeros(len(rows), dtype=chunks.exact, device=rows.device)
        stats = []
        for of, softmax in chunks.softmaxes():
            logps[of] = softmax.logps
            stats.append(softmax.stats(wanted))
            if any(needs):
                with torch.enable_grad():  # of all tokens, of which only those of the chunk are looked at
                    every = logps.detach().requires_grad_()
                    (factors,) = torch.autograd.grad(loss(every), every)
                gradients.add(of, softmax.slopes(factors[of], softcap))
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
        frozen = not (needs[1] or needs[2])
        chunks = _Chunks(rows, weight, bias, targets, softcap, chunk)
        gradients = _Gradients(rows, weight, bias, [needs[0] and frozen, False, False])
        kept = None
        logps = torch.empty(len(rows), dtype=chunks.exact, device=rows.device)
        stats = []
        for of, softmax in chunks.softmaxes():
            logps[of] = softmax.logps
            stats.append(softmax.stats(wanted))
            if gradients.rows is not None:
                gradients.add(of, softmax.slopes(None, softcap))
            elif want_gradients and not frozen and len(rows) <= chunk:
                kept = softmax.logits
        ctx.save_for_backward(*((gradients.rows,) if frozen else (rows, weight, bias, targets, kept)))
        ctx.frozen, ctx.softcap, ctx.chunk, ctx.needs = frozen, softcap, chunk, needs
        return logps, *_joined(ctx, stats, logps, wanted)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        rest = (None,) * 5
        if ctx.frozen:
            (d_rows,) = ctx.saved_tensors
            return (None if d_rows is None else (grad[:, None] * d_rows).to(d_rows.dtype), None, None, *rest)
        rows, weight, bias, targets, kept = ctx.saved_tensors
        gradients = _Gradients(rows, weight, bias, ctx.needs)
        if kept is not None:
            found = iter([(slice(0, len(rows)), kept, torch.empty_like(kept))])
        else:
            found = _Chunks(rows, weight, bias, targets, ctx.softcap, ctx.chunk).logits()
        for of, logits, memory in found:
            shares = torch.softmax(logits, -1, out=memory)
            gradients.add(of, _slopes(shares, grad[of, None], logits, targets[of, None], ctx.softcap))
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
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device)
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
    chunk = chunk or chunk_rows(len(rows), len(weight), rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        total, logps, *made = _TokenLosses.apply(
            rows, weight, bias, targets, softcap, loss, tuple(stats), torch.is_grad_enabled(), chunk
        )
    return total, logps, TokenStats(*made)


def chunk_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many rows are projected at a time: parts of one size, whose two blocks of fp32 logits are near the device's budget."""
    if device.type == "cpu":
        most = max(1, _CPU_LOGIT_BYTES // (8 * vocabulary))
    else:
        most = max(_GPU_LEAST_ROWS, _GPU_LOGIT_BYTES // (8 * vocabulary))
    return max(1, ceil(rows / max(1, round(rows / most))))


def project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    exact: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [N, V] in the dtype `exact`, where wanted in the memory of `out`."""
    if out is None:
        logits = F.linear(rows, weight, bias).to(exact)
    elif rows.dtype == exact:
        part = _CPU_TOKENS if rows.device.type == "cpu" else len(weight)
        for own, place in zip(weight.split(part), out.split(part, dim=1), strict=True):
            torch.mm(rows, own.t(), out=place)
        logits = out if bias is None else out.add_(bias)
    else:
        logits = out.copy_(F.linear(rows, weight, bias))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


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
        made = _Softmax(logits, targets).stats(stats) if stats else ()
    return logps, TokenStats(*made)
