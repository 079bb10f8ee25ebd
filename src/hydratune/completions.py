"""Rows with what a policy answered, as those who judge see them: users' functions, and models with tokens of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

_NO_COLUMN = ("prompt", "completion", "prompt_ids", "completion_ids", "prompts", "completions")
_SHOWN = 60  # characters of a prompt in a message


def asked(row: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
    """What a formatted row asks: its `prompt`; else its `messages` before a last answer; None when it has only ids."""
    if row.get("prompt") is not None:
        return row["prompt"]
    messages = row.get("messages")
    if messages is None:
        return None
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return list(messages[:end])


class Completions:
    """B rows with a completion each; text is decoded once, when it is first asked for.

    Args:
        rows: formatted rows; one that is answered several times stands here as often.
        prompt_ids, completion_ids: token ids of the policy's tokenizer, without padding, B arrays each.
        tokenizer: the policy's.
        stop_tokens: what ends a completion; None: EOS.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        tokenizer: Any,
        stop_tokens: Sequence[int] | None = None,
    ) -> None:
        assert len(rows) == len(prompt_ids) == len(completion_ids), "one prompt and one completion a row"
        self.rows, self.prompt_ids, self.completion_ids = rows, prompt_ids, completion_ids
        self._tokenizer = tokenizer
        self._stops = {tokenizer.eos_token_id} if stop_tokens is None else {*stop_tokens}

    def __len__(self) -> int:
        return len(self.rows)

    def _decode(self, ids: Sequence[Any]) -> list[str]:
        lists = [[int(i) for i in row] for row in ids]
        return self._tokenizer.batch_decode(
            lists, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @cached_property
    def texts(self) -> list[str]:
        """Completions without special tokens."""
        return self._decode(self.completion_ids)

    @cached_property
    def whole_texts(self) -> list[str]:
        """Prompts with completions, decoded together, so that a space between them stays; without special tokens."""
        pairs = zip(self.prompt_ids, self.completion_ids, strict=True)
        return self._decode([[*prompt, *completion] for prompt, completion in pairs])

    @cached_property
    def prompts(self) -> list[Any]:
        """Text or messages of each prompt; rows that hold only ids are decoded."""
        found = [asked(row) for row in self.rows]
        bare = [i for i, prompt in enumerate(found) if prompt is None]
        for i, text in zip(
            bare, self._decode([self.prompt_ids[i] for i in bare]) if bare else (), strict=True
        ):
            found[i] = text
        return found

    @cached_property
    def finished(self) -> list[bool]:
        """Whether a completion ends with what stops the policy; the others were cut."""
        return [len(ids) > 0 and int(ids[-1]) in self._stops for ids in self.completion_ids]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The rows' other columns; None where a row lacks one."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in _NO_COLUMN)
        return {name: [row.get(name) for row in self.rows] for name in names}

    def for_functions(self) -> dict[str, Any]:
        """Keyword arguments of a user's function, in lists of its own, so that it cannot change what others see.

        Returns:
            `prompts` (text, or lists of messages), `completions` (text for prompts that are text, else
            `[{"role": "assistant", "content": …}]`), `completion_ids` (lists of ints) and the rows' other columns.
        """
        pairs = list(zip(self.prompts, self.texts, strict=True))
        return {
            **{name: list(values) for name, values in self.columns.items()},
            "prompts": [p if isinstance(p, str) else [dict(message) for message in p] for p, _ in pairs],
            "completions": [
                text if isinstance(p, str) else [{"role": "assistant", "content": text}] for p, text in pairs
            ],
            "completion_ids": [[int(i) for i in ids] for ids in self.completion_ids],
        }

    def conversations(self, which: Sequence[int]) -> dict[str, list[Any]]:
        """Rows whose prompts are messages, as a batch of `messages` for `data.render.encode_conversations`."""
        batch: dict[str, list[Any]] = {
            "messages": [[*self.prompts[i], {"role": "assistant", "content": self.texts[i]}] for i in which]
        }
        for name in ("tools", "chat_template_kwargs"):
            values = [self.rows[i].get(name) for i in which]
            if any(values):
                batch[name] = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        return batch

    def name(self, i: int) -> str:
        """A row in a message, e.g. `row 3 of 8 ("What is 2 + 2?")`, counted from 1."""
        prompt = self.prompts[i]
        if not isinstance(prompt, str):
            prompt = next((m["content"] or "" for m in reversed(prompt) if m["role"] == "user"), "")
        shown = " ".join(prompt.split())
        shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
        return f'row {i + 1} of {len(self)} ("{shown}")'
