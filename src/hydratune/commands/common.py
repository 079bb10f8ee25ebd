"""What the commands have in common: how errors end, and how a run is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from hydratune.errors import TrainingFailed, UserError, Violation

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's directory, a part of its name, or `latest`.")
]
Home = Annotated[Path, typer.Option(help="The folder that runs are looked for in.")]


def clear(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends a command with one message and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (UserError, TrainingFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None

    return wrapped


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value of an option that takes one of a few words.

    Raises:
        UserError: it is none of them.
    """
    if value not in known:
        raise UserError(Violation(name, value, "is none of its values", f"give {', '.join(known)}"))
    return value
