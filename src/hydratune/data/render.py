"""Batches of text, pairs and conversations to ids and labels, through the tokenizer's chat template.

Assistant masks come from the template's generation marks when it has them. Otherwise a conversation is rendered turn by
turn, and every rendering must begin the whole one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from hydratune.errors import UserError, Violation

IGNORED = -100
Encoded = tuple[
    np.ndarray, np.ndarray, bool
]  # ids and labels, int32 [tokens]; whether the prompt's tokens changed
_QUIET = {"verbose": False}  # no remark on rows that are longer than the model allows; they are cut later
_FIX = "use a template that only ever appends turns, or one with {% generation %} marks (chat_template_path)"


@dataclass(frozen=True)
class RowFault:
    """What is wrong with one row of a batch."""

    row: int
    column: str
    why: str
    fix: str


class _Broken(ValueError):
    """A conversation that the template cannot render, or not turn by turn."""


def has_generation_marks(tokenizer: Any) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or ""))


def encode_texts(texts: list[str], tokenizer: Any, eos: str) -> Iterator[Encoded]:
    """Every token is trained; EOS is put at the end where the text has none."""
    closed = [text if text.endswith(eos) else text + eos for text in texts]
    for ids in tokenizer(closed, **_QUIET)["input_ids"]:
        row = np.asarray(ids, dtype=np.int32)
        yield row, row.copy(), False


def encode_conversations(
    batch: dict[str, list[Any]], tokenizer: Any, assistant_only: bool, faults: list[RowFault]
) -> Iterator[Encoded]:
    """Rows of `messages`; with `assistant_only`, only the assistant's turns and their ends are trained."""
    conversations = [_clean(messages) for messages in batch["messages"]]
    for ids, mask in _chats(conversations, batch, tokenizer, assistant_only, "messages", faults):
        labels = ids.copy()
        if mask is not None:
            labels[~mask] = IGNORED
        yield ids, labels, False


def encode_pairs(
    batch: dict[str, list[Any]],
    tokenizer: Any,
    eos: str,
    completion_only: bool,
    assistant_only: bool,
    faults: list[RowFault],
) -> Iterator[Encoded]:
    """Prompts and completions, plain or conversational."""
    for start, ((ids, mask),), shifted in encode_branches(
        batch, ("completion",), tokenizer, eos, faults, assistant_only
    ):
        labels = ids.copy()
        if completion_only:
            labels[:start] = IGNORED
        if mask is not None:
            labels[~mask] = IGNORED
        yield ids, labels, shifted


def encode_prompts(batch: dict[str, list[Any]], tokenizer: Any, faults: list[RowFault]) -> list[list[int]]:
    """Token ids of prompts alone, up to where the answer begins."""
    prompts = batch["prompt"]
    if isinstance(prompts[0], list):
        asked = _asked([_clean(prompt) for prompt in prompts], batch, tokenizer, faults)
        return [ids.tolist() for ids in asked]
    return tokenizer(prompts, **_QUIET)["input_ids"]


def encode_branches(
    batch: dict[str, list[Any]],
    columns: tuple[str, ...],
    tokenizer: Any,
    eos: str,
    faults: list[RowFault],
    assistant_only: bool = False,
) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray | None]], bool]]:
    """A prompt with one or several completions: where these start, the ids of the prompt with each of them (and its
    assistant mask), and whether the prompt's tokens changed.

    A completion starts where the tokens of the prompt alone and of the prompt with a completion part; all completions
    of a row start at the same place.
    """
    prompts = batch["prompt"]
    conversational = isinstance(prompts[0], list)
    joined: list[list[Any]] = []
    if not conversational:
        alone = [np.asarray(ids, dtype=np.int32) for ids in tokenizer(prompts, **_QUIET)["input_ids"]]
        for name in columns:
            closed = [c if c.endswith(eos) else c + eos for c in batch[name]]
            joined.append([p + c for p, c in zip(prompts, closed, strict=True)])
        wholes: list[list[tuple[np.ndarray, np.ndarray | None]]] = [
            [(np.asarray(ids, dtype=np.int32), None) for ids in tokenizer(texts, **_QUIET)["input_ids"]]
            for texts in joined
        ]
    else:
        prompts = [_clean(prompt) for prompt in prompts]
        joined = [[p + _clean(c) for p, c in zip(prompts, batch[name], strict=True)] for name in columns]
        wholes = [
            list(_chats(messages, batch, tokenizer, assistant_only, name, faults))
            for name, messages in zip(columns, joined, strict=True)
        ]
        alone = _asked(prompts, batch, tokenizer, faults)
        if faults:
            return
    for i, before in enumerate(alone):
        rows = [whole[i] for whole in wholes]
        start = min(_common(before, ids) for ids, _ in rows)
        shifted = start < len(before)
        if shifted and conversational and prompts[i]:
            kwargs = _template_kwargs(batch, i)
            asked = _render(tokenizer, prompts[i], kwargs)
            if not all(_render(tokenizer, messages[i], kwargs).startswith(asked) for messages in joined):
                why = "the chat template renders the prompt differently once the completion follows"
                faults.append(RowFault(i, "prompt", why, _FIX))
        yield start, rows, shifted


def _asked(
    prompts: list[list[dict[str, Any]]], batch: dict[str, list[Any]], tokenizer: Any, faults: list[RowFault]
) -> list[np.ndarray]:
    """Ids of the prompts with the generation prompt; where there is no prompt and the template wants one, no ids."""
    if all(prompts):
        chats = _chats(prompts, batch, tokenizer, False, "prompt", faults, add_generation_prompt=True)
        return [ids for ids, _ in chats]
    texts = []
    for i, messages in enumerate(prompts):
        try:
            texts.append(_render(tokenizer, messages, _template_kwargs(batch, i), add_generation_prompt=True))
        except _Broken as error:
            texts.append("")
            if messages:
                faults.append(RowFault(i, "prompt", str(error), _FIX))
    encoded = tokenizer(texts, add_special_tokens=False, **_QUIET)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def require_end_of_turn(tokenizer: Any) -> None:
    """Check that the token which ends an assistant's turn is trained, for otherwise the model never learns to stop.

    Raises:
        UserError: the template leaves it out of its generation marks, or cannot render a short conversation.
    """
    answer = "Blue."
    probe = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": answer}]
    try:
        text = _render(tokenizer, probe, {})
        ids, mask = (
            _by_marks([probe], tokenizer, {})[0]
            if has_generation_marks(tokenizer)
            else _by_turns(probe, tokenizer, {})
        )
    except _Broken as error:
        raise UserError(Violation("model.chat_template_path", None, str(error), _FIX)) from error
    tail = text[text.rindex(answer) + len(answer) :].strip() if answer in text else ""
    trained = tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False)
    if tail and not trained.rpartition(answer)[2].strip():
        raise UserError(
            Violation(
                "model.chat_template_path",
                None,
                f"the template leaves '{tail}', which ends an assistant's turn, outside its generation marks: never trained",
                "put the end of the turn before {% endgeneration %}, or drop assistant_only_loss",
            )
        )


def _common(first: np.ndarray, second: np.ndarray) -> int:
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


def _clean(value: Any) -> Any:
    """Without the nulls that a shared column type puts into messages and their tool calls."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [_clean(inner) for inner in value] if isinstance(value, list) else value


def _template_kwargs(batch: dict[str, list[Any]], row: int) -> dict[str, Any]:
    tools = batch["tools"][row] if "tools" in batch else None
    extra = batch["chat_template_kwargs"][row] if "chat_template_kwargs" in batch else None
    return {**({"tools": json.loads(tools)} if tools else {}), **(json.loads(extra) if extra else {})}


def _render(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any], **more: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **more)
    except (jinja2.TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages[:6]) or "no message"
        raise _Broken(f"the chat template refuses this conversation ({roles}): {error}") from error


def _chats(
    conversations: list[list[dict[str, Any]]],
    batch: dict[str, list[Any]],
    tokenizer: Any,
    assistant_only: bool,
    column: str,
    faults: list[RowFault],
    add_generation_prompt: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Ids of each conversation, and its assistant mask with `assistant_only`."""
    marks = has_generation_marks(tokenizer)
    more = {"add_generation_prompt": True} if add_generation_prompt else {}
    if not {"tools", "chat_template_kwargs"} & set(
        batch
    ):  # one call for the whole batch where rows need no own options
        try:
            if not assistant_only:
                rendered = [_render(tokenizer, messages, {}, **more) for messages in conversations]
                for ids in tokenizer(rendered, add_special_tokens=False, **_QUIET)["input_ids"]:
                    yield np.asarray(ids, dtype=np.int32), None
                return
            if marks:
                yield from _by_marks(conversations, tokenizer, {})
                return
        except _Broken:
            pass  # row by row below, to name the rows
    for i, messages in enumerate(conversations):
        try:
            kwargs = {**_template_kwargs(batch, i), **more}
            if not assistant_only:
                text = _render(tokenizer, messages, kwargs)
                yield (
                    np.asarray(
                        tokenizer(text, add_special_tokens=False, **_QUIET)["input_ids"], dtype=np.int32
                    ),
                    None,
                )
            elif marks:
                yield _by_marks([messages], tokenizer, kwargs)[0]
            else:
                yield _by_turns(messages, tokenizer, kwargs)
        except _Broken as error:
            faults.append(RowFault(i, column, str(error), _FIX))


def _by_marks(
    conversations: list[list[dict[str, Any]]], tokenizer: Any, kwargs: dict[str, Any]
) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        out = tokenizer.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs=_QUIET,
            **kwargs,
        )
    except (jinja2.TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        raise _Broken(f"the chat template refuses this conversation: {error}") from error
    pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
    return [(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)) for ids, mask in pairs]


def _by_turns(
    messages: list[dict[str, Any]], tokenizer: Any, kwargs: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and assistant mask, from what each assistant's turn adds to the text rendered before it."""
    text = _render(tokenizer, messages, kwargs)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], kwargs, add_generation_prompt=True) if i else ""
        after = _render(tokenizer, messages[: i + 1], kwargs)
        if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
            raise _Broken(
                f"the chat template has no generation marks, and turn {i + 1} changes what is rendered before it"
            )
        spans.append((len(before), len(before) + _turn_length(after[len(before) :], tokenizer)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **_QUIET)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        mask |= (starts < last) & (ends > first)
    return np.asarray(encoded["input_ids"], dtype=np.int32), mask


def _turn_length(turn: str, tokenizer: Any) -> int:
    """Characters of a turn that are trained: line breaks after its special end token belong to the template."""
    stripped = turn.rstrip()
    return len(stripped) if stripped.endswith(tuple(tokenizer.all_special_tokens)) else len(turn)
