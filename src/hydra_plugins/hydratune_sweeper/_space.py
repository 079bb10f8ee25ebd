"""The space of a search: what the overrides, `sweep.space` and `sweep.paired` name, each refused where it cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from hydratune.command import arguments, as_values, check_command, rewrite, text
from hydratune.config import key_of
from hydratune.errors import UserError, Violation
from hydratune.settings import SweepSettings
from hydratune.sweep.space import Choice, Dimension, Float, Int, Paired, overlaps

_NOT_OF_A_TRIAL = ("output_dir", "resume", "check", "sweep", "hydra")  # of the overrides
_MOST_VALUES = 64  # of one dimension that are composed up front, as of a swept key


def of_a_trial(key: str) -> bool:
    """Whether a key may be set by a trial; the others are of the whole sweep."""
    return re.split(r"[./]", key, maxsplit=1)[0] not in _NOT_OF_A_TRIAL


def plain(override: Override) -> str:
    """An override as a user writes it, without the ++ that train.py has put before it."""
    line = str(override.input_line)
    return line[2:] if line.startswith("++") else line


def swept_dimensions(swept: Sequence[Override]) -> dict[str, Dimension]:
    """Those of the command line.

    Raises:
        UserError: several values of something that the whole sweep has one of.
    """
    if fixed := [o for o in swept if not of_a_trial(key_of(plain(o)))]:
        raise UserError(
            Violation(
                key_of(plain(o)), o.get_value_string(), "is of the whole sweep and has one value", "give one"
            )
            for o in fixed
        )
    return {o.key_or_group: _dimension(o) for o in swept}


def all_dimensions(
    parser: OverridesParser,
    dimensions: dict[str, Dimension],
    shared: Sequence[Override],
    search: SweepSettings,
    options: Sequence[str],
) -> dict[str, Dimension]:
    """Those of the command line, then those of `sweep.space` and `sweep.paired`.

    Args:
        parser: of Hydra's overrides.
        dimensions: those of the command line.
        shared: the overrides with one value.
        search: with `space` and `paired`.
        options: of the command line, which say where configs are.

    Raises:
        UserError: with every key of them that a trial cannot have, has twice, or that does not compose.
    """
    found, wrong = dict(dimensions), list[Violation]()
    given = {o.key_or_group for o in shared}
    for key, values in search.space.items():
        if key in dimensions or key in given:
            continue  # the command line wins over the search's file
        where = f"sweep.space.{key}"
        if not of_a_trial(key):
            wrong.append(_not_of_a_trial(where, key, values))
            continue
        (override,) = parser.parse_overrides([f"{key}={as_values(values)}"])
        if override.is_sweep_override():
            found[key] = _dimension(override)
        else:
            wrong.append(Violation(where, values, "has one value", "give several, or set it in sweep.base"))
    typed = {o.key_or_group for o in shared if plain(o) not in search.base}
    for name, values in search.paired.items():
        faults = [*_faults(name, values, typed)]
        if name in found:
            why, fix = "is the name of a swept key too", "name the pair otherwise, e.g. size"
            faults.append(Violation(f"sweep.paired.{name}", values, why, fix))
        wrong += faults
        if not faults:
            found[name] = Paired(*values)
    wrong += overlaps(found)
    if not wrong:
        wrong += _uncomposable(found, [n for n in found if n not in dimensions], shared, options)
    if wrong:
        raise UserError(wrong)
    return found


def first_settings(dimension: Dimension, name: str) -> dict[str, object]:
    """Settings of a dimension's first point: the first value, an interval's lower end."""
    if isinstance(dimension, Paired):
        return dict(dimension.values[0])
    return {name: dimension.values[0] if isinstance(dimension, Choice) else dimension.low}


def _faults(name: str, values: object, given: set[str]) -> Iterator[Violation]:
    """What is wrong with one entry of `sweep.paired` by itself."""
    where = f"sweep.paired.{name}"
    if not isinstance(values, list) or not values or not all(isinstance(v, dict) and v for v in values):
        fix = "write NAME: [{peft.r: 8, peft.lora_alpha: 16}, {peft.r: 16, peft.lora_alpha: 32}]"
        yield Violation(where, values, "is no list of mappings", fix)
        return
    for key in dict.fromkeys(str(key) for value in values for key in value):
        if not of_a_trial(key):
            yield _not_of_a_trial(where, key, None)
        elif key in given:
            why = f"{key} has one value on the command line"
            yield Violation(where, key, why, f"leave {key}=… out, or take it out of the pairs")


def _not_of_a_trial(where: str, key: str, value: object) -> Violation:
    fix = f"set {key} once, on the command line"
    return Violation(where, value, f"{key} is of the whole sweep and no setting of a trial", fix)


def _uncomposable(
    dimensions: dict[str, Dimension], names: Sequence[str], shared: Sequence[Override], options: Sequence[str]
) -> list[Violation]:
    """What is wrong with the values of dimensions that are not on the command line, which was checked before.

    Each is composed with the first of all others, as `check_command` does with a swept key's.
    """
    wrong: dict[object, Violation] = {}
    base = [o for o in map(plain, shared) if of_a_trial(key_of(o))]
    for name in names:
        dimension = dimensions[name]
        others: dict[str, object] = {}
        for other in dimensions.keys() - {name}:
            others |= first_settings(dimensions[other], other)
        for settings in _each(dimension, name):
            point = others | settings
            line = [o for o in base if key_of(o) not in point]
            line += [f"{key}={text(value)}" for key, value in point.items()]
            where = f" (in sweep.{'paired' if isinstance(dimension, Paired) else 'space'})"
            for v in _violations(line, options):
                unknown = v.why in ("there is no such key", "there is no such field")  # whatever its value
                wrong.setdefault((v.key, v.why) if unknown else str(v), replace(v, why=v.why + where))
    return [*wrong.values()]


def _each(dimension: Dimension, name: str) -> Iterator[dict[str, object]]:
    if isinstance(dimension, Paired):
        yield from (dict(v) for v in dimension.values[:_MOST_VALUES])
        return
    ends = (dimension.low, dimension.high) if isinstance(dimension, Float | Int) else dimension.values
    for value in ends[:_MOST_VALUES]:
        yield {name: value}


def _violations(line: Sequence[str], options: Sequence[str]) -> list[Violation]:
    """What is wrong with a command line; composes beside the Hydra that runs this sweep."""
    there = GlobalHydra.instance()
    running = there.hydra
    there.clear()
    try:
        check_command(rewrite([*line]), multirun=True, args=arguments([*options]))
    except UserError as error:
        return error.violations
    finally:
        GlobalHydra.instance().clear()
        if running is not None:
            GlobalHydra.instance().initialize(running)
    return []


def _dimension(override: Override) -> Dimension:
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return Choice(*map(_unescaped, override.sweep_string_iterator()))
    assert value.start is not None and value.end is not None
    log = "log" in value.tags
    if isinstance(value.start, int) and isinstance(value.end, int):
        return Int(value.start, value.end, log=log)
    return Float(float(value.start), float(value.end), log=log)


def _unescaped(value: str) -> str:
    """A value as it is meant: unquoted, Hydra writes some characters with a backslash before them; `text` quotes them."""
    return value if value[:1] in ("'", '"', "[", "{") else re.sub(r"\\(.)", r"\1", value)
