"""Rollouts: greedy is transformers' own, sampling has the right distribution, and neither depends on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hydratune import attention, columns, rollout
from hydratune.draw import draw
from hydratune.errors import UserError
from hydratune.rollout import Sampling, generate

SIZES = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
LENGTHS = (5, 1, 9, 4, 4, 12, 3)
STOP = 2
SLIDING = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
GREEDY = Sampling(24, temperature=0, stop_token_ids=(STOP,))
SAMPLED = Sampling(24, stop_token_ids=(STOP,))


def model_of(kind: str = "qwen2", implementation: str = "sdpa", **fields):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 41, (n,), generator=generator).tolist() for n in lengths]


def theirs(model, prompts, sampling: Sampling = GREEDY) -> list[list[int]]:
    """Greedy completions of `model.generate`, each prompt alone, so that its padding has no part."""
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.max_new_tokens,
            do_sample=False, eos_token_id=list(sampling.stop_token_ids) or None, pad_token_id=0,
        )  # fmt: skip
        made.append(output[0, len(prompt) :].tolist())
    return made


def lists(completions) -> list[list[int]]:
    return [ids.tolist() for ids in completions.ids]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "kind,implementation,fields",
    [
        ("qwen2", "sdpa", {}),
        ("qwen2", "eager", {}),
        ("qwen2", attention.NAME, {}),
        ("llama", "sdpa", {}),
        ("llama", attention.NAME, {}),
        ("gemma", "sdpa", {"head_dim": 8}),
        ("gemma2", "eager", {"head_dim": 8, "sliding_window": 6}),
        ("gemma3_text", "sdpa", SLIDING),
        ("mistral", "sdpa", {"sliding_window": 6}),
        ("mistral", "eager", {"sliding_window": 6}),
        ("qwen2", "sdpa", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("gpt2", "sdpa", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("lfm2", "sdpa", {"layer_types": ["conv", "full_attention"]}),  # not our columns but its own cache
    ],
)
def test_greedy_is_that_of_transformers(kind, implementation, fields, monkeypatch):
    monkeypatch.setattr(columns, "ROOM", 7)  # the cache grows several times, and moves its windows
    model = model_of(kind, implementation, **fields)
    prompts = prompts_of()
    expected = theirs(model, prompts)
    for batch_size in (None, 3, 1):
        made = generate(model, prompts, GREEDY, batch_size=batch_size)
        assert lists(made) == expected
        assert made.stopped.tolist() == [ids[-1] == STOP for ids in expected]
        assert made.logps is None
    assert len({len(ids) for ids in expected}) > 1 or kind.startswith("gemma")  # some stop, some are cut


@pytest.mark.parametrize("padding", [0, 5, 10**9])
def test_chunks_of_the_prefill_do_not_matter(padding, monkeypatch):
    model, prompts = model_of(**SLIDING, kind="gemma3_text"), prompts_of()
    monkeypatch.setitem(rollout._PADDING, "cpu", padding)
    assert lists(generate(model, prompts, GREEDY, copies=2))[::2] == theirs(model, prompts)


@pytest.mark.parametrize("kept,look", [(0.0, 1), (1.0, 1), (0.8, 8), (1.0, 5)])
def test_leaving_rows_and_rare_looks_do_not_matter(kept, look, monkeypatch):
    model, prompts = model_of(), prompts_of()
    expected = lists(generate(model, prompts, SAMPLED, copies=3, generator=seeded()))
    monkeypatch.setattr(rollout, "_KEPT", kept)
    monkeypatch.setitem(rollout._LOOK, "cpu", look)
    assert lists(generate(model, prompts, SAMPLED, copies=3, generator=seeded())) == expected
    assert len({len(ids) for ids in expected}) > 3


def test_generation_ends_with_the_last_stop():
    model, calls = model_of(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompt = next(p for p, c in zip(prompts_of(), theirs(model, prompts_of()), strict=True) if c[-1] == STOP)
    expected = theirs(model, [prompt])[0]
    calls.clear()
    assert lists(generate(model, [prompt], GREEDY)) == [expected]
    assert len(calls) == len(expected)


def test_copies_are_prefilled_once_and_equal_separate_ones():
    model, prompts = model_of(), prompts_of()
    alone = lists(generate(model, prompts, GREEDY))
    sizes = []
    model.model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    made = generate(model, [*prompts, prompts[2]], GREEDY, copies=4)
    assert lists(made) == [ids for ids in [*alone, alone[2]] for _ in range(4)]
    prefilled = [shape for shape in sizes if shape[1] > 1]
    assert sum(rows for rows, _ in prefilled) == len(
        prompts
    )  # the repeated prompt, and copies, are not there twice


def test_sampling_does_not_depend_on_batches_and_what_else_is_there():
    model, prompts = model_of(), prompts_of()
    expected = generate(model, prompts, SAMPLED, copies=2, generator=seeded())
    for batch_size in (1, 3, 5):
        made = generate(model, prompts, SAMPLED, copies=2, batch_size=batch_size, generator=seeded())
        assert lists(made) == lists(expected)
        for a, b in zip(made.logps, expected.logps, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert lists(generate(model, prompts[:3], SAMPLED, copies=2, generator=seeded())) == lists(expected)[:6]
    assert lists(generate(model, prompts, SAMPLED, copies=2, generator=seeded(1))) != lists(expected)
    pairs = [expected.ids[i].tolist() != expected.ids[i + 1].tolist() for i in range(0, 14, 2)]
    assert all(pairs)  # copies differ


def test_torch_seed_without_a_generator():
    model, prompts = model_of(), prompts_of()
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(lists(generate(model, prompts, SAMPLED)))
    assert runs[0] == runs[1] != runs[2]


def test_nothing_after_the_stop_token():
    sampling = Sampling(24, stop_token_ids=(STOP, 7, 9))
    made = generate(model_of(), prompts_of(), sampling, copies=8, generator=seeded())
    for ids, stopped, logps in zip(made.ids, made.stopped, made.logps, strict=True):
        stops = np.isin(ids, sampling.stop_token_ids)
        assert not stops[:-1].any() and stops[-1] == stopped
        assert stopped or len(ids) == 24
        assert len(logps) == len(ids) and ids.dtype == np.int64
    assert made.stopped.sum() > 0
    endless = generate(model_of(), prompts_of(), Sampling(24), generator=seeded())
    assert {len(ids) for ids in endless.ids} == {24} and not endless.stopped.any()


@pytest.mark.parametrize("top_k", [None, 5])
def test_logps_are_those_of_a_forward_pass(top_k):
    model, prompts = model_of(), prompts_of()
    sampling = Sampling(12, temperature=0.7, top_k=top_k, vocab_size=30, stop_token_ids=(STOP,))
    made = generate(model, prompts, sampling, generator=seeded())
    for prompt, ids, logps in zip(prompts, made.ids, made.logps, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]
        np.testing.assert_allclose(logps, expected.numpy(), atol=1e-4)
        assert ids.max() < 30


def expected_distribution(logits: torch.Tensor, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """Written with plain loops: top_k, then the nucleus of what is left, then min_p."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()[:top_k]
    total, mass, kept = sum(p[i].item() for i in order), 0.0, []
    for i in order:
        if mass < top_p * total:
            kept.append(i)
        mass += p[i].item()
    kept = [i for i in kept if p[i] >= (min_p or 0) * p[order[0]]]
    cut = torch.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()


@pytest.mark.parametrize("size", [7, 300, 3000])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.2},
        {"top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    ],
)
def test_tokens_have_the_distribution_of_the_logits(size, cuts):
    rows = 40_000
    logits = 3 * torch.randn(size, generator=seeded(5))
    ids, logps = draw(
        logits.expand(rows, -1), torch.rand(rows, dtype=torch.float64, generator=seeded(6)), **cuts
    )
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": None} | cuts
    expected = expected_distribution(logits, **settings)
    counts = torch.bincount(ids, minlength=size).double()
    assert not counts[expected == 0].any()
    often = expected * rows >= 5
    observed, hoped = counts[often], expected[often] * rows
    statistic = ((observed - hoped).square() / hoped).sum().item()
    freedom = max(int(often.sum()) - 1, 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5  # five standard deviations of chi-square
    full = (logits / settings["temperature"]).log_softmax(-1)
    torch.testing.assert_close(logps, full[ids], atol=1e-5, rtol=1e-5)


def test_draws_at_the_ends_of_the_unit_interval():
    logits = torch.full((3, 600), -float("inf"))
    logits[:, [10, 400]] = 0.0
    uniform = torch.tensor([0.0, 0.499999, 1 - 2.0**-53], dtype=torch.float64)
    for cuts in ({}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.5}):
        assert set(draw(logits, uniform, **cuts)[0].tolist()) <= {10, 400}
    assert draw(logits, uniform)[0].tolist() == [10, 10, 400]


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight[20:] *= 10
    for temperature in (0.0, 1.0):
        made = generate(model, prompts_of(), Sampling(16, temperature, vocab_size=20), generator=seeded())
        assert max(ids.max() for ids in made.ids) < 20
        free = generate(model, prompts_of(), Sampling(16, temperature), generator=seeded())
        assert max(ids.max() for ids in free.ids) >= 20


def test_modes_and_checkpointing_come_back_and_training_goes_on():
    model = model_of(attention_dropout=0.5)
    expected = lists(generate(model, prompts_of(), GREEDY))
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = [m.training for m in model.modules()]
    checkpointed = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    assert lists(generate(model, prompts_of(), GREEDY)) == expected
    assert [m.training for m in model.modules()] == modes
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == checkpointed
    assert True in checkpointed
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompts_of(), GREEDY)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_training_after_generation(rope):
    """A dynamic rope keeps tensors from the forward pass; ones made in inference mode would fail here."""
    parameters = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 2.0}
    model = model_of("llama", max_position_embeddings=64, rope_parameters=parameters)
    generate(model, prompts_of(), Sampling(50), generator=seeded())
    ids = torch.tensor(prompts_of((6,)))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_context_cuts_each_row_for_itself():
    model = model_of(max_position_embeddings=14)
    made = generate(model, prompts_of(), Sampling(10, 0), copies=2)
    assert [len(ids) for ids in made.ids[::2]] == [min(10, 14 - n) for n in LENGTHS]
    assert lists(made)[::2] == lists(generate(model, prompts_of(), Sampling(10, 0), batch_size=1))
    learned = model_of("gpt2", n_embd=32, n_layer=2, n_head=4, max_position_embeddings=14)
    made = generate(learned, prompts_of(), Sampling(10, 0))
    assert [len(ids) for ids in made.ids] == [min(10, 14 - n) for n in LENGTHS]


def test_errors_name_the_rows_and_values():
    model = model_of(max_position_embeddings=9)
    with pytest.raises(UserError) as caught:
        generate(model, [[5], [], list(range(3, 12)), list(range(3, 11))], GREEDY, copies=0)
    text = str(caught.value)
    assert "prompt 1: is empty" in text and "prompt 2: its 9 tokens" in text and "copies = 0" in text
    assert "prompt 0" not in text and "prompt 3" not in text
    with pytest.raises(UserError) as caught:
        generate(model, [[]] * 30, GREEDY)
    assert len(caught.value.violations) == 11
    with pytest.raises(UserError) as caught:
        Sampling(0, temperature=-1, top_k=0, top_p=0, min_p=2, vocab_size=0, pad_token_id=-1)
    assert len(caught.value.violations) == 7


def test_no_prompts():
    made = generate(model_of(), [], SAMPLED)
    assert made.ids == [] and made.logps == [] and made.stopped.shape == (0,)


def test_lora_is_part_of_the_policy():
    from peft import LoraConfig, get_peft_model

    base = model_of()
    plain = lists(generate(base, prompts_of(), GREEDY))
    torch.manual_seed(1)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    made = lists(generate(model, prompts_of(), GREEDY))
    model.eval()
    assert made == theirs(model, prompts_of()) != plain


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_come_before_every_prompt(kind):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    base = model_of(max_position_embeddings=33)
    plain = lists(generate(base, prompts_of(), GREEDY))
    torch.manual_seed(1)
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    made = lists(generate(model, prompts_of(), GREEDY, copies=2))[::2]
    short = [i for i, n in enumerate(LENGTHS) if n <= 4]
    assert [made[i] for i in short] == theirs(model, [prompts_of()[i] for i in short])
    assert made != plain
    assert max(len(c) + n for c, n in zip(made, LENGTHS, strict=True)) <= 28
