"""Where rows come from: built in, local files or the hub; and which of them train and which evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np

from hydratune.data import builtin
from hydratune.data.read import ORIGIN, files_of, read_rows
from hydratune.data.table import to_dataset
from hydratune.errors import UserError, Violation, nearest
from hydratune.settings import DataSettings


def load(settings: DataSettings, seed: int, goal: str = "tokens") -> tuple[Any, Any | None]:
    """The raw training rows and the raw evaluation rows (None when there are none).

    Built-in rows come in the form that the goal of the algorithm wants (`builtin.arithmetic`).

    Evaluation rows come from `eval_path`, else `eval_split`, else `eval_fraction` of the training rows, drawn by the
    seed. A stream has no length, so there its first `max_eval_samples` rows are held out, or none when that is null.

    Returns:
        `datasets.Dataset` each, or `IterableDataset` when `streaming`. Rows of local files carry a hidden column with
        their file and line, for the messages of `format_rows`, which drops it.

    Raises:
        UserError: what cannot be read, by file and line; settings that do not fit together.
    """
    seed = settings.seed if settings.seed is not None else seed
    _check(settings)
    train = _source(settings, seed, goal)
    held_out = None
    if settings.eval_path:
        held_out = _local(settings.eval_path, "data.eval_path", settings.streaming)
    elif settings.eval_split:
        held_out = _hub(settings, settings.eval_split, "data.eval_split")
    if settings.streaming:
        return _cut_stream(train, held_out, settings, seed)

    order = np.random.default_rng(seed).permutation(len(train))
    if held_out is None and settings.eval_fraction > 0 and len(train) >= 2:
        count = min(max(1, round(settings.eval_fraction * len(train))), len(train) - 1)
        held_out = train.select(np.sort(order[:count]))
        order = order[count:]
    if settings.max_samples is not None:
        train = train.select(order[: settings.max_samples])
    elif len(order) < len(train):
        train = train.select(np.sort(order))
    if (
        held_out is not None
        and settings.max_eval_samples is not None
        and settings.max_eval_samples < len(held_out)
    ):
        some = np.random.default_rng(seed).permutation(len(held_out))[: settings.max_eval_samples]
        held_out = held_out.select(np.sort(some))
    return train, held_out


def _check(settings: DataSettings) -> None:
    wrong = []
    if not 0 <= settings.eval_fraction < 1:
        wrong.append(
            Violation(
                "data.eval_fraction",
                settings.eval_fraction,
                "is not a share of the rows",
                "give 0, or a number below 1",
            )
        )
    for name, least in (("max_samples", 1), ("max_eval_samples", 1), ("size", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            wrong.append(
                Violation(
                    f"data.{name}", value, "leaves no row", f"give {least} or more, or null for no limit"
                )
            )
    if settings.source == "local" and not settings.path:
        wrong.append(
            Violation(
                "data.path", None, "is not set, and data.source is local", "data.path=rows.jsonl, or a folder"
            )
        )
    if settings.source == "hub" and not settings.name:
        wrong.append(
            Violation("data.name", None, "is not set, and data.source is hub", "data.name=owner/data-set")
        )
    if settings.source == "builtin" and settings.name not in (None, *builtin.NAMES):
        wrong.append(
            Violation(
                "data.name",
                settings.name,
                "is not a built-in data set",
                nearest(str(settings.name), builtin.NAMES),
            )
        )
    if settings.source == "builtin" and settings.distinct and settings.size > builtin.QUESTIONS:
        why = f"there are {builtin.QUESTIONS:,} distinct questions"
        wrong.append(
            Violation(
                "data.size",
                settings.size,
                why,
                f"data.size={builtin.QUESTIONS} or less, or data.distinct=false",
            )
        )
    if settings.distinct and settings.source != "builtin":
        why, fix = (
            "is of built-in data: it is made without repeats",
            "leave it out; drop repeated rows yourself",
        )
        wrong.append(Violation("data.distinct", True, why, fix))
    if settings.eval_split and settings.source != "hub" and not settings.eval_path:
        wrong.append(
            Violation(
                "data.eval_split",
                settings.eval_split,
                "only hub data has splits",
                "use data.eval_path or data.eval_fraction",
            )
        )
    if wrong:
        raise UserError(wrong)


def _source(settings: DataSettings, seed: int, goal: str) -> Any:
    if settings.source == "local":
        return _local(str(settings.path), "data.path", settings.streaming)
    if settings.source == "hub":
        return _hub(settings, settings.split, "data.split")
    rows = datasets.Dataset.from_list(builtin.arithmetic(settings.size, seed, goal, settings.distinct))
    return rows.to_iterable_dataset() if settings.streaming else rows


def _cut_stream(train: Any, held_out: Any, settings: DataSettings, seed: int) -> tuple[Any, Any]:
    if held_out is None and settings.eval_fraction > 0 and settings.max_eval_samples:
        held_out = train.take(settings.max_eval_samples)
        train = train.skip(settings.max_eval_samples)
    elif held_out is not None and settings.max_eval_samples:
        held_out = held_out.take(settings.max_eval_samples)
    if settings.max_samples is not None:
        train = train.shuffle(seed=seed, buffer_size=10_000).take(settings.max_samples)
    return train, held_out


def _hub(settings: DataSettings, split: str, key: str) -> Any:
    try:
        return datasets.load_dataset(
            settings.name, settings.subset, split=split, streaming=settings.streaming
        )
    except (OSError, ValueError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        what = f"{settings.name}" + (f" ({settings.subset})" if settings.subset else "")
        raise UserError(
            Violation(
                "data.name",
                what,
                f"the hub gave no data set for {key}={split}: {said}",
                "check the name, the subset, the split and the connection, or use data.source=local data.path=…",
            )
        ) from error


def _rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    for file in files_of(path, key):
        for origin, row in read_rows(file, key):
            yield {**row, ORIGIN: origin}


def _local(path: str, key: str, streaming: bool) -> Any:
    if streaming:
        files_of(path, key)  # a wrong path is told now, not at the first batch
        return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"path": path, "key": key})
    rows: list[dict[str, Any]] = []
    wrong: list[Violation] = []
    for file in files_of(path, key):
        try:
            rows.extend({**row, ORIGIN: origin} for origin, row in read_rows(file, key))
        except UserError as error:
            wrong.extend(error.violations)
    if wrong:
        raise UserError(wrong)
    return to_dataset(rows)
