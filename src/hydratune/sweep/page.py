"""The page of a study: `report.html`, self-contained, and the pages of its trials.

`python -m hydratune.sweep.page DIRECTORY` draws them beside the running sweep, at low priority, from study.json and
the trials' directories alone; it ends after a last look when its standard input closes, as it does when the sweep ends
or is killed. The plots are Optuna's, drawn by plotly, whose script is inside the page: nothing is fetched.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hydratune.amounts import duration
from hydratune.report import write_report
from hydratune.tracking import read_metrics
from hydratune.whole import write_whole

_EVERY = 15.0  # seconds between drawings while the sweep runs
_POINTS = 400  # of one curve
_COLOURS = ("#3b78e7", "#d9572b", "#2a9d5c", "#9657c9", "#c99a1e", "#d1477f", "#1fa3b8", "#7a7f87")
_SCALE = [
    [0.0, "rgb(122,92,240)"],
    [0.5, "rgb(31,163,138)"],
    [1.0, "rgb(227,162,26)"],
]  # seen on light and on dark paper
_NAMED = 8  # curves that are all named in the legend; of more, the best
_STATES = {
    "COMPLETE": "#2a9d5c",
    "PRUNED": "#c99a1e",
    "FAIL": "#c0392b",
    "RUNNING": "#3b78e7",
    "WAITING": "#7a7f87",
}


def main() -> int:
    directory = Path(sys.argv[1])
    with contextlib.suppress(OSError):
        os.nice(19)
    warnings.filterwarnings("ignore")
    seen = drawn = -1.0
    last = time.monotonic() + 1 - _EVERY  # the first page soon, so that there is something to see
    while True:
        ended = bool(select.select([sys.stdin], [], [], 0.5)[0])
        with contextlib.suppress(
            OSError, ValueError
        ):  # read while it was being replaced: the next look draws it
            stamp = (directory / "study.json").stat().st_mtime
            if stamp != seen:
                draw_trials(directory)
                seen = stamp
            if stamp != drawn and (ended or time.monotonic() - last > _EVERY):
                draw(directory)
                drawn, last = stamp, time.monotonic()
        if ended:
            return 0


def draw_trials(directory: Path) -> None:
    """Write the pages of the trials that have ended and have none yet."""
    for folder in directory.glob("[0-9]*"):
        summary, report = folder / "summary.json", folder / "report.html"
        if summary.is_file() and not (report.is_file() and report.stat().st_mtime >= summary.stat().st_mtime):
            write_report(folder)


def draw(directory: Path) -> None:
    """Write the study's page."""
    facts = json.loads((directory / "study.json").read_text(encoding="utf-8"))
    write_whole(directory / "report.html", page(directory, facts))


def page(directory: Path, facts: dict[str, Any]) -> str:
    """The page as one text.

    Args:
        facts: study.json, as `export.Exporter` writes it.
    """
    import plotly.offline

    trials = facts["trials"]
    names = list(dict.fromkeys(name for t in trials for name in t["settings"]))
    environment = Environment(
        loader=PackageLoader("hydratune"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = [(title, _json(figure)) for title, figure in plots(directory, facts)]
    order = _order(facts)
    return environment.get_template("sweep.html.j2").render(
        facts=facts,
        names=names,
        trials=sorted(trials, key=order),
        front=set(facts["front"]),
        states=_states(trials),
        spent=duration(sum(t["seconds"] or 0.0 for t in trials)),
        best=[t for t in trials if t["number"] in facts["front"]],
        figures=[(i, title, Markup(text)) for i, (title, text) in enumerate(figures)],
        script=Markup(plotly.offline.get_plotlyjs()),
        has_page={t["number"] for t in trials if (directory / str(t["number"]) / "report.html").is_file()},
        colours=_COLOURS,
        now=time.strftime("%Y-%m-%d %H:%M"),
    )


def _json(figure: Any) -> str:
    """A figure in colours that can be told apart on light and dark paper."""
    from plotly.colors import sample_colorscale

    bar = (
        [t for t in figure.data if t.mode == "markers" and t.hoverinfo == "skip"]
        if figure.data[0].type == "scatter"
        else []
    )
    for trace in figure.data:
        if bar and trace.customdata is not None and trace.mode == "lines":  # of the parallel coordinates
            place = 1 - trace.y[0] if bar[0].marker.reversescale else trace.y[0]
            trace.line.color, trace.line.width, trace.opacity = sample_colorscale(_SCALE, place)[0], 2, 0.8
        elif trace.type == "bar":
            trace.marker.color = _STATES.get(trace.name, _COLOURS[0])
            if trace.name not in _STATES:  # of the importance, where the labels say what they are
                figure.layout.yaxis.title = None
        elif getattr(getattr(trace, "marker", None), "colorscale", None):
            trace.marker.colorscale, trace.marker.line.width = _SCALE, 0
        if trace.x is not None and all(isinstance(x, str) for x in trace.x):
            trace.x = [_bare(x) for x in trace.x]
    for axis in figure.select_xaxes():
        if axis.categoryarray is not None:
            axis.categoryarray = [_bare(x) for x in axis.categoryarray]
    return figure.to_json().replace(
        "<", "\\u003c"
    )  # no text of a user's may end the script, or begin a comment in it


def _bare(text: str) -> str:
    """An entry of a category without the quotes that Optuna's slices put around it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _states(trials: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for t in trials:
        counts[t["state"]] = counts.get(t["state"], 0) + 1
    return counts


def _order(facts: dict[str, Any]) -> Any:
    """Best first, then those without a value, by number."""
    sign = 1.0 if facts["directions"][0] == "minimize" else -1.0
    return lambda t: (not t["values"], sign * t["values"][0] if t["values"] else 0.0, t["number"])


def plots(directory: Path, facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Titles and plotly figures; those that have nothing to show are left out."""
    import optuna.visualization as draw

    study = display_study(facts)
    curves = [(f"{title} of all trials", figure) for title, figure in _curves(directory, facts)]
    done = [t for t in study.trials if t.values]
    objective = facts["objectives"][0]
    found: list[tuple[str, Any]] = []
    several = len(facts["objectives"]) > 1
    names = list(dict.fromkeys(p for t in done for p in t.params))
    varied = [p for p in names if len({str(t.params.get(p)) for t in done}) > 1]

    def first(trial: Any) -> float:
        return trial.values[0]

    chosen: dict[str, Any] = (
        {"target": first, "target_name": objective} if several else {"target_name": objective}
    )
    # importance looks at what makes the target low; for one objective Optuna minds the direction itself
    sign = 1.0 if facts["directions"][0] == "minimize" else -1.0
    ranked = {"target": lambda trial: sign * trial.values[0], "target_name": objective} if several else {}
    makers: list[tuple[str, Any, bool]] = [
        ("History", lambda: draw.plot_optimization_history(study, **chosen), len(done) > 0),
        (
            "Pareto front",
            lambda: draw.plot_pareto_front(study, target_names=facts["objectives"]),
            several and len(facts["objectives"]) <= 3 and bool(done),
        ),
        (
            "Importance of each parameter",
            lambda: draw.plot_param_importances(study, **ranked),
            len(done) > 2 and bool(varied),
        ),
        (
            "Parallel coordinates",
            lambda: draw.plot_parallel_coordinate(study, params=varied, **chosen),
            len(done) > 1 and bool(varied),
        ),
        ("Slices", lambda: draw.plot_slice(study, params=varied, **chosen), len(done) > 1 and bool(varied)),
        (
            "Reported values",
            lambda: draw.plot_intermediate_values(study),
            not curves and any(t.intermediate_values for t in study.trials),
        ),
        ("Timeline", lambda: draw.plot_timeline(study), any(t.datetime_start for t in study.trials)),
    ]
    for title, make, able in makers:
        if able:
            with contextlib.suppress(
                ValueError, RuntimeError
            ):  # too little to compute it from, e.g. no variance
                found.append((title, make()))
    found[1:1] = curves
    return found


def display_study(facts: dict[str, Any]) -> Any:
    """The study in memory as the plots want it: texts that are numbers become numbers."""
    from datetime import datetime

    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = {
        "complete": TrialState.COMPLETE,
        "running": TrialState.RUNNING,
        "waiting": TrialState.WAITING,
        "failed": TrialState.FAIL,
        "crashed": TrialState.FAIL,
    }
    values: dict[str, list[Any]] = {}
    for t in facts["trials"]:
        for name, value in t["params"].items():
            values.setdefault(name, []).append(value)
    numeric = {name: all(_number(v) is not None for v in found) for name, found in values.items()}
    domains: dict[str, Any] = {}
    for name, found in values.items():
        if not numeric[name]:
            domains[name] = CategoricalDistribution(list(dict.fromkeys(map(str, found))))
            continue
        numbers: list[Any] = [_number(v) for v in found]
        low, high = min(numbers), max(numbers)
        whole = all(float(n).is_integer() for n in numbers)
        log = low > 0 and (high / low >= 50 or "(log)" in facts["space"].get(name, ""))
        domains[name] = (
            IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)
        )
    study = optuna.create_study(directions=facts["directions"], study_name=facts["name"])
    for t in facts["trials"]:
        params: dict[str, Any] = {n: _number(v) if numeric[n] else str(v) for n, v in t["params"].items()}
        params = {n: int(v) if isinstance(domains[n], IntDistribution) else v for n, v in params.items()}
        state = states.get(t["state"], TrialState.PRUNED)
        made = create_trial(
            state=state,
            values=t["values"] if state == TrialState.COMPLETE else None,
            params=params,
            distributions={n: domains[n] for n in params},
            intermediate_values={int(k): v for k, v in t["intermediate"].items()},
        )
        made.datetime_start = datetime.fromtimestamp(t["started"]) if t["started"] else None
        made.datetime_complete = datetime.fromtimestamp(t["ended"]) if t["ended"] else None
        study.add_trial(made)
    return study


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _curves(directory: Path, facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Training and evaluation loss, and the objective, one line a trial."""
    import plotly.graph_objects as go

    metric = facts["objectives"][0].partition(":")[0]
    wanted = {"loss": "Training loss", "eval_loss": "Evaluation loss"}
    wanted.setdefault(metric, metric)
    events = {t["number"]: read_metrics(directory / str(t["number"])) for t in facts["trials"]}
    found = []
    for key, title in wanted.items():
        figure = go.Figure(layout={"xaxis_title": "step", "yaxis_title": key})
        for i, t in enumerate(facts["trials"]):
            points = [(e["step"], e[key]) for e in events[t["number"]] if isinstance(e.get(key), int | float)]
            points = points[:: max(1, len(points) // _POINTS)]
            if not points:
                continue
            best = t["number"] in facts["front"]
            text = " ".join(f"{k}={v}" for k, v in t["settings"].items())
            steps, values = zip(*points, strict=True)
            figure.add_scatter(
                x=steps, y=values, mode="lines+markers" if len(points) < 30 else "lines", name=f"{t['number']}{' ★' if best else ''}",
                showlegend=best or len(facts["trials"]) <= _NAMED, hovertext=f"trial {t['number']}, {t['state']}: {text}", opacity=1.0 if best else 0.65,
                line={"width": 3 if best else 1.5, "color": _COLOURS[i % len(_COLOURS)], "dash": "dot" if t["state"] == "pruned" else "solid"},
            )  # fmt: skip
        if figure.data:
            found.append((title, figure))
    return found


if __name__ == "__main__":
    sys.exit(main())
