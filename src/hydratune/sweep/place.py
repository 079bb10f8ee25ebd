"""A trial's directory as the place where supervisor and process meet when neither pipe nor signal reaches that far.

On a cluster the processes of a trial may outlive the supervisor that started them, and the next supervisor starts the
trial again. Two things keep that safe, with nothing but the directory that both need anyway. `alone`: whoever runs the
trial holds a kernel lock, which dies with the process, and the next attempt waits for it. And the order: one line,
`ATTEMPT WORD`, which a trial's keeper (`keeper.py`) looks at twice a second. An order for a later attempt tells an
earlier one that the trial is no longer its own.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Literal

Word = Literal["run", "stop", "end"]  # stop: save a checkpoint and stop; end: at once
_ORDER, _KEEPER, _LOCK = "order", "keeper", ".running.lock"
_POLL = 0.2  # seconds
PATIENCE = (
    150.0  # seconds for an earlier attempt to end; it saves a checkpoint in at most `keeper.GRACE` of them
)


def order(directory: Path, attempt: int, word: Word) -> None:
    """Leave an order for an attempt; one for a later attempt stays.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    there = ordered(directory)
    if there is None or there[0] <= attempt:
        # In place, not by renaming: opening the file then shows other NFS clients its content of now
        (directory / _ORDER).write_text(f"{attempt} {word}\n", encoding="ascii")


def ordered(directory: Path) -> tuple[int, str] | None:
    """The order that stands: attempt and word; None when there is none, or it is just being written."""
    try:
        attempt, word = (directory / _ORDER).read_text(encoding="ascii").split()
        return int(attempt), word
    except (OSError, ValueError):
        return None


def word_for(directory: Path, attempt: int) -> str:
    """What an attempt shall do: a `Word`, or "leave" when the trial was started again since."""
    there = ordered(directory)
    if there is None or there[0] < attempt:
        return "run"
    return there[1] if there[0] == attempt else "leave"


def begin(directory: Path, attempt: int) -> None:
    """Note that an attempt has begun, and where."""
    text = f"{attempt} {socket.gethostname()} {os.getpid()}\n"
    (directory / _KEEPER).write_text(text, encoding="utf-8")


def has_begun(directory: Path, attempt: int) -> bool:
    try:
        return (directory / _KEEPER).read_text(encoding="utf-8").split()[0] == str(attempt)
    except (OSError, IndexError):
        return False


def alone(directory: Path, attempt: int, patience: float = PATIENCE) -> int:
    """From now on no other process runs this trial; waits for one that does.

    Returns:
        The lock's file descriptor. Left open, the lock is held until the process is gone, and with it the memory that
        it had on a device.

    Raises:
        TimeoutError: another process still ran the trial after `patience` seconds.
    """
    there = ordered(directory)
    if there is None or there[0] < attempt:
        order(directory, attempt, "run")  # a keeper of an earlier attempt ends it now
    path, until = directory / _LOCK, time.monotonic() + patience
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    while not _take(lock):
        if time.monotonic() > until:
            os.close(lock)
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise TimeoutError(f"{holder} still runs this trial")
        time.sleep(_POLL)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the order alone has to do
        return True
    return True
