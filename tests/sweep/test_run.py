"""Sweeps from Python: real processes, real failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydratune import sweep
from hydratune.errors import UserError
from hydratune.settings import SweepSettings
from hydratune.sweep.executors import ForkExecutor, ProcessExecutor, slots
from hydratune.sweep.job import Job, pack
from hydratune.sweep.trial import TrialSpec


def states(result: sweep.Result) -> list[str]:
    return [t.state for t in result.trials]


def search(task, space, tmp_path: Path, **kwargs):
    return sweep.run(task, space, output_dir=tmp_path / "study", quiet=True, **kwargs)


def test_every_way_to_end_is_told_as_what_it_was_and_the_sweep_goes_on(tmp_path):
    def task(settings):
        import torch

        from hydratune.errors import TrainingFailed, UserError, Violation

        kind = settings["kind"]
        if kind == "nan":
            return float("nan")
        if kind == "host memory":
            raise MemoryError("no more")
        if kind == "device memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if kind == "real memory":
            return torch.empty(2**60)
        if kind == "diverged":
            raise TrainingFailed("the loss is nan at step 3")
        if kind == "bad combination":
            raise UserError(Violation("peft.r", 4, "no adapter is chosen", "choose one"))
        if kind == "bug":
            raise KeyError("missing")
        if kind == "text":
            return "high"
        if kind == "exit":
            os._exit(17)
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        return 1.0

    kinds = [
        "nan",
        "host memory",
        "device memory",
        "real memory",
        "diverged",
        "bad combination",
        "bug",
        "text",
        "exit",
        "segfault",
        "good",
    ]
    result = search(task, {"kind": kinds}, tmp_path, max_retries=0)
    expected = [
        "diverged",
        *["out of memory"] * 3,
        "diverged",
        "invalid",
        "failed",
        "failed",
        "crashed",
        "crashed",
        "complete",
    ]
    assert states(result) == expected
    reasons = [t.reason for t in result.trials]
    assert "KeyError: 'missing'" in reasons[6] and "exit code 17" in reasons[8] and "SIGSEGV" in reasons[9]
    assert "no adapter is chosen" in reasons[5] and "20.00 GiB" in reasons[2]
    assert result.best.settings == {"kind": "good"}
    assert "missing" in (tmp_path / "study" / "6" / "console.log").read_text()


def test_nothing_leaks_from_one_trial_into_the_next(tmp_path):
    def task(settings):
        import random

        import torch

        import hydratune

        dirty = [hasattr(hydratune, "leak"), "LEAK" in os.environ, torch.get_default_dtype() != torch.float32]
        hydratune.leak = os.environ["LEAK"] = "x"
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(settings["i"])
        random.seed(0)
        return float(sum(dirty))

    result = search(task, {"i": [1, 2, 3, 4]}, tmp_path)
    assert [t.values for t in result.trials] == [[0.0]] * 4


def test_trials_start_the_moment_a_slot_is_free(tmp_path):
    def task(settings):
        time.sleep(settings["seconds"])
        return settings["seconds"]

    result = search(task, {"seconds": [2.5, 0.2, 0.3, 0.4]}, tmp_path, workers=2)
    long, *short = result.trials
    assert all(t.ended < long.ended for t in short)  # no batch waits for its longest


def test_a_killed_trial_is_taken_up_again_and_its_neighbour_does_not_notice(tmp_path):
    def task(settings):
        trial = sweep.current()
        if settings["i"] == 1 and trial.spec.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return settings["i"]

    result = search(task, {"i": [1, 2, 3]}, tmp_path, workers=2)
    assert states(result) == ["complete"] * 3
    assert [t.attempts for t in result.trials] == [2, 1, 1]


def test_a_killed_fork_server_costs_only_what_was_running(tmp_path):
    def task(settings):
        if settings["i"] == 2 and sweep.current().spec.attempt == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        return settings["i"]

    result = search(task, {"i": [1, 2, 3]}, tmp_path)
    assert states(result) == ["complete"] * 3 and [t.attempts for t in result.trials] == [1, 2, 1]


def test_brackets_in_reasons_and_values_are_text(tmp_path, capsys):
    def task(settings):
        raise ValueError("cannot open [/data/x] now")

    result = sweep.run(task, {"modules": ["[q_proj,v_proj]", "x"]}, output_dir=tmp_path / "study")
    assert states(result) == ["failed"] * 2
    said = capsys.readouterr().err
    assert "modules=[q_proj,v_proj]" in said and "[/data/x]" in said


def test_random_numbers_differ_between_trials(tmp_path):
    def task(settings):
        import numpy

        return float(numpy.random.rand())

    result = search(task, {"i": [1, 2, 3]}, tmp_path)
    assert len({t.values[0] for t in result.trials}) == 3


def test_a_folder_of_another_study_is_refused(tmp_path):
    search(lambda s: s["i"], {"i": [1, 2]}, tmp_path)
    with pytest.raises(UserError, match="trials of another study"):
        search(lambda s: s["i"], {"i": [3, 4]}, tmp_path, name="other")
    (tmp_path / "study" / "journal.log").unlink()
    with pytest.raises(UserError, match="trials of another study"):
        search(lambda s: s["i"], {"i": [1, 2]}, tmp_path)


def test_a_seed_of_the_samplers_own_moves_on_with_the_trials(tmp_path):
    result = search(
        lambda s: s["x"],
        {"x": sweep.Float(0, 1)},
        tmp_path,
        n_trials=4,
        sampler="random",
        sampler_options={"seed": 1},
    )
    assert len({t.settings["x"] for t in result.trials}) == 4


def test_known_points_may_be_lists_and_truths(tmp_path):
    space = {"m": ["[q_proj,v_proj]", "all-linear"], "b": ["true", "false"], "x": sweep.Float(0, 1)}
    given = [{"m": ["q_proj", "v_proj"], "b": True, "x": 0.5}]
    result = search(lambda s: s["x"], space, tmp_path, n_trials=1, enqueue=given)
    assert result.trials[0].settings == {"m": "[q_proj,v_proj]", "b": "true", "x": 0.5}


def test_a_sweep_ends_after_too_many_failures_in_a_row(tmp_path):
    def task(settings):
        raise ValueError("always")

    result = search(task, {"x": sweep.Float(0, 1)}, tmp_path, n_trials=20, max_failures=3)
    assert states(result) == ["failed"] * 3
    with pytest.raises(LookupError):
        _ = result.best


def test_a_sweep_with_a_time_limit_begins_no_trial_after_it(tmp_path):
    def task(settings):
        time.sleep(0.3)
        return settings["x"]

    result = search(task, {"x": sweep.Float(0, 1)}, tmp_path, timeout=1.0)
    assert 0 < len(result.trials) < 20 and set(states(result)) == {"complete"}


def test_the_same_call_goes_on_and_more_trials_extend_it(tmp_path):
    def task(settings):
        Path(sweep.current().directory, "ran").write_text(str(os.getpid()))
        return settings["x"]

    space = {"x": sweep.Float(0, 1)}
    first = search(task, space, tmp_path, n_trials=2)
    ran = [(tmp_path / "study" / str(i) / "ran").read_text() for i in range(2)]
    second = search(task, space, tmp_path, n_trials=4)
    assert [t.values for t in second.trials][:2] == [t.values for t in first.trials] and len(
        second.trials
    ) == 4
    assert ran == [(tmp_path / "study" / str(i) / "ran").read_text() for i in range(2)]
    with pytest.raises(UserError, match="begun with another search"):
        search(task, {"y": sweep.Float(0, 1)}, tmp_path, n_trials=4)


def test_without_a_directory_the_same_call_is_the_same_study_and_another_function_another(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one = sweep.run(lambda s: s["i"], {"i": [1, 2]}, quiet=True)
    other = sweep.run(lambda s: -s["i"], {"i": [1, 2]}, quiet=True)
    assert one.directory != other.directory and (one.best.values, other.best.values) == ([1.0], [-2.0])
    assert one.directory.parent == tmp_path / "outputs" / "sweeps" and one.directory.name.startswith(
        "lambda-"
    )


def test_a_mapping_of_metrics_serves_objectives_and_bounds(tmp_path):
    def task(settings):
        x = settings["x"]
        return {"eval_loss": 1.0 - x, "tokens_per_second": 1.0 + 0 * x, "peak_memory_gib": 10 * x}

    result = search(
        task, {"x": [0.1, 0.5, 0.9]}, tmp_path, objective="eval_loss", constraints=["peak_memory_gib <= 6"]
    )
    assert result.best.settings == {"x": 0.5}
    assert result.trials[2].metrics["peak_memory_gib"] == pytest.approx(9.0)


def test_known_good_points_come_first(tmp_path):
    space = {"x": sweep.Float(0, 1), "r": ["8", "16"]}
    result = search(lambda s: s["x"], space, tmp_path, n_trials=3, enqueue=[{"x": 0.125, "r": 16}])
    assert result.trials[0].settings == {"x": 0.125, "r": "16"}


def test_a_new_process_for_each_trial_gives_the_same(tmp_path):
    result = search(lambda s: s["i"] * 2, {"i": [1, 2]}, tmp_path, fork=False)
    assert [t.values for t in result.trials] == [[2.0], [4.0]]


def test_a_pruned_trial_ends_early_and_is_told(tmp_path):
    def task(settings):
        trial = sweep.current()
        for step in range(1, 6):
            if trial.report(settings["level"] + step, step):
                raise sweep.Pruned(f"at {step}")
        return settings["level"]

    options = {"n_startup_trials": 2, "n_warmup_steps": 1}
    result = search(task, {"level": [1, 2, 50, 0]}, tmp_path, pruner="median", pruner_options=options)
    assert states(result) == ["complete", "complete", "pruned", "complete"]
    assert len(result.trials[2].intermediate) < 5


@pytest.mark.parametrize(
    "space, settings, key",
    [
        ({}, {}, "sweep.space"),
        ({"x": [[1, 2], [3]]}, {}, "space"),
        ({"x": sweep.Float(0, 1)}, {}, "sweep.n_trials"),
        ({"x": sweep.Float(0, 1)}, {"sampler": "grid", "n_trials": 3}, "sweep.sampler"),
        ({"x": [1, 2]}, {"objective": ["a", "b"], "direction": ["minimize", "up"]}, "sweep.direction"),
        ({"x": [1, 2]}, {"objective": ["loss", "eval_loss"], "pruner": "median"}, "sweep.pruner"),
        ({"x": [1, 2]}, {"workers": 2, "storage": "sqlite:///x.db"}, "sweep.storage"),
        ({"x": [1, 2]}, {"constraints": ["memory below 20"]}, "sweep.constraints"),
        ({"x": [1, 2]}, {"executor": "local", "executor_options": {"partition": "a"}}, "sweep.executor_options"),
        ({"x": [1, 2]}, {"sampler": "tpee", "n_trials": 2}, "sweep.sampler"),
        ({"x": [1, 2], "p": [{"x": 1, "y": 2}]}, {}, "sweep.paired.p"),
        ({"p": [{"x": 1}, {"x": 2}], "q": [{"x": 1}, {"y": 2}]}, {}, "sweep.paired.q"),
        ({"x": [1, 2]}, {"sampler": "random", "n_trials": 2, "sampler_options": {"seed": "x"}}, "sweep.sampler_options.seed"),
        ({"x": [1, 2]}, {"nonsense": 1}, "sweep"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(space, settings, key, tmp_path):
    with pytest.raises(UserError) as error:
        search(lambda s: 0.0, space, tmp_path, **settings)
    assert key in [v.key for v in error.value.violations]


def test_places_of_devices():
    assert slots("auto", [], 1, 1) == [{}]
    assert slots(3, [], 1, 1) == [{}, {}, {}]
    assert slots("auto", ["0", "1", "2"], 1, 1) == [{"CUDA_VISIBLE_DEVICES": d} for d in "012"]
    assert slots("auto", ["0", "1", "2", "3"], 2, 1) == [{"CUDA_VISIBLE_DEVICES": d} for d in ("0,1", "2,3")]
    assert slots("auto", ["0", "1"], 1, 2) == [{"CUDA_VISIBLE_DEVICES": d} for d in "0101"]
    assert slots(1, ["GPU-a", "GPU-b"], 1, 1) == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}]
    assert SweepSettings().gpus_per_trial == 1
    with pytest.raises(UserError):
        slots("auto", ["0"], 2, 1)


# ------------------------------------------------------------------ the processes themselves


def job(tmp_path: Path, task, number: int = 0) -> Job:
    spec = TrialSpec(
        "s",
        str(tmp_path / "journal.log"),
        number,
        number,
        0,
        str(tmp_path / str(number)),
        {},
        ["objective"],
        ["minimize"],
    )
    return Job(spec, task, {"CUDA_VISIBLE_DEVICES": "3"})


def test_the_warm_process_has_one_thread_and_no_accelerator():
    executor = ForkExecutor(pack(None))
    try:
        report = executor.warm_up()
    finally:
        executor.close()
    assert report == {"threads": 1, "error": "", "cuda": False}


@pytest.mark.parametrize("kind", ["fork", "process"])
def test_a_trial_sees_its_device_and_has_all_threads(kind, tmp_path):
    def task(settings):
        import torch

        x = torch.randn(600, 600)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        return float(torch.get_num_threads()) + 0 * float((x @ x).sum())

    executor = ForkExecutor(pack(None)) if kind == "fork" else ProcessExecutor()
    try:
        executor.start(7, job(tmp_path, task))
        ended: list = []
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            ended = executor.wait(1.0)
    finally:
        executor.close()
    assert ended == [(7, "")]
    alone = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"], capture_output=True, text=True
    )
    assert f'"values": [{float(alone.stdout)}]' in (tmp_path / "0" / "result.json").read_text()


SUPERVISOR = """
import os, sys, time
from pathlib import Path
from hydratune import sweep
def task(settings):
    (sweep.current().directory / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    return 0.0
sweep.run(task, {{"i": [1, 2]}}, output_dir={folder!r}, workers=2, quiet=True)
"""


def test_when_the_supervisor_is_killed_its_trials_end_too(tmp_path):
    folder = tmp_path / "study"
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR.format(folder=str(folder))])
    pids = [folder / str(i) / "pid" for i in range(2)]
    until = time.monotonic() + 60
    while not all(p.is_file() and p.read_text() for p in pids) and time.monotonic() < until:
        time.sleep(0.1)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{p.read_text()}").exists() for p in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p.read_text()}").exists() for p in pids)
    result = sweep.run(lambda s: float(s["i"]), {"i": [1, 2]}, output_dir=folder, quiet=True)
    assert states(result) == ["complete"] * 2 and [t.attempts for t in result.trials] == [2, 2]


def test_ctrl_c_while_the_warm_process_starts_ends_soon(tmp_path):
    folder = tmp_path / "study"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR.format(folder=str(folder))], stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not (folder / "journal.log").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=40) != 0  # the trials would take a minute
    result = sweep.run(lambda s: float(s["i"]), {"i": [1, 2]}, output_dir=folder, quiet=True)
    assert states(result) == ["complete"] * 2


def test_ctrl_c_lets_trials_stop_and_the_same_call_goes_on(tmp_path):
    folder = tmp_path / "study"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR.format(folder=str(folder))], stderr=subprocess.PIPE, text=True
    )
    pid = folder / "1" / "pid"
    until = time.monotonic() + 60
    while not pid.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "the same command goes on" in said and process.returncode != 0
    result = sweep.run(lambda s: float(s["i"]), {"i": [1, 2]}, output_dir=folder, quiet=True)
    assert states(result) == ["complete"] * 2
