"""Reward models score as they do alone, on the tokens that they were trained on; what is none is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rewarding import (
    ANSWERS,
    ARCHITECTURE,
    QUESTIONS,
    TOKENS,
    alone,
    chat_rows,
    fails,
    ids_of,
    joined,
    judge,
    other_tokenizer,
    plain_rows,
    rewards,
    tree,
    wrong,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from hydratune import RewardConfig, RewardTrainer, attention
from hydratune.completions import Completions
from hydratune.data.builtin import arithmetic
from hydratune.data.tokenize_preference import PreferenceOptions, tokenize_preference
from hydratune.errors import TrainingFailed, UserError
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.reward_models import micro_batches, same_tokens, turn_end
from hydratune.rewards import Rewards, check_sources

# ------------------------------------------------------------------ reward models


@pytest.mark.parametrize("rows", [plain_rows(), chat_rows()], ids=["plain", "chat"])
@pytest.mark.parametrize(
    "attn,padding_free,free",
    [
        ("sdpa", None, False),
        ("sdpa", True, True),
        (attention.NAME, None, True),
        (attention.NAME, False, False),
    ],
)
def test_scores_are_those_of_the_model_on_each_row_alone(rows, attn, padding_free, free):
    model = tree(attn=attn)
    made = rewards(model, padding_free=padding_free)
    assert made._scorers[made.names[0]]._layout.padding_free is free
    scored = judge(made, rows)
    expected = alone(tree(), joined(rows))
    assert torch.allclose(scored.total, expected, atol=1e-5)
    assert expected.std() > 0.1 and scored.total.dtype == torch.float32


@pytest.mark.parametrize("own", [None, "same tokens", "other tokens"])
@pytest.mark.parametrize("rows", [plain_rows(), chat_rows()], ids=["plain", "chat"])
def test_a_model_reads_what_reward_models_are_trained_on(rows, own):
    """To the token: a score at another place than in training means nothing."""
    reader = {None: None, "same tokens": byte_tokenizer(), "other tokens": other_tokenizer()}[own]
    made = rewards(tree(), tokenizers=[reader])
    wrap = lambda a, row: a if isinstance(row["prompt"], str) else [{"role": "assistant", "content": a}]  # noqa: E731
    pairs = [
        {"prompt": row["prompt"], "chosen": wrap(a, row), "rejected": wrap(a + "!", row)}
        for row, a in zip(rows, ANSWERS, strict=True)
    ]
    trained, _ = tokenize_preference(
        Dataset.from_list(pairs), reader or TOKENS, PreferenceOptions("preference", None), where="pairs"
    )
    (scorer,) = made._scorers.values()
    read = scorer._tokens(Completions(rows, *ids_of(rows), TOKENS), "judge")
    assert [np.concatenate(parts).tolist() for parts in read] == [
        row["prompt_ids"] + row["chosen_ids"] for row in trained
    ]


@pytest.mark.parametrize("tail", ["", "\n", "\n\n"])
def test_what_a_template_writes_after_an_answer_is_read_too(tail):
    """Reward models learn their score at the last token of their template, whether or not that is the end of the turn."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}TAIL{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    ).replace("TAIL", tail)
    encode = lambda text: np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    rows, eos = chat_rows(), tokenizer.eos_token
    prompts = [encode(f"[user] {q}{eos}{tail}[assistant] ") for q in QUESTIONS]
    answers = [encode(a + eos) for a in ANSWERS]
    model = tree()
    scored = Rewards([model], policy_tokenizer=tokenizer, device="cpu")(rows, prompts, answers)
    whole = [
        tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": a}], tokenize=False)
        for row, a in zip(rows, ANSWERS, strict=True)
    ]
    assert all(text.endswith(eos + tail) for text in whole)
    assert torch.allclose(scored.total, alone(model, [encode(text) for text in whole]), atol=1e-5)


def test_a_cut_answer_is_read_as_it_is():
    prompts, completions = ids_of(chat_rows())
    cut = [ids[:-1] for ids in completions]
    scored = rewards(tree())(chat_rows(), prompts, cut)
    expected = alone(tree(), [np.concatenate(pair) for pair in zip(prompts, cut, strict=True)])
    assert torch.allclose(scored.total, expected, atol=1e-5)
    assert turn_end(other_tokenizer(template=False)).size == 0
    assert turn_end(TOKENS).tolist() == [TOKENS.eos_token_id, *TOKENS("\n")["input_ids"]]


@pytest.mark.parametrize("padding_free", [True, False])
def test_micro_batches_do_not_change_scores(padding_free):
    whole = judge(rewards(tree(attn=attention.NAME), padding_free=padding_free))
    for budget in (1, 120, 200):
        made = rewards(tree(attn=attention.NAME), padding_free=padding_free, token_budget=budget)
        assert torch.allclose(judge(made).total, whole.total, atol=1e-5)


def test_micro_batches_stay_within_the_budget():
    lengths = [3, 9, 1, 9, 4, 30]
    for padded in (True, False):
        groups = micro_batches(lengths, 20, padded=padded)
        assert sorted(i for group in groups for i in group) == list(range(6))
        for group in groups:
            sizes = [lengths[i] for i in group]
            used = max(sizes) * len(sizes) if padded else sum(sizes)
            assert used <= 20 or group == [5]
    # longest first: 30 | 9 + 9 | 4 · 3 (padded), and end to end 30 | 9 + 9 + nothing of 4 | 4 + 3 + 1
    assert micro_batches(lengths, 20, padded=True) == [[5], [1, 3], [4, 0, 2]]
    assert micro_batches(lengths, 23, padded=False) == [[5], [1, 3, 4], [0, 2]]


def test_a_directory_gives_the_scores_of_the_instance_and_its_name(tmp_path):
    model = tree()
    for folder in ("judge", "run7/model"):
        model.save_pretrained(tmp_path / folder)
        TOKENS.save_pretrained(tmp_path / folder)
    made = rewards(str(tmp_path / "judge"), str(tmp_path / "run7"), str(tmp_path / "run7" / "model"))
    assert made.names == ("judge", "run7", "run7_2")
    scored = judge(made)
    for name in made.names:
        assert torch.allclose(scored.each[name], alone(model, joined(chat_rows())), atol=1e-5)
    assert [*made.models] == ["judge", "run7", "run7_2"]
    assert not any(p.requires_grad for m in made.models.values() for p in m.parameters())


def test_an_adapter_of_a_reward_run_scores_as_it_was_trained(tmp_path):
    """The head is the trained one, also when the run directory was moved."""
    recipe = ModelRecipe(
        architecture=ARCHITECTURE | {"model_type": "qwen2"},
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"),
        task="reward",
    )
    options = RewardConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list(arithmetic(16, 3, "preference")).remove_columns("answer")
    trainer = RewardTrainer(args=options, train_dataset=rows, processing_class=TOKENS, recipe=recipe)
    before = alone(trainer.model.eval(), joined(chat_rows()))
    trainer.train()
    run = tmp_path / "first" / "run"
    recipe.build(adapter=False).save_pretrained(run / "base")
    trainer.model.peft_config["default"].base_model_name_or_path = str(run / "base")
    trainer.save_model(str(run / "model"))
    expected = alone(trainer.model.eval(), joined(chat_rows()))
    assert (expected - before).abs().min() > 1e-3
    assert torch.allclose(judge(rewards(str(run))).total, expected, atol=1e-5)
    moved = shutil.move(run, tmp_path / "moved")
    for place in (moved, Path(moved) / "model"):
        assert not check_sources([str(place)], columns=["prompt"])
        made = rewards(str(place))
        assert made.names == ("moved",)
        assert torch.allclose(judge(made).total, expected, atol=1e-5)


def test_an_encoder_gives_its_own_logit(tmp_path):
    config = AutoConfig.for_model(
        "bert", vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.classifier.weight.data.normal_()
    model.save_pretrained(tmp_path / "bert")
    TOKENS.save_pretrained(tmp_path / "bert")
    made = rewards(str(tmp_path / "bert"), token_budget=200)
    assert torch.allclose(judge(made).total, alone(model, joined(chat_rows())), atol=1e-5)


def test_another_tokenizer_reads_conversations_through_its_own_template(tmp_path):
    other, model = other_tokenizer(), tree()
    model.save_pretrained(tmp_path / "judge")
    other.save_pretrained(tmp_path / "judge")
    texts = [f"[user] {q}</s>[assistant] {a}</s>" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    expected = alone(model, [other(t)["input_ids"] for t in texts])
    assert torch.allclose(judge(rewards(str(tmp_path / "judge"))).total, expected, atol=1e-5)
    given = rewards(model, tokenizers=[other])
    assert torch.allclose(judge(given).total, expected, atol=1e-5)
    messages = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": "the reference"}]}
        for row in chat_rows()
    ]
    assert torch.allclose(given(messages, *ids_of(chat_rows())).total, expected, atol=1e-5)
    assert (
        expected - judge(rewards(tree())).total
    ).abs().max() > 0.1  # the policy's ids would give something else


def test_another_tokenizer_reads_text_and_ends_what_the_policy_ended():
    other, model = other_tokenizer(template=False), tree()
    prompts, completions = ids_of(plain_rows())
    completions[1] = completions[1][:-1]  # cut: no EOS
    texts = [q + a + "</s>" * (i != 1) for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))]
    expected = alone(model, [other(t)["input_ids"] for t in texts])
    made = rewards(model, tokenizers=[other])
    assert torch.allclose(made(plain_rows(), prompts, completions).total, expected, atol=1e-5)
    bare = [{"prompt_ids": p} for p in prompts]  # rows that were tokenised before
    assert torch.allclose(made(bare, prompts, completions).total, expected, atol=1e-5)


def test_mixed_rows_keep_their_order():
    other, model = other_tokenizer(), tree()
    rows = [a if i % 2 else b for i, (a, b) in enumerate(zip(plain_rows(), chat_rows(), strict=True))]
    texts = [
        f"{q}{a}</s>" if i % 2 else f"[user] {q}</s>[assistant] {a}</s>"
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    scored = judge(rewards(model, tokenizers=[other]), rows)
    assert torch.allclose(scored.total, alone(model, [other(t)["input_ids"] for t in texts]), atol=1e-5)


def test_tools_reach_the_template():
    other, model = other_tokenizer(), tree()
    other.chat_template = "{{ tools | tojson if tools else 'none' }}" + other.chat_template
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [dict(row, tools=[None, json.dumps(tools), tools][i % 3]) for i, row in enumerate(chat_rows())]
    texts = [
        other.apply_chat_template(
            [*row["prompt"], {"role": "assistant", "content": a}],
            tools=tools if i % 3 else None,
            tokenize=False,
        )
        for i, (row, a) in enumerate(zip(rows, ANSWERS, strict=True))
    ]
    assert len({t.split("[user]")[0] for t in texts}) == 2
    scored = judge(rewards(model, tokenizers=[other]), rows)
    assert torch.allclose(scored.total, alone(model, [other(t)["input_ids"] for t in texts]), atol=1e-5)


def test_tokenizers_are_the_same_by_vocabulary_and_ends():
    renamed = byte_tokenizer()
    assert same_tokens(TOKENS, renamed)
    renamed.pad_token = renamed.eos_token  # pads are never read
    assert same_tokens(TOKENS, renamed)
    renamed.eos_token = "<|endoftext|>"
    assert not same_tokens(TOKENS, renamed)
    assert not same_tokens(TOKENS, other_tokenizer())


def test_a_model_that_saves_bf16_is_loaded_so_unless_told_otherwise(tmp_path):
    tree().to(torch.bfloat16).save_pretrained(tmp_path / "judge")
    TOKENS.save_pretrained(tmp_path / "judge")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        made = rewards(str(tmp_path / "judge"), dtype=dtype)
        assert made.models["judge"].dtype == expected
        assert judge(made).total.dtype == torch.float32


def test_what_is_no_reward_model_is_refused(tmp_path):
    tree("causal_lm").save_pretrained(tmp_path / "causal")
    for said in (wrong(str(tmp_path / "causal")), wrong(tree("causal_lm"))):
        assert "ForCausalLM" in said and "trained score head" in said and "algo=reward" in said
    for labels in (2, 3):
        tree(labels=labels).save_pretrained(tmp_path / f"many{labels}")
        for said in (wrong(str(tmp_path / f"many{labels}")), wrong(tree(labels=labels))):
            assert f"{labels} labels" in said and "one score" in said
    with pytest.raises(UserError, match="ForCausalLM"):
        rewards(str(tmp_path / "causal"))
    with pytest.raises(UserError, match="no sequence-classification"):
        rewards(torch.nn.Linear(2, 1))


def test_a_head_that_was_never_trained_is_refused(tmp_path):
    """The config says classification, the weights do not have the head; an adapter without its head; a causal one."""
    tree("causal_lm").save_pretrained(tmp_path / "causal")
    tree().save_pretrained(tmp_path / "empty")
    shutil.copy(tmp_path / "causal" / "model.safetensors", tmp_path / "empty")
    assert not check_sources([str(tmp_path / "empty")], columns=["prompt"])  # weights are not read there
    with pytest.raises(UserError, match=r"(?s)lack score\.weight.*reward noise"):
        rewards(str(tmp_path / "empty"))

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=1)
    base.name_or_path = str(tmp_path / "causal")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    TOKENS.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(  # a whole one on a causal base is fine
        judge(rewards(str(tmp_path / "adapter"))).total, alone(model.eval(), joined(chat_rows())), atol=1e-5
    )
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path)
    with pytest.raises(UserError, match=r"adapter holds no score"):
        rewards(str(tmp_path / "adapter"))

    causal = get_peft_model(
        tree("causal_lm"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    causal.save_pretrained(tmp_path / "causal_adapter")
    assert "CAUSAL_LM" in wrong(str(tmp_path / "causal_adapter"))


def test_directories_that_hold_no_model_are_refused(tmp_path):
    assert "no such directory" in wrong(str(tmp_path / "nowhere"))
    assert "no such directory" in wrong("./nowhere")
    assert "neither a dotted path nor a directory" in wrong("nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor" in wrong(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{ not json")
    assert "no readable JSON" in wrong(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "names no architecture" in wrong(str(tmp_path / "empty"))
    tree().save_pretrained(tmp_path / "gone")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        rewards(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="cannot be loaded"):
        rewards("nobody/has-such-a-model")


def test_another_vocabulary_needs_a_tokenizer(tmp_path):
    for size in (200, 300):
        with pytest.raises(UserError, match=r"(?s)another vocabulary.*tokenizers="):
            rewards(tree(vocab_size=size))
        tree(vocab_size=size).save_pretrained(tmp_path / f"judge{size}")
        with pytest.raises(UserError, match="another vocabulary"):
            rewards(str(tmp_path / f"judge{size}"))
    with pytest.raises(UserError, match=r"embeds 200 tokens, its tokenizer has 25\d"):
        rewards(tree(vocab_size=200), tokenizers=[other_tokenizer()])
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        rewards(tree(), tokenizers=[str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="2 tokenizers for 1 rewards"):
        rewards(tree(), tokenizers=[None, None])


def test_what_a_model_cannot_score_names_the_row():
    rows = chat_rows()
    rows[3]["prompt"] = [{"role": "user", "content": "long " * 60}]
    assert "256 positions" in (said := fails(tree(), rows=rows)) and 'row 4 of 5 ("long long' in said
    broken = tree()
    broken.score.weight.data.fill_(float("nan"))
    assert "gave nan for row 1 of 5" in fails(broken)
    with pytest.raises(TrainingFailed, match="no token of row 2 of 2"):
        rewards(tree())(
            plain_rows()[:2], [np.array([5]), np.array([], int)], [np.array([7]), np.array([], int)]
        )
    assert "no chat template" in fails(tree(), UserError, tokenizers=[other_tokenizer(template=False)])
    picky = other_tokenizer()
    picky.chat_template = "{% if 'colour' in messages[0].content %}{{ raise_exception('no') }}{% endif %}x"
    assert "cannot read row 5 of 5" in fails(tree(), tokenizers=[picky])
