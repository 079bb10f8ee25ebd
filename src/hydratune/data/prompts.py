"""Prompts for online algorithms: of rows of any known form what is asked, beside every other column that they have.

Other columns stay, because a reward may need them: an answer to verify against, a test, a category.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydratune.completions import asked
from hydratune.data.preference import FORMS as PREFERENCES
from hydratune.data.preference import pair_row
from hydratune.data.read import ORIGIN
from hydratune.data.shapes import Faults, absent, alpaca_of, messages_of, text_of, with_system

# The forms in which rows may come, with the columns that tell them; those columns are not kept.
FORMS = {
    "tokenized": ("prompt_ids",),
    "prompt": ("prompt",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": PREFERENCES["preference"]["preference"],
    "alpaca": ("instruction", "output"),
    "ids": ("input_ids",),
}
_OF_FORMS = {name for columns in FORMS.values() for name in columns} | {"completion", ORIGIN}


def prompt_row(
    row: Mapping[str, Any], kind: str, system_prompt: str | None, faults: Faults
) -> dict[str, Any]:
    """A row as `prompt` (text, or messages of which the last is not the assistant's) or `prompt_ids`, and the rest of it."""
    before = len(faults)
    rest = {name: value for name, value in row.items() if name not in _OF_FORMS}
    if kind in ("tokenized", "ids"):
        name = FORMS[kind][0]
        ids = row.get(name)
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            faults.add(name, "is not a list of whole numbers", "give token ids as a flat list")
        return {"prompt_ids": ids, **rest}
    if kind == "preference":
        prompt = pair_row({k: row.get(k) for k in ("prompt", "chosen", "rejected")}, None, faults).get(
            "prompt"
        )
    elif kind == "alpaca":
        prompt = alpaca_of(dict(row), None, faults)["prompt"]
    elif kind == "prompt":
        given = row.get("prompt")
        listed = isinstance(given, list)
        prompt = (
            messages_of(given, "prompt", faults, row) if listed else text_of(given, "prompt", faults, row)
        )
    else:
        name = FORMS[kind][0]
        messages = messages_of(row.get(name), name, faults, row)
        prompt = asked({"messages": messages}) if len(messages) and "role" in messages[-1] else []
    if not prompt and len(faults) == before:
        faults.add(FORMS[kind][0], *absent("prompt", {}))
    if system_prompt is not None:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = with_system(prompt or [], system_prompt)
    return {"prompt": prompt, **rest}
