"""Tokenised rows to a batch: padded, or laid end to end with the documents' boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORED = -100
_FILLED = 0.8  # of a padded batch, from which on short rows are padded


@dataclass
class SFTCollator:
    """Rows of `input_ids` (and `labels`, or masks to make them from) to tensors.

    Padded rows give `input_ids`, `attention_mask`, `labels`, int64 [B, T]. Packed rows (with `seq_lengths`), or any rows
    with `padding_free`, give `input_ids`, `position_ids`, `labels`, int64 [1, T], with `cu_seq_lens_q`, `cu_seq_lens_k`,
    int32 [documents + 1], and `max_length_q`, `max_length_k`, ints. Both have `labelled`, an int: how many labels are trained
    on, so that none of them need be counted on a GPU, which would be waited for. Labels are unshifted, -100 outside the loss, on
    padding, and on the first token of each document, which nothing predicts.

    Attributes:
        pad_token_id: fills up; never trained.
        padding_free: lay rows end to end though they are not packed.
        short: rows of at most so many tokens are padded all the same, where little is: attention to each costs more.
        pad_to_multiple_of: round T up; in the end-to-end form the padding is a document of its own.
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    short: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [_tensor(row["input_ids"]) for row in features]
        labels = [_labels(row, tokens) for row, tokens in zip(features, ids, strict=True)]
        if "seq_lengths" in features[0] or (self.padding_free and not self._pads_little(ids)):
            lengths = [
                _tensor(row["seq_lengths"]) if "seq_lengths" in row else torch.tensor([len(tokens)])
                for row, tokens in zip(features, ids, strict=True)
            ]
            return self._end_to_end(torch.cat(ids), torch.cat(labels), torch.cat(lengths))
        return self._padded(ids, labels)

    def _pads_little(self, ids: list[torch.Tensor]) -> bool:
        lengths = [len(tokens) for tokens in ids]
        longest = max(lengths)
        return longest <= self.short and sum(lengths) >= _FILLED * longest * len(lengths)

    def _missing(self, length: int) -> int:
        return -length % self.pad_to_multiple_of if self.pad_to_multiple_of else 0

    def _padded(self, ids: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, Any]:
        lengths = torch.tensor([len(tokens) for tokens in ids])
        width = int(lengths.max())
        width += self._missing(width)
        shape = (len(ids), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": (torch.arange(width) < lengths[:, None]).to(torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for i, (tokens, targets) in enumerate(zip(ids, labels, strict=True)):
            batch["input_ids"][i, : len(tokens)] = tokens
            batch["labels"][i, : len(tokens)] = targets
        batch["labels"][:, 0] = IGNORED
        return batch | {"labelled": _count(batch["labels"])}

    def _end_to_end(self, ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
        if missing := self._missing(len(ids)):
            ids = torch.cat([ids, ids.new_full((missing,), self.pad_token_id)])
            labels = torch.cat([labels, labels.new_full((missing,), IGNORED)])
            lengths = torch.cat([lengths, lengths.new_tensor([missing])])
        lengths = lengths[lengths > 0]
        ends = lengths.cumsum(0)
        starts = ends - lengths
        labels = labels.clone()
        labels[starts] = IGNORED
        boundaries = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        longest = int(lengths.max())
        return {
            "input_ids": ids[None],
            "position_ids": (torch.arange(len(ids)) - starts.repeat_interleave(lengths))[None],
            "labels": labels[None],
            "labelled": _count(labels),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _count(labels: torch.Tensor) -> int:
    return int((labels != IGNORED).sum())


def _tensor(values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.to(torch.int64)
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


def _labels(row: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    if row.get("labels") is not None:
        return _tensor(row["labels"])
    labels = ids.clone()
    for name in ("completion_mask", "assistant_masks"):
        if row.get(name) is not None:
            labels[_tensor(row[name]) == 0] = IGNORED
    return labels
