"""The stages joined: order, caching, and the ways in that skip a stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hydratune.data import builtin, cache, pipeline
from hydratune.data.pipeline import prepare
from hydratune.errors import UserError
from hydratune.models import byte_tokenizer

DEFAULTS = {
    "dataset_text_field": "text",
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "max_length": 128,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "packing_strategy": "bfd",
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "seed": 42,
}
ROWS = builtin.arithmetic(60, 0)


@pytest.fixture
def tokenised(monkeypatch):
    """How often rows were tokenised."""
    calls = []
    whole = pipeline.tokenize
    monkeypatch.setattr(pipeline, "tokenize", lambda *a, **k: calls.append(1) or whole(*a, **k))
    return calls


def go(rows=ROWS, *, packing=True, tokenizer=None, cache=True, formatting_func=None, **options):
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = SimpleNamespace(**{**DEFAULTS, **options})
    tokenizer = tokenizer or byte_tokenizer()
    return prepare(
        data, tokenizer, args, packing=packing, where="train", cache=cache, formatting_func=formatting_func
    )


def test_a_second_run_reads_the_cache_and_gives_the_same(tokenised):
    first, first_report = go()
    second, second_report = go()
    assert len(tokenised) == 1
    assert first.to_list() == second.to_list()
    assert first_report == second_report
    assert second_report.blocks == len(second) and second_report.rows == 60


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"assistant_only_loss": True},
        {"packing": False},
        {"packing_strategy": "wrapped"},
        {"shuffle_dataset": True},
        {"rows": ROWS[::-1]},
        {"cache": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_result_is_in_the_key(tokenised, change):
    go()
    go(**change)
    assert len(tokenised) == 2


def test_another_template_is_another_key(tokenised):
    go()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "assistant: ")
    go(tokenizer=tokenizer)
    assert len(tokenised) == 2


@pytest.mark.parametrize("harm", ["truncate", "summary", "missing"])
def test_a_torn_entry_is_made_again(tokenised, harm):
    expected = go()[0].to_list()
    (entry,) = cache.directory().iterdir()
    (arrow,) = entry.rglob("*.arrow")
    if harm == "truncate":
        content = arrow.read_bytes()
        arrow.unlink()  # the first result still maps the old file
        arrow.write_bytes(content[: len(content) // 2])
    elif harm == "summary":
        (entry / "summary.json").write_text('{"rows": ')
    else:
        arrow.unlink()
    assert go()[0].to_list() == expected
    assert len(tokenised) == 2
    assert go()[0].to_list() == expected
    assert len(tokenised) == 2
    assert [p.name for p in cache.directory().iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch):
    Path(tmp_path / "file").write_text("")
    monkeypatch.setenv("HYDRATUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(go()[0]) > 0


def test_formatting_func_goes_through_the_named_text_field():
    def to_text(row):
        return row["messages"][1]["content"]

    data, _ = go(packing=False, formatting_func=to_text, dataset_text_field="body", cache=False)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(data[0]["input_ids"]) == to_text(ROWS[0]) + tokenizer.eos_token
    with pytest.raises(UserError, match="return them from formatting_func"):
        go(packing=False, formatting_func=to_text, completion_only_loss=True)

    def to_pair(row):
        return {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}

    data, _ = go(packing=False, formatting_func=to_pair, completion_only_loss=True)
    assert data[0]["labels"][0] == -100


def test_prepared_rows_can_be_given_and_skipped():
    data, _ = go(packing=False)
    again, _ = go(data, packing=False)
    assert again.to_list() == data.to_list()
    assert go(data, dataset_kwargs={"skip_prepare_dataset": True})[0] is data


def test_shuffling_is_seeded_and_keeps_the_rows():
    plain, one, same, two = (
        go(packing=False, shuffle_dataset=s, seed=n)[0].to_list()
        for s, n in ((False, 1), (True, 1), (True, 1), (True, 2))
    )
    assert one == same != two and one != plain
    assert sorted(map(str, one)) == sorted(map(str, plain))


def test_streams_give_the_same_rows_lazily():
    expected, _ = go(packing=True, cache=False)
    stream, report = go(Dataset.from_list(ROWS).to_iterable_dataset(), packing=True)
    assert list(stream) == expected.to_list()
    assert report.rows == 0


def test_several_processes_give_the_same_rows():
    assert go(cache=False, dataset_num_proc=2)[0].to_list() == go(cache=False)[0].to_list()


def test_packing_without_a_length_is_refused():
    with pytest.raises(UserError, match=r"algo\.max_length"):
        go(max_length=None)


def test_split_and_wrapped_lose_no_token():
    long = [{"text": "x" * 300}, {"text": "y" * 10}]
    for strategy in ("bfd_split", "wrapped"):
        data, report = go(long, packing_strategy=strategy)
        assert sum(map(len, data["input_ids"])) == report.tokens == 312
    data, report = go(long, packing_strategy="bfd")
    assert (report.tokens, report.truncated, report.tokens_cut) == (139, 1, 173)


def test_processes_that_build_together_agree_on_what_was_found(tmp_path, monkeypatch):
    """Where one of them has not found the entry, all build it, because they may share the work."""
    from hydratune.data.cache import cached

    monkeypatch.setenv("HYDRATUNE_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return Dataset.from_list([{"a": len(built)}]), {}

    cached({"k": 1}, build)
    assert cached({"k": 1}, build)[2] and len(built) == 1
    rows, _, found = cached({"k": 1}, build, agreed=lambda _: False)
    assert not found and len(built) == 2 and rows[0] == {"a": 2}
