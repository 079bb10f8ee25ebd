"""A study: who owns a trial, what an outcome becomes, and what a killed process leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from hydratune.errors import UserError
from hydratune.secrets import hide_password
from hydratune.sweep.search import PRUNERS, SAMPLERS, SamplerFactory, make_pruner
from hydratune.sweep.space import Float, Space, as_space
from hydratune.sweep.storage import open_storage
from hydratune.sweep.study import Outcome, Study, StudyConfig, best
from hydratune.sweep.trial import Bound

GRID = as_space({"lr": ["1e-5", "2e-5"], "r": [4, 8]})


def config(tmp_path: Path, **changes) -> StudyConfig:
    made = StudyConfig(
        name="s", storage=str(tmp_path / "journal.log"), space=GRID, objectives=("eval_loss",), directions=("minimize",),
        n_trials=4, sampler="grid",
    )  # fmt: skip
    return replace(made, **changes)


def ended(study: Study, ticket, value: float = 1.0) -> None:
    assert study.tell(ticket, Outcome("complete", [value]))


# ------------------------------------------------------------------ budget and ownership


def test_a_grid_is_handed_out_in_order_each_point_once_and_then_nothing(tmp_path):
    study = Study(config(tmp_path), tmp_path)
    tickets = [study.next_trial() for _ in range(5)]
    assert [t.settings for t in tickets[:4]] == list(GRID.grid())
    assert tickets[4] is None


def test_a_second_worker_gets_other_trials_and_adds_none(tmp_path):
    one, two = Study(config(tmp_path), tmp_path), Study(config(tmp_path), tmp_path)
    numbers = [worker.next_trial().number for worker in (one, two, one, two)]
    assert numbers == [0, 1, 2, 3]
    assert one.next_trial() is None and two.next_trial() is None


def test_an_outcome_is_told_once_and_by_its_owner(tmp_path):
    one, two = Study(config(tmp_path), tmp_path), Study(config(tmp_path), tmp_path)
    ticket = one.next_trial()
    assert not two.tell(ticket, Outcome("complete", [0.0]))
    ended(one, ticket, 0.5)
    assert not one.tell(ticket, Outcome("complete", [9.0]))
    assert one.records()[0].values == [0.5]


def test_the_budget_counts_finished_trials_and_can_be_raised(tmp_path):
    search = config(tmp_path, space=as_space({"lr": Float(1e-5, 1e-3)}), sampler="random", n_trials=2)
    study = Study(search, tmp_path)
    ended(study, study.next_trial())
    ended(study, study.next_trial())
    assert study.next_trial() is None
    more = Study(replace(search, n_trials=3), tmp_path)
    assert more.next_trial().number == 2


def test_an_interrupted_trial_keeps_its_number_and_settings(tmp_path):
    search = config(tmp_path, space=as_space({"lr": Float(1e-5, 1e-3)}), sampler="tpe", n_trials=3)
    study = Study(search, tmp_path)
    first = study.next_trial()
    study.tell(first, Outcome("interrupted"))
    again = study.next_trial()
    assert (again.number, again.settings, again.attempt) == (first.number, first.settings, 1)
    ended(study, again)
    assert [r.state for r in study.records()] == ["complete"]


def test_a_crashed_trial_is_taken_up_again_a_limited_number_of_times(tmp_path):
    study = Study(config(tmp_path, max_retries=2), tmp_path)
    for attempt in range(3):
        ticket = study.next_trial()
        assert (ticket.number, ticket.attempt) == (0, attempt)
        study.tell(ticket, Outcome("crashed", reason="killed by SIGKILL"))
    (record, *_) = study.records()
    assert (record.state, record.reason, record.attempts) == ("crashed", "killed by SIGKILL", 3)
    assert study.next_trial().number == 1


# ------------------------------------------------------------------ what a dead worker leaves

DIES = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_study import Study, Outcome, config
study = Study(config(Path({folder!r})), Path({folder!r}))
one, two, three = study.next_trial(), study.next_trial(), study.next_trial()
Outcome("complete", [0.25], attempt=0, study=study.uid).write(Path({folder!r}) / "1")
Outcome("complete", [0.75], attempt=7, study=study.uid).write(Path({folder!r}) / "2")
os.kill(os.getpid(), 9)
"""


def test_the_trials_of_a_killed_worker_are_told_if_they_had_ended_and_wait_if_not(tmp_path):
    code = DIES.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    study = Study(config(tmp_path), tmp_path)
    assert [r.state for r in study.records()] == ["running", "running", "running", "waiting"]
    assert study.reap() == [0, 1, 2]
    # the result of trial 2 is of another attempt, which does not count
    assert [(r.state, r.values) for r in study.records()[:3]] == [
        ("waiting", None),
        ("complete", [0.25]),
        ("waiting", None),
    ]
    assert study.reap() == []
    assert study.next_trial().number == 0


def test_a_living_worker_is_left_alone_and_one_of_another_machine_until_its_lease_ends(tmp_path, monkeypatch):
    one, two = Study(config(tmp_path, lease=0.4), tmp_path), Study(config(tmp_path, lease=0.4), tmp_path)
    one.next_trial()
    assert two.reap() == []
    monkeypatch.setattr("hydratune.sweep.study._here", lambda: "another-machine")
    assert two.reap() == []  # its sign of life is new to this worker
    one.keep_alive(force=True)
    time.sleep(0.25)
    assert two.reap() == []
    time.sleep(0.45)
    assert two.reap() == [0]


def test_a_torn_last_line_is_cut_and_the_study_goes_on(tmp_path):
    study = Study(config(tmp_path), tmp_path)
    ended(study, study.next_trial(), 0.5)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 6, "worker_id": "torn')  # no end of line: killed while writing
    study.next_trial()  # appends behind it
    again = Study(config(tmp_path), tmp_path)
    assert [r.state for r in again.records()] == ["complete", "running", "waiting", "waiting"]
    assert all(json.loads(line) for line in (tmp_path / "journal.log").read_text().splitlines())


def _append_and_die(path: str) -> None:
    storage = open_storage(path)
    backend = storage._backend
    with backend._kernel_lock:
        os.kill(os.getpid(), 9)


def test_a_process_killed_with_the_lock_in_hand_holds_up_no_one(tmp_path):
    study = Study(config(tmp_path), tmp_path)
    process = multiprocessing.get_context("fork").Process(
        target=_append_and_die, args=(str(tmp_path / "journal.log"),)
    )
    process.start()
    process.join(30)
    assert process.exitcode == -9
    start = time.monotonic()
    assert study.next_trial() is not None
    assert time.monotonic() - start < 10  # Optuna's own lock waits for 30 s


# ------------------------------------------------------------------ outcomes


@pytest.mark.parametrize("state", ["diverged", "out of memory", "invalid"])
def test_what_cannot_work_is_told_as_a_violated_constraint(tmp_path, state):
    study = Study(config(tmp_path), tmp_path)
    study.tell(study.next_trial(), Outcome(state, reason="because"))
    (trial, *_) = study.trials()
    assert trial.state.name == "PRUNED" and trial.constraints["runs"] > 0
    (record, *_) = study.records()
    assert (record.state, record.reason, record.feasible, record.values) == (state, "because", False, None)


def test_tpe_learns_where_memory_runs_out(tmp_path):
    """Above 0.5 memory runs out, and the objective is best just below: told as FAIL, TPE would go on trying there."""

    def bad_trials(state: str) -> int:
        folder = tmp_path / state
        search = config(folder, space=as_space({"x": Float(0.0, 1.0)}), sampler="tpe", n_trials=40)
        study = Study(search, folder)
        while ticket := study.next_trial():
            x = ticket.settings["x"]
            study.tell(ticket, Outcome(state) if x > 0.5 else Outcome("complete", [-x]))
        return sum(r.settings["x"] > 0.5 for r in study.records())

    assert bad_trials("out of memory") < bad_trials("failed")


def test_several_objectives_have_a_front_and_a_failure_does_not_end_them(tmp_path):
    search = config(
        tmp_path, objectives=("a", "b"), directions=("minimize", "maximize"), sampler="nsga2", n_trials=4
    )
    study = Study(search, tmp_path)
    for outcome in (
        Outcome("complete", [1.0, 1.0]),
        Outcome("complete", [2.0, 3.0]),
        Outcome("complete", [3.0, 2.0]),
        Outcome("diverged"),
    ):
        study.tell(study.next_trial(), outcome)
    front = best(study.records(), search.directions)
    assert [r.number for r in front] == [0, 1]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("several", [False, True])
def test_the_parameter_that_decides_is_the_most_important(tmp_path, direction, several):
    """The objective is x in the good half, and does not depend on y."""
    objectives, directions = (("a", "b"), (direction, "minimize")) if several else (("a",), (direction,))
    space = as_space({"x": Float(0.0, 1.0), "y": Float(0.0, 1.0)})
    study = Study(
        config(
            tmp_path, space=space, sampler="random", n_trials=40, objectives=objectives, directions=directions
        ),
        tmp_path,
    )
    assert study.importance() == {}
    while ticket := study.next_trial():
        value = ticket.settings["x"]
        study.tell(ticket, Outcome("complete", [value, 1.0] if several else [value]))
    found = study.importance()
    assert next(iter(found)) == "x" and found["x"] > 3 * found["y"]


def test_a_trial_beyond_its_bound_is_complete_but_not_the_best(tmp_path):
    study = Study(config(tmp_path, constraints=("peak_memory_gib <= 20",)), tmp_path)
    study.tell(study.next_trial(), Outcome("complete", [0.1], constraints={"peak_memory_gib <= 20": 4.0}))
    study.tell(study.next_trial(), Outcome("complete", [0.2], constraints={"peak_memory_gib <= 20": -4.0}))
    assert [r.number for r in best(study.records(), ["minimize"])] == [1]
    assert study.optuna.best_trial.number == 1


def test_bounds():
    assert Bound.parse("peak_memory_gib <= 20").excess(24.0) == 4.0
    assert Bound.parse(" eval_mean_token_accuracy>=0.5").excess(0.75) == -0.25
    assert Bound.parse("loss <= 1e-3").excess(None) > 0
    with pytest.raises(UserError):
        Bound.parse("loss < much")


# ------------------------------------------------------------------ another search under the same name


def test_another_search_is_refused_with_the_difference(tmp_path):
    Study(config(tmp_path, base=("peft=lora",)), tmp_path)
    other = as_space({"lr": ["1e-5", "3e-5"], "r": [4, 8]})
    with pytest.raises(UserError) as error:
        Study(config(tmp_path, space=other, base=("peft=none",)), tmp_path)
    text = str(error.value)
    assert "space lr: was choice: 1e-5, 2e-5, is choice: 1e-5, 3e-5" in text
    assert "base: peft=lora is gone" in text and "base: peft=none is new" in text


# ------------------------------------------------------------------ samplers and pruners


@pytest.mark.parametrize("name", [*SAMPLERS, "optuna.samplers.BruteForceSampler"])
def test_every_sampler_searches(tmp_path, name):
    space = as_space({"x": Float(0.0, 1.0), "y": Float(1e-3, 1.0, log=True)}) if "Brute" not in name else GRID
    study = Study(config(tmp_path, space=space, sampler=name, n_trials=4), tmp_path)
    seen = []
    while ticket := study.next_trial():
        seen.append(tuple(ticket.settings.values()))
        ended(study, ticket, float(ticket.number))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("name", ["random", "tpe", "qmc"])
def test_a_restarted_search_draws_as_one_that_never_stopped(tmp_path, name):
    search = config(tmp_path, space=as_space({"x": Float(0.0, 1.0)}), sampler=name, n_trials=6)

    def draw(folder: Path, restart: bool) -> list[float]:
        folder.mkdir()
        changed = replace(search, storage=str(folder / "journal.log"))
        study, seen = Study(changed, folder), []
        for i in range(6):
            if restart and i == 3:
                study = Study(changed, folder)
            ticket = study.next_trial()
            seen.append(ticket.settings["x"])
            ended(study, ticket, seen[-1])
        return seen

    assert draw(tmp_path / "once", False) == draw(tmp_path / "twice", True)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_is_made(name):
    assert isinstance(make_pruner(name, {}), optuna.pruners.BasePruner)


def test_patience_goes_around_another_pruner():
    pruner = make_pruner("patient", {"patience": 3, "wrapped": "median", "n_startup_trials": 2})
    assert isinstance(pruner._wrapped_pruner, optuna.pruners.MedianPruner)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_pruner("medain", {}),
        lambda: make_pruner("median", {"percent": 3}),
        lambda: make_pruner("optuna.pruners.NoSuch", {}),
        lambda: make_pruner("pathlib.Path", {}),
        lambda: SamplerFactory("tpee", {}, 0).make(0),
        lambda: SamplerFactory("tpe", {"startup": 3}, 0).make(0),
    ],
)
def test_wrong_samplers_and_pruners_are_one_clear_error(make):
    with pytest.raises(UserError) as error:
        make()
    assert error.value.violations[0].fix


def test_a_storage_that_does_not_open(tmp_path):
    (tmp_path / "file").write_text("")
    for storage in (
        str(tmp_path / "file" / "journal.log"),
        "postgresql://user:secret@localhost:1/none",
        "nosuch://x",
    ):
        with pytest.raises(UserError) as error:
            open_storage(storage)
        assert "secret" not in str(error.value)
    assert hide_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


@pytest.mark.parametrize("storage", ["journal.log", "other.log", "sqlite"])
def test_a_refused_study_leaves_nothing_in_the_storage(tmp_path, storage):
    place = f"sqlite:///{tmp_path}/s.db" if storage == "sqlite" else str(tmp_path / storage)
    mine = config(tmp_path, storage=place if storage == "sqlite" else str(tmp_path / "journal.log"))
    Study(mine, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="trials of another study"):
        Study(replace(mine, name="other", storage=place), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert optuna.get_all_study_names(open_storage(mine.storage)) == ["s"]


def test_an_empty_mark_is_none(tmp_path):
    (tmp_path / ".study").write_text("\n")
    study = Study(config(tmp_path), tmp_path)
    assert (tmp_path / ".study").read_text() == f"{study.uid}\n"


def test_a_resumed_study_enqueues_no_point_twice(tmp_path):
    def more(trial):
        return {}

    space = Space({"x": Float(0.0, 1.0)}, more)
    search = config(
        tmp_path, space=space, sampler="random", n_trials=9, enqueue=({"x": 1, "layers": (1, 2)}, {"x": 0.5})
    )
    for _ in range(2):
        assert len(Study(search, tmp_path).trials()) == 2
    study = Study(search, tmp_path)
    study.optuna.enqueue_trial({"x": 0.25})  # by another program
    Study(replace(search, enqueue=(*search.enqueue, {"x": 0.25}, {"x": 0.75}, {"x": 0.75})), tmp_path)
    assert [r.settings["x"] for r in study.records()] == [1.0, 0.5, 0.25, 0.75]


@pytest.mark.parametrize(
    "space, value",
    [
        ({"x": Float(0.0, 1.0)}, lambda x: x),  # the one parameter has it all
        ({"x": Float(0.0, 1.0), "y": [3]}, lambda x: x),
        ({"x": Float(0.0, 1.0), "y": [1, 2]}, lambda x: 7.0),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_importance_says_nothing_where_there_is_nothing_to_say(tmp_path, space, value, several):
    objectives, directions = (("a", "b"), ("minimize", "minimize")) if several else (("a",), ("minimize",))
    search = config(
        tmp_path,
        space=as_space(space),
        sampler="random",
        n_trials=12,
        objectives=objectives,
        directions=directions,
    )
    study = Study(search, tmp_path)
    while ticket := study.next_trial():
        x = ticket.settings["x"]
        study.tell(ticket, Outcome("complete", [value(x), x][: len(objectives)]))
    assert study.importance() == {}


def test_importance_is_of_what_was_varied(tmp_path):
    space = as_space({"x": Float(0.0, 1.0), "y": Float(0.0, 1.0), "z": ["one"]})
    study = Study(config(tmp_path, space=space, sampler="random", n_trials=20), tmp_path)
    while ticket := study.next_trial():
        ended(study, ticket, ticket.settings["x"])
    assert set(study.importance()) == {"x", "y"}


def test_a_seed_of_zero_is_one(tmp_path):
    def drawn(options: dict, seed: int) -> float:
        return (
            SamplerFactory("random", options, seed)
            .make(0)
            .sample_independent(
                optuna.create_study(),
                optuna.create_study().ask(),
                "x",
                optuna.distributions.FloatDistribution(0, 1),
            )
        )

    assert drawn({"seed": 0}, 5) == drawn({}, 0) == drawn({"seed": 0}, 6) != drawn({}, 5)


@pytest.mark.parametrize("seed", ["one", 1.5, True, [1]])
def test_a_seed_that_is_no_whole_number(seed):
    with pytest.raises(UserError, match=r"sampler_options\.seed"):
        SamplerFactory("tpe", {"seed": seed}, 0)
