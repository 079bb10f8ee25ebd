"""The memory estimate of preference runs against the bytes of all tensors that are alive in real steps; and its advice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import test_preference_invariants as small  # noqa: E402
from live_memory import LiveMemory  # noqa: E402

from hydratune import memory, plan  # noqa: E402
from hydratune.adapters import peft_config  # noqa: E402
from hydratune.algos.kto import KTOConfig, KTOTrainer  # noqa: E402
from hydratune.data.tokenize import DataReport  # noqa: E402
from hydratune.models import ModelRecipe, byte_tokenizer  # noqa: E402
from hydratune.settings import DataSettings, ModelSettings, RunSettings, TrackingSettings  # noqa: E402

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
LENGTH = 128


def rows(algo: str) -> Dataset:
    """All of the greatest length, which the estimate goes by."""
    ids = np.random.default_rng(0).integers(0, 250, LENGTH // 2).tolist()
    if algo == "kto":
        return Dataset.from_list(
            [{"prompt_ids": ids, "completion_ids": ids, "label": i % 2 == 0} for i in range(16)]
        )
    return Dataset.from_list(
        [{"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids[::-1]} for _ in range(16)]
    )


@pytest.mark.parametrize("algo", ["dpo", "kto", "reward"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("attention,most", [("sdpa", 1.15), ("hydratune_varlen", 1.35)])
def test_the_estimate_is_near_the_peak(algo, adapter, attention, most, tmp_path, monkeypatch):
    """Padded it is near; with shared prompts, which the estimate leaves out of account, it is above."""
    monkeypatch.setattr(small, "ARCHITECTURE", small.ARCHITECTURE | WIDE)
    config = small.LORA if adapter else None
    run = small.trainer(
        algo,
        tmp_path,
        data=rows(algo),
        attention=attention,
        peft_config=config,
        max_steps=2,
        optim="adamw_torch",
    )
    kind = run.reference_kind(run.args, adapter)
    load = memory.load_of(
        run.model, run.args, width=4, length=LENGTH, device="cpu", sequences=run.sequences_per_row,
        reference=kind == "a frozen copy",
    )  # fmt: skip
    frozen = getattr(getattr(run, "reference", None), "model", None)
    assert (frozen is not None) == (kind == "a frozen copy")
    there = [*run.model.parameters(), *(frozen.parameters() if frozen is not None else [])]
    with LiveMemory(there) as measured:
        run.train()
    assert 0.95 <= memory.estimate(load).total / measured.peak <= most


def qwen_1_8b(tmp_path, gib: int, adapter: dict | None = None, **options) -> plan.Plan:
    """The plan of KTO on 1.8B parameters, batch 16, bf16, rows of 1024 tokens; no weight is made."""
    args = KTOConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=16, **options
    )
    args.bf16, args.auto_checkpointing = True, False
    recipe = ModelRecipe(
        architecture={
            "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5504,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
        }, peft_config=peft_config(adapter),
    )  # fmt: skip
    import torch

    recipe = ModelRecipe(**{**vars(recipe), "dtype": torch.bfloat16 if adapter else torch.float32})
    settings = RunSettings(
        "kto", {}, ModelSettings(architecture={}), DataSettings(), adapter, TrackingSettings(), str(tmp_path)
    )
    report = DataReport(
        rows_in=64, rows=64, tokens=64 * 1024, trained_tokens=64 * 512, longest=1024, desirable=32
    )
    return plan.make(
        settings, args=args, tokenizer=byte_tokenizer(), outline=recipe.outline(), recipe=recipe,
        trainer_class=KTOTrainer, train=rows("kto"), reports={"train": report}, warnings=[],
        device=SimpleNamespace(kind="cuda", name="a card", total_bytes=gib * 2**30, world_size=1),
    )  # fmt: skip


def test_the_classic_case_is_told_before_training(tmp_path):
    """1.8B with a frozen copy of it does not fit 24 GiB: two times 7.3 GiB of weights, 7.3 of gradients, 14.6 of Adam."""
    made = qwen_1_8b(tmp_path, 24)
    assert made.parameters == pytest.approx(1.84e9, rel=0.03)
    assert made.facts["reference"] == "a frozen copy" and "does not fit 24.0 GiB" in made.facts["memory"]
    assert made.estimate.weights == 2 * 4 * made.parameters
    assert made.changes and all(memory.fits(c.estimate, 24 * 2**30) for c in made.changes)
    assert "peft=lora" in made.changes[0].overrides


def test_what_is_offered_is_as_small_as_can_be(tmp_path):
    """On a larger card the reference's log-probs, or activations, are enough."""
    made = qwen_1_8b(tmp_path, 80)
    offered = [c.overrides for c in made.changes]
    assert offered and all(memory.fits(c.estimate, 80 * 2**30) for c in made.changes)
    assert "trainer.gradient_checkpointing=true" in offered
    lora = qwen_1_8b(
        tmp_path, 24, {"type": "lora", "target_modules": "all-linear"}, gradient_checkpointing=True
    )
    assert "fits 24.0 GiB" in lora.facts["memory"] and "does not" not in lora.facts["memory"]
    assert lora.facts["reference"] == "the policy with its adapter off"
