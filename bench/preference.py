"""Reward, DPO and KTO side by side with TRL: real (non-pad) tokens per second and peak memory, as ratios of medians.

Same weights, rows and batches in every arm (`arms.py`); KTO with the same mismatched pairs.

    python bench/preference.py kto --data ../shared/data/kto/kto_en.jsonl --tokenizer ../shared/data/tokenizer/gpt-neox-20b
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

from arms import compare, measure

ARMS = {
    "ours": ("hydratune", {}),
    "ours, padded": ("hydratune", {"padding_free": False}),
    "TRL, defaults": ("trl", {}),
    "TRL, at its best": ("trl", {"gradient_checkpointing": False, "bf16": False}),
}
CLASSES = {"reward": "Reward", "dpo": "DPO", "kto": "KTO"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algo", choices=CLASSES)
    parser.add_argument(
        "--data", help="jsonl of pairs or labelled rows; default: the built-in arithmetic rows"
    )
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(options: argparse.Namespace, tokenizer):
    """Rows of at most `max_length` tokens and of different prompts, so that no arm truncates and pairs are the same."""
    from datasets import Dataset

    if options.data is None:
        from hydratune.data.builtin import arithmetic

        goal = "unpaired" if options.algo == "kto" else "preference"
        found = [{k: v for k, v in r.items() if k != "answer"} for r in arithmetic(4 * options.rows, 0, goal)]
    else:
        with Path(options.data).open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
    texts = ("chosen", "rejected", "completion")

    def short(row) -> bool:
        chats = [row["prompt"] + row[name] for name in texts if name in row]
        return all(
            len(tokenizer.apply_chat_template(c, return_dict=False)) <= options.max_length for c in chats
        )

    apart = {json.dumps(row["prompt"]): row for row in found if short(row)}
    return Dataset.from_list(list(apart.values())).shuffle(seed=0).select(range(options.rows))


def one_arm(options: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

    from hydratune import attention
    from hydratune.models import load_tokenizer

    package, settings = ARMS[options.arm]
    trainers = __import__(package, fromlist=["DPOTrainer"])
    name, reward = CLASSES[options.algo], options.algo == "reward"
    tokenizer = load_tokenizer(options.tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    attention.register()
    packed = package == "hydratune" and settings.get("padding_free") is not False
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention.NAME if packed else "sdpa")
    more: dict = {}
    if options.lora:
        from peft import LoraConfig

        kind = "SEQ_CLS" if reward else "CAUSAL_LM"
        more["peft_config"] = LoraConfig(task_type=kind, r=8, target_modules="all-linear")
    elif package == "trl" and not reward:
        more["ref_model"] = copy.deepcopy(model)  # ours makes its own copy; TRL would load it by its name
    if options.algo == "kto":
        settings = settings | {"train_sampling_strategy": "sequential"}  # as TRL must, for the same pairs
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(clock):
        args = getattr(trainers, f"{name}Config")(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, logging_steps=1,
            save_strategy="no", report_to=[], max_length=2 * options.max_length, learning_rate=1e-4, seed=0,
            disable_tqdm=True, use_cpu=device == "cpu", **settings,
        )  # fmt: skip
        return getattr(trainers, f"{name}Trainer")(
            model=model, args=args, train_dataset=rows(options, tokenizer), processing_class=tokenizer,
            callbacks=[clock], **more,
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        return measure(make)


def main() -> None:
    options = parse()
    if options.arm:
        print(json.dumps(one_arm(options)))
        return
    title = (
        f"{options.algo}, {'LoRA' if options.lora else 'full'}, vocabulary {options.tokenizer.split('/')[-1]}"
    )
    # TRL's defaults train in bf16 autocast; equal precision is held to 1e-4 in tests/peer
    compare(__file__, list(ARMS), options.rounds, "ours", 0.1, title)


if __name__ == "__main__":
    main()
