"""Completions for online algorithms: sampled or greedy, with a KV cache, on one device, without an inference server.

One loop of our own over `model(input_ids, past_key_values=…)`; bench/generation.py holds it against the ways of transformers.
What makes it fast: prompts are sorted by length and prefilled in chunks with little padding, each distinct prompt once;
keys and values are written in place, and masks made once (`columns.py`); rows that have stopped leave the batch; sampling
takes one random number a token (`draw.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hydratune import columns
from hydratune.attention import NAME
from hydratune.columns import Mask, joined
from hydratune.compiling import uncompiled
from hydratune.draw import draw
from hydratune.errors import UserError, Violation
from hydratune.modes import still

_KEPT = 0.8  # rows leave the batch once no more than this share of it goes on
# how much padding, in tokens, one more forward pass over prompts has to save; and steps between looks at who has stopped
# (free on a CPU, a host sync elsewhere)
_PADDING = {"cpu": 256, "other": 4096}
_LOOK = {"cpu": 1, "other": 8}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: at most so many tokens, the stop token included; cut to what the model's context has room for.
        temperature: divides the logits; 0: greedy, and the cuts below do nothing.
        top_k, top_p, min_p: as in `draw.draw`.
        stop_token_ids: a completion ends with the first of them; none: it never stops.
        pad_token_id: fills prompts up on the left; never attended to.
        vocab_size: only ids below it (the tokenizer's size, where the model has more); None: all.

    Raises:
        UserError: a value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "a whole number, 1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "null (all) or 1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "null or between 0 and 1"),
            ("vocab_size", self.vocab_size is None or self.vocab_size >= 1, "null (all) or 1 or more"),
            ("pad_token_id", self.pad_token_id >= 0, "a token id, 0 or more"),
        )
        wrong = [
            Violation(name, getattr(self, name), "is out of its range", f"give {allowed}")
            for name, fine, allowed in rules
            if not fine
        ]
        if wrong:
            raise UserError(wrong)


@dataclass
class Completions:
    """What was generated; sequence p·copies + c is copy c of prompt p.

    Attributes:
        ids: token ids (int64) of each sequence; its stop token is the last one, nothing comes after it.
        stopped: [B] bool; ended by a stop token, else cut by max_new_tokens or the context.
        logps: of each token, fp32, log softmax(logits / temperature) over the whole vocabulary; None when greedy.
    """

    ids: list[np.ndarray]
    stopped: np.ndarray
    logps: list[np.ndarray] | None


@uncompiled
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    copies: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Completions:
    """Complete each prompt `copies` times.

    Token t of sequence i is drawn with number [i, t] of one table of uniform numbers, made from the generator before
    anything else. So a result does not depend on the order, the batch size or what else is in the batch, but for the
    rounding of the logits, which may differ between batch shapes: that changes a greedy token only at a tie, a sampled one
    with a probability of about that rounding (1e-6 in fp32, 1e-2 in bf16), and then all tokens after it.

    Args:
        model: a causal LM or a PeftModel, on its device. Its training modes and gradient checkpointing are off
            meanwhile and as before after; no tensor made here can come into training.
        prompts: token ids, one or more each, no padding.
        copies: completions a prompt. Equal prompts are computed once in each batch, and so is a prompt for its copies.
        batch_size: sequences at a time, at most; None: all. Memory for keys and values grows with it.
        generator: on any device; None: torch's default one. Unused when greedy.

    Raises:
        UserError: a prompt is empty or leaves no room in the model's context (`max_position_embeddings`); names the rows.
    """
    context = context_of(model)
    check_prompts(prompts, context, copies, batch_size)
    count = len(prompts) * copies
    uniform = None
    if sampling.temperature > 0:
        device = generator.device if generator is not None else "cpu"
        shape = (count, sampling.max_new_tokens)
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
        uniform = uniform.to(model.device)
    ids: list[np.ndarray] = [np.empty(0, np.int64)] * count
    logps: list[np.ndarray] = [np.empty(0, np.float32)] * count
    stopped = np.zeros(count, dtype=bool)
    # the longest first, so that a lack of memory shows at once; equal prompts side by side
    keys = [(-len(p), tuple(map(int, p))) for p in prompts]
    order = [p * copies + c for p in sorted(range(len(prompts)), key=keys.__getitem__) for c in range(copies)]
    with _generating(model), torch.no_grad():
        decoder = _Decoder(model, sampling, context)
        for start in range(0, count, batch_size or max(count, 1)):
            part = order[start : start + (batch_size or count)]
            numbers = None if uniform is None else uniform[torch.tensor(part, device=uniform.device)]
            made, made_logps = decoder.complete([keys[i // copies][1] for i in part], numbers)
            for row, i in enumerate(part):
                limit = decoder.limit(len(prompts[i // copies]))
                found = np.flatnonzero(np.isin(made[row, :limit], sampling.stop_token_ids))
                stopped[i] = len(found) > 0
                end = found[0] + 1 if len(found) else limit
                ids[i] = made[row, :end].copy()
                logps[i] = made_logps[row, :end].copy()
    return Completions(ids, stopped, None if uniform is None else logps)


@torch.no_grad()
def stream(
    model: Any, prompt: Sequence[int], sampling: Sampling, *, generator: torch.Generator | None = None
) -> Iterator[int]:
    """The tokens of one completion as they are made, the stop token included. One host sync a token.

    Args: as for `generate`, and
        generator: on any device; each token takes one number of it.

    Raises:
        UserError: the prompt is empty or leaves no room in the model's context.
    """
    context = context_of(model)
    check_prompts([prompt], context, 1, None)
    with _generating(model):
        decoder = _Decoder(model, sampling, context)
        steps = decoder.limit(len(prompt))
        logits, cache, mask, positions = decoder._prefill([tuple(map(int, prompt))], steps)
        for step in range(steps):
            if sampling.temperature > 0:
                device = generator.device if generator is not None else "cpu"
                number = torch.rand(1, dtype=torch.float64, generator=generator, device=device)
                ids, _ = draw(
                    logits,
                    number.to(logits.device),
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                    vocab_size=sampling.vocab_size,
                )
            else:
                ids = logits[:, : sampling.vocab_size].argmax(-1)
            token = int(ids)
            yield token
            if token in sampling.stop_token_ids or step + 1 == steps:
                return
            logits = decoder._forward(ids, cache, mask, positions)
            positions = positions + 1


def _virtual(model: Any) -> int:
    """Virtual tokens that an adapter (prompt or prefix tuning) puts in front of every prompt."""
    adapters = model.peft_config.values() if hasattr(model, "active_peft_config") else ()
    learned = [getattr(a, "num_virtual_tokens", 0) or 0 for a in adapters if a.is_prompt_learning]
    return max(learned, default=0)


def context_of(model: Any) -> int | None:
    """The most tokens of a prompt with its completion; None: any number."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else positions - _virtual(model)


def check_prompts(
    prompts: Sequence[Sequence[int]], context: int | None, copies: int, batch_size: int | None
) -> None:
    """
    Raises:
        UserError: as for `generate`.
    """
    wrong = []
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            wrong.append(
                Violation(f"prompt {row}", None, "is empty", "drop the row, or begin it with a BOS token")
            )
        elif context is not None and len(prompt) >= context:
            why = f"its {len(prompt)} tokens leave no room in the model's context of {context}"
            wrong.append(Violation(f"prompt {row}", None, why, "shorten or drop it"))
    for name, value in (("copies", copies), ("batch_size", batch_size)):
        if value is not None and value < 1:
            wrong.append(Violation(name, value, "is out of its range", "give 1 or more"))
    if len(wrong) > 10:
        wrong[10:] = [Violation("prompts", len(wrong) - 10, "more rows are wrong in these ways", "see above")]
    if wrong:
        raise UserError(wrong)


@contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient checkpointing (which refuses caches); each module's own state comes back after."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        with still(model):
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


class _Decoder:
    """Completes batches of prompts with one model; `complete` is called under no_grad in evaluation mode."""

    def __init__(self, model: Any, sampling: Sampling, context: int | None) -> None:
        self.sampling, self.context, self.device = sampling, context, model.device
        self.config = model.config.get_text_config(decoder=True)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # virtual tokens come through the PeftModel's own forward pass, and only with the prompt
        self.virtual = _virtual(model) > 0
        self.prefiller, self.model = model, base if self.virtual else model
        self.last_position = (getattr(self.config, "max_position_embeddings", None) or 0) - 1
        known = inspect.signature(base.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        layers = DynamicCache(config=self.config).layers
        kinds = [type(layer) for layer in layers]
        layer_types = getattr(self.config, "layer_types", None) or []
        # what we can hold in columns and mask ourselves; other models keep their own cache and get the mask of tokens
        self.columns = (
            bool(kinds)
            and set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}
            and set(layer_types) <= {"full_attention", "sliding_attention"}
            and getattr(self.config, "attention_chunk_size", None) is None
            and "position_ids" in known
            and self.config._attn_implementation in ("sdpa", "eager", NAME)
        )
        if self.virtual and not self.columns:
            kind = self.config._attn_implementation
            why = "virtual tokens need a model of full or sliding attention"
            raise UserError(
                Violation("attn_implementation", kind, why, f"use sdpa, eager or {NAME}, or LoRA")
            )
        self.positioned = "position_ids" in known
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        several = len(set(layer_types)) > 1
        self.windows = dict(zip(layer_types if several else [""] * len(windows), windows, strict=True))
        place = "cpu" if self.device.type == "cpu" else "other"
        self.padding, self.look = 0 if self.virtual else _PADDING[place], _LOOK[place]
        self.stops = torch.tensor(sampling.stop_token_ids, device=self.device)

    def limit(self, length: int) -> int:
        """New tokens after a prompt of so many."""
        most = self.sampling.max_new_tokens
        return most if self.context is None else min(most, self.context - length)

    def complete(
        self, prompts: list[tuple[int, ...]], uniform: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their log-probs, [B, steps] each; what comes after a stop token or a row's limit means nothing.

        Args:
            prompts: equal ones side by side, the longest first.
            uniform: [B, max_new_tokens]; None: greedy.
        """
        sampling, many = self.sampling, len(prompts)
        limits = [self.limit(len(p)) for p in prompts]
        steps = max(limits)
        logits, cache, mask, positions = self._prefill(prompts, steps)
        capped = min(limits) < steps
        limit = torch.tensor(limits, device=self.device)
        tokens = torch.zeros(steps, many, dtype=torch.int64, device=self.device)
        logps = torch.zeros(steps, many, dtype=torch.float32, device=self.device)
        rows = torch.arange(many, device=self.device)
        going = torch.ones(many, dtype=torch.bool, device=self.device)
        for step in range(steps):
            if uniform is None:
                ids = logits[:, : sampling.vocab_size].argmax(-1)
            else:
                ids, drawn = draw(
                    logits,
                    uniform[:, step],
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                    vocab_size=sampling.vocab_size,
                )
                logps[step].index_copy_(0, rows, drawn)
            tokens[step].index_copy_(0, rows, ids)
            if step + 1 == steps:
                break
            if len(self.stops):
                going &= (ids[:, None] != self.stops).all(-1)
            if capped:
                going &= limit > step + 1
            if (capped or len(self.stops)) and (step + 1) % self.look == 0:
                left = going.nonzero().squeeze(1)
                if not len(left):
                    break
                if len(left) <= _KEPT * len(rows):
                    cache.reorder_cache(left)
                    rows, ids, positions, limit, going = (
                        t[left] for t in (rows, ids, positions, limit, going)
                    )
                    uniform = None if uniform is None else uniform[left]
                    mask.keep(left)
            logits = self._forward(ids, cache, mask, positions)
            positions = positions + 1
            if (
                capped
            ):  # rows beyond their limit may still be computed, and learned positions end with the context
                positions = positions.clamp(max=self.last_position)
        return tokens.T.cpu().numpy(), logps.T.cpu().numpy()

    def _forward(self, ids: torch.Tensor, cache: Any, mask: Mask, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token each."""
        given: dict[str, Any] = {"attention_mask": mask.step()}
        if self.positioned:
            given["position_ids"] = positions[:, None]
        output = self.model(input_ids=ids[:, None], past_key_values=cache, use_cache=True, **given)
        return output.logits[:, -1]

    def _prefill(
        self, prompts: list[tuple[int, ...]], steps: int
    ) -> tuple[torch.Tensor, Any, Mask, torch.Tensor]:
        """Logits [B, V] after the prompts, their cache, the mask of what follows, and the next token's positions [B]."""
        places = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        copies = [0] * len(places)
        for prompt in prompts:
            copies[places[prompt]] += 1
        logits, caches, rows = [], [], []
        at = 0
        for chunk in self._chunks(list(places)):
            output, cache = self._read(chunk)
            repeated = torch.tensor(copies[at : at + len(chunk)], device=self.device)
            index = torch.arange(len(chunk), device=self.device).repeat_interleave(repeated)
            logits.append(output.logits[:, -1].index_select(0, index))
            caches.append(cache)
            rows.append(index)
            at += len(chunk)
        virtual = caches[0].get_seq_length() - len(prompts[0])
        width = virtual + len(prompts[0])
        lengths = torch.tensor([virtual + len(p) for p in prompts], device=self.device)
        if self.columns:
            room = min(steps, columns.ROOM)
            layers = zip(*(cache.layers for cache in caches), strict=True)
            cache = Cache(layers=[joined(parts, rows, width, room) for parts in layers])
        else:
            cache = caches[0]
            if len(places) < len(prompts):
                cache.reorder_cache(rows[0])
        dtype = cache.layers[0].keys.dtype if self.columns else None
        padded = len(prompts[-1]) < len(prompts[0])
        needed = padded or (set(self.windows) == {""} and self.windows[""] is not None)
        mask = Mask(width - lengths, width, steps, dtype, self.windows, needed)
        return torch.cat(logits), cache, mask, lengths

    def _chunks(self, prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Distinct prompts in chunks for one forward pass each, with no more padding than another pass would cost."""
        chunk: list[tuple[int, ...]] = []
        padding = 0
        for prompt in prompts:
            if chunk and self.columns and (padding := padding + len(chunk[0]) - len(prompt)) > self.padding:
                yield chunk
                chunk, padding = [], 0
            chunk.append(prompt)
        yield chunk

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[Any, Any]:
        """The model's output for the last token of each prompt, and their cache."""
        width = len(prompts[0])
        ids = np.full((len(prompts), width), self.sampling.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        given: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(self.device), **self.last_only}
        if not self.columns or len(prompts[-1]) < width:
            given["attention_mask"] = torch.from_numpy(mask).to(self.device)
        if not self.virtual:
            given["past_key_values"] = DynamicCache(config=self.config)
            if self.positioned:
                positions = np.maximum(mask.cumsum(1) - 1, 0)
                given["position_ids"] = torch.from_numpy(positions).to(self.device)
        output = self.prefiller(**given, use_cache=True)
        return output, output.past_key_values
