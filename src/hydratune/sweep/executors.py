"""Where trials run: forked from a warm process here, on SLURM by submitit, or on a Ray cluster.

Every executor starts the same packed job and says when its process has ended; how the trial ended is in the file that
it wrote. None of them waits for one trial before it starts the next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from hydratune.errors import UserError, Violation
from hydratune.sweep.job import Job, how_it_ended

log = logging.getLogger("hydratune")
_POLL = 0.05  # seconds between looks at processes that do not announce their end


class Executor(Protocol):
    def prepare(self, stopped: Callable[[], bool]) -> None:
        """Get ready for the first job, unless the sweep is stopped meanwhile.

        Raises:
            UserError: no job can work.
        """

    def start(self, key: int, job: Job) -> None:
        """Start a job; its key comes back from `wait`."""

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        """Jobs that have ended, each with how (empty when it ended by itself, without a crash); waits for the first."""

    def stop(self, *, now: bool) -> None:
        """Ask every running job that was not asked yet to save a checkpoint and stop, or end them all."""

    def close(self) -> None:
        """End what is left."""


class ForkExecutor:
    """Trials are children of a warm server process (`forkserver.py`); a server that dies is started again."""

    _launched: tuple[subprocess.Popen[bytes], Connection] | None = None  # ahead of the first executor

    def __init__(self, warm_with: bytes):
        self._warm_with = warm_with
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._pids: dict[int, int] = {}  # of the jobs that run: key → process, 0 until it is known
        self._asked: set[int] = set()  # processes that were asked to stop
        self.report: dict[str, Any] = {}

    def prepare(self, stopped: Callable[[], bool]) -> None:
        if self._connection is None:
            error = self.warm_up(stopped).get("error")
            if isinstance(error, UserError):
                raise error
            if error:
                log.warning("the warm process could not read ahead (%s): trials do it themselves", error)

    @classmethod
    def launch(cls) -> None:
        """Start a server that imports while the search is still being read; `dismiss` ends it if none takes it."""
        if cls._launched is None:
            cls._launched = _start_server()

    @classmethod
    def dismiss(cls) -> None:
        if cls._launched is not None:
            server, connection = cls._launched
            cls._launched = None
            connection.close()
            server.kill()
            server.wait()

    def warm_up(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Start the server and wait until it is warm; gives what it says of itself, nothing when stopped before."""
        ready, ForkExecutor._launched = ForkExecutor._launched, None
        self._server, self._connection = ready or _start_server()
        self._connection.send(("warm", self._warm_with, dict(os.environ)))
        try:
            while not self._connection.poll(_POLL):
                if stopped():
                    self._lose_server()
                    return {}
            _, self.report = self._connection.recv()
        except (EOFError, OSError):
            self._lose_server()
            raise UserError(
                Violation(
                    "sweep.fork",
                    True,
                    "the warm process ended at its start",
                    "see its message above, or set sweep.fork=false",
                )
            ) from None
        return self.report

    def start(self, key: int, job: Job) -> None:
        if self._connection is None:
            self.warm_up()
        assert self._connection is not None
        self._pids[key] = 0
        with contextlib.suppress(OSError):  # a server that has just died is noticed by wait
            self._connection.send(("start", key, job.pack()))

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        ended: list[tuple[int, str]] = []
        if self._connection is None:
            time.sleep(seconds if not self._pids else 0)
            return [(key, "its warm process ended") for key in self._lose_server()]
        wait([self._connection], seconds)
        try:
            while self._connection.poll():
                kind, key, value = self._connection.recv()
                if kind == "started":
                    self._pids[key] = value
                else:
                    del self._pids[key]
                    ended.append((key, value if kind == "refused" else how_it_ended(value)))
        except (EOFError, OSError):
            ended += [(key, "its warm process ended") for key in self._lose_server()]
        return ended

    def _lose_server(self) -> list[int]:
        lost, pids = [*self._pids], [*filter(None, self._pids.values())]
        self._pids.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        for pid in pids:  # the kernel ends the trials with their server, but not what they have started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return lost

    def stop(self, *, now: bool) -> None:
        for pid in filter(None, self._pids.values()):
            with contextlib.suppress(ProcessLookupError):
                if now:
                    os.killpg(pid, signal.SIGKILL)
                elif pid not in self._asked:
                    self._asked.add(pid)
                    os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the server ends its children, and itself
            self._connection = None
        if self._server is not None:
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None
        self._pids.clear()


def _start_server() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "hydratune.sweep.forkserver", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return server, Connection(ours.detach())


class ProcessExecutor:
    """A new Python process for every trial."""

    def __init__(self) -> None:
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._asked: set[int] = set()

    def prepare(self, stopped: Callable[[], bool]) -> None:
        """Every process prepares for itself."""

    def start(self, key: int, job: Job) -> None:
        command = [sys.executable, "-m", "hydratune.sweep.forkserver", "--once", str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(job.pack())
        self._running[key] = process

    def wait(self, seconds: float) -> list[tuple[int, str]]:
        until = time.monotonic() + seconds
        while True:
            ended = [(k, p.returncode) for k, p in self._running.items() if p.poll() is not None]
            if ended or time.monotonic() > until:
                break
            time.sleep(_POLL)
        for key, _ in ended:
            process = self._running.pop(key)
            self._asked.discard(key)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left behind
        return [(key, how_it_ended(code)) for key, code in ended]

    def stop(self, *, now: bool) -> None:
        for key, process in self._running.items():
            with contextlib.suppress(ProcessLookupError):
                if now:
                    os.killpg(process.pid, signal.SIGKILL)
                elif key not in self._asked:
                    process.terminate()
        self._asked |= self._running.keys()

    def close(self) -> None:
        self.stop(now=True)
        for process in self._running.values():
            process.wait()
        self._running.clear()


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; found without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def slots(
    workers: Any, gpus: Sequence[str], gpus_per_trial: int, trials_per_gpu: int
) -> list[dict[str, str]]:
    """The places in which trials run at the same time: for each the variables that its trial gets.

    Raises:
        UserError: no number of workers, or more GPUs for a trial than there are.
    """
    if workers not in (None, "auto") and not (str(workers).isdigit() and int(workers) > 0):
        raise UserError(
            Violation("sweep.workers", workers, "is no number of trials", "give auto, or 1 or more")
        )
    if gpus and gpus_per_trial > len(gpus):
        why = f"there are {len(gpus)} GPUs here ({', '.join(gpus)})"
        raise UserError(Violation("sweep.gpus_per_trial", gpus_per_trial, why, f"give at most {len(gpus)}"))
    groups = [
        gpus[i : i + gpus_per_trial] for i in range(0, len(gpus) - gpus_per_trial + 1, max(1, gpus_per_trial))
    ]
    places = [
        {"CUDA_VISIBLE_DEVICES": ",".join(g)} for _ in range(trials_per_gpu) for g in groups if gpus_per_trial
    ]
    if workers in (None, "auto"):
        return places or [{}]
    count = int(workers)
    if places and count > len(places):
        places = [places[i % len(places)] for i in range(count)]
    return places[:count] if places else [{} for _ in range(count)]


def make_executor(
    name: str, options: Mapping[str, Any], *, fork: bool, warm_with: bytes, directory: Path
) -> Executor:
    """
    Raises:
        UserError: the executor's package is not installed, or its options are wrong.
    """
    if name == "submitit":
        from hydratune.sweep.cluster import SubmititExecutor

        return SubmititExecutor(options, directory / "jobs")
    if name == "ray":
        from hydratune.sweep.cluster import RayExecutor

        return RayExecutor(options)
    return ForkExecutor(warm_with) if fork else ProcessExecutor()
