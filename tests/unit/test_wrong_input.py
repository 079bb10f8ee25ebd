"""Wrong input of the commands of `hydratune` that is told before a model is loaded; each one clear error, code 2."""

from __future__ import annotations

import io
import json
import sys

import pytest
from commands import run
from rich.console import Console
from test_run_files import make

from hydratune.commands import chat, doctor, generate
from hydratune.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A run with what looks like a model, and a file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "a", summary={"steps": 1}) / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "adapter_config.json"):
        (folder / name).write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    return tmp_path


@pytest.mark.parametrize("target", ["/proc/x/y", "file/x", "x" * 300, "file", "full"])
@pytest.mark.parametrize(
    ("line", "key"),
    [("generate a --prompt x --home . --out", "--out"), ("export a --home .", "DIR"), ("merge a", "target")],
    ids=["generate", "export", "merge"],
)
def test_a_target_that_cannot_be_written_is_told_first(line, key, target, home):
    out, said = run(*line.split(), target, code=2)
    assert said.startswith(f"error: {key} = '{target}': ") and not out
    assert ("is already there" if target in ("file", "full") else "cannot be written") in said
    assert sorted(p.name for p in home.iterdir()) == ["a", "file", "full"]


def test_what_is_looked_at_before_it_is_written_is_not_left_behind(home):
    assert (
        "no such run" in run("generate", "nope", "--prompt", "x", "--home", ".", "--out", "new/x", code=2)[1]
    )
    assert not (home / "new").exists()


def stdin(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_lines_that_are_not_utf_8_are_named(monkeypatch):
    stdin(monkeypatch, b"one\r\n\n" + '{"prompt": "zw\u00f6lf"}\n'.encode())
    assert [*generate._rows("-", None, None)] == [{"prompt": "one"}, {"prompt": "zw\u00f6lf"}]
    stdin(monkeypatch, b"one\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"stdin:2: is not UTF-8 \(byte 1 of the line\)"):
        [*generate._rows("-", None, None)]


def test_a_chat_goes_on_after_what_is_not_utf_8(monkeypatch):
    stdin(monkeypatch, b"\xff\xfe\nhello\n")
    said = [chat._read(False, Console()) for _ in range(3)]
    assert said == ["\ufffd\ufffd\n", "hello\n", None]


def test_doctor_goes_on_after_any_error_of_a_library(monkeypatch):
    def broken():
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    for name in ("devices", "backends", "algorithms", "adapters"):
        monkeypatch.setattr(doctor, name, broken)
    found = json.loads(run("doctor", "--json", code=1)[0])
    (finding,) = found["devices"]
    assert finding["says"] == "cannot be told: OSError: libcudart.so.12: cannot open shared object file"
    assert found["room"] and not found["able"]
    assert "libcudart.so.12" in run("doctor", code=1)[0]
