"""The next token of each row from its logits and one uniform number: exact inverse-transform sampling.

A row's token depends on its own logits and its own number alone, so that neither order nor size of a batch changes which
randomness a sequence gets. One number a token instead of one a vocabulary entry (Gumbel noise) also costs nothing beside
the softmax. No host sync on an accelerator.
"""

from __future__ import annotations

import numpy as np
import torch

_BLOCK = (
    256  # of the vocabulary, summed first: the search in double precision is over V / 256 sums and one block
)
_BELOW_ONE = 1 - 2.0**-40


def draw(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from softmax(logits / temperature), cut by top_k, then top_p, then min_p.

    Args:
        logits: [B, V], any floating type; computed in fp32.
        uniform: [B], float64 in [0, 1).
        temperature: above 0.
        top_k: only the k likeliest (of equal ones any, but never more than k).
        top_p: of these the fewest likeliest whose renormalised probabilities sum to top_p or more (without top_k also
            all that are exactly as likely as the last of them).
        min_p: of these the ones at least min_p times as likely as the likeliest.
        vocab_size: only ids below it.

    Returns:
        Ids [B], and log softmax(logits / temperature)[id] over the whole vocabulary, [B] in fp32: before any cut, as
        training computes it.
    """
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    allowed, norm = logits, None
    if vocab_size is not None and vocab_size < logits.shape[1]:
        allowed = logits[:, :vocab_size]
        norm = logits.logsumexp(dim=-1)
    if top_k is not None and top_k < allowed.shape[1]:
        values, ids = allowed.topk(top_k, dim=-1)
        ids = _among(values, ids, uniform, top_p, min_p)
    else:
        ids, total = _anywhere(allowed, uniform, top_p, min_p)
        norm = total if norm is None else norm
    norm = logits.logsumexp(dim=-1) if norm is None else norm
    return ids, logits.gather(1, ids[:, None]).squeeze(1) - norm


def _anywhere(
    logits: torch.Tensor, uniform: torch.Tensor, top_p: float, min_p: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids from the whole vocabulary [B], and log Σ exp(logits) [B] in fp32."""
    rows, size = logits.shape
    width = -(-size // _BLOCK) * _BLOCK
    top = logits.amax(dim=-1, keepdim=True)
    weights = logits.new_empty(rows, width)
    weights[:, size:] = 0
    torch.sub(logits, top, out=weights[:, :size])
    weights[:, :size].exp_()
    blocks = weights.view(rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float32)
    norm = top.squeeze(1) + sums.double().sum(-1).log().float()
    if top_p < 1:
        weights.masked_fill_(weights < _least_kept(weights[:, :size], top_p), 0)
    if min_p:
        weights.masked_fill_(weights < min_p, 0)
    if top_p < 1 or min_p:
        sums = blocks.sum(-1, dtype=torch.float32)
    block, rest = _search(sums, uniform)
    chosen = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK)).squeeze(1)
    inner, _ = _search(chosen, rest)
    return block * _BLOCK + inner, norm


def _search(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index whose cumulative weight is above uniform · total; how far into its weight that is, in [0, 1).

    An index without weight is never found, because the sum does not rise there.
    """
    sums = weights.double().cumsum(dim=-1)
    target = uniform[:, None].clamp(max=_BELOW_ONE) * sums[:, -1:]
    index = (sums <= target).sum(-1, keepdim=True)
    own = weights.gather(1, index).double()
    rest = (target - (sums.gather(1, index) - own)) / own
    return index.squeeze(1), rest.squeeze(1).clamp(0, _BELOW_ONE)


def _least_kept(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least weight in the nucleus of each row, [B, 1]: lighter ones sum to less than 1 − top_p of all."""
    if weights.device.type != "cpu":
        rising = weights.sort(dim=-1).values
    else:  # numpy sorts floats with vector instructions, an order of magnitude faster than torch
        rising = torch.from_numpy(np.sort(weights.numpy(), axis=-1))
    sums = rising.cumsum(dim=-1, dtype=torch.float64)
    lighter = (sums <= (1 - top_p) * sums[:, -1:]).sum(-1, keepdim=True)
    return rising.gather(1, lighter.clamp(max=rising.shape[1] - 1))


def _among(
    values: torch.Tensor,
    ids: torch.Tensor,
    uniform: torch.Tensor,
    top_p: float,
    min_p: float | None,
) -> torch.Tensor:
    """Ids [B] from candidates in falling order: logits and ids [B, K]."""
    weights = (values - values[:, :1]).exp().double()
    if top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        weights.masked_fill_(before >= top_p * weights.sum(-1, keepdim=True), 0)
    if min_p:
        weights.masked_fill_(weights < min_p, 0)
    place, _ = _search(weights, uniform)
    return ids.gather(1, place[:, None]).squeeze(1)
