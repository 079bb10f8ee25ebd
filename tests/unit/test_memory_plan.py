"""The memory estimate against what is really kept, and the plan against the rows it describes."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from hydratune import memory, plan
from hydratune.adapters import peft_config
from hydratune.algos.sft import SFTConfig, SFTTrainer
from hydratune.compiling import make_quick
from hydratune.data.builtin import arithmetic
from hydratune.data.pipeline import prepare
from hydratune.fused_head import FusedHead
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.settings import DataSettings, ModelSettings, RunSettings, TrackingSettings

ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
BATCH, LENGTH = 4, 128


def config(tmp_path, **options) -> SFTConfig:
    return SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=BATCH,
        optim="adamw_torch",
        **options,
    )


def kept_bytes(model) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 259, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FusedHead(model, ids):
        model(input_ids=ids, use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize(
    "adapter", [None, {"type": "lora", "r": 8, "target_modules": "all-linear"}], ids=["full", "lora"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_estimate_is_near_what_is_kept(adapter, checkpointing, fused, tmp_path):
    model = ModelRecipe(architecture=ARCHITECTURE, peft_config=peft_config(adapter)).build().train()
    args = config(tmp_path, gradient_checkpointing=checkpointing, fused_layers=fused)
    make_quick(model, args)
    load = memory.load_of(model, args, width=4, length=LENGTH, device="cpu")
    made = memory.estimate(load)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.weights == sum(p.numel() * 4 for p in model.parameters())
    assert made.gradients == 4 * trained
    if checkpointing:
        model.gradient_checkpointing_enable()
        # one layer is recomputed at a time in the backward pass, which the forward pass does not show
        layer = made.activations - BATCH * LENGTH * 4 * 128 * 4
        assert layer > 0
        assert made.activations - layer == pytest.approx(kept_bytes(model), rel=0.5)
        return
    remade = fused * 2 * BATCH * LENGTH * model.config.intermediate_size * 4  # in the backward pass
    assert made.activations - remade == pytest.approx(kept_bytes(model), rel=0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 259, (BATCH, LENGTH))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    states = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.numel() > 1
    )
    assert made.optimizer == states


def big(**changes) -> memory.Load:
    fields = {
        "parameters": 1_800_000_000, "trained": 1_800_000_000, "trained_width": 4, "width": 4, "hidden": 2048, "intermediate": 5504,
        "kv": 2048, "layers": 24, "vocabulary": 151_936, "head_trained": True, "batch": 16, "accumulation": 1, "length": 1024,
        "autocast": True, "checkpointing": False, "optimizer": "adamw_torch_fused", "device": "cuda",
    }  # fmt: skip
    return memory.Load(**fields | changes)


@pytest.mark.parametrize("gib", [24, 48, 80])
def test_every_change_that_is_offered_makes_it_fit(gib):
    """The classic case: 1.8B parameters, batch 16, bf16, on cards of 24, 48 and 80 GiB."""
    load, available = big(), gib * 2**30
    assert not memory.fits(memory.estimate(load), available)
    offered = memory.smallest_changes(load, available)
    assert offered
    for change in offered:
        assert memory.fits(change.estimate, available)
        assert change.estimate.total < memory.estimate(load).total
    assert memory.needs_checkpointing(load, available)
    assert not memory.needs_checkpointing(load, 2**42)


def test_what_shrinks_the_estimate():
    whole = memory.estimate(big()).total
    for changes in ({"checkpointing": True}, {"batch": 8}, {"optimizer": "adamw_bnb_8bit"}, {"width": 2, "trained_width": 2},
                    {"quantization": "4bit", "trained": 10_000_000, "head_trained": False}):  # fmt: skip
        assert memory.estimate(big(**changes)).total < whole


@pytest.mark.parametrize(
    "kind,fused", [("qwen2", (True, True)), ("olmo2", (True, False)), ("qwen2_moe", (False, False))]
)
def test_the_smaller_count_is_of_what_is_fused(kind, fused, tmp_path):
    outline = ModelRecipe(architecture=ARCHITECTURE | {"model_type": kind}).outline()
    load = memory.load_of(outline, config(tmp_path), width=4, length=8, device="cpu")
    assert (load.fused, load.fused_attention) == fused


@pytest.mark.parametrize("width,autocast,fused", [(2, False, False), (2, True, True), (4, False, True)])
def test_layers_of_two_dtypes_are_fused_under_autocast_alone(width, autocast, fused, tmp_path):
    """An adapter in fp32 on a base in bf16."""
    adapter = peft_config({"type": "lora", "r": 8, "target_modules": "all-linear"})
    model = ModelRecipe(architecture=ARCHITECTURE, peft_config=adapter).build()
    args = config(tmp_path)
    args.bf16 = autocast
    load = memory.load_of(model, args, width=width, length=8, device="cpu")
    assert (load.fused, load.fused_attention) == (fused, fused)
    whole = memory.estimate(memory.replace(load, fused=True, fused_attention=True)).activations
    assert memory.estimate(load).activations == whole or not fused


def test_an_architecture_without_a_gated_mlp_is_estimated_too(tmp_path):
    model = ModelRecipe(
        architecture={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    ).outline()
    assert memory.load_of(model, config(tmp_path), width=4, length=8, device="cpu").intermediate == 128


def settings(**fields) -> RunSettings:
    return RunSettings(
        algo="sft", algo_options={}, model=ModelSettings(architecture=ARCHITECTURE, tokenizer="byte"), data=DataSettings(),
        peft=None, tracking=TrackingSettings(), output_dir="", choices={"model": "tiny"}, **fields,
    )  # fmt: skip


def plan_of(rows, tmp_path, device_bytes=2**34, **options):
    args = config(tmp_path, num_train_epochs=2, **options)
    tokenizer = byte_tokenizer()
    train, report = prepare(rows, tokenizer, args, packing=args.packing, where="train", cache=False)
    recipe = ModelRecipe(architecture=ARCHITECTURE, dtype=torch.float32, attn_implementation="sdpa",
                         peft_config=peft_config({"type": "lora", "r": 4}))  # fmt: skip
    device = SimpleNamespace(kind="cpu", name="the CPU", total_bytes=device_bytes, world_size=1)
    return plan.make(settings(), args=args, tokenizer=tokenizer, outline=recipe.outline(), recipe=recipe, train=train,
                     trainer_class=SFTTrainer,
                     reports={"train": report}, device=device, warnings=["mind the gap"])  # fmt: skip


def printed(made) -> str:
    out = io.StringIO()
    plan.show(made, Console(file=out, width=150))
    return out.getvalue()


def rows() -> Dataset:
    return Dataset.from_list([{"messages": row["messages"]} for row in arithmetic(10, seed=0)])


def test_the_plan_shows_rows_steps_memory_and_trained_tokens(tmp_path):
    made = plan_of(rows(), tmp_path, assistant_only_loss=True)
    assert made.steps == 6  # ten rows in batches of four, twice
    assert 0 < made.trained_parameters < made.parameters
    text = printed(made)
    for expected in (
        "10 of 10 rows kept",
        "6 of 4 rows each",
        "trainable",
        "fits",
        "warning: mind the gap",
        "⟦",
    ):
        assert expected in text, expected
    example = text.split("in ⟦ ⟧")[1]
    answer = example[example.index("⟦") + 1 : example.index("⟧")]
    assert answer.endswith("<|im_end|>") and "What is" not in answer


def test_a_plan_that_does_not_fit_offers_what_would(tmp_path):
    text = printed(plan_of(rows(), tmp_path, device_bytes=4_500_000))
    assert "does not fit" in text


def test_brackets_in_rows_survive_and_long_rows_are_cut(tmp_path):
    data = Dataset.from_list([{"text": "[bold]not markup[/bold] " + "x" * 3000}])
    text = printed(plan_of(data, tmp_path, max_length=None))
    assert "[bold]not markup[/bold]" in text and "1,834 characters" in text


def test_a_stream_has_a_plan(tmp_path):
    made = plan_of(rows().to_iterable_dataset(), tmp_path, max_steps=7)
    assert made.steps == 7 and "a stream" in printed(made)
