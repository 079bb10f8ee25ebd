"""The page of a study: every plot has its data, nothing is fetched, no text of a user's becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from hydratune import sweep
from hydratune.sweep.page import display_study, draw, page


def task(settings):
    trial = sweep.current()
    for step in range(1, 4):
        trial.report(settings["lr"] * step, step)
    if settings["note"] == "bad":
        raise ValueError("</script><b>broken</b>")
    return settings["lr"] * (2 if settings["note"] == "a" else 1)


class _Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href") and v]


def test_the_page_of_a_real_study(tmp_path):
    space = {"lr": sweep.Float(1e-5, 1e-1, log=True), "note": ["a", "b", "bad"]}
    sweep.run(task, space, output_dir=tmp_path, n_trials=9, sampler="random", quiet=True, max_retries=0)
    html = (tmp_path / "report.html").read_text()
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert titles == [
        "History",
        "Importance of each parameter",
        "Parallel coordinates",
        "Slices",
        "Reported values",
        "Timeline",
    ]
    parser = _Sources()
    parser.feed(html)
    assert all(s.startswith("data:") or s.endswith("report.html") for s in parser.found)
    assert "\"'a'\"" not in html and '"a"' in html  # Optuna's slices quote the entries of a choice
    assert "<b>broken</b>" not in html and "broken" in html
    assert "rgb(122,92,240)" in html and "#440154" not in html.split("const figures")[1]  # seen on dark paper
    assert "Importance for objective: lr" in (tmp_path / "study.md").read_text()
    facts = json.loads((tmp_path / "study.json").read_text())
    assert len(facts["trials"]) == 9 and html.count("<tr><td>") >= 9


def test_texts_that_are_numbers_are_drawn_as_numbers(tmp_path):
    facts = {
        "name": "s", "objectives": ["eval_loss"], "directions": ["minimize"], "space": {}, "sampler": "grid", "pruner": "none",
        "front": [0], "commands": {"0": "python train.py lr=1e-5"},
        "trials": [
            {"number": i, "state": "complete", "values": [float(i)], "settings": {"lr": lr, "peft": p}, "params": {"lr": lr, "peft": p},
             "intermediate": {}, "started": 1.0 + i, "ended": 2.0 + i, "seconds": 1.0, "reason": ""}
            for i, (lr, p) in enumerate([("1e-5", "none"), ("1e-3", "lora"), ("1e-4", "lora")])
        ],
    }  # fmt: skip
    study = display_study(facts)
    assert study.trials[0].params == {"lr": 1e-5, "peft": "none"}
    assert study.trials[0].distributions["lr"].log
    assert "python train.py lr=1e-5" in page(tmp_path, facts)


def test_a_page_is_drawn_of_a_study_with_nothing_done(tmp_path):
    facts = {
        "name": "s", "objectives": ["a", "b"], "directions": ["minimize", "maximize"], "space": {"x": "choice: 1"}, "sampler": "grid",
        "pruner": "none", "front": [], "commands": {},
        "trials": [{"number": 0, "state": "running", "values": None, "settings": {}, "params": {}, "intermediate": {}, "started": 1.0,
                    "ended": None, "seconds": None, "reason": ""}],
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(facts))
    draw(tmp_path)
    assert "1 running" in (tmp_path / "report.html").read_text()
