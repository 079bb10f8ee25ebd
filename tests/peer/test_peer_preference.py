"""Reward, DPO and KTO against TRL 1.16, the oracle: same weights, rows and settings give the same losses, step by step."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL, the oracle, comes with the extra [bench]")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config  # noqa: E402

import hydratune  # noqa: E402
from hydratune import attention  # noqa: E402
from hydratune.models import byte_tokenizer  # noqa: E402

pytestmark = pytest.mark.peer

STEPS = 20
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-4, "logging_steps": 1, "max_length": 384,
    "save_strategy": "no", "report_to": [], "seed": 7, "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


def small_model(lora: bool = False, attn: str = "sdpa", reward: bool = False):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    attention.register()
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=attn)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    return model


def read(shared_data, file: str, rows: int) -> Dataset:
    with (shared_data / file).open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    short = [r for r in found if len(r["prompt"][-1]["content"]) < 300]
    return Dataset.from_list(short).shuffle(seed=1).select(range(rows))


def trajectory(trainer) -> dict[str, list[float]]:
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == STEPS
    keys = {key for entry in history for key in entry} - {"epoch", "tokens_per_second", "peak_memory_gib"}
    # a batch without a class has no mean over it
    return {key: [float(e.get(key, math.nan)) for e in history] for key in keys}


def both(
    algorithm: str,
    rows: Dataset,
    options: dict,
    tmp_path,
    *,
    lora: bool = False,
    reward: bool = False,
    theirs=None,
):
    """Ours end to end with shared prompts, TRL's padded."""
    tokenizer = byte_tokenizer()
    runs = []
    for package, attn, more in (
        (hydratune, attention.NAME, {}),
        (trl, "sdpa", {"gradient_checkpointing": False, **(theirs or {})}),
    ):
        if package is trl and not lora and not reward:
            more = more | {"ref_model": small_model()}  # its own copy is loaded from the hub
        config = getattr(package, f"{algorithm}Config")
        reference = {k: more.pop(k) for k in ("ref_model",) if k in more}
        trainer = getattr(package, f"{algorithm}Trainer")(
            model=small_model(lora, attn, reward),
            args=config(output_dir=str(tmp_path / package.__name__), **COMMON | options | more),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
            **reference,
        )
        if package is hydratune:
            assert trainer.args.padding_free and trainer.data_collator.layout.share_prompts
        runs.append(trajectory(trainer))
    return runs


def same(ours: dict, theirs: dict, *names: str) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-4)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-3, abs=1e-4)
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-3, nan_ok=True), name


DPO = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "robust": {"label_smoothing": 0.1}, "apo_zero": {}, "apo_down": {},
    "exo_pair": {"label_smoothing": 1e-3}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "aot": {},
    "aot_unpaired": {}, "discopop": {}, "sigmoid_norm": {},
}  # fmt: skip


@pytest.mark.parametrize("loss", DPO)
def test_dpo_gives_trls_losses(loss, shared_data, tmp_path):
    rows = read(shared_data, "preference/gsm8k_pairs.jsonl", 60)
    ours, theirs = both("DPO", rows, {"loss_type": [loss], **DPO[loss]}, tmp_path)
    same(
        ours, theirs, "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens",
    )  # fmt: skip


DPO_OPTIONS = {
    "several": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, False),
    "length_desensitised": ({"ld_alpha": 0.3}, False),
    "weighted": ({"use_weighting": True}, False),
    "forward_kl": ({"f_divergence_type": "forward_kl", "learning_rate": 5e-5}, False),
    "js": ({"f_divergence_type": "js_divergence", "learning_rate": 1e-4}, False),
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "learning_rate": 1e-4},
        False,
    ),
    "precomputed": ({"precompute_ref_log_probs": True}, False),
    "synchronised": ({"sync_ref_model": True, "ref_model_sync_steps": 5}, False),
    "lora": ({}, True),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, False),
}


@pytest.mark.parametrize("case", DPO_OPTIONS)
def test_dpo_options_give_trls_losses(case, shared_data, tmp_path):
    options, lora = DPO_OPTIONS[case]
    rows = read(shared_data, "preference/gsm8k_pairs.jsonl", 60)
    ours, theirs = both("DPO", rows, options, tmp_path, lora=lora)
    same(ours, theirs)


def apart(rows: Dataset) -> Dataset:
    """Rows of different prompts: where a batch holds one prompt twice, ours does not pair it with itself."""
    first = {row["prompt"][-1]["content"]: i for i, row in enumerate(rows)}
    return rows.select(sorted(first.values()))


KTO = {
    "kto": ({}, False),
    "apo_zero_unpaired": ({"loss_type": "apo_zero_unpaired"}, False),
    "weights": ({"desirable_weight": 1.5, "undesirable_weight": 0.7}, False),
    "lora": ({}, True),
    "synchronised": ({"sync_ref_model": True, "ref_model_sync_steps": 5}, False),
}


@pytest.mark.parametrize("case", KTO)
def test_kto_gives_trls_losses(case, shared_data, tmp_path):
    """TRL pairs each row with the one before it in its batch, in the order of the file; in that order so do we."""
    options, lora = KTO[case]
    rows = apart(read(shared_data, "kto/kto_gsm8k.jsonl", 300)).select(range(80))
    options = {"train_sampling_strategy": "sequential", "max_length": 1024, **options}
    ours, theirs = both("KTO", rows, options, tmp_path, lora=lora)
    same(
        ours,
        theirs,
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "num_tokens",
        "logps/chosen",
        "rewards/margins",
    )
    if case != "apo_zero_unpaired":
        same(ours, theirs, "kl")
        assert max(ours["kl"]) > 0.1  # the estimate takes part


def test_reward_gives_trls_losses(shared_data, tmp_path):
    rows = read(shared_data, "preference/gsm8k_pairs.jsonl", 60)
    options = {"center_rewards_coefficient": 0.01, "max_length": 1024}
    ours, theirs = both("Reward", rows, options, tmp_path, reward=True)
    same(ours, theirs, "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens")


def test_reward_with_margins_gives_trls_losses(shared_data, tmp_path):
    rows = read(shared_data, "preference/gsm8k_pairs.jsonl", 60)
    rows = rows.add_column("margin", [0.1 * (i % 7) for i in range(60)])
    ours, theirs = both("Reward", rows, {"max_length": 1024}, tmp_path, reward=True)
    same(ours, theirs, "accuracy", "margin")
