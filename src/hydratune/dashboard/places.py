"""Where a study is kept, read from its folder."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hydratune.dashboard.questions import PATIENCE, NoAnswer, Question
from hydratune.secrets import hide_password
from hydratune.sweep.storage import is_url


@dataclass
class Place:
    """A study where it is kept.

    Attributes:
        folder: of its trials.
        number: of the study here, from 1.
        name: the study's, with its folder when another has the same.
        uid: tells it from another study that takes its folder.
        study: its id in its own storage.
        remote: whether its storage is a server, which may not answer.
    """

    folder: Path
    number: int
    name: str
    uid: str
    storage: BaseStorage
    study: int
    remote: bool
    lock: threading.RLock = field(
        default_factory=threading.RLock
    )  # a journal is replayed into shared objects
    finished: dict[int, FrozenTrial] = field(default_factory=dict)
    late: dict[str, Question] = field(default_factory=dict)

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """What a method of the storage returns; for those who hold the lock.

        Raises:
            NoAnswer: a server does not answer in time, or has not answered an earlier question yet. An answer that comes
                later is for who asks the same again.
        """
        call = partial(getattr(self.storage, method), *args, **options)
        if not self.remote:
            return call()
        name = f"{method}{args}"
        question = self.late.pop(name, None)
        wait = 0.0 if question else PATIENCE
        if question is None and any(not other.answered for other in self.late.values()):
            raise NoAnswer("its database does not answer")
        question = question or Question(call)
        try:
            return question.answer(wait)
        except NoAnswer:
            self.late[name] = question
            raise


def uid(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / ".study").read_text(encoding="utf-8")
    return ""


def facts(folder: Path) -> dict[str, Any]:
    """What a trial was told of its study: study, storage, objectives; empty before there is a trial."""
    for path in folder.glob("*/trial.json"):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def where(folder: Path) -> str:
    """A study's storage: the journal in its folder, also when that was moved here, else where its trials report to."""
    journal = folder / "journal.log"
    known = str(journal) if journal.is_file() else str(facts(folder).get("storage", ""))
    if not known or not (is_url(known) or Path(known).is_file()):
        raise KeyError(f"its storage {hide_password(known)} is not here" if known else "no trial has begun")
    return known


def is_remote(storage: str) -> bool:
    return is_url(storage) and not storage.startswith("sqlite")


def name(folder: Path) -> str:
    for name in ("study.json", "command.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads((folder / name).read_text(encoding="utf-8"))["name"])
    return str(facts(folder).get("study", folder.name))


def age(folder: Path) -> tuple[float, str]:
    with contextlib.suppress(OSError):
        return (folder / ".study").stat().st_mtime, str(folder)
    return 0.0, str(folder)
