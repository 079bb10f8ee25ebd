"""Good rows of every format, the split, and tokens with their labels."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, IterableDataset

from hydratune.data import builtin
from hydratune.data.format import format_rows
from hydratune.data.load import load
from hydratune.data.tokenize import TokenizeOptions, render_example, tokenize
from hydratune.errors import UserError
from hydratune.models import byte_tokenizer
from hydratune.settings import DataSettings

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def formatted(rows, text_field="text", function=None, **settings):
    data = Dataset.from_list(rows)
    return format_rows(
        data, DataSettings(**settings), where="t", text_field=text_field, formatting_func=function
    ).to_list()


def test_every_format_becomes_canonical():
    assert formatted([{"messages": CHAT, "id": 1}]) == [{"messages": CHAT}]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    assert formatted([{"conversations": sharegpt}]) == [{"messages": CHAT}]
    pair = {"prompt": [{"role": "user", "content": "Hi\n\nthere"}], "completion": CHAT[1:]}
    assert formatted([{"instruction": "Hi", "input": "there", "output": "Yo"}]) == [pair]
    mapped = formatted(
        [{"question": "Hi", "answer": "Yo"}], columns={"prompt": "question", "completion": "answer"}
    )
    assert mapped == [{"prompt": "Hi", "completion": "Yo"}]
    assert formatted([{"body": "x"}], text_field="body") == [{"body": "x"}]
    assert formatted([{"input_ids": [1, 2], "labels": [-100, 2]}]) == [
        {"input_ids": [1, 2], "labels": [-100, 2]}
    ]
    assert formatted([{"a": "x"}], text_field="body", function=lambda row: row["a"] * 2) == [{"body": "xx"}]
    assert formatted([{"a": "x"}], function=lambda row: CHAT) == [{"messages": CHAT}]


def test_system_prompt_and_tools_are_kept():
    tools = [{"type": "function", "function": {"name": "f"}}]
    (row,) = formatted([{"messages": CHAT, "tools": tools}], system_prompt="Be brief.")
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(row["tools"]) == tools


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path, suffix):
    rows = [{"prompt": f"a,{i}\nb", "completion": 'é"x"'} for i in range(7)]
    path = tmp_path / f"rows.{suffix}"
    data = Dataset.from_list(rows)
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        (data.to_csv if suffix == "csv" else data.to_parquet)(str(path))
    settings = DataSettings(source="local", path=str(path), eval_fraction=0)
    train, held_out = load(settings, 0)
    assert held_out is None
    assert format_rows(train, settings, where="train").to_list() == rows
    stream, _ = load(DataSettings(source="local", path=str(path), streaming=True), 0)
    assert isinstance(stream, IterableDataset)
    assert list(format_rows(stream, settings, where="train")) == rows


def test_the_split_is_disjoint_seeded_and_never_empty():
    settings = DataSettings(size=50, eval_fraction=0.1, max_samples=20)
    train, held_out = load(settings, 3)
    again, _ = load(settings, 3)
    other, _ = load(settings, 4)
    assert (len(train), len(held_out)) == (20, 5)
    assert train.to_list() == again.to_list() != other.to_list()
    whole = DataSettings(size=50, eval_fraction=0)
    assert load(whole, 3)[1] is None and len(load(whole, 3)[0]) == 50
    small_train, small_eval = load(DataSettings(size=2, eval_fraction=0.01), 0)
    assert (len(small_train), len(small_eval)) == (1, 1)
    assert load(DataSettings(size=1, eval_fraction=0.5), 0)[1] is None


@pytest.mark.parametrize("goal", ["prompts", "preference"])
def test_distinct_questions_are_new_when_held_out(goal):
    def asked(rows):
        return [str(row["prompt"] if goal == "preference" else row["messages"][0]) for row in rows]

    settings = DataSettings(size=builtin.QUESTIONS, distinct=True, eval_fraction=0.125)
    train, held_out = map(asked, load(settings, 3, goal))
    assert (len(train), len(held_out)) == (3584, 512)
    assert len({*train, *held_out}) == builtin.QUESTIONS == 4096
    settings.distinct = False
    train, held_out = map(asked, load(settings, 3, goal))
    assert len({*train} & {*held_out}) > 200  # of 512


def test_arithmetic_is_right_and_verified():
    rows = builtin.arithmetic(300, 1)
    assert rows == builtin.arithmetic(300, 1) != builtin.arithmetic(300, 2)
    for row in rows:
        left, right = row["messages"][1]["content"].split(" = ")
        assert eval(left) == int(right)
        assert builtin.verify(row, row["messages"][1]["content"])
        assert not builtin.verify(row, f"{left} = {int(right) + 1}")
    assert not builtin.verify("4", "no number")
    assert not builtin.verify("4", "14") and not builtin.verify("4", "4.5")


def trained_text(rows, tokenizer, **options):
    canonical = format_rows(Dataset.from_list(rows), DataSettings(), where="t")
    data, report = tokenize(canonical, tokenizer, TokenizeOptions(**options), where="t")
    return [
        "".join(text for text, trained in render_example(row, tokenizer) if trained) for row in data
    ], report


def test_what_is_trained():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    assert trained_text([{"text": "ab"}, {"text": f"ab{end}"}], tokenizer)[0] == [f"ab{end}"] * 2
    pair = {"prompt": "ab", "completion": "cd"}
    assert trained_text([pair], tokenizer)[0] == [f"cd{end}"]
    assert trained_text([pair], tokenizer, completion_only_loss=False)[0] == [f"abcd{end}"]
    assert trained_text([{"messages": CHAT * 2}], tokenizer, assistant_only_loss=True)[0] == [f"Yo{end}" * 2]
    masked = {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}
    assert trained_text([masked], tokenizer)[0] == [tokenizer.decode([3])]


def test_turn_by_turn_masks_equal_those_of_generation_marks(shared_data, qwen_tokenizer, marked_tokenizer):
    file = shared_data / "sft" / "capybara_like.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:50]]
    data = format_rows(Dataset.from_list(rows), DataSettings(), where="t")
    options = TokenizeOptions(assistant_only_loss=True)
    marked, plain = (tokenize(data, t, options, where="t")[0] for t in (marked_tokenizer, qwen_tokenizer))
    assert marked.to_list() == plain.to_list()


@pytest.fixture
def mistral(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "mistral-7b-v0.3")


def test_a_template_that_moves_the_system_message_is_refused(mistral):
    system = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(UserError, match=r"t row 1, column messages.*turn \d changes") as caught:
        trained_text([{"messages": system + CHAT * 2}], mistral, assistant_only_loss=True)
    assert "chat_template_path" in str(caught.value)
    with pytest.raises(UserError, match="column prompt"):
        trained_text([{"prompt": system + CHAT[:1], "completion": CHAT[1:]}], mistral)
    with pytest.raises(UserError, match="refuses this conversation"):
        trained_text([{"messages": CHAT[:1] * 2}], mistral)
    assert trained_text([{"messages": CHAT * 2}], mistral, assistant_only_loss=True)[1].trained_tokens > 0


def test_a_template_that_leaves_the_end_of_turn_untrained_is_refused():
    tokenizer = byte_tokenizer()
    moved = "{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    start = tokenizer.chat_template.index("{%- generation")
    end = tokenizer.chat_template.index("{%- else -%}")
    tokenizer.chat_template = tokenizer.chat_template[:start] + moved + tokenizer.chat_template[end:]
    with pytest.raises(UserError, match="never trained"):
        trained_text([{"messages": CHAT}], tokenizer, assistant_only_loss=True)


def test_dropped_rows_are_counted_and_none_left_is_an_error():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "a" * 30, "completion": "b"}, {"prompt": "a", "completion": "b" * 30}]
    texts, report = trained_text(rows, tokenizer, max_length=20)
    assert texts == ["b" * 19]
    assert report.dropped == {"no trained token after truncation": 1}
    assert (report.rows_in, report.rows, report.truncated, report.tokens, report.trained_tokens) == (
        2,
        1,
        1,
        20,
        19,
    )
    assert "1 dropped" in report.lines()[0]
    kept = trained_text(rows, tokenizer, max_length=20, truncation_mode="keep_end")[0]
    assert kept == ["b" + tokenizer.eos_token, "b" * 19 + tokenizer.eos_token]
    with pytest.raises(UserError, match="no row is left"):
        trained_text(rows[:1], tokenizer, max_length=20)
    with pytest.raises(UserError, match="no row is left"):
        trained_text([{"messages": CHAT[:1]}], tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"text": "a"}], {"completion_only_loss": True}, "no prompt and completion"),
        ([{"messages": CHAT}], {"completion_only_loss": True}, "drop the flag"),
        ([{"text": "a"}], {"assistant_only_loss": True}, "not conversations"),
        ([{"prompt": "a", "completion": "b"}], {"assistant_only_loss": True}, "not conversations"),
        ([{"text": "ab"}], {"max_length": 1}, r"algo\.max_length"),
        ([{"text": "ab"}], {"truncation_mode": "keep_middle"}, "keep_start or keep_end"),
        ([{"input_ids": [1, 99999]}], {}, "the vocabulary has"),
        ([{"input_ids": [1, -3]}], {}, "token id -3"),
    ],
)
def test_options_that_do_not_fit_the_rows(rows, options, words):
    with pytest.raises(UserError, match=words):
        trained_text(rows, byte_tokenizer(), **options)


def test_conversations_need_a_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        trained_text([{"messages": CHAT}], tokenizer)


@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_rows_with_their_own_tools_are_rendered_one_by_one(assistant_only, marked):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- for tool in tools or [] -%}{{- tool.name -}}{%- endfor -%}" + tokenizer.chat_template
    )
    if not marked:
        for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
            tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    rows = [{"messages": CHAT, "tools": [{"name": "search"}]}, {"messages": CHAT, "tools": None}]
    (first, second), _ = trained_text(rows, tokenizer, assistant_only_loss=assistant_only)
    end = tokenizer.eos_token
    assert second == (f"Yo{end}" if assistant_only else tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert first == (second if assistant_only else "search" + second)


def test_no_rows_to_tokenise_is_an_error():
    with pytest.raises(UserError, match="has no row"):
        tokenize(Dataset.from_dict({"text": []}), byte_tokenizer(), TokenizeOptions(), where="t")
    with pytest.raises(UserError, match="has no row"):
        format_rows(Dataset.from_dict({"text": []}), DataSettings(), where="t")


def test_a_hub_that_fails_is_one_error(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match="no route") as caught:
        load(DataSettings(source="hub", name="owner/rows", split="train"), 0)
    assert "data.name = 'owner/rows'" in str(caught.value) and "data.source=local" in str(caught.value)
