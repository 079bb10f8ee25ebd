"""What the commands have in common: how errors end, how a run is named, where something new may be written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from tempfile import TemporaryFile
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


def require_new(key: str, path: Path, *, folder: bool) -> None:
    """See to it that a file, or a folder that may be there if it is empty, can be made, before anything slow begins.

    Raises:
        UserError: something is there, or it cannot be written; nothing is left behind.
    """
    what = "directory" if folder else "file"
    missing: list[Path] = []
    try:
        if path.exists() and not (folder and path.is_dir() and not any(path.iterdir())):
            raise UserError(Violation(key, str(path), "is already there", f"name a new {what}"))
        missing = [place for place in (path, *path.parents) if not place.exists()]
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        if folder:
            TemporaryFile(dir=path).close()
        else:
            path.touch(exist_ok=False)
            path.unlink()
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        fix = f"name a new {what} in a folder that you may write to"
        raise UserError(Violation(key, str(path), why, fix)) from None
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value of an option that takes one of a few words.

    Raises:
        UserError: it is none of them.
    """
    if value not in known:
        raise UserError(Violation(name, value, "is none of its values", f"give {', '.join(known)}"))
    return value
