"""Where a study is kept: a journal file that survives kill -9, or a database by URL; and one lock for all its workers.

Optuna's journal file is made safer in two ways. Its lock is a kernel lock, which a killed process cannot leave behind
(Optuna's own is a file that stays for 30 s). And before anything is appended, a last line without its end, which a
process killed while writing leaves, is cut: Optuna refuses to read a journal with such a line in its middle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from hydratune.errors import UserError, Violation
from hydratune.secrets import hide_password

_OPENS = 5  # two processes that create the tables at the same moment: one of them fails, and finds them then


class _KernelLock:
    """An exclusive `flock`, gone with its process."""

    def __init__(self, path: str):
        beside = Path(path).expanduser()
        self._path, self._file = beside.with_name(f".{beside.name}.lock"), -1

    def __enter__(self) -> None:
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)


class _Journal(JournalFileBackend):
    def __init__(self, path: str, *, create: bool):
        self._kernel_lock = _KernelLock(path)
        super().__init__(path)
        if create:
            self.append_logs([])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._kernel_lock:
            _cut_torn_line(self._file_path)
            if lines:
                with Path(self._file_path).open("ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())


def _cut_torn_line(path: str) -> None:
    with Path(path).open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 65536)
            file.seek(start)
            tail = file.read(end - start)
            if tail.endswith(b"\n") and end == size:
                return
            end = start if b"\n" not in tail else start + tail.rfind(b"\n") + 1
        file.truncate(end)


def is_url(storage: str) -> bool:
    return "://" in storage


def open_storage(storage: str, *, create: bool = True) -> BaseStorage:
    """A journal file or a database.

    Args:
        create: make it when it is not there, and see that it can be written; else it may be read-only.

    Raises:
        UserError: it cannot be opened, or its driver is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Target and region quantiles")
    warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
    warnings.filterwarnings("ignore", message="Constraints have been set")  # ours, and CMA-ES cannot use them
    if not is_url(storage):
        path = Path(storage).expanduser()
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(_Journal(str(path), create=create))
        except OSError as error:
            why = f"the journal cannot be written ({error.strerror})"
            raise UserError(
                Violation("sweep.storage", storage, why, "give a file in a folder that you may write")
            ) from error
    for left in range(_OPENS - 1, -1, -1):
        try:
            return RDBStorage(
                storage,
                engine_kwargs={"pool_pre_ping": True},
                skip_table_creation=not create,
                skip_compatibility_check=not create,
            )
        except Exception as error:  # of the driver, many kinds
            if left and create and not isinstance(error, ImportError) and "exist" in str(error).lower():
                time.sleep(0.2)
                continue
            raise UserError(Violation("sweep.storage", hide_password(storage), *_why_not(error))) from error
    raise AssertionError("unreachable")


def _why_not(error: BaseException) -> tuple[str, str]:
    if isinstance(error, ImportError):
        return (
            "its driver is not installed",
            "pip install 'hydratune[postgres]', or the driver that the URL names",
        )
    error = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    error = getattr(error, "orig", None) or error  # what the driver said, not Optuna's guess at it
    first = hide_password(str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"the database does not open ({first})",
        "check that it runs and that the URL's user, password and name are right",
    )


def can_be_shared(storage: str) -> bool:
    return not storage.startswith("sqlite")


@contextmanager
def exclusive(storage: BaseStorage, where: str, study: str) -> Iterator[None]:
    """One worker at a time, over all processes and machines that share the storage. Freed when its holder dies."""
    dialect = storage.engine.dialect.name if isinstance(storage, RDBStorage) else "file"
    if dialect in ("postgresql", "mysql", "mariadb"):
        import sqlalchemy as sa

        assert isinstance(storage, RDBStorage)
        digest = hashlib.sha256(f"hydratune:{study}".encode()).digest()
        with storage.engine.connect() as connection:
            if dialect == "postgresql":
                take, give = "select pg_advisory_lock(:key)", "select pg_advisory_unlock(:key)"
                key: Any = int.from_bytes(digest[:8], "big", signed=True)
            else:
                take, give = "select get_lock(:key, 600)", "select release_lock(:key)"
                key = digest.hex()[:60]
            if dialect != "postgresql" and connection.execute(sa.text(take), {"key": key}).scalar() != 1:
                why = "another worker has held the study's lock for ten minutes"
                raise UserError(
                    Violation("sweep.storage", hide_password(where), why, "look for a worker that hangs")
                )
            if dialect == "postgresql":
                connection.execute(sa.text(take), {"key": key})
            try:
                yield
            finally:
                connection.execute(sa.text(give), {"key": key})
        return
    path = where if dialect == "file" else where.partition(":///")[2] or "sqlite"
    with _KernelLock(f"{path}.claim"):
        yield
