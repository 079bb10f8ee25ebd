"""Prepared data on disk under a key of everything that made it; a torn entry is made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

_SUMMARY = "summary.json"  # written last: an entry without it is torn
Build = Callable[[], tuple[datasets.Dataset, dict[str, Any]]]


def directory() -> Path:
    """`$HYDRATUNE_CACHE`, else `~/.cache/hydratune/data`."""
    chosen = os.environ.get("HYDRATUNE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hydratune" / "data"


def cached(
    key_parts: dict[str, Any], build: Build, *, cache: bool = True, agreed: Callable[[bool], bool] = bool
) -> tuple[datasets.Dataset, dict[str, Any], bool]:
    """What `build` gives, from disk when it was made before.

    Args:
        key_parts: JSON values that decide the result; this package's sources are added.
        build: makes the data set and its report (JSON values).
        cache: false neither reads nor writes.
        agreed: of processes that build together, whether all have found it.

    Returns:
        The data set, its report, and whether it came from disk.
    """
    if not cache:
        return *build(), False
    text = json.dumps({**key_parts, "code": _code()}, sort_keys=True)
    entry = directory() / hashlib.sha256(text.encode()).hexdigest()
    found = _read(entry)
    if agreed(found is not None) and found is not None:
        return *found, True
    dataset, report = build()
    try:
        _write(entry, dataset, report)
    except OSError as error:
        warnings.warn(
            f"prepared data could not be cached in {entry.parent} ({error}); it will be prepared again next time"
        )
    return dataset, report, False


def _sizes(folder: Path) -> dict[str, int]:
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()
    }


def _read(entry: Path) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    try:
        summary = json.loads((entry / _SUMMARY).read_text(encoding="utf-8"))
        if summary["sizes"] != _sizes(entry / "rows"):
            return None
        dataset = datasets.load_from_disk(str(entry / "rows"))
        if len(dataset) != summary["rows"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):  # pa.ArrowInvalid is a ValueError
        return None
    return dataset, summary["report"]


def _write(entry: Path, dataset: datasets.Dataset, report: dict[str, Any]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    try:
        dataset.save_to_disk(str(temporary / "rows"))
        summary = {"rows": len(dataset), "sizes": _sizes(temporary / "rows"), "report": report}
        (temporary / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
        if entry.exists() and _read(entry) is None:
            shutil.rmtree(entry)
        try:
            temporary.replace(entry)
        except OSError:
            if _read(entry) is None:  # otherwise another process wrote the same entry first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _HashSink:
    """A file that keeps only the hash of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        self.closed = True


def rows_fingerprint(dataset: datasets.Dataset) -> str:
    """A hash of the rows' content, in order, whatever file or object they came from."""
    sink = _HashSink()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        plain = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), plain.schema) as writer:
            writer.write_table(plain)
    return sink.hash.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary with its rules, the chat template and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, rules, tokenizer.chat_template, named]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
