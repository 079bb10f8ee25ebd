"""Prompts to token ids, counted."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from hydratune.data.read import shorten
from hydratune.data.render import RowFault, encode_prompts
from hydratune.data.tokenize import DataReport
from hydratune.errors import UserError, Violation


def tokenize_prompts(
    dataset: datasets.Dataset, tokenizer: Any, *, max_prompt_length: int | None, where: str
) -> tuple[datasets.Dataset, DataReport]:
    """Rows with `prompt_ids` beside their other columns; conversations end where the assistant's turn begins.

    Args:
        dataset: rows of `prompt_row`.
        max_prompt_length: in tokens; longer prompts are left out and counted.

    Raises:
        UserError: a template that cannot render the rows, ids that are no tokens, or no row left.
    """
    sample = dataset[0]
    if isinstance(sample.get("prompt"), list) and not tokenizer.chat_template:
        why = f"the rows of {where} are conversations and the tokenizer has no chat template"
        fix = "name a .jinja file or a tokenizer that has one"
        raise UserError(Violation("model.chat_template_path", None, why, fix))

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        faults: list[RowFault] = []
        if "prompt_ids" in batch:
            size = len(tokenizer)
            ids = batch["prompt_ids"]
            for i, row in enumerate(ids):
                if not 0 <= min(row) <= max(row) < size:
                    why = f"holds a token id that is none; the vocabulary has {size}"
                    faults.append(RowFault(i, "prompt_ids", why, "tokenise with the model's own tokenizer"))
        else:
            ids = encode_prompts(batch, tokenizer, faults)
        if faults:
            told = [(f"{where} row {indices[f.row] + 1}, column {f.column}", f.why, f.fix) for f in faults]
            raise shorten([Violation(key, None, why, fix) for key, why, fix in told], where)
        return {"prompt_ids": ids}

    integers = datasets.List(datasets.Value("int32"))
    made = dataset.with_format(None).map(
        convert,
        batched=True,
        with_indices=True,
        features=datasets.Features({**dataset.features, "prompt_ids": integers}),
        load_from_cache_file=False,
        new_fingerprint=f"{dataset._fingerprint[:16]}prompts",
        desc=f"Tokenising {where}",
    )
    lengths = np.asarray([len(ids) for ids in made["prompt_ids"]])
    over = lengths > (max_prompt_length or lengths.max())
    kept = (lengths > 0) & ~over
    report = DataReport(
        rows_in=len(lengths),
        rows=int(kept.sum()),
        dropped={
            name: int(count.sum())
            for name, count in (("no token", lengths == 0), ("longer than max_prompt_length", over))
            if count.any()
        },
        tokens=int(lengths[kept].sum()),
        longest=int(lengths[kept].max(initial=0)),
    )
    if not report.rows:
        why = "no prompt is left: " + ", ".join(f"{n} with {reason}" for reason, n in report.dropped.items())
        raise UserError(Violation(where, None, why, "raise algo.max_prompt_length, or give shorter prompts"))
    return (made if kept.all() else made.select(np.flatnonzero(kept))), report
