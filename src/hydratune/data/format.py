"""Any row shape to one of a few, which depend on what the algorithm trains on; every row's shape is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets

from hydratune.data import prompts
from hydratune.data.builtin import verifiable
from hydratune.data.preference import FORMS, misfit, pair_row, tokenized_row, unpaired_rows
from hydratune.data.read import ORIGIN, shorten
from hydratune.data.shapes import Faults, alpaca_of, messages_of, pair_of, text_of, token_row, with_system
from hydratune.data.table import as_json_text, to_dataset
from hydratune.errors import UserError, Violation, nearest
from hydratune.functions import resolve
from hydratune.settings import DataSettings

NEEDS = {
    "tokenized": ("input_ids",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_SAME_ALL_OVER = ("messages", "prompt", "completion", "chosen", "input_ids", "prompt_ids")
_EXTRAS = ("tools", "chat_template_kwargs")
_BATCH = 1000


def columns_of(dataset: Any) -> list[str]:
    """Column names; of a stream without known features, those of its first row."""
    names = dataset.column_names
    if names is None:
        names = list(next(iter(dataset), {}))
    return list(names)


def format_rows(
    dataset: Any,
    settings: DataSettings,
    *,
    where: str,
    text_field: str = "text",
    formatting_func: Callable[[dict[str, Any]], Any] | None = None,
    goal: str = "tokens",
) -> Any:
    """Rows in canonical columns, and no others.

    To train on tokens, the columns are `messages`; or `prompt` and `completion` (both text, or both lists of messages);
    or `text_field`; or `input_ids` with `labels`, `completion_mask`, `assistant_masks` where given. For the goals
    "preference" and "unpaired" see `preference.py`, for "prompts" `prompts.py`. `tools` (JSON text) may stand beside, and
    `answer`, a whole number that completions can be verified against.

    Args:
        dataset: `datasets.Dataset` or `IterableDataset` (formatted and checked lazily).
        where: name of the data in messages, e.g. "train"; rows of local files are named by file and line instead.
        goal: what the algorithm trains on: "tokens", "preference", "unpaired" or "prompts".
        formatting_func: from a row to text, messages or {prompt, completion}; before `settings.formatting_func`.

    Raises:
        UserError: columns that fit no format, or the first ten rows with a wrong shape and a count of the others.
    """
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        fix = "apply the transform with Dataset.map first, or pass dataset_kwargs={'skip_prepare_dataset': True}"
        raise UserError(
            Violation(
                where, None, "has a transform (with_transform), which would be frozen by preparing", fix
            )
        )
    function = formatting_func or (resolve(settings.formatting_func) if settings.formatting_func else None)
    names = [name for name in columns_of(dataset) if name != ORIGIN]
    if not names or (isinstance(dataset, datasets.Dataset) and not len(dataset)):
        raise UserError(Violation(where, None, "has no row", "give at least one row"))
    forms = {**FORMS, "prompts": prompts.FORMS}.get(goal) or {**NEEDS, "text": (text_field,)}
    kind = "function" if function else _find_format(names, settings, where, goal, forms)

    def convert(batch: Mapping[str, list[Any]], first: int, faults: Faults) -> list[dict[str, Any]]:
        rows = []
        for offset in range(len(next(iter(batch.values())))):
            row = {name: batch[name][offset] for name in batch}
            faults.where = row.pop(ORIGIN, None) or f"{where} row {first + offset + 1}"
            before = len(faults)
            canonical = _convert(row, kind, settings, text_field, function, goal, forms, faults)
            if len(faults) == before:
                rows.extend(canonical)
        return rows

    if not isinstance(dataset, datasets.Dataset):
        return _lazily(dataset, convert, where)

    faults, rows, first = Faults(), [], 0
    plain = dataset.with_format(None)
    for batch in plain.iter(batch_size=_BATCH):
        rows.extend(convert(batch, first, faults))
        first += _BATCH
    if faults:
        raise shorten(faults, where)
    told_by = {*_SAME_ALL_OVER, text_field}
    shapes = {tuple(sorted(_kind_of(row, n) for n in set(row) & told_by)) for row in rows}
    if len(shapes) > 1:
        why = f"the rows are of several formats: {', '.join(sorted('+'.join(s) for s in shapes))}"
        raise UserError(Violation(where, None, why, "return the same shape for every row"))
    return to_dataset(rows)


def _kind_of(row: dict[str, Any], name: str) -> str:
    """A column's name, and whether it holds messages, which may differ from row to row for these alone."""
    turns = name in ("prompt", "completion", "chosen") and isinstance(row[name], list)
    return f"{name} (messages)" if turns else name


def _lazily(dataset: Any, convert: Callable[..., list[dict[str, Any]]], where: str) -> Any:
    def batched(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        faults = Faults()
        rows = convert(batch, indices[0], faults)
        if faults:
            raise shorten(faults, where)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name) for row in rows] for name in names}

    return dataset.map(
        batched, batched=True, batch_size=100, with_indices=True, remove_columns=columns_of(dataset)
    )


def _find_format(
    names: list[str], settings: DataSettings, where: str, goal: str, needs: Mapping[str, tuple[str, ...]]
) -> str:
    wrong = [
        Violation(
            "data.columns", f"{ours}: {theirs}", f"{where} has no column '{theirs}'", nearest(theirs, names)
        )
        for ours, theirs in settings.columns.items()
        if theirs not in names
    ]
    if wrong:
        raise UserError(wrong)
    have = set(names) | set(settings.columns)
    fitting = [kind for kind, columns in needs.items() if have.issuperset(columns)]
    if settings.format == "auto" and fitting:
        return fitting[0]
    if settings.format in fitting:
        return settings.format
    if settings.format == "sharegpt" and "messages" in have:
        return "messages"
    wanted = "; ".join(f"{kind} needs {' and '.join(columns)}" for kind, columns in needs.items())
    fix = "map yours, e.g. data.columns={prompt: question, completion: answer}; " + wanted
    if goal in FORMS:
        fix = misfit(goal, [*have])
    elif {"chosen", "rejected"} <= have:
        fix = "these are preference pairs; to train on the chosen answers: data.columns={completion: chosen}"
    raise UserError(
        Violation(
            "data.format",
            settings.format,
            f"the columns of {where} do not fit (found: {', '.join(names)})",
            fix,
        )
    )


def _convert(
    row: dict[str, Any],
    kind: str,
    settings: DataSettings,
    text_field: str,
    function: Any,
    goal: str,
    forms: Mapping[str, tuple[str, ...]],
    faults: Faults,
) -> list[dict[str, Any]]:
    row = {**row, **{ours: row.get(theirs) for ours, theirs in settings.columns.items()}}
    extras = {name: as_json_text(row[name]) for name in _EXTRAS if row.get(name) is not None}
    if verifiable(row.get("answer")):
        extras["answer"] = str(row["answer"])
    if function is not None:
        kind, row = _call(function, row, text_field, forms, faults)
    if kind == "none":
        return []
    if goal == "prompts":
        return [{**prompts.prompt_row(row, kind, settings.system_prompt, faults), **extras}]
    if goal != "tokens" and kind == "tokenized":
        return [tokenized_row(row, goal, faults)]
    if goal == "preference":
        return [{**pair_row(row, settings.system_prompt, faults), **extras}]
    if goal == "unpaired":
        return [{**made, **extras} for made in unpaired_rows(row, kind, settings.system_prompt, faults)]
    if kind == "alpaca":
        return [{**alpaca_of(row, settings.system_prompt, faults), **extras}]
    out: dict[str, Any] = {}
    if kind == "tokenized":
        return [token_row(row, faults)]
    if kind in ("messages", "sharegpt"):
        name = "conversations" if kind == "sharegpt" else "messages"
        out["messages"] = with_system(messages_of(row.get(name), name, faults, row), settings.system_prompt)
    elif kind == "prompt_completion":
        out["prompt"], out["completion"] = pair_of(row, settings.system_prompt, faults)
    elif kind == "text":
        out[text_field] = text_of(row.get(text_field), text_field, faults, row)
    return [{**out, **extras}]


def _call(
    function: Any,
    row: dict[str, Any],
    text_field: str,
    forms: Mapping[str, tuple[str, ...]],
    faults: Faults,
) -> tuple[str, dict[str, Any]]:
    try:
        result = function(row)
    except Exception as error:  # any fault of the user's own function is told with its row
        raise UserError(
            Violation(
                faults.where,
                None,
                f"formatting_func raised {type(error).__name__}: {error}",
                "repair the function or the row",
            )
        ) from error
    if isinstance(result, str) and "text" in forms:
        return "text", {text_field: result}
    if isinstance(result, list) and "alpaca" in forms:
        return "messages", {"messages": result}
    if isinstance(result, Mapping):
        for kind, columns in forms.items():
            if set(columns) <= set(result):
                return kind, dict(result)
    shown = f"a {type(result).__name__}" + (
        f" with {', '.join(result)}" if isinstance(result, Mapping) else ""
    )
    faults.add(
        "(formatting_func)",
        f"it returned {shown}",
        "return text, a list of messages, or {'prompt': …, 'completion': …}"
        if "text" in forms
        else "return " + " or ".join("{" + ", ".join(columns) + "}" for columns in forms.values()),
    )
    return "none", {}
