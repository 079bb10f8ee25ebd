"""What the page does: every two seconds it looks at the runs, and what has changed is drawn again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from dash import ALL, MATCH, Dash, Input, Output, Patch, State, ctx, no_update

from hydratune.dashboard import layout, library
from hydratune.dashboard.chart import chart
from hydratune.dashboard.library import Library
from hydratune.dashboard.studies import Studies
from hydratune.runs import Run

_PICKED = 1  # runs that are selected on a page that names none: the one that wrote last


def build(runs: Library, studies: Studies) -> Dash:
    """The page of runs as a Dash app: `.server` is its WSGI application."""
    app = Dash(
        "hydratune.dashboard",
        assets_folder=str(Path(__file__).parent / "assets"),
        title="hydratune",
        update_title="",
        serve_locally=True,
        compress=False,
        suppress_callback_exceptions=True,
    )
    app.layout = lambda: layout.page(runs.home, *_table(runs.runs(), ""))
    _table_callbacks(app, runs, studies)
    _selection_callbacks(app, runs, studies)
    _curve_callbacks(app, runs)
    return app


def _table(runs: list[Run], text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and columns; a run that the filter leaves out stays in the rows, so that it may stay selected.

    Raises:
        ValueError: the filter cannot be read, or names what no run has.
    """
    shown = library.chosen(runs, text)
    names = {run.name for run in shown}
    settings = library.setting_columns(shown)
    rows = [
        library.row(run)
        | {"shown": run.name in names}
        | {f"set:{key}": library.setting(run, key) for key in settings}
        for run in runs
    ]
    return rows, layout.columns(settings)


def _table_callbacks(app: Dash, runs: Library, studies: Studies) -> None:
    @app.callback(
        Output("runs", "rowData"), Output("runs", "columnDefs"), Output("message", "children"), Output("counts", "children"),
        Output("studies", "children"), Output("studies-section", "hidden"), Output("runs", "style"), Output("seen", "data"),
        Input("tick", "n_intervals"), Input("filter", "value"), State("seen", "data"),
    )  # fmt: skip
    def look(_: Any, text: str | None, seen: dict[str, str] | None) -> Any:
        now, message = runs.runs(), ""
        try:
            rows, columns = _table(now, text or "")
        except ValueError as error:
            (rows, columns), message = _table(now, ""), str(error)
        places = studies.places()[::-1]
        cards, closed = [], {_below(runs, f): why for f, why in studies.unreadable.copy().items()}
        for place in places:
            try:
                cards.append(_study(studies, place))
            except Exception as error:  # its database has gone: of a driver, many kinds
                closed[_below(runs, place.folder)] = (str(error).splitlines() or [type(error).__name__])[0]
        shown, live = sum(r["shown"] for r in rows), sum(r["status"] == "running" for r in rows)
        counts = f"{shown} of {len(rows)} runs" if shown < len(rows) else f"{len(rows)} runs"
        counts += f", {live} running" if live else ""
        parts = {
            "rows": rows, "columns": columns, "message": message, "counts": counts, "cards": [cards, closed],
        }  # fmt: skip
        stamps = {name: f"{hash(json.dumps(part, default=str)):x}" for name, part in parts.items()}
        if stamps == seen:
            return (no_update,) * 8
        fresh = {name: (seen or {}).get(name) != stamp for name, stamp in stamps.items()}
        drawn = [layout.study_card(c) for c in cards] + [layout.closed_card(f, w) for f, w in closed.items()]
        return (
            rows if fresh["rows"] else no_update,
            columns if fresh["columns"] else no_update,
            message,
            counts,
            drawn if fresh["cards"] else no_update,
            not drawn,
            layout.size(shown),
            stamps,
        )


def _below(runs: Library, folder: Path) -> str:
    return folder.name if folder == runs.home else str(folder.relative_to(runs.home))


def _study(studies: Studies, place: Any) -> dict[str, Any]:
    """What a study's card tells."""
    states: dict[str, int] = {}
    for trial in studies.get_all_trials(place.number, deepcopy=False):
        state = trial.state.name.lower()
        states[state] = states.get(state, 0) + 1
    best = ""
    try:
        facts = json.loads((place.folder / "study.json").read_text(encoding="utf-8"))
        (first, *others) = [t for t in facts["trials"] if t["number"] in facts["front"]]
        values = zip(facts["objectives"], first["values"], strict=True)
        best = ", ".join(f"{o} {v:.5g}" for o, v in values) + (f" and {len(others)} more" if others else "")
    except (OSError, ValueError, KeyError):  # no trial has completed
        pass
    return {
        "number": place.number, "name": place.name, "states": states, "best": best,
        "runs": studies.runs_link(place.folder),
    }  # fmt: skip


def _selection_callbacks(app: Dash, runs: Library, studies: Studies) -> None:
    @app.callback(
        Output("filter", "value"), Output("runs", "selectedRows"), Output("metrics", "value"), Input("url", "search")
    )  # fmt: skip
    def begin(search: str | None) -> Any:
        """What the address names, as a link or a reload of the page has it."""
        asked = parse_qs((search or "").lstrip("?"))
        text = " ".join(asked.get("filter", []))
        try:
            newest = library.chosen(runs.runs(), text)[:_PICKED]
        except ValueError:
            newest = []
        names = asked.get("run") or [run.name for run in newest]
        return text, {"ids": names}, asked.get("metric") or no_update

    @app.callback(
        Output("picked", "data"), Input("runs", "selectedRows"), State("picked", "data"), prevent_initial_call=True
    )  # fmt: skip
    def pick(rows: Any, picked: dict[str, int] | None) -> Any:
        """Each selected run with the slot of its colour, which it keeps while it is selected."""
        names = [row["name"] for row in rows] if isinstance(rows, list) else (rows or {}).get("ids", [])
        kept = {name: slot for name, slot in (picked or {}).items() if name in names}
        taken = set(kept.values())
        free = (slot for slot in itertools.count() if slot not in taken)
        kept |= {name: next(free) for name in sorted(set(names) - set(kept))}
        return no_update if kept == picked else kept

    @app.callback(
        Output("runs", "selectedRows", allow_duplicate=True),
        Input({"type": "drop", "run": ALL}, "n_clicks"), State("picked", "data"), prevent_initial_call=True,
    )  # fmt: skip
    def drop(clicks: list[int | None], picked: dict[str, int]) -> Any:
        if not any(clicks) or not isinstance(ctx.triggered_id, dict):
            return no_update
        return {"ids": [name for name in picked if name != ctx.triggered_id["run"]]}

    @app.callback(
        Output("curves", "data"), Output("said", "data"), Output("curves-section", "hidden"), Output("settings-section", "hidden"),
        Input("tick", "n_intervals"), Input("picked", "data"), State("curves", "data"), State("said", "data"),
    )  # fmt: skip
    def watch(_: Any, picked: dict[str, int] | None, curves: Any, said: Any) -> Any:
        """Notices that a selected run has written something."""
        there = runs.some(picked or {})
        found = there[: layout.MOST]
        slots = {run.name: (picked or {})[run.name] for run in found}
        now = {
            "runs": slots,
            "of": len(there),
            "stamp": library.stamp(found, "metrics.jsonl"),
        }
        told = {"runs": slots, "stamp": library.stamp(found, "samples.jsonl", "generations.jsonl")}
        return no_update if now == curves else now, no_update if told == said else told, not found, not found

    @app.callback(Output("chips", "children"), Output("settings", "children"), Input("curves", "data"))
    def selected(curves: Any) -> Any:
        found, slots = _found(runs, curves)
        places = {place.folder: place.number for place in studies.places()}
        chips = []
        for run in found:
            number = places.get(run.path.parent)
            trial = f"/dashboard/studies/{number}/trials?numbers={run.path.name}" if number else None
            chips.append(layout.chip(run, slots[run.name], trial))
        return [*chips, layout.hint(len(found), (curves or {}).get("of", 0))], layout.settings_table(
            found, slots
        )

    @app.callback(
        Output("completions", "children"), Output("completions-section", "hidden"), Output("source", "options"), Output("source", "value"),
        Input("said", "data"), Input("source", "value"),
    )  # fmt: skip
    def completions(said: Any, source: str) -> Any:
        found, slots = _found(runs, said)
        there = [
            s for s in ("samples", "generations") if any((run.path / f"{s}.jsonl").is_file() for run in found)
        ]
        source = source if source in there else next(iter(there), source)
        answers = library.completions(found, source) if there else []
        return layout.completions_table(found, slots, answers), not there, there or [source], source

    app.clientside_callback(
        "(picked, filter, metrics) => window.hydratune.address(picked, filter, metrics)",
        Output("address", "data"),
        Input("picked", "data"), Input("filter", "value"), Input("metrics", "value"), prevent_initial_call=True,
    )  # fmt: skip


def _curve_callbacks(app: Dash, runs: Library) -> None:
    @app.callback(
        Output("metrics", "options"), Output("metrics", "value", allow_duplicate=True),
        Input("curves", "data"), State("metrics", "value"), State("metrics", "options"), prevent_initial_call=True,
    )  # fmt: skip
    def metrics(curves: Any, value: list[str] | None, options: list[str] | None) -> Any:
        found, _ = _found(runs, curves)
        logged = library.ordered_metrics(found)
        kept = [m for m in value or [] if m in logged]
        wanted = value if kept else library.first_metrics(logged)
        known = [*logged, *(m for m in wanted or [] if m not in logged)]
        return no_update if known == options else known, no_update if wanted == value else wanted

    @app.callback(Output("charts", "children"), Input("metrics", "value"))
    def frames(value: list[str] | None) -> Any:
        return [layout.chart_frame(metric) for metric in value or []]

    @app.callback(
        Output({"type": "chart", "metric": MATCH}, "figure"),
        Input("curves", "data"), Input("along", "value"), Input("smoothing", "value"), Input("log", "value"),
        State({"type": "chart", "metric": MATCH}, "id"),
    )  # fmt: skip
    def draw(curves: Any, along: str, smoothing: Any, log: list[str], own: dict[str, str]) -> Any:
        found, slots = _found(runs, curves)
        room, degree = library.room(len(found)), float(smoothing or 0)
        lines = [
            (run.name, slots[run.name], library.points(run, own["metric"], along, degree, room))
            for run in found
        ]
        figure = chart([line for line in lines if line[2][0]], along, smoothed=degree > 0, log=bool(log))
        if ctx.triggered_id not in ("curves", "smoothing"):
            return figure
        points = Patch()  # only these, so that what the reader has zoomed to stays
        points["data"] = figure["data"]
        return points


def _found(runs: Library, store: Any) -> tuple[list[Run], dict[str, int]]:
    slots = (store or {}).get("runs", {})
    return runs.some(slots), slots
