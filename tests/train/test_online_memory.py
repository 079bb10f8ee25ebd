"""The memory estimate of PPO and GRPO against the bytes of all tensors that are alive in real runs; and its advice."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import test_online as small  # noqa: E402
from live_memory import LiveMemory  # noqa: E402

from hydratune import UserError, algos, memory, plan  # noqa: E402
from hydratune.adapters import peft_config  # noqa: E402
from hydratune.data.tokenize import DataReport  # noqa: E402
from hydratune.models import ModelRecipe, byte_tokenizer  # noqa: E402
from hydratune.settings import DataSettings, ModelSettings, RunSettings, TrackingSettings  # noqa: E402

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
PROMPT = NEW = 64
LENGTH = {
    "ppo": {"response_length": NEW, "stop_token": None},
    "grpo": {"max_completion_length": NEW, "temperature": 0.9},
}
MANY = {"per_device_train_batch_size": 1, "num_mini_batches": 64}  # large rollouts, small update steps


def prompts(count: int = 64) -> Dataset:
    """All of the greatest length, which the estimate goes by."""
    ids = np.random.default_rng(0).integers(0, 250, PROMPT - 1).tolist()
    return Dataset.from_list([{"prompt_ids": [*ids, i]} for i in range(count)])


@pytest.mark.parametrize(
    "algo,adapter,attention,vocabulary,judged,options",
    [
        ("grpo", False, "sdpa", 259, False, {}),
        ("grpo", False, "sdpa", 8192, False, {}),
        ("grpo", True, "hydratune_varlen", 259, False, {}),  # prompts are shared
        ("ppo", False, "sdpa", 259, True, {}),
        ("ppo", False, "sdpa", 8192, False, {}),
        ("ppo", True, "hydratune_varlen", 259, False, {}),
        ("ppo", False, "sdpa", 259, False, MANY),
        ("ppo", True, "sdpa", 259, True, MANY),
        ("ppo", True, "sdpa", 8192, False, MANY),
        ("ppo", True, "sdpa", 8192, False, MANY | {"local_rollout_forward_batch_size": 16}),
    ],
)
def test_the_estimate_is_near_the_peak(
    algo, adapter, attention, vocabulary, judged, options, tmp_path, monkeypatch
):
    """Policy, reference, value and reward model; in an update step, or (MANY) in the rollout before it."""
    monkeypatch.setattr(small, "ARCHITECTURE", small.ARCHITECTURE | WIDE | {"vocab_size": vocabulary})
    judge = small.recipe(task="reward").build() if judged else None
    run = small.trainer(
        algo, tmp_path, data=prompts(), attention=attention, peft_config=small.LORA if adapter else None, max_steps=2,
        optim="adamw_torch", reward=judge or small.digits, dataset_kwargs={"skip_prepare_dataset": True},
        **LENGTH[algo] | options,
    )  # fmt: skip
    frozen = getattr(run.reference, "model", None)
    models = [run.model, judge, frozen, getattr(run, "value_model", None)]
    there = [p for model in models if model is not None for p in model.parameters()]
    with LiveMemory(there) as measured:
        run.train()
    recipe = dataclasses.replace(small.recipe(attention), dtype=torch.float32)
    held = run.also_in_memory(run.args, run.model, recipe, 0)
    if judge is not None:  # that an option would have named
        held["judges"] = (memory.shape_of(judge, 4),)
    load = memory.load_of(
        run.model, run.args, width=4, length=PROMPT + NEW, device="cpu",
        reference=run.reference_kind(run.args, adapter) == "a frozen copy", **held,
    )  # fmt: skip
    made = memory.estimate(load)
    assert made.weights == pytest.approx(sum(p.numel() * 4 for p in there), rel=0.01)
    step = made.gradients + made.activations + made.head
    assert (made.rollout > step) == ("num_mini_batches" in options)
    assert 0.93 <= made.total / measured.peak <= 1.3


def test_a_named_reward_model_is_counted_as_it_is_saved(tmp_path):
    judge = small.recipe(task="reward").build().to(torch.bfloat16)
    judge.save_pretrained(tmp_path / "run" / "model")
    args = algos.classes("ppo")[0](
        output_dir=str(tmp_path), use_cpu=True, report_to=[], reward_model=str(tmp_path / "run"),
        reward_funcs=["correct"],
    )  # fmt: skip
    recipe = dataclasses.replace(small.recipe(), dtype=torch.float32)
    held = algos.classes("ppo")[1].also_in_memory(args, recipe.outline(), recipe, 0)
    (shape,) = held["judges"]
    assert shape.width == 2 and shape.parameters == sum(p.numel() for p in judge.parameters())
    assert held["critic"].parameters == shape.parameters and held["critic"].width == 4
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        algos.classes("ppo")[1].also_in_memory(args, recipe.outline(), recipe, 0)


def qwen_1_8b(algo: str, tmp_path, gib: float, adapter: dict | None = None, **options) -> plan.Plan:
    """The plan of a run on 1.8B parameters, batch 16, bf16; no weight is made."""
    config_class, trainer_class = algos.classes(algo)
    args = config_class(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=16, **options
    )
    args.bf16, args.auto_checkpointing = True, False
    recipe = ModelRecipe(
        architecture={
            "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5504,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
        }, peft_config=peft_config(adapter), dtype=torch.bfloat16 if adapter else torch.float32,
        attn_implementation="sdpa",
    )  # fmt: skip
    settings = RunSettings(
        algo, {}, ModelSettings(architecture={}), DataSettings(), adapter, TrackingSettings(), str(tmp_path)
    )
    report = DataReport(rows_in=64, rows=64, tokens=64 * 512, trained_tokens=0, longest=512)
    rows = Dataset.from_list([{"prompt": "a", "prompt_ids": [97]}])
    return plan.make(
        settings, args=args, tokenizer=byte_tokenizer(), outline=recipe.outline(), recipe=recipe,
        trainer_class=trainer_class, train=rows, reports={"train": report}, warnings=[],
        device=SimpleNamespace(kind="cuda", name="a card", total_bytes=int(gib * 2**30), world_size=1),
    )  # fmt: skip


def test_all_models_of_ppo_are_told(tmp_path):
    """Policy and value model with gradients and Adam's two values, a frozen copy: in fp32, the value model without a head."""
    made = qwen_1_8b("ppo", tmp_path, 24)
    head = 151_936 * 2048
    critic = made.parameters - head
    assert made.estimate.weights == pytest.approx(4 * (2 * made.parameters + critic), rel=0.01)
    assert made.estimate.optimizer == pytest.approx(8 * (made.parameters + critic), rel=0.01)
    assert "does not fit 24.0 GiB" in made.facts["memory"]
    assert "in a rollout instead of the last three" in made.facts["memory"]
    assert made.changes and all(memory.fits(c.estimate, 24 * 2**30) for c in made.changes)
    assert not any("precompute_ref" in c.overrides for c in made.changes)  # no such option here


@pytest.mark.parametrize("gib", [32, 40])
def test_a_rollout_of_so_many_micro_batches_keeps_its_size(gib, tmp_path):
    """Another batch size would change it, and its groups and update steps; so no advice names one."""
    options = {"num_generations": 8, "max_completion_length": 512, "gradient_checkpointing": gib == 40}
    free = qwen_1_8b("grpo", tmp_path, gib, **options)
    counted = qwen_1_8b("grpo", tmp_path, gib, steps_per_generation=4, **options)
    assert any("batch_size=" in c.overrides for c in free.changes)
    offered = [word for c in counted.changes for word in c.overrides.split()]
    assert offered and not any(word.startswith(("batch_size=", "accumulation=")) for word in offered)


def test_the_plan_tells_the_reference_of_an_init_that_changes_the_base(tmp_path):
    lora = {"type": "lora", "target_modules": "all-linear"}
    assert qwen_1_8b("ppo", tmp_path, 80, lora).facts["reference"] == "the policy with its adapter off"
    pissa = qwen_1_8b("ppo", tmp_path, 80, lora | {"init_lora_weights": "pissa"})
    assert pissa.facts["reference"] == "the adapter as it was"


@pytest.mark.parametrize("algo,option", [("ppo", "response_length"), ("grpo", "max_completion_length")])
def test_a_rollout_that_does_not_fit_is_made_smaller(algo, option, tmp_path):
    """The keys and values of 512 sequences of 2,560 tokens are 240 GiB: fewer at a time, or shorter ones."""
    large = {"local_rollout_forward_batch_size": 512, option: 2048, "gradient_accumulation_steps": 32}
    lora = {"type": "lora", "target_modules": "all-linear"}
    made = qwen_1_8b(algo, tmp_path, 80, lora, gradient_checkpointing=True, **large)
    assert made.estimate.rollout > 200 * 2**30
    offered = [c.overrides for c in made.changes]
    assert any(o.startswith("algo.local_rollout_forward_batch_size=") for o in offered)
    assert not any(o.startswith("batch_size=") for o in offered)
    assert all(memory.fits(c.estimate, 80 * 2**30) for c in made.changes)
    # what a server samples takes no memory here
    served = qwen_1_8b(
        algo, tmp_path, 80, lora, gradient_checkpointing=True, vllm_server_base_url="http://x", **large
    )
    assert 0 < served.estimate.rollout < made.estimate.rollout / 4
