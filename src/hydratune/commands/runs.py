"""`hydratune runs`: what was trained, with which settings, and how it went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from hydratune import terminal
from hydratune.amounts import duration
from hydratune.commands.common import Home, clear
from hydratune.errors import UserError, Violation, nearest
from hydratune.objective import direction
from hydratune.runs import HOME, Run, differences, find_runs, matching

_OF_A_RUN = ("status", "name", "algo")
_FIRST = ("lr", "peft.type")  # of the settings that differ, where there is no room for all
_NARROWEST = 24  # characters of a name, whose end is what other commands take


@clear
def runs(
    filters: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILTER", help="KEY=VALUE, or with != < <= > >= or ~ (contains)."),
    ] = None,
    home: Home = HOME,
    sort: Annotated[
        str | None, typer.Option(help="By a setting or metric, the best first; default: the newest first.")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    columns: Annotated[
        str | None,
        typer.Option(help="Settings and metrics to show, with commas; default: the settings that differ."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Runs to show; 0: all.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """List runs: their state, settings that differ, result.

    Example: `hydratune runs 'lr<1e-4' peft=lora --sort eval_loss`
    """
    if not home.is_dir():
        raise UserError(
            Violation("--home", str(home), "there is no such folder", "give the one with the runs")
        )
    everything = find_runs(home)
    chosen = matching(everything, filters or [])
    if sort is not None:
        chosen = _sorted(chosen, sort)
    chosen = chosen[::-1] if reverse else chosen
    shown = chosen[: limit or None]
    asked = list(dict.fromkeys(name.strip() for name in columns.split(","))) if columns is not None else None
    for name in asked or ():
        _known(shown, name, "--columns")
    if as_json:
        print(json.dumps([_facts(run, [*run.config] if asked is None else asked) for run in shown], indent=2))
        return
    console = Console()
    if shown:
        differing = [key for key in differences(shown) if key != "algo.name"]
        keys = sorted(differing, key=lambda key: key not in _FIRST) if asked is None else asked
        _table(console, shown, keys, fixed=asked is not None)
    rest = f", {len(shown)} shown: --limit 0 shows all" if len(shown) < len(chosen) else ""
    of = f" of {len(everything)}" if len(chosen) < len(everything) else ""
    terminal.say(
        console,
        f"{len(chosen)}{of} runs{rest}" if everything else f"no runs below {home} yet: python train.py",
    )


def _known(runs: Sequence[Run], key: str, option: str) -> None:
    if runs and all(run.value(key) is None for run in runs):
        known = {k for run in runs for k in (*run.config, *run.final)}
        known |= {"status", "name", "started", "objective", "steps", "seconds", "tokens_per_second"}
        raise UserError(Violation(option, key, "no run has it", nearest(key, sorted(known))))


def _sorted(runs: list[Run], key: str) -> list[Run]:
    """The best first where the name tells what is better, else the least; runs without a value last."""
    _known(runs, key, "--sort")
    judged = next((run.objective[0] for run in runs if run.objective[0]), "") if key == "objective" else key
    down = key == "started" or direction(judged) == "maximize"
    having = [run for run in runs if run.value(key) is not None]
    numbers = all(isinstance(run.value(key), int | float) for run in having)
    having.sort(key=lambda run: run.value(key) if numbers else str(run.value(key)), reverse=down)
    return having + [run for run in runs if run.value(key) is None]


def _facts(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    name, value = run.objective
    return {
        "name": run.name,
        "path": str(run.path),
        "status": run.status,
        "algo": run.value("algo"),
        "started": run.started,
        "objective": {"name": name, "value": value} if name else None,
        "steps": run.value("steps"),
        "seconds": run.value("seconds"),
        "settings": {key: run.value(key) for key in keys},
        "metrics": run.final,
    }


def shown(value: Any) -> str:
    """A setting or metric in a cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def setting(run: Run, key: str) -> Any:
    """Of the config, lists too, or what else a run knows by this name."""
    value = run.config.get(key)
    return run.value(key) if value is None else value


def _table(console: Console, runs: Sequence[Run], keys: Sequence[str], *, fixed: bool) -> None:
    """Status, name and algorithm, the keys, objective, steps and time; of the keys as many as fit, unless fixed."""
    names = {run.objective[0] for run in runs} - {""}
    judged = names.pop() if len(names) == 1 else ""
    keys = [key for key in keys if key not in (judged, "steps")]  # which are shown anyway
    front: list[list[Any]] = [
        [terminal.state(run.status), run.name, str(run.value("algo") or "–")] for run in runs
    ]
    back = [_results(run, judged) for run in runs]
    cells = {key: [shown(setting(run, key)) for run in runs] for key in keys}
    header_back = [judged or "objective", "steps", "time"]
    width = terminal.room(console)
    needed = sum(terminal.width_of(_OF_A_RUN[i], [row[i] for row in front]) for i in (0, 2))
    needed += sum(terminal.width_of(header_back[i], [row[i] for row in back]) for i in range(3))
    longest = terminal.width_of("name", [run.name for run in runs])
    kept, left = [], width - needed - min(longest, _NARROWEST + 2)
    for key in keys:
        own = terminal.width_of(key, cells[key])
        if fixed or own <= left:
            kept.append(key)
            left -= own
    for_name = max(_NARROWEST, left + min(longest, _NARROWEST + 2) - 2)
    if console.is_terminal:
        short = terminal.distinct([run.name for run in runs], for_name)
        front = [[row[0], name, row[2]] for row, name in zip(front, short, strict=True)]
    terminal.columns(
        console,
        [*_OF_A_RUN, *kept, *header_back],
        [
            [*a, *(cells[key][i] for key in kept), *b]
            for i, (a, b) in enumerate(zip(front, back, strict=True))
        ],
    )
    if out := [key for key in keys if key not in kept]:
        more = f" and {len(out) - 6} more" if len(out) > 6 else ""
        terminal.say(console, f"also differ: {', '.join(out[:6])}{more} (--columns shows them)")


def _results(run: Run, judged: str) -> list[str]:
    name, value = run.objective
    steps, seconds = run.value("steps"), run.value("seconds")
    if not run.ended:  # not told before the end
        last = run.events[-1:] or [{}]
        steps, seconds = last[0].get("step"), last[0].get("time")
    objective = "–" if value is None else shown(value) if judged else f"{name} {shown(value)}"
    return [objective, shown(steps), "–" if seconds is None else duration(seconds)]
