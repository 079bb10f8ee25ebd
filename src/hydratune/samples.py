"""Sample completions: what the trained model says to held-out prompts, beside the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hydratune.data.builtin import answered, verify

_SHOWN = 4  # completions of a rollout


def split_prompt(row: dict[str, Any]) -> tuple[Any, str | None] | None:
    """A formatted row as what is asked (messages or text) and what was answered, if it is; None when nothing is asked."""
    if messages := row.get("messages"):
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        return (messages[:last], messages[last]["content"]) if last else None
    if "prompt" in row:
        completion: Any = row.get("completion", row.get("chosen"))
        text = completion if completion is None or isinstance(completion, str) else completion[0]["content"]
        return row["prompt"], text
    return None


def encode_prompt(tokenizer: Any, prompt: Any) -> tuple[str, list[int]]:
    """A prompt (text, or messages that the chat template opens an answer to) as text and as token ids."""
    if isinstance(prompt, str):
        return prompt, tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_tokens(model: Any, tokenizer: Any, *, conversation: bool) -> tuple[int, ...]:
    """What ends a completion: EOS, of the tokenizer and of the model; in conversations also what ends a turn."""
    from hydratune.reward_models import turn_end

    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(known if isinstance(known, list | tuple) else [known])]
    if conversation:
        found += [int(i) for i in turn_end(tokenizer)[:1] if int(i) in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys(i for i in found if i is not None and 0 <= i < len(tokenizer)))


def complete(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy completions of the rows' prompts as one left-padded batch.

    Returns:
        One dict a row: prompt, completion, reference, and `correct` for rows that carry a verifiable answer.
    """
    asked = [(row, *pair) for row in rows if (pair := split_prompt(row))]
    if not asked:
        return []
    prompts = [encode_prompt(tokenizer, prompt) for _, prompt, _ in asked]
    texts = [text for text, _ in prompts]
    stops = stop_tokens(
        model, tokenizer, conversation=any(isinstance(prompt, list) for _, prompt, _ in asked)
    )
    ids = [ids for _, ids in prompts]
    completions = greedy(model, tokenizer, ids, max_new_tokens=max_new_tokens, stops=stops)
    samples = []
    for (row, _, reference), text, completion in zip(asked, texts, completions, strict=True):
        beside = "undesirable" if row.get("label") is False else "reference"
        sample = {"prompt": text, "completion": completion}
        if reference is not None:
            sample[beside] = reference
        if answered(row):
            sample["correct"] = verify(row, completion)
        samples.append(sample)
    return samples


@dataclass
class Made:
    """Completions of prompts; of several copies those of a prompt follow each other.

    Attributes:
        texts: without special tokens.
        ids: token ids, what stopped it included.
        stopped: whether it ended by itself; else it was cut.
        prompt_ids: of each prompt, once.
    """

    texts: list[str]
    ids: list[Any]
    stopped: list[bool]
    prompt_ids: list[list[int]]


class Completer:
    """Completes prompts in batches of our own sampler.

    Args:
        sampling: `rollout.Sampling`, without what depends on the tokenizer.
        batch_size: completions at a time.
    """

    def __init__(self, tokenizer: Any, sampling: Any, *, batch_size: int) -> None:
        self.tokenizer, self._sampling, self._batch_size = tokenizer, sampling, batch_size

    def __call__(
        self, model: Any, prompts: list[Any], *, copies: int = 1, generator: torch.Generator | None = None
    ) -> Made:
        """
        Args:
            prompts: texts, or messages.

        Raises:
            UserError: a prompt is empty or too long for the model's context.
        """
        from hydratune.rollout import generate

        ids = [encode_prompt(self.tokenizer, prompt)[1] for prompt in prompts]
        conversation = any(isinstance(prompt, list) for prompt in prompts)
        sampling = self.settled(model, conversation=conversation)
        made = generate(model, ids, sampling, copies=copies, batch_size=self._batch_size, generator=generator)
        texts = self.tokenizer.batch_decode([row.tolist() for row in made.ids], skip_special_tokens=True)
        return Made(texts, made.ids, made.stopped.tolist(), ids)

    def settled(self, model: Any, *, conversation: bool) -> Any:
        """The sampling with what ends and pads this tokenizer's sequences."""
        return replace(
            self._sampling,
            stop_token_ids=stop_tokens(model, self.tokenizer, conversation=conversation),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            vocab_size=min(len(self.tokenizer), model.config.get_text_config().vocab_size),
        )


def rewarded(
    tokenizer: Any, episodes: Any, total: torch.Tensor, each: dict[str, torch.Tensor], step: int
) -> list[dict[str, Any]]:
    """A few completions of a rollout (`episodes.Episodes`), evenly spread, with their rewards in all and, of several, each."""
    parts = {}
    if len(each) > 1:  # what does not apply is null
        parts = {name: [None if v != v else v for v in values.tolist()] for name, values in each.items()}
    rows = []
    for i in range(0, len(episodes), max(1, len(episodes) // _SHOWN))[:_SHOWN]:
        prompt, completion = (
            tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (episodes.prompts[i], episodes.completions[i])
        )
        row = {"step": step, "prompt": prompt, "completion": completion, "reward": total[i].item()}
        rows.append(row | {name: values[i] for name, values in parts.items()})
    return rows


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stops: tuple[int, ...] | None = None,
) -> list[str]:
    """Greedy completions of prompts as token ids, in one left-padded batch.

    Args:
        stops: what ends one; None: EOS.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[*stops] if stops else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
