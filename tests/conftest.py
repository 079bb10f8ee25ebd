"""Fixtures shared by all tests: the real data beside the repository, and tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not _SHARED.is_dir():
        pytest.skip("the shared data folder (../shared/data) is not here")
    return _SHARED


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "qwen2.5")


@pytest.fixture(scope="session")
def marked_tokenizer(shared_data):
    """The Qwen tokenizer with generation marks in its template."""
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizer" / "qwen2.5"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (folder / "chatml_generation.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache of prepared data."""
    monkeypatch.setenv("HYDRATUNE_CACHE", str(tmp_path / "hydratune-cache"))
