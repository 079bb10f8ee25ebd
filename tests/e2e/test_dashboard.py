"""The dashboard in a real browser: Debian's Chromium, without a screen. No page may ask for anything elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HYDRATUNE = [sys.executable, "-c", "from hydratune.cli import app; app()"]


def needs(there: object, what: str, fix: str) -> None:
    if not there and os.environ.get("CI"):
        pytest.fail(f"CI has no {what}; {fix}")
    if not there:
        pytest.skip(f"{what} is not installed ({fix})")


def fabricate(folder: Path, *, lr: float, steps: int = 30, done: bool = True, answer: str = "4") -> Path:
    """A run directory as `train.py` leaves it, or has it so far."""
    (folder / ".hydra").mkdir(parents=True)
    choices = {"algo": "sft", "model": "tiny", "data": "arithmetic", "peft": "lora"}
    config = {"lr": lr, "algo": {"name": "sft"}, "peft": {"type": "lora", "r": 8}, "max_steps": 400}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"lr={lr}", "peft=lora"]))
    (folder / ".hydra" / "hydra.yaml").write_text(
        yaml.safe_dump({"hydra": {"runtime": {"choices": choices}}})
    )
    (folder / "metrics.jsonl").write_text("".join(event(step, lr) for step in range(1, steps + 1)))
    said = {"prompt": "What is 2 + 2?", "completion": answer, "reference": "4", "correct": answer == "4"}
    (folder / "samples.jsonl").write_text(json.dumps(said) + "\n")
    if done:
        facts = {"status": "completed", **choices, "objective": {"name": "loss", "value": loss(steps, lr)}, "steps": steps,
                 "started": "2026-01-01T00:00:00", "metrics": {"final": {}, "best": {}}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def loss(step: int, lr: float) -> float:
    return round(2 + 3 / step - lr, 6)


def event(step: int, lr: float) -> str:
    return json.dumps({"step": step, "epoch": step / 10, "time": step * 2.0, "loss": loss(step, lr)}) + "\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a real sweep of two trials, two runs that have ended and one that trains."""
    folder = tmp_path_factory.mktemp("dashboard")
    tiny = [
        "data.size=64",
        "batch_size=8",
        "tracking=none",
        "model.architecture.num_hidden_layers=1",
        "max_steps=4",
    ]
    line = [
        sys.executable,
        str(ROOT / "train.py"),
        "-m",
        "lr=1e-3,2e-3",
        "sweep.name=tiny-lr",
        "trainer.logging_steps=1",
        *tiny,
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "outputs"
    fabricate(out / "done" / "slow", lr=1e-4, answer="5")
    fabricate(out / "done" / "fast", lr=1e-2)
    fabricate(out / "live" / "now", lr=5e-3, steps=20, done=False)
    return out


@pytest.fixture(scope="module")
def address(home) -> str:
    needs(importlib.util.find_spec("dash"), "Dash", "pip install 'hydratune[dashboard]'")
    line = [*HYDRATUNE, "dashboard", str(home), "--port", "0", "--no-open"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        finally:
            server.send_signal(signal.SIGINT)  # Ctrl-C is how it ends
            try:
                assert server.wait(20) == 0
            finally:
                server.kill()


@pytest.fixture(scope="module")
def browser():
    needs(importlib.util.find_spec("playwright"), "playwright", "pip install playwright")
    needs(CHROMIUM, "Chromium", "apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # every name but this machine's leads nowhere, so that nothing can be fetched from elsewhere unnoticed
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, address):
    """Opens a page of the dashboard; at the end, all that its pages have asked for and complained of is judged."""
    requests, wrong, contexts = [], [], []

    def open_page(path: str = "/", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1300, "height": 1000}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on(
            "requestfailed",
            lambda r: wrong.append(f"{r.url}: {r.failure}") if "ERR_ABORTED" not in str(r.failure) else None,
        )
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests and [u for u in requests if not u.startswith((address, "data:", "blob:"))] == []
    assert wrong == []


def names(page) -> set[str]:
    page.wait_for_selector(".ag-center-cols-container .ag-row")
    return set(page.locator('.ag-center-cols-container [col-id="name"] a').all_inner_texts())


def traces(page, metric: str) -> list[dict]:
    """What is drawn of a metric: for each curve its name and its points, in the order in which they are drawn."""
    return page.evaluate(
        """metric => { const figure = [...document.querySelectorAll("figure")].find(f => f.querySelector("figcaption").textContent === metric);
        const plot = figure && figure.querySelector(".js-plotly-plot");
        return plot && plot.data ? plot.data.map(t => ({ name: t.name || "", x: [...t.x], y: [...t.y], colour: t.line.color })) : [] }""",
        metric,
    )


def until(page, holds, what: str, seconds: float = 20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} did not come"
        page.wait_for_timeout(100)


def pick(page, *runs: str) -> None:
    for run in runs:
        page.locator(f'.ag-row[row-id="{run}"] input[type=checkbox]').check()


def selected(page) -> set[str]:
    return set(page.locator(".chip .name").all_inner_texts())


def test_a_study_and_its_runs_are_listed_and_found(opened, home):
    (home / "live" / "now" / "metrics.jsonl").touch()  # on a busy machine the fixture may be long ago
    page = opened()
    everything = {"sweeps/tiny-lr/0", "sweeps/tiny-lr/1", "done/slow", "done/fast", "live/now"}
    assert names(page) == everything
    page.get_by_text("5 runs, 1 running").wait_for()
    card = page.locator("#studies article")
    assert "2 complete" in card.inner_text() and "eval_loss" in card.inner_text()
    row = page.locator('.ag-row[row-id="live/now"]').first
    assert "running" in row.inner_text()
    card.get_by_text("its runs").click()
    until(page, lambda: names(page) == {"sweeps/tiny-lr/0", "sweeps/tiny-lr/1"}, "the study's runs")
    page.fill("#filter", "lr>1e-4 peft=lora status=completed")
    until(page, lambda: names(page) == {"done/fast"}, "the filtered run")
    page.fill("#filter", "lrr=1")
    page.locator("#message").get_by_text("did you mean 'lr'?").wait_for()
    page.fill("#filter", "")
    until(page, lambda: names(page) == everything and not page.inner_text("#message"), "all runs again")
    page.locator('.ag-header-cell[col-id="objective"]').click()  # sorted by value
    first = page.locator('.ag-row[row-index="0"] [col-id="name"]')
    until(page, lambda: first.inner_text() == "done/fast", "the least loss on top")


def test_two_runs_are_overlaid_compared_and_read_side_by_side(opened, home):
    page = opened("/?run=done/slow")
    until(page, lambda: selected(page) == {"done/slow"}, "the run of the address")
    pick(page, "done/fast")
    until(page, lambda: len(traces(page, "loss")) == 2, "two curves")
    drawn = {t["name"]: t for t in traces(page, "loss")}
    for name, lr in (("done/slow", 1e-4), ("done/fast", 1e-2)):
        assert drawn[name]["x"] == list(range(1, 31))
        assert drawn[name]["y"] == [loss(step, lr) for step in range(1, 31)]
    assert drawn["done/slow"]["colour"] != drawn["done/fast"]["colour"]
    assert page.locator("figure .scatterlayer .trace").count() == 2
    settings = page.locator("#settings").inner_text()
    assert "lr" in settings and "0.0001" in settings and "0.01" in settings and "max_steps" not in settings
    said = page.locator("#completions article").inner_text()
    assert all(text in said for text in ("What is 2 + 2?", "✗ wrong", "✓ correct", "reference"))

    page.locator("#along").get_by_text("time").click()
    until(page, lambda: traces(page, "loss")[0]["x"][:2] == [2.0, 4.0], "seconds along the curve")
    page.locator("#smoothing").fill("0.9")
    until(page, lambda: len(traces(page, "loss")) == 4, "the smoothed curves over the others")
    page.get_by_text("log scale").click()
    scale = "document.querySelector('.js-plotly-plot').layout.yaxis.type"
    until(page, lambda: page.evaluate(scale) == "log", "a logarithmic axis")
    page.locator(".chip", has_text="done/slow").locator("button").click()
    until(page, lambda: selected(page) == {"done/fast"}, "one run less")
    assert "run=done%2Ffast" in page.url and "done%2Fslow" not in page.url  # a reload shows the same
    page.fill("#filter", "name=done/slow")
    until(page, lambda: names(page) == {"done/slow"}, "the other run alone")
    assert selected(page) == {"done/fast"}  # what is filtered out stays selected


def test_a_run_that_trains_is_followed_without_losing_selection_or_zoom(opened, home):
    page = opened("/?run=live/now")
    until(page, lambda: [len(t["x"]) for t in traces(page, "loss")] == [20], "the curve so far")
    box = page.locator("figure .nsewdrag").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.3, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, middle, steps=5)
    page.mouse.up()
    seen = "document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range"
    until(page, lambda: page.evaluate(seen)[0] > 3, "the zoom")
    zoomed = page.evaluate(seen)

    def train():
        for step in range(21, 51):
            with (home / "live" / "now" / "metrics.jsonl").open("a") as file:
                file.write(event(step, 5e-3))
            time.sleep(0.05)

    training = threading.Thread(target=train)
    training.start()
    until(page, lambda: [len(t["x"]) for t in traces(page, "loss")] == [50], "the new points")
    training.join()
    assert page.evaluate(seen) == zoomed and selected(page) == {"live/now"}
    steps = page.locator('.ag-row[row-id="live/now"] [col-id="steps"]')
    until(page, lambda: steps.inner_text() == "50", "the step in the table")
    (home / "live" / "now" / "summary.json").write_text('{"status": "interrupted", "steps": 50}')
    until(page, lambda: "interrupted" in page.locator(".chip").inner_text(), "its end")
    fabricate(home / "live" / "next", lr=1.0, steps=1, done=False)
    until(page, lambda: "live/next" in names(page), "a run that starts meanwhile")
    shutil.rmtree(home / "live" / "next")
    (home / "live" / "now" / "summary.json").unlink()


def test_a_trial_opens_in_optunas_dashboard_and_leads_back(opened):
    page = opened("/?run=sweeps/tiny-lr/1")
    page.locator(".chip").get_by_text("trial").click()
    page.get_by_text("Trial 1 (trial_id=1000001)").wait_for()
    page.get_by_text("Complete").first.wait_for()
    picture = page.locator('img[src*="/artifacts/1/1000001/"]').first
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    page.get_by_text("Curves, settings and samples").click()
    until(page, lambda: selected(page) == {"sweeps/tiny-lr/1"}, "the trial's run")
    page.get_by_text("Studies in Optuna's dashboard").click()
    page.get_by_text("tiny-lr").first.click()
    page.get_by_text("Hyperparameter Importance").wait_for()
    history = "[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data).filter(t => t.y && t.y.length >= 2).length"
    until(page, lambda: page.evaluate(history) >= 1, "the history of the study")
    page.locator("a#runs").click()
    page.wait_for_selector(".ag-row")


def test_a_study_whose_server_hangs_is_listed_and_holds_nothing_up(opened, home):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"postgresql+psycopg://me:secret@127.0.0.1:{silent.getsockname()[1]}/studies"
        folder = home / "sweeps" / "hangs"
        (folder / "0").mkdir(parents=True)
        (folder / ".study").write_text("hangs")
        (folder / "0" / "trial.json").write_text(json.dumps({"study": "hangs", "storage": url}))
        dead = shutil.copytree(folder, home / "sweeps" / "dead")
        with socket.create_server(("127.0.0.1", 0)) as closed:
            url = f"postgresql+psycopg://me:secret@127.0.0.1:{closed.getsockname()[1]}/studies-of-everybody-here"
        (dead / "0" / "trial.json").write_text(json.dumps({"study": "dead", "storage": url}))
        try:
            page = opened()
            names(page)
            page.locator("#studies article", has_text="hangs").get_by_text("does not answer").wait_for(
                timeout=8000
            )
            assert "2 complete" in page.locator("#studies article", has_text="tiny-lr").inner_text()
            card = page.locator("#studies article", has_text="sweeps/dead")
            card.get_by_text("refused").wait_for()
            assert card.evaluate("e => e.scrollWidth <= e.clientWidth") and "secret" not in card.inner_text()
            page.fill("#filter", "name~done")
            until(page, lambda: names(page) == {"done/slow", "done/fast"}, "the filtered runs", 4)
            page.get_by_text("Studies in Optuna's dashboard").click()
            page.get_by_text("tiny-lr").first.wait_for(timeout=8000)
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(dead)


def test_the_sweeps_report_has_data_in_every_plot(opened):
    page = opened("/runs/sweeps/tiny-lr/report.html")
    until(
        page,
        lambda: page.locator(".js-plotly-plot").count() == page.locator(".plot").count() > 3,
        "the plots",
    )
    empty = page.evaluate("""[...document.querySelectorAll("figure")].filter(f => !f.querySelector(".js-plotly-plot").data.some(
        t => [t.x, t.y, t.base].some(v => v && (v.length || v.bdata)) || (t.dimensions || []).length)).map(f => f.innerText)""")
    assert empty == []
    drawn = page.locator(
        ".js-plotly-plot .point, .js-plotly-plot .scatterlayer .trace, .js-plotly-plot canvas"
    ).count()
    assert drawn > 3
    page.locator("#trials a").first.click()
    page.get_by_text("Curves").first.wait_for()


HOSTILE = "<img src=x onerror=\"window.top.hit='text'\"></pre></script><script>window.top.hit='text'</script><!--<script>"


def test_what_runs_have_written_is_text_on_every_page(browser, address, home):
    """Names, settings, completions and reasons that are HTML; and reports that somebody has put a script into."""
    named = "<img src=x onerror=window.top.hit=1>"
    run = fabricate(home / "hostile" / named, lr=1e-3, answer=HOSTILE)
    told = {"step": 1, "prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0, "policy": HOSTILE}
    (run / "generations.jsonl").write_text(json.dumps(told) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"note": HOSTILE}))
    facts = json.loads((run / "summary.json").read_text())
    facts |= {
        "run_name": HOSTILE,
        "command": HOSTILE,
        "device": HOSTILE,
        "model": HOSTILE,
        "status": "completed",
    }
    (run / "summary.json").write_text(json.dumps(facts))
    study = home / "hostile" / "study"
    study.mkdir()
    facts = json.loads((home / "sweeps" / "tiny-lr" / "study.json").read_text())
    for trial in facts["trials"]:
        trial["settings"] = trial["params"] = {
            "lr": trial["settings"]["lr"],
            "note": f"{HOSTILE}{trial['number']}",
        }
        trial["reason"] = HOSTILE
    facts |= {"name": HOSTILE, "space": {"note": HOSTILE}, "commands": {"0": HOSTILE, "1": HOSTILE}}
    (study / "study.json").write_text(json.dumps(facts))
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    try:
        page, link = context.new_page(), f"/runs/hostile/{quote(named)}"
        hit = "window.hit || [...document.querySelectorAll('[onerror]')].length"
        page.goto(f"{address}/?run=hostile/{quote(named)}&run=done/slow")
        page.locator("#completions").get_by_text("onerror").first.wait_for()
        page.locator("#settings").get_by_text("onerror").first.wait_for()
        assert not page.evaluate(hit)
        page.locator("#source").get_by_text("generations").click()
        page.locator("#completions").get_by_text("reward 1").wait_for()
        assert not page.evaluate(hit)
        for path in (
            f"{link}/report.html",
            f"{link}/",
            "/runs/hostile/",
            "/runs/hostile/study/report.html",
            f"{link}/samples.jsonl",
        ):
            page.goto(address + path)
            assert "onerror" in page.inner_text("body") and not page.evaluate(hit), path
        page.goto(f"{address}/runs/hostile/study/report.html")
        page.wait_for_function(
            "document.querySelectorAll('.js-plotly-plot').length == document.querySelectorAll('.plot').length"
        )
        assert page.locator(".plot").count() > 3 and not page.evaluate(hit)

        # a page that does hold a script: of a run it does not run, of a study it reaches nothing
        script = "<p id=p>shown</p><script>window.hit = [self.origin]; try { localStorage; hit.push('storage') } catch {}</script>"
        for folder, ran in ((run, False), (study, True)):
            (folder / "report.html").write_text(script)
            page.goto(f"{address}/runs/{quote(str(folder.relative_to(home)))}/report.html")
            page.get_by_text("shown").wait_for()
            assert page.evaluate("window.hit || null") == (["null"] if ran else None)
            for where in (f"{address}/api/studies", "http://127.0.0.1:9/"):
                asked = f"fetch('{where}').then(a => a.status, () => 'refused')"
                assert page.evaluate(asked) == "refused"
    finally:
        context.close()
        shutil.rmtree(home / "hostile")


def test_it_is_readable_dark_and_on_a_phone(opened, home):
    long = fabricate(home / "done" / "with-a-long-rate", lr=0.009471377965552478)
    with (long / "config.yaml").open("a") as file:
        file.write("trainer: {gradient_accumulation_steps: 16}\n")
    page = opened(
        "/?run=done/slow&run=done/with-a-long-rate",
        color_scheme="dark",
        viewport={"width": 390, "height": 800},
    )
    until(page, lambda: len(traces(page, "loss")) == 2, "two curves")
    lines = "[...document.querySelectorAll('#settings td')].map(t => t.getBoundingClientRect().height)"
    assert page.evaluate(lines) and max(page.evaluate(lines)) < 40  # no number is broken in two
    shutil.rmtree(long)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def light(selector: str, what: str) -> float:
        colour = page.evaluate("([s, w]) => getComputedStyle(document.querySelector(s))[w]", [selector, what])
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    for paper, ink in (
        (".ag-row", ".ag-cell"),
        ("body", "h2"),
        (".dash-dropdown", ".dash-dropdown"),
        ("#filter", "#filter"),
    ):
        assert light(paper, "backgroundColor") < 60 and light(ink, "color") > 140, (paper, ink)


def asked(url: str, **options) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_nothing_is_changed_and_nothing_else_is_served(address, home):
    assert asked(f"{address}/api/studies/1", method="DELETE")[0] == 403
    body = {
        "data": json.dumps({"study_name": "x", "directions": ["minimize"]}).encode(),
        "headers": {"Content-Type": "application/json"},
    }
    code, why = asked(f"{address}/api/studies", **body)
    assert code == 403 and "does not change them" in json.loads(why)["reason"]
    assert [s["study_name"] for s in json.loads(asked(f"{address}/api/studies")[1])["study_summaries"]] == [
        "tiny-lr"
    ]
    assert asked(f"{address}/", headers={"Host": "elsewhere.example:80"})[0] == 403
    (home.parent / "secret").write_text("a text of another folder")
    for path in (
        "/runs/../secret",
        "/runs/%2e%2e/secret",
        f"/runs/{home.parent}/secret",
        "/assets/../../secret",
    ):
        assert "a text of another folder" not in asked(address + path)[1]
    assert asked(f"{address}/runs/none")[0] == 404
    told = {"storage": "postgresql://me:secret@db/studies"}
    (home / "done" / "slow" / "trial.json").write_text(json.dumps(told))
    assert "postgresql://me:***@db/studies" in asked(f"{address}/runs/done/slow/trial.json")[1]
    (home / "done" / "slow" / ".hydra" / "more.yaml").write_text("- lr=1\n- trainer.hub_token=hf_x\n")
    assert asked(f"{address}/runs/done/slow/.hydra/more.yaml")[1] == "- lr=1\n- trainer.hub_token=***\n"
    assert "lr: 0.0001" in asked(f"{address}/runs/done/slow/config.yaml")[1]
    assert "config.yaml" in asked(f"{address}/runs/done/slow/")[1]


def test_what_cannot_be_served_is_one_clear_message(address, home, tmp_path):
    port = address.rpartition(":")[2]
    without = "import sys; sys.modules['dash_ag_grid'] = None; " + HYDRATUNE[2]
    for program, arguments, why in (
        (
            HYDRATUNE[2],
            [str(home), "--port", port],
            f"--port = {port}: cannot be used (Address already in use)",
        ),
        (HYDRATUNE[2], [str(tmp_path / "none")], "is no folder"),
        (
            without,
            [str(home), "--port", "0"],
            "needs the package dash_ag_grid\n    → pip install 'hydratune[dashboard]'",
        ),
    ):
        line = [sys.executable, "-c", program, "dashboard", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr
