"""What a warm process holds for the trials that are forked from it, under the key of everything that made it.

In any other process nothing is ever held, and everything is made when it is asked for. A value is handed out once:
a forked child may change what it takes, because its memory is its own, but a second taker would see the change.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
CRASHED = 70  # exit code of a child whose start failed
_PR_SET_PDEATHSIG = 1
_held: dict[str, Any] = {}


def key_of(*parts: Any) -> str:
    """A key of plain values; what is not plain counts by its text."""
    return json.dumps(parts, sort_keys=True, default=repr)


def hold(key: str, make: Callable[[], Any]) -> None:
    """Make a value for later."""
    if key not in _held:
        _held[key] = make()


def take(key: str, make: Callable[[], T]) -> T:
    """The held value, which is then held no more, or a new one."""
    return _held.pop(key) if key in _held else make()


def in_child(make: Callable[[], T]) -> T:
    """What a function gives, run in a forked child, so that nothing it starts or changes stays in this process.

    Raises:
        Exception: what the function raised; ChildProcessError when the child died.
    """
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        die_with_parent(parent)
        os.close(read)
        try:
            try:
                answer = pickle.dumps((make(), None))
            except Exception as error:
                answer = pickle.dumps((None, error))
            with os.fdopen(write, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    if not answer:
        raise ChildProcessError("a child process died while it prepared data")
    value, problem = pickle.loads(answer)
    if problem is not None:
        raise problem
    return value


def outlive_parent() -> None:
    """Take `die_with_parent` back, for a process that has others to end first."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(CRASHED)
