"""What commands and runs print: on a terminal as wide as it is, on a pipe plain lines of any length, nothing padded.

Colours are Rich's, which leaves them out on a pipe and with NO_COLOR.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE = 160  # characters of a line that a choice of columns goes by where there is no terminal
_STYLES = {
    "running": "cyan", "completed": "green", "pruned": "yellow", "interrupted": "yellow", "failed": "red", "stopped": "dim",
}  # fmt: skip
_GAP = 2
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def state(status: str) -> Text:
    """The status of a run in its colour."""
    return Text(status, style=_STYLES.get(status, ""))


def room(console: Console) -> int:
    """Characters of a line."""
    return console.width if console.is_terminal else PIPE


def facts(console: Console, rows: Iterable[tuple[str, str | Text]]) -> None:
    """Names with their values, which may have several lines."""
    made = [(name, value if isinstance(value, Text) else Text(value)) for name, value in rows]
    if console.is_terminal:
        table = Table(show_header=False, box=None, padding=(0, _GAP, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in made:
            table.add_row(name, value)
        console.print(table)
        return
    width = max((cell_len(name) for name, _ in made), default=0)
    for name, value in made:
        for line in value.plain.split("\n"):
            say(console, f"{name}{' ' * (width - cell_len(name) + _GAP)}{line}".rstrip())
            name = ""


def columns(console: Console, header: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """A table with one line a row; on a terminal what is too wide is cut, on a pipe nothing is."""
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        for name in header:
            table.add_column(Text(name), no_wrap=True, overflow="ellipsis")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    widths = [cell_len(name) for name in header]
    for row in cells:
        widths = [max(width, cell.cell_len) for width, cell in zip(widths, row, strict=True)]
    for line in [[Text(name) for name in header], *cells]:
        padded = [cell.plain + " " * (w - cell.cell_len + _GAP) for cell, w in zip(line, widths, strict=True)]
        say(console, "".join(padded).rstrip())


def harmless(text: str) -> str:
    """What a model wrote, without the control characters that would command a terminal."""
    return _CONTROL.sub("�", text)


def width_of(header: str, cells: Iterable[str | Text]) -> int:
    """Of a column, with the gap after it."""
    return max([cell_len(header), *(cell_len(str(cell)) for cell in cells)]) + _GAP


def distinct(names: Sequence[str], width: int) -> list[str]:
    """Names in so many characters: first without the end that all have in common, then without their beginning."""
    if all(len(name) <= width for name in names):
        return [*names]
    parts = [name.split("-") for name in names]
    most = min(map(len, parts)) - 1 if len(set(names)) > 1 else 0
    shared = next((n for n in range(most) if len({part[-1 - n] for part in parts}) > 1), most)
    common = "".join(f"-{word}" for word in parts[0][-shared:]) if shared else ""
    cut = [name.removesuffix(common) + "…" if common else name for name in names]
    return [name if len(name) <= width else "…" + name[len(name) - width + 1 :] for name in cut]


def say(console: Console, line: str | Text, *, end: str = "\n") -> None:
    """A line as it is: not wrapped, and nothing in it coloured or read as markup."""
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True, end=end)
