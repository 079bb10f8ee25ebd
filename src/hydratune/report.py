"""The report of a run: one self-contained page and one picture, made from the run directory alone.

Anything may be missing or torn: what is there is shown. Charts are inline SVG that takes the page's colours, so that the
page reads well light and dark, without scripts and without a request to anywhere.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hydratune.amounts import amount, duration
from hydratune.objective import REWARD_ACCURACY, REWARDS, last_values
from hydratune.summary import read_summary
from hydratune.tracking import read_metrics
from hydratune.whole import write_whole

_TILES = 8  # numbers of the headline side by side; more stand in rows of nearly the same length
_FLAT = 3e-3  # share of their size below which the differences of values are not blown up to a chart
_PICTURED = 8  # charts of curves.png
_GENERATIONS = 12  # completions of the training that are shown, the last ones
# title, unit of the axis, the series drawn together
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Mean reward", ("reward", "objective/scores", "eval_reward")),
    ("Loss", ("loss", "eval_loss")),
    ("Groups without spread", ("frac_reward_zero_std",)),
    ("KL of a completion (nats)", ("objective/kl",)),
    ("Entropy of the policy (nats a token)", ("policy/entropy_avg",)),
    ("Policy loss", ("loss/policy_avg",)),
    ("Value loss", ("loss/value_avg",)),
    ("approx-KL of an update (nats a token)", ("policy/approxkl_avg",)),
    ("Completion length (tokens)", ("completions/mean_length", "eval_length")),
    ("Completions that were cut", ("completions/clipped_ratio",)),
    ("Pairs or rows on the right side", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Pairs told apart", ("accuracy", "eval_accuracy")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("Score margin", ("margin", "eval_margin")),
    ("Reward of chosen", ("rewards/chosen", "eval_rewards/chosen")),
    ("Reward of rejected", ("rewards/rejected", "eval_rewards/rejected")),
    ("log π of chosen (nats)", ("logps/chosen", "eval_logps/chosen")),
    ("log π of rejected (nats)", ("logps/rejected", "eval_logps/rejected")),
    ("KL to the reference (nats)", ("kl", "eval_kl")),
    ("Token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ("Entropy (nats)", ("entropy", "eval_entropy")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_second",)),
    ("Episodes per second", ("eps",)),
    ("Peak memory (GiB)", ("peak_memory_gib",)),
)
# drawn in these, then replaced by the page's variables, which change with light and dark
_COLOURS = {
    "#123401": "var(--train)",
    "#123402": "var(--eval)",
    "#123403": "var(--ink-2)",
    "#123404": "var(--line)",
}
_TRAIN, _EVAL, _INK, _LINE = _COLOURS


def write_report(out_dir: Path) -> None:
    """Write report.html and curves.png from a run's other files.

    Raises:
        OSError: the folder cannot be written.
    """
    page, picture = render(out_dir)
    write_whole(out_dir / "report.html", page)
    write_whole(out_dir / "curves.png", picture)


def render(out_dir: Path) -> tuple[str, bytes]:
    """What report.html and curves.png of a run hold."""
    events = read_metrics(out_dir)
    summary = read_summary(out_dir)
    charts = [(title, series) for title, names in CHARTS if (series := _series(events, names))]
    headline = _headline(summary)
    page = Environment(
        loader=PackageLoader("hydratune"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = page.get_template("report.html.j2").render(
        summary=summary,
        name=summary.get("run_name") or out_dir.name,
        headline=headline,
        across=-(-len(headline) // max(1, -(-len(headline) // _TILES))),
        charts=[(title, Markup(_svg(title, series, i))) for i, (title, series) in enumerate(charts)],
        samples=_samples(out_dir / "samples.jsonl"),
        generations=_samples(out_dir / "generations.jsonl")[-_GENERATIONS:],
        config=list(_flat(_yaml(out_dir / "config.yaml"))),
        seconds=[(phase, duration(s)) for phase, s in (summary.get("seconds") or {}).items()],
    )
    return html, _picture(charts, summary.get("run_name") or out_dir.name, headline)


def _series(
    events: list[dict[str, Any]], names: tuple[str, ...]
) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for name in names:
        points = [
            (e["step"], e[name]) for e in events if isinstance(e.get(name), int | float) and "step" in e
        ]
        if points:
            found[name] = ([p[0] for p in points], [p[1] for p in points])
    return found


def _draw(
    axes: Any,
    series: dict[str, tuple[list[float], list[float]]],
    colours: tuple[str, str, str, str],
    size: float,
) -> None:
    from matplotlib.ticker import MaxNLocator

    train, evaluation, ink, line = colours
    for name, (steps, values) in series.items():
        is_eval = name.startswith("eval_")
        axes.plot(
            steps, values, color=evaluation if is_eval else train, linewidth=1.6, label="evaluation" if is_eval else "training",
            marker="o" if is_eval or len(steps) == 1 else None, markersize=4,
        )  # fmt: skip
    axes.grid(axis="y", color=line, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.tick_params(colors=ink, labelsize=size, length=0)
    axes.locator_params(axis="y", nbins=5)
    # a small learning rate would not fit beside the axis; no label is one to be added to
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))  # steps are whole
    axes.yaxis.get_offset_text().set(color=ink, fontsize=size)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    if (lack := _FLAT * max(abs(low), abs(high)) - (high - low)) > 0:
        axes.set_ylim(low - lack / 2, high + lack / 2)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=size, labelcolor=ink)


def _figure(width: float, height: float, **margins: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        **margins
    )  # a layout engine would measure every label, twice the time of the drawing
    return figure


def _svg(title: str, series: dict[str, tuple[list[float], list[float]]], number: int) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"{title}{number}", "font.family": "sans-serif"}
    ):
        figure = _figure(5.2, 2.5, left=0.12, right=0.98, bottom=0.1, top=0.9)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        _draw(axes, series, (_TRAIN, _EVAL, _INK, _LINE), 9.5)  # a phone shows it at nine tenths
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=id=")([^"]+)', rf"c{number}-\1", text)
    text = re.sub(r'(?<=xlink:href="#)([^"]+)', rf"c{number}-\1", text)
    text = re.sub(r"(?<=url\(#)([^)]+)", rf"c{number}-\1", text)
    text = re.sub(r'width="[^"]*pt" height="[^"]*pt"|height="[^"]*pt"|width="[^"]*pt"', "", text, count=2)
    for drawn, variable in _COLOURS.items():
        text = text.replace(drawn, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _picture(charts: list[tuple[str, Any]], name: str, facts: list[tuple[str, str]]) -> bytes:
    """The first charts, and the last, which is memory, under the run's name and numbers, for pasting where no page can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shown = charts if len(charts) <= _PICTURED else [*charts[: _PICTURED - 1], charts[-1]]
    rows = max(1, (len(shown) + 1) // 2)
    height = 2.6 * rows + 0.6
    inch = 1 / height
    figure = _figure(
        10,
        height,
        left=0.065,
        right=0.985,
        bottom=0.5 * inch,
        top=1 - 0.95 * inch,
        wspace=0.17,
        hspace=0.42,
    )
    plain = {"ha": "left", "va": "top", "parse_math": False}
    figure.text(0.02, 1 - 0.13 * inch, name[:90], fontsize=12, weight="bold", **plain)
    line = " · ".join(f"{label.partition(',')[0]} {value}" for label, value in facts[:6])
    figure.text(0.02, 1 - 0.38 * inch, line[:140], fontsize=9, color="#555555", **plain)
    for i, (title, series) in enumerate(shown):
        axes = figure.add_subplot(rows, 2, i + 1)
        _draw(axes, series, ("#2f6fde", "#d9572b", "#555555", "#dddddd"), 8)
        axes.set_title(title, fontsize=10, loc="left")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _headline(summary: dict[str, Any]) -> list[tuple[str, str]]:
    metrics = summary.get("metrics") or {}
    final, best = (last_values([metrics.get(name) or {}]) for name in ("final", "best"))
    shown = [("mean reward", f"{final[key]:.3f}") for key in REWARDS if key in final][:1]
    rewarded = bool(shown)
    for key, name in (("eval_loss", "evaluation loss"), ("loss", "training loss")):
        if key in final and not rewarded:  # the loss of an online run says nothing
            better = best.get(key, final[key]) < final[key]
            shown.append((f"{name}, best {best[key]:.4f}" if better else name, f"{final[key]:.4f}"))
    if "eval_mean_token_accuracy" in final:
        shown.append(("token accuracy", f"{final['eval_mean_token_accuracy']:.1%}"))
    shown += [("reward accuracy", f"{final[key]:.1%}") for key in REWARD_ACCURACY if key in final]
    if "verified_accuracy" in final:
        shown.append(("verified answers", f"{final['verified_accuracy']:.0%}"))
    if summary.get("steps") is not None:
        shown.append(("steps", f"{summary['steps']:,}"))
    if summary.get("tokens"):
        shown.append(("tokens", amount(summary["tokens"])))
    if summary.get("tokens_per_second"):
        shown.append(("tokens/s", amount(summary["tokens_per_second"])))
    if (summary.get("seconds") or {}).get("training"):
        shown.append(("training time", duration(summary["seconds"]["training"])))
    if (summary.get("peak_memory") or {}).get("bytes"):
        shown.append(("peak memory", f"{summary['peak_memory']['bytes'] / 2**30:.1f} GiB"))
    return shown


def _flat(value: Any, prefix: str = "") -> Any:
    """Nested settings as dotted keys with their values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, "" if value is None else json.dumps(value, ensure_ascii=False, default=str).strip('"')


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
