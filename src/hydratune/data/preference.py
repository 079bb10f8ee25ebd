"""Rows of preference data: pairs of a chosen and a rejected completion, and completions with a label.

Sets are written in many ways: the prompt stands beside the completions, or begins both of them, or both; a label is a
boolean, 0 and 1, or text; a transcript is one text. All become `prompt`, `chosen`, `rejected` (and `margin`), or `prompt`,
`completion`, `label`, where prompt and completions are all text or all lists of messages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hydratune.data.shapes import Faults, absent, messages_of, text_of, with_system

# What an algorithm trains on → the forms in which its rows may come, with the columns that tell them.
FORMS = {
    "preference": {
        "tokenized": ("prompt_ids", "chosen_ids", "rejected_ids"),
        "preference": ("chosen", "rejected"),
    },
    "unpaired": {
        "tokenized": ("prompt_ids", "completion_ids", "label"),
        "unpaired": ("completion", "label"),
        "preference": ("chosen", "rejected"),
        "messages": ("messages", "label"),
    },
}
_TRUE, _FALSE = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def pair_row(row: Mapping[str, Any], system_prompt: str | None, faults: Faults) -> dict[str, Any]:
    """A row with `chosen` and `rejected`, and with or without `prompt`, as `prompt`, `chosen`, `rejected`, `margin`."""
    chosen = _completion(row, "chosen", faults)
    rejected = _completion(row, "rejected", faults)
    if chosen is None or rejected is None:
        return {}
    if isinstance(chosen, list) != isinstance(rejected, list):
        faults.add("rejected", "is not of the kind that chosen is", "give both as text, or both as messages")
        return {}
    given = row.get("prompt")
    if given is None or _repeats(given, chosen, rejected):
        prompt, chosen, rejected = _split(chosen, rejected)
    else:
        prompt = _prompt(given, chosen, row, faults)
    out = _with_system(prompt, {"chosen": chosen, "rejected": rejected}, system_prompt)
    if row.get("margin") is not None:
        out["margin"] = _number(row["margin"], "margin", faults)
    return out


def unpaired_rows(
    row: Mapping[str, Any], form: str, system_prompt: str | None, faults: Faults
) -> list[dict[str, Any]]:
    """A row as completions with labels: one of its own, or the two of a pair."""
    if form == "preference":
        pair = pair_row({k: v for k, v in row.items() if k != "margin"}, system_prompt, faults)
        return [
            {"prompt": pair.get("prompt"), "completion": pair.get(name), "label": name == "chosen"}
            for name in ("chosen", "rejected")
        ]
    completion = _completion(row, "messages" if form == "messages" else "completion", faults)
    label = label_of(row.get("label"), row, faults)
    if completion is None:
        return []
    given = row.get("prompt") if form == "unpaired" else None
    if given is not None:
        prompt = _prompt(given, completion, row, faults)
    elif isinstance(completion, list):
        # the last turns of the assistant are judged, all before them is the prompt
        last = next(
            (i for i in range(len(completion) - 1, -1, -1) if completion[i]["role"] != "assistant"), -1
        )
        if last == len(completion) - 1:
            name = "messages" if form == "messages" else "completion"
            faults.add(name, "does not end with the assistant's turn", "end it with what is judged")
        prompt, completion = completion[: last + 1], completion[last + 1 :]
    else:
        prompt = ""
    return [{**_with_system(prompt, {"completion": completion}, system_prompt), "label": label}]


def label_of(value: Any, row: Mapping[str, Any], faults: Faults) -> bool:
    """True and false, 0 and 1, and the same as text."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if value is None:
        faults.add("label", *absent("label", row))
    elif word in _TRUE or word in _FALSE:
        return word in _TRUE
    else:
        faults.add("label", f"is {value!r}, neither true nor false", "give true for a desirable completion")
    return False


def transcript(text: str) -> list[dict[str, str]]:
    """The messages of a transcript as Anthropic's HH-RLHF writes it: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def from_transcripts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A `formatting_func` for rows whose `chosen` and `rejected` are transcripts (hh_rlhf)."""
    return {name: transcript(row[name]) for name in ("chosen", "rejected")}


def tokenized_row(row: Mapping[str, Any], goal: str, faults: Faults) -> dict[str, Any]:
    """Rows that hold token ids already; `kl_completion_ids` may name the mismatched completion of KTO."""
    names = [n for n in FORMS[goal]["tokenized"] if n.endswith("_ids")]
    out: dict[str, Any] = {}
    for name in [*names, *(["kl_completion_ids"] if row.get("kl_completion_ids") is not None else [])]:
        values = row.get(name)
        if values is None:
            faults.add(name, *absent(name, row))
        elif not isinstance(values, list) or not all(isinstance(v, int) for v in values):
            faults.add(name, "is not a list of whole numbers", "give token ids as a flat list")
        elif not values and name != "prompt_ids":
            faults.add(name, "is empty", "fill it in, or remove the row")
        else:
            out[name] = values
    if goal == "unpaired":
        out["label"] = label_of(row.get("label"), row, faults)
    elif row.get("margin") is not None:
        out["margin"] = _number(row["margin"], "margin", faults)
    return out


def misfit(goal: str, names: list[str]) -> str:
    """What to do with rows whose columns are not those of the goal."""
    have = set(names)
    if goal == "preference" and "label" in have and have & {"completion", "messages"}:
        return "rows with a label and one completion are what algo=kto trains on"
    if goal == "unpaired" and have & {"messages", "completion", "text"}:
        return "add a column label (true for desirable), or train on the rows with algo=sft"
    wanted = "; ".join(f"{form}: {', '.join(columns)}" for form, columns in FORMS[goal].items())
    return f"map yours, e.g. data.columns={{chosen: better, rejected: worse}}; the forms are {wanted}"


def _completion(row: Mapping[str, Any], name: str, faults: Faults) -> Any:
    """Text or messages with something in them; None when there is a fault."""
    value, before = row.get(name), len(faults)
    if isinstance(value, dict) and "role" in value:
        value = [value]  # a single message
    if isinstance(value, list):
        value = messages_of(value, name, faults, row)
        if len(faults) == before and not any(
            (m["content"] or "").strip() or "tool_calls" in m for m in value
        ):
            faults.add(name, "is empty", "fill it in, or remove the row")
    else:
        value = text_of(value, name, faults, row)
    return value if len(faults) == before else None


def _prompt(given: Any, completion: Any, row: Mapping[str, Any], faults: Faults) -> Any:
    if isinstance(completion, list):
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        return messages_of(given, "prompt", faults, row) if given else []
    if isinstance(given, list):
        faults.add("prompt", "is a list and the completion is text", "give both as text, or both as messages")
        return ""
    return text_of(given, "prompt", faults, row, empty=True)


def _repeats(given: Any, chosen: Any, rejected: Any) -> bool:
    """Whether both completions begin with the prompt that stands beside them, as in ultrafeedback_binarized."""
    if isinstance(chosen, list) and isinstance(given, str):
        return all(len(c) > 1 and c[0]["role"] != "assistant" and given.strip() == (c[0]["content"] or "").strip()
                   for c in (chosen, rejected))  # fmt: skip
    if isinstance(chosen, list) and isinstance(given, list):
        shown = [(m.get("role"), m.get("content")) for m in given if isinstance(m, Mapping)]
        return bool(shown) and all(
            [(m["role"], m["content"]) for m in c[: len(shown)]] == shown and len(c) > len(shown)
            for c in (chosen, rejected)
        )
    return False


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both begin with as the prompt, and the rests, of which neither is empty."""
    most = min(len(chosen), len(rejected)) - (1 if isinstance(chosen, list) else 0)
    common = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if isinstance(chosen, str):
        while common and not chosen[common - 1].isspace():  # between words, and the space goes with the word
            common -= 1
        common = len(chosen[:common].rstrip(" "))
        if not chosen[common:].strip() or not rejected[common:].strip():
            common = 0
    return chosen[:common], chosen[common:], rejected[common:]


def _with_system(prompt: Any, completions: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    if system_prompt is not None:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            completions = {k: [{"role": "assistant", "content": v}] for k, v in completions.items()}
        prompt = (
            with_system(prompt, system_prompt) if prompt else [{"role": "system", "content": system_prompt}]
        )
    return {"prompt": prompt, **completions}


def _number(value: Any, name: str, faults: Faults) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        faults.add(name, f"is {value!r}, no finite number", "give a number")
    return number
