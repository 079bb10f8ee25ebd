"""Fused layers against the layers that they stand for: results, gradients, what they keep, and when they step aside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_attention import SFTCollator, documents, model_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hydratune import attention
from hydratune.fused_layers import fuse, known_parts
from hydratune.fused_ops import GELU_TANH, SILU, Projection, gated_mlp, project, rms_norm, rotate

KINDS = {  # model type: more of its config, and the modules that are known: norms, attention, MLPs
    "qwen2": ({}, 9), "llama": ({}, 9), "mistral": ({}, 9), "qwen3": ({"head_dim": 8}, 13), "gemma": ({"head_dim": 8}, 9),
    "gemma2": ({"head_dim": 8}, 11), "olmo2": ({}, 11), "phi3": ({}, 5), "smollm3": ({}, 7), "granite": ({}, 9),
    "nanochat": ({}, 0),  # its norms have no weight
}  # fmt: skip


def lively(kind: str, implementation: str = "sdpa", **fields):
    """A model whose norms are not all ones."""
    model = model_of(kind, "eager" if kind == "gemma2" else implementation, **KINDS[kind][0] | fields)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model, **options):
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(padding_free: bool = True):
    made = SFTCollator(pad_token_id=0, padding_free=padding_free)(documents())
    return {k: v for k, v in made.items() if k not in ("labels", "labelled")}


def run(model, inputs, autocast: bool = False):
    """Logits, and the gradient of each trained parameter by name."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**inputs, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, close: float) -> None:
    assert one[1].keys() == other[1].keys()
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= close * a.abs().max() + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_free", [True, False])
def test_logits_and_gradients_are_those_of_the_models_own_layers(kind, padding_free):
    model, inputs = lively(kind), batch(padding_free)
    expected = run(model, inputs)
    assert fuse(model) == KINDS[kind][1]
    assert_same(expected, run(model, inputs), 1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_with_lora(kind, targets):
    model, inputs = adapted(lively(kind)), batch()
    for name, parameter in model.named_parameters():  # as an adapter on those alone would have it
        if targets != "all-linear" and not any(target in name for target in targets):
            parameter.requires_grad_(False)
    expected = run(model, inputs)
    assert fuse(model) == KINDS[kind][1]
    found = run(model, inputs)
    assert_same(expected, found, 1e-5)
    assert found[1] and all("lora" in name for name in found[1])


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_under_autocast(adapter, low):
    """bf16 products of fp32 weights, or of a bf16 base with an adapter in fp32: no further from fp32 than the model's own."""
    errors = torch.zeros(2)
    for seed in range(8):
        model = lively("qwen2", attention.NAME)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        if adapter:
            model = adapted(model.to(torch.bfloat16) if low else model)
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        exact = run(copy.deepcopy(model).float(), batch())[1]
        own = run(model, batch(), autocast=True)
        assert fuse(model) == 9
        found = run(model, batch(), autocast=True)
        assert_same(own, found, 0.1)
        for i, (_, gradients) in enumerate((own, found)):
            errors[i] += sum((g.float() - exact[n]).square().sum() for n, g in gradients.items())
    assert errors[1].sqrt() <= 1.15 * errors[0].sqrt()


def test_what_is_kept_for_the_backward_pass():
    """Of a gated MLP gate and up alone, of a norm nothing but its input, of LoRA on a frozen base no input twice."""
    model, sizes = lively("qwen2", intermediate_size=4096, hidden_size=256), {}
    for name, tried in (("own", copy.deepcopy(model)), ("fused", model)):
        if name == "fused":
            fuse(tried)
        kept: dict[int, int] = {}
        alive = []

        def pack(tensor, kept=kept, alive=alive):
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tried(**batch(), use_cache=False)
        weights = {p.untyped_storage().data_ptr() for p in tried.parameters()}
        sizes[name] = sum(size for at, size in kept.items() if at not in weights)
    tokens = sum(len(d["input_ids"]) for d in documents())
    gated = 2 * tokens * 4096 * 4  # two values of each layer's MLP
    assert 2 * gated <= sizes["fused"] < 2 * gated * 1.3
    assert sizes["own"] - sizes["fused"] >= 2 * gated


def test_a_frozen_base_without_adapters_keeps_no_input():
    x = torch.randn(4, 6, requires_grad=True)
    parts = [Projection(torch.randn(3, 6)), Projection(torch.randn(2, 6), torch.randn(2))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        project(x, parts)
    assert kept == [(3, 6), (2, 6)]


def test_by_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight = random(2, 3, 4), random(4)
    for shifted in (False, True):
        assert torch.autograd.gradcheck(lambda x, w, s=shifted: rms_norm(x, w, 1e-6, shifted=s), (x, weight))
    angles = random(1, 1, 3, 2).detach().repeat(1, 1, 1, 2)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), (random(2, 2, 3, 4),))
    first, second = [random(5, 4), random(5), random(2, 4), random(5, 2)], [random(3, 4)]
    assert torch.autograd.gradcheck(
        lambda x, *t: project(x, [Projection(*t[:4], 0.7), Projection(t[4])]), (x, *first, *second)
    )
    gate, down = (
        [random(5, 4), random(5), random(2, 4), random(5, 2)],
        [random(4, 5), None, random(2, 5), random(4, 2)],
    )
    for activation in (SILU, GELU_TANH):
        assert torch.autograd.gradcheck(
            lambda x, u, *t, a=activation: gated_mlp(
                x, Projection(*t[:4], 0.7), Projection(u), Projection(t[4], None, *t[5:], 1.3), a
            ),
            (x, random(5, 4), *gate, *(t for t in down if t is not None)),
        )


def test_norm_by_hand():
    """x = (3, 4): mean x² = 12.5, so x / √12.5 = (0.8485, 1.1314), times the weight (2, 10)."""
    made = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 10.0]), 0.0)
    assert made.tolist() == pytest.approx([1.6971, 11.3137], abs=1e-4)


def test_checkpointed_layers():
    model = lively("qwen2")
    fuse(model)
    states = torch.randn(1, 5, 32, requires_grad=True)
    layer = model.model.layers[0].mlp
    layer(states).square().sum().backward()
    expected, states.grad = states.grad, None
    checkpoint(layer, states, use_reentrant=False).square().sum().backward()
    assert torch.equal(states.grad, expected)


def test_generation_and_its_cache_are_the_models_own():
    model = lively("qwen2", attention.NAME)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    fuse(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


class Casts(TorchDispatchMode):
    """Counts casts of matrices."""

    many = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.many += func is torch.ops.aten._to_copy.default and args[0].dim() == 2
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("adapter", [False, True])
def test_steps_of_generation_cast_no_weight_twice(adapter):
    """Autocast keeps what it has cast of trained weights while it lasts; the head's comes first, with the prompt."""
    model = lively("qwen2")
    model = adapted(model).requires_grad_() if adapter else model
    counts = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
            model(torch.tensor([[6]]), past_key_values=cache)
            with Casts() as casts:
                for _ in range(3):
                    model(torch.tensor([[7]]), past_key_values=cache)
        counts.append(casts.many)
        fuse(model)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("how", ["off", "dropout", "dora", "two adapters", "merged"])
def test_what_is_not_plain_goes_the_layers_own_way(how):
    """Each gives what the model would give without fused layers."""
    options = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(how, {})
    model = adapted(lively("qwen2"), **options)
    if how == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if how == "merged":
        model.merge_adapter()
    model.train()

    def logits():
        torch.manual_seed(1)
        if how != "off":
            return model(**batch(), use_cache=False).logits
        with model.disable_adapter():
            return model(**batch(), use_cache=False).logits

    expected = logits().detach()
    fuse(model)
    assert torch.allclose(logits(), expected, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "name",
    ["mlp.act_fn", "mlp.down_proj.lora_B.default", "self_attn.q_proj.lora_A.default", "self_attn.o_proj"],
)
@pytest.mark.parametrize("backward", [False, True])
def test_hooks_are_called_wherever_they_are(name, backward, late):
    model, seen = adapted(lively("qwen2")), []
    layer = model.base_model.model.model.layers[0]
    if late:
        fuse(model)
    inner = layer.get_submodule(name)
    hook = inner.register_full_backward_hook if backward else inner.register_forward_hook
    hook(lambda *a: seen.append(1))
    assert late or fuse(model) == 8
    assert not seen  # by the trial
    run(model, batch())
    assert len(seen) == 1


@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_linear_layers_are_called(late):
    model, seen = lively("qwen2"), []
    if late:
        fuse(model)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: seen.append(1))
    assert late or fuse(model) == 8
    assert not seen
    run(model, batch())
    assert len(seen) == 1


def test_a_layer_that_does_more_is_left_alone(monkeypatch):
    model = lively("qwen2")
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 1.01)
    expected = run(model, batch())
    assert fuse(model) == 9 - 2
    assert_same(expected, run(model, batch()), 1e-5)


@pytest.mark.parametrize(
    "made", [lambda t: (t, t), lambda t: [t, None], lambda t: t, lambda t: (t, None, None)]
)
def test_a_layer_that_gives_other_things_back_is_left_alone(made, monkeypatch):
    model = lively("qwen2")
    kind = type(model.model.layers[0].self_attn)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: made(own(self, *a, **k)[0]))
    assert fuse(model) == 9 - 2


@pytest.mark.parametrize(
    "kind,told",
    [("mistral", {4}), ("qwen2", {4, None}), ("phimoe", {None}), ("qwen2_moe", {None}), ("llama", {None})],
)
def test_windows_are_told_where_the_layer_tells_them(kind, told, monkeypatch):
    """qwen2's layers differ in it; Phi-MoE's and Qwen2-MoE's leave it to the mask."""
    fields = {"sliding_window": 4} if kind != "llama" else {}
    if kind.startswith("qwen2"):
        fields |= {"use_sliding_window": True, "max_window_layers": 1}
    model, seen = model_of(kind, "sdpa", **fields), []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args, **kwargs):
        seen.append(kwargs.get("sliding_window"))
        return sdpa(*args, **kwargs)

    fuse(model)
    assert all(hasattr(layer.self_attn, "plain") for layer in model.model.layers)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    run(model, batch())
    assert set(seen) == told and len(seen) == 2


def test_kernels_that_take_halves_alone_are_not_tried():
    """flash attention under autocast on weights in fp32."""

    def attend(module, query, *args, **kwargs):
        assert query.dtype == torch.bfloat16
        return sdpa(module, query, *args, **kwargs)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend  # of this instance, which is to keep it
    try:
        model = model_of("qwen2", "sdpa")
        assert fuse(model) == 9
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


MLP_AND_ATTENTION, MLP, NOTHING = (True, True), (True, False), (False, False)


@pytest.mark.parametrize(
    "kind,expected",
    [(kind, MLP_AND_ATTENTION) for kind in ("qwen2", "llama", "mistral", "qwen3", "gemma", "granite")]
    + [(kind, MLP) for kind in ("cohere", "olmo2", "smollm3", "ernie4_5", "exaone4", "gemma3_text", "gemma2")]
    + [(kind, NOTHING) for kind in ("phi3", "qwen2_moe", "glm4_moe", "mixtral", "nanochat", "starcoder2")],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_known_of_an_outline_is_what_is_fused(kind, expected, adapter):
    fields = {"head_dim": 8} if kind != "cohere" else {}
    implementation = "eager" if kind == "gemma2" else "sdpa"
    with torch.device("meta"):
        outline = model_of(kind, implementation, **fields)
        outline = adapted(outline) if adapter and "moe" not in kind and kind != "mixtral" else outline
    assert known_parts(outline) == expected
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    model = model_of(kind, implementation, **fields)
    fuse(model)
    assert known_parts(model) == expected
    fused = [m for m in model.modules() if hasattr(m, "plain")]
    if expected != NOTHING:
        assert sum(hasattr(m, "gate_proj") for m in fused) == 2
        assert sum(hasattr(m, "q_proj") for m in fused) == 2 * expected[1]


def test_eager_attention_is_not_known():
    model = model_of("qwen2", "sdpa")
    assert known_parts(model) == MLP_AND_ATTENTION
    model.config._attn_implementation = "eager"  # as `recipe_of` has it for a run's outline
    assert known_parts(model) == MLP


def test_copies_pickles_and_weights():
    model = lively("qwen2")
    names = [*model.state_dict()]
    expected = model(**batch(), use_cache=False).logits
    fuse(model)
    assert fuse(model) == 0  # once is enough
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [*made.state_dict()] == names
        assert torch.allclose(made(**batch(), use_cache=False).logits, expected, atol=1e-5)
        mine, its = (m.model.layers[0].mlp for m in (model, made))
        assert type(its) is type(mine) and its.up_proj is not mine.up_proj


def test_outlines_have_no_weights_to_try():
    with torch.device("meta"):
        model = model_of("qwen2", "sdpa")
    assert fuse(model) == 0
