"""The storage that shows all studies at once, held against Optuna's own of each."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time

import optuna
import pytest

pytest.importorskip("optuna_dashboard", reason="needs the extra [dashboard]")
from optuna_dashboard import get_note, save_note

from hydratune.dashboard.places import where
from hydratune.dashboard.questions import NoAnswer
from hydratune.dashboard.studies import Curves, ReadOnly, Studies
from hydratune.sweep.storage import open_storage


def make(folder, trials: int, *, storage: str | None = None, name: str | None = None, uid="aa"):
    """A study of ours with finished trials of different fates and one that runs."""
    folder.mkdir(parents=True)
    (folder / ".study").write_text(uid)
    kept = storage or str(folder / "journal.log")
    study = optuna.create_study(
        study_name=name or folder.name, storage=open_storage(kept), direction="maximize"
    )
    for number in range(trials):
        trial = study.ask({"lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)})
        run = folder / str(number)
        run.mkdir()
        facts = {"study": study.study_name, "storage": kept, "objectives": ["eval_accuracy"]}
        (run / "trial.json").write_text(json.dumps(facts))
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
        trial.set_user_attr("owner", "me")
        trial.report(0.5, 3)
        if number < trials - 1:
            failed = number == 1
            study.tell(trial, None if failed else number, optuna.trial.TrialState.FAIL if failed else None)
    return study


def facts(trial):
    return (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs, trial.intermediate_values,
            trial.datetime_start, trial.datetime_complete)  # fmt: skip


@pytest.fixture
def home(tmp_path):
    """Two journals, and a database with two studies of which one is of another folder."""
    database = f"sqlite:///{tmp_path / 'all.db'}"
    alone = {
        "b": make(tmp_path / "out" / "b", 4),
        "a": make(tmp_path / "out" / "sweeps" / "a", 2),
        "kept": make(tmp_path / "out" / "sweeps" / "kept", 3, storage=database, uid="bb"),
    }
    optuna.create_study(study_name="unrelated", storage=database)
    return tmp_path / "out", alone


def test_every_study_is_what_optuna_shows_of_it_alone(home):
    folder, alone = home
    union = Studies(folder)
    assert {s.study_name for s in union.get_all_studies()} == set(alone)
    for name, study in alone.items():
        ours = optuna.load_study(study_name=name, storage=union)
        assert ours.directions == study.directions and ours.user_attrs == study.user_attrs
        assert [facts(t) for t in ours.trials] == [facts(t) for t in study.trials]
        assert ours.metric_names == ["eval_accuracy"]
        assert (ours.best_trial.number, ours.best_value) == (study.best_trial.number, study.best_value)
        assert all(union.get_trial(t._trial_id).number == t.number for t in ours.trials)
    ids = [t._trial_id for s in union.get_all_studies() for t in union.get_all_trials(s._study_id)]
    assert len(ids) == len(set(ids)) == 9
    assert union.unreadable == {}


def test_what_happens_in_a_study_is_seen_at_the_next_look(home):
    folder, alone = home
    union = Studies(folder)
    number = union.get_study_id_from_name("a")
    assert [t.state.name for t in union.get_all_trials(number)] == ["COMPLETE", "RUNNING"]
    study = alone["a"]
    study.tell(1, 7.0)
    study.ask()
    assert [t.state.name for t in union.get_all_trials(number)] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert union.get_best_trial(number).value == 7.0


def test_studies_come_go_and_are_replaced_without_a_restart(home, monkeypatch):
    folder, _ = home
    monkeypatch.setattr("hydratune.dashboard.studies._LOOK", 0.0)
    union = Studies(folder)
    first = union.get_study_id_from_name("b")
    make(folder / "other" / "a", 1, uid="cc")  # of the same name
    assert {s.study_name for s in union.get_all_studies()} == {"a", "b", "kept", "a (other/a)"}
    shutil.rmtree(folder / "b")
    make(folder / "b", 1, uid="dd")
    assert len(union.get_all_trials(union.get_study_id_from_name("b"))) == 1
    assert union.get_study_id_from_name("b") != first  # an address of the old one does not lead to the new


def test_a_study_that_does_not_open_is_told_and_does_not_hide_the_others(home):
    folder, _ = home
    (folder / "broken").mkdir()
    (folder / "broken" / ".study").write_text("ee")
    (folder / "broken" / "journal.log").write_text("no journal\nat all\n")
    (folder / "new").mkdir()
    (folder / "new" / ".study").write_text("ff")
    union = Studies(folder)
    assert len(union.get_all_studies()) == 3
    assert {path.name for path in union.unreadable} == {"broken", "new"}
    assert union.unreadable[folder / "new"] == "no trial has begun"


def test_a_database_that_has_gone_does_not_hide_the_other_studies(home, monkeypatch):
    union = Studies(home[0])
    (place,) = [p for p in union.places() if p.name == "kept"]

    def gone():
        raise ConnectionError("the database does not answer")

    monkeypatch.setattr(place.storage, "get_all_studies", gone)
    assert {s.study_name for s in union.get_all_studies()} == {"a", "b"}


@pytest.fixture
def silent_server():
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


def on_server(folder, port):
    (folder / "0").mkdir(parents=True)
    (folder / ".study").write_text(folder.name)
    url = f"postgresql+psycopg://me:secret@127.0.0.1:{port}/studies"
    (folder / "0" / "trial.json").write_text(json.dumps({"study": folder.name, "storage": url}))
    return folder


def test_a_server_that_does_not_answer_holds_nothing_up(home, silent_server, monkeypatch):
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    folder, _ = home
    monkeypatch.setattr("hydratune.dashboard.studies._LOOK", 0.0)
    hangs = [on_server(folder / f"hangs{i}", silent_server) for i in range(4)]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    dead = on_server(folder / "dead", port)
    union, start = Studies(folder), time.monotonic()
    assert {s.study_name for s in union.get_all_studies()} == {"a", "b", "kept"}
    assert time.monotonic() - start < 4  # each alone would take minutes
    end = time.monotonic() + 20
    while "refused" not in union.unreadable[dead]:
        assert time.monotonic() < end, union.unreadable
        union.places()
        time.sleep(0.05)
    for _ in range(20):  # looked for again, and not waited for
        start = time.monotonic()
        union.places()
        assert time.monotonic() - start < 0.5
        assert "refused" in union.unreadable[dead] and "secret" not in union.unreadable[dead]
    assert {union.unreadable[path] for path in hangs} == {"its database does not answer"}
    shutil.rmtree(hangs[0])
    union.places()
    assert hangs[0] not in union.unreadable and hangs[1] in union.unreadable


def test_a_server_that_falls_silent_is_asked_once_and_seen_again_when_it_speaks(home, monkeypatch):
    union, speaks = Studies(home[0]), threading.Event()
    (place,) = [p for p in union.places() if p.name == "kept"]
    place.remote, trials, asked = True, place.storage.get_all_trials, []

    def slow(*args, **options):
        asked.append(args)
        speaks.wait(60)
        return trials(*args, **options)

    monkeypatch.setattr(place.storage, "get_all_trials", slow)
    with pytest.raises(NoAnswer, match="does not answer"):
        union.get_all_trials(place.number)
    start = time.monotonic()
    for _ in range(5):
        with pytest.raises(NoAnswer):
            union.get_all_trials(place.number)
        assert {s.study_name for s in union.get_all_studies()} == {"a", "b"}
    assert time.monotonic() - start < 0.9 and len(asked) == 1  # no wait and no thread for each
    speaks.set()
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(NoAnswer):
            assert len(union.get_all_trials(place.number)) == 3
            break
        assert time.monotonic() < end
    assert {s.study_name for s in union.get_all_studies()} == {"a", "b", "kept"}


def test_a_moved_study_is_read_from_where_it_is(home, tmp_path):
    folder, _ = home
    (folder / "b").rename(folder / "moved")
    assert where(folder / "moved") == str(folder / "moved" / "journal.log")
    assert len(Studies(folder).get_all_studies()) == 3


def test_trials_have_a_note_and_a_picture_of_their_run(home):
    folder, _ = home
    union = Studies(folder)
    study = optuna.load_study(study_name="a", storage=union)
    trial = optuna.trial.Trial(study, study.trials[0]._trial_id)
    assert "(/?run=sweeps/a/0)" in get_note(trial) and str(folder / "sweeps" / "a" / "0") in get_note(trial)
    kept = [json.loads(v) for k, v in study.trials[0].system_attrs.items() if k.startswith("artifacts:")]
    assert [f["filename"] for f in kept] == ["curves.png"]
    assert Curves(union).open_reader(kept[0]["artifact_id"]).read(4) == b"\x89PNG"  # drawn, as it was missing
    assert not any(k.startswith("artifacts:") for k in study.trials[1].system_attrs)  # it still runs
    with pytest.raises(optuna.artifacts.exceptions.ArtifactNotFound):
        Curves(union).open_reader("99-0")


def test_notes_of_people_are_kept_in_the_study_and_nothing_else_is_written(home):
    folder, alone = home
    before = (folder / "sweeps" / "a" / "journal.log").read_bytes()
    union = Studies(folder)
    for seen in union.get_all_studies():
        union.get_all_trials(seen._study_id)
    assert (folder / "sweeps" / "a" / "journal.log").read_bytes() == before
    for name, own in alone.items():
        study = optuna.load_study(study_name=name, storage=union)
        save_note(optuna.trial.Trial(study, study.trials[0]._trial_id), "first " * 1000)
        save_note(study, f"about {name}")
        assert get_note(optuna.trial.Trial(own, own.trials[0]._trial_id)) == "first " * 1000
        assert get_note(own) == f"about {name}" == get_note(study)
        assert get_note(optuna.trial.Trial(study, study.trials[0]._trial_id)) == "first " * 1000


def test_a_study_cannot_be_changed(home):
    union = Studies(home[0])
    study = optuna.load_study(study_name="b", storage=union)
    trial = study.trials[-1]._trial_id
    for change in (
        lambda: union.delete_study(study._study_id),
        lambda: union.create_new_study([optuna.study.StudyDirection.MINIMIZE], "x"),
        lambda: union.set_study_user_attr(study._study_id, "fingerprint", {}),
        lambda: union.set_study_system_attr(study._study_id, "study:metric_names", ["x"]),
        lambda: union.set_trial_state_values(trial, optuna.trial.TrialState.COMPLETE, [1.0]),
        lambda: union.set_trial_user_attr(trial, "a", 1),
        lambda: union.set_trial_system_attr(trial, "a", 1),
        lambda: union.set_trial_intermediate_value(trial, 1, 1.0),
        study.ask,
    ):
        with pytest.raises(ReadOnly):
            change()
