"""The sources that a reward may come from, told apart and checked; light, because it is read before torch is."""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydratune.data.builtin import verifiable, verify
from hydratune.errors import UserError, Violation
from hydratune.functions import resolve

CORRECT = "correct"  # names the built-in verifier among sources
ACCEPTED = (
    "give a function or its dotted path (my.module.fn), the directory or hub id of a sequence-classification model with "
    f"one label (train one with algo=reward), or '{CORRECT}' with a whole-number column answer"
)
_ALWAYS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
)  # what functions may ask for besides columns
_KINDS = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def correct(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion's last whole number is the row's answer, else 0.0; None for rows without such an answer."""
    return [
        _is_right(wanted, text if isinstance(text, str) else text[-1]["content"])
        if verifiable(wanted)
        else None
        for text, wanted in zip(completions, answer, strict=True)
    ]


def _is_right(answer: Any, text: str) -> float:
    try:
        return float(verify(answer, text))
    except ValueError:  # a number of more digits than Python reads
        return 0.0


# ------------------------------------------------------------------ checks before anything is loaded


def check_sources(
    sources: Any,
    *,
    columns: Collection[str] | None,
    weights: Sequence[float] | None = None,
    key: str = "algo.reward_funcs",
    weights_key: str = "algo.reward_weights",
) -> list[Violation]:
    """What is wrong with sources and weights; imports the functions' modules, reads configs, loads no weights.

    Args:
        sources: as for `Rewards`.
        columns: of the formatted rows; None: not known yet.
    """
    given = listed(sources)
    if not given and columns is not None and "answer" not in columns:
        why = "names no reward, and the rows have no column answer to verify completions against"
        return [Violation(key, None, why, ACCEPTED)]
    wrong: list[Violation] = []
    for source in given or [CORRECT]:
        try:
            if is_model(source):
                wrong.extend(_model_instance_faults(source, key))
            elif isinstance(source, str) and not is_path_of_function(source):
                wrong.extend(_named_model_faults(source, key))
            else:
                function = function_of(source, key)
                if columns is not None and (missing := missing_parameters(function, {*_ALWAYS, *columns})):
                    wrong.append(lacks(name_of(source), missing, columns, key))
        except UserError as error:
            wrong.extend(error.violations)
    if weights is not None:
        wrong.extend(weight_faults(weights, len(given) or 1, weights_key))
    return wrong


def weight_faults(weights: Any, many: int, key: str) -> list[Violation]:
    given = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else [weights]
    if any(isinstance(w, bool) or not isinstance(w, numbers.Real) or not math.isfinite(w) for w in given):
        return [Violation(key, str(weights), "are not all finite numbers", "give one number a reward")]
    if len(given) != many:
        why = f"{len(given)} weights for {many} reward{'s' * (many != 1)}"
        return [Violation(key, str(weights), why, "give one for each, or leave them out")]
    if not any(given):
        return [
            Violation(key, str(weights), "are all 0: nothing would be rewarded", "give one that is not 0")
        ]
    return []


def _named_model_faults(source: str, key: str) -> list[Violation]:
    path = Path(source).expanduser()
    if not path.is_dir():
        # what can be no hub id (owner/name) is a path, or nothing that we know
        if path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1:
            return [Violation(key, source, "there is no such directory", ACCEPTED)]
        if "/" not in source:
            return [Violation(key, source, "is neither a dotted path nor a directory", ACCEPTED)]
        return []
    home = model_home(path)
    if home is None:
        why = "the directory holds neither config.json nor adapter_config.json"
        return [Violation(key, source, why, "give the folder that save_pretrained wrote, or a run directory")]
    adapter = home / "adapter_config.json"
    name = adapter if adapter.is_file() else home / "config.json"
    try:
        config = json.loads(name.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError):
        return [Violation(key, source, f"{name.name} is no readable JSON object", "save the model again")]
    if name is adapter:
        kind = config.get("task_type")
        return [] if kind == "SEQ_CLS" else [no_head(key, source, f"its adapter is of the kind {kind}")]
    labels = config.get("num_labels") or len(
        config.get("id2label") or (0, 1)
    )  # 2 are the default, and not saved
    return config_faults(source, config.get("architectures"), labels, config.get("auto_map"), key)


def model_home(path: Path) -> Path | None:
    """Where a model lies, given its directory or its run directory."""
    names = ("adapter_config.json", "config.json")
    return next((d for d in (path, path / "model") if any((d / n).is_file() for n in names)), None)


def config_faults(
    source: str, architectures: Any, labels: int, auto_map: Mapping[str, Any] | None, key: str
) -> list[Violation]:
    """Whether a model's config is that of a sequence-classification model with one label.

    Args:
        architectures: class names, as its config has them.
        auto_map: Auto classes for which the model brings code of its own.
    """
    kinds = [str(name) for name in architectures or ()]
    if not any("SequenceClassification" in name for name in [*kinds, *(auto_map or ())]):
        return [no_head(key, source, f"is a {' or '.join(kinds)}" if kinds else "names no architecture")]
    if labels != 1:
        why = f"has {labels} labels, and a reward model gives one score"
        return [Violation(key, source, why, ACCEPTED)]
    return []


def no_head(key: str, source: str, what: str) -> Violation:
    why = f"{what}, which has no trained score head, and a random one would reward noise"
    return Violation(key, source, why, ACCEPTED)


def _model_instance_faults(model: Any, key: str) -> list[Violation]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if config is None or not ("SequenceClassification" in name or hasattr(inner, "score")):
        return [no_head(key, name, "is no sequence-classification model")]
    labels = getattr(config, "num_labels", 1)
    return [] if labels == 1 else config_faults(name, ["SequenceClassification"], labels, None, key)


# ------------------------------------------------------------------ sources


def listed(values: Any) -> list[Any]:
    if values is None:
        return []
    return list(values) if isinstance(values, list | tuple) else [values]


def is_model(source: Any) -> bool:
    """Without importing torch, which a model's owner has."""
    return "torch" in sys.modules and isinstance(source, sys.modules["torch"].nn.Module)


def is_path_of_function(source: str) -> bool:
    if source == CORRECT:
        return True
    dotted = re.fullmatch(r"\w+([.:]\w+)+", source) is not None
    return dotted and not Path(source).is_dir()


def function_of(source: Any, key: str) -> Callable[..., Any]:
    """The function that a source means.

    Raises:
        UserError: it means none.
    """
    if source == CORRECT:
        return correct
    found = resolve(source, key) if isinstance(source, str) else source
    shown = source if isinstance(source, str) else repr(source)
    if inspect.isclass(found):
        raise UserError(
            Violation(key, shown, "is a class, not a function", "name an instance of it, or a function")
        )
    if not callable(found):
        raise UserError(
            Violation(key, shown, f"is a {type(found).__name__}, not a source of rewards", ACCEPTED)
        )
    return found


def name_of(source: Any) -> str:
    if is_model(source):
        path = getattr(getattr(source, "config", None), "_name_or_path", "")
        return _last(path) if path else type(source).__name__
    if isinstance(source, str):
        return re.split(r"[.:]", source)[-1] if is_path_of_function(source) else _last(source)
    while isinstance(source, functools.partial):
        source = source.func
    return getattr(source, "__name__", type(source).__name__).strip("<>")


def _last(path: str) -> str:
    parts = [part for part in Path(path).expanduser().parts if part not in ("/", ".", "..")]
    if len(parts) > 1 and parts[-1] == "model":  # of a run directory
        parts.pop()
    return parts[-1] if parts else "model"


def unique(names: list[str]) -> tuple[str, ...]:
    taken: list[str] = []
    for name in names:
        number, chosen = 1, name
        while chosen in taken or (number > 1 and chosen in names):
            number += 1
            chosen = f"{name}_{number}"
        taken.append(chosen)
    return tuple(taken)


# ------------------------------------------------------------------ parameters of functions


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C functions
        return None


def missing_parameters(function: Callable[..., Any], offered: Collection[str]) -> list[str]:
    """Parameters that a function needs and nobody offers."""
    known = _parameters(function) or {}
    return [n for n, p in known.items() if p.kind in _KINDS and p.default is p.empty and n not in offered]


def taken(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """What a function takes of what is offered: all of it, unless it names what it wants and has no `**`."""
    known = _parameters(function)
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return offered
    return {name: value for name, value in offered.items() if name in known}


def lacks(name: str, missing: list[str], columns: Collection[str], key: str) -> Violation:
    why = f"needs {', '.join(missing)}, and the rows have {', '.join(columns) or 'no other column'}"
    if name == CORRECT:
        return Violation(key, name, why, ACCEPTED)
    return Violation(key, name, why, "keep this column in the rows, or give the parameter a default")
