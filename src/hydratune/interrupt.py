"""Ctrl-C while training: the first asks for a checkpoint and an orderly stop, the second stops at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopOnSignal:
    """`with StopOnSignal() as stop: trainer.train()`; handles SIGINT and SIGTERM for that time.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step: saving a checkpoint (Ctrl-C again stops at once)", file=sys.stderr)

    def callback(self) -> TrainerCallback:
        """Ends the training loop after the current step, with a checkpoint."""
        stop = self

        class _Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                if stop.requested:
                    control.should_save = True
                    control.should_training_stop = True
                return control

        return _Stop()
