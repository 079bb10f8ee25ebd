"""From overrides to a search: the space, what all trials have in common, the study's name."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import HydraContext
from omegaconf import DictConfig

from hydratune.checks import evaluates, loggable
from hydratune.command import as_values
from hydratune.config import key_of, parse
from hydratune.errors import TrainingFailed, UserError, Violation, nearest
from hydratune.functions import resolve
from hydratune.objective import Objective, direction
from hydratune.settings import RunSettings
from hydratune.sweep.export import whole
from hydratune.sweep.job import Command
from hydratune.sweep.space import Choice, Dimension, Float, Int, Paired, Space
from hydratune.sweep.supervisor import Result, near
from hydratune.sweep.sweep import Sweep
from hydratune.sweep.trial import Bound
from hydratune.sweep.view import show_plan

_NOT_OF_A_TRIAL = ("output_dir", "resume", "check", "sweep", "hydra")  # of the overrides
_NOT_OF_A_STUDY = ("run_name", "debug", "tracking")  # may change while a study goes on
_WARM = 6  # command lines whose data and weights are read ahead


def run(arguments: list[str], config: DictConfig, context: HydraContext) -> Result | None:
    """Carry out the search that the overrides describe; None when only the plan was asked for."""
    parser = OverridesParser.create(config_loader=context.config_loader)
    swept: list[Override] = []
    shared: list[Override] = []
    for override in parser.parse_overrides(arguments):
        (swept if override.is_sweep_override() else shared).append(override)
    if fixed := [
        o for o in swept if key_of(_plain(o)).partition(".")[0].partition("/")[0] in _NOT_OF_A_TRIAL
    ]:
        raise UserError(
            Violation(
                key_of(_plain(o)), o.get_value_string(), "is of the whole sweep and has one value", "give one"
            )
            for o in fixed
        )
    dimensions = {o.key_or_group: _dimension(o) for o in swept}
    settings = _settings(config, shared, dimensions)
    search = settings.sweep
    given = {o.key_or_group for o in [*swept, *shared]}
    for key, values in search.space.items():
        if key not in given:
            (override,) = parser.parse_overrides([f"{key}={as_values(values)}"])
            if not override.is_sweep_override():
                raise UserError(
                    Violation(
                        f"sweep.space.{key}", values, "has one value", "give several, or set it in sweep.base"
                    )
                )
            dimensions[key] = _dimension(override)
    for name, values in search.paired.items():
        if not isinstance(values, list) or not values or not all(isinstance(v, dict) and v for v in values):
            fix = "write NAME: [{peft.r: 8, peft.lora_alpha: 16}, {peft.r: 16, peft.lora_alpha: 32}]"
            raise UserError(Violation(f"sweep.paired.{name}", values, "is no list of mappings", fix))
        if twice := {key for v in values for key in v} & dimensions.keys():
            raise UserError(
                Violation(
                    f"sweep.paired.{name}", sorted(twice), "is swept by itself too", "leave out one of them"
                )
            )
        dimensions[name] = Paired(*values)
    function = resolve(search.space_function, "sweep.space_function") if search.space_function else None
    space = Space(dimensions, function)
    base = [
        _plain(o)
        for o in shared
        if key_of(_plain(o)).partition(".")[0].partition("/")[0] not in _NOT_OF_A_TRIAL
    ]
    base = [*_options(config), *base]
    objectives = _objectives(settings)
    _check_metrics(settings, objectives)
    lasting = sorted(o for o in base if key_of(o).partition(".")[0] not in _NOT_OF_A_STUDY)
    search.name = search.name or (
        Path(config.output_dir).name if config.output_dir else _name(settings, space, lasting, objectives)
    )
    directory = Path(config.output_dir or Path("outputs/sweeps") / search.name).expanduser().absolute()
    script = Path(sys.argv[0]).resolve()
    prefix = tuple(shlex.split(search.launch_prefix or ""))
    command = Command(
        str(script),
        tuple(base),
        str(Path.cwd()),
        prefix,
        warm_with=() if prefix else _first(base, dimensions),
    )
    sweep = Sweep(
        command, space, search, objectives=objectives, directory=directory, seed=settings.seed, base=lasting
    )
    if settings.check:
        show_plan(sweep.plan())
        return None
    line = ["-m", *_options(config), *(_plain(o) for o in [*shared, *swept])]
    known = {"script": str(script), "folder": str(Path.cwd()), "name": search.name, "arguments": line}
    result = sweep.run(accepted=lambda: whole(directory / "command.json", json.dumps(known)))
    if not any(t.values for t in result.trials):
        reasons = [t.reason for t in result.trials if t.reason] or ["see their console.log"]
        often = max(reasons, key=reasons.count)
        raise TrainingFailed(
            f"no trial of {near(result.directory)} has completed; the most frequent reason: {often}"
        )
    _say_where(result, command)
    return result


def _options(config: DictConfig) -> list[str]:
    """Options of the command line that its trials need too: a config of another folder or name."""
    folders = [s.path for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
    options = [f"--config-dir={folder}" for folder in folders]
    return (
        options
        if config.hydra.job.config_name == "train"
        else [*options, f"--config-name={config.hydra.job.config_name}"]
    )


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


def _plain(override: Override) -> str:
    """An override as a user writes it, without the ++ that train.py has put before it."""
    line = str(override.input_line)
    return line[2:] if line.startswith("++") else line


def _settings(
    config: DictConfig, shared: Sequence[Override], dimensions: dict[str, Dimension]
) -> RunSettings:
    """The base config, which need not be complete: what is swept over comes with the trials."""
    from hydra.core.hydra_config import HydraConfig

    choices = (
        dict(config.hydra.runtime.choices)
        if "runtime" in config.hydra
        else dict(HydraConfig.get().runtime.choices)
    )
    try:
        return parse(config, choices=choices, overrides=[_plain(o) for o in shared])
    except UserError as error:
        swept = {key.partition(".")[0] for key in dimensions}
        left = [v for v in error.violations if v.key.partition(".")[0] not in swept]
        if left:
            raise UserError(left) from error
        raise


def _objectives(settings: RunSettings) -> list[str]:
    if settings.objective:
        return [settings.objective] if isinstance(settings.objective, str) else list(settings.objective)
    return ["eval_loss" if evaluates(settings) else "loss"]


def _check_metrics(settings: RunSettings, objectives: Sequence[str]) -> None:
    """
    Raises:
        UserError: an objective, a bound or what the pruner sees is nothing that a trial logs.
    """
    known, wrong, search = loggable(settings), [], settings.sweep
    named = {"objective": [Objective.parse(o).metric for o in objectives]}
    named["sweep.constraints"] = [Bound.parse(c).metric for c in search.constraints]
    named["sweep.prune_on"] = [search.prune_on] if search.prune_on else []
    for key, metrics in named.items():
        for metric in metrics:
            if metric not in known:
                wrong.append(
                    Violation(
                        key,
                        metric,
                        "no such metric is logged",
                        f"{nearest(metric, known)} (logged: {', '.join(known)})",
                    )
                )
    ways = [direction(search.prune_on or ""), direction(named["objective"][0])]
    if None not in ways and ways[0] != ways[1]:
        why = f"more of the one is better and less of the other ({named['objective'][0]})"
        wrong.append(
            Violation(
                "sweep.prune_on", search.prune_on, why, "name a metric that is better in the same direction"
            )
        )
    seen = search.prune_on or named["objective"][0]
    if (
        search.pruner != "none"
        and seen.startswith("eval_")
        and settings.algo_options.get("eval_strategy") == "no"
    ):
        why = f"{seen} is not known before the end, because nothing is evaluated on the way"
        fix = "set trainer.eval_strategy=steps trainer.eval_steps=…, or sweep.prune_on=loss"
        wrong.append(Violation("sweep.pruner", search.pruner, why, fix))
    if wrong:
        raise UserError(wrong)


def _name(settings: RunSettings, space: Space, base: Sequence[str], objectives: Sequence[str]) -> str:
    """The study's name: readable, and the same for the same command."""
    groups = [
        settings.choices.get(g, "") for g in ("algo", "model", "data", "peft") if g not in space.dimensions
    ]
    keys = [key.rpartition(".")[2] for key in space.dimensions][:4]
    words = "-".join(w for w in [*groups, *keys] if w and w != "none")
    facts = json.dumps([list(base), space.describe(), list(objectives)], sort_keys=True)
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', words)[:60]}-{hashlib.sha256(facts.encode()).hexdigest()[:6]}"


def _first(base: Sequence[str], dimensions: dict[str, Dimension]) -> tuple[tuple[str, ...], ...]:
    """Command lines with the data and the models that trials will want: the first point, and each other data or model."""
    point = {k: d.values[0] if isinstance(d, Choice) else None for k, d in dimensions.items()}
    first = [f"{k}={v}" for k, v in point.items() if v is not None]
    lines = [[*base, *first]]
    for key, dimension in dimensions.items():
        if key.partition(".")[0] in ("data", "model") and isinstance(dimension, Choice):
            rest = [o for o in first if key_of(o) != key]
            lines += [[*base, *rest, f"{key}={value}"] for value in dimension.values[1:]]
    return tuple(tuple(line) for line in lines[:_WARM])


def _say_where(result: Result, command: Command) -> None:
    if not result.front:
        return
    where = near(result.directory)
    print(f"again      {command.line(result.best.settings)}")
    print(f"settings   python train.py --config-dir {where} --config-name best")
    print(f"results    {where}/report.html, trials.csv, study.md, best.sh")
