"""What a trial starts, what it is started by, and where its sweep is shown: none outlives or ends what it should not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydratune import sweep
from hydratune.sweep.executors import ForkExecutor
from hydratune.sweep.view import Outlet

LONELY = """
import os, sys, time
from pathlib import Path
from hydratune import sweep
def task(settings):
    import signal, subprocess
    here = sweep.current().directory
    if sweep.current().spec.attempt:
        return 1.0
    child = subprocess.Popen(["sleep", "300"])
    (here / "server").write_text(str(os.getppid()))
    (here / "child.part").write_text(str(child.pid))
    (here / "child.part").rename(here / "child")
    if {kill_server}:
        os.kill(os.getppid(), signal.SIGKILL)
    while not Path({folder!r}, "go").exists():
        time.sleep(0.05)
    return float(settings["i"])
sweep.run(task, {{"i": [1, 2]}}, output_dir={folder!r})
"""


def begun(path: Path, seconds: float = 60.0) -> str:
    until = time.monotonic() + seconds
    while not path.is_file():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.05)
    return path.read_text()


def gone(pid: str, seconds: float = 15.0) -> bool:
    """Whether a process ends; a zombie has ended, and waits for an init that this container may not have."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(int(pid), signal.SIGKILL)
    return False


def lonely(folder: Path, kill_server: bool = False, **kwargs) -> subprocess.Popen:
    code = LONELY.format(folder=str(folder), kill_server=kill_server)
    return subprocess.Popen([sys.executable, "-c", code], **kwargs)


def test_what_a_trial_has_started_ends_with_its_killed_supervisor(tmp_path):
    process = lonely(tmp_path / "study", stderr=subprocess.DEVNULL)
    child = begun(tmp_path / "study" / "0" / "child")
    server = int((tmp_path / "study" / "0" / "server").read_text())
    os.kill(server, signal.SIGSTOP)  # the kernel must not end it before it has ended what it knows of
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGCONT)
    assert gone(child) and gone(str(server))


def test_what_a_trial_has_started_ends_with_its_killed_server(tmp_path):
    process = lonely(tmp_path / "study", kill_server=True, stderr=subprocess.DEVNULL)
    child = begun(tmp_path / "study" / "0" / "child")
    (tmp_path / "study" / "go").touch()
    assert gone(child)
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("ignored", [True, False], ids=["nohup", "plain"])
def test_a_hang_up_stops_a_sweep_unless_it_was_told_to_ignore_it(ignored, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        process = lonely(tmp_path / "study", stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    begun(tmp_path / "study" / "0" / "child")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    (tmp_path / "study" / "go").touch()
    _, said = process.communicate(timeout=60)
    assert ("2 complete" in said, process.returncode == 0) == (ignored, ignored), said


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_sweep_goes_on_when_its_terminal_is_closed(kind, tmp_path):
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    process = lonely(tmp_path / "study", stderr=theirs, stdout=theirs, start_new_session=True)
    os.close(theirs)
    begun(tmp_path / "study" / "0" / "child")
    if kind == "terminal":
        time.sleep(0.5)
        assert b"study" in os.read(ours, 65536)  # the live table
    os.close(ours)
    time.sleep(0.5)
    (tmp_path / "study" / "go").touch()
    assert process.wait(timeout=60) == 0
    result = sweep.run(lambda s: 0.0, {"i": [1, 2]}, output_dir=tmp_path / "study", quiet=True)
    assert [t.state for t in result.trials] == ["complete"] * 2 and [t.values for t in result.trials] == [
        [1.0],
        [2.0],
    ]


def test_a_file_that_can_no_longer_be_written_is_silence():
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as file:
        outlet = Outlet(file)
        outlet.write("one\n")
        assert os.read(read, 99) == b"one\n" and not outlet.lost
        os.close(read)
        outlet.write("two\n")
        outlet.flush()
        assert outlet.lost
        print("three", file=file, flush=True)  # by someone else: no error either


def test_a_trial_whose_process_cannot_be_forked_is_refused_and_its_server_lives(monkeypatch):
    import socket
    from multiprocessing.connection import Connection

    from hydratune.sweep.forkserver import Server

    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    before = signal.getsignal(signal.SIGCHLD)
    executor = ForkExecutor(b"")
    executor._connection, executor._pids = ours, {7: 0}

    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    try:
        server = Server(theirs)
        monkeypatch.setattr(os, "fork", fork)
        server._start(7, b"")
        monkeypatch.undo()
        ((key, how),) = executor.wait(5)
        assert key == 7 and "could not be started (Resource temporarily unavailable)" in how
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, before)
        executor.close()
        theirs.close()


def test_the_warm_process_takes_over_the_supervisors_environment():
    """Also what is deleted there; what it has set for itself stays."""
    code = (
        "import os; from hydratune.sweep import forkserver as f; f._prepare_environment(); os.environ['OWN'] = '1'; "
        "f._warm(b'', {'NEW': '1', 'TOKENIZERS_PARALLELISM': 'true'}); "
        "print(*map(os.environ.get, ('GONE', 'NEW', 'OWN', 'TOKENIZERS_PARALLELISM', 'PYTORCH_NVML_BASED_CUDA_CHECK')), "
        "'HYDRATUNE_THREADS' in os.environ)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GONE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["None", "1", "1", "false", "1", "True"]
