"""SFT side by side with TRL: real (non-pad) tokens per second and peak memory, as ratios of medians.

Same weights, rows and batches in every arm (`arms.py`).

    python bench/sft.py --data ../shared/data/sft/capybara_like.jsonl --tokenizer ../shared/data/tokenizer/gpt-neox-20b
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from arms import compare, measure

ARMS = {
    "ours": ("hydratune", {}),
    "ours, padding_free": ("hydratune", {"padding_free": True}),
    "TRL, defaults": ("trl", {}),
    "TRL, at its best": ("trl", {"padding_free": True, "gradient_checkpointing": False, "bf16": False}),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="jsonl with messages; default: the built-in arithmetic rows")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(options: argparse.Namespace, tokenizer):
    """Conversations of at most `max_length` tokens, so that no arm truncates (TRL does not without padding)."""
    from datasets import Dataset

    if options.data is None:
        from hydratune.data.builtin import arithmetic

        return Dataset.from_list([{"messages": row["messages"]} for row in arithmetic(options.rows, seed=0)])
    with Path(options.data).open(encoding="utf-8") as lines:
        found = [
            {"messages": json.loads(line)["messages"]}
            for line, _ in zip(lines, range(4 * options.rows), strict=False)
        ]
    short = (
        r
        for r in found
        if len(tokenizer.apply_chat_template(r["messages"], return_dict=False)) <= options.max_length
    )
    return Dataset.from_list([row for row, _ in zip(short, range(options.rows), strict=False)])


def one_arm(options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps; tokens per second after warm-up, peak memory in MiB, the losses."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from hydratune.models import load_tokenizer

    package, settings = ARMS[options.arm]
    trainers = __import__(package, fromlist=["SFTTrainer", "SFTConfig"])
    tokenizer = load_tokenizer(options.tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=_attention(package, settings))
    peft = {}
    if options.lora:
        from peft import LoraConfig

        peft["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(clock):
        args = trainers.SFTConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, logging_steps=1,
            save_strategy="no", report_to=[], max_length=None, learning_rate=1e-3, seed=0,
            disable_tqdm=True, use_cpu=device == "cpu", **settings,
        )  # fmt: skip
        return trainers.SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows(options, tokenizer),
            processing_class=tokenizer,
            callbacks=[clock],
            **peft,
        )

    with tempfile.TemporaryDirectory() as folder:
        return measure(make)


def _attention(package: str, settings: dict) -> str:
    """Ours picks what is exact and fastest; TRL takes transformers' default."""
    if package == "hydratune" and settings.get("padding_free"):
        from hydratune import attention

        attention.register()
        return "hydratune_varlen"
    return "sdpa"


def main() -> None:
    options = parse()
    if options.arm:
        print(json.dumps(one_arm(options)))
        return
    title = f"{'LoRA' if options.lora else 'full'}, vocabulary {options.tokenizer.split('/')[-1]}"
    # TRL's defaults train in bf16 autocast, hence the wide margin; equal precision is held to 1e-4 in tests/peer
    compare(__file__, list(ARMS), options.rounds, "ours, padding_free", 0.05, title)


if __name__ == "__main__":
    main()
