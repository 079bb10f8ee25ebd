"""Preference rows of every form to prompts and completions, and to token ids; what is wrong is told by row and column."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from hydratune import DPOConfig, KTOConfig, KTOTrainer, RewardConfig, UserError
from hydratune.data.builtin import arithmetic, verify
from hydratune.data.collate_preference import Layout, UnpairedCollator, mismatched
from hydratune.data.format import format_rows
from hydratune.data.pipeline import prepare_preference
from hydratune.data.preference import transcript
from hydratune.data.sampling import BothClassesSampler, other_rows
from hydratune.data.tokenize_preference import PreferenceOptions, cut_row
from hydratune.models import byte_tokenizer
from hydratune.settings import DataSettings


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def formatted(rows: list[dict], goal: str, **settings) -> list[dict]:
    return format_rows(Dataset.from_list(rows), DataSettings(**settings), where="rows", goal=goal).to_list()


PAIRS = {
    "prompt beside messages": (
        {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        [user("q")],
    ),
    "prompt inside messages": (
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        [user("q")],
    ),
    "prompt beside and inside": (
        {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        [user("q")],
    ),
    "messages beside and inside": (
        {"prompt": [user("q")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        [user("q")],
    ),
    "prompt as text": ({"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]}, [user("q")]),
    "a single message": ({"prompt": [user("q")], "chosen": bot("a"), "rejected": bot("b")}, [user("q")]),
    "no prompt at all": ({"chosen": [bot("a")], "rejected": [bot("b")]}, []),
    "several turns": (
        {
            "chosen": [user("q"), bot("x"), user("r"), bot("a")],
            "rejected": [user("q"), bot("x"), user("r"), bot("b")],
        },
        [user("q"), bot("x"), user("r")],
    ),
}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_of_messages(form):
    row, prompt = PAIRS[form]
    (made,) = formatted([row], "preference")
    assert [{k: m[k] for k in ("role", "content")} for m in made["prompt"]] == prompt
    assert made["chosen"][0]["content"] == "a" and made["rejected"][0]["content"] == "b"


@pytest.mark.parametrize(
    "chosen,rejected,prompt",
    [
        ("What is it? It is red.", "What is it? It was blue.", "What is it? It"),
        ("Q: why\nA: because", "Q: why\nA: bees", "Q: why\nA:"),  # not inside a word
        ("red", "blue", ""),
        ("yes sir", "yes sir and more", "yes"),  # a completion is never empty
    ],
)
def test_text_parts_between_words_and_keeps_its_spaces(chosen, rejected, prompt):
    (made,) = formatted([{"chosen": chosen, "rejected": rejected}], "preference")
    assert made["prompt"] == prompt
    assert made["prompt"] + made["chosen"] == chosen and made["prompt"] + made["rejected"] == rejected


def test_a_space_before_a_completion_is_kept():
    """In the real rows it is a cue of the label; stripping it would change the task."""
    (made,) = formatted([{"prompt": "q", "completion": " a", "label": True}], "unpaired")
    assert made["completion"] == " a"


def test_margins_system_prompt_columns_and_functions():
    row = {"question": "q", "good": "a", "bad": "b", "margin": 2}
    settings = {
        "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        "system_prompt": "Be kind.",
    }
    (made,) = formatted([row], "preference", **settings)
    assert [m["role"] for m in made["prompt"]] == ["system", "user"] and made["margin"] == 2.0
    rows = Dataset.from_list([{"x": "q", "y": "a"}])
    made = format_rows(
        rows, DataSettings(), where="rows", goal="unpaired",
        formatting_func=lambda r: {"prompt": r["x"], "completion": r["y"], "label": 1},
    )  # fmt: skip
    assert made.to_list() == [{"prompt": "q", "completion": "a", "label": True}]


def test_transcripts_are_taken_apart():
    text = "\n\nHuman: Hi\n\nthere\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So."
    assert transcript(text) == [user("Hi\n\nthere"), bot("Hello"), user("Why?"), bot("So.")]
    row = {"chosen": text, "rejected": text.replace("So.", "No.")}
    (made,) = formatted([row], "preference", formatting_func="hydratune.data.preference.from_transcripts")
    assert len(made["prompt"]) == 3 and made["rejected"][0]["content"] == "No."


@pytest.mark.parametrize(
    "label,is_true", [(True, 1), (0, 0), ("true", 1), ("False", 0), ("1", 1), (1.0, 1), ("no", 0)]
)
def test_labels_are_read_as_booleans(label, is_true):
    (made,) = formatted([{"prompt": "q", "completion": "a", "label": label}], "unpaired")
    assert made["label"] is bool(is_true)


def test_labelled_conversations_are_judged_by_their_end():
    rows = [{"messages": [user("q"), bot("a"), user("r"), bot("b")], "label": True}]
    (made,) = formatted(rows, "unpaired")
    assert len(made["prompt"]) == 3 and made["completion"][0]["content"] == "b"
    (made,) = formatted([{"completion": [user("q"), bot("a")], "label": False}], "unpaired")
    assert made["prompt"][0]["content"] == "q" and made["completion"][0]["content"] == "a"
    (made,) = formatted([{"completion": [bot("a")], "label": False}], "unpaired")
    assert made["prompt"] == []


def test_pairs_are_taken_apart_and_shuffled_for_kto():
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(50)]
    args = KTOConfig(output_dir="unused", report_to=[], use_cpu=True)
    made, report = KTOTrainer.prepare_rows(Dataset.from_list(rows), byte_tokenizer(), args, where="rows")
    labels = made["label"][:]
    assert (report.rows, report.desirable, sum(labels)) == (100, 50, 50)
    assert labels != [True, False] * 50
    again, _ = KTOTrainer.prepare_rows(
        Dataset.from_list(rows), byte_tokenizer(), args, where="rows", cache=False
    )
    assert again["completion_ids"][:] == made["completion_ids"][:]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    for how in ({}, {"formatting_func": lambda row: {k: row[k] for k in ("prompt", "chosen", "rejected")}}):
        made, _ = KTOTrainer.prepare_rows(stream, byte_tokenizer(), args, where="rows", **how)
        found = [row["label"] for row in made]
        assert len(found) == 100 and sum(found) == 50 and found != [True, False] * 50
    rows[3]["chosen"] = ""
    with pytest.raises(UserError, match="rows row 4, column chosen"):  # where it stands in the file
        KTOTrainer.prepare_rows(Dataset.from_list(rows), byte_tokenizer(), args, where="rows")


BAD = {
    "an empty completion": (
        "unpaired",
        {"prompt": "q", "completion": " ", "label": True},
        "column completion: is empty",
    ),
    "an empty list": (
        "preference",
        {"chosen": [], "rejected": [bot("a")]},
        "column chosen: is an empty list",
    ),
    "an empty message": (
        "preference",
        {"chosen": [bot("")], "rejected": [bot("a")]},
        "column chosen: is empty",
    ),
    "an odd label": (
        "unpaired",
        {"prompt": "q", "completion": "a", "label": "good"},
        "column label: is 'good'",
    ),
    "no label": ("unpaired", {"prompt": "q", "completion": "a", "label": None}, "column label: is missing"),
    "a role": (
        "preference",
        {"chosen": [{"role": "robot", "content": "a"}], "rejected": [bot("b")]},
        "unknown role",
    ),
    "two kinds": (
        "preference",
        {"chosen": "a", "rejected": [bot("b")]},
        "column rejected: is not of the kind",
    ),
    "a list for text": (
        "unpaired",
        {"prompt": [user("q")], "completion": "a", "label": 1},
        "column prompt: is a list",
    ),
    "a margin": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"},
        "column margin",
    ),
    "a margin without end": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("inf")},
        "no finite number",
    ),
    "a user's end": (
        "unpaired",
        {"messages": [bot("a"), user("q")], "label": True},
        "does not end with the assistant",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_told_by_row_and_column(case):
    goal, row, said = BAD[case]
    with pytest.raises(UserError) as caught:
        formatted([row], goal)
    assert "rows row 1" in str(caught.value) and said in str(caught.value) and "→" in str(caught.value)


@pytest.mark.parametrize(
    "goal,row,said",
    [
        ("preference", {"prompt": "q", "completion": "a", "label": True}, "algo=kto"),
        ("unpaired", {"prompt": "q", "completion": "a"}, "add a column label"),
        ("preference", {"better": "a", "worse": "b"}, "chosen: better"),
        ("tokens", {"chosen": "a", "rejected": "b"}, "preference pairs"),
    ],
)
def test_columns_that_do_not_fit_are_told_with_what_would(goal, row, said):
    with pytest.raises(UserError, match=said):
        formatted([row], goal)


def test_one_format_for_all_rows():
    rows = [{"prompt": "q", "completion": "a", "label": True}]
    func = lambda row: {**row, "completion": [bot("a")]} if row["n"] else row  # noqa: E731
    data = Dataset.from_list([{**row, "n": n} for n in (0, 1) for row in rows])
    with pytest.raises(UserError, match="several formats"):
        format_rows(data, DataSettings(), where="rows", goal="unpaired", formatting_func=func)


def config(algo=DPOConfig, **options):
    return algo(output_dir="unused", report_to=[], use_cpu=True, **options)


def prepared(rows, goal="preference", args=None, tokenizer=None, **how):
    data = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    return prepare_preference(
        data, tokenizer or byte_tokenizer(), args or config(), goal=goal, where="rows", **how
    )


def test_tokens_are_those_of_the_whole_conversation():
    tokenizer, row = byte_tokenizer(), {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("bb")]}
    made, report = prepared([row])
    for name in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(row["prompt"] + row[name], return_dict=False)
        assert made[0]["prompt_ids"] + made[0][f"{name}_ids"] == whole
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    assert made[0]["prompt_ids"] == asked
    assert report.tokens == 2 * len(asked) + report.trained_tokens


def test_plain_completions_end_with_eos():
    tokenizer = byte_tokenizer()
    made, _ = prepared([{"prompt": "q", "chosen": "a", "rejected": "b<|im_end|>"}])
    assert made[0]["chosen_ids"][-1] == made[0]["rejected_ids"][-1] == tokenizer.eos_token_id
    assert made[0]["rejected_ids"].count(tokenizer.eos_token_id) == 1


def test_cuts_keep_one_prompt_for_both():
    prompt, completions = np.arange(10), [np.arange(100, 106), np.arange(200, 203)]
    cut = lambda **o: cut_row(prompt, completions, PreferenceOptions("preference", **o))  # noqa: E731
    p, c = cut(max_length=12)
    assert (len(p), [len(x) for x in c]) == (10, [2, 2])
    p, c = cut(max_length=12, truncation_mode="keep_end")  # room for the longer completion
    assert (p.tolist(), [len(x) for x in c]) == ([4, 5, 6, 7, 8, 9], [6, 3])
    p, c = cut(max_length=4, truncation_mode="keep_end")
    assert (p.tolist(), [x.tolist() for x in c]) == ([9], [[100, 101, 102], [200, 201, 202]])
    p, c = cut(max_length=None, max_prompt_length=3, max_completion_length=4)
    assert (p.tolist(), [len(x) for x in c]) == ([0, 1, 2], [4, 3])


def test_rows_that_teach_nothing_are_left_out_and_counted():
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q" * 100, "chosen": "a", "rejected": "b"},
    ]
    _, report = prepared(rows, args=config(max_length=64))
    assert (report.rows, report.dropped) == (
        1,
        {"no completion after truncation": 1, "chosen equals rejected": 1},
    )
    _, report = prepared(rows, args=config(RewardConfig, max_length=64), drop_long=True)
    assert report.dropped == {"longer than max_length": 1, "chosen equals rejected": 1}
    with pytest.raises(UserError, match="no row is left"):
        prepared(rows[1:2])


def test_streams_and_token_ids_are_taken_too():
    stream = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3).to_iterable_dataset()
    made, _ = prepared(stream)
    assert len(list(made)) == 3 and {"prompt_ids", "chosen_ids", "rejected_ids"} == {*next(iter(made))}
    ids = {"prompt_ids": [1], "completion_ids": [2, 3], "kl_completion_ids": [4], "label": 1}
    made, _ = prepared([ids], "unpaired", config(KTOConfig))
    assert made[0] == ids | {"label": True}
    with pytest.raises(UserError, match="the vocabulary has 259"):
        prepared([ids | {"completion_ids": [999]}], "unpaired", config(KTOConfig))
    with pytest.raises(UserError, match=r"row 1, column kl_completion_ids: holds the token id 999"):
        prepared([ids | {"kl_completion_ids": [999]}], "unpaired", config(KTOConfig))


def test_a_value_that_some_rows_lack_is_told_by_row():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"row 2, column margin: is empty"):
        prepared([pair | {"margin": 1.0}, pair | {"margin": None}])
    none, _ = prepared([pair | {"margin": None}] * 2)
    assert "margin" not in none.column_names
    ids = {"prompt_ids": [1], "completion_ids": [2, 3], "label": 1}
    with pytest.raises(UserError, match=r"row 1, column kl_completion_ids: is empty"):
        rows = [ids | {"kl_completion_ids": None}, ids | {"kl_completion_ids": [3]}]
        prepared(rows, "unpaired", config(KTOConfig))


@pytest.mark.parametrize("file", ["dpo_en", "kto_mix_pairs", "gsm8k_pairs"])
def test_real_pairs(file, shared_data, qwen_tokenizer):
    with (shared_data / "preference" / f"{file}.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    made, report = prepared(rows, args=config(max_length=None), tokenizer=qwen_tokenizer)
    assert report.boundary_shifts == 0 and report.truncated == 0
    same = sum(row["chosen"] == row["rejected"] for row in rows)
    assert (report.rows_in, report.rows) == (len(rows), len(rows) - same)
    row = made[len(made) // 2]
    assert qwen_tokenizer.eos_token_id in row["chosen_ids"] and row["prompt_ids"]


@pytest.mark.parametrize("file,desirable", [("kto_en", 626), ("kto_gsm8k", 563)])
def test_real_labels(file, desirable, shared_data, qwen_tokenizer):
    with (shared_data / "kto" / f"{file}.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    _, report = prepared(rows, "unpaired", config(KTOConfig, max_length=None), qwen_tokenizer)
    assert (report.rows, report.desirable, report.dropped) == (len(rows), desirable, {})


def test_built_in_rows_are_right_and_wrong_as_they_say():
    for row in arithmetic(300, 4, "preference"):
        assert verify(row, row["chosen"][0]["content"]) and not verify(row, row["rejected"][0]["content"])
    rows = arithmetic(300, 4, "unpaired")
    assert all(verify(row, row["completion"][0]["content"]) == row["label"] for row in rows)
    assert 100 < sum(row["label"] for row in rows) < 200
    assert [r["prompt"][0] for r in rows] == [r["messages"][0] for r in arithmetic(300, 4)]


def test_mismatched_pairs_are_a_rotation_that_avoids_the_own_prompt():
    assert mismatched([b"a", b"b", b"c"]) == [2, 0, 1]
    assert mismatched([b"a", b"a", b"b", b"b"]) == [
        2,
        3,
        0,
        1,
    ]  # by two: one would give row 1 a completion of its prompt
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompts = [bytes([c]) for c in rng.integers(0, 5, rng.integers(2, 12))]
        found = mismatched(prompts)
        assert sorted(found) == list(range(len(prompts))) and all(i != j for i, j in enumerate(found))


def test_over_long_mismatched_pairs_are_cut_and_a_lone_row_has_none():
    rows = [
        {"prompt_ids": [1] * 6, "completion_ids": [2] * 2, "label": True},
        {"prompt_ids": [3] * 2, "completion_ids": [4] * 6, "label": False},
    ]
    batch = UnpairedCollator(Layout(0), max_length=8)(rows)
    assert batch["mismatched"]["lengths"].tolist() == [8, 4]
    assert batch["both"]["lengths"].tolist() == [8, 8, 8, 4] and batch["desirable"].tolist() == [True, False]
    alone = UnpairedCollator(Layout(0))(rows[:1])
    assert "mismatched" not in alone
    assert "mismatched" not in UnpairedCollator(Layout(0), mismatch=False)(rows)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_batches_hold_both_classes_whenever_they_can(size):
    rng = np.random.default_rng(size)
    for _ in range(60):
        total = int(rng.integers(2, 60))
        labels = rng.permutation(np.arange(total) < rng.integers(1, total))
        epoch = 0
        sampler = BothClassesSampler(labels, size, 3, lambda: epoch)  # noqa: B023
        order = list(sampler)
        assert sorted(order) == list(range(total)) and order == list(sampler)
        batches = [labels[order[i : i + size]] for i in range(0, total, size)]
        wanted = sum(len(b) > 1 for b in batches)
        both = sum(0 < b.sum() < len(b) for b in batches)
        rare = min(labels.sum(), total - labels.sum())
        # a batch of one (the last) may have to take a row of the rarer class
        assert both >= min(wanted, rare - (wanted < len(batches))), (labels.sum(), total)
        epoch = 1
        assert sorted(sampler) == list(range(total))
        if total > 10:
            assert list(sampler) != order


def test_fixed_partners_have_other_prompts_whenever_they_can():
    rng = np.random.default_rng(0)
    for _ in range(100):
        prompts = [bytes([c]) for c in rng.integers(0, 6, rng.integers(2, 40))]
        found = other_rows(prompts, seed=1)
        assert sorted(found) == list(range(len(prompts)))
        assert all(i != j for i, j in enumerate(found))
        most = max(prompts.count(p) for p in prompts)
        if 2 * most <= len(prompts):
            assert all(prompts[i] != prompts[j] for i, j in enumerate(found))


@pytest.mark.parametrize("declared", [True, False])
def test_a_margin_that_comes_late_in_a_stream_is_not_lost(declared):
    """A stream's columns are those of its first rows; a margin after them is an error that names its row."""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [pair | ({"margin": None} if declared else {})] * 120 + [pair | {"margin": 0.5}] * 3
    whole = (
        Dataset.from_list(rows).to_iterable_dataset()
        if declared
        else IterableDataset.from_generator(lambda: iter(rows))
    )
    made, _ = prepared(whole)
    with pytest.raises(UserError, match=r"row 121, column margin: has one, and the first rows have none"):
        list(made)
    zero = [row | {"margin": row.get("margin") or 0.0} for row in rows]
    made, _ = prepared(Dataset.from_list(zero).to_iterable_dataset())
    assert [row["margin"] for row in made] == [0.0] * 120 + [0.5] * 3
