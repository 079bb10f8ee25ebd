"""Preference pairs from a policy's own samples: what a reward model has to tell apart when that policy is trained on it.

Samples completions of the built-in questions, verifies each, and pairs every different wrong one with a right one of the
same question (where none was sampled, with the worked answer). Training and held-out questions are those of `train.py`
with the same data settings, and go to `train.jsonl` and `eval.jsonl`.

    python bench/own_pairs.py RUN/model --out PAIRS --copies 8
    python train.py algo=reward data.path=PAIRS/train.jsonl data.eval_path=PAIRS/eval.jsonl model.name_or_path=…
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydratune.data.builtin import verify
from hydratune.data.load import load
from hydratune.rollout import Sampling, generate
from hydratune.settings import DataSettings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the policy's directory")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pairs")
    parser.add_argument("--size", type=int, default=4096, help="data.size, with data.distinct=true")
    parser.add_argument("--eval-fraction", type=float, default=0.125, help="data.eval_fraction")
    parser.add_argument("--seed", type=int, default=42, help="data.seed, and the samples' seed")
    parser.add_argument("--copies", type=int, default=8, help="samples a question")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    return parser.parse_args()


def pairs(row: dict[str, Any], texts: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Each different wrong text against a right one of the same question."""
    *prompt, worked = row["messages"]
    right = [text for text in texts if verify(row, text)] or [worked["content"]]
    return [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": rng.choice(right)}],
            "rejected": [{"role": "assistant", "content": text}],
            "answer": row["answer"],
        }
        for text in dict.fromkeys(texts)
        if not verify(row, text)
    ]


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    sampling = Sampling(
        options.max_new_tokens, stop_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id
    )
    draws, rng = torch.Generator().manual_seed(options.seed), random.Random(options.seed)
    settings = DataSettings(
        source="builtin", size=options.size, distinct=True, eval_fraction=options.eval_fraction
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), load(settings, options.seed), strict=True):
        prompts = [
            tokenizer.apply_chat_template(r["messages"][:1], add_generation_prompt=True, return_dict=False)
            for r in rows
        ]
        made = generate(
            model, prompts, sampling, copies=options.copies, batch_size=1024, generator=draws
        )  # one that was cut off has no end to be judged at
        found = []
        for i, row in enumerate(rows):
            own = range(i * options.copies, (i + 1) * options.copies)
            texts = [tokenizer.decode(made.ids[j], skip_special_tokens=True) for j in own if made.stopped[j]]
            found += pairs(row, texts, rng)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in found))
        print(f"{name}: {len(found):,} pairs from {len(rows):,} questions")


if __name__ == "__main__":
    main()
