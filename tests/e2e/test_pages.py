"""Pages that are files, opened in Debian's Chromium: reports of runs and of a sweep, wide and on a phone, light and dark."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_dashboard import CHROMIUM, needs

from hydratune.report import CHARTS

ROOT = Path(__file__).parents[2]
SCREENS = [(width, scheme) for width in (1300, 390) for scheme in ("light", "dark")]
TINY = [
    "data.size=64",
    "batch_size=8",
    "tracking=none",
    "trainer.logging_steps=1",
    "model.architecture.num_hidden_layers=1",
]
_spec = importlib.util.spec_from_file_location("train_for_pages", ROOT / "train.py")
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of SFT, one of GRPO, and a sweep of four trials of which one or more are pruned."""
    home = tmp_path_factory.mktemp("pages")
    sft = ["max_steps=6", "trainer.eval_strategy=steps", "trainer.eval_steps=2"]
    assert train.main([*TINY, *sft, f"output_dir={home / 'sft'}"]) == 0
    grpo = ["algo=grpo", "max_steps=2", "algo.max_completion_length=16"]
    assert train.main([*TINY, *grpo, f"output_dir={home / 'grpo'}"]) == 0
    line = [
        sys.executable,
        str(ROOT / "train.py"),
        "-m",
        *TINY,
        *sft,
        "lr=2e-3,1e-3,1e-4,2e-5",
        "peft=none,lora",
    ]
    pruned = ["sweep.pruner=median", "sweep.pruner_options={n_startup_trials: 3}", "sweep.name=rates"]
    done = subprocess.run([*line, *pruned], capture_output=True, text=True, timeout=300, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.move(home / "outputs" / "sweeps" / "rates", home / "rates")
    return home


@pytest.fixture(scope="module")
def chromium():
    needs(importlib.util.find_spec("playwright"), "playwright", "pip install playwright")
    needs(CHROMIUM, "Chromium", "apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a file; at the end no page has complained, nor asked for anything that is not this file."""
    asked, wrong, contexts = [], [], []

    def block(route):
        asked.append(route.request.url)
        route.abort()

    def open_file(path: Path, width: int = 1300, scheme: str = "light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        contexts[-1].route(lambda url: not url.startswith((path.as_uri(), "data:")), block)
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert asked == [] and wrong == []


def readable(page, width: int) -> None:
    """Nothing is wider than the page, and all text stands out from what is behind it (WCAG's 4.5 : 1)."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    faint = page.evaluate("""() => {
        const numbers = c => c.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                             return .2126 * r + .7152 * g + .0722 * b };
        const paper = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
                             if (c.length < 4 || c[3] > .5) return c.slice(0, 3) } return [255, 255, 255] };
        const found = new Set();
        for (const e of document.querySelectorAll("main *")) {
            if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
            const style = getComputedStyle(e), ink = numbers(e.ownerSVGElement ? style.fill : style.color).slice(0, 3);
            const [a, b] = [light(ink), light(paper(e))].sort((x, y) => y - x);
            if ((a + .05) / (b + .05) < 4.5) found.add(e.tagName + " " + e.textContent.trim().slice(0, 30) + " " + ink);
        }
        return [...found] }""")
    assert faint == []


def smallest_label(page) -> float:
    """Height in pixels of the smallest letters of a chart, as they are shown."""
    return page.evaluate("""Math.min(...[...document.querySelectorAll("figure svg text")].filter(t => t.textContent.trim()).map(
        t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))""")


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("run", ["sft", "grpo"])
def test_every_chart_of_a_runs_report_has_its_points(opened, home, run, width, scheme):
    page = opened(home / run / "report.html", width, scheme)
    readable(page, width)
    assert smallest_label(page) >= 9
    # of each chart the corners of its lines, and marks of evaluations, which also stand at these corners
    drawn = page.evaluate("""Object.fromEntries([...document.querySelectorAll("figure")].map(f => [f.querySelector("figcaption").textContent,
        [...f.querySelectorAll("path[clip-path]")].filter(p => /var\\(--(train|eval)\\)/.test(p.getAttribute("style")) && p.closest("[id*=line2d]"))
            .map(p => ({ points: (p.getAttribute("d").match(/[ML]/g) || []).length, wide: p.getBoundingClientRect().width }))]))""")
    events = [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]
    logged = {name: sum(isinstance(e.get(name), int | float) for e in events) for e in events for name in e}
    expected = {
        title: [logged[name] for name in names if logged.get(name)]
        for title, names in CHARTS
        if any(logged.get(name) for name in names)
    }
    assert {title: [line["points"] for line in lines] for title, lines in drawn.items()} == expected
    assert {"Learning rate", "Gradient norm", "Tokens per second", "Peak memory (GiB)"} < set(expected)
    for lines in drawn.values():
        assert all(line["wide"] > 50 for line in lines if line["points"] > 1)
    assert page.locator("article").count() > 0 and page.locator("table td").count() > 10


@pytest.mark.parametrize("run", ["sft", "grpo"])
def test_a_runs_tiles_are_even_and_its_axes_are_plain_numbers(opened, home, run):
    page = opened(home / run / "report.html")
    rows = page.evaluate("""Object.values(Object.groupBy([...document.querySelectorAll(".numbers div")],
        t => Math.round(t.getBoundingClientRect().top))).map(row => row.length)""")
    assert sum(rows) >= 5 and rows[0] - rows[-1] <= 1, rows
    labels = page.locator("figure svg text").all_text_contents()
    assert labels and not [
        label for label in labels if "+" in label
    ]  # 1e-7+5.4969: to be added by the reader
    for said in page.locator("article pre").all_inner_texts():
        assert said.strip()  # of an empty completion it is said that it is empty


PLOTS = """[...document.querySelectorAll("figure")].map(f => {
    const plot = f.querySelector(".js-plotly-plot"), title = f.querySelector("figcaption").textContent;
    if (!plot) return { title, values: 0, marks: 0, apart: [] };
    const finite = v => (v && v.length ? [...v] : []).filter(n => typeof n !== "number" || Number.isFinite(n)).length;
    const values = plot._fullData.map(t => Math.max(finite(t.x), finite(t.y), finite(t.base)));
    const frame = f.querySelector(".bglayer") && plot.getBoundingClientRect();
    const marks = [...plot.querySelectorAll(".point path, path.point, .js-line")].filter(m => {
        const b = m.getBoundingClientRect(); return b.width + b.height > 0 && b.right > frame.left && b.left < frame.right }).length;
    const boxes = s => [...plot.querySelectorAll(s)].filter(t => t.textContent.trim()).map(t => [t.textContent, t.getBoundingClientRect()]);
    const apart = boxes("[class$=title]").flatMap(([a, p]) => boxes(".xtick text, .ytick text, .x2tick text, .x3tick text").filter(([b, q]) =>
        p.left + 1 < q.right && q.left + 1 < p.right && p.top + 1 < q.bottom && q.top + 1 < p.bottom).map(([b]) => a + " over " + b));
    const ticks = boxes(".xtick text, .ytick text, .x2tick text, .x3tick text").map(([t]) => t);
    return { title, values: Math.max(...values), marks, apart, ticks } })"""


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_every_plot_of_a_sweeps_page_has_data(opened, home, width, scheme):
    page = opened(home / "rates" / "report.html", width, scheme)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 5")
    readable(page, width)
    plots = page.evaluate(PLOTS)
    assert [p["title"] for p in plots] == [
        "History",
        "Training loss of all trials",
        "Evaluation loss of all trials",
        "Importance of each parameter",
        "Parallel coordinates",
        "Slices",
        "Timeline",
    ]
    for plot in plots:
        assert plot["values"] > 0 and plot["marks"] > 0, plot
        assert plot["apart"] == [], plot["title"]  # an axis title does not cover its labels
        assert not [t for t in plot["ticks"] if "µ" in t or "'" in t], plot["title"]  # 1e-4 is no 100µ
    assert page.locator("#trials tbody tr").count() == 8
    pruned = page.locator("#trials td.pruned")
    assert pruned.count() > 0
    page.locator("#trials th", has_text="seconds").click()  # sorted by it
    column = page.locator("#trials tbody tr td:nth-last-child(2)").all_inner_texts()
    assert [float(t) for t in column] == sorted(float(t) for t in column)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_marks_of_a_sweeps_plots_are_seen_on_the_paper(opened, home, scheme):
    """At least 2.2 : 1 between a mark and its card, on both papers, which no bright yellow and no dark blue has."""
    page = opened(home / "rates" / "report.html", 1300, scheme)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 5")
    weak = page.evaluate("""() => {
        const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number).slice(0, 3);
        const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                             return .2126 * r + .7152 * g + .0722 * b };
        const card = light(numbers(getComputedStyle(document.querySelector("figure")).backgroundColor));
        const against = c => (Math.max(light(c), card) + .05) / (Math.min(light(c), card) + .05);
        return [...document.querySelectorAll("figure")].flatMap(f => [...f.querySelectorAll("path.point, .point path")].map(p => {
            const style = getComputedStyle(p), ink = numbers(style.fill === "none" ? style.stroke : style.fill);
            return [f.querySelector("figcaption").textContent, ink, against(ink)] })).filter(([, ink, c]) => ink.length && c < 2.2) }""")
    assert weak == []
