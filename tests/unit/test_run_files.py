"""Runs on disk: found, named, told apart, filtered and compared from their files alone."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml
from commands import run

from hydratune.dashboard.library import row
from hydratune.errors import UserError
from hydratune.report import render
from hydratune.runs import curve, differences, find_run, find_runs, matching, metric_names

CONFIG = {
    "lr": 1e-4,
    "epochs": 2.0,
    "max_steps": None,
    "run_name": None,
    "output_dir": "somewhere",
    "trainer": {"learning_rate": 1e-4, "num_train_epochs": 2.0},
    "peft": None,
    "data": {"source": "builtin", "size": 64, "columns": {}},
    "algo": {"name": "sft"},
}


def make(folder, *, age=0.0, config=None, summary=None, events=(), **settings):
    """A run directory; its files are `age` seconds old, the summary the youngest of them."""
    folder.mkdir(parents=True)
    whole = {**CONFIG, **(config or {}), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    if summary is not None:
        made = {
            "status": "completed",
            "algo": "sft",
            "peft": None,
            "metrics": {"final": {}, "best": {}},
            **summary,
        }
        (folder / "summary.json").write_text(json.dumps(made))
    at = time.time() - age
    for file in folder.iterdir():
        late = 0.001 if file.name == "summary.json" else 0.0
        os.utime(file, (at + late, at + late))
    return folder


@pytest.fixture
def home(tmp_path):
    """Three runs of one day, and a study with two trials; the last that wrote is c."""
    make(
        tmp_path / "day" / "10-00-00-a",
        age=300,
        summary={"steps": 10, "seconds": {"data": 1.0, "training": 2.0}},
    )
    make(
        tmp_path / "day" / "11-00-00-b",
        age=200,
        lr=1e-3,
        summary={"peft": "lora"},
        config={"peft": {"type": "lora", "r": 8}},
    )
    make(tmp_path / "day" / "12-00-00-c", age=100, summary={"objective": {"name": "eval_loss", "value": 0.5}})
    for number in (0, 1):
        make(tmp_path / "sweeps" / "s" / str(number), age=400 + number, summary={})
    (tmp_path / "sweeps" / "s" / "study.json").write_text("{}")
    return tmp_path


def test_every_run_is_found_the_last_that_wrote_first(home):
    (home / "day" / "12-00-00-c" / "model").mkdir()
    (home / "day" / "12-00-00-c" / "model" / "config.yaml").write_text("no: run")
    (home / "notes.txt").write_text("none")
    names = [run.name for run in find_runs(home)]
    assert names == ["day/12-00-00-c", "day/11-00-00-b", "day/10-00-00-a", "sweeps/s/0", "sweeps/s/1"]
    assert [run.name for run in find_runs(home / "day" / "10-00-00-a")] == ["10-00-00-a"]
    assert find_runs(home / "nowhere") == []


def test_a_run_may_be_called_like_a_part_of_one(tmp_path):
    for name in ("base", "model"):
        make(tmp_path / name)
    (tmp_path / "checkpoints" / "deep").mkdir(parents=True)
    make(tmp_path / "checkpoints" / "deep" / "not")
    (tmp_path / "begun" / ".hydra").mkdir(parents=True)
    (tmp_path / "begun" / ".hydra" / "config.yaml").write_text("lr: 1")
    assert {run.name for run in find_runs(tmp_path)} == {"base", "model"}


def test_a_trial_knows_its_study(home):
    trial, run = find_run("s/1", home), find_run("b", home)
    assert trial.trial_of == home / "sweeps" / "s" and run.trial_of is None


@pytest.mark.parametrize("name", ["day/11-00-00-b", "00-b", "11-00", "day/11-00-00-b"])
def test_a_run_is_named_by_its_end_or_another_part(home, name):
    assert find_run(name, home).name == "day/11-00-00-b"


def test_latest_is_the_one_that_wrote_last_and_a_directory_is_itself(home, monkeypatch):
    assert find_run("latest", home).name == "day/12-00-00-c"
    monkeypatch.chdir(home)
    assert find_run("day/10-00-00-a", home / "sweeps").path.samefile(home / "day" / "10-00-00-a")


@pytest.mark.parametrize(
    ("name", "said"),
    [("00-00", "fits 3 runs"), ("12-00-00-d", "did you mean 'day/12-00-00-c'?"), ("zzz", "no such run")],
)
def test_a_name_that_fits_none_or_several_is_refused(home, name, said):
    with pytest.raises(UserError, match="RUN") as error:
        find_run(name, home)
    assert said in str(error.value)


def test_without_any_run_the_way_out_is_to_train_one(tmp_path):
    with pytest.raises(UserError, match=r"python train\.py"):
        find_run("latest", tmp_path)


@pytest.mark.parametrize(
    ("age", "summary", "later", "steps", "status"),
    [
        (0, None, 0, [], "running"),
        (1000, None, 0, [], "stopped"),
        (0, {"status": "failed"}, 0, [], "failed"),
        (1000, {"status": "failed", "steps": 0}, 0, [1], "failed"),  # it never knew its steps
        (0, {"steps": 10}, 60, [9, 10], "completed"),  # copied: the summary may be the older file
        (1000, {"status": "interrupted", "steps": 10}, 900, [10, 11], "running"),  # resumed
        (1000, {"status": "interrupted", "steps": 10}, 100, [10, 11], "stopped"),  # resumed, then killed
    ],
    ids=["young", "old", "failed", "failed-early", "copied", "resumed", "resumed-and-killed"],
)
def test_the_status_is_that_of_the_summary_unless_a_later_step_was_logged(
    tmp_path, age, summary, later, steps, status
):
    folder = make(tmp_path / "a", age=age, summary=summary, events=[{"step": s} for s in steps])
    if later:
        at = time.time() - age + later
        os.utime(folder / "metrics.jsonl", (at, at))
    assert find_run("a", tmp_path).status == status


@pytest.mark.parametrize(("gap", "status"), [(10.0, "stopped"), (400.0, "running")])
def test_a_run_that_logs_seldom_is_not_taken_for_dead(tmp_path, gap, status):
    make(tmp_path / "a", age=1000, events=[{"step": i, "time": gap * i} for i in range(4)])
    assert find_run("a", tmp_path).status == status


def test_a_resumed_run_has_the_values_of_now(tmp_path):
    old = {
        "steps": 1,
        "metrics": {"final": {"eval_loss": 3.0}},
        "objective": {"name": "eval_loss", "value": 3.0},
    }
    events = [{"step": i, "time": 1.0, "eval_loss": 4.0 - i, "note": None} for i in (1, 2)]
    make(tmp_path / "a", summary={**old, "tokens_per_second": 5.0}, events=events)
    run = find_run("a", tmp_path)
    assert (run.status, run.final, run.objective) == ("running", {"eval_loss": 2.0}, ("eval_loss", 2.0))
    assert [run.value(key) for key in ("eval_loss", "steps", "tokens_per_second")] == [2.0, 2, 5.0]
    shown = row(run)
    assert (shown["metric"], shown["objective"], shown["steps"]) == ("eval_loss", 2.0, 2)


def test_a_filter_may_leave_no_run_that_has_the_key_of_the_next(home):
    assert matching(find_runs(home), ["name~10-00", "peft.r=8"]) == []


def test_facts_settings_and_metrics_are_asked_for_by_name(home):
    run = find_run("10-00-00-a", home)
    found = {
        key: run.value(key) for key in ("status", "steps", "seconds", "lr", "data.size", "algo", "nothing")
    }
    assert found == {
        "status": "completed", "steps": 10, "seconds": 3.0, "lr": 1e-4, "data.size": 64, "algo": "sft", "nothing": None,
    }  # fmt: skip
    assert find_run("c", home).objective == ("eval_loss", 0.5) and find_run("b", home).objective == ("", None)
    assert find_run("b", home).value("peft") == "lora"


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["lr<1e-3"], "ca01"),
        (["lr>=1e-3"], "b"),
        (["lr=0.001"], "b"),
        (["lr != 1e-4"], "b"),
        (["peft=lora"], "b"),
        (["name~10-00"], "a"),
        (["lr<1e-3", "objective<1"], "c"),
        (["status=completed", "data.size<=64"], "cba01"),
        (["peft.r=8"], "b"),
        (["lr>1"], ""),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v or "none",
)
def test_every_filter_has_to_hold(home, filters, names):
    assert "".join(run.name[-1] for run in matching(find_runs(home), filters)) == names


@pytest.mark.parametrize(
    ("text", "said"), [("lr", "is no filter"), ("lrr=1", "did you mean 'lr'?"), ("<1", "is no filter")]
)
def test_a_filter_that_cannot_be_read_is_refused(home, text, said):
    with pytest.raises(UserError) as error:
        matching(find_runs(home), [text])
    assert said in str(error.value)


def test_only_what_differs_is_told_and_once(tmp_path):
    """learning_rate says what lr says; r is there because the adapter is; places are no settings."""
    make(tmp_path / "a", output_dir="x", trainer={"learning_rate": 1e-4, "warmup_steps": 1})
    lora = {"type": "lora", "r": 8}
    make(
        tmp_path / "b", output_dir="y", lr=1e-3, trainer={"learning_rate": 1e-3, "warmup_steps": 2}, peft=lora,
        model={"architecture": {"model_type": "qwen2", "hidden_size": 8}},
    )  # fmt: skip
    found = differences([find_run(name, tmp_path) for name in "ab"])
    assert found == {
        "lr": [1e-4, 1e-3], "trainer.warmup_steps": [1, 2], "peft.type": [None, "lora"],
        "model.architecture.model_type": [None, "qwen2"],
    }  # fmt: skip
    make(tmp_path / "c", peft={"type": "lora", "r": 16})
    assert differences([find_run(name, tmp_path) for name in "bc"])["peft.r"] == [8, 16]


def test_metrics_and_curves_come_from_the_log_a_torn_line_left_out(tmp_path):
    events = [
        {"step": 1, "epoch": 0.1, "time": 2.0, "loss": 3.0},
        {"step": 2, "time": 3.0, "eval_loss": 2.0, "note": "x"},
    ]
    folder = make(tmp_path / "a", events=events)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run = find_run("a", tmp_path)
    assert metric_names([run]) == ["loss", "eval_loss"]
    assert curve(run, "loss") == ([1], [3.0]) and curve(run, "eval_loss", "time") == ([3.0], [2.0])
    assert curve(run, "loss", "epoch") == ([0.1], [3.0]) and curve(run, "nothing") == ([], [])


@pytest.mark.parametrize(
    "text",
    ["{", "- 1\n- 2", "", "a: [1", "just text", "\tlr: 1"],
    ids=["brace", "list", "empty", "open", "text", "tab"],
)
def test_torn_files_leave_a_run_without_settings(tmp_path, text):
    folder = make(tmp_path / "a", summary={})
    (folder / "config.yaml").write_text(text)
    (folder / "summary.json").write_text("[1")
    run = find_run("a", tmp_path)
    assert run.config == {} and run.summary == {} and run.objective == ("", None)


@pytest.mark.parametrize(
    "damage",
    [
        {"objective": "y"},
        {"objective": {"name": "eval_loss", "value": "x"}},
        {"metrics": 3},
        {"metrics": {"final": "x", "best": {"loss": "y"}}},
        {"seconds": 3},
        {"seconds": {"training": "long"}},
        {"peak_memory": "much"},
        {"steps": "many", "tokens": "few"},
        {"versions": 3, "started": 5, "algo": ["sft"]},
    ],
    ids=str,
)
def test_a_damaged_summary_takes_down_no_list_and_no_page(damage, home, capsys):
    events = [{"step": i, "time": 1.0, "loss": 3.0 - i} for i in (1, 2)]
    make(home / "damaged", events=events, summary={"steps": 2, "objective": {"name": "loss"}, **damage})
    assert len(json.loads(run("runs", "--home", home, "--json", "--columns", "lr")[0])) == 6
    run("runs", "--home", home), run("compare", "damaged", "12-00-00-c", "--home", home)
    assert row(find_run("damaged", home))["name"] == "damaged"
    assert "damaged" in render(home / "damaged")[0]


def test_a_damaged_line_of_metrics_is_left_out(home):
    events = [{"step": i, "time": 1.0, "loss": 3.0 - i} for i in (1, 2, 3)]
    folder = make(home / "damaged", events=events)
    first, second, third = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = b'{"step": "x", "time": "y", "loss": 9.0}\n'
    (folder / "metrics.jsonl").write_bytes(first + second.replace(b"loss", b"\xff\xfe") + odd + third)
    (folder / "samples.jsonl").write_bytes(b"\xff\n")
    found = find_run("damaged", home)
    assert curve(found, "loss") == ([1, 3], [2.0, 0.0]) and row(found)["steps"] == 3
    run("runs", "--home", home)
    assert "damaged" in render(folder)[0]
