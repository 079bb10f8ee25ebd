"""Reports and pictures that are not there are drawn when they are asked for, and kept where that can be done."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from hydratune.report import render
from hydratune.runs import Run
from hydratune.whole import write_whole

_DRAWING = threading.Lock()  # matplotlib's settings are those of the whole process


def can_draw(run: Run) -> bool:
    """Whether a run has a report, or what one is drawn from."""
    return any((run.path / name).is_file() for name in ("report.html", "metrics.jsonl", "summary.json"))


def drawn(path: Path) -> bytes | None:
    """The content of a `report.html` or `curves.png` that is missing; None when there is nothing to draw it from.

    That of a run that has ended is kept beside it, unless the folder cannot be written.
    """
    folder = path.parent
    if path.name == "report.html" and (folder / "study.json").is_file():
        from hydratune.sweep.page import page

        with contextlib.suppress(ValueError, KeyError):  # being written by another version
            facts = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            with _DRAWING:
                return page(folder, facts).encode()
    run = Run(folder, folder.name)
    if path.name not in ("report.html", "curves.png") or not can_draw(run):
        return None
    with _DRAWING:
        html, picture = render(folder)
    content = html.encode() if path.name == "report.html" else picture
    if run.ended:
        with contextlib.suppress(OSError):
            write_whole(path, content)
    return content
