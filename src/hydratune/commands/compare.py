"""`hydratune compare`: in what runs differ, and which of them came out better."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hydratune import terminal
from hydratune.amounts import amount, duration
from hydratune.commands.common import Home, clear
from hydratune.commands.runs import shown
from hydratune.errors import UserError, Violation, nearest
from hydratune.objective import direction
from hydratune.runs import HOME, Run, differences, find_run, find_runs, is_study, metric_names, points

_ONLINE = {"ppo", "grpo"}
_OF_A_LOSS = {"algo.beta", "algo.loss_type", "model.tokenizer", "model.chat_template_path"}
# of data.*, all but these change which rows a loss is of, or how they are put
_HOW = {"data.max_samples", "data.streaming", "data.num_proc", "data.cache"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_POINTS = 16  # of a curve in a cell
_BESIDE = 5  # runs that stand side by side; more of them below each other
_UNTOLD = (
    "runtime",
    "per_second",
    "flos",
    "grad_norm",
    "entropy",
    "memory_gib",
)  # not what a run is compared by unless it is asked for


@clear
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Runs, or the folder or name of a study: its trials.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric to compare by, instead of the usual ones; may be repeated."),
    ] = None,
    home: Home = HOME,
    limit: Annotated[int, typer.Option(help="Runs to show, the best first; 0: all.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Hold runs, or a study's trials, against each other.

    Example: `hydratune compare RUN latest --metric eval_loss`
    """
    found = _found(runs, home)
    if len(found) < 2:
        raise UserError(Violation("RUN", " ".join(runs), "is one run", "name two or more, or a study"))
    settings = {k: v for k, v in differences(found).items() if k != "algo.name"}
    metrics = _metrics(found, metric or [])
    if as_json:
        print(json.dumps(_facts(found, settings, metrics), indent=2))
        return
    console = Console()
    order = _ranked(found, metrics)
    few = order[: limit or None]
    unfair = _unfair(found, settings)
    rows = [*_settings(found, settings), *_results(found, metrics, unfair), *_costs(found)]
    if len(few) <= _BESIDE:
        few = sorted(few)  # as they were named
    _print(console, [found[i].name for i in few], [(name, [cells[i] for i in few]) for name, cells in rows])
    if not settings:
        terminal.say(console, "no setting differs")
    elif unfair and any(_is_loss(name) for name in metrics):
        terminal.say(console, f"no loss is marked: {unfair}")
    if len(few) < len(found):
        terminal.say(console, f"{len(found)} runs, the {len(few)} best shown: --limit 0 shows all")


def _found(names: Sequence[str], home: Path) -> list[Run]:
    """The runs of names, each once; a study stands for its trials that wrote anything."""
    found: list[Run] = []
    known = cache(lambda: find_runs(home))  # once, when a first name needs it
    for name in names:
        places = (Path(name).expanduser(), home / name, home / "sweeps" / name)
        study = next(filter(is_study, places), None)
        trials = sorted(find_runs(study), key=_number) if study is not None else [find_run(name, home, known)]
        if study is not None and len(trials) < (2 if len(names) == 1 else 1):
            why = "only one trial of this study has begun" if trials else "no trial of this study has begun"
            raise UserError(Violation("RUN", name, why, "let it go on, or name another run too"))
        found += trials
    return [*{run.path.resolve(): run for run in found}.values()]


def _number(run: Run) -> tuple[int, str]:
    return (int(run.name), "") if run.name.isdigit() else (0, run.name)


def _metrics(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """Those asked for; else the objective, and what was evaluated or else trained by, where the name tells what is better.

    Raises:
        UserError: no run has one that was asked for.
    """
    known = dict.fromkeys(name for run in runs for name in run.final)
    for name in asked:
        if name not in known and name not in metric_names(runs):
            raise UserError(Violation("--metric", name, "no run has logged it", nearest(name, known)))
    if asked:
        return list(dict.fromkeys(asked))
    told = [n for n in known if direction(n) and not any(word in n for word in _UNTOLD)]
    evaluated = [n for n in told if n.startswith("eval_") or n == "verified_accuracy"]
    objectives = [run.objective[0].partition(":")[0] for run in runs]
    first = [name for name in objectives if name in known]
    return list(dict.fromkeys([*first, *(evaluated or told)]))


def _ranked(runs: Sequence[Run], metrics: Sequence[str]) -> list[int]:
    """Indices of the runs, the best by their objective first, or by the first metric where they have several."""
    names = {run.objective[0] for run in runs}
    name = names.pop() if len(names) == 1 else (metrics or [""])[0]
    values = [run.objective[1] if run.objective[0] == name else run.final.get(name) for run in runs]
    sign = -1.0 if direction(name.partition(":")[0]) == "maximize" else 1.0
    keys = [math.inf if value is None else sign * value for value in values]
    return sorted(range(len(runs)), key=keys.__getitem__)


def _settings(runs: Sequence[Run], settings: dict[str, list[Any]]) -> list[tuple[str, list[Text]]]:
    rows = [("status", [terminal.state(run.status) for run in runs])]
    if len({run.value("algo") for run in runs}) > 1:
        rows.append(("algo", [Text(str(run.value("algo") or "–")) for run in runs]))
    return rows + [(key, [Text(shown(value)) for value in values]) for key, values in settings.items()]


def _is_loss(name: str) -> bool:
    return name.partition(":")[0].endswith(("loss", "perplexity"))


def _unfair(runs: Sequence[Run], settings: Mapping[str, list[Any]]) -> str:
    """Why the losses of these runs cannot be held against each other; "" when they can."""
    algos = {run.value("algo") for run in runs}
    if len(algos) > 1:
        return "the algorithms differ"
    if online := algos & _ONLINE:
        return f"the loss of {online.pop()} says nothing about the model"
    changed = [key for key in settings if key in _OF_A_LOSS or (key.startswith("data.") and key not in _HOW)]
    if any(run.config.get("model.tokenizer") is None for run in runs):
        changed += [key for key in settings if key == "model.name_or_path"]  # whose tokenizers may differ
    return f"{changed[0]} differs" if changed else ""


def _results(runs: Sequence[Run], metrics: Sequence[str], unfair: str) -> list[tuple[str, list[Text]]]:
    """Final values with the best marked, their best ones where these differ, and curves on one scale."""
    rows: list[tuple[str, list[Text]]] = []
    objectives = [run.objective for run in runs]
    names = {name for name, _ in objectives}
    if len(names) > 1 or not names <= set(metrics):
        cells = [Text("–" if v is None else f"{name} {shown(v)}") for name, v in objectives]
        if len(names) == 1:
            fair = not (unfair and _is_loss(min(names)))
            cells = _marked([v for _, v in objectives], min(names), fair=fair)
        rows.append(("objective" if len(names) > 1 else f"objective {min(names)}", cells))
    bests = [(run.summary.get("metrics") or {}).get("best") or {} if run.ended else {} for run in runs]
    finals = [run.final for run in runs]
    logged = [run.events for run in runs] if metrics and len(runs) <= _BESIDE else []
    for name in metrics:
        fair = not (unfair and _is_loss(name))
        rows.append((name, _marked([final.get(name) for final in finals], name, fair=fair)))
        if any(name in b and b[name] != f.get(name) for b, f in zip(bests, finals, strict=True)):
            values = [b.get(name, f.get(name)) for b, f in zip(bests, finals, strict=True)]
            rows.append(("  its best", _marked(values, name, fair=fair)))
        curves = [points(events, name)[1] for events in logged]
        if any(len(values) > 1 for values in curves):
            rows.append(("  its curve", [Text(line) for line in sparklines(curves)]))
    return rows


def _marked(values: Sequence[float | None], name: str, *, fair: bool = True) -> list[Text]:
    """Values, the best with a star where they are not all the same."""
    given = [v for v in values if v is not None] if fair else []
    better = {"minimize": min, "maximize": max}.get(direction(name.partition(":")[0]) or "")
    best = better(given) if better and len(set(given)) > 1 else None
    return [
        Text(f"{shown(value)} ★", style="bold green")
        if value is not None and value == best
        else Text(shown(value))
        for value in values
    ]


def _costs(runs: Sequence[Run]) -> list[tuple[str, list[Text]]]:
    def cells(key: str, form: Any) -> list[Text]:
        return [Text("–" if run.value(key) is None else form(run.value(key))) for run in runs]

    peaks = [(run.summary.get("peak_memory") or {}).get("bytes") for run in runs]
    return [
        ("steps", cells("steps", shown)),
        ("tokens/s", cells("tokens_per_second", amount)),
        ("time", cells("seconds", duration)),
        ("peak memory", [Text("–" if peak is None else f"{peak / 2**30:.1f} GiB") for peak in peaks]),
    ]


def sparklines(curves: Sequence[Sequence[float]]) -> list[str]:
    """Each curve as a line of blocks, all on one scale; thinned out where there are more points than places."""
    finite = [v for values in curves for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def block(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.0
        return _BLOCKS[round(share * (len(_BLOCKS) - 1))]

    def thinned(values: Sequence[float]) -> list[float]:
        if len(values) <= _POINTS:
            return [*values]
        return [values[round(i * (len(values) - 1) / (_POINTS - 1))] for i in range(_POINTS)]

    return ["".join(block(v) for v in thinned(values) if math.isfinite(v)) for values in curves]


def _print(console: Console, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]]) -> None:
    """The runs side by side when they are few and fit, else one below the other."""
    first = terminal.width_of("", [name for name, _ in rows])
    widths = [terminal.width_of(name, [cells[i] for _, cells in rows]) for i, name in enumerate(names)]
    narrow = [terminal.width_of("", [cells[i] for _, cells in rows]) for i in range(len(names))]
    place = terminal.room(console) - first
    if len(names) > _BESIDE or sum(narrow) > place:
        kept = [(name, cells) for name, cells in rows if not name.startswith("  ")]
        terminal.columns(
            console,
            ["run", *(name for name, _ in kept)],
            [[run, *(cells[i] for _, cells in kept)] for i, run in enumerate(names)],
        )
        return
    if sum(widths) > place and console.is_terminal:
        names = terminal.distinct(names, max(*narrow, place // len(names)) - 2)
    terminal.columns(console, ["", *names], [[Text(name, style="bold"), *cells] for name, cells in rows])


def _facts(runs: Sequence[Run], settings: dict[str, list[Any]], metrics: Sequence[str]) -> dict[str, Any]:
    finals = [run.final for run in runs]
    values = {name: [final.get(name) for final in finals] for name in metrics}
    best = {}
    unfair = _unfair(runs, settings)
    for name, of in values.items():
        fair = not (unfair and _is_loss(name))
        marked = [cell.plain.endswith("★") for cell in _marked(of, name, fair=fair)]
        best[name] = [run.name for run, is_best in zip(runs, marked, strict=True) if is_best]
    return {
        "runs": [run.name for run in runs],
        "status": [run.status for run in runs],
        "objective": [{"name": run.objective[0], "value": run.objective[1]} for run in runs],
        "settings": settings,
        "metrics": values,
        "best": best,
    }
