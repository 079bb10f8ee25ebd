"""The space: what is searched, its grid, and points given by a user."""

from __future__ import annotations

import optuna
import pytest

from hydratune.command import text
from hydratune.errors import UserError
from hydratune.sweep.job import Command
from hydratune.sweep.space import Choice, Float, Int, Paired, Space, as_space

SIZES = Paired({"peft.r": 8, "peft.lora_alpha": 16}, {"peft.r": 16, "peft.lora_alpha": 64})


def test_a_grid_counts_with_its_last_dimension_fastest_and_has_each_point_once():
    space = as_space({"lr": ["1e-5", "2e-5"], "size": SIZES, "seed": [1, 1, 2]})
    assert space.finite and len(space) == 2 * 2 * 2
    points = list(space.grid())
    assert [p["lr"] for p in points] == ["1e-5"] * 4 + ["2e-5"] * 4
    assert [p["seed"] for p in points] == [1, 2] * 4
    assert len({tuple(p.items()) for p in points}) == 8


def test_paired_settings_move_together():
    space = as_space({"size": SIZES})
    seen = []

    def objective(trial):
        seen.append(tuple(space.suggest(trial).items()))
        return 0.0

    optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).optimize(objective, n_trials=12)
    assert set(seen) == {(("peft.r", 8), ("peft.lora_alpha", 16)), (("peft.r", 16), ("peft.lora_alpha", 64))}


def test_a_function_adds_settings_that_depend_on_others():
    def more(trial):
        kind = trial.suggest_categorical("peft", ["none", "lora"])
        return {"peft": kind} | ({"peft.r": trial.suggest_int("peft.r", 4, 8)} if kind == "lora" else {})

    space = Space({"lr": Float(1e-5, 1e-3, log=True)}, more)
    points = []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda t: points.append(space.suggest(t)) or 0.0, n_trials=20)
    assert not space.finite
    assert {("peft.r" in p) for p in points if p["peft"] == "lora"} == {True}
    assert {("peft.r" in p) for p in points if p["peft"] == "none"} == {False}


@pytest.mark.parametrize(
    "kind, low, high, log", [(Float, 1e-3, 1e-5, False), (Float, 0.0, 1.0, True), (Int, 5, 1, False)]
)
def test_bounds_that_cannot_be(kind, low, high, log):
    with pytest.raises(UserError, match="interval"):
        kind(low, high, log=log)


def test_known_good_points_take_the_types_of_the_space():
    space = as_space({"lr": Float(1e-5, 1e-2), "r": Choice("8", "16"), "n": Int(1, 9), "size": SIZES})
    given = {"lr": "2e-5", "r": 16, "n": 3, "peft.r": 16, "peft.lora_alpha": 64}
    assert space.parameters(given) == {"lr": 2e-5, "r": "16", "n": 3, "size": SIZES.labels[1]}
    with pytest.raises(UserError) as error:
        space.parameters({"lr": 1.0, "x": 2})
    assert len(error.value.violations) == 2


def test_nothing_is_a_choice_and_a_known_good_one():
    space = as_space(
        {"n": Choice(None, 8), "b": Choice(1, True), "size": Paired({"r": None, "k": 1}, {"k": 1})}
    )
    assert space.parameters({"n": None, "b": True, "k": 1}) == {"n": None, "b": True, "size": "k=1"}
    assert space.parameters({"n": "null", "r": None, "k": 1}) == {"n": None, "size": "r=None k=1"}
    with pytest.raises(UserError, match="not in the space"):
        space.parameters({"n": 9})


def test_a_pair_given_twice_is_one_point_and_what_is_no_pair_is_refused():
    assert Paired({"a": 1}, {"a": 2}, {"a": 1}).labels == ["a=1", "a=2"]
    with pytest.raises(UserError, match="no mapping"):
        Paired({"a": 1}, "b")


@pytest.mark.parametrize("value", [(), "abc", 3])
def test_what_is_no_dimension_is_refused(value):
    with pytest.raises(UserError):
        as_space({"lr": value})


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-05,
        "1e-5",
        "a:b",
        "hf://x/y",
        "a b",
        "it's",
        "a,b",
        "x=y",
        "",
        ["a", 1, None],
        {"k": [1, "b c"]},
        "back\\slash",
        "ends\\",
        "both\\'",
        "(x)",
        "${a}",
    ],
)
def test_a_value_comes_back_from_hydras_grammar_as_it_was(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"key={text(value)}"])
    plain = override.value()
    assert _plain(plain) == (1e-5 if value == "1e-5" else value)


def _plain(value):
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def test_a_trials_setting_replaces_the_one_that_all_have():
    command = Command("/x/train.py", ("peft=lora", "++trainer.seed=3", "lr=1e-3"), "/x")
    assert command.arguments({"lr": 2e-5, "trainer.seed": 4}) == ["peft=lora", "lr=2e-05", "trainer.seed=4"]
    assert command.line({"lr": "2e-5"}).startswith("python train.py peft=lora")


# ------------------------------------------------------------------ what a warm process reads ahead


def test_the_first_point_that_is_read_ahead_has_pairs_and_reads_as_it_was():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from hydra_plugins.hydratune_sweeper import _ahead

    pairs = Paired({"algo.max_length": 64, "data.text": "it's"}, {"algo.max_length": 8, "data.text": "a (b)"})
    dimensions = {"lr": Float(1e-5, 1e-3), "p": pairs, "data.path": Choice("a b.jsonl", "x,y.jsonl")}
    lines = _ahead.lines(["peft=lora", "data.text=z"], dimensions)
    read = [
        {o.key_or_group: _plain(o.value()) for o in OverridesParser.create().parse_overrides([*x])}
        for x in lines
    ]
    first = {"peft": "lora", "algo.max_length": 64, "data.text": "it's", "data.path": "a b.jsonl"}
    assert read == [
        first,
        first | {"algo.max_length": 8, "data.text": "a (b)"},
        first | {"data.path": "x,y.jsonl"},
    ]


@pytest.mark.parametrize(
    "dimensions, lines",
    [
        ({"lr": Choice(1, 2), "peft.r": Int(1, 9), "algo.beta": Float(0, 1)}, 1),
        ({"data.path": Choice("a", "b"), "model": Choice("x", "y", "z")}, 6),
        ({"peft": Choice("none", "qlora"), "trainer.weight_decay": Choice(0, 1)}, 2),
        ({"data.eval_fraction": Float(0.1, 0.5)}, None),
        ({"algo.max_length": Int(1, 9)}, None),
        ({"seed": Choice(*range(13))}, None),
        ({"p": Paired({"lr": 1, "data": "a"}, {"lr": 2, "data": "b"})}, 2),
    ],
)
def test_no_trial_can_work_is_told_from_every_combination_that_matters(dimensions, lines):
    from hydra_plugins.hydratune_sweeper import _ahead

    found = _ahead.deciding(["peft=lora"], dimensions)
    assert (found and len(set(found))) == lines


@pytest.mark.parametrize(
    "key, of_the_data",
    [
        ("data.path", True),
        ("model.name_or_path", True),
        ("bad.jsonl line 2, column messages", True),
        ("algo.max_length", False),
        ("epochs", False),
        ("max_steps", False),
        ("objective", False),
        ("tracking.wandb", False),
    ],
)
def test_what_is_wrong_with_the_data_is_told_from_what_is_wrong_with_a_setting(key, of_the_data):
    from hydratune.errors import Violation
    from hydratune.sweep.warm import _of_the_data

    assert _of_the_data(Violation(key, 1, "why", "fix")) is of_the_data


def test_only_a_refusal_of_everything_that_decides_is_one_of_the_search(tmp_path):
    from hydratune.sweep.warm import warm

    script = tmp_path / "entry_of_a_test.py"
    script.write_text(
        "from hydratune.errors import UserError, Violation\n"
        "def warm(argv):\n"
        "    if argv[0] != 'good':\n"
        "        raise UserError(Violation(argv[0], 1, 'cannot work', 'mend it'))\n"
    )

    def refused(ahead, deciding) -> bool:
        lines = [None if x is None else tuple((word,) for word in x.split()) for x in (ahead, deciding)]
        try:
            warm(Command(str(script), (), str(tmp_path), warm_with=lines[0], decided_by=lines[1]))
        except UserError:
            return True
        return False

    assert refused("data.path data.name", "data.path data.name")
    assert not refused("data.path", None)  # a function of the space, or too many combinations
    assert not refused("data.path", "data.path good")
    assert not refused("data.path good", "data.path good")
    assert not refused("data.path algo.beta", "data.path algo.beta")
