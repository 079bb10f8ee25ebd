"""Sample completions: what the trained model says to held-out prompts, beside the reference."""

from __future__ import annotations

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
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for _, prompt, _ in asked
    ]
    ids = [
        tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        for text, (_, prompt, _) in zip(texts, asked, strict=True)
    ]
    completions = greedy(model, tokenizer, ids, max_new_tokens=max_new_tokens)
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
def greedy(model: Any, tokenizer: Any, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
    """Greedy completions of prompts as token ids, in one left-padded batch."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
