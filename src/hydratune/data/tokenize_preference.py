"""Canonical preference rows to token ids: a prompt with its completions, cut and counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hydratune.data.format import columns_of
from hydratune.data.read import shorten
from hydratune.data.render import RowFault, encode_branches
from hydratune.data.tokenize import DataReport
from hydratune.errors import UserError, Violation

COMPLETIONS = {"preference": ("chosen", "rejected"), "unpaired": ("completion",)}
_REASONS = (
    "",
    "no token",
    "no completion after truncation",
    "longer than max_length",
    "chosen equals rejected",
)


@dataclass(frozen=True)
class PreferenceOptions:
    """How rows become tokens; lengths in tokens, None for no limit.

    Attributes:
        goal: "preference" or "unpaired".
        max_length: of prompt and completion.
        max_prompt_length, max_completion_length: of each; a prompt is cut as `truncation_mode` says, a completion at
            its end.
        truncation_mode: "keep_start" cuts the completion's end, "keep_end" the prompt's start.
        drop_long: leave rows over `max_length` out instead of cutting them.
        eos_token: ends plain completions; None: the tokenizer's.
    """

    goal: str
    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"
    drop_long: bool = False
    eos_token: str | None = None
    num_proc: int | None = None


def tokenize_preference(
    dataset: Any, tokenizer: Any, options: PreferenceOptions, *, where: str
) -> tuple[Any, DataReport]:
    """`prompt_ids` with `chosen_ids` and `rejected_ids` (and `margin`), or with `completion_ids` and `label`.

    Args:
        dataset: canonical rows of `options.goal` (see `preference.py`), or rows that hold these columns already.

    Returns:
        The data set, and what became of the rows; a stream's report holds no counts.

    Raises:
        UserError: a template that cannot render the rows, or no row left.
    """
    names = columns_of(dataset)
    sample = next(iter(dataset))
    if isinstance(sample.get("prompt"), list) and not tokenizer.chat_template:
        why = f"the rows of {where} are conversations and the tokenizer has no chat template"
        fix = "name a .jinja file or a tokenizer that has one"
        raise UserError(Violation("model.chat_template_path", None, why, fix))

    expected: list[str] = [n for n in ("kl_completion_ids", "margin") if n in names]

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return _batch(batch, indices, tokenizer, options, where, expected)

    integers = datasets.List(datasets.Value("int32"))
    ids = [f"{name}_ids" for name in ("prompt", *COMPLETIONS[options.goal])]
    kept = dict.fromkeys([*ids, *(n for n in ("kl_completion_ids",) if n in names)], integers)
    if options.goal == "unpaired":
        kept["label"] = datasets.Value("bool")
    elif "margin" in names:
        kept["margin"] = datasets.Value("float32")
    counts = {
        name: datasets.Value("int32") for name in ("tokens", "trained", "longest", "cut", "reason", "shift")
    }
    mapping = {
        "batched": True, "with_indices": True, "remove_columns": names, "features": datasets.Features(kept | counts)
    }  # fmt: skip
    if not isinstance(dataset, datasets.Dataset):
        mapped = dataset.map(convert, batch_size=100, **mapping).filter(lambda row: row["reason"] == 0)
        return mapped.remove_columns(list(counts)), DataReport()
    mapped = dataset.with_format(None).map(
        convert,
        num_proc=options.num_proc if options.num_proc and options.num_proc > 1 else None,
        load_from_cache_file=False,
        new_fingerprint=f"{dataset._fingerprint[:16]}preference",
        desc=f"Tokenising {where}",
        **mapping,
    )
    return _finish(mapped, list(counts), where)


def _finish(mapped: datasets.Dataset, counts: list[str], where: str) -> tuple[datasets.Dataset, DataReport]:
    table = mapped.with_format("arrow")[:]
    tokens, trained, longest, cut, reason, shift = (table[name].to_numpy() for name in counts)
    kept = reason == 0
    report = DataReport(
        rows_in=len(reason),
        rows=int(kept.sum()),
        dropped={_REASONS[r]: int((reason == r).sum()) for r in np.unique(reason) if r},
        truncated=int((cut > 0)[kept].sum()),
        tokens=int(tokens[kept].sum()),
        trained_tokens=int(trained[kept].sum()),
        longest=int(longest[kept].max(initial=0)),
        boundary_shifts=int(shift[kept].sum()),
        tokens_cut=int(cut[kept].sum()),
    )
    if not report.rows:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in report.dropped.items())
        fix = "raise algo.max_length, or give rows with completions that fit it"
        raise UserError(Violation(where, None, f"no row is left to train on ({reasons})", fix))
    data = mapped.remove_columns(counts)
    data = data if kept.all() else data.select(np.flatnonzero(kept))
    if "label" in data.column_names:
        report.desirable = int(np.sum(data.with_format("arrow")["label"].to_numpy()))
    return data, report


def _batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: Any,
    options: PreferenceOptions,
    where: str,
    expected: list[str],
) -> dict[str, list[Any]]:
    names = COMPLETIONS[options.goal]
    faults: list[RowFault] = []
    if "prompt_ids" in batch:
        rows = [
            ([np.asarray(batch[f"{name}_ids"][i], dtype=np.int32) for name in ("prompt", *names)], False)
            for i in range(len(indices))
        ]
        _check_vocabulary(rows, len(tokenizer), faults, "prompt_ids")
    else:
        eos = options.eos_token or tokenizer.eos_token or ""
        rows = [
            ([wholes[0][0][:start], *(ids[start:] for ids, _ in wholes)], shifted)
            for start, wholes, shifted in encode_branches(batch, names, tokenizer, eos, faults)
        ]
    if others := batch.get("kl_completion_ids"):
        given = [([np.asarray(ids or [], dtype=np.int32)], False) for ids in others]
        _check_vocabulary(given, len(tokenizer), faults, "kl_completion_ids")
    for name in expected:
        missing = [i for i, value in enumerate(batch.get(name) or [None] * len(indices)) if value is None]
        fix = "give 0 where there is none" if name == "margin" else "give it in every row, or in none"
        faults += [RowFault(i, name, "is empty, and other rows have one", fix) for i in missing]
    if "margin" not in expected:  # of a stream, whose columns are those of its first rows
        late = [i for i, value in enumerate(batch.get("margin") or []) if value is not None]
        fix = "give it from the first row on, 0 where there is none"
        faults += [RowFault(i, "margin", "has one, and the first rows have none", fix) for i in late]
    if faults:
        raise shorten(
            [
                Violation(f"{where} row {indices[f.row] + 1}, column {f.column}", None, f.why, f.fix)
                for f in faults
            ],
            where,
        )
    out: dict[str, list[Any]] = {f"{name}_ids": [] for name in ("prompt", *names)}
    out |= {name: [] for name in ("tokens", "trained", "longest", "cut", "reason", "shift")}
    out |= {name: batch[name] for name in ("kl_completion_ids", "label", "margin") if name in batch}
    for (prompt, *completions), shifted in rows:
        before = len(completions) * len(prompt) + sum(map(len, completions))
        longest = len(prompt) + max(map(len, completions))
        same = len(completions) == 2 and np.array_equal(completions[0], completions[1])
        over = options.max_length is not None and longest > options.max_length
        if not (options.drop_long and over):
            prompt, completions = cut_row(prompt, completions, options)
        tokens = len(completions) * len(prompt) + sum(map(len, completions))
        trained = sum(len(c) if len(prompt) else len(c) - 1 for c in completions)
        if before == 0:
            reason = 1
        elif options.drop_long and over:
            reason = 3
        elif same:
            reason = 4
        else:
            # without a prompt nothing predicts a completion's first token
            reason = 2 if min(map(len, completions)) < (1 if len(prompt) else 2) else 0
        values = (prompt, *completions, tokens, trained, len(prompt) + max(map(len, completions)), before - tokens,
                  reason, int(shifted))  # fmt: skip
        for name, value in zip(out, values, strict=False):
            out[name].append(value)
    return out


def cut_row(
    prompt: np.ndarray, completions: list[np.ndarray], options: PreferenceOptions
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A prompt and its completions within the limits; all keep the same prompt."""
    start = options.truncation_mode == "keep_start"
    if (most := options.max_prompt_length) is not None:
        prompt = prompt[:most] if start else prompt[max(0, len(prompt) - most) :]
    if (most := options.max_completion_length) is not None:
        completions = [c[:most] for c in completions]
    if (most := options.max_length) is not None:
        if not start:
            room = max(most - max(map(len, completions)), min(1, most - 1))
            prompt = prompt[max(0, len(prompt) - room) :]
        prompt = prompt[:most]
        completions = [c[: most - len(prompt)] for c in completions]
    return prompt, completions


def _check_vocabulary(rows: list[Any], size: int, faults: list[RowFault], column: str) -> None:
    for i, (parts, _) in enumerate(rows):
        ids = np.concatenate(parts)
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            why = (
                f"holds the token id {ids.max() if ids.min() >= 0 else ids.min()}; the vocabulary has {size}"
            )
            faults.append(RowFault(i, column, why, "tokenise with the model's own tokenizer"))


def render_preference(row: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """A row's text in runs, each with whether it is judged: the prompt, then each completion after its name."""
    runs = [(tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False), False)]
    for name in ("chosen", "rejected", "completion"):
        if f"{name}_ids" in row:
            title = name if "label" not in row else "desirable" if row["label"] else "undesirable"
            runs.append((f"\n[{title}] ", False))
            runs.append((tokenizer.decode(row[f"{name}_ids"], clean_up_tokenization_spaces=False), True))
    return runs
