"""Tokenised preference rows to a batch: prompts with one or several completions each, padded or end to end.

A layout is what one forward pass takes, with where the completions' tokens are. End to end, completions of one prompt
may share its tokens: `[prompt, first completion][second completion]`, where the second part attends to the prompt and to
itself (`attention.py` reads `key_index`), so that the prompt is computed once and every result is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Ids = np.ndarray


@dataclass(frozen=True)
class Layout:
    """How prompts and completions become tensors.

    Attributes:
        pad_token_id: fills up; no completion's token is ever predicted from it.
        padding_free: end to end in one row, instead of one padded row a sequence.
        share_prompts: end to end, compute a prompt once for all its completions.
        pad_to_multiple_of: round the length up to this.
    """

    pad_token_id: int
    padding_free: bool = False
    share_prompts: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]]) -> dict[str, Any]:
        """One forward pass over every prompt with each of its completions.

        Args:
            prompts: token ids of B prompts.
            completions: K lists of B completions; sequence k·B + i is prompt i with completion k.

        Returns:
            `input_ids` [R, T] with `attention_mask`, or [1, T] with `position_ids` [1, T], `cu_seq_lens_q`,
            `cu_seq_lens_k` (int32), `max_length_q`, `max_length_k` (ints) and, with shared prompts, `key_index`: for
            every key that a part of the batch attends to, its position. Besides `positions` [N] (indices into the
            flattened T's, of the states that predict a completion's token), `targets` [N], `sequences` [N] (which
            sequence a target belongs to), `ordinals` [N] (its place among the targets of that), and `lengths` [K·B],
            tokens of each sequence, and `ends` [K·B], its last one's index in the flattened T's.
        """
        many = len(prompts)
        pairs = [(p, c) for k in completions for p, c in zip(prompts, k, strict=True)]
        lengths = torch.tensor([len(p) + len(c) for p, c in pairs])
        if not self.padding_free:
            return {**self._padded(pairs), "lengths": lengths}
        if self.share_prompts and len(completions) > 1:
            groups = [(i, prompts[i], [k[i] for k in completions]) for i in range(many)]
        else:
            groups = [(i, p, [c]) for i, (p, c) in enumerate(pairs)]
        return {**self._end_to_end(groups, many), "lengths": lengths}

    def _round(self, length: int) -> int:
        return length + (-length % self.pad_to_multiple_of if self.pad_to_multiple_of else 0)

    def _padded(self, pairs: list[tuple[Ids, Ids]]) -> dict[str, Any]:
        width = self._round(max(len(p) + len(c) for p, c in pairs))
        ids = np.full((len(pairs), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(pairs), width), dtype=np.int64)
        predicted, ends = [], []
        for i, (prompt, completion) in enumerate(pairs):
            end = len(prompt) + len(completion)
            ids[i, : len(prompt)], ids[i, len(prompt) : end] = prompt, completion
            mask[i, :end] = 1
            first = max(len(prompt), 1)  # without a prompt nothing predicts the first token
            predicted.append(
                (i * width + np.arange(first - 1, end - 1), completion[first - len(prompt) :], i)
            )
            ends.append(i * width + end - 1)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "ends": torch.tensor(ends),
            **_told(predicted),
        }

    def _end_to_end(self, groups: list[tuple[int, Ids, list[Ids]]], many: int) -> dict[str, Any]:
        ids, positions, keys, predicted = [], [], [], []
        queries, reach, at = [], [], 0
        ends = {}
        for number, prompt, branches in groups:
            start, size = at, len(prompt)
            for k, completion in enumerate(branches):
                own = completion if k else np.concatenate((prompt, completion))
                before = size if k else 0  # positions that a later branch takes from the prompt
                ids.append(own)
                positions.append(np.arange(before, before + len(own)))
                keys.append(np.concatenate((np.arange(start, start + before), np.arange(at, at + len(own)))))
                queries.append(len(own))
                reach.append(before + len(own))
                first = at + size if not k else at
                states = np.arange(first, first + len(completion)) - 1
                if k:
                    states[:1] = start + size - 1  # the end of the prompt predicts every branch's first token
                skip = 0 if size else 1
                predicted.append((states[skip:], completion[skip:], number + k * many))
                at += len(own)
                ends[number + k * many] = at - 1
        if missing := self._round(at) - at:
            ids.append(np.full(missing, self.pad_token_id))
            positions.append(np.arange(missing))
            keys.append(np.arange(at, at + missing))
            queries.append(missing)
            reach.append(missing)
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],
            "cu_seq_lens_q": _boundaries(queries),
            "cu_seq_lens_k": _boundaries(reach),
            "max_length_q": max(queries),
            "max_length_k": max(reach),
            "ends": torch.tensor([ends[number] for number in range(len(ends))]),
            **_told(predicted),
        }
        if reach != queries:
            batch["key_index"] = torch.from_numpy(np.concatenate(keys))
        return batch


def _boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _told(predicted: list[tuple[Ids, Ids, int]]) -> dict[str, torch.Tensor]:
    states, targets, numbers = zip(*predicted, strict=True)
    return {
        "positions": torch.from_numpy(np.concatenate(states)),
        "targets": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        "sequences": torch.from_numpy(np.repeat(numbers, [len(t) for t in targets])),
        "ordinals": torch.from_numpy(np.concatenate([np.arange(len(t)) for t in targets])),
    }


def _column(rows: list[dict[str, Any]], name: str) -> list[Ids]:
    return [np.asarray(row[name]) for row in rows]


def _numbers(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Columns of one number a row, where the rows have them."""
    return {n: torch.tensor([float(row[n]) for row in rows]) for n in names if n in rows[0]}


@dataclass
class PreferenceCollator:
    """Pairs to one layout, `pairs`: sequences 0 … B − 1 are the chosen ones, B … 2B − 1 the rejected ones.

    `margin`, `ref_chosen_logps` and `ref_rejected_logps`, [B], come with it where the rows have them.
    """

    layout: Layout

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        completions = [_column(features, name) for name in ("chosen_ids", "rejected_ids")]
        return {
            "pairs": self.layout(_column(features, "prompt_ids"), completions),
            **_numbers(features, ("margin", "ref_chosen_logps", "ref_rejected_logps")),
        }


@dataclass
class UnpairedCollator:
    """Labelled completions to layouts: `completions` for the policy, `mismatched` to estimate the KL, and `both` at once.

    A mismatched pair is a prompt with the completion of another row of the batch: the completions are rotated among
    the rows, by the least shift under which the fewest prompts meet their own completions again (rows that share a
    prompt). Rows that bring `kl_completion_ids` keep those. A lone row has no mismatched pair.

    Attributes:
        mismatch: make mismatched pairs.
        max_length: of a mismatched pair; its completion is cut, where there is room for none of it the prompt.

    Returns, besides: `desirable` [B], bool; `ref_logps`, `ref_kl_logps` [B] where the rows have them.
    """

    layout: Layout
    mismatch: bool = True
    max_length: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, completions = _column(features, "prompt_ids"), _column(features, "completion_ids")
        batch: dict[str, Any] = {
            "completions": self.layout(prompts, [completions]),
            "desirable": torch.tensor([bool(row["label"]) for row in features]),
            **_numbers(features, ("ref_logps", "ref_kl_logps")),
        }
        if not self.mismatch:
            return batch
        if "kl_completion_ids" in features[0]:
            others = _column(features, "kl_completion_ids")
        elif len(features) > 1:
            others = [completions[i] for i in mismatched([p.tobytes() for p in prompts])]
        else:
            return batch
        fitting = [self._fit(p, c) for p, c in zip(prompts, others, strict=True)]
        shown, others = [p for p, _ in fitting], [c for _, c in fitting]
        batch["mismatched"] = self.layout(shown, [others])
        if all(len(a) == len(b) for a, b in zip(shown, prompts, strict=True)):
            batch["both"] = self.layout(prompts, [completions, others])
        return batch

    def _fit(self, prompt: Ids, completion: Ids) -> tuple[Ids, Ids]:
        if self.max_length is None or len(prompt) + len(completion) <= self.max_length:
            return prompt, completion
        if len(prompt) >= self.max_length:
            prompt = prompt[len(prompt) - self.max_length + 1 :]
        return prompt, completion[: self.max_length - len(prompt)]


def mismatched(prompts: Sequence[bytes]) -> list[int]:
    """For each row the one whose completion it gets: i − s, s the least of the shifts with the fewest equal prompts."""
    many = len(prompts)

    def meetings(shift: int) -> int:
        return sum(prompts[i] == prompts[i - shift] for i in range(many))

    shift = min(range(1, many), key=lambda s: (meetings(s), s))
    return [(i - shift) % many for i in range(many)]
