"""Softmax over the vocabulary, from hidden states and the LM head's weight, a chunk of rows at a time.

Logits of more than a chunk never exist, and chunks share their memory. On a CPU they exist for a block of the vocabulary at
a time. Products run in the input's dtype, sums and softmax in fp32 (fp64 of fp64).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.linalg import vecdot

_CPU_BYTES = 128 * 2**20  # of smaller chunks the weight is read too often
_CPU_BLOCK = 4096  # tokens of the vocabulary, so that their weights and logits stay in the cache
_GPU_BYTES = 2 * 2**30
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


class Head(NamedTuple):
    """Weight [V, H], bias [V] or None, and the cap of the logits: softcap·tanh(logits / softcap)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    def block(self, of: slice) -> Head:
        """Of a part of the vocabulary, which may be shut out as a whole by a bias of -inf: then the largest finite one does it."""
        if self.bias is None:
            return Head(self.weight[of], None, self.softcap)
        least = torch.finfo(self.bias.dtype).min / 2
        return Head(self.weight[of], self.bias[of].clamp(min=least), self.softcap)

    def logits(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Of rows [n, H], in `out`, [n, V], and its dtype."""
        if rows.dtype == out.dtype:
            torch.mm(rows, self.weight.t(), out=out)
            logits = out if self.bias is None else out.add_(self.bias)
        else:
            logits = out.copy_(F.linear(rows, self.weight, self.bias))
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncapped_(self, slopes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Slopes in capped logits made, in place, those in the logits before the cap."""
        return slopes if self.softcap is None else slopes.mul_(1 - (logits / self.softcap).square())


class Gradients:
    """Gradients of rows, weight and bias that chunks add to; None where not wanted.

    The weight's is summed over chunks in fp32; of one chunk it is the product itself. With fp16 it stays in fp32 throughout,
    because a sum over rows is beyond its range before the loss's mean and scale are applied.
    """

    def __init__(self, rows: torch.Tensor, head: Head, needs: Sequence[bool]) -> None:
        exact = exact_of(rows.dtype)
        want_rows, want_weight, want_bias = needs
        self._rows, self._head, self._low = rows, head, rows.dtype
        self.rows = torch.empty_like(rows) if want_rows else None
        self._exact, self._want_weight = exact, want_weight
        self.weight: torch.Tensor | None = None
        self.bias = torch.zeros_like(head.bias, dtype=exact) if want_bias and head.bias is not None else None

    def add(self, of: slice, slopes: torch.Tensor) -> None:
        """From the gradient in the logits of a chunk, [n, V]."""
        low = slopes.to(self._low)
        if self.rows is not None:
            torch.mm(low, self._head.weight, out=self.rows[of])
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

    def add_blocks(
        self,
        of: slice,
        blocks: Iterable[tuple[slice, torch.Tensor, torch.Tensor]],
        targets: torch.Tensor,
        at_targets: torch.Tensor,
    ) -> None:
        """In weight and bias, from the slopes of a chunk as blocks of the vocabulary: where, [n, block], and a factor [n, 1];
        and those in the targets' logits, [n, 1], which come on top."""
        part, first = self._rows[of], self._want_weight and self.weight is None
        if first:
            self.weight = torch.empty_like(self._head.weight)
        for own, slopes, factor in blocks:
            if self.weight is not None:
                self.weight[own].addmm_(slopes.t(), part * factor, beta=0 if first else 1)
            if self.bias is not None:
                self.bias[own].addmv_(slopes.t(), factor.squeeze(1))
        if self.weight is not None:
            self.weight.index_add_(0, targets, part * at_targets)
        if self.bias is not None:
            self.bias.index_add_(0, targets, at_targets.squeeze(1))

    def all(self) -> tuple[torch.Tensor | None, ...]:
        """In the dtypes of what they are of, but for fp16."""
        weight, bias = self._head.weight, self._head.bias
        if self._want_weight and self.weight is None:  # there are no rows
            self.weight = torch.zeros_like(weight)
        kept = self._exact if self._low == torch.float16 else weight.dtype
        return (
            self.rows,
            None if self.weight is None else self.weight.to(kept),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class Softmax:
    """Of logits [n, V].

    Args:
        head: what made the logits; None where no gradients will be asked for.
        targets: [n].
        out: as much memory as that of the logits.

    Attributes:
        logps: log-probs of the targets, [n].
    """

    def __init__(
        self,
        logits: torch.Tensor,
        head: Head | None,
        targets: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> None:
        self._logits, self._head, self._targets = logits, head, targets[:, None]
        self._shares, self._norm, _ = _normalized(logits, out)
        self.logps = (logits.gather(1, self._targets) - self._norm).squeeze(1)

    def stats(self, wanted: Collection[str]) -> TokenStats:
        """Of the names that are wanted."""
        made = TokenStats()
        if "entropy" in wanted:
            made.entropy = (self._norm - _row_dots(self._shares, self._logits)).squeeze(1)
        if "mean_logit" in wanted:
            made.mean_logit = self._logits.mean(-1)
        if "correct" in wanted:
            made.correct = (self._logits.argmax(dim=-1, keepdim=True) == self._targets).squeeze(1)
        if "log_sum_square" in wanted:
            made.log_sum_square = _row_dots(self._shares, self._shares).log().squeeze(1)
        return made

    def add_to(self, gradients: Gradients, of: slice, factors: torch.Tensor | None) -> None:
        """Adds the gradients of Σ factor · log-prob, factors [n] or None for 1. Once: they take the memory of the shares."""
        assert self._head is not None
        own = torch.ones_like(self._norm) if factors is None else factors[:, None]
        slopes = self._shares.mul_(-own).scatter_add_(1, self._targets, own)
        gradients.add(of, self._head.uncapped_(slopes, self._logits))


class BlockedSoftmax:
    """The same without logits [n, V]: those of a block of the vocabulary exist at a time, and stay in a CPU's cache.

    Each block has a softmax of its own. What it weighs among all is known after the last; until then means over the
    vocabulary are kept of the blocks so far (as in FlashAttention, arXiv:2205.14135).

    Args:
        rows: [n, H], in the dtype of the head, fp32 or fp64.
        targets: [n].
        wanted: names of `TokenStats`.
        needs: whether gradients in rows, weight and bias will be wanted.
        memory: of `row_memory` numbers a row.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        wanted: Collection[str],
        needs: Sequence[bool],
        memory: torch.Tensor,
    ) -> None:
        self._head, self._targets = head, targets
        self._blocks: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # with slopes and log Σ exp
        column = rows.new_zeros(len(rows), 1)
        self._norm = largest = column - torch.inf
        likeliest = torch.full_like(targets, -1)
        self._target_logits, logit, square, total = (column.clone() for _ in range(4))
        self._pull = torch.zeros_like(rows) if needs[0] else None  # mean of the head's weight, by slopes
        free = len(rows) * _CPU_BLOCK
        for start in range(0, len(head.weight), _CPU_BLOCK):
            own = slice(start, start + _CPU_BLOCK)
            part = head.block(own)
            shape = len(rows), len(part.weight)
            size = shape[0] * shape[1]
            logits = part.logits(rows, memory[:size].view(shape))
            shares, norm, most = _normalized(logits, memory[free : free + size].view(shape))
            whole = torch.logaddexp(self._norm, norm)
            before, here = (self._norm - whole).exp_(), (norm - whole).exp_()
            if "correct" in wanted:  # of equal ones the first, as `argmax` has it
                likeliest = torch.where((most > largest).squeeze(1), logits.argmax(-1) + start, likeliest)
            self._norm, largest = whole, torch.maximum(largest, most)
            at = targets[:, None] - start
            inside = (at >= 0) & (at < shape[1])
            self._target_logits = torch.where(
                inside, logits.gather(1, at.clamp(0, shape[1] - 1)), self._target_logits
            )
            if "entropy" in wanted:
                logit.mul_(before).addcmul_(vecdot(shares, logits)[:, None], here)
            if "log_sum_square" in wanted:
                square.mul_(before.square()).addcmul_(vecdot(shares, shares)[:, None], here.square())
            if "mean_logit" in wanted:
                total += logits.sum(-1, keepdim=True)
            slopes = head.uncapped_(shares, logits)
            if self._pull is not None:
                self._pull.mul_(before).addcmul_(slopes @ part.weight, here)
            if any(needs[1:]):
                self._blocks.append((own, slopes, norm))
                free += size
        self.logps = (self._target_logits - self._norm).squeeze(1)
        made = {
            "entropy": self._norm - logit,
            "mean_logit": total / len(head.weight),
            "correct": (likeliest == targets)[:, None],
            "log_sum_square": square.log(),
        }
        self._stats = TokenStats(**{name: made[name].squeeze(1) for name in wanted})

    @staticmethod
    def row_memory(vocabulary: int, trained: bool) -> int:
        """Numbers a row: of one block of logits, and of the shares of one block or of all, which a trained head's gradients need."""
        return _CPU_BLOCK + (vocabulary if trained else _CPU_BLOCK)

    def stats(self, _: Collection[str]) -> TokenStats:
        """Those that were wanted when this was made."""
        return self._stats

    def add_to(self, gradients: Gradients, of: slice, factors: torch.Tensor | None) -> None:
        """As of `Softmax`."""
        own = torch.ones_like(self._norm) if factors is None else factors[:, None]
        at_targets = self._head.uncapped_(own.clone(), self._target_logits)
        if self._pull is not None and gradients.rows is not None:
            own_weight = self._head.weight.index_select(0, self._targets)
            gradients.rows[of] = own_weight.mul_(at_targets).addcmul_(self._pull, own, value=-1)
        if self._blocks:
            factored = (
                (where, slopes, (norm - self._norm).exp_().mul_(-own)) for where, slopes, norm in self._blocks
            )
            gradients.add_blocks(of, factored, self._targets, at_targets)


def _normalized(
    logits: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax [n, V], log Σ exp [n, 1] and the largest logit [n, 1].

    torch's softmax keeps a row in the cache from its maximum to its division, and its exponential is quick: on a CPU it takes a
    fifth of the time of these steps one after another.
    """
    shares = torch.softmax(logits, -1, out=out)
    largest = logits.amax(dim=-1, keepdim=True)
    # the largest share is 1 / Σ exp(logit − largest logit), and never small
    return shares, largest - shares.amax(dim=-1, keepdim=True).log(), largest


def _row_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # `vecdot` is quicker while everything is in the cache, but makes a block of products
    return torch.einsum("nv,nv->n", one, other)[:, None]


def exact_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _goes_in_blocks(vocabulary: int, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == exact_of(dtype) and vocabulary > _CPU_BLOCK


class Chunks:
    """Rows in chunks, whose softmaxes share their memory: one may be used until the next is asked for."""

    def __init__(self, rows: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int) -> None:
        self._rows, self._head, self._targets, self._chunk = rows, head, targets, chunk

    def softmaxes(
        self, wanted: Collection[str] = (), needs: Sequence[bool] = (False, False, False)
    ) -> Iterator[tuple[slice, Softmax | BlockedSoftmax]]:
        """Where a chunk is, and its softmax."""
        rows, head = self._rows, self._head
        exact, vocabulary, most = exact_of(rows.dtype), len(head.weight), min(self._chunk, len(rows))
        blocked = _goes_in_blocks(vocabulary, rows.device, rows.dtype)
        size = most * (BlockedSoftmax.row_memory(vocabulary, any(needs[1:])) if blocked else 2 * vocabulary)
        memory = torch.empty(size, dtype=exact, device=rows.device)
        for start in range(0, len(rows), self._chunk):
            of = slice(start, start + self._chunk)
            part, targets = rows[of], self._targets[of]
            if blocked:
                yield of, BlockedSoftmax(part, head, targets, wanted, needs, memory)
            else:
                first, second = memory[: 2 * len(part) * vocabulary].view(2, len(part), vocabulary)
                yield of, Softmax(head.logits(part, first), head, targets, second)


def chunk_rows(rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows are projected at a time, in products of a dtype: parts of one size, near the device's budget.

    Each keeps its logits and their softmax, or the softmax alone where logits come in blocks.
    """
    numbers = 1 if _goes_in_blocks(vocabulary, device, dtype) else 2
    row = numbers * vocabulary * exact_of(dtype).itemsize
    most = max(1, _CPU_BYTES // row) if device.type == "cpu" else max(_GPU_LEAST_ROWS, _GPU_BYTES // row)
    return max(1, ceil(rows / max(1, round(rows / most))))


def chunk_bytes(rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype, trained: bool) -> int:
    """What a chunk's logits and softmax take, with a copy of them in the dtype of the products where that is another.

    Args:
        dtype: of the products.
        trained: gradients in the head's weight are wanted.
    """
    chunk, exact = chunk_rows(rows, vocabulary, device, dtype), exact_of(dtype)
    if _goes_in_blocks(vocabulary, device, dtype):
        return exact.itemsize * chunk * BlockedSoftmax.row_memory(vocabulary, trained)
    copy = 0 if dtype == exact else dtype.itemsize
    return (2 * exact.itemsize + copy) * chunk * vocabulary
