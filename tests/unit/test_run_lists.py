"""What `hydratune runs` and `compare` mark as better, of fabricated runs; and what they refuse to."""

from __future__ import annotations

import json

import pytest
from test_run_files import make
from typer.testing import CliRunner

from hydratune.cli import app
from hydratune.objective import direction


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


def test_a_column_is_not_shown_twice(tmp_path):
    judged = {"objective": {"name": "eval_loss", "value": 1.0}}
    make(tmp_path / "a", summary={**finals(eval_loss=1.0), **judged})
    shown = ["runs", "--home", str(tmp_path), "--columns", "eval_loss,lr,lr,steps"]
    header = CliRunner().invoke(app, shown).stdout.splitlines()[0].split()
    assert header == ["status", "name", "algo", "lr", "eval_loss", "steps", "time"]
