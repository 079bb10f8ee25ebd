"""The LM head and its loss as one operation, against plain logits and against arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hydratune.fused_head import (
    FusedHead,
    by_document,
    cross_entropy,
    is_exact,
    linear_cross_entropy,
    select,
)
from hydratune.losses import token_loss
from hydratune.meter import error_of_ratio
from hydratune.vocabulary import chunk_rows


def test_token_losses_by_hand():
    # p = 1/2 and 1/4: −log p = 0.6931, 1.3863; times p: 0.3466, 0.3466
    logps = torch.tensor([0.5, 0.25]).log().requires_grad_()
    assert token_loss(logps).tolist() == pytest.approx([math.log(2), math.log(4)])
    assert token_loss(logps, "dft").tolist() == pytest.approx([math.log(2) / 2, math.log(4) / 4])
    # the probability is held constant: d/dlogp(−p·logp) = −p
    (gradient,) = torch.autograd.grad(token_loss(logps, "dft").sum(), logps)
    assert gradient.tolist() == pytest.approx([-0.5, -0.25])
    with pytest.raises(ValueError, match="loss_type"):
        token_loss(logps, "mse")


def test_loss_by_hand():
    # one row of logits (0, log 3) with target 1: p = 3/4, loss = log(4/3), entropy = −¾log¾ − ¼log¼
    rows, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    loss, stats = linear_cross_entropy(rows, weight, torch.tensor([1]), want_stats=True)
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert stats.entropy_sum.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (stats.count.item(), stats.correct.item()) == (1, 1)


def test_select_shifts_and_keeps_labelled_positions():
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    labels = torch.tensor([[7, -100, 5, 6]])  # the first is predicted by nothing
    rows, targets = select(hidden, labels)
    assert rows.tolist() == [[2.0, 3.0], [4.0, 5.0]] and targets.tolist() == [5, 6]
    virtual = torch.cat([torch.full((1, 3, 2), -1.0), hidden], dim=1)
    assert torch.equal(select(virtual, labels)[0], rows)


def plain(rows, weight, bias, targets, softcap, loss_type):
    logits = F.linear(rows, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_loss(torch.log_softmax(logits, -1).gather(1, targets[:, None]), loss_type).sum()


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=generator, dtype=dtype)
    weight = torch.randn(11, 5, generator=generator, dtype=dtype)
    bias = torch.randn(11, generator=generator, dtype=dtype)
    return rows, weight, bias, torch.randint(0, 11, (7,), generator=generator)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_value_and_gradients_are_those_of_plain_logits(loss_type, softcap, chunk):
    rows, weight, bias, targets = problem()
    ours = [t.clone().requires_grad_() for t in (rows, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (rows, weight, bias)]
    loss, _ = linear_cross_entropy(
        ours[0], ours[1], targets, ours[2], softcap=softcap, loss_type=loss_type, chunk=chunk
    )
    wanted = plain(*theirs, targets, softcap, loss_type)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    (3 * loss).backward()
    (3 * wanted).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_against_finite_differences(softcap):
    rows, weight, bias, targets = problem()
    inputs = [t.requires_grad_() for t in (rows, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda r, w, b: linear_cross_entropy(r, w, targets, b, softcap=softcap)[0], inputs
    )


def test_a_frozen_head_and_no_gradients():
    rows, weight, _, targets = problem(torch.float32)
    rows.requires_grad_()
    loss, _ = linear_cross_entropy(rows, weight, targets)
    loss.backward()
    assert rows.grad is not None and weight.grad is None
    with torch.no_grad():
        quiet, _ = linear_cross_entropy(rows, weight, targets)
    assert quiet.item() == loss.item() and not quiet.requires_grad


def test_statistics_are_those_of_the_softmax():
    rows, weight, bias, targets = problem()
    _, stats = linear_cross_entropy(rows, weight, targets, bias, want_stats=True, chunk=2)
    p = torch.softmax(F.linear(rows, weight, bias), -1)
    assert stats.entropy_sum.item() == pytest.approx(-(p * p.log()).sum().item())
    assert stats.correct.item() == (p.argmax(-1) == targets).sum().item()
    _, same = cross_entropy(F.linear(rows, weight, bias), targets, "nll", True)
    assert same.entropy_sum.item() == pytest.approx(stats.entropy_sum.item())
    assert same.correct.item() == stats.correct.item()


def test_sums_by_document_are_the_same_padded_and_end_to_end():
    values = torch.tensor(
        [1.0, 2.0, 4.0]
    )  # of the labelled tokens 7, 8 of the first document and 9 of the third
    padded = torch.tensor([[-100, 7, 8], [-100, -100, -100], [-100, 9, -100]])
    flat = torch.tensor([[-100, 7, 8, -100, -100, -100, 9]])
    for labels, boundaries in ((padded, None), (flat, torch.tensor([0, 3, 5, 7]))):
        totals, counts = by_document(values, labels, boundaries)
        assert totals.tolist() == [3, 0, 4] and counts.tolist() == [2, 0, 1]


def test_error_of_a_ratio_by_hand():
    # r = (3 + 4) / (2 + 1) = 7/3; apart: 3 − 14/3 = −5/3, 4 − 7/3 = 5/3; √(2/1 · 50/9) / 3 = 10/9; the empty row is none
    totals, weights = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([2.0, 0.0, 1.0])
    assert error_of_ratio(totals, weights) == pytest.approx(10 / 9)
    # with weights of 1 a mean's: values 1, 2, 6, mean 3, variance (4 + 1 + 9) / 2 = 7, error √(7/3)
    assert error_of_ratio(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3)) == pytest.approx(math.sqrt(7 / 3))
    assert error_of_ratio(torch.tensor([1.0]), torch.ones(1)) is None


def test_no_rows_give_zero_and_zero_gradients():
    rows, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    loss, stats = linear_cross_entropy(rows, weight, torch.zeros(0, dtype=torch.long), want_stats=True)
    loss.backward()
    assert loss.item() == 0 and stats.count.item() == 0 and not weight.grad.any()


def test_half_precision_sums_in_single():
    rows, weight, _, targets = problem(torch.float32)
    exact, _ = linear_cross_entropy(rows, weight, targets)
    half, _ = linear_cross_entropy(rows.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=2e-2)
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = linear_cross_entropy(rows, weight, targets)
    cast.backward()
    assert cast.item() == pytest.approx(half.item(), rel=1e-3)
    assert rows.grad.dtype == weight.grad.dtype == torch.float32


def test_chunks_grow_with_what_the_device_can_hold():
    cpu, single, half = torch.device("cpu"), torch.float32, torch.bfloat16
    assert chunk_rows(10, 100, cpu, single) == 10
    for dtype, numbers in ((single, 1), (half, 2)):  # the softmax; and the logits
        kept = numbers * chunk_rows(10_000, 151_665, cpu, dtype) * 151_665 * 4
        assert kept == pytest.approx(128 * 2**20, rel=0.02)
    assert chunk_rows(100_000, 151_665, torch.device("cuda"), half) >= 4096
    assert chunk_rows(0, 100, cpu, single) == 1


SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {"model_type": "llama"},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": {"model_type": "cohere", "logit_scale": 3.0, "num_key_value_heads": 2},
    "granite": {"model_type": "granite", "logits_scaling": 4.0},
}


def model_of(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for parameter in model.parameters():  # large enough that softcaps and scales matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 37, (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 6:] = -100
    return ids, labels


def reference(model, ids, labels):
    logits = model(input_ids=ids).logits[:, -labels.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def assert_same(model):
    ids, labels = batch()
    with FusedHead(model, labels, want_stats=True) as head:
        output = model(input_ids=ids)
    assert output.logits.shape == (1, 1, 1)
    head.loss_sum.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = reference(model, ids, labels)
    wanted.backward()
    assert head.loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert head.stats.count.item() == (labels[:, 1:] != -100).sum().item()
    expected = {n for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected and expected
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-4), name


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_the_fused_head_has_its_own_loss_and_gradients(name):
    assert_same(model_of(name))


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "lora on the head", "trained head", "virtual tokens"],
)
def test_adapters(adapter):
    assert_same(get_peft_model(model_of("qwen2 untied"), adapter))


def test_the_head_is_itself_again_also_after_an_error():
    model = model_of("llama")
    ids, labels = batch()
    with FusedHead(model, labels):
        model(input_ids=ids)
    assert model(input_ids=ids).logits.shape == (2, 9, 37)
    with pytest.raises(RuntimeError, match="broken"), FusedHead(model, labels):
        raise RuntimeError("broken")
    assert model(input_ids=ids).logits.shape == (2, 9, 37)


SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OTHERS = {  # what they do to their logits, with values that are not neutral
    "hyperclovax": {"logits_scaling": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.05, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": 16, "attention_window_size": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "attn_implementation": "eager"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_known_head_is_found_exact(name):
    model = model_of(name).train()
    before = torch.get_rng_state()
    assert is_exact(model)
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_changes_its_logits_is_found_out_or_trained_right(kind):
    """Either the fused head has the model's own loss, or it is not used."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | OTHERS[kind]))
    ids, labels = batch()
    rows, targets = select(model(input_ids=ids).logits, labels)
    own = F.cross_entropy(rows, targets, reduction="sum")
    with FusedHead(model, labels) as head:
        model(input_ids=ids)
    assert not is_exact(model) or torch.allclose(head.loss_sum, own, rtol=1e-4)


def test_a_head_with_a_scale_of_its_own_falls_back_to_all_logits(tmp_path):
    from datasets import Dataset

    from hydratune import SFTConfig, SFTTrainer
    from hydratune.models import byte_tokenizer

    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": len(byte_tokenizer())}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("hyperclovax", **sizes, **OTHERS["hyperclovax"])
    )
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    rows = Dataset.from_list([{"text": "1 + 1 = 2"}] * 4)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=byte_tokenizer())
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    picked, targets = select(
        model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    )
    assert loss.item() == pytest.approx(F.cross_entropy(picked, targets).item(), rel=1e-5)


def test_gradients_of_bf16_are_scaled_before_they_are_rounded():
    rows, weight, _, targets = (t.bfloat16() if t.is_floating_point() else t for t in problem(torch.float32))

    def gradients(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, _ = linear_cross_entropy(r, w, targets)
        (loss * scale).backward()
        return r.grad, w.grad

    for scaled, whole in zip(gradients(1 / 3), gradients(1.0), strict=True):
        assert torch.allclose(scaled.float(), whole.float() / 3, rtol=2**-7, atol=0)
    assert torch.equal(gradients(1 / 3)[0], (gradients(1.0)[0].float() * torch.tensor(1 / 3)).bfloat16())


def test_autocast_gives_the_gradients_of_bf16_in_fp32():
    rows, weight, _, targets = problem(torch.float32)
    r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(r, w, targets)
    (loss / 3).backward()
    exact_r, exact_w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    (plain(exact_r, exact_w, None, targets, None, "nll") / 3).backward()
    assert r.grad.dtype == w.grad.dtype == torch.float32
    assert torch.allclose(r.grad, exact_r.grad, atol=0.02) and torch.allclose(w.grad, exact_w.grad, atol=0.02)
