"""From rows of any known shape to rows that a trainer takes: format, tokenise, truncate, shuffle, pack; cached."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import datasets

from hydratune.data.cache import cached, rows_fingerprint, tokenizer_fingerprint
from hydratune.data.format import columns_of, format_rows
from hydratune.data.pack import pack
from hydratune.data.tokenize import DataReport, TokenizeOptions, tokenize
from hydratune.data.tokenize_preference import PreferenceOptions, tokenize_preference
from hydratune.data.tokenize_prompts import tokenize_prompts
from hydratune.errors import UserError, Violation
from hydratune.settings import DataSettings

_FROM_ARGS = object()


def prepare(
    dataset: Any,
    tokenizer: Any,
    args: Any,
    *,
    packing: bool,
    where: str,
    formatting_func: Callable[[dict[str, Any]], Any] | None = None,
    cache: bool = True,
    max_length: Any = _FROM_ARGS,
    settings: DataSettings | None = None,
) -> tuple[Any, DataReport]:
    """Rows with `input_ids` and `labels`, packed ones with `seq_lengths` too, and what became of them.

    Args:
        dataset: raw or canonical rows (text, messages, prompt and completion, token ids, …), or a stream.
        args: an `SFTConfig`, or anything with its data fields and `seed`.
        packing: pack into blocks of `max_length`.
        where: name of the data in messages.
        formatting_func: a stage of its own before all others; what it returns is then formatted as such rows are.
        cache: keep the result under a key of rows, tokenizer, settings and code; streams are never cached.
        max_length: in place of `args.max_length`.
        settings: how raw rows are formatted; None: found from the columns.

    Returns:
        The data set as it is, with an empty report, when `args.dataset_kwargs` says `skip_prepare_dataset`.

    Raises:
        UserError: rows of a wrong shape, options that do not fit them, or nothing left to train on.
    """
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return dataset, DataReport()
    length = args.max_length if max_length is _FROM_ARGS else max_length
    if packing and length is None:
        raise UserError(
            Violation(
                "algo.max_length",
                None,
                "packing needs the length of a block",
                "set max_length, or packing=false",
            )
        )
    options = TokenizeOptions(
        max_length=length,
        truncation_mode=args.truncation_mode,
        completion_only_loss=args.completion_only_loss,
        assistant_only_loss=args.assistant_only_loss,
        dataset_text_field=args.dataset_text_field,
        eos_token=args.eos_token,
        num_proc=args.dataset_num_proc,
    )
    shuffle_seed = args.seed if args.shuffle_dataset else None
    strategy = args.packing_strategy if packing else None
    rows = format_rows(
        dataset,
        settings or DataSettings(),
        where=where,
        text_field=args.dataset_text_field,
        formatting_func=formatting_func,
    )

    def build() -> tuple[Any, DataReport]:
        return _build(rows, tokenizer, options, strategy, shuffle_seed, where)

    settings_key = {"options": vars(options), "strategy": strategy, "shuffle": shuffle_seed}
    return _kept(rows, tokenizer, settings_key, build, cache)


def prepare_preference(
    dataset: Any,
    tokenizer: Any,
    args: Any,
    *,
    goal: str,
    where: str,
    drop_long: bool = False,
    formatting_func: Callable[[dict[str, Any]], Any] | None = None,
    cache: bool = True,
    settings: DataSettings | None = None,
) -> tuple[Any, DataReport]:
    """The same for preference rows: token ids of prompts and completions (`tokenize_preference.py`).

    Args:
        args: a config of the algorithm, with at least `max_length` and `seed`.
        goal: "preference" or "unpaired"; paired rows are unpaired and shuffled by the seed.
        drop_long: see `PreferenceOptions`.

    Raises:
        UserError: rows of a wrong shape, or nothing left to train on.
    """
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return dataset, DataReport()
    options = PreferenceOptions(
        goal=goal,
        max_length=args.max_length,
        max_prompt_length=getattr(args, "max_prompt_length", None),
        max_completion_length=getattr(args, "max_completion_length", None),
        truncation_mode=getattr(args, "truncation_mode", "keep_start"),
        drop_long=drop_long,
        eos_token=args.eos_token,
        num_proc=args.dataset_num_proc,
    )
    settings = settings or DataSettings()
    rows = format_rows(dataset, settings, where=where, formatting_func=formatting_func, goal=goal)
    if goal != "unpaired":
        apart = False
    elif isinstance(rows, datasets.Dataset):
        apart = len(rows) > len(dataset)
    else:
        apart = {"chosen", "rejected"} <= {*columns_of(dataset)} or bool(
            formatting_func or settings.formatting_func
        )
    seed = args.seed if apart else None

    def build() -> tuple[Any, DataReport]:
        made, report = tokenize_preference(rows, tokenizer, options, where=where)
        # else the two of a pair would meet in every batch
        return (made if seed is None else made.shuffle(seed=seed)), report

    return _kept(rows, tokenizer, {"options": vars(options), "shuffle": seed}, build, cache)


def prepare_prompts(
    dataset: Any,
    tokenizer: Any,
    args: Any,
    *,
    where: str,
    formatting_func: Callable[[dict[str, Any]], Any] | None = None,
    cache: bool = True,
    settings: DataSettings | None = None,
) -> tuple[Any, DataReport]:
    """The same for prompts: `prompt_ids` beside all other columns (`prompts.py`).

    Raises:
        UserError: rows of a wrong shape, a stream, or nothing left to ask.
    """
    if not isinstance(dataset, datasets.Dataset):
        why = "is a stream, and prompts are drawn from all rows"
        raise UserError(Violation(where, None, why, "give a data set (data.streaming=false)"))
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        if "prompt_ids" not in dataset.column_names:
            why = f"skip_prepare_dataset takes rows as they are, and these have no prompt_ids ({', '.join(dataset.column_names)})"
            fix = "give the token ids of each prompt as prompt_ids, or leave skip_prepare_dataset out"
            raise UserError(Violation(where, None, why, fix))
        return dataset, DataReport()
    rows = format_rows(
        dataset, settings or DataSettings(), where=where, formatting_func=formatting_func, goal="prompts"
    )
    longest = args.max_prompt_length

    def build() -> tuple[Any, DataReport]:
        return tokenize_prompts(rows, tokenizer, max_prompt_length=longest, where=where)

    return _kept(
        rows, tokenizer, {"options": {"goal": "prompts", "max_prompt_length": longest}}, build, cache
    )


def _kept(
    rows: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    build: Callable[[], tuple[Any, DataReport]],
    cache: bool,
) -> tuple[Any, DataReport]:
    """What `build` gives, from the cache when it was made before; a stream is never cached."""
    if not cache or not isinstance(rows, datasets.Dataset):
        return build()

    def plain() -> tuple[datasets.Dataset, dict[str, Any]]:
        prepared, report = build()
        return prepared, report.as_dict()

    options = {name: value for name, value in settings["options"].items() if name != "num_proc"}
    key = {
        **settings,
        "options": options,
        "rows": rows_fingerprint(rows),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "versions": [version("transformers"), version("tokenizers")],
    }
    prepared, report, _ = cached(key, plain)
    return prepared, DataReport(**report)


def _build(
    rows: Any,
    tokenizer: Any,
    options: TokenizeOptions,
    strategy: str | None,
    shuffle_seed: int | None,
    where: str,
) -> tuple[Any, DataReport]:
    whole_rows = strategy in ("bfd_split", "wrapped")  # these lose no token, so nothing is cut before them
    prepared, report = tokenize(rows, tokenizer, options, where=where, truncate=not whole_rows)
    if shuffle_seed is not None:
        prepared = prepared.shuffle(seed=shuffle_seed)
    if strategy is not None:
        prepared, packed = pack(prepared, options.max_length, strategy)
        report.blocks, report.fill = packed.blocks, packed.fill
        if shuffle_seed is not None:
            prepared = prepared.shuffle(seed=shuffle_seed)  # best fit puts the fullest blocks first
    return prepared, report
