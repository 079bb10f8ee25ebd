"""SFT, reward, DPO and KTO side by side with TRL: real (non-pad) tokens per second and peak memory, as ratios of medians.

Same weights, rows and batches in every arm (`arms.py`); KTO with the same mismatched pairs. On CUDA in bf16: fp32 weights
under autocast, or with `--lora` a bf16 base. Packed arms (`--packed`) put rows into blocks of `--max-length`, each in its own way.

    python bench/offline.py sft --size small --data ../shared/data/sft/capybara_like.jsonl --tokenizer ../shared/data/tokenizer/gpt-neox-20b
    python bench/offline.py dpo --lora
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from arms import BEST, DEFAULTS, OURS, alternate, check_losses, measure, report
from sizes import SIZES, config

CLASSES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO"}
PADDED, COMPILED, PLAIN = "ours, padded", "ours, layers compiled", "ours, layers as they are"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algo", choices=CLASSES)
    parser.add_argument("--data", help="jsonl of its rows; default: the built-in arithmetic")
    parser.add_argument("--tokenizer", default="byte", help="directory, or byte")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--packed", action="store_true", help="SFT alone")
    parser.add_argument("--compiled", action="store_true", help="also ours with compiled layers")
    parser.add_argument("--plain", action="store_true", help="also ours with layers that are not fused")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", default="", help="name of the figures in --json")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packed and options.algo != "sft":
        parser.error("--packed is for sft")
    return options


def arms(options: argparse.Namespace, cuda: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """(package, settings) by name. TRL at its best has no checkpointing and the device's precision; of what else may be best,
    no padding, padding, Liger's kernels, `suite.py` takes the fastest.
    """
    packed = {"packing": True, "max_length": options.max_length} if options.packed else {}
    best: dict[str, Any] = {"gradient_checkpointing": False, **({} if cuda else {"bf16": False})}
    free = {"padding_free": True} if options.algo == "sft" and not packed else {}
    made = {OURS: ("hydratune", packed)}
    if not packed:
        made[PADDED] = ("hydratune", {"padding_free": False})
    if options.plain:
        made[PLAIN] = ("hydratune", packed | {"fused_layers": False})
    if options.compiled:
        made[COMPILED] = ("hydratune", packed | {"compile_layers": True})
    made[DEFAULTS] = ("trl", packed)
    made[BEST] = ("trl", packed | best | free)
    if cuda and free:
        made[f"{BEST}, padded"] = ("trl", best)
    if cuda and importlib.util.find_spec("liger_kernel"):
        made[f"{BEST}, Liger"] = ("trl", packed | best | free | {"use_liger_kernel": True})
    return made


def rows(options: argparse.Namespace, tokenizer: Any) -> Any:
    """Rows of at most `max_length` tokens, so that no arm truncates, and of different prompts, so that pairs are the same."""
    from datasets import Dataset

    from hydratune.data.builtin import arithmetic

    if options.data is not None:
        with Path(options.data).open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
    elif options.algo == "sft":
        found = [{"messages": row["messages"]} for row in arithmetic(options.rows, 0)]
    else:
        goal = "unpaired" if options.algo == "kto" else "preference"
        found = [{k: v for k, v in r.items() if k != "answer"} for r in arithmetic(4 * options.rows, 0, goal)]
    texts = ("chosen", "rejected", "completion")

    def short(row: dict[str, Any]) -> bool:
        chats = (
            [row["messages"]] if "messages" in row else [row["prompt"] + row[n] for n in texts if n in row]
        )
        return all(
            len(tokenizer.apply_chat_template(c, return_dict=False)) <= options.max_length for c in chats
        )

    if options.algo == "sft":
        kept = [{"messages": row["messages"]} for row in found if short(row)]
    else:
        kept = [*{json.dumps(row["prompt"]): row for row in found if short(row)}.values()]
    if len(kept) < options.rows:
        raise SystemExit(
            f"{len(kept)} rows of at most {options.max_length} tokens, fewer than --rows {options.rows}"
        )
    return Dataset.from_list(kept).shuffle(seed=0).select(range(options.rows))


def one_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from hydratune import attention
    from hydratune.models import load_tokenizer
    from hydratune.packing import packs

    cuda = torch.cuda.is_available()
    package, settings = arms(options, cuda)[options.arm]
    ours, reward = package == "hydratune", options.algo == "reward"
    trainers = __import__(package, fromlist=["SFTTrainer"])
    name = CLASSES[options.algo]
    tokenizer = load_tokenizer(options.tokenizer)
    limits = {"max_length": None} if options.algo == "sft" else {"max_length": 2 * options.max_length}
    if options.algo == "kto":
        limits["train_sampling_strategy"] = "sequential"  # as TRL must, for the same pairs
    given = limits | settings
    folder = tempfile.TemporaryDirectory()
    args = getattr(trainers, f"{name}Config")(
        output_dir=folder.name, max_steps=options.steps, per_device_train_batch_size=options.batch, logging_steps=1,
        save_strategy="no", report_to=[], learning_rate=1e-4, seed=0, disable_tqdm=True, use_cpu=not cuda, **given,
    )  # fmt: skip
    attention.register()
    shape = config(options.size, tokenizer, **({"num_labels": 1} if reward else {}))
    chosen = "sdpa"  # transformers' default, which TRL takes; ours is what `attn_implementation: auto` means
    if (
        not ours
        and options.arm.startswith(BEST)
        and attention.available("cuda" if cuda else "cpu")["flash_attention_2"]
    ):
        chosen = "flash_attention_2"
    if ours:
        shared = options.algo != "sft"
        chosen = attention.choose("cuda" if cuda else "cpu", packed=packs(args), model=shape, shared=shared)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    dtype = torch.bfloat16 if cuda and options.lora else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = auto.from_config(shape, attn_implementation=chosen, dtype=dtype)
    more: dict[str, Any] = {}
    if options.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            task_type="SEQ_CLS" if reward else "CAUSAL_LM", r=8, target_modules="all-linear"
        )
    elif not ours and options.algo in ("dpo", "kto"):
        more["ref_model"] = copy.deepcopy(model)  # ours makes its own copy; TRL would load it by its name
    data = rows(options, tokenizer)
    with folder:
        return measure(
            lambda clock: getattr(trainers, f"{name}Trainer")(
                model=model,
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[clock],
                **more,
            )
        )


def main() -> None:
    options = parse()
    if options.arm:
        print(json.dumps(one_arm(options)))
        return
    from hydratune.checks_model import device_facts

    names = [*arms(options, device_facts().kind == "cuda")]
    results = alternate(__file__, names, options.rounds)
    # on a CPU all but TRL's defaults, which are bf16 there too, have one precision; it is held to 1e-4 in tests/peer as well
    cuda = device_facts().kind == "cuda"
    allowed = {arm: 0.02 if cuda or arm == DEFAULTS else 1e-4 for arm in names if arm != OURS}
    check_losses(results, {} if options.packed else allowed)
    kind = "LoRA" if options.lora else "full"
    vocabulary = options.tokenizer.rstrip("/").split("/")[-1]
    title = f"{options.algo}{', packed' * options.packed}, {kind}, {options.size}, vocabulary {vocabulary}"
    report(options.case or options.algo, results, "tokens", title, options.json)


if __name__ == "__main__":
    main()
