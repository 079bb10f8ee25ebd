"""What runs on the node of a cluster: it keeps one trial, in a process of its own, as the local executors do.

So a trial has a fresh interpreter in whose main thread signals work, without submitit's signal handlers or Ray's
threads; what it leaves behind ends with it, and it ends with its keeper.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hydratune.sweep.job import how_it_ended
from hydratune.sweep.place import begin, ordered, word_for

_LOOK = 0.5  # seconds between looks at the order
GRACE = 60.0  # seconds for an attempt to save a checkpoint when its trial was started again
APPEARS = 30.0  # seconds in which what was written on one node appears on another


def keep(packed: bytes, directory: str, attempt: int, told: Callable[[], bool] = lambda: False) -> str:
    """Run a packed job in a process of its own, and pass on what it is told; gives how it ended, as `Executor.wait`.

    Args:
        packed: of `Job.pack`.
        directory: of its trial, on a file system that the supervisor sees too.
        attempt: the number of the attempt at the trial.
        told: whether this process was asked to stop otherwise than by an order.
    """
    place = Path(directory)
    if not _appears(place):
        return f"{socket.gethostname()} does not see {directory}: the study must be in a folder that all nodes share"
    if (word := word_for(place, attempt)) != "run" or told():
        return f"told to {'stop' if word == 'run' else word} before it began"
    begin(place, attempt)
    command = [sys.executable, "-m", "hydratune.sweep.forkserver", "--once", str(os.getpid())]
    # The trial opens its console itself; until then its errors go there from here
    with (place / "console.log").open("ab") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert process.stdin is not None
    asked, until = False, math.inf
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(packed)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_LOOK)
                if code and how_it_ended(code) == "" and not (place / "result.json").exists():
                    return "its process failed at its start (see its console.log)"
                return how_it_ended(code)
            word = word_for(place, attempt)
            if word == "end" or time.monotonic() > until:
                process.kill()
            elif (word != "run" or told()) and not asked:
                asked = True
                process.terminate()  # once: a second one stops a run without its checkpoint
            if word == "leave" and until == math.inf:
                until = time.monotonic() + GRACE
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # data loaders and the like that it left
        process.wait()


def _appears(place: Path) -> bool:
    until = time.monotonic() + APPEARS
    while ordered(place) is None:
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True


def keep_for_submitit(packed: bytes, directory: str, attempt: int) -> str:
    """`keep` as submitit runs it: SLURM's warnings (SIGTERM at a preemption, SIGUSR2 before the time limit) are orders
    to stop. They replace the handlers of submitit, which ignores the one, and may requeue the job at the other."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: told.set())
    with contextlib.suppress(PermissionError):
        os.setsid()  # Ctrl-C in the supervisor's terminal is the supervisor's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return keep(packed, directory, attempt, told.is_set)
