"""Broken files and wrong rows: each gives one error that says where, what and the way out."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset

from hydratune.data.format import format_rows
from hydratune.data.load import load
from hydratune.errors import UserError
from hydratune.settings import DataSettings

OK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_FILES = {
    # name of the case: (file name, bytes, words of the message, data settings)
    "empty": ("rows.jsonl", b"", ["the file is empty"], {}),
    "blank": ("rows.jsonl", b"\n \n", ["no row"], {}),
    "empty json list": ("rows.json", b"[]", ["no row"], {}),
    "header only": ("rows.csv", b"text\n", ["no row"], {}),
    "broken line": ("rows.jsonl", lines(OK) + b'\n{"messages": [', ["rows.jsonl line 2", "is not JSON"], {}),
    "torn json": ("rows.json", b'[{"text": "a"},', ["rows.json", "is not JSON"], {}),
    "latin-1": (
        "rows.jsonl",
        lines({"text": "a"}) + b'\n{"text": "caf\xe9"}',
        ["line 2", "0xe9", "not UTF-8", "iconv"],
        {},
    ),
    "utf-16": ("rows.json", '[{"text": "a"}]'.encode("utf-16"), ["line 1", "not UTF-8"], {}),
    "latin-1 csv": ("rows.csv", b"text\ncaf\xe9\n", ["line 2", "not UTF-8"], {}),
    "suffix": ("rows.txt", b"text", ["suffix '.txt'", ".jsonl"], {}),
    "row is a list": ("rows.jsonl", lines(OK, [1]), ["line 2", "a list, not an object"], {}),
    "row is a string": ("rows.jsonl", lines("hello"), ["line 1", "a string, not an object"], {}),
    "row is a number": ("rows.json", b'[{"text": "a"}, 3]', ["row 2", "a number"], {}),
    "one object": ("rows.json", b'{"data": [1]}', ["one object", "data", "list of rows"], {}),
    "mixed types": (
        "rows.jsonl",
        lines({"text": "a"}, {"text": "b"}, {"text": 3}),
        ["line 3, column text", "another type"],
        {},
    ),
    "prompt of two types": (
        "rows.jsonl",
        lines(
            {"prompt": "a", "completion": "b"},
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        ),
        ["line 2, column prompt", "another type"],
        {},
    ),
    "surrogate": (
        "rows.jsonl",
        b'{"text": "a"}\n{"text": "\\ud800"}',
        ["line 2, column text", "surrogate"],
        {},
    ),
    "csv cells": ("rows.csv", b"a,text\n1,b\n1,c,d\n", ["line 3", "3 cells", "header has 2"], {}),
    "csv header": ("rows.csv", b"text,text\n1,b\n", ["repeated column name"], {}),
    "csv quote": ("rows.csv", b'text\n"open\n', ["is not CSV"], {}),
    "parquet": ("rows.parquet", b"PAR1 no", ["not a parquet file"], {}),
    "gzip": ("rows.jsonl.gz", gzip.compress(lines(OK))[:-9], ["gzip file is broken"], {}),
    "not gzip": ("rows.jsonl.gz", lines(OK), ["gzip file is broken"], {}),
    "columns": (
        "rows.jsonl",
        lines({"question": "a", "reply": "b"}),
        ["found: question, reply", "prompt_completion needs"],
        {},
    ),
    "named format": (
        "rows.jsonl",
        lines({"text": "a"}),
        ["data.format = 'alpaca'", "found: text"],
        {"format": "alpaca"},
    ),
    "preferences": (
        "rows.jsonl",
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ["completion: chosen"],
        {},
    ),
    "mapped column": (
        "rows.jsonl",
        lines({"question": "a", "answer": "b"}),
        ["no column 'qestion'", "did you mean 'question'"],
        {"columns": {"prompt": "qestion", "completion": "answer"}},
    ),
    "mixed formats": (
        "rows.jsonl",
        lines(OK, {"text": "a"}),
        ["line 2, column messages", "the row has text", "one format"],
        {},
    ),
    "empty messages": ("rows.jsonl", lines(OK, {"messages": []}), ["line 2", "empty list of messages"], {}),
    "null messages": ("rows.jsonl", lines(OK, {"messages": None}), ["line 2", "missing or null"], {}),
    "messages are text": (
        "rows.jsonl",
        lines({"messages": "hello"}),
        ["line 1", "a str, not a list of messages"],
        {},
    ),
    "role": (
        "rows.jsonl",
        lines(chat(("usr", "a"))),
        ["messages[0]", "unknown role 'usr'", "did you mean 'user'"],
        {},
    ),
    "no role": ("rows.jsonl", lines({"messages": [{"content": "a"}]}), ["messages[0]", "no role"], {}),
    "no content": ("rows.jsonl", lines({"messages": [{"role": "user"}]}), ["messages[0]", "no content"], {}),
    "content is a list": (
        "rows.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        ["content is a list, not text"],
        {},
    ),
    "message is text": (
        "rows.jsonl",
        lines({"messages": ["hello"]}),
        ["messages[0]", "a str, not a message"],
        {},
    ),
    "empty completion": (
        "rows.jsonl",
        lines({"prompt": "a", "completion": " "}),
        ["line 1, column completion", "is empty"],
        {},
    ),
    "empty answer": (
        "rows.jsonl",
        lines({"prompt": OK["messages"][:1], "completion": [{"role": "assistant", "content": ""}]}),
        ["column completion", "is empty"],
        {},
    ),
    "no answer": (
        "rows.jsonl",
        lines({"prompt": OK["messages"][:1], "completion": []}),
        ["completion", "empty list"],
        {},
    ),
    "half a conversation": (
        "rows.jsonl",
        lines({"prompt": OK["messages"], "completion": "b"}),
        ["prompt is a list"],
        {},
    ),
    "empty text": ("rows.jsonl", lines({"text": ""}), ["column text", "is empty"], {}),
    "text is a number": ("rows.jsonl", lines({"text": 1}), ["is a int, not text"], {}),
    "null output": (
        "rows.jsonl",
        lines({"instruction": "a", "input": "", "output": None}),
        ["column output"],
        {},
    ),
    "ids are text": ("rows.jsonl", lines({"input_ids": "1 2"}), ["input_ids", "whole numbers"], {}),
    "labels too short": (
        "rows.jsonl",
        lines({"input_ids": [1, 2], "labels": [1]}),
        ["1 values for 2 input_ids"],
        {},
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gives_one_clear_error(tmp_path, case):
    name, content, words, options = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    settings = DataSettings(source="local", path=str(tmp_path / name), eval_fraction=0, **options)
    with pytest.raises(UserError) as caught:
        format_rows(load(settings, 0)[0], settings, where="train")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "→" in message
    assert len(caught.value.violations) == 1, message


def test_a_missing_file_offers_the_nearest_name(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(OK))
    with pytest.raises(UserError, match=r"did you mean 'train\.jsonl'"):
        load(DataSettings(source="local", path=str(tmp_path / "trian.jsonl")), 0)


def test_a_folder_without_data_lists_what_is_there(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no data file .found: notes\.md"):
        load(DataSettings(source="local", path=str(tmp_path)), 0)


def test_ten_faults_are_listed_and_the_rest_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(*[{"messages": []}] * 14, OK))
    settings = DataSettings(source="local", path=str(tmp_path / "rows.jsonl"), eval_fraction=0)
    with pytest.raises(UserError) as caught:
        format_rows(load(settings, 0)[0], settings, where="train")
    assert len(caught.value.violations) == 11
    assert "and 4 more" in str(caught.value)


def test_faults_of_all_files_of_a_folder_are_told_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load(DataSettings(source="local", path=str(tmp_path)), 0)
    assert "a.jsonl line 1" in str(caught.value) and "the file is empty" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_fraction": 1.5}, "data.eval_fraction"),
        ({"distinct": True, "size": 4097}, "there are 4,096 distinct questions"),
        (
            {"distinct": True, "source": "local", "path": "x.jsonl"},
            "data.distinct = True: is of built-in data",
        ),
        ({"max_samples": 0}, "data.max_samples"),
        ({"source": "local"}, "data.path"),
        ({"source": "hub"}, "data.name"),
        ({"name": "arithmetics"}, "did you mean 'arithmetic'"),
        ({"eval_split": "test"}, "data.eval_split"),
    ],
)
def test_settings_that_cannot_work(options, words):
    with pytest.raises(UserError, match=words):
        load(DataSettings(**options), 0)


def test_the_row_number_survives_sampling_and_splitting(tmp_path):
    rows = [OK] * 40
    rows[30] = {"messages": []}
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    settings = DataSettings(source="local", path=str(tmp_path / "rows.jsonl"), eval_fraction=0.5, seed=1)
    said = ""
    for part in load(settings, 0):
        try:
            format_rows(part, settings, where="part")
        except UserError as error:
            said += str(error)
    assert "rows.jsonl line 31" in said


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda row: 3, "returned a int"),
        (lambda row: {"answer": "a"}, "returned a dict with answer"),
        (lambda row: row["missing"], "raised KeyError"),
        (lambda row: "", "is empty"),
    ],
)
def test_a_wrong_formatting_func(function, words):
    with pytest.raises(UserError, match=words):
        format_rows(Dataset.from_list([{"a": "b"}]), DataSettings(), where="train", formatting_func=function)


def test_a_formatting_func_that_cannot_be_found():
    for path in ("no_such_module.f", "json.no_such_function", "f"):
        with pytest.raises(UserError, match=r"data\.formatting_func"):
            format_rows(Dataset.from_list([{"a": "b"}]), DataSettings(formatting_func=path), where="train")
