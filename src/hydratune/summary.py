"""summary.json as lists, pages and reports read it: a field of another kind than runs write is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NUMBERS = ("steps", "tokens", "tokens_per_second", "seconds_to_first_step", "seed", "logged_bytes")
_TEXTS = ("status", "run_name", "algo", "model", "data", "peft", "device", "git_commit", "command", "started")
_OF_NUMBERS = ("seconds", "objectives")


def read_summary(folder: Path) -> dict[str, Any]:
    """The facts of a run; empty where there is no summary, or one that is torn."""
    try:
        found = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    facts = {
        key: value
        for key, value in found.items()
        if value is None
        or (_is_number(value) if key in _NUMBERS else isinstance(value, str) if key in _TEXTS else True)
    }
    for key in ("objective", "metrics", "peak_memory", "versions", *_OF_NUMBERS):
        if not isinstance(facts.get(key, {}), dict):
            del facts[key]
    for key in _OF_NUMBERS:
        if key in facts:
            facts[key] = _numbers(facts[key])
    if "metrics" in facts:
        facts["metrics"] = {name: _numbers(of) for name, of in facts["metrics"].items()}
    for key, inner in (("objective", "value"), ("peak_memory", "bytes")):
        if key in facts and not _is_number(facts[key].get(inner)):
            facts[key] = {**facts[key], inner: None}
    return facts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> dict[str, float]:
    return {k: v for k, v in value.items() if _is_number(v)} if isinstance(value, dict) else {}
