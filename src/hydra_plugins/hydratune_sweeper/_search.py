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
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext
from omegaconf import DictConfig

from hydra_plugins.hydratune_sweeper import _ahead
from hydra_plugins.hydratune_sweeper._space import all_dimensions, of_a_trial, plain, swept_dimensions
from hydratune.checks import loggable
from hydratune.config import key_of, parse
from hydratune.errors import TrainingFailed, UserError, Violation, nearest
from hydratune.functions import resolve
from hydratune.objective import Objective, default, direction
from hydratune.settings import RunSettings
from hydratune.sweep.job import Command
from hydratune.sweep.space import Dimension, Space
from hydratune.sweep.supervisor import Result, near
from hydratune.sweep.sweep import Sweep
from hydratune.sweep.trial import Bound
from hydratune.sweep.view import Outlet, show_plan
from hydratune.whole import write_whole

_NOT_OF_A_STUDY = ("run_name", "debug", "tracking")  # may change while a study goes on


def run(arguments: list[str], config: DictConfig, context: HydraContext) -> Result | None:
    """Carry out the search that the overrides describe; None when only the plan was asked for."""
    parser = OverridesParser.create(config_loader=context.config_loader)
    swept: list[Override] = []
    shared: list[Override] = []
    for override in parser.parse_overrides(arguments):
        (swept if override.is_sweep_override() else shared).append(override)
    dimensions = swept_dimensions(swept)
    settings = _settings(config, shared, dimensions)
    search = settings.sweep
    dimensions = all_dimensions(parser, dimensions, shared, search, _options(config))
    function = resolve(search.space_function, "sweep.space_function") if search.space_function else None
    space = Space(dimensions, function)
    base = [o for o in map(plain, shared) if of_a_trial(key_of(o))]
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
        warm_with=() if prefix else _ahead.lines(base, dimensions),
        decided_by=None if prefix or function else _ahead.deciding(base, dimensions),
    )
    sweep = Sweep(
        command, space, search, objectives=objectives, directory=directory, seed=settings.seed, base=lasting
    )
    if settings.check:
        show_plan(sweep.plan())
        return None
    line = ["-m", *_options(config), *(plain(o) for o in [*shared, *swept])]
    known = {"script": str(script), "folder": str(Path.cwd()), "name": search.name, "arguments": line}
    result = sweep.run(accepted=lambda: write_whole(directory / "command.json", json.dumps(known)))
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
        return parse(config, choices=choices, overrides=[plain(o) for o in shared])
    except UserError as error:
        swept = {key.partition(".")[0] for key in dimensions}
        left = [v for v in error.violations if v.key.partition(".")[0] not in swept]
        if left:
            raise UserError(left) from error
        raise


def _objectives(settings: RunSettings) -> list[str]:
    if settings.objective:
        return [settings.objective] if isinstance(settings.objective, str) else list(settings.objective)
    return [default(loggable(settings))]


def _check_metrics(settings: RunSettings, objectives: Sequence[str]) -> None:
    """
    Raises:
        UserError: an objective, a bound or what the pruner sees is nothing that a trial logs.
    """
    known, wrong, search = loggable(settings), [], settings.sweep
    during = [
        name for name in known if name != "verified_accuracy"
    ]  # which is known at the end, if rows have answers
    of = {"objective": known, "sweep.prune_on": during}
    of["sweep.constraints"] = known if settings.data.source == "builtin" else during
    named = {"objective": [Objective.parse(o).metric for o in objectives]}
    named["sweep.constraints"] = [Bound.parse(c).metric for c in search.constraints]
    named["sweep.prune_on"] = [search.prune_on] if search.prune_on else []
    for key, metrics in named.items():
        for metric in metrics:
            if metric not in of[key]:
                wrong.append(
                    Violation(
                        key,
                        metric,
                        "no such metric is logged",
                        f"{nearest(metric, of[key])} (logged: {', '.join(of[key])})",
                    )
                )
    objective = named["objective"][0]
    given = search.direction[:1] if isinstance(search.direction, list) else [search.direction]
    ways = [direction(search.prune_on or ""), (given and given[0]) or direction(objective)]
    if search.prune_on != objective and None not in ways and ways[0] != ways[1]:
        why = f"more of the one is better and less of the other ({objective})"
        wrong.append(
            Violation(
                "sweep.prune_on", search.prune_on, why, "name a metric that is better in the same direction"
            )
        )
    seen = search.prune_on or objective
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


def _say_where(result: Result, command: Command) -> None:
    if not result.front:
        return
    where, out = near(result.directory), Outlet(sys.stdout)
    out.write(
        f"again      {command.line(result.best.settings)}\n"
        f"settings   python train.py --config-dir {where} --config-name best\n"
        f"results    {where}/report.html, trials.csv, study.md, best.sh\n"
    )
    out.flush()
