"""Questions to a database that may never answer: each is put in a thread of its own and waited for briefly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

PATIENCE = 1.0  # seconds


class NoAnswer(OSError):
    """There is no answer yet."""


class Question:
    """A call that may hang, as drivers do for minutes when a host is gone; it does not keep the program from ending."""

    def __init__(self, ask: Callable[[], Any]):
        self._answer: Future[Any] = Future()
        threading.Thread(target=self._put, args=(ask,), daemon=True).start()

    def _put(self, ask: Callable[[], Any]) -> None:
        try:
            self._answer.set_result(ask())
        except BaseException as error:
            self._answer.set_exception(error)

    @property
    def answered(self) -> bool:
        return self._answer.done()

    def answer(self, seconds: float) -> Any:
        """What the call returned.

        Raises:
            NoAnswer: it has not returned after so many seconds.
            Exception: what it raised.
        """
        try:
            return self._answer.result(seconds)
        except TimeoutError:
            if self._answer.done():  # the call itself ran out of time, or it has ended this moment
                return self._answer.result()
            raise NoAnswer("its database does not answer") from None
