"""Rewards: functions, reward models and the verifier give the numbers they should, and say what is wrong when they cannot."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

from hydratune import RewardConfig, RewardTrainer, attention
from hydratune.completions import Completions, asked
from hydratune.data.builtin import arithmetic
from hydratune.data.tokenize_preference import PreferenceOptions, tokenize_preference
from hydratune.errors import TrainingFailed, UserError
from hydratune.held import in_child
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.reward_models import micro_batches, same_tokens, turn_end
from hydratune.reward_sources import unique
from hydratune.rewards import Rewards, check_sources, correct

ARCHITECTURE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TOKENS = byte_tokenizer()
QUESTIONS = ["What is 1 + 1?", "Say hi.", "What is 20 + 22, and why is it so?", "?", "Name a colour, please."]
ANSWERS = ["2", "hi hi", "It is 42", "what", "Blue is one of them"]


def tree(kind: str = "reward", *, labels: int = 1, seed: int = 0, attn: str = "sdpa", **fields):
    attention.register()
    auto = AutoModelForCausalLM if kind == "causal_lm" else AutoModelForSequenceClassification
    config = AutoConfig.for_model("qwen2", num_labels=labels, **ARCHITECTURE | fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn)
        if kind == "reward":
            model.score.weight.data.normal_(std=1.0)  # so that scores differ by more than rounding
    return model.eval()


def other_tokenizer(*, template: bool = True):
    """The same bytes under other ids, other special tokens, and another chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = Fast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    if template:
        made.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    return made


def plain_rows() -> list[dict]:
    return [{"prompt": q, "tag": i} for i, q in enumerate(QUESTIONS)]


def chat_rows() -> list[dict]:
    return [{"prompt": [{"role": "user", "content": q}], "tag": i} for i, q in enumerate(QUESTIONS)]


def ids_of(rows: list[dict], answers: list[str] = ANSWERS) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and finished completions in the policy's tokens."""
    prompts = [
        row["prompt"]
        if isinstance(row["prompt"], str)
        else TOKENS.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    encode = lambda texts: [np.asarray(TOKENS(t)["input_ids"], dtype=np.int32) for t in texts]  # noqa: E731
    return encode(prompts), encode([a + TOKENS.eos_token for a in answers])


def rewards(*sources, **options) -> Rewards:
    return Rewards(sources, policy_tokenizer=TOKENS, device="cpu", **options)


def judge(made: Rewards, rows: list[dict] | None = None, **also):
    rows = chat_rows() if rows is None else rows
    return made(rows, *ids_of(rows), **also)


@torch.no_grad()
def alone(model, ids: list) -> torch.Tensor:
    """The model's own scores of sequences, each in a batch of its own."""
    return torch.stack(
        [model(input_ids=torch.as_tensor(np.asarray(i))[None].long()).logits[0, 0] for i in ids]
    )


def joined(rows: list[dict]) -> list[np.ndarray]:
    """What a model with the policy's tokens reads: in ChatML a line break follows the end of a turn."""
    after = [[] if isinstance(row["prompt"], str) else TOKENS("\n")["input_ids"] for row in rows]
    return [np.concatenate(parts) for parts in zip(*ids_of(rows), after, strict=True)]


def wrong(*sources, columns=("prompt",), **options) -> str:
    found = check_sources(sources, columns=columns, **options)
    assert len(found) == 1, found
    return str(found[0])


def fails(source, error=TrainingFailed, rows=None, **options) -> str:
    made = rewards(source, **options)
    with pytest.raises(error) as caught:
        judge(made, rows)
    if error is UserError:
        assert len(caught.value.violations) == 1
    return str(caught.value)


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


# ------------------------------------------------------------------ functions


def test_a_function_gets_what_the_ecosystem_gives_it():
    """Conversations: messages; text: text; the other columns as lists; ids as lists of ints without padding."""
    seen = {}

    def look(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [len(ids) for ids in completion_ids]

    scored = judge(rewards(look))
    _, completions = ids_of(chat_rows())
    assert seen == {
        "prompts": [[{"role": "user", "content": q}] for q in QUESTIONS],
        "completions": [[{"role": "assistant", "content": a}] for a in ANSWERS],
        "completion_ids": [ids.tolist() for ids in completions],
        "tag": [0, 1, 2, 3, 4],
    }
    assert scored.total.tolist() == [len(a) + 1 for a in ANSWERS]
    seen.clear()
    judge(rewards(look), plain_rows(), trainer_state="state")
    assert (
        seen["prompts"] == QUESTIONS and seen["completions"] == ANSWERS and seen["trainer_state"] == "state"
    )


def test_weights_none_and_names():
    # row 0: 2·1 + (−0.5)·10 = −3; row 1: only the second, −0.5·20 = −10; rows 2…4: 2·3 and −0.5·0
    first = lambda completions, **_: [1, None, 3, 3, 3]  # noqa: E731

    def second(completions):
        return [10.0, 20.0, 0.0, 0.0, None]

    scored = judge(rewards(first, second, second, weights=[2, -0.5, 0]))
    assert scored.total.tolist() == [-3.0, -10.0, 6.0, 6.0, 6.0]
    assert [*scored.each] == ["lambda", "second", "second_2"]
    assert scored.each["lambda"].isnan().tolist() == [False, True, False, False, False]
    assert judge(rewards(second, first)).total.tolist() == [11.0, 20.0, 3.0, 3.0, 3.0]
    assert unique(["a", "a", "a_2", "a"]) == ("a", "a_3", "a_2", "a_4")


def test_functions_come_in_many_kinds(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Judge:
        def __call__(self, completions, tag):
            return torch.tensor(tag)

    def scaled(completions, scale, **_):
        return np.full(len(completions), scale)

    async def slowly(completions, **_):
        await asyncio.sleep(0.01)
        return [4.0] * len(completions)

    made = rewards(
        "my_rewards.half", "my_rewards:half", Judge(), functools.partial(scaled, scale=3), slowly, "correct"
    )
    assert made.names == ("half", "half_2", "Judge", "scaled", "slowly", "correct")
    rows = [dict(row, answer=a) for row, a in zip(chat_rows(), [2, 5, "42", None, "x"], strict=True)]
    scored = judge(made, rows)
    assert scored.each["correct"].nan_to_num(-1).tolist() == [1.0, 0.0, 1.0, -1.0, -1.0]
    # 0.5 + 0.5 + tag + 3 + 4 + whether it is right
    assert scored.total.tolist() == [9.0, 9.0, 11.0, 11.0, 12.0]


def test_a_function_cannot_change_what_others_see():
    rows = chat_rows()

    def spoil(prompts, completions, tag):
        for messages in prompts:
            messages[0]["content"] = "spoiled"
            messages.append("more")
        tag.clear()
        completions.clear()
        return [0.0] * 5

    def look(prompts, completions, tag):
        assert [p[0]["content"] for p in prompts] == QUESTIONS and len(completions) == len(tag) == 5
        return [1.0] * 5

    assert judge(rewards(spoil, look), rows).total.tolist() == [1.0] * 5
    assert rows == chat_rows()


def test_async_functions_run_at_once_also_inside_a_running_loop_and_in_a_fork():
    started = []

    async def wait(completions, **_):
        started.append(time.monotonic())
        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    made = rewards(wait, wait, wait)
    assert judge(made).total.tolist() == [3.0] * 5
    assert max(started) - min(started) < 0.25  # none waited for another

    async def notebook():
        return judge(made).total.tolist()

    assert asyncio.run(notebook()) == [3.0] * 5
    quick = rewards(wait, timeout=10)
    assert (
        in_child(lambda: judge(quick).total.tolist()) == [1.0] * 5
    )  # the parent's loop runs in the parent alone


def test_one_loop_serves_all_calls():
    """A client made in the first call works in the second."""
    loops = []

    async def client(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    made = rewards(client)
    judge(made)
    judge(made)
    assert loops[0] is loops[1]


def test_a_function_that_raises_is_named():
    def careless(completions):
        return [1 / 0]

    async def late(completions):
        raise KeyError("url")

    async def slow(completions):
        raise TimeoutError("the server sleeps")

    for function, said, kind in (
        (careless, "careless failed on 5 rows (ZeroDivisionError: division by zero)", ZeroDivisionError),
        (late, "late failed on 5 rows (KeyError: 'url')", KeyError),
        (slow, "slow failed on 5 rows (TimeoutError: the server sleeps)", TimeoutError),
    ):
        with pytest.raises(TrainingFailed) as caught:
            judge(rewards(function))
        assert said in str(caught.value) and isinstance(caught.value.__cause__, kind)


def test_an_async_function_that_does_not_end_is_left():
    async def hangs(completions):
        await asyncio.sleep(60)

    began = time.monotonic()
    assert "hangs gave nothing for 5 rows within 0.2 s" in fails(hangs, timeout=0.2)

    async def blocks(completions):
        time.sleep(2)

    assert "within 0.2 s" in fails(blocks, timeout=0.2)
    assert time.monotonic() - began < 2


def test_a_failure_cancels_what_still_runs():
    started, cancelled = threading.Event(), threading.Event()

    async def hangs(completions):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    def broken(completions):
        assert started.wait(20)
        raise ValueError("first")

    with pytest.raises(TrainingFailed, match="broken failed"):
        judge(rewards(hangs, broken))
    assert cancelled.wait(20)


@pytest.mark.parametrize(
    "result,said",
    [
        ([1.0, 2.0], "2 rewards for 5 rows"),
        ([1.0] * 6, "6 rewards for 5 rows"),
        (None, "a NoneType, not a list"),
        (1.0, "a float, not a list"),
        ("12345", "a str, not a list"),
        ({0: 1.0}, "a dict, not a list"),
        ((float(i) for i in range(5)), "a generator, not a list"),
        (torch.tensor(1.0), "a Tensor, not a list"),
        ([1.0, "2", 3.0, 4.0, 5.0], '2, a str for row 2 of 5 ("Say hi.")'),
        ([1.0, 1.0, [2.0], 1.0, 1.0], "[2.0], a list for row 3 of 5"),
        ([1.0, 1.0, 1.0, 1j, 1.0], "1j, a complex for row 4 of 5"),
        ([float("nan")] + [0.0] * 4, 'nan for row 1 of 5 ("What is 1 + 1?")'),
        (np.array([0.0, np.nan, 0.0, np.inf, 0.0]), "nan for row 2 of 5 (\"Say hi.\") and 1 more"),
        ([0.0, 0.0, 0.0, 0.0, -float("inf")], "-inf for row 5 of 5"),
        ([0.0, 0.0, 0.0, 1e39, 0.0], "1e+39 for row 4 of 5"),
        ([0.0, 0.0, 0.0, 0.0, 10**400], "for row 5 of 5"),
        (np.zeros((5, 2)), "[0.0, 0.0], a list for row 1 of 5"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_list_of_finite_numbers_is_refused(result, said):
    def odd(completions):
        return result

    message = fails(odd)
    assert (
        message.startswith("the reward function odd returned") and said in message and "None where" in message
    )


def test_a_row_without_any_reward_is_named():
    def shy(completions):
        return [1.0, None, 1.0, None, 1.0]

    assert 'row 2 of 5 ("Say hi."), nor to 1 others: shy gave None' in fails(shy)
    rows = [dict(row, answer="many") for row in chat_rows()]
    assert "needs a whole number as answer: 'many'" in fails("correct", rows=rows)


def test_dotted_paths_that_lead_nowhere(tmp_path, monkeypatch):
    source = "RATE = 3\nclass Judge:\n    pass\ndef wants(completions, level):\n    return []\n"
    (tmp_path / "odd_rewards.py").write_text(source)
    (tmp_path / "bad_rewards.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "No module named" in wrong("no_such_module.fn")
    assert "RuntimeError: at import" in wrong("bad_rewards.fn")
    assert "did you mean 'wants'?" in wrong("odd_rewards.want")
    assert "not a function" in wrong("odd_rewards.RATE")
    assert "is a class" in wrong("odd_rewards.Judge")
    assert "is a int, not a source" in wrong(7)
    said = wrong("odd_rewards.wants", columns=["prompt", "answer"])
    assert "needs level, and the rows have prompt, answer" in said
    assert not check_sources(["odd_rewards.wants"], columns=["level"])
    assert not check_sources("odd_rewards.wants", columns=None)  # not known yet
    assert "wants" in fails("odd_rewards.wants", UserError)  # and so it is found when it is called
    two = check_sources(["no_such_module.fn", "bad_rewards.fn"], columns=None, weights=[1])
    assert len(two) == 3  # all at once
    with pytest.raises(UserError) as caught:
        rewards("no_such_module.fn", "bad_rewards.fn", weights=[1])
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize(
    "weights,said",
    [
        ([1.0], "1 weights for 2 rewards"),
        ([1.0, 1.0, 1.0], "3 weights for 2 rewards"),
        ([1.0, float("nan")], "not all finite numbers"),
        ([1.0, "2"], "not all finite numbers"),
        ([True, 1.0], "not all finite numbers"),
        ([0, 0.0], "all 0"),
        (3.0, "1 weights for 2"),
    ],
)
def test_weights_that_cannot_be(weights, said):
    function = lambda completions: [0.0]  # noqa: E731
    assert said in wrong(function, function, weights=weights)
    with pytest.raises(UserError, match=said):
        rewards(function, function, weights=weights)


def test_no_source_needs_answers():
    for given in ((), None, []):
        (found,) = check_sources(given, columns=["prompt", "label"])
        assert "column answer" in str(found) and "dotted path" in str(found) and "algo=reward" in str(found)
        assert not check_sources(given, columns=["prompt", "answer"])
    assert "needs answer" in wrong("correct", columns=["prompt"])
    made = rewards()
    assert made.names == ("correct",)
    with pytest.raises(UserError, match="needs answer, and the rows have tag"):
        judge(made)
    scored = judge(made, [dict(row, answer=a) for row, a in zip(chat_rows(), (2, 1, 42, 1, 1), strict=True)])
    assert scored.total.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_the_verifier_takes_any_text():
    assert correct(["9" * 5000, "3"], ["3", 3]) == [0.0, 1.0]  # more digits than Python reads
    assert correct([[{"role": "assistant", "content": "-4"}]], ["-4"]) == [1.0]
    assert correct(["1", "1"], [None, "1.5"]) == [None, None]


# ------------------------------------------------------------------ what both read


def test_what_a_row_asks():
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert asked({"prompt": "text", "messages": [user]}) == "text"
    assert asked({"messages": [user, assistant]}) == [user]
    assert asked({"messages": [user, assistant, user]}) == [user, assistant, user]
    assert asked({"prompt_ids": [1]}) is None


def test_completions_are_decoded_without_special_tokens():
    prompts, completions = ids_of(chat_rows())
    completions[0] = completions[0][:-1]
    batch = Completions(chat_rows(), prompts, completions, TOKENS)
    assert batch.texts == ANSWERS and batch.finished == [False, True, True, True, True]
    assert batch.name(1) == 'row 2 of 5 ("Say hi.")'
    assert Completions([{"prompt": "w" * 99}], [[1]], [[2]], TOKENS).name(0) == f'row 1 of 1 ("{"w" * 59}…")'


def test_no_row_gives_no_reward():
    scored = rewards("correct")([], [], [])
    assert scored.total.shape == (0,) and scored.each["correct"].shape == (0,)


def test_checks_do_not_import_torch(tmp_path):
    tree().save_pretrained(tmp_path / "judge")
    code = (
        "import sys; from hydratune.rewards import Rewards, check_sources\n"
        f"found = check_sources([{str(tmp_path / 'judge')!r}, 'math.sqrt', 'correct'], columns=['answer'])\n"
        "assert not found, found\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
