"""Memory of keys and values for decoding, and what each step attends to, both without work that grows with every token.

transformers' DynamicCache concatenates at each step, its StaticCache attends to all the room it has, and both have the
model make its masks anew at each step. Here a step writes one column in place and reads a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns by which the memory grows


class Columns(CacheLayerMixin):
    """Keys and values [B, H, T, D] with room for more columns, written in place.

    Args:
        keys, values: memory, of which the first `used` columns are filled.
        seen: tokens so far, padding included.
        window: of sliding attention; only so many of the last columns are ever read.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, used: int, seen: int, window: int | None
    ) -> None:
        super().__init__()
        self.window, self.is_sliding, self.is_initialized = window, window is not None, True
        self.keys, self.values, self.used, self.seen = keys, values, used, seen

    def _move(self, rows: torch.Tensor | None, room: int) -> None:
        first = 0 if self.window is None else max(0, self.used - self.window + 1)
        self.keys, self.values = (self._moved(old, first, rows, room) for old in (self.keys, self.values))
        self.used -= first

    def _moved(self, old: torch.Tensor, first: int, rows: torch.Tensor | None, room: int) -> torch.Tensor:
        old = old[:, :, first : self.used]
        many, heads, length, size = old.shape
        new = old.new_empty(many if rows is None else len(rows), heads, length + room, size)
        new[:, :, :length] = old if rows is None else old.index_select(0, rows)
        return new

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: there is a prompt from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.used == self.keys.shape[2]:
            self._move(None, ROOM)
        end = self.used + 1
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used, self.seen = end, self.seen + 1
        first = 0 if self.window is None else max(0, end - self.window)
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows."""
        self._move(beam_idx, max(1, self.keys.shape[2] - self.used))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        reach = self.seen + query_length
        first = 0 if self.window is None else max(0, reach - self.window)
        return reach - first, first

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1


class Mask:
    """What a step's one query a row attends to: made once for all steps, of which each reads one column more.

    Args:
        padding: [B], columns in front that no query sees.
        seen: columns of the prompts.
        room: columns to come.
        dtype: of an additive mask [B, 1, 1, T]; None: a mask of tokens [B, T].
        windows: of each type of layer that has a mask of its own; of all layers under "".
        needed: whether anything is masked at all.
    """

    def __init__(
        self,
        padding: torch.Tensor,
        seen: int,
        room: int,
        dtype: torch.dtype | None,
        windows: dict[str, int | None],
        needed: bool,
    ) -> None:
        self.seen, self.windows, self.additive, self.needed = seen, windows, dtype is not None, needed
        visible = torch.arange(seen + room, device=padding.device) >= padding[:, None]
        if dtype is None:
            self.whole = visible.long()
        else:
            hidden = torch.zeros(visible.shape, dtype=dtype, device=padding.device)
            self.whole = hidden.masked_fill_(~visible, torch.finfo(dtype).min)[:, None, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.whole = self.whole[rows]

    def step(self) -> Any:
        self.seen += 1
        if not self.additive:
            return self.whole[:, : self.seen]
        masks = {kind: self._reach(window) for kind, window in self.windows.items()}
        return masks.get("", masks)

    def _reach(self, window: int | None) -> torch.Tensor | None:
        if not self.needed:
            return None
        return self.whole[..., 0 if window is None else max(0, self.seen - window) : self.seen]


def joined(parts: Sequence[DynamicLayer], rows: Sequence[torch.Tensor], seen: int, room: int) -> Columns:
    """One layer's keys and values of all chunks, repeated for their copies, as columns that end together."""
    used = parts[0].keys.shape[2]

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        _, heads, _, size = tensors[0].shape
        whole = tensors[0].new_zeros(sum(map(len, rows)), heads, used + room, size)
        at = 0
        for tensor, index in zip(tensors, rows, strict=True):
            place = whole[at : at + len(index), :, used - tensor.shape[2] : used]
            place.copy_(tensor if len(index) == len(tensor) else tensor.index_select(0, index))
            at += len(index)
        return whole

    window = parts[0].sliding_window if isinstance(parts[0], DynamicSlidingWindowLayer) else None
    return Columns(join([p.keys for p in parts]), join([p.values for p in parts]), used, seen, window)
