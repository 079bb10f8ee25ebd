"""What can go wrong for a user, and the exit code that each kind ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with the input: the key and its value, why it cannot work, and the way out."""

    key: str
    value: object
    why: str
    fix: str

    def __str__(self) -> str:
        shown = (
            ""
            if self.value is None
            else f" = {self.value!r}"
            if isinstance(self.value, str)
            else f" = {self.value}"
        )
        return f"{self.key}{shown}: {self.why}\n    → {self.fix}"


class UserError(ValueError):
    """The config or the data is wrong; carries every violation found. Exit code 2."""

    exit_code = 2

    def __init__(self, violations: Violation | Iterable[Violation]):
        self.violations = [violations] if isinstance(violations, Violation) else list(violations)
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(map(str, self.violations))

    def __reduce__(self):
        return type(self), (self.violations,)


class TrainingFailed(RuntimeError):
    """Training cannot go on (loss not finite, out of memory); says what to change. Exit code 3."""

    exit_code = 3


class OutOfMemory(TrainingFailed):
    """The device or the host has too little memory."""


class Pruned(Exception):
    """A sweep ended this trial early, because it was worse than others. Exit code 4."""

    exit_code = 4


class Interrupted(KeyboardInterrupt):
    """Stopped by the user after a checkpoint was saved. Exit code 130."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that offers the nearest known name, or lists a few when none is near."""
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    if close := difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6):
        return f"did you mean '{lowered[close[0]]}'?"
    if not known:
        return "nothing can be set here"
    return "known: " + ", ".join(known[:25]) + (", …" if len(known) > 25 else "")
