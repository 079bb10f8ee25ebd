"""What the dashboard reads of runs: rows, columns, curves, completions; from fabricated run directories."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml

from hydratune.dashboard import library
from hydratune.dashboard.library import Library
from hydratune.errors import UserError
from hydratune.runs import find_runs, find_studies


def run(folder, *, losses=(), summary=True, typed=("lr=0.1",), peft="none", **config):
    """A run directory as `train.py` leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"algo": {"name": "sft"}, **config}))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(typed)))
    choices = {"algo": "sft", "model": "tiny", "data": "arithmetic", "peft": peft}
    (folder / ".hydra" / "hydra.yaml").write_text(
        yaml.safe_dump({"hydra": {"runtime": {"choices": choices}}})
    )
    events = [{"step": i + 1, "epoch": i / 10, "time": 2.0 * i, "loss": v} for i, v in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    if summary:
        facts = {
            "status": "completed",
            "objective": {"name": "eval_loss", "value": 0.5},
            "steps": len(losses),
            **choices,
        }
        (folder / "summary.json").write_text(
            json.dumps(facts | {"tokens_per_second": 9.0, "metrics": {"final": {}, "best": {}}})
        )
    return folder


def test_a_row_of_a_run_that_has_ended_and_of_one_that_trains(tmp_path):
    run(tmp_path / "a", losses=[3.0, 2.0], peft="lora")
    run(tmp_path / "b", losses=[3.0, 2.5, 2.25], summary=False)
    rows = {row["name"]: row for row in map(library.row, Library(tmp_path).runs())}
    facts = {
        "status": "completed",
        "algo": "sft",
        "model": "tiny",
        "peft": "lora",
        "metric": "eval_loss",
        "objective": 0.5,
        "steps": 2,
        "speed": 9.0,
    }
    assert facts.items() <= rows["a"].items()
    facts = {
        "status": "running",
        "algo": "sft",
        "data": "arithmetic",
        "peft": "none",
        "metric": "loss",
        "objective": 2.25,
        "steps": 3,
    }
    assert facts.items() <= rows["b"].items()


def test_what_a_run_writes_is_seen_and_what_has_ended_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_LOOK", 0.0)
    run(tmp_path / "a", losses=[3.0])
    live = run(tmp_path / "b", losses=[3.0], summary=False)
    runs = Library(tmp_path)
    before = {r.name: r for r in runs.runs()}
    with (live / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')  # torn
    after = {r.name: r for r in runs.runs()}
    assert after["a"] is before["a"]
    assert library.row(after["b"])["steps"] == 2
    (live / "summary.json").write_text('{"status": "completed"}')
    os.utime(live / "summary.json", (time.time() + 5,) * 2)
    assert {r.name: r.status for r in runs.runs()} == {"a": "completed", "b": "completed"}


def test_columns_are_the_settings_that_tell_runs_apart(tmp_path):
    for i in range(3):
        run(tmp_path / str(i), lr=10.0**-i, seed=1, algo={"name": "sft", "beta": "1e-1"}, trainer={"x": i % 2},
            typed=[f"lr={10.0**-i}", "seed=1", "+algo.beta=1e-1", f"output_dir={i}", *(["++trainer.x=1"] if i == 1 else [])])  # fmt: skip
    runs = Library(tmp_path).runs()
    assert library.setting_columns(runs) == ["lr", "trainer.x"]
    assert library.setting(runs[0], "algo.beta") == 0.1  # a number that YAML reads as text


def test_a_line_of_filters(tmp_path):
    assert library.filters("lr < 1e-4  peft=lora 'data=my data' base") == [
        "lr<1e-4",
        "peft=lora",
        "data=my data",
        "name~base",
    ]
    run(tmp_path / "baseline", lr=1e-5)
    run(tmp_path / "other", lr=1e-2, peft="lora")
    runs = Library(tmp_path).runs()
    names = {
        text: [r.name for r in library.chosen(runs, text)]
        for text in ("lr<1e-4", "peft=lora", "base", "base lr>1")
    }
    assert names == {"lr<1e-4": ["baseline"], "peft=lora": ["other"], "base": ["baseline"], "base lr>1": []}
    with pytest.raises(UserError, match="did you mean 'lr'"):
        library.chosen(runs, "lrr=1")
    with pytest.raises(ValueError, match="quot"):
        library.chosen(runs, "name='x")


def test_a_long_curve_keeps_its_ends_and_its_spikes(tmp_path):
    losses = [1.0] * 5000
    losses[1234], losses[4321] = 9.0, -3.0
    (found,) = find_runs(run(tmp_path / "a", losses=losses))
    x, y, _ = library.points(found, "loss", "step", 0.0, 200)
    assert len(x) <= 202 and (x[0], x[-1]) == (1, 5000) and x == sorted(x)
    assert (x[y.index(9.0)], x[y.index(-3.0)]) == (1235, 4322)
    assert library.points(found, "loss", "time", 0.0, 10_000)[0][:3] == [0.0, 2.0, 4.0]


def test_smoothing_is_an_unbiased_running_mean(tmp_path):
    losses = [4.0, 2.0, 3.0]
    (found,) = find_runs(run(tmp_path / "a", losses=losses))
    _, y, smooth = library.points(found, "loss", "step", 0.5, 100)
    weights = [[1.0], [0.5, 1.0], [0.25, 0.5, 1.0]]
    expected = [sum(w * v for w, v in zip(ws, losses, strict=False)) / sum(ws) for ws in weights]
    assert y == losses and smooth == pytest.approx(expected)
    assert library.points(found, "loss", "step", 0.0, 100)[2] == losses


def test_completions_stand_side_by_side_by_prompt(tmp_path):
    said = {"a": [("p", "1"), ("q", "2")], "b": [("q", "3"), ("r", "4")]}
    for name, rows in said.items():
        folder = run(tmp_path / name)
        (folder / "samples.jsonl").write_text(
            "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows) + '{"pro'
        )
    told = [("p", "old"), ("q", "one"), ("p", "new")]
    lines = [json.dumps({"step": i, "prompt": p, "completion": c}) + "\n" for i, (p, c) in enumerate(told)]
    (tmp_path / "a" / "generations.jsonl").write_text("".join(lines))
    runs = sorted(Library(tmp_path).runs(), key=lambda r: r.name)
    found = {
        prompt: [a and a["completion"] for a in answers]
        for prompt, answers in library.completions(runs, "samples")
    }
    assert found == {"q": ["2", "3"], "p": ["1", None], "r": [None, "4"]} and next(iter(found)) == "q"
    newest = [
        (prompt, answers[0]["completion"]) for prompt, answers in library.completions(runs, "generations")
    ]
    assert newest == [("p", "new"), ("q", "one")]


@pytest.mark.parametrize(
    "told",
    [
        {"chosen": "yes it is", "rejected": "no way", "score_chosen": 0.25, "score_rejected": -1.5},
        {"step": 777777, "policy": "of the policy", "reference": "of the reference"},
        {"completion": "an answer", "reference": "a truth"},
    ],
    ids=["reward", "preference", "completion"],
)
def test_rows_of_every_kind_are_shown(tmp_path, told):
    pytest.importorskip("dash_ag_grid", reason="needs the extra [dashboard]")
    from plotly.utils import PlotlyJSONEncoder

    from hydratune.dashboard.layout import completions_table

    folder = run(tmp_path / "a")
    (folder / "samples.jsonl").write_text(json.dumps({"prompt": "asked", **told}) + "\n")
    runs = Library(tmp_path).runs()
    said = library.completions(runs, "samples")
    shown = json.dumps(completions_table(runs, {"a": 0}, said), cls=PlotlyJSONEncoder)
    for text in ("asked", *map(str, told.values())):
        assert shown.count(text) == 1, text
    assert "nothing" not in shown


def test_studies_are_found_before_they_have_a_result(tmp_path):
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "sweeps" / "s" / ".study").write_text("x")
    run(tmp_path / "sweeps" / "s" / "0")
    assert find_studies(tmp_path) == [tmp_path / "sweeps" / "s"]
    (found,) = find_runs(tmp_path)
    assert (
        found.trial_of == tmp_path / "sweeps" / "s"
        and found.typed == ["lr"]
        and found.choices["model"] == "tiny"
    )
