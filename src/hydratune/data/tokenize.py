"""Canonical rows to token ids and labels, with a count of everything that was cut or left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hydratune.data.format import columns_of
from hydratune.data.read import shorten
from hydratune.data.render import (
    RowFault,
    encode_conversations,
    encode_pairs,
    encode_texts,
    require_end_of_turn,
)
from hydratune.errors import UserError, Violation

IGNORED = -100  # label of a position that is not trained, as torch's cross-entropy has it
_REASONS = ("", "no tokens", "no trained token", "no trained token after truncation")


@dataclass(frozen=True)
class TokenizeOptions:
    """How rows become tokens; the fields of `SFTConfig` with the same names.

    Attributes:
        max_length: longest row in tokens; None for no limit.
        truncation_mode: end of an over-long row that is kept: "keep_start" or "keep_end".
        completion_only_loss: None means yes for prompt–completion rows.
        eos_token: ends texts and plain completions; None: the tokenizer's.
        num_proc: processes; None or 1 for this one.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    eos_token: str | None = None
    num_proc: int | None = None


@dataclass
class DataReport:
    """What became of the rows: counts of rows and tokens. `fill` is the share of packed positions that hold a token.

    `boundary_shifts` counts rows whose prompt tokens do not begin the whole row's tokens (merges across the boundary);
    `desirable` those of labelled rows. `warnings` say what may be wrong with the rows.
    """

    rows_in: int = 0
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    boundary_shifts: int = 0
    tokens_cut: int = 0
    blocks: int | None = None
    fill: float | None = None
    desirable: int | None = None
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for the plan, a line for each fact."""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        trained = (
            f", {self.trained_tokens:,} of them trained ({share:.0%})"
            if self.trained_tokens
            else " of prompts"
        )
        out = [
            f"{self.rows:,} of {self.rows_in:,} rows kept"
            + "".join(f", {count:,} dropped: {reason}" for reason, count in self.dropped.items()),
            f"{self.tokens:,} tokens{trained}, longest row {self.longest:,}",
        ]
        if self.truncated:
            out.append(f"{self.truncated:,} rows truncated, {self.tokens_cut:,} tokens cut off")
        if self.boundary_shifts:
            out.append(
                f"{self.boundary_shifts:,} rows whose prompt tokens change when the completion follows"
            )
        if self.desirable is not None:
            out.append(f"{self.desirable:,} desirable, {self.rows - self.desirable:,} undesirable")
        if self.blocks is not None:
            out.append(f"{self.blocks:,} packed blocks, {self.fill or 0.0:.1%} full")
        return out

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; `DataReport(**d)` gives the report back."""
        return asdict(self)


def tokenize(
    dataset: Any, tokenizer: Any, options: TokenizeOptions, *, where: str, truncate: bool = True
) -> tuple[Any, DataReport]:
    """Token ids and labels of canonical rows (see `format_rows`).

    Args:
        dataset: `datasets.Dataset`, or `IterableDataset` (mapped and filtered lazily; its report holds no counts).
        truncate: cut rows to `options.max_length`.

    Returns:
        A data set with `input_ids` and `labels` (unshifted, -100 outside the loss), and the report.

    Raises:
        UserError: a loss option that the rows do not allow, a template that cannot give the masks, no row left.
    """
    names = columns_of(dataset)
    sample = next(iter(dataset), None)
    if sample is None:
        raise UserError(Violation(where, None, "has no row", "give at least one row"))
    _check(names, sample, tokenizer, options, where)

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return _batch(batch, indices, tokenizer, options, where, truncate)

    integers = datasets.List(datasets.Value("int32"))
    counts = {name: datasets.Value("int32") for name in ("length", "trained", "reason", "shift")}
    features = datasets.Features({"input_ids": integers, "labels": integers, **counts})
    if not isinstance(dataset, datasets.Dataset):
        mapped = dataset.map(
            convert, batched=True, batch_size=100, with_indices=True, remove_columns=names, features=features
        )
        kept = mapped.filter(lambda row: row["reason"] == 0)
        return kept.remove_columns(list(counts)), DataReport()
    mapped = dataset.with_format(None).map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=names,
        features=features,
        num_proc=options.num_proc if options.num_proc and options.num_proc > 1 else None,
        load_from_cache_file=False,
        new_fingerprint=f"{dataset._fingerprint[:16]}tokenized",
        desc=f"Tokenising {where}",
    )
    return _finish(mapped, list(counts), where)


def _finish(mapped: datasets.Dataset, counts: list[str], where: str) -> tuple[datasets.Dataset, DataReport]:
    table = mapped.with_format("arrow")[:]
    length, trained, reason, shift = (table[name].to_numpy() for name in counts)
    kept = reason == 0
    sizes = pa.compute.list_value_length(table["input_ids"]).to_numpy()
    report = DataReport(
        rows_in=len(reason),
        rows=int(kept.sum()),
        dropped={_REASONS[r]: int((reason == r).sum()) for r in np.unique(reason) if r},
        truncated=int((sizes < length)[kept].sum()),
        tokens=int(sizes[kept].sum()),
        trained_tokens=int(trained[kept].sum()),
        longest=int(sizes[kept].max(initial=0)),
        boundary_shifts=int(shift[kept].sum()),
        tokens_cut=int((length - sizes)[kept].sum()),
    )
    if not report.rows:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in report.dropped.items())
        fix = "raise max_length, set truncation_mode=keep_end, or train more than completions"
        raise UserError(Violation(where, None, f"no row is left to train on ({reasons})", fix))
    data = mapped.remove_columns(counts)
    return (data if kept.all() else data.select(np.flatnonzero(kept))), report


def _check(
    names: list[str], sample: dict[str, Any], tokenizer: Any, options: TokenizeOptions, where: str
) -> None:
    wrong = []
    pairs = "prompt" in names and "completion" in names
    conversations = "messages" in names or (pairs and isinstance(sample["prompt"], list))
    if options.completion_only_loss and not (pairs or {"completion_mask", "labels"} & set(names)):
        wrong.append(
            Violation(
                "algo.completion_only_loss",
                True,
                f"the rows of {where} have no prompt and completion, so every token would be trained",
                "give prompt/completion rows (or return them from formatting_func), or drop the flag",
            )
        )
    if options.assistant_only_loss and not (conversations or {"assistant_masks", "labels"} & set(names)):
        wrong.append(
            Violation(
                "algo.assistant_only_loss",
                True,
                f"the rows of {where} are not conversations, so there are no assistant's turns",
                "give messages, or drop the flag",
            )
        )
    if conversations and not tokenizer.chat_template:
        wrong.append(
            Violation(
                "model.chat_template_path",
                None,
                f"the rows of {where} are conversations and the tokenizer has no chat template",
                "name a .jinja file or a tokenizer that has one",
            )
        )
    if options.max_length is not None and options.max_length < 2:
        wrong.append(
            Violation(
                "algo.max_length", options.max_length, "leaves no token to predict", "give 2 or more, or null"
            )
        )
    if options.truncation_mode not in ("keep_start", "keep_end"):
        wrong.append(
            Violation(
                "algo.truncation_mode", options.truncation_mode, "is not a mode", "keep_start or keep_end"
            )
        )
    if wrong:
        raise UserError(wrong)
    if conversations and options.assistant_only_loss:
        require_end_of_turn(tokenizer)


def _batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: Any,
    options: TokenizeOptions,
    where: str,
    truncate: bool,
) -> dict[str, list[Any]]:
    faults: list[RowFault] = []
    encoded = list(_encode(batch, tokenizer, options, faults))
    if faults:
        raise shorten(
            [
                Violation(f"{where} row {indices[f.row] + 1}, column {f.column}", None, f.why, f.fix)
                for f in faults
            ],
            where,
        )
    limit = options.max_length if truncate else None
    out: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "length", "trained", "reason", "shift")
    }
    for ids, labels, shift in encoded:
        length, cut = len(ids), slice(None)
        if limit is not None:
            cut = slice(None, limit) if options.truncation_mode == "keep_start" else slice(-limit, None)
        whole = labels
        ids, labels = ids[cut], labels[cut]
        trained = int(
            np.count_nonzero(labels[1:] != IGNORED)
        )  # the first token of a row has nothing before it
        reason = 0
        if not trained:
            reason = 1 if length < 1 else 3 if np.any(whole[1:] != IGNORED) else 2
        row = (ids, labels, length, trained, reason, int(shift))
        for name, value in zip(out, row, strict=True):
            out[name].append(value)
    return out


def _encode(
    batch: dict[str, list[Any]], tokenizer: Any, options: TokenizeOptions, faults: list[RowFault]
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Ids, labels and whether the prompt's tokens changed, of each row."""
    eos = options.eos_token or tokenizer.eos_token or ""
    if "input_ids" in batch:
        yield from _given(batch, tokenizer, options, faults)
    elif "prompt" in batch:
        only = options.completion_only_loss is not False
        yield from encode_pairs(batch, tokenizer, eos, only, options.assistant_only_loss, faults)
    elif "messages" in batch:
        yield from encode_conversations(batch, tokenizer, options.assistant_only_loss, faults)
    else:
        yield from encode_texts(batch[options.dataset_text_field], tokenizer, eos)


def _given(
    batch: dict[str, list[Any]], tokenizer: Any, options: TokenizeOptions, faults: list[RowFault]
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    masks = [n for n in ("completion_mask", "assistant_masks") if n in batch]
    if options.completion_only_loss is False and "completion_mask" in masks:
        masks.remove("completion_mask")
    for i, row in enumerate(batch["input_ids"]):
        ids = np.asarray(row, dtype=np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
            why = f"holds the token id {ids.max() if ids.min() >= 0 else ids.min()}; the vocabulary has {len(tokenizer)}"
            faults.append(RowFault(i, "input_ids", why, "tokenise with the model's own tokenizer"))
        if "labels" in batch and batch["labels"][i] is not None:
            labels = np.asarray(batch["labels"][i], dtype=np.int32)
        else:
            labels = ids.copy()
            for name in masks:
                if batch[name][i] is not None:
                    labels[np.asarray(batch[name][i]) == 0] = IGNORED
        yield ids, labels, False


def render_example(row: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a tokenised row in runs, each with whether it is trained, e.g. [("What is 2+2?", False), ("4", True)]."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    trained = labels != IGNORED
    edges = np.flatnonzero(np.diff(trained)) + 1
    return [
        (tokenizer.decode(run, clean_up_tokenization_spaces=False), bool(mask[0]))
        for run, mask in zip(np.split(ids, edges), np.split(trained, edges), strict=True)
        if len(run)
    ]
