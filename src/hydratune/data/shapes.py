"""The parts of one row to canonical form, each checked; what is wrong is added to a list of faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hydratune.errors import Violation, nearest

_TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


class Faults(list[Violation]):
    """Violations of rows, each named by where the row came from and by column."""

    where = ""

    def add(self, column: str, why: str, fix: str) -> None:
        self.append(Violation(f"{self.where}, column {column}", None, why, fix))


def absent(name: str, row: Mapping[str, Any]) -> tuple[str, str]:
    others = [key for key, value in row.items() if value is not None and key != name]
    if others:
        return f"is missing here; the row has {', '.join(others[:6])}", "write every row in one format"
    return "is missing or null", "fill it in, or remove the row"


def text_of(value: Any, name: str, faults: Faults, row: Mapping[str, Any], *, empty: bool = False) -> str:
    if value is None:
        faults.add(name, *absent(name, row))
    elif not isinstance(value, str):
        faults.add(name, f"is a {type(value).__name__}, not text", "give text")
    elif not empty and not value.strip():
        faults.add(name, "is empty", "fill it in, or remove the row")
    else:
        return value
    return ""


def messages_of(value: Any, name: str, faults: Faults, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if value is None:
        faults.add(name, *absent(name, row))
        return []
    if not isinstance(value, list):
        faults.add(
            name,
            f"is a {type(value).__name__}, not a list of messages",
            'give [{"role": …, "content": …}, …]',
        )
        return []
    if not value:
        faults.add(name, "is an empty list of messages", "fill it in, or remove the row")
    return [_message(message, f"{name}[{i}]", faults) for i, message in enumerate(value)]


def _message(message: Any, at: str, faults: Faults) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        faults.add(at, f"is a {type(message).__name__}, not a message", 'write {"role": …, "content": …}')
        return {}
    role, content = message.get("role"), message.get("content")
    role = message.get("from") if role is None else role
    content = message.get("value") if content is None else content
    extra = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    if role is None:
        faults.add(at, f"has no role (keys: {', '.join(message)})", 'write {"role": …, "content": …}')
    elif role not in _ROLES:
        faults.add(at, f"has the unknown role {role!r}", nearest(str(role), _ROLES))
    if content is None and not extra.get("tool_calls"):
        faults.add(
            at,
            f"has no content (keys: {', '.join(k for k in message if message[k] is not None)})",
            "fill it in",
        )
    elif content is not None and not isinstance(content, str):
        faults.add(at, f"its content is a {type(content).__name__}, not text", "give the content as text")
    return {"role": _ROLES.get(str(role), str(role)), "content": content, **extra}


def with_system(messages: list[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    if prompt is None or not messages or messages[0].get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": prompt}, *messages]


def alpaca_of(row: dict[str, Any], system_prompt: str | None, faults: Faults) -> dict[str, Any]:
    question = text_of(row.get("instruction"), "instruction", faults, row)
    more = row.get("input")
    if more is not None:
        more = text_of(more, "input", faults, row, empty=True)
    answer = text_of(row.get("output"), "output", faults, row)
    prompt = [{"role": "user", "content": f"{question}\n\n{more}" if more and more.strip() else question}]
    return {
        "prompt": with_system(prompt, system_prompt),
        "completion": [{"role": "assistant", "content": answer}],
    }


def pair_of(row: dict[str, Any], system_prompt: str | None, faults: Faults) -> tuple[Any, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        kinds = f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}"
        faults.add("completion", kinds, "give both as text, or both as lists of messages")
        return None, None
    if not isinstance(prompt, list):
        text = (
            text_of(prompt, "prompt", faults, row, empty=True),
            text_of(completion, "completion", faults, row),
        )
        if system_prompt is None or not all(text):
            return text
        prompt, completion = (
            [{"role": "user", "content": text[0]}],
            [{"role": "assistant", "content": text[1]}],
        )
    messages = with_system(messages_of(prompt, "prompt", faults, row), system_prompt)
    before = len(faults)
    answer = messages_of(completion, "completion", faults, row)
    if len(faults) == before and not any((m["content"] or "").strip() or "tool_calls" in m for m in answer):
        faults.add("completion", "is empty", "fill it in, or remove the row")
    return messages, answer


def token_row(row: dict[str, Any], faults: Faults) -> dict[str, Any]:
    out = {"input_ids": row.get("input_ids")}
    out.update({name: row[name] for name in _TOKEN_COLUMNS if row.get(name) is not None})
    for name, values in out.items():
        if values is None:
            faults.add(name, *absent(name, row))
        elif not _whole_numbers(values):
            faults.add(name, "is not a list of whole numbers", "give the token ids of one row as a flat list")
        elif out["input_ids"] is not None and len(values) != len(out["input_ids"]):
            faults.add(
                name,
                f"has {len(values)} values for {len(out['input_ids'])} input_ids",
                "give one value a token",
            )
    return out


def _whole_numbers(values: Any) -> bool:
    return (
        isinstance(values, Iterable)
        and not isinstance(values, str)
        and all(isinstance(value, int) for value in values)
    )
