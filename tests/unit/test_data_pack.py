"""Packing keeps or counts every token, fills at least as well as first fit, and collation keeps documents apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from hydratune.data.collate import SFTCollator
from hydratune.data.pack import STRATEGIES, best_fit, pack
from hydratune.errors import UserError


def random_rows(seed, count=300, longest=90):
    rng = np.random.default_rng(seed)
    rows, token = [], 0
    for length in rng.integers(0, longest, count).tolist():
        ids = list(
            range(token, token + length)
        )  # every token is its own, so that none can be lost or doubled unseen
        rows.append({"input_ids": ids, "labels": [i if i % 3 else -100 for i in ids]})
        token += length
    return rows


def documents(block):
    ends = np.cumsum(block["seq_lengths"])
    return [block["input_ids"][end - n : end] for n, end in zip(block["seq_lengths"], ends, strict=True)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_kept_or_counted(strategy, seed):
    rows, size = random_rows(seed), 64
    packed, report = pack(Dataset.from_list(rows), size, strategy)
    came = [token for row in rows for token in row["input_ids"]]
    kept = [token for block in packed for token in block["input_ids"]]
    assert len(set(kept)) == len(kept) == report.tokens == len(came) - report.tokens_cut
    assert set(kept) <= set(came)
    assert max(map(len, packed["input_ids"])) <= size
    for block in packed:
        assert sum(block["seq_lengths"]) == len(block["input_ids"])
        assert min(block["seq_lengths"]) > 0
        assert block["labels"] == [i if i % 3 else -100 for i in block["input_ids"]]
        for document in documents(block):
            assert any(set(document) <= set(row["input_ids"]) for row in rows), (
                "a document holds tokens of two rows"
            )
    assert report.blocks == len(packed)
    assert report.fill == pytest.approx(len(kept) / (len(packed) * size))
    if strategy == "bfd":
        expected = sorted(row["input_ids"][:size] for row in rows if row["input_ids"])
        assert sorted(d for block in packed for d in documents(block)) == expected
        assert report.truncated == sum(len(row["input_ids"]) > size for row in rows) > 0
    else:
        assert report.tokens_cut == 0
    if strategy == "wrapped":
        assert kept == came
        assert {len(ids) for ids in packed["input_ids"][:-1]} == {size}
    assert packed.to_list() == pack(Dataset.from_list(rows), size, strategy)[0].to_list()


def first_fit(lengths, size):
    rooms = []
    for length in lengths:
        for i, room in enumerate(rooms):
            if room >= length:
                rooms[i] -= length
                break
        else:
            rooms.append(size - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_no_more_than_first_fit_needs(seed):
    lengths = np.random.default_rng(seed).integers(1, 129, 400)
    order, counts = best_fit(lengths, 128)
    assert sorted(order.tolist()) == list(range(400))
    loads = np.add.reduceat(lengths[order], np.cumsum(counts) - counts)
    assert loads.max() <= 128
    assert len(counts) <= first_fit(lengths.tolist(), 128)
    assert len(counts) >= -(-lengths.sum() // 128)


def test_best_fit_takes_the_block_with_the_least_room():
    lengths = np.array([6, 7, 3, 4])
    order, counts = best_fit(lengths, 10)
    assert lengths[order].tolist() == [7, 3, 6, 4] and counts.tolist() == [2, 2]


def test_selected_and_streamed_rows_are_packed_alike():
    rows = Dataset.from_list(random_rows(1))
    some = rows.select(range(50, 150))
    packed, _ = pack(some, 64, "bfd")
    assert packed.to_list() == pack(Dataset.from_list(some.to_list()), 64, "bfd")[0].to_list()
    assert list(pack(some.to_iterable_dataset(), 64, "bfd")[0]) == packed.to_list()


def test_packing_needs_a_length_and_a_known_strategy():
    rows = Dataset.from_list(random_rows(0, 4))
    with pytest.raises(UserError, match=r"algo\.max_length"):
        pack(rows, None)
    with pytest.raises(UserError, match="bfd, bfd_split, wrapped"):
        pack(rows, 8, "ffd")


ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]


def test_padded_batch():
    batch = SFTCollator(pad_token_id=6, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 6], [8, 9, 6, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, 9, -100, -100]]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "labelled"} and batch["labelled"] == 3


@pytest.mark.parametrize("packed", [False, True])
def test_end_to_end_batch(packed):
    rows = (
        [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}] if packed else ROWS
    )
    batch = SFTCollator(pad_token_id=0, padding_free=not packed)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert "attention_mask" not in batch


def test_padding_of_an_end_to_end_batch_is_a_document_of_its_own():
    batch = SFTCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"][0, 5:].tolist() == [-100] * 3
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]


def test_two_packed_rows_lie_end_to_end():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    batch = SFTCollator(pad_token_id=0)([row, row])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 10]


def test_labels_come_from_masks_when_there_are_none():
    rows = [
        {"input_ids": [1, 2, 3, 4], "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 1, 0, 1]},
        {"input_ids": [1, 2]},
    ]
    assert SFTCollator(pad_token_id=0)(rows)["labels"].tolist() == [[-100, 2, -100, 4], [-100, 2, -100, -100]]


@pytest.mark.parametrize("lengths,rows", [((10, 9, 8), 3), ((10, 4, 3), 1), ((11, 11, 11), 1)])
def test_short_rows_with_little_padding_are_padded_all_the_same(lengths, rows):
    batch = SFTCollator(pad_token_id=0, padding_free=True, short=10)(
        [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    )
    assert len(batch["input_ids"]) == rows and ("attention_mask" in batch) == (rows > 1)
    assert batch["labelled"] == sum(lengths) - 3  # nothing predicts the first token of a row
