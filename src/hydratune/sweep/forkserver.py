"""A warm process that trials are forked from: everything is imported, data is mapped, weights are read, once.

`python -m hydratune.sweep.forkserver FD` serves one supervisor over a socket, until the socket closes. It has one
thread, never touches an accelerator and never runs torch in parallel, so that a child starts from a clean state; what
a child changes is its own, because memory is copied when it is written to. When the server or the supervisor dies,
the kernel ends the children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from hydratune.held import CRASHED, die_with_parent, outlive_parent

_INHERITED = frozenset(os.environ)  # names
# threads of libraries would not be there in a child: numpy's, arrow's allocator's, the tokenizers'
_WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> int:
    _prepare_environment()
    if sys.argv[1] == "--once":
        from hydratune.sweep.job import run_packed

        die_with_parent(int(sys.argv[2]))
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, {signal.SIGINT}
        )  # Ray and `cluster.py` start theirs with it blocked
        return run_packed(sys.stdin.buffer.read())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    die_with_parent(int(sys.argv[2]))
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(Exception):  # told with the answer to "warm", which imports the same
        from hydratune.sweep.warm import import_all

        import_all()
    Server(connection).serve()
    os._exit(0)  # there is nothing to tidy up, and tearing down all that was imported takes a second


def _prepare_environment() -> None:
    os.environ.update(_WITHOUT_THREADS)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not start CUDA here


class _Gone(Exception):
    """The supervisor is no more."""


class Server:
    """Messages in: ("warm", packed, environment) and ("start", key, packed). Out: ("warm", report), ("started", key, pid),
    ("refused", key, why it could not be started) and ("ended", key, exit code, negative for a signal)."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._children: dict[int, int] = {}
        read, self._wake = os.pipe()
        self._woken = Connection(read, writable=False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        try:
            while True:
                ready = wait([self._connection, self._woken])
                if self._woken in ready:
                    os.read(self._woken.fileno(), 4096)
                    self._reap()
                if self._connection in ready:
                    try:
                        message = self._connection.recv()
                    except (EOFError, OSError) as error:
                        raise _Gone from error
                    if message[0] == "warm":
                        self._send("warm", _warm(*message[1:]))
                    else:
                        self._start(*message[1:])
        except _Gone:
            pass
        finally:
            for pid in self._children:
                _kill_group(pid)

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise _Gone from error

    def _start(self, key: int, packed: bytes) -> None:
        outlive_parent()  # from now on the end of the connection ends the children's whole groups
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, too little memory: of this trial, not of the server
            self._send("refused", key, f"its process could not be started ({error.strerror})")
            return
        if pid:
            self._children[pid] = key
            self._send("started", key, pid)
            return
        code = CRASHED
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT):
                signal.signal(
                    number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler
                )
            os.setsid()
            die_with_parent(server)
            self._connection.close()
            self._woken.close()
            os.close(self._wake)
            from hydratune.sweep.job import run_packed

            code = run_packed(packed)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            _kill_group(pid)  # data loaders and the like that it left
            if pid in self._children:
                self._send("ended", self._children.pop(pid), os.waitstatus_to_exitcode(status))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _warm(packed: bytes, environment: Mapping[str, str]) -> dict[str, Any]:
    """Import and read ahead what the tasks will want; an error only means that trials do it themselves.

    The supervisor's environment, which has changed since it started this process (typed secrets are put there), is taken over.
    """
    from hydratune.errors import UserError

    for gone in _INHERITED - environment.keys():  # what this process and its imports have set stays
        os.environ.pop(gone, None)
    os.environ.update(environment)
    _prepare_environment()
    error: str | UserError
    cuda = False
    try:
        import torch

        from hydratune.sweep.job import THREADS, unpack

        os.environ[THREADS] = str(torch.get_num_threads())  # what a process of its own would have
        torch.set_num_threads(1)  # no parallel region: its thread pool would not survive a fork
        from hydratune.sweep.warm import warm

        try:
            warm(unpack(packed))
        finally:
            cuda = torch.cuda.is_initialized()
        error = ""
    except UserError as problem:
        error = problem
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [""]  # noqa: PTH112, PTH208
    return {"threads": len(threads), "error": error, "cuda": cuda}


if __name__ == "__main__":
    sys.exit(main())
