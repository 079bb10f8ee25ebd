"""Trials through submitit and Ray: whole sweeps, jobs that are killed, stopped and taken over, and SLURM's script."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cloudpickle
import pytest

from hydratune import sweep
from hydratune.errors import UserError
from hydratune.sweep.cluster import RayExecutor, SubmititExecutor
from hydratune.sweep.job import Job
from hydratune.sweep.keeper import keep
from hydratune.sweep.place import alone, order, ordered, word_for
from hydratune.sweep.trial import TrialSpec

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes cannot import a test
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else in the user's ~/.ray
EXECUTORS = {"submitit": {"cluster": "local"}, "ray": {"num_cpus": 0.5}}


@pytest.fixture(scope="module")
def ray_address():
    """A running cluster; it ends with the process that started it."""
    pytest.importorskip("ray")
    script = "from hydratune.sweep.cluster import RayExecutor; RayExecutor({}); import ray; "
    script += "print(ray.get_runtime_context().gcs_address, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.write("\n")


@pytest.fixture(params=[*EXECUTORS])
def cluster(request, monkeypatch):
    """The settings of an executor; Ray's is one that joins a running cluster."""
    pytest.importorskip(request.param)
    if request.param == "ray":
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("ray_address"))
    return {"executor": request.param, "executor_options": EXECUTORS[request.param]}


def objective(settings):
    """Trial 1 dies at its first attempt, trial 2 takes the process along that keeps it."""
    spec = sweep.current().spec
    with (Path(spec.directory) / "begun").open("a") as file:
        file.write(f"{spec.attempt} {os.getpid()}\n")
    time.sleep(0.2)
    if spec.attempt == 0 and spec.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.attempt == 0 and spec.number == 2:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return settings["x"] ** 2


def test_a_sweep_survives_killed_jobs(cluster, tmp_path):
    result = sweep.run(
        objective, {"x": [0, 1, 2, 3]}, output_dir=tmp_path / "study", workers=2, quiet=True, **cluster
    )
    assert [r.state for r in result.trials] == ["complete"] * 4
    assert [r.values for r in result.trials] == [[0.0], [1.0], [4.0], [9.0]]
    assert [r.attempts for r in result.trials] == [1, 2, 2, 1]
    begun = [(tmp_path / "study" / str(n) / "begun").read_text().split()[::2] for n in range(4)]
    assert begun == [["0"], ["0", "1"], ["0", "1"], ["0"]]
    pids = [p for n in range(4) for p in (tmp_path / "study" / str(n) / "begun").read_text().split()[1::2]]
    assert len({*pids}) == 6  # a process for each attempt
    assert not [p for p in pids if Path(f"/proc/{p}").exists()]


SUPERVISOR = """
import os, signal, sys, time
from pathlib import Path
from hydratune import sweep
from hydratune.errors import Interrupted

def objective(settings):
    spec = sweep.current().spec
    here, told = Path(spec.directory), []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    before = (here / "begun").read_text().split() if (here / "begun").exists() else []
    time.sleep(0.5 if before else 0)  # one that let go of its lock takes a moment to be gone; one that trains does not go
    alive = [p for p in before if Path(f"/proc/{p}/exe").exists()]
    with (here / "begun").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if spec.attempt == 2:
        return len(list(here.glob("checkpoint-*"))) + 10.0 * len(alive)
    while not told:
        time.sleep(0.05)
    time.sleep(1.0)
    (here / f"checkpoint-{spec.attempt}").touch()
    raise Interrupted("saved")

if __name__ == "__main__":
    name, options, folder = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
    try:
        found = sweep.run(objective, {"x": [0, 1]}, output_dir=folder, workers=2, quiet=True, executor=name,
                          executor_options=options)
    except Interrupted as end:
        sys.exit(130)
    print([r.state for r in found.trials], [r.values for r in found.trials], [r.attempts for r in found.trials])
"""


def pids(study: Path, attempt: int) -> list[str]:
    """Of the two trials, where this attempt has begun."""
    found = [p.read_text().split() for p in study.glob("[01]/begun")]
    return [lines[attempt] for lines in found if len(lines) > attempt]


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_that_is_stopped_and_killed_goes_on_from_checkpoints(cluster, tmp_path):
    """Ctrl-C in a terminal reaches the whole group; a killed supervisor leaves jobs of submitit, not of Ray."""
    script, study = tmp_path / "search.py", tmp_path / "study"
    script.write_text(SUPERVISOR)
    name, options = cluster["executor"], cluster["executor_options"]
    command = [sys.executable, str(script), name, repr(options), str(study)]
    first = subprocess.Popen(command, start_new_session=True)
    until(lambda: len(pids(study, 0)) == 2)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(30) == 130
    assert len([*study.glob("[01]/checkpoint-0")]) == 2
    second = subprocess.Popen(command, start_new_session=True)
    until(lambda: len(pids(study, 1)) == 2)
    second.kill()
    second.wait()
    if name == "ray":
        until(lambda: not any(Path(f"/proc/{p}").exists() for p in pids(study, 1)))
    else:
        assert all(Path(f"/proc/{p}").exists() for p in pids(study, 1))
    third = subprocess.run(command, capture_output=True, text=True, timeout=60)
    value = 1.0 if name == "ray" else 2.0
    assert third.stdout == f"['complete', 'complete'] [[{value}], [{value}]] [3, 3]\n", third.stderr
    assert third.stderr == ""


def job(tmp_path, function=objective, number=3) -> Job:
    place, storage = str(tmp_path / str(number)), str(tmp_path / "journal.log")
    spec = TrialSpec("lr search", storage, number, number, 0, place, {"x": 3}, ["y"], ["minimize"])
    return Job(spec, function)


# A SLURM of one machine: sbatch starts the script, its state is a file, scancel's signals go to the steps alone
TOOLS = {
    "sbatch": """
        import os, re, subprocess, sys
        here, script = os.environ["FAKE_SLURM"], sys.argv[1]
        number = str(os.getpid())
        out = dict(re.findall(r"#SBATCH --(output|error)=(.*)", open(script).read()))
        env = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        run = f"echo RUNNING > {here}/{number}; bash {script}; r=$?; [ $(cat {here}/{number}) != RUNNING ] || "
        run += f"{{ [ $r = 0 ] && echo COMPLETED || echo OUT_OF_MEMORY; }} > {here}/{number}"
        open(f"{here}/{number}", "w").write("PENDING")
        log = open(out["error"].replace("%j", number), "w")
        subprocess.Popen(["bash", "-c", run], env=env, stdout=log, stderr=log, start_new_session=True)
        print("Submitted batch job", number)
        """,
    "srun": """
        import os, subprocess, sys
        from pathlib import Path
        command = sys.argv[[a == sys.executable for a in sys.argv].index(True):]
        process = subprocess.Popen(command)
        sys.exit(process.wait() and 1)
        """,
    "sacct": """
        import os
        here = os.environ["FAKE_SLURM"]
        print("JobID|State|NodeList")
        for number in os.listdir(here):
            print(f"{number}|{open(f'{here}/{number}').read().strip()}|here")
        """,
    "squeue": """
        import os
        here = os.environ["FAKE_SLURM"]
        print(*[number for number in os.listdir(here) if open(f"{here}/{number}").read().strip() == "RUNNING"])
        """,
    "scancel": """
        import os, sys
        open(os.environ["FAKE_SLURM"] + ".cancelled", "a").write(" ".join(sys.argv[1:]) + chr(10))
        """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "queue").mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "queue"))
    monkeypatch.setattr("hydratune.sweep.cluster.APPEARS", 1.0)
    monkeypatch.setattr("hydratune.sweep.cluster._SLURM_POLL", 0.2)
    monkeypatch.setattr("hydratune.sweep.cluster._ASK", 0.3)
    yield tmp_path
    if (tmp_path / "3").exists():
        order(tmp_path / "3", 0, "end")


def test_what_sbatch_is_given(slurm):
    options = {
        "slurm_partition": "gpu",
        "timeout_min": 90,
        "gpus_per_node": 2,
        "slurm_account": "lab",
        "mem_gb": 20,
    }
    executor = SubmititExecutor(options, slurm / "jobs")
    lines = executor.script(job(slurm)).splitlines()
    wanted = {
        "partition=gpu", "time=90", "gpus-per-node=2", "account=lab", "mem=20GB", "nodes=1", "no-requeue",
        "job-name=hydratune-lr-search-3", "signal=USR2@90",
    }  # fmt: skip
    assert wanted <= {line.removeprefix("#SBATCH --") for line in lines}
    assert [line for line in lines if line.startswith("srun") and "-m submitit.core._submit" in line]
    assert "#SBATCH --time=1440" in SubmititExecutor({}, slurm / "jobs").script(job(slurm))


def test_slurm_jobs_run_end_and_crash(slurm):
    result = sweep.run(
        objective, {"x": [0, 1, 2]}, output_dir=slurm / "study", workers=3, quiet=True, executor="submitit",
        executor_options={"slurm_partition": "gpu"}, max_retries=0,
    )  # fmt: skip
    assert [r.state for r in result.trials] == ["complete", "crashed", "crashed"]
    assert result.trials[1].reason == "killed by SIGKILL"
    assert "ended in state OUT_OF_MEMORY" in result.trials[2].reason
    left = [*(slurm / "study" / "jobs").rglob("*_log.*")]
    assert len({p.name.split("_")[0] for p in left}) == 2  # logs of jobs that did not end by themselves


def stoppable(settings):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    (Path(sweep.current().spec.directory) / "begun").touch()
    while not told:
        time.sleep(0.05)
    return 5.0


@pytest.mark.parametrize("by", ["order", "SIGUSR2", "SIGTERM"])
def test_a_slurm_job_stops_with_a_checkpoint(by, slurm):
    """By an order of the supervisor; before its time limit; when it is preempted. It is not requeued by submitit."""
    executor, one = SubmititExecutor({}, slurm / "jobs"), job(slurm, stoppable)
    executor.start(3, one)
    until((slurm / "3" / "begun").exists)
    if by == "order":
        executor.stop(now=False)
        assert (slurm / "queue.cancelled").read_text().split()[0] == "--state=PENDING"
    else:
        os.kill(int((slurm / "3" / "keeper").read_text().split()[2]), signal.Signals[by])
    assert last_word(executor) == {3: ""}
    assert '"state": "complete"' in (slurm / "3" / "result.json").read_text()
    executor.close()
    assert not [*(slurm / "jobs").iterdir()]


def test_a_job_that_did_not_end_is_not_taken_for_one(slurm):
    executor = SubmititExecutor({}, slurm / "jobs")
    executor.start(3, job(slurm, stoppable))
    until((slurm / "3" / "begun").exists)
    (entry,) = (slurm / "queue").iterdir()
    for state in ("SUSPENDED", "REQUEUED", "UNKNOWN", "RUNNING"):
        entry.write_text(state)
        assert executor.wait(0.7) == []
    entry.write_text("PREEMPTED")
    os.kill(int((slurm / "3" / "keeper").read_text().split()[2]), signal.SIGKILL)
    assert "ended in state PREEMPTED" in last_word(executor)[3]


def test_a_slurm_without_accounts_is_asked_for_its_queue(slurm):
    (slurm / "bin" / "sacct").unlink()
    executor = SubmititExecutor({}, slurm / "jobs")
    executor.start(3, job(slurm, stoppable))
    until((slurm / "3" / "begun").exists)
    assert executor.wait(0.7) == []
    os.kill(int((slurm / "3" / "keeper").read_text().split()[2]), signal.SIGKILL)
    assert "ended without a trace" in last_word(executor)[3]


def test_a_refused_submission_is_told(slurm):
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    with pytest.raises(UserError, match="the job was refused: sbatch: error: invalid partition"):
        SubmititExecutor({}, slurm / "jobs").start(3, job(slurm))


def last_word(executor, jobs=1):
    ended = {}
    until(lambda: ended.update(executor.wait(1.0)) or len(ended) == jobs)
    return ended


def test_ray_cancels_what_waits_and_stops_what_runs(ray_address, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    first = RayExecutor({})
    cpus = first._ray.cluster_resources()["CPU"]
    with pytest.raises(UserError, match=r"num_gpus = 64: there is \d+ here"):
        first._check_size({"num_gpus": 64})  # it has closed itself
    executor = RayExecutor({"num_cpus": cpus})
    for number in (3, 4):
        executor.start(number, job(tmp_path, stoppable, number))
    until((tmp_path / "3" / "begun").exists)
    executor.stop(now=False)
    assert last_word(executor, 2) == {3: "", 4: "it was cancelled"}
    executor.close()
    executor = RayExecutor({})
    executor.start(5, job(tmp_path, stubborn, 5))
    until((tmp_path / "5" / "begun").exists)
    executor.stop(now=True)
    assert last_word(executor)
    pid = (tmp_path / "5" / "begun").read_text()
    until(lambda: not Path(f"/proc/{pid}").exists())
    executor.close()


def stubborn(settings):
    """Does not stop when it is told to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(sweep.current().spec.directory) / "begun").write_text(str(os.getpid()))
    time.sleep(600)


def test_a_job_does_not_begin_when_it_should_not(tmp_path, monkeypatch):
    monkeypatch.setattr("hydratune.sweep.keeper.APPEARS", 0.0)
    monkeypatch.setattr("hydratune.sweep.keeper._LOOK", 0.1)
    assert "folder that all nodes share" in keep(b"", str(tmp_path / "elsewhere"), 0)
    for attempt, word, said in ((0, "stop", "stop"), (0, "end", "end"), (1, "run", "leave")):
        order(tmp_path, attempt, word)
        assert keep(b"", str(tmp_path), 0) == f"told to {said} before it began"
    assert keep(b"not a job", str(tmp_path), 1) == "its process failed at its start (see its console.log)"
    assert "UnpicklingError" in (tmp_path / "console.log").read_text()


def test_a_trial_runs_once_at_a_time(tmp_path):
    lock = alone(tmp_path, 0)
    assert (ordered(tmp_path), word_for(tmp_path, 0)) == ((0, "run"), "run")
    with pytest.raises(TimeoutError, match=f"process {os.getpid()} on"):
        alone(tmp_path, 1, patience=0.3)
    assert word_for(tmp_path, 0) == "leave"
    order(tmp_path, 0, "stop")  # of a supervisor that lost the trial: in vain
    assert ordered(tmp_path) == (1, "run")
    os.close(lock)
    os.close(alone(tmp_path, 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("submitit", {"cluster": "debug"}, "use slurm or local"),
        ("submitit", {"cluster": "local", "slurm_partitoin": "gpu"}, "did you mean 'slurm_partition'"),
        ("submitit", {"cluster": "local", "timeout_min": "long"}, "timeout_min"),
        ("submitit", {"cluster": "local", "tasks_per_node": 2}, "sweep.launch_prefix"),
        ("submitit", {"cluster": "slurm"}, "srun"),
        ("ray", {"num_cpu": 1}, "did you mean 'num_cpus'"),
        ("ray", {"num_cpus": "many"}, "num_cpus"),
    ],
)
def test_wrong_options_are_one_clear_error(name, options, message, tmp_path, monkeypatch):
    pytest.importorskip(name)
    if options.get("cluster") == "slurm":
        monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError) as caught:
        SubmititExecutor(options, tmp_path) if name == "submitit" else RayExecutor(options)
    assert message in str(caught.value)
    assert "sweep.executor_options" in str(caught.value)


@pytest.mark.parametrize(("name", "extra"), [("submitit", "slurm"), ("ray", "ray")])
def test_a_missing_package_is_named(name, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs the package {name}\n.*pip install 'hydratune\[{extra}\]'"):
        SubmititExecutor({}, tmp_path) if name == "submitit" else RayExecutor({})
