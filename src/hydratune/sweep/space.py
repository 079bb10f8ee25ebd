"""What is searched: named dimensions, the exact grid of finite ones, and suggestions of an Optuna trial.

A point of a space is a mapping of settings, `{"lr": "2e-5", "peft.r": "16"}`. A dimension gives one setting, or
several that move together (`Paired`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydratune.command import text
from hydratune.errors import UserError, Violation

Point = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of finitely many values, tried in this order by a grid."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        given = values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values
        if odd := [v for v in given if not (v is None or isinstance(v, bool | int | float | str))]:
            fix = "give texts, numbers, true, false or none; several settings that move together are Paired"
            raise UserError(Violation("space", odd[0], "is no value that can be chosen", fix))
        object.__setattr__(self, "values", tuple({(type(v), v): v for v in given}.values()))

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, list(self.values))

    def settings(self, name: str, value: Any) -> Point:
        return {name: value}

    def __str__(self) -> str:
        shown = ", ".join(str(v) for v in self.values[:8])
        return shown + (f", … ({len(self.values)} values)" if len(self.values) > 8 else "")


@dataclass(frozen=True)
class Paired:
    """Settings that move together: each value is a mapping of several."""

    values: tuple[Mapping[str, Any], ...]

    def __init__(self, *values: Mapping[str, Any]):
        given = values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values
        if odd := [v for v in given if not isinstance(v, Mapping) or not v]:
            fix = "give mappings, e.g. {'peft.r': 8, 'peft.lora_alpha': 16}"
            raise UserError(Violation("space", odd[0], "is no mapping of settings", fix))
        labels = [_label(v) for v in given]
        once = [v for i, v in enumerate(given) if labels[i] not in labels[:i]]
        object.__setattr__(self, "values", tuple(once))

    @property
    def labels(self) -> list[str]:
        return [_label(value) for value in self.values]

    def suggest(self, trial: Any, name: str) -> str:
        return trial.suggest_categorical(name, self.labels)

    def settings(self, name: str, value: str) -> Point:
        return dict(self.values[self.labels.index(value)])

    def __str__(self) -> str:
        return " | ".join(self.labels)


def _label(value: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items())


@dataclass(frozen=True)
class Float:
    """A number from `low` to `high`, uniform, or uniform in its logarithm."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)

    def suggest(self, trial: Any, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def settings(self, name: str, value: float) -> Point:
        return {name: value}

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g}" + (" (log)" if self.log else "")


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        _check_bounds(self)

    def suggest(self, trial: Any, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    def settings(self, name: str, value: int) -> Point:
        return {name: value}

    def __str__(self) -> str:
        return f"{self.low} … {self.high}, whole" + (" (log)" if self.log else "")


Dimension = Choice | Paired | Float | Int


def _check_bounds(dimension: Float | Int) -> None:
    low, high = dimension.low, dimension.high
    wrong = ""
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        wrong = "the lower end is above the upper one, or an end is not finite"
    elif dimension.log and low <= 0:
        wrong = "a logarithmic interval needs ends above 0"
    elif dimension.log and (dimension.step or 1) != 1:
        wrong = "a logarithmic interval has no step"
    if wrong:
        raise UserError(Violation("space", f"{low} … {high}", wrong, "write interval(1e-6, 1e-3)"))


@dataclass(frozen=True)
class Space:
    """Named dimensions, and perhaps a function that adds settings which depend on others.

    Attributes:
        dimensions: in the order in which a grid counts: the last one moves fastest.
        function: from an Optuna trial to a mapping of settings (define-by-run).
    """

    dimensions: Mapping[str, Dimension]
    function: Callable[[Any], Mapping[str, Any]] | None = None

    @property
    def finite(self) -> bool:
        return self.function is None and all(isinstance(d, Choice | Paired) for d in self.dimensions.values())

    def __len__(self) -> int:
        """Points of the grid of a finite space."""
        return math.prod(len(d.values) for d in self.dimensions.values() if isinstance(d, Choice | Paired))

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point once, as Optuna's parameters (what `suggest` gives), in the order of the command line."""
        options = [d.labels if isinstance(d, Paired) else d.values for d in self.dimensions.values()]  # type: ignore[union-attr]
        for values in itertools.product(*options):
            yield dict(zip(self.dimensions, values, strict=True))

    def suggest(self, trial: Any) -> Point:
        """The settings of an Optuna trial's point."""
        point: Point = {}
        for name, dimension in self.dimensions.items():
            chosen: Any = dimension.suggest(trial, name)
            point |= dimension.settings(name, chosen)
        if self.function is not None:
            extra = self.function(trial)
            if not isinstance(extra, Mapping):
                raise UserError(
                    Violation(
                        "sweep.space_function",
                        extra,
                        "the function did not return a mapping",
                        "return {'KEY': value, …}",
                    )
                )
            point |= {str(k): v for k, v in extra.items()}
        return point

    def parameters(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters for settings given by a user: known good points, typed as the space has them.

        Raises:
            UserError: a setting that the space does not have, or a value outside it.
        """
        left, found, wrong = dict(settings), {}, []
        for name, dimension in self.dimensions.items():
            if isinstance(dimension, Paired):
                for label, value in zip(dimension.labels, dimension.values, strict=True):
                    if all(k in left and _same(v, left[k]) for k, v in value.items()):
                        found[name] = label
                        left = {k: v for k, v in left.items() if k not in value}
                        break
                continue
            if name not in left:
                continue
            value = left.pop(name)
            fits = _fit(dimension, value)
            if fits is _OUTSIDE:
                wrong.append(
                    Violation(
                        "sweep.enqueue",
                        f"{name}={value}",
                        f"is not in the space ({dimension})",
                        "give a point inside",
                    )
                )
            found[name] = fits
        if self.function is None:
            wrong += [
                Violation("sweep.enqueue", f"{name}={value}", "is not searched", f"leave out {name}")
                for name, value in left.items()
            ]
        else:
            found |= left
        if wrong:
            raise UserError(wrong)
        return found

    def describe(self) -> dict[str, str]:
        """The space as texts, for the plan and to tell whether a study's space has changed."""
        texts = {name: f"{type(d).__name__.lower()}: {d}" for name, d in self.dimensions.items()}
        for name, d in self.dimensions.items():
            if isinstance(d, Choice):
                texts[name] = "choice: " + ", ".join(map(str, d.values))
        if self.function is not None:
            texts["function"] = f"{self.function.__module__}.{self.function.__qualname__}"
        return texts


_OUTSIDE = object()


def _fit(dimension: Choice | Float | Int, value: Any) -> Any:
    """The value as this dimension has it; `_OUTSIDE` when it is not in there."""
    if isinstance(dimension, Choice):
        exact = (v for v in dimension.values if type(v) is type(value) and v == value)
        alike = (v for v in dimension.values if _same(v, value))
        return next(exact, next(alike, _OUTSIDE))
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _OUTSIDE
    if not dimension.low <= number <= dimension.high:
        return _OUTSIDE
    if isinstance(dimension, Int):
        return int(number) if number == int(number) else _OUTSIDE
    return number


def _same(one: Any, other: Any) -> bool:
    """Whether a value of the space is what a user gave: as numbers, as texts, or as the command line writes them."""
    if one == other or text(one) == text(other):
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def overlaps(dimensions: Mapping[str, Dimension]) -> list[Violation]:
    """Settings that two dimensions would set."""
    owner, wrong = {n: n for n, d in dimensions.items() if not isinstance(d, Paired)}, []
    for name, dimension in dimensions.items():
        if not isinstance(dimension, Paired):
            continue
        for key in dict.fromkeys(str(key) for value in dimension.values for key in value):
            if key in owner:
                why = "is swept by itself too" if owner[key] == key else f"is in the pair {owner[key]} too"
                wrong.append(Violation(f"sweep.paired.{name}", key, why, "leave out one of them"))
            owner.setdefault(key, name)
    return wrong


def as_space(given: Space | Mapping[str, Any]) -> Space:
    """A space from dimensions, or from plain lists of values.

    Raises:
        UserError: something else than that, or a dimension without values.
    """
    if isinstance(given, Space):
        return given
    dimensions: dict[str, Dimension] = {}
    for name, value in given.items():
        dimension = value
        if isinstance(value, Sequence) and not isinstance(value, str):
            dimension = (
                Paired(*value) if value and all(isinstance(v, Mapping) for v in value) else Choice(*value)
            )
        if not isinstance(dimension, Dimension):
            why = "is not searchable"
            raise UserError(
                Violation(
                    f"space.{name}", value, why, "give a list of values, Float(low, high) or Int(low, high)"
                )
            )
        if isinstance(dimension, Choice | Paired) and not dimension.values:
            raise UserError(Violation(f"space.{name}", None, "there is no value to try", "give at least one"))
        dimensions[str(name)] = dimension
    return Space(dimensions)
