"""The order of rows: both classes in every batch, a partner for every row, and passes without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BothClassesSampler(Sampler[int]):
    """A random order in which each batch has its share of both classes, rounded so that it has at least one of each.

    The rarer class is spread evenly, so that batches differ by at most one row of it. With fewer of its rows than
    batches, the batches that get one are spread evenly.

    Args:
        labels: bool, [N].
        batch_size: rows that follow each other in one batch; several processes take batches in turn.
        seed: of the order, with the epoch.
        epoch: tells the epoch when an order is drawn. It is asked, because `set_epoch` of a data loader that skips
            batches on several processes does not reach its sampler (accelerate 1.15).
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.labels, self.batch_size, self.seed, self.epoch = (
            np.asarray(labels, bool),
            batch_size,
            seed,
            epoch,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch()))
        rare, common = (rng.permutation(np.flatnonzero(self.labels == kind)) for kind in (True, False))
        if len(rare) > len(common):
            rare, common = common, rare
        total, size = len(self.labels), self.batch_size
        edges = np.minimum(np.arange(0, total + size, size), total)
        edges = edges[: np.searchsorted(edges, total) + 1]
        quotas = _shares(len(rare), np.diff(edges))
        order = []
        for quota, rows in zip(quotas, np.diff(edges), strict=True):
            batch = np.concatenate((rare[:quota], common[: rows - quota]))
            rare, common = rare[quota:], common[rows - quota :]
            order.append(rng.permutation(batch))
        return iter(np.concatenate(order).tolist())


def _shares(rows: int, sizes: np.ndarray) -> np.ndarray:
    """`rows` spread over batches of these sizes in proportion, one at least for each batch of two when there are enough."""
    shares = np.diff(np.rint(np.cumsum([0, *sizes]) * rows / sizes.sum())).astype(int)
    wanting = np.flatnonzero((shares == 0) & (sizes > 1))
    for batch in wanting:
        richest = int(shares.argmax())
        if shares[richest] < 2:
            break
        shares[richest] -= 1
        shares[batch] += 1
    return shares


def in_passes(rows: int, start: int, stop: int, *, seed: int, shuffled: bool = True) -> np.ndarray:
    """Places start … stop − 1 of an endless sequence of passes over the rows, each in an order of its own.

    A pass that ends in the midst of a batch is followed by the next, so that few rows fill large batches too.

    Args:
        rows: their number, N ≥ 1.
        shuffled: else every pass is 0 … N − 1.

    Returns:
        Row numbers, [stop − start].
    """
    places = np.arange(start, stop)
    if not shuffled:
        return places % rows
    orders = {k: np.random.default_rng((seed, int(k))).permutation(rows) for k in np.unique(places // rows)}
    return np.asarray([orders[place // rows][place % rows] for place in places], dtype=np.int64)


def other_rows(prompts: Sequence[bytes], seed: int) -> np.ndarray:
    """For each row another one with another prompt, where there is one; every row is taken once.

    Args:
        prompts: what tells prompts apart, [N ≥ 2].

    Returns:
        Row numbers, [N].
    """
    rng = np.random.default_rng(seed)
    _, kinds = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    order = rng.permutation(len(kinds))
    # Rows of one prompt side by side, then everybody takes the row that is as far on as the largest group is big:
    # that is never one of the own group, unless a group holds more than half of all rows.
    order = order[np.argsort(kinds[order], kind="stable")]
    largest = int(np.bincount(kinds).max())
    partner = np.empty(len(kinds), dtype=np.int64)
    partner[order] = np.roll(order, -largest)
    if (partner == np.arange(len(kinds))).any():  # all rows share one prompt
        partner[order] = np.roll(order, -1)
    return partner
