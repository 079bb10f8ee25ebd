"""The parts of the page: what is on it, without what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dash_ag_grid
from dash import dcc, html

from hydratune.dashboard.chart import COLOURS, TALL, chart
from hydratune.dashboard.drawn import can_draw
from hydratune.runs import Run, differences

EVERY = 2000  # milliseconds between two looks at the runs
_SIDE_BY_SIDE = 6  # runs whose completions are shown
_PROMPTS = 12
MOST = 40  # selected runs that are shown; more cannot be told apart
_COMPARED = 12  # of them, those whose settings stand side by side
_NOT_SAID = {"prompt", "step", "reward", "correct"}  # which stand elsewhere
_THEME = """themeQuartz.withParams({
  backgroundColor: 'var(--card)', foregroundColor: 'var(--ink)', borderColor: 'var(--line)', accentColor: 'var(--accent)',
  headerBackgroundColor: 'var(--card)', headerTextColor: 'var(--ink-2)', headerFontWeight: 600, chromeBackgroundColor: 'var(--card)',
  rowHoverColor: 'var(--hover)', selectedRowBackgroundColor: 'var(--picked)', browserColorScheme: 'inherit', fontFamily: 'inherit',
  fontSize: 13, spacing: 5, cellHorizontalPadding: 10, wrapperBorderRadius: 10, columnBorder: false
})"""


def page(home: Path, rows: list[dict[str, Any]], columns: list[dict[str, Any]]) -> Any:
    """The whole page as it is first sent."""
    return html.Main(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=EVERY),
            *(dcc.Store(id=name) for name in ("seen", "picked", "curves", "said", "address")),
            html.Header(
                [
                    html.H1([html.A("hydratune", href="/"), html.Span(str(_near(home)))]),
                    html.P(id="counts"),
                    html.A("Studies in Optuna's dashboard", href="/dashboard", className="button"),
                ]
            ),
            html.Section([html.H2("Studies"), html.Div(id="studies", className="cards")], id="studies-section"),
            html.Section(
                [
                    html.H2("Runs"),
                    dcc.Input(
                        id="filter",
                        type="search",
                        debounce=0.4,
                        placeholder="Filter: lr<1e-4 peft=lora status!=failed, or part of a name",
                        autoComplete="off",
                        spellCheck="false",
                    ),
                    html.P(id="message", className="error", role="alert"),
                    grid(rows, columns),
                    html.Div(id="chips", className="chips"),
                ]
            ),
            html.Section(
                [
                    html.H2("Curves"),
                    html.Div(
                        [
                            dcc.Dropdown(
                                id="metrics", multi=True, placeholder="Metrics", optionHeight=30, closeOnSelect=False
                            ),
                            _switch("along", ["step", "epoch", "time"], "step"),
                            html.Label(["smoothing", dcc.Input(id="smoothing", type="range", min=0, max=0.98, step=0.02, value=0)]),
                            dcc.Checklist(["log scale"], [], id="log", inline=True, className="switch"),
                        ],
                        className="controls",
                    ),
                    html.Div(id="charts", className="charts"),
                ],
                id="curves-section",
                hidden=True,
            ),
            html.Section(
                [html.H2("Settings that differ"), html.Div(id="settings", className="scroll")],
                id="settings-section",
                hidden=True,
            ),
            html.Section(
                [
                    html.Div(
                        [html.H2("Completions"), _switch("source", ["samples", "generations"], "samples")],
                        className="controls",
                    ),
                    html.Div(id="completions"),
                ],
                id="completions-section",
                hidden=True,
            ),
        ]
    )  # fmt: skip


def _near(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _switch(name: str, options: list[str], value: str) -> Any:
    return dcc.RadioItems(options, value, id=name, inline=True, className="switch")


def grid(rows: list[dict[str, Any]], columns: list[dict[str, Any]]) -> Any:
    return dash_ag_grid.AgGrid(
        id="runs",
        rowData=rows,
        columnDefs=columns,
        getRowId="params.data.name",
        defaultColDef={"sortable": True, "resizable": True, "filter": False, "minWidth": 64},
        dashGridOptions={
            "theme": {"function": _THEME},
            "rowSelection": {
                "mode": "multiRow", "checkboxes": True, "headerCheckbox": True, "selectAll": "filtered", "enableClickSelection": True,
            },
            "suppressFieldDotNotation": True,
            "isExternalFilterPresent": {"function": "true"},
            "doesExternalFilterPass": {"function": "params.data.shown"},
            "animateRows": False,
            "enableCellTextSelection": True,
            "localeText": {"noRowsToShow": "No run is here yet: python train.py"},
        },
        columnSize="autoSize",
        className="runs",
        style=size(len(rows)),
    )  # fmt: skip


def size(rows: int) -> dict[str, str]:
    """The table's height for so many rows; of more, it scrolls."""
    return {"height": f"{min(12, max(3, rows)) * 2 + 3.4:.1f}rem"}


def columns(settings: Sequence[str]) -> list[dict[str, Any]]:
    """The table's columns: facts of every run, then the settings that tell them apart."""
    number = {"type": "rightAligned", "valueFormatter": {"function": "number(params.value)"}}
    facts: list[dict[str, Any]] = [
        {"field": "status", "cellRenderer": "Status", "width": 112},
        {"field": "name", "cellRenderer": "Name", "minWidth": 150, "maxWidth": 340, "tooltipField": "name"},
        *({"field": group} for group in ("algo", "model", "data", "peft")),
        {"field": "objective", "cellRenderer": "Objective", "type": "rightAligned"},
    ]
    varied = [
        {"field": f"set:{key}", "headerName": key, **number, "headerClass": "ag-right-aligned-header setting"}
        for key in settings
    ]
    cost: list[dict[str, Any]] = [
        {"field": "steps", **number},
        {"field": "speed", "headerName": "tokens/s", **number},
        {"field": "started", "sort": "desc"},
    ]
    return [*facts, *varied, *cost]


def study_card(facts: dict[str, Any]) -> Any:
    link = f"/dashboard/studies/{facts['number']}"
    states = ", ".join(f"{n} {state}" for state, n in facts["states"].items()) or "no trial yet"
    best = [html.B(facts["best"])] if facts["best"] else []
    return html.Article(
        [
            html.H3(html.A(facts["name"], href=link)),
            html.P([states, *(" · " for _ in best), *best]),
            html.P([html.A("its runs", href=facts["runs"]), html.A("plots", href=f"{link}/analytics"), html.A("trials", href=f"{link}/trials")]),
        ],
        className="live" if facts["states"].get("running") else "",
    )  # fmt: skip


def closed_card(folder: str, why: str) -> Any:
    return html.Article([html.H3(folder), html.P(f"does not open: {why}", className="error")])


def chip(run: Run, slot: int, study: str | None) -> Any:
    """A selected run: its colour, its name, where it leads, and a way to drop it."""
    link = quote(run.name)
    links = [html.A("files", href=f"/runs/{link}/")]
    if can_draw(run):
        links.insert(0, html.A("report", href=f"/runs/{link}/report.html"))
    if study:
        links.append(html.A("trial", href=study))
    drop = html.Button("×", id={"type": "drop", "run": run.name}, title="Drop from the selection")
    return html.Span([_dot(slot), html.Span(run.name, className="name"), html.Span(run.status, className=f"status {run.status}"), *links, drop],
                     className="chip")  # fmt: skip


def hint(shown: int, selected: int) -> Any:
    """What to say below the table about the selection."""
    text = f"The first {shown} of {selected} selected runs are shown." if shown < selected else ""
    text = (
        text if selected else "Pick runs in the table: their curves, settings and completions are shown here."
    )
    return html.P(text or None, className="hint")


def _dot(slot: int) -> Any:
    return html.I(className="dot", style={"background": COLOURS[slot % len(COLOURS)]})


def chart_frame(metric: str) -> Any:
    return html.Figure(
        [
            html.Figcaption(metric),
            dcc.Graph(
                id={"type": "chart", "metric": metric},
                figure=chart([], "step", smoothed=False, log=False),
                responsive=True,
                style={"height": TALL},
                config={"displaylogo": False, "displayModeBar": False, "doubleClickDelay": 400},
            ),
        ]
    )


def settings_table(runs: Sequence[Run], slots: dict[str, int]) -> Any:
    runs = runs[:_COMPARED]
    found = differences(runs)
    if len(runs) < 2 or not found:
        why = "Pick a second run to compare." if len(runs) < 2 else "These runs have the same settings."
        return html.P(why, className="hint")
    heads = [html.Th([_dot(slots[run.name]), run.name]) for run in runs]
    body = [
        html.Tr([html.Th(key), *(html.Td("" if v is None else str(v)) for v in values)])
        for key, values in found.items()
    ]
    return html.Table([html.Thead(html.Tr([html.Th(), *heads])), html.Tbody(body)])


def completions_table(
    runs: Sequence[Run], slots: dict[str, int], said: Sequence[tuple[str, list[Any]]]
) -> Any:
    """Prompt by prompt what the runs said, side by side."""
    shown = runs[:_SIDE_BY_SIDE]
    articles = []
    for prompt, answers in said[:_PROMPTS]:
        asked = [
            a for a in answers if a and "completion" in a
        ]  # else the reference is a model that answers too
        reference = next((a["reference"] for a in asked if a.get("reference") is not None), None)
        columns = [
            html.Div([html.H4([_dot(slots[run.name]), run.name, *_marks(answer)]), _said(answer)])
            for run, answer in zip(shown, answers, strict=False)
            if answer is not None
        ]  # fmt: skip
        if columns:
            below = [] if reference is None else [html.P([html.B("reference "), str(reference)])]
            articles.append(
                html.Article(
                    [html.Pre(prompt, className="prompt"), *below, html.Div(columns, className="beside")]
                )
            )
    left = f"The first {_SIDE_BY_SIDE} of {len(runs)} runs. " if len(runs) > _SIDE_BY_SIDE else ""
    left += f"{_PROMPTS} of {len(said)} prompts." if len(said) > _PROMPTS else ""
    return [*articles, html.P(left or None, className="hint")]


def _said(answer: dict[str, Any]) -> Any:
    """The completion; of a row without one all it has, under its name: pairs with scores, policy and reference."""
    if "completion" in answer:
        return _text(str(answer["completion"]))
    told = {k: v for k, v in answer.items() if isinstance(v, str | float | int) and k not in _NOT_SAID}
    parts = [
        part for key, value in told.items() for part in (html.B(key.replace("_", " ")), _text(str(value)))
    ]
    return html.Div(parts) if parts else _text("")


def _text(text: str) -> Any:
    return (
        html.Pre(text.strip())
        if text.strip()
        else html.P("only white space" if text else "nothing", className="hint")
    )


def _marks(answer: dict[str, Any]) -> list[Any]:
    marks = []
    if "correct" in answer:
        right = answer["correct"]
        marks.append(
            html.Span("✓ correct" if right else "✗ wrong", className="completed" if right else "failed")
        )
    if isinstance(answer.get("reward"), int | float):
        marks.append(html.Span(f"reward {answer['reward']:.3g}"))
    if "step" in answer:
        marks.append(html.Span(f"step {answer['step']}"))
    return marks
