"""Functions of the user's, named by a dotted path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation, nearest


def resolve(path: str, key: str = "data.formatting_func") -> Callable[..., Any]:
    """The function at a dotted path, e.g. `my_rows.to_text`.

    Args:
        key: the option that names it, for messages.

    Raises:
        UserError: no such module or function, or it cannot be called.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a function beside the user's own files, wherever train.py is
    try:
        home = import_module(module) if module else None
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            Violation(
                key,
                path,
                f"cannot be imported ({type(error).__name__}: {error})",
                "give module.function of a module on PYTHONPATH",
            )
        ) from error
    found = getattr(home, name, None)
    if not callable(found):
        near = (
            nearest(name, [n for n, v in vars(home).items() if callable(v)])
            if home
            else "give module.function"
        )
        raise UserError(Violation(key, path, "is not a function of an importable module", near))
    return found
