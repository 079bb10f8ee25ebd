"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(number: float) -> str:
    """A number with at most four digits: 950, 3.2k, 41k, 1.3M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}" if abs(number) < 10 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"
