"""What a warm process reads ahead of the trials, and what tells that none of them can work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from hydratune.command import text
from hydratune.config import SECTIONS, key_of
from hydratune.sweep.space import Choice, Dimension, Float, Paired, Point

_READ = 6  # command lines whose data and weights are read ahead
_TRIED = 12  # command lines that are tried to tell whether any trial can work
# settings that neither data nor model depend on; of a trainer's, those of the optimiser
_APART = re.compile(
    r"lr|epochs|max_steps|accumulation|run_name|(peft|tracking)\..*"
    r"|trainer\.(learning_rate|weight_decay|max_grad_norm|(warmup|lr_scheduler|optim|adam)\w*)"
)
Line = tuple[str, ...]


def lines(base: Sequence[str], dimensions: Mapping[str, Dimension]) -> tuple[Line, ...]:
    """Command lines with the data and the models that trials will want: the first point, and each other data or model."""
    first = {name: _points(name, d)[0] for name, d in dimensions.items()}
    made = [_line(base, first)]
    for name, dimension in dimensions.items():
        if any(key.partition(".")[0] in ("data", "model") for key in first[name]):
            made += [_line(base, first | {name: point}) for point in _points(name, dimension)[1:]]
    return tuple(made[:_READ])


def deciding(base: Sequence[str], dimensions: Mapping[str, Dimension]) -> tuple[Line, ...] | None:
    """Command lines of which, if the data or the model of each is wrong, that of every trial is.

    None when there are no such few: values without end, or too many combinations.
    """
    options, endless = [], False
    for name, dimension in dimensions.items():
        points = _points(name, dimension)
        if all(_is_apart(key, dimension) for point in points for key in (point or {name: None})):
            points = points[:1]
        elif not isinstance(dimension, Choice | Paired):
            endless = True
        options.append(points)
    count = 1
    for points in options:
        count *= len(points)
    if endless or count > _TRIED:
        return None
    return tuple(
        _line(base, dict(zip(dimensions, points, strict=True))) for points in itertools.product(*options)
    )


def _is_apart(key: str, dimension: Dimension) -> bool:
    if _APART.fullmatch(key):
        return True
    # how rows become tokens is set by texts, whole numbers and truths; no entry of a group is apart
    return isinstance(dimension, Float) and key not in SECTIONS and key.partition(".")[0] == "algo"


def _points(name: str, dimension: Dimension) -> list[Point]:
    """Each value's settings; of an interval none, its key is left as the config has it."""
    if isinstance(dimension, Paired):
        return [dict(value) for value in dimension.values]
    return [{name: value} for value in dimension.values] if isinstance(dimension, Choice) else [{}]


def _line(base: Sequence[str], points: Mapping[str, Point]) -> Line:
    settings = {key: value for point in points.values() for key, value in point.items()}
    shared = [o for o in base if key_of(o) not in settings]
    return (*shared, *(f"{key}={text(value)}" for key, value in settings.items()))
