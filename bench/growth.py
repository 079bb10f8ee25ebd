"""How the cost of our SFT step grows with length and with batch: time and memory of one step, against those of the first.

A batch of twice the rows should cost twice the time at most; a row of twice the length between two and four times, for
attention alone grows with the square.

    python bench/growth.py --size small --tokenizer ../shared/data/tokenizer/gpt-neox-20b
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from arms import WARM_UP, alternate, machine, measure, medians
from sizes import SIZES, config

LENGTHS = (128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16)
POINTS = {f"1 × {n}": (1, n) for n in LENGTHS} | {f"{n} × {LENGTHS[0]}": (n, LENGTHS[0]) for n in BATCHES[1:]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def one_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from hydratune import SFTConfig, SFTTrainer, attention
    from hydratune.models import load_tokenizer

    batch, length = POINTS[options.arm]
    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(options.tokenizer)
    shape = config(options.size, tokenizer, max_position_embeddings=max(LENGTHS))
    attention.register()
    chosen = attention.choose("cuda" if cuda else "cpu", packed=True, model=shape)
    torch.manual_seed(0)
    ids = torch.randint(shape.vocab_size, (batch * options.steps, length)).tolist()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=chosen)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=batch, logging_steps=1, max_length=None,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not cuda,
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": ids})
        return measure(
            lambda clock: SFTTrainer(
                model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
            )
        )


def main() -> None:
    options = parse()
    if options.arm:
        print(json.dumps(one_arm(options)))
        return
    found = medians(alternate(__file__, [*POINTS], options.rounds))
    steps = options.steps - WARM_UP
    print(f"{options.size}, vocabulary {options.tokenizer.rstrip('/').split('/')[-1]}; {machine()}\n")
    print(
        "| rows × tokens | ms a step | tokens, against 1 × 128 | time | peak memory MiB |\n|---|---|---|---|---|"
    )
    first = found[f"1 × {LENGTHS[0]}"]
    for point, own in found.items():
        print(f"| {point} | {1000 * own['seconds'] / steps:.0f} | {own['tokens'] / first['tokens']:.0f}× "
              f"| {own['seconds'] / first['seconds']:.1f}× | {own['peak_mib']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
