"""Several rows in one block of `max_length` tokens, by a best fit over all rows, with the documents' lengths kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hydratune.errors import UserError, Violation

STRATEGIES = ("bfd", "bfd_split", "wrapped")
_GATHER = 1 << 24  # tokens moved at a time, which bounds the index array to 128 MiB
_INT32_MAX = 2**31 - 1


@dataclass
class PackReport:
    """Rows and tokens that came in, tokens cut from over-long rows, and the share of the blocks' places that are used."""

    rows: int = 0
    documents: int = 0
    blocks: int = 0
    tokens: int = 0
    tokens_cut: int = 0
    truncated: int = 0
    fill: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pack(dataset: Any, max_length: int | None, strategy: str = "bfd") -> tuple[Any, PackReport]:
    """Blocks of at most `max_length` tokens.

    `bfd` is best fit decreasing over the whole data set, over-long rows truncated at their end; `bfd_split` splits them
    into documents instead; `wrapped` cuts one stream into full blocks. A document never sees another one: positions
    restart at each, by `seq_lengths`. The same rows always give the same blocks. Empty rows are left out.

    Args:
        dataset: rows with `input_ids` and `labels`; a stream is packed in windows of 4096 rows, with an empty report.

    Returns:
        A data set of `input_ids` and `labels` [tokens], `seq_lengths` [documents]; and the report.

    Raises:
        UserError: an unknown strategy, or no `max_length`.
    """
    if strategy not in STRATEGIES:
        raise UserError(
            Violation(
                "algo.packing_strategy", strategy, "is not a strategy", "one of " + ", ".join(STRATEGIES)
            )
        )
    if max_length is None or max_length < 2:
        raise UserError(
            Violation("algo.max_length", max_length, "packing needs the length of a block", "give 2 or more")
        )
    if not isinstance(dataset, datasets.Dataset):
        return _stream(dataset, max_length, strategy), PackReport()
    table = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")[:]
    ids, labels, lengths = _flat(table["input_ids"]), _flat(table["labels"]), _lengths(table["input_ids"])
    packed, report = _pack(ids, labels, lengths, max_length, strategy)
    return datasets.Dataset(pa.table(packed)), report


def _stream(dataset: Any, max_length: int, strategy: str) -> Any:
    def window(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        lengths = np.fromiter(map(len, batch["input_ids"]), dtype=np.int64)
        ids, labels = (
            np.concatenate([np.asarray(r, dtype=np.int32) for r in batch[n]]) for n in ("input_ids", "labels")
        )
        packed, _ = _pack(ids, labels, lengths, max_length, strategy)
        return {name: column.to_pylist() for name, column in packed.items()}

    integers = datasets.List(datasets.Value("int32"))
    features = datasets.Features(dict.fromkeys(("input_ids", "labels", "seq_lengths"), integers))
    columns = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(window, batched=True, batch_size=4096, remove_columns=columns, features=features)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.empty(0, dtype=np.int32)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _pack(
    ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, max_length: int, strategy: str
) -> tuple[dict[str, pa.Array], PackReport]:
    starts = np.cumsum(lengths) - lengths
    report = PackReport(rows=len(lengths))
    if strategy == "bfd":
        over = lengths > max_length
        report.truncated, report.tokens_cut = int(over.sum()), int((lengths[over] - max_length).sum())
        lengths = np.minimum(lengths, max_length)
    elif strategy == "bfd_split":
        starts, lengths = _split(starts, lengths, max_length)
    used = lengths > 0
    starts, lengths = starts[used], lengths[used]
    if strategy == "wrapped":
        starts, lengths, block_docs = _wrap(starts, lengths, max_length)
    else:
        order, block_docs = best_fit(lengths, max_length)
        starts, lengths = starts[order], lengths[order]
    doc_ends = np.concatenate([[0], np.cumsum(block_docs)])
    token_ends = np.concatenate([[0], np.cumsum(lengths)])[doc_ends]
    report.documents, report.blocks, report.tokens = len(lengths), len(block_docs), int(lengths.sum())
    report.fill = report.tokens / (report.blocks * max_length) if report.blocks else 0.0
    packed = {
        "input_ids": _lists(token_ends, _gather(ids, starts, lengths)),
        "labels": _lists(token_ends, _gather(labels, starts, lengths)),
        "seq_lengths": _lists(doc_ends, lengths.astype(np.int32)),
    }
    return packed, report


def _split(starts: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most `size`: starts and lengths of each, in order."""
    pieces = -(-lengths // size)
    row = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return starts[row] + nth * size, np.minimum(size, lengths[row] - nth * size)


def _wrap(starts: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut where a block of the stream ends: their starts and lengths, and how many lie in each block."""
    total = int(lengths.sum())
    begins = np.cumsum(lengths) - lengths
    edges = np.union1d(begins, np.arange(0, total, size))
    row = np.searchsorted(begins, edges, side="right") - 1
    return starts[row] + edges - begins[row], np.diff(np.append(edges, total)), np.bincount(edges // size)


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: each row, longest first, into the open block with the least room that still takes it.

    The blocks with the same room wait in one list, and an integer's bits say which rooms exist, so that the least room
    that is large enough is one shift and one lowest-bit away.

    Args:
        lengths: int64 [rows], 1 to `size` each.

    Returns:
        Row indices in the order they lie in the blocks, and the number of rows in each block.
    """
    rooms: dict[int, list[int]] = {}
    open_rooms = 0
    block_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    blocks = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = rooms[room]
            block = waiting.pop()
            if not waiting:
                open_rooms ^= 1 << room
        else:
            room, block = size, blocks
            blocks += 1
        block_of[row] = block
        if left := room - length:
            waiting = rooms.setdefault(left, [])
            if not waiting:
                open_rooms |= 1 << left
            waiting.append(block)
    placed = order[np.argsort(block_of[order], kind="stable")]
    return placed, np.bincount(block_of, minlength=blocks)


def _gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The runs `values[start : start + length]` end to end, in pieces that bound the memory of the index."""
    out = np.empty(int(lengths.sum()), dtype=values.dtype)
    ends = np.cumsum(lengths)
    first, done = 0, 0
    while first < len(lengths):
        last = max(int(np.searchsorted(ends, done + _GATHER, side="right")), first + 1)
        some = lengths[first:last]
        shift = starts[first:last] - (ends[first:last] - some - done)
        index = np.repeat(shift, some) + np.arange(int(some.sum()))
        out[done : done + len(index)] = values[index]
        first, done = last, done + len(index)
    return out


def _lists(ends: np.ndarray, values: np.ndarray) -> pa.Array:
    if len(values) > _INT32_MAX:
        return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(values))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values))
