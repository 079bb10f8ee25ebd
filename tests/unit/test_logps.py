"""Log-probs from inside the head against those of whole logits: values, gradients, by-products, models, layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hydratune import attention, vocabulary
from hydratune.data.collate_preference import Layout
from hydratune.fused_head import LogpsHead
from hydratune.logps import token_logps, token_losses
from hydratune.meter import Meter
from hydratune.rl_losses import ppo_policy_loss
from hydratune.score import ScoreHead
from hydratune.vocabulary import STATS

N, H, V = 7, 6, 11


def parts(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((N, H), (V, H)))
    targets = torch.randint(0, V, (N,), generator=generator)
    return rows, weight, torch.randn(V, generator=generator, dtype=dtype) if bias else None, targets


@pytest.fixture(params=["whole", "in blocks"])
def vocabulary_at_once(request, monkeypatch):
    """The softmax of a vocabulary that is one block, and of one of three blocks."""
    if request.param == "in blocks":
        monkeypatch.setattr(vocabulary, "_CPU_BLOCK", 4)


both_ways = pytest.mark.usefixtures("vocabulary_at_once")


def naive(rows, weight, bias, targets, softcap):
    logits = F.linear(rows, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1), logits


@both_ways
@pytest.mark.parametrize("chunk", [1, 3, N, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients_equal_those_of_whole_logits(chunk, softcap, bias, frozen):
    """Each row has a factor of its own, known only in the backward pass."""
    rows, weight, offset, targets = parts(bias=bias)
    factors = torch.linspace(-1, 2, N, dtype=torch.float64)
    found = []
    for ours in (True, False):
        leaves = [
            t.clone().requires_grad_(not frozen or t is rows) for t in (rows, weight, offset) if t is not None
        ]
        r, w, b = (*leaves, None)[:3]
        if ours:
            logps, _ = token_logps(r, w, targets, b, softcap=softcap, chunk=chunk)
        else:
            logps, _ = naive(r, w, b, targets, softcap)
        (logps * factors).sum().backward()
        found.append((logps.detach(), [leaf.grad for leaf in leaves]))
    (one, gradients), (other, expected) = found
    assert torch.allclose(one, other)
    assert all(
        (a is None and e is None) or torch.allclose(a, e) for a, e in zip(gradients, expected, strict=True)
    )


@both_ways
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_finite_differences(frozen):
    rows, weight, bias, targets = parts()
    rows.requires_grad_()
    weight.requires_grad_(not frozen)
    check = lambda r, w: token_logps(r, w, targets, bias, softcap=3.0, chunk=3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(check, (rows, weight))


@both_ways
@pytest.mark.parametrize("chunk", [2, None])
def test_by_products_equal_those_of_whole_logits(chunk):
    rows, weight, bias, targets = parts()
    _, logits = naive(rows, weight, bias, targets, None)
    _, stats = token_logps(rows, weight, targets, bias, stats=STATS, chunk=chunk)
    p = torch.softmax(logits, -1)
    assert torch.allclose(stats.entropy, -(p * p.log()).sum(-1))
    assert torch.allclose(stats.mean_logit, logits.mean(-1))
    assert torch.equal(stats.correct, logits.argmax(-1) == targets)
    assert torch.allclose(stats.log_sum_square, p.square().sum(-1).log())
    assert token_logps(rows, weight, targets, bias)[1].entropy is None


@both_ways
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_losses_of_own_log_probs_have_the_gradients_of_token_logps(chunk, softcap, bias, frozen):
    """A clipped ratio: its slope is a function of the new log-prob, and 0 for some tokens."""
    rows, weight, offset, targets = parts(bias=bias)
    with torch.no_grad():
        old = naive(rows, weight, offset, targets, softcap)[0] + torch.linspace(-0.5, 0.5, N)
    advantages = torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0, 0.0, 2.0])
    loss = lambda logps: ppo_policy_loss(logps, old, advantages, 0.2)[0].sum()  # noqa: E731
    found = []
    for ours in (True, False):
        leaves = [
            t.clone().requires_grad_(not frozen or t is rows) for t in (rows, weight, offset) if t is not None
        ]
        r, w, b = (*leaves, None)[:3]
        if ours:
            total, logps, stats = token_losses(
                r, w, targets, loss, b, softcap=softcap, stats=("entropy",), chunk=chunk
            )
            assert not logps.requires_grad
        else:
            logps, stats = token_logps(r, w, targets, b, softcap=softcap, stats=("entropy",))
            total = loss(logps)
        (total / 3).backward()
        found.append((total.detach(), logps.detach(), stats.entropy, *(leaf.grad for leaf in leaves)))
    assert found[0][3].any()
    assert all((a is None and e is None) or torch.allclose(a, e) for a, e in zip(*found, strict=True))


@both_ways
@pytest.mark.parametrize("chunk", [3, None])
def test_a_second_backward_pass_gives_the_same_gradients(chunk):
    """What the forward pass kept is used up by the first."""
    rows, weight, bias, targets = parts()
    leaves = [t.requires_grad_() for t in (rows, weight, bias)]
    total = token_logps(rows, weight, targets, bias, chunk=chunk)[0].square().sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.allclose(a, b) for a, b in zip(first, second, strict=True))


@both_ways
def test_of_equally_likely_tokens_the_first_counts():
    rows, weight = torch.ones(3, 2), torch.zeros(11, 2)
    _, stats = token_logps(rows, weight, torch.tensor([0, 5, 10]), stats=("correct",))
    assert stats.correct.tolist() == [True, False, False]


@both_ways
def test_a_bias_may_shut_out_a_whole_part_of_the_vocabulary():
    rows, weight, bias, targets = parts()
    bias[8:] = -torch.inf
    leaf = rows.requires_grad_()
    logps, stats = token_logps(leaf, weight, targets.clamp(max=7), bias, stats=("log_sum_square",))
    expected = naive(rows, weight, bias, targets.clamp(max=7), None)[0]
    assert torch.allclose(logps, expected) and stats.log_sum_square.isfinite().all()
    (found,), (right,) = (torch.autograd.grad(made.sum(), leaf) for made in (logps, expected))
    assert torch.allclose(found, right)


@both_ways
def test_no_log_prob_is_above_zero():
    """Losses take log(1 - p) of it."""
    rows, weight = torch.eye(4) * 100, torch.cat((torch.eye(4), torch.zeros(7, 4)))
    logps, stats = token_logps(rows, weight, torch.arange(4), stats=("correct",))
    assert (logps <= 0).all() and (logps > -1e-6).all() and stats.correct.all()


def test_gradients_made_early_are_scaled_in_the_precision_of_the_loss():
    """1/1021 is no bf16 number: rounded first, every gradient would be 0.3 % too small."""
    rows, weight, _, targets = parts()
    found = []
    for divisor in (1.0, 1021.0):
        leaf = rows.bfloat16().requires_grad_()
        (token_losses(leaf, weight.bfloat16(), targets, torch.sum)[0] / divisor).backward()
        found.append(leaf.grad.double().abs().sum() * divisor)
    assert found[1] / found[0] == pytest.approx(1, abs=5e-4)


@both_ways
def test_losses_of_no_rows_and_without_gradients():
    rows, weight, _, targets = parts()
    weight.requires_grad_()
    total, logps, stats = token_losses(rows[:0], weight, targets[:0], torch.sum, stats=("entropy",))
    total.backward()
    assert total == 0 and logps.shape == stats.entropy.shape == (0,) and not weight.grad.any()
    with torch.no_grad():
        total, logps, _ = token_losses(rows, weight, targets, torch.sum)
    assert torch.allclose(total, logps.sum()) and not total.requires_grad


def test_no_rows_have_zero_gradients():
    rows, weight, _, targets = parts()
    weight.requires_grad_()
    logps, stats = token_logps(rows[:0], weight, targets[:0], stats=("entropy",))
    logps.sum().backward()
    assert logps.shape == (0,) and stats.entropy.shape == (0,) and not weight.grad.any()


def test_bf16_is_near_and_autocast_decides_the_products():
    rows, weight, bias, targets = parts(torch.float32)
    exact, _ = naive(rows, weight, bias, targets, None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = token_logps(rows, weight, targets, bias)
    assert (
        found.dtype == torch.float32
        and torch.allclose(found, exact, atol=0.05)
        and not torch.equal(found, exact)
    )


CONFIGS = {
    "qwen2": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def causal(kind: str, attn: str = "sdpa"):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **CONFIGS[kind],
    )  # fmt: skip
    attn = "eager" if kind == "gemma2" else attn
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()


def sequences(seed: int = 0, many: int = 3, branches: int = 2):
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(1, 97, rng.integers(low, high)).astype(np.int32)  # noqa: E731
    return [ids(1, 9) for _ in range(many)], [[ids(1, 9) for _ in range(many)] for _ in range(branches)]


def expected_logps(model, layout) -> torch.Tensor:
    """From the model's own logits of the padded layout."""
    logits = model(input_ids=layout["input_ids"], attention_mask=layout["attention_mask"]).logits.float()
    logits = logits[:, -layout["input_ids"].shape[1] :].flatten(0, 1)[layout["positions"]]
    return torch.log_softmax(logits, -1).gather(1, layout["targets"][:, None]).squeeze(1)


INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
          "key_index")  # fmt: skip


def inside(model, layout) -> torch.Tensor:
    inputs = {name: layout[name] for name in INPUTS if name in layout}
    with LogpsHead(model, layout["input_ids"].shape[1], layout["positions"], layout["targets"]) as head:
        model(**inputs, use_cache=False)
    return head.logps


ADAPTERS = {
    "none": None,
    "on the head": LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False
    ),
    "trained head": LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "virtual tokens": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_inside_the_head_equals_the_models_own_logits(kind, adapter):
    model = causal(kind)
    if ADAPTERS[adapter] is not None:
        model = get_peft_model(model, ADAPTERS[adapter]).eval()
    layout = Layout(0)(*sequences())
    assert torch.allclose(inside(model, layout), expected_logps(model, layout), atol=1e-5)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("multiple", [None, 16])
def test_shared_prompts_give_what_padded_rows_give(branches, checkpointing, multiple):
    """Log-probs of every token, and the gradients of all parameters."""
    prompts, completions = sequences(1, 4, branches)
    found = []
    for attn, how in (("sdpa", Layout(0)), (attention.NAME, Layout(0, True, True, multiple)),
                      (attention.NAME, Layout(0, True, False, multiple))):  # fmt: skip
        model = causal("qwen2", attn).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        layout = how(prompts, completions)
        assert ("key_index" in layout) == (how.share_prompts and branches > 1)
        logps = inside(model, layout)
        order = np.lexsort((layout["ordinals"], layout["sequences"]))
        (logps * (1 + layout["sequences"])).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((logps.detach()[order], gradients, layout["lengths"]))
    for logps, gradients, lengths in found[1:]:
        assert torch.allclose(logps, found[0][0], atol=1e-5)
        assert torch.allclose(gradients, found[0][1], atol=1e-4)
        assert torch.equal(lengths, found[0][2])


@pytest.mark.parametrize("share", [False, True])
def test_a_completion_without_prompt_is_judged_from_its_second_token(share):
    ids = [np.array([5, 6, 7], dtype=np.int32), np.array([8, 9], dtype=np.int32)]
    layout = Layout(0, True, share)([np.array([], dtype=np.int32)], [[ids[0]], [ids[1]]])
    assert layout["targets"].tolist() == [6, 7, 9] and layout["sequences"].tolist() == [0, 0, 1]
    assert layout["ends"].tolist() == [2, 4]
    padded = Layout(0)([np.array([], dtype=np.int32)], [[ids[0]], [ids[1]]])
    assert torch.allclose(
        inside(causal("qwen2", attention.NAME), layout), inside(causal("qwen2"), padded), atol=1e-5
    )


@pytest.mark.parametrize("attn,layout", [("sdpa", Layout(0)), (attention.NAME, Layout(0, True, True))])
def test_scores_are_read_at_the_last_token_whatever_it_is(attn, layout):
    """Each sequence alone gives its score; transformers would look for the last token that is not the pad token."""
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn).eval()
    prompts, completions = sequences(2, 3, 2)
    completions[0][1][-1] = 0  # ends with the pad token
    made = layout(prompts, completions)
    with ScoreHead(model, made) as head:
        model(**{name: made[name] for name in INPUTS if name in made}, use_cache=False)
    pairs = [(p, c) for k in completions for p, c in zip(prompts, k, strict=True)]
    alone = []
    for p, c in pairs:
        hidden = model.model(
            input_ids=torch.from_numpy(np.concatenate((p, c)))[None].long()
        ).last_hidden_state
        alone.append(model.score(hidden[0, -1]))
    assert torch.allclose(head.scores, torch.cat(alone), atol=1e-5)


def test_a_meter_adds_up_keeps_extremes_and_survives_a_checkpoint():
    meter, other = Meter(), Meter()
    one = torch.tensor(1.0)
    meter.add("loss", torch.tensor(6.0), torch.tensor(2.0))
    meter.add("loss", torch.tensor(1.0), torch.tensor(5.0))
    for value in (3.0, -4.0):
        meter.most("high", one * value)
        meter.least("low", one * value)
    other.load(meter.state(), torch.device("cpu"))
    found = other.take(lambda t: 2 * t, lambda t: torch.cat((t, t - 1)))  # as of two processes
    assert found == {"loss": (14.0, 14.0), "high": (3.0, 1.0), "low": (-4.0, 1.0)}
    assert other.take(lambda t: t, lambda t: t) == {} and meter.take(lambda t: t, lambda t: t)["low"] == (
        -4.0,
        1.0,
    )


@pytest.mark.parametrize("chunk", [None, 500])
def test_the_weights_gradient_in_fp16_is_finite_wherever_its_mean_is(chunk):
    """The sum over rows is beyond fp16; what is asked for is its mean, times the scale of the loss."""
    torch.manual_seed(0)
    rows = torch.randn(2000, 16).mul(30).half()
    weight = torch.zeros(40, 16).half().requires_grad_()
    targets = torch.zeros(2000, dtype=torch.int64)
    rows[:, 0] = 60.0
    total, _, _ = token_losses(rows, weight, targets, lambda logps: -logps.sum(), chunk=chunk)
    (total / 2000).backward()
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(rows.double() @ exact.t(), targets).backward()
    assert 2000 * exact.grad.abs().max() > 65504  # what an fp16 sum would have had to hold
    assert weight.grad.dtype == torch.float16 and torch.isfinite(weight.grad).all()
    assert torch.allclose(weight.grad.double(), exact.grad, rtol=2e-3, atol=1e-2)
