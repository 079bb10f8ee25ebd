"""Head, attention and training on one device: the CPU here, a GPU with HYDRATUNE_TEST_DEVICE=cuda (`make test-gpu`)."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hydratune import SFTConfig, SFTTrainer, attention
from hydratune.data.builtin import arithmetic
from hydratune.data.collate import SFTCollator
from hydratune.fused_head import FusedHead, linear_cross_entropy
from hydratune.fused_layers import fuse
from hydratune.models import ModelRecipe, byte_tokenizer

DEVICE = os.environ.get("HYDRATUNE_TEST_DEVICE", "cpu")
LOW = torch.bfloat16
ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """‖found − right‖ / ‖right‖, in fp64."""
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


@pytest.mark.parametrize("dtype,most", [(torch.float32, 1e-5), (LOW, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [None, 100])
def test_the_head_against_fp64(dtype, most, chunk):
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 64, generator=drawn).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(5000, 64, generator=drawn).mul(0.1).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(5000, (300,), generator=drawn).to(DEVICE)
    exact = [t.detach().double().requires_grad_() for t in (rows, weight)]
    right = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")
    right.backward()
    loss, stats = linear_cross_entropy(rows, weight, targets, want_stats=True, chunk=chunk)
    loss.backward()
    assert off(loss, right) < most and loss.dtype == torch.float32
    for own, true in zip((rows, weight), exact, strict=True):
        assert off(own.grad, true.grad) < most
    logits = exact[0] @ exact[1].t()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    assert off(stats.entropy_sum, entropy) < most
    assert abs(stats.correct.item() - (logits.argmax(-1) == targets).sum().item()) <= (dtype == LOW) * 3


@pytest.mark.parametrize("dtype,most", [(torch.float32, 1e-5), (LOW, 2e-2)], ids=["fp32", "bf16"])
def test_documents_end_to_end_are_as_alone(dtype, most):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**ARCHITECTURE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).to(DEVICE, dtype)
    documents = [torch.randint(259, (n,), device=DEVICE) for n in (5, 70, 1, 33)]
    lengths = torch.tensor([len(d) for d in documents])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE, torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(DEVICE)[None]
    with torch.no_grad():
        together = model(
            input_ids=torch.cat(documents)[None], position_ids=positions, use_cache=False, cu_seq_lens_q=ends,
            cu_seq_lens_k=ends, max_length_q=70, max_length_k=70,
        ).logits[0]  # fmt: skip
        alone = torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents])
    assert off(together, alone) < most


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradients_of_documents_under_autocast(fused, adapter, monkeypatch):
    """bf16 products of fp32 weights, or of a bf16 base with LoRA, by the kernel for documents on a GPU: as near to fp64 as bf16 is."""
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**ARCHITECTURE), attn_implementation=attention.NAME
    )
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model = model.to(DEVICE)
    rows = [{"input_ids": torch.randint(259, (n,)).tolist()} for n in (5, 70, 2, 33)]
    batch = SFTCollator(pad_token_id=258, padding_free=True)(rows)
    labels = batch.pop("labels").to(DEVICE)
    batch = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labelled"
    }

    def gradients(tried, **how) -> torch.Tensor:
        inputs = attention.unmasked(batch, tried.config)
        with torch.autocast(DEVICE, LOW, **how), FusedHead(tried, labels) as head:
            tried(**inputs, use_cache=False)
        head.loss_sum.backward()
        return torch.cat([p.grad.flatten() for p in tried.parameters() if p.requires_grad])

    right = gradients(copy.deepcopy(model).double(), enabled=False)
    if adapter:
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(LOW)
    if fused:
        assert fuse(model) == 9
    calls, kernel = [], attention._torch_varlen
    monkeypatch.setattr(attention, "_torch_varlen", lambda *a: calls.append(1) or kernel(*a))
    assert off(gradients(model), right) < 0.03
    assert len(calls) == (2 if DEVICE == "cuda" else 0)  # of a layer each


def test_training_without_padding_is_training_with_it(tmp_path):
    rows = Dataset.from_list([{"messages": r["messages"]} for r in arithmetic(64, 3)])
    found = {}
    for free in (False, True):
        run = SFTTrainer(
            args=SFTConfig(
                output_dir=str(tmp_path), max_steps=8, learning_rate=3e-3, logging_steps=1, save_strategy="no",
                report_to=[], disable_tqdm=True, use_cpu=DEVICE == "cpu", padding_free=free, seed=5,
            ),
            train_dataset=rows, processing_class=byte_tokenizer(),
            recipe=ModelRecipe(architecture=ARCHITECTURE, seed=1, attn_implementation=attention.NAME),
        )  # fmt: skip
        assert run.args.bf16 == (DEVICE != "cpu")
        run.train()
        found[free] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert found[True] == pytest.approx(found[False], rel=1e-5 if DEVICE == "cpu" else 1e-2)
    assert found[True][-1] < 0.8 * found[True][0]
