"""Generation for online RL: `hydratune.rollout.generate` beside what transformers has, in completion tokens per second.

Arms alternate (A B C A B C …) in one process; the table gives medians of rounds as ratios to `model.generate`. Same
models, prompts and sampling in every arm; the stop token has the same share of the probability everywhere, so completions
end at all lengths. Tokens after a stop token do not count.

    python bench/generation.py --rounds 5
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    StaticCache,
)

from hydratune import rollout
from hydratune.draw import draw

SIZES = {"4 layers of 256": (4, 256), "2 layers of 64": (2, 64)}
VOCABULARIES = (1_000, 50_000)
STOP = 2
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
}
Arm = Callable[[Any, list[list[int]], rollout.Sampling], list[np.ndarray]]


def model_of(layers: int, hidden: int, vocabulary: int, stop_share: float, device: str) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=STOP, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).eval()
    head = torch.nn.Linear(hidden, vocabulary, bias=True, device=device)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[STOP] = float(np.log(stop_share * vocabulary))
    model.lm_head = head
    return model


def padded(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(model.device), mask.to(model.device)


def until_stop(rows: np.ndarray) -> list[np.ndarray]:
    found = (np.flatnonzero(row == STOP) for row in rows)
    return [row[: f[0] + 1] if len(f) else row for row, f in zip(rows, found, strict=True)]


def as_transformers(sampling: rollout.Sampling, **more: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=True, top_k=sampling.top_k or 0, top_p=sampling.top_p,
        eos_token_id=STOP, pad_token_id=0, **more,
    )  # fmt: skip


def by_generate(**more: Any) -> Arm:
    def run(model, prompts, sampling):
        ids, mask = padded(model, prompts)
        made = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=as_transformers(sampling, **more)
        )
        return until_stop(made[:, ids.shape[1] :].cpu().numpy())

    return run


def by_generate_batch(model, prompts, sampling):
    before = model.config._attn_implementation
    # by default it takes most of the memory for its cache, which a CPU pays for in minutes
    room = sum(map(len, prompts)) + len(prompts) * sampling.max_new_tokens
    sizes = ContinuousBatchingConfig(num_blocks=max(64, room // 256 + len(prompts)), max_batch_tokens=512)
    made = model.generate_batch(
        prompts, generation_config=as_transformers(sampling), continuous_batching_config=sizes, warmup=False
    )
    if model.config._attn_implementation != before:
        model.set_attn_implementation(before)
    assert len(made) == len(prompts), "requests were lost"
    return [np.array(output.generated_tokens) for output in made.values()]


def by_plain_loop(static: bool) -> Arm:
    """The shortest loop over the model, with our sampler: one padded prefill, every row until the last has stopped."""

    @torch.no_grad()
    def run(model, prompts, sampling):
        ids, mask = padded(model, prompts)
        steps, width = sampling.max_new_tokens, ids.shape[1]
        cache = (
            StaticCache(config=model.config, max_cache_len=width + steps)
            if static
            else DynamicCache(config=model.config)
        )
        mask = torch.cat([mask, mask.new_ones(len(prompts), steps)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        numbers = torch.rand(len(prompts), steps, dtype=torch.float64).to(model.device)
        going = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
        made, at = [], 0
        for step in range(steps):
            end = width + step
            logits = model(
                input_ids=ids, attention_mask=mask[:, :end], position_ids=positions[:, at:end], past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            ids, _ = draw(logits, numbers[:, step], top_k=sampling.top_k, top_p=sampling.top_p)
            made.append(ids)
            going &= ids != STOP
            if not going.any():
                break
            ids, at = ids[:, None], end
        return until_stop(torch.stack(made, 1).cpu().numpy())

    return run


def ours(**settings: Any) -> Arm:
    """`rollout.generate` with constants of its module changed."""

    def run(model, prompts, sampling):
        before = {name: getattr(rollout, name) for name in settings}
        vars(rollout).update(settings)
        try:
            return rollout.generate(model, prompts, sampling).ids
        finally:
            vars(rollout).update(before)

    return run


NEVER = {"cpu": 10**9, "other": 10**9}
ARMS: dict[str, Arm] = {
    "model.generate": by_generate(),
    "model.generate, static cache": by_generate(cache_implementation="static", disable_compile=True),
    "model.generate_batch": by_generate_batch,
    "plain loop, DynamicCache": by_plain_loop(static=False),
    "plain loop, StaticCache": by_plain_loop(static=True),
    "ours, one padded prefill": ours(_PADDING=NEVER),
    "ours, stopped rows stay": ours(_KEPT=0.0),
    "ours": ours(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--stop-share", type=float, default=0.03, help="of the stop token at each step")
    parser.add_argument("--mode", choices=MODES, default="plain")
    parser.add_argument(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: CPU time, for a machine that others use too",
    )
    parser.add_argument("--arms", default="", help="only arms whose name contains this (and model.generate)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampling = rollout.Sampling(options.new_tokens, stop_token_ids=(STOP,), **MODES[options.mode])
    arms = {name: arm for name, arm in ARMS.items() if options.arms in name or name == "model.generate"}  # fmt: skip
    columns: dict[str, dict[str, list[float]]] = {}
    for size, (layers, hidden) in SIZES.items():
        for vocabulary in VOCABULARIES:
            model = model_of(layers, hidden, vocabulary, options.stop_share, device)
            draws = np.random.default_rng(0)
            prompts = [draws.integers(3, 1000, n).tolist() for n in draws.integers(8, 65, options.sequences)]
            speeds = columns.setdefault(f"{size}, {vocabulary // 1000}k", {name: [] for name in arms})
            for turn, (name, arm) in chain.from_iterable(
                ((turn, item) for item in arms.items()) for turn in range(options.rounds + 1)
            ):
                torch.manual_seed(turn)
                if device == "cuda":
                    torch.cuda.synchronize()
                start = clock()
                made = arm(model, prompts, sampling)
                elapsed = clock() - start
                if turn:  # the first round is warm-up
                    speeds[name].append(sum(map(len, made)) / elapsed)
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, {torch.get_num_threads()} "
          f"threads, {options.mode}, {options.sequences} prompts of 8 to 64 tokens, at most {options.new_tokens} new ones, "
          f"{options.rounds} rounds, {options.clock} clock: completion tokens/s as ratios to model.generate")  # fmt: skip
    print("| arm | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in arms:
        cells = []
        for speeds in columns.values():
            of, base = statistics.median(speeds[name]), statistics.median(speeds["model.generate"])
            cells.append(f"{of / base:.2f}× ({of:.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
