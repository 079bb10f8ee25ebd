"""What a run shows: a progress bar on a terminal, plain lines elsewhere, and a table at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from hydratune import terminal
from hydratune.amounts import amount, duration
from hydratune.card import facts_of
from hydratune.objective import REWARD_ACCURACY, REWARDS


def describe(logs: dict[str, Any]) -> str:
    """One log event in a line: loss, learning rate, tokens per second; of an evaluation its metrics."""
    parts = []
    for key, name, form in (
        ("loss", "loss", "{:.4f}"),
        ("eval_loss", "eval loss", "{:.4f}"),
        ("eval_mean_token_accuracy", "accuracy", "{:.1%}"),
        *((key, "reward accuracy", "{:.1%}") for key in REWARD_ACCURACY),
        *((key, "reward", "{:.3f}") for key in REWARDS),
        ("learning_rate", "lr", "{:.1e}"),
    ):
        if isinstance(logs.get(key), int | float):
            parts.append(f"{name} {form.format(logs[key])}")
    if isinstance(logs.get("tokens_per_second"), int | float):
        parts.append(f"{amount(logs['tokens_per_second'])} tok/s")
    return " · ".join(parts)


class ProgressCallback(TrainerCallback):
    """Shows a run's steps on the main process, in place of transformers' own progress and printer callbacks."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        if not (state.is_world_process_zero and self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TextColumn("{task.fields[left]}", style="dim"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, facts="", left=""
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step, left=self._left(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not (facts := describe(logs or {})):
            return
        evaluated = any(name.startswith("eval_") for name in logs)
        if self._bar is not None and self._task is not None:
            if evaluated:
                self._bar.console.print(f"step {state.global_step}: {facts}", highlight=False)
            else:
                self._bar.update(self._task, completed=state.global_step, facts=facts)
        else:
            left = "" if evaluated else f" · {self._left(state)}"
            self._console.print(
                f"step {state.global_step}/{state.max_steps} · {facts}{left}", highlight=False, soft_wrap=True
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        if done <= 0:
            return ""
        return f"{duration((time.monotonic() - self._start) / done * (state.max_steps - state.global_step))} left"


def final_table(summary: dict[str, Any], out_dir: Path, console: Console | None = None) -> None:
    """The short table at the end: results, cost, and where things are."""
    places = [("model", str(out_dir / "model")), ("report", str(out_dir / "report.html"))]
    terminal.facts(console or Console(), [*facts_of(summary), *places])
