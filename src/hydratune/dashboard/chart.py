"""A chart of one metric of several runs, as a figure of plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TALL = 280  # pixels of a chart
COLOURS = ("#3b78e7", "#e0662f", "#2a9d5c", "#a35fd6", "#c99a1e", "#d94b86", "#1fa3b8", "#8a8f98")
_DASHES = ("solid", "dot", "dash", "dashdot")
_INK, _LINE = "#7d828b", "rgba(128,132,140,.22)"  # readable on light and dark


def chart(curves: Sequence[tuple[str, int, Any]], along: str, *, smoothed: bool, log: bool) -> dict[str, Any]:
    """A figure of plotly.

    Args:
        curves: run, slot of its colour, points (x, y, smoothed y).
    """
    data: list[dict[str, Any]] = []
    for name, slot, (x, y, smooth) in curves:
        colour, dash = COLOURS[slot % len(COLOURS)], _DASHES[slot // len(COLOURS) % len(_DASHES)]
        line: dict[str, Any] = {"color": colour, "width": 1.8, "dash": dash}
        if smoothed:
            data.append(
                {
                    "x": x,
                    "y": y,
                    "type": "scatter",
                    "mode": "lines",
                    "opacity": 0.25,
                    "hoverinfo": "skip",
                    "line": {**line, "width": 1},
                }
            )
        data.append({
            "x": x, "y": smooth if smoothed else y, "type": "scatter", "name": name, "mode": "lines" if len(x) > 25 else "lines+markers",
            "line": line, "marker": {"size": 5, "color": colour}, "hovertemplate": f"%{{y:.5~g}} at %{{x:.6~g}}<extra>{_plain(name)}</extra>",
        })  # fmt: skip
    axis: dict[str, Any] = {"gridcolor": _LINE, "zeroline": False, "linecolor": _LINE, "automargin": True}
    layout = {
        "showlegend": False, "height": TALL, "margin": {"l": 48, "r": 12, "t": 8, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": _INK, "size": 11, "family": "inherit"},
        "hovermode": "closest", "hoverlabel": {"namelength": -1},
        "xaxis": {**axis, "title": {"text": "seconds" if along == "time" else along, "standoff": 6}},
        "yaxis": {**axis, "type": "log" if log else "linear"},
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _plain(name: str) -> str:
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
