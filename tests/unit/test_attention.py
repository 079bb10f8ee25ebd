"""Packed batches are exact: a document's logits and gradients do not depend on what stands beside it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from hydratune import attention
from hydratune.data.collate import SFTCollator

SIZES = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LENGTHS = (5, 1, 9, 4)


def model_of(kind: str, implementation: str, **fields):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def documents() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 41, (n,), generator=generator).tolist()} for n in LENGTHS]


def unpacked(model) -> torch.Tensor:
    return torch.cat(
        [model(input_ids=torch.tensor([d["input_ids"]]), use_cache=False).logits[0] for d in documents()]
    )


@pytest.mark.parametrize(
    "kind,implementation",
    [(k, i) for k in ("qwen2", "llama") for i in ("sdpa", "eager", "flex_attention", attention.NAME)]
    + [("gemma2", "eager")],
)
@pytest.mark.parametrize("given", ["boundaries", "positions only"])
def test_packed_logits_and_gradients_equal_unpacked_ones(kind, implementation, given):
    fields = {"head_dim": 8} if kind == "gemma2" else {}
    if implementation == "flex_attention":
        fields = {"hidden_size": 64}  # its kernels want heads of 16 and more
    model = model_of(kind, implementation, **fields)
    model.requires_grad_(implementation != "flex_attention")
    packed = SFTCollator(pad_token_id=0, padding_free=True)(documents())
    packed.pop("labels")
    if given == "positions only":
        packed = {k: packed[k] for k in ("input_ids", "position_ids")}
    together = model(**packed, use_cache=False).logits[0]
    if implementation == "flex_attention":  # torch has its backward on GPUs alone
        assert torch.allclose(together, unpacked(model), atol=1e-5)
        return
    together.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = torch.cat(
        [model(input_ids=torch.tensor([d["input_ids"]]), use_cache=False).logits[0] for d in documents()]
    )
    alone.square().sum().backward()
    assert torch.allclose(together, alone, atol=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, atol=1e-4)


def test_a_mask_of_ones_would_mix_documents():
    """Why the collator sends no mask: with one, sdpa lets documents see each other."""
    model = model_of("qwen2", "sdpa")
    packed = SFTCollator(pad_token_id=0, padding_free=True)(documents())
    exact = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    mask = torch.ones_like(packed["input_ids"])
    mixed = model(
        input_ids=packed["input_ids"],
        position_ids=packed["position_ids"],
        attention_mask=mask,
        use_cache=False,
    ).logits
    assert not torch.allclose(exact, mixed, atol=1e-3)


def test_padded_batches_take_the_ordinary_path():
    batch = SFTCollator(pad_token_id=0)(documents())
    batch.pop("labels")
    ours, sdpa = (
        model_of("qwen2", name)(**batch, use_cache=False).logits for name in (attention.NAME, "sdpa")
    )
    kept = batch["attention_mask"].bool()
    assert torch.allclose(ours[kept], sdpa[kept], atol=1e-5)


def test_generation_is_that_of_sdpa():
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = (ids != 0).long()
    texts = [
        model_of("qwen2", name).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False
        )
        for name in (attention.NAME, "sdpa")
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "device,packed,config,expected",
    [
        ("cpu", False, ("qwen2", {}), "sdpa"),
        ("cpu", True, ("qwen2", {}), attention.NAME),
        ("cpu", True, ("llama", {}), attention.NAME),
        ("cpu", True, ("gemma2", {}), "eager"),
        ("cpu", False, ("gemma2", {}), "eager"),
        ("cpu", True, ("mistral", {"sliding_window": 16}), "sdpa"),
        ("mps", True, ("qwen2", {}), "sdpa"),
    ],
)
def test_auto_picks_the_fastest_exact_backend(device, packed, config, expected):
    kind, fields = config
    chosen = attention.choose(device, packed=packed, model=AutoConfig.for_model(kind, **fields))
    assert chosen == expected and attention.exact_when_packed(chosen)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "kind,expected",
    [(k, "eager") for k in ("openai-gpt", "gpt_neox_japanese", "codegen", "bloom", "xglm", "gptj")]
    + [("falcon", "sdpa")],
)
def test_auto_gives_models_with_attention_of_their_own_one_that_they_have(kind, expected, packed):
    config = AutoConfig.for_model(kind)
    assert not attention.obeyed(config)
    assert attention.choose("cpu", packed=packed, model=config) == expected


@pytest.mark.parametrize(
    "kind",
    [
        *("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3", "gemma3_text", "mistral", "mixtral", "phi", "phi3"),
        *("gpt_neox", "gpt2", "olmo2", "smollm3", "opt", "stablelm", "biogpt"),
    ],
)  # fmt: skip
def test_models_that_are_laid_end_to_end_obey(kind):
    assert attention.obeyed(AutoConfig.for_model(kind))


def test_a_config_of_several_models_has_a_backend():
    assert attention.choose("cpu", packed=False, model=AutoConfig.for_model("funnel")) == "eager"


def test_the_class_of_a_model_is_known_where_its_config_tells_none():
    """Code from outside transformers, also in an adapter."""

    class OwnConfig(Qwen2Config):
        pass

    config = OwnConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))
    model.config = config
    assert not attention.obeyed(config) and attention.choose("cpu", packed=True, model=config) == "sdpa"
    assert attention.obeyed(model) and attention.choose("cpu", packed=True, model=model) == attention.NAME
    assert attention.obeyed(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))


def test_auto_on_a_gpu(monkeypatch):
    config = AutoConfig.for_model("qwen2")
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert attention.choose("cuda", packed=True, model=config) == "flash_attention_2"
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    assert attention.choose("cuda", packed=True, model=config) == attention.NAME


def test_backends_that_are_not_known_to_be_exact():
    assert not attention.exact_when_packed("mine")
    assert attention.exact_when_packed("flash_attention_2")


def test_what_the_backend_cannot_do_is_an_error_not_a_wrong_number():
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="sliding"):
        attention._attend(SimpleNamespace(), query, query, query, None, sliding_window=2)


def by_document(query, key, value, boundaries, scale):
    edges = boundaries.tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1)[None] for t in (query, key, value)), is_causal=True, scale=scale
        )[0].transpose(0, 1)
        for a, b in pairwise(edges)
    ]
    return torch.cat(parts)


def old_signature(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal and max_q == 9
    return by_document(query, key, value, cu_seq_q, None)


def new_signature(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return by_document(query, key, value, cu_seq_q, scale)


@pytest.mark.parametrize("kernel", [old_signature, new_signature])
def test_torchs_varlen_kernel_is_called_as_its_version_wants(kernel, monkeypatch):
    monkeypatch.setattr(attention, "_varlen", lambda: kernel)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, 2, 2))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    ours = attention._torch_varlen(query, key, value, boundaries, boundaries, (None, None), 0.5)
    wanted, _ = attention._attend(
        SimpleNamespace(), query, key, value, None, scaling=0.5, cu_seq_lens_q=boundaries
    )
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_several_packed_rows_keep_their_documents_apart():
    """Two rows, packed differently, no mask: each as sdpa has it with its block mask."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 0, 1]])
    ids = torch.arange(3, 19).reshape(2, 8)
    found = {}
    for implementation in ("sdpa", attention.NAME):
        model = model_of("qwen2", implementation)
        found[implementation] = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(found["sdpa"], found[attention.NAME], atol=1e-5)
    alone = model(input_ids=ids[:1, 3:], position_ids=positions[:1, 3:], use_cache=False).logits
    assert torch.allclose(found["sdpa"][0, 3:], alone[0], atol=1e-5)


def test_a_row_that_does_not_count_from_zero_has_its_boundaries():
    assert attention._boundaries(torch.tensor([[5, 6, 7, 0, 1]]), 5).tolist() == [0, 3, 5]
    assert attention._boundaries(torch.tensor([[5, 6, 7, 8, 9]]), 5) is None
    model, plain = model_of("llama", attention.NAME), model_of("llama", "sdpa")
    given = {
        "input_ids": torch.arange(3, 8)[None],
        "position_ids": torch.tensor([[5, 6, 7, 0, 1]]),
        "use_cache": False,
    }
    assert torch.allclose(model(**given).logits, plain(**given).logits, atol=1e-5)


def test_chunked_attention_keeps_its_mask():
    fields = {
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "head_dim": 8,
        "layer_types": ["chunked_attention"] * 2,
    }
    ids = torch.arange(3, 15)[None]
    own, plain = (
        model_of("llama4_text", i, **fields)(input_ids=ids, use_cache=False).logits
        for i in (attention.NAME, "sdpa")
    )
    assert torch.allclose(own, plain, atol=1e-5)


def test_under_autocast_the_kernel_gets_half_precision(monkeypatch):
    """A rotary embedding in fp32 makes queries and keys fp32 again, which the varlen kernel on a GPU does not take."""
    model, seen = model_of("qwen2", attention.NAME), []
    inner = F.scaled_dot_product_attention

    def watched(query, key, value, *args, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return inner(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    packed = SFTCollator(pad_token_id=0, padding_free=True)(documents())
    packed.pop("labels")
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed, use_cache=False)
    assert set(seen) == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_a_row_with_boundaries_needs_no_mask(kind, monkeypatch):
    """The word that no mask is needed changes no logits, and transformers does not look whether positions restart."""
    from transformers import masking_utils

    model = model_of(kind, attention.NAME)
    packed = SFTCollator(pad_token_id=0, padding_free=True)(documents())
    packed.pop("labels")
    expected = model(**packed, use_cache=False).logits
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: pytest.fail("it looked"))
    told = attention.unmasked(packed, model.config)
    assert torch.equal(model(**told, use_cache=False).logits, expected)


def test_the_word_that_no_mask_is_needed_is_not_given_where_it_is():
    packed = SFTCollator(pad_token_id=0, padding_free=True)(documents())
    padded = SFTCollator(pad_token_id=0)(documents())
    ours = model_of("qwen2", attention.NAME).config
    sliding = model_of(
        "qwen2", attention.NAME, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    experts = AutoConfig.for_model("mixtral")
    experts._attn_implementation = attention.NAME
    for inputs, config in (
        (padded, ours), (packed, model_of("qwen2", "sdpa").config), (packed, sliding.config), (packed, experts),
    ):  # fmt: skip
        assert attention.unmasked(inputs, config) is inputs
