"""Which checkpoints of a run can be resumed from."""

from __future__ import annotations

import json
from pathlib import Path

COUNTERS = "hydratune_counters.json"  # of a checkpoint, written after all else of it


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run directory that was written to its end; one that was cut short is passed over."""
    found = [p for p in (run / "checkpoints").glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for folder in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None
