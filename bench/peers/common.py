"""What the scripts that run a peer share: models from a seed, rewards by rule, and the measurement.

Imports only torch and transformers, besides the built-in data's verifier, which is read by its path: the peers'
environments need not have hydratune.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from settings import Settings
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    TrainerCallback,
    set_seed,
)

Rule = Callable[[Any, str], float]
"""(answer, completion as text without special tokens) → reward"""


def _builtin() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "src" / "hydratune" / "data" / "builtin.py"
    spec = importlib.util.spec_from_file_location("builtin_data", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verify(answer: Any, completion: str) -> float:
    """1 when the completion's last whole number is the answer, or else 0: the arithmetic verifier."""
    return float(_VERIFY(answer, completion))


_VERIFY = _builtin().verify


def digits(answer: Any, completion: str) -> float:
    """The share of digits among the characters: dense, so that a policy from random weights must visibly learn it."""
    return sum("0" <= c <= "9" for c in completion) / max(1, len(completion))


RULES: dict[str, Rule] = {"verify": verify, "digits": digits}


def load_tokenizer(settings: Settings):
    """The tokenizer, padding on the left: TRL's PPO pads as the tokenizer says, and is wrong on the right."""
    return AutoTokenizer.from_pretrained(settings.tokenizer, padding_side="left")


def build(settings: Settings, tokenizer, kind: str, path: str | None, seed: int):
    """A model in fp32 with sdpa attention: a directory's, or a small Qwen2 with random weights from the seed.

    Args:
        kind: "policy" for a causal LM, "scalar" for a sequence classifier with one label.
    """
    auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    more = {} if kind == "policy" else {"num_labels": 1}
    if path is not None:
        model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa", **more)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.kv_heads,
        tie_word_embeddings=settings.tie_word_embeddings, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    return auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def reward_model(settings: Settings, tokenizer):
    """The reward model that `settings.reward` names, or None when it names a rule."""
    if settings.reward in RULES:
        return None
    path = None if settings.reward == "model" else settings.reward
    return build(settings, tokenizer, "scalar", path, settings.seed + 1).eval()


class RuleModel(torch.nn.Module):
    """A rule on text in the shape in which TRL's `get_reward` reads a sequence classifier.

    `get_reward` calls the module named by `base_model_prefix` on padded ids (pads replaced by token 0 and masked), hands
    its last hidden state to `score`, and picks each row's value at the last token before the first pad of the response.
    Here the hidden state is the row's reward at every position, and `score` changes nothing.

    Args:
        rows: `Settings.rows`; a row's answer is found by its prompt, which must start the ids.
    """

    base_model_prefix = "backbone"

    def __init__(self, rule: Rule, tokenizer, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.backbone = _RuleBackbone(rule, tokenizer, rows)
        self.score = torch.nn.Identity()


class _RuleBackbone(torch.nn.Module):
    def __init__(self, rule: Rule, tokenizer, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.rule, self.tokenizer = rule, tokenizer
        pad = tokenizer.pad_token_id
        self.answers = {tuple(0 if i == pad else i for i in r["prompt_ids"]): r.get("answer") for r in rows}
        self.lengths = sorted({len(prompt) for prompt in self.answers}, reverse=True)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **ignored: Any
    ) -> SimpleNamespace:
        """Ids and mask of shape (B, T) → `hidden_states`, whose last is (B, T, 1) and holds the rewards, fp32."""
        pairs = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        rewards = torch.tensor([self._reward(ids, mask) for ids, mask in pairs], dtype=torch.float32)
        spread = rewards.to(input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=(spread,))

    def _reward(self, ids: list[int], mask: list[bool]) -> float:
        start = mask.index(True)
        for length in self.lengths:
            prompt = tuple(ids[start : start + length])
            if prompt in self.answers:
                break
        else:
            raise ValueError("a sequence starts with none of the prompts of the settings")
        end = start + length
        while end < len(ids) and mask[end]:
            end += 1
        completion = self.tokenizer.decode(ids[start + length : end], skip_special_tokens=True)
        return self.rule(self.answers[prompt], completion)


class Clock(TrainerCallback):
    """The times at which steps ended, in seconds: on the wall, and of this process's CPU time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


class Generation:
    """Counts what a generating function does: seconds, calls, and the widths of what came out."""

    def __init__(self) -> None:
        self.seconds, self.widths = 0.0, []

    @contextmanager
    def timed(self):
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started


def resident_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    peer: str, settings: Settings, trainer, policy, clock: Clock, generation: Generation, steps: int
) -> dict[str, Any]:
    """Train, and give the figures of the run.

    Args:
        policy: the module whose weights must move.
        steps: steps (as the callbacks count them) that one rollout takes.

    Returns:
        A dict ready for JSON:
        versions, threads, device; episodes, rollouts; optimizer_steps, counted, and optimizer_steps_meant; seconds of
        `train()`; seconds_after_first and episodes_per_second_after_first, which leave out the first rollout with its
        steps (null when it is the only one); cpu_seconds_after_first, the same of this process's CPU time, which hardly
        moves when others use the machine; episodes_per_second; generation_seconds of all rollouts;
        generated_widths, the longest new tokens of each rollout; peak_rss_mib and resident_before_mib, what was
        resident before training; peak_cuda_mib; log, the trainer's log history.
    """
    # the weight that every token reaches: an embedding's rows may stay as they are
    watched = next(p for name, p in policy.named_parameters() if name.endswith("norm.weight"))
    before, resident, count = watched.detach().clone(), resident_mib(), [0]
    seen: list[int] = []

    def counted(optimizer, args, kwargs) -> None:
        count[0] += 1

    def attach(optimizer) -> None:
        # not accelerate's wrapper, whose step does nothing while gradients accumulate
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if id(optimizer) not in seen:
            seen.append(id(optimizer))
            optimizer.register_step_post_hook(counted)

    class Attach(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            attach(trainer.optimizer if optimizer is None else optimizer)

    trainer.add_callback(Attach())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if settings.gc_freeze:
        gc.collect()
        gc.freeze()
    set_seed(settings.seed)  # TRL's PPO shuffles with numpy and seeds only torch
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    assert not torch.equal(before.cpu(), watched.detach().cpu()), "parameters did not move"
    assert len(clock.times) == settings.rollouts * steps, (len(clock.times), settings.rollouts, steps)
    several = settings.rollouts > 1
    after = clock.times[-1] - clock.times[steps - 1] if several else None
    cpu_after = clock.cpu[-1] - clock.cpu[steps - 1] if several else None
    names = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")
    return {
        "peer": peer,
        "versions": {name: version(name) for name in names},
        "threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
        "episodes": settings.episodes,
        "rollouts": settings.rollouts,
        "optimizer_steps": count[0],
        "optimizer_steps_meant": settings.optimizer_steps,
        "seconds": seconds,
        "seconds_after_first": after,
        "cpu_seconds_after_first": cpu_after,
        "episodes_per_second": settings.episodes / seconds,
        "episodes_per_second_after_first": (settings.episodes - settings.batch) / after if after else None,
        "generation_seconds": generation.seconds,
        "generated_widths": generation.widths,
        "resident_before_mib": resident,
        "peak_rss_mib": resident_mib(),
        "peak_cuda_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "log": [entry for entry in trainer.state.log_history if "train_runtime" not in entry],
    }


def show(result: dict[str, Any]) -> None:
    """One line of JSON on standard output, the last of the run; NaN becomes null."""
    text = json.dumps(result, default=float)
    print(json.dumps(json.loads(text, parse_constant=lambda name: None)), flush=True)
