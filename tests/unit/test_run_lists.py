"""What `hydratune runs` and `compare` mark as better, of fabricated runs; and what they refuse to."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from commands import run
from test_run_files import make
from typer.testing import CliRunner

from hydratune.cli import app
from hydratune.objective import direction
from hydratune.runs import _walk


def compared(home, *names, metric="eval_loss"):
    """Those marked as best by a metric, and all that is printed."""
    line = ["compare", *names, "--home", str(home), "--metric", metric]
    best = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["best"][metric]
    return best, CliRunner().invoke(app, line).stdout


def finals(**values):
    return {"metrics": {"final": values, "best": {}}, "steps": 1}


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("eval_rewards/chosen", None),
        ("rewards/rejected", None),
        ("rewards/std", None),
        ("objective/non_score_reward", None),
        ("objective/kl", None),
        ("eval_kl", None),
        ("eval_rewards/margins", "maximize"),
        ("eval_reward", "maximize"),
        ("eval_loss", "minimize"),
    ],
)
def test_a_name_tells_a_direction_or_none(metric, told):
    assert direction(metric) == told


def test_what_has_no_direction_is_not_marked(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        make(tmp_path / name, summary=finals(**{"rewards/chosen": value}))
    assert compared(tmp_path, "a", "b", metric="rewards/chosen")[0] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 1e-3}, ""),
        ({"data": {"source": "builtin", "size": 64, "columns": {}, "max_samples": 8}}, ""),
        ({"data": {"source": "builtin", "size": 32, "columns": {}}}, "data.size differs"),
        ({"algo": {"name": "sft", "beta": 0.5}}, "algo.beta differs"),
        ({"model": {"tokenizer": "byte"}}, "model.tokenizer differs"),
        ({"model": {"name_or_path": "x"}}, "model.name_or_path differs"),
    ],
    ids=["lr", "max_samples", "data", "beta", "tokenizer", "model"],
)
def test_a_loss_is_marked_where_it_is_of_the_same_rows_and_the_same_formula(tmp_path, settings, said):
    make(tmp_path / "a", summary=finals(eval_loss=1.0))
    make(tmp_path / "b", summary=finals(eval_loss=2.0), **settings)
    best, out = compared(tmp_path, "a", "b")
    assert best == ([] if said else ["a"]) and ("★" in out) == (not said) and said in out


def test_losses_of_online_runs_say_nothing(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        make(tmp_path / name, lr=value, summary={"algo": "grpo", **finals(loss=value)})
    assert compared(tmp_path, "a", "b", metric="loss")[0] == []


def opened(*words):
    """How often each run's metrics.jsonl is opened by a command, in a process that counts every file it opens."""
    code = """
import json, pathlib, sys
files = []
sys.addaudithook(lambda event, told: event == "open" and files.append(str(told[0])))
from hydratune.cli import app
try:
    app(sys.argv[1:])
finally:
    names = [pathlib.Path(f).parent.name for f in files if f.endswith("metrics.jsonl")]
    assert any(f.endswith("summary.json") for f in files)
    print(json.dumps({name: names.count(name) for name in names}), file=sys.stderr)
"""
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_what_has_ended_is_told_by_its_summary_alone(tmp_path):
    names = [str(i) for i in range(7)]
    for i, name in enumerate(names):
        events = [
            {"step": 1, "time": 1.0, "eval_loss": 9.0, "loss": 9.0},
            {"step": 2, "time": 2.0, "eval_loss": 2.0 + i},
        ]
        folder = make(tmp_path / name, lr=10.0**-i, events=events, summary={})
        size = (folder / "metrics.jsonl").stat().st_size
        final = {"final": {"eval_loss": 2.0 + i}, "best": {}}
        facts = {"status": "completed", "algo": "sft", "steps": 2, "metrics": final, "logged_bytes": size}
        facts |= {"objective": {"name": "eval_loss", "value": 2.0 + i}, "seconds": {"training": 2.0}}
        (folder / "summary.json").write_text(json.dumps(facts))
    home = ["--home", tmp_path]
    for command in (
        ["runs"],
        ["runs", "--json"],
        ["runs", "eval_loss<4", "--sort", "eval_loss", "--columns", "lr,eval_loss"],
    ):
        assert opened(*command, *home) == {}, command
    assert opened("compare", *names, *home) == {}
    assert opened("compare", *names[:3], "--json", *home) == {}
    # few stand side by side with their curves, which no summary has: each is read once, whatever is drawn of it
    assert opened("compare", "0", "1", *home) == {"0": 1, "1": 1}
    (tmp_path / "3" / "metrics.jsonl").open("a").write(
        '{"step": 3, "time": 3.0, "eval_loss": 1.0}\n'
    )  # resumed
    assert set(opened("runs", *home)) == {"3"}
    shown = json.loads(CliRunner().invoke(app, ["runs", "name=3", "--json", *map(str, home)]).stdout)[0]
    assert (shown["status"], shown["steps"], shown["metrics"]["eval_loss"]) == ("running", 3, 1.0)


def test_a_column_is_not_shown_twice(tmp_path):
    judged = {"objective": {"name": "eval_loss", "value": 1.0}}
    make(tmp_path / "a", summary={**finals(eval_loss=1.0), **judged})
    shown = ["runs", "--home", str(tmp_path), "--columns", "eval_loss,lr,lr,steps"]
    header = CliRunner().invoke(app, shown).stdout.splitlines()[0].split()
    assert header == ["status", "name", "algo", "lr", "eval_loss", "steps", "time"]


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Under outputs: one with a result, in a folder of its own choice; one that has begun; one whose facts are torn."""
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    make(outputs / "mysweep" / "0", summary=finals(eval_loss=1.0))
    trial = {
        "number": 0,
        "state": "complete",
        "values": [1.0],
        "settings": {"lr": 0.1},
        "seconds": 1.0,
        "reason": "",
    }
    facts = {"trials": [trial], "objectives": ["eval_loss"], "directions": ["minimize"], "front": [0]}
    facts["commands"] = {"0": "python train.py lr=0.1"}
    (outputs / "mysweep" / "study.json").write_text(json.dumps(facts))
    for name in ("begun", "torn"):
        (outputs / "sweeps" / name).mkdir(parents=True)
        (outputs / "sweeps" / name / ".study").write_text("aa")
    (outputs / "sweeps" / "torn" / "study.json").write_text('{"trials": [')
    return outputs


def test_the_commands_of_sweeps_see_every_study(studies):
    said = run("sweep", "status")[0]
    assert "outputs/mysweep: 1 complete · best eval_loss 1\n" in said
    assert "outputs/sweeps/begun: no trial has finished yet\n" in said
    assert "outputs/sweeps/torn: its study.json cannot be read" in said and len(said.splitlines()) == 3
    assert "★" in run("sweep", "status", "mysweep")[0]
    assert run("sweep", "best", "mysweep")[0] == "python train.py lr=0.1\n"
    assert run("sweep", "best", "mysweep", "--home", studies)[0] == "python train.py lr=0.1\n"
    assert "did you mean 'mysweep'" in run("sweep", "status", "myswep", code=2)[1]
    assert "no study under empty" in run("sweep", "status", "--home", "empty")[0]
    run("sweep", "status", "mysweep", "--rows", "-1", code=2)


@pytest.mark.parametrize(
    "name, said", [("begun", "no trial has finished yet"), ("torn", "study.json cannot be read")]
)
def test_a_study_without_facts_is_one_clear_error(studies, name, said):
    for word in ("status", "best", "rerun"):
        assert said in run("sweep", word, name, code=2)[1]
    (studies / "sweeps" / name / "study.json").write_text('{"trials": 3}')
    assert "does not tell trials, objectives" in run("sweep", "status", name, code=2)[1]


def test_a_study_without_a_finished_trial_goes_on(studies, monkeypatch):
    script = "import sys; open('went', 'w').write(' '.join(sys.argv[1:]))"
    (studies / "on.py").write_text(script)
    command = {"script": str(studies / "on.py"), "folder": str(studies), "arguments": []}
    (studies / "sweeps" / "begun" / "command.json").write_text(json.dumps(command))
    run("sweep", "resume", "begun", "sweep.n_trials=6")
    assert (studies / "went").read_text() == f"resume={studies / 'sweeps' / 'begun'} sweep.n_trials=6"


def test_runs_are_looked_for_once_however_many_are_named(tmp_path, monkeypatch):
    names = [f"run{i}" for i in range(5)]
    for name in names:
        make(tmp_path / "day" / name, summary=finals(eval_loss=1.0))
    walked = []
    monkeypatch.setattr(
        "hydratune.runs._walk", lambda folder, walk=_walk: walked.append(folder) or walk(folder)
    )
    run("compare", *names, "--home", tmp_path)
    assert walked.count(tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr<", "ends without a value"),
        ("started>", "ends without a value"),
        ("lr>=abc", "'abc' is no number, and lr is one"),
        ("lr<true", "'true' is no number"),
        ("eval_loss<=x", "'x' is no number"),
    ],
)
def test_more_or_less_than_no_number_is_refused(tmp_path, text, said):
    make(tmp_path / "a", summary=finals(eval_loss=1.0))
    assert said in run("runs", text, "--home", tmp_path, code=2)[1]
    assert "1 runs" in run("runs", "started>2020-01", "lr<1", "name~a", "--home", tmp_path)[0]
