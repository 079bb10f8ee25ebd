"""Local files to rows, strictly: every fault is named by file and line, and all of them are told together."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hydratune.errors import UserError, Violation, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
ORIGIN = "__origin__"  # hidden column with the file and line of a row; formatting drops it
_SHOWN = 10
_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def shorten(violations: list[Violation], what: str) -> UserError:
    """An error with the first violations and a count of those that are left out."""
    shown = violations[:_SHOWN]
    if len(violations) > _SHOWN:
        more = len(violations) - _SHOWN
        shown.append(
            Violation(
                what, None, f"and {more} more of these", "repair the ones above and run again for the rest"
            )
        )
    return UserError(shown)


def files_of(path: str, key: str) -> list[Path]:
    """The data files at a path (a file, or a folder's files in name order).

    Raises:
        UserError: nothing there, a folder without data files, or a suffix that is not known.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        found = sorted(p for p in target.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
        if not found:
            names = ", ".join(sorted(p.name for p in target.iterdir())[:8]) or "nothing"
            raise UserError(
                Violation(
                    key,
                    path,
                    f"the folder has no data file (found: {names})",
                    f"put files in it that end in {_known()}",
                )
            )
        return found
    if not target.exists():
        parent = target.parent
        siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = (
            nearest(target.name, siblings) if siblings else f"the folder {parent} does not exist or is empty"
        )
        raise UserError(Violation(key, path, "there is no such file", hint))
    if not target.name.lower().endswith(SUFFIXES):
        raise UserError(
            Violation(
                key,
                path,
                f"the suffix '{target.suffix}' is not one that can be read",
                f"give a file that ends in {_known()}",
            )
        )
    return [target]


def _known() -> str:
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]


def read_rows(file: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (origin, row) of one file; the origin is e.g. "train.jsonl line 12".

    Raises:
        UserError: after the whole file was looked at, with its first faults and a count of the others.
    """
    name = file.name.lower()
    if file.stat().st_size == 0:
        raise UserError(Violation(key, str(file), "the file is empty", "give a file with at least one row"))
    if name.endswith(".parquet"):
        yield from _parquet(file, key)
        return
    faults: list[Violation] = []
    stem = name.removesuffix(".gz")
    reader = _jsonl if stem.endswith(".jsonl") else _json if stem.endswith(".json") else _csv
    count = 0
    try:
        for origin, row in reader(file, faults):
            if isinstance(row, dict):
                count += 1
                yield origin, row
            else:
                kind = _JSON_NAMES.get(type(row), "a number")
                faults.append(
                    Violation(
                        origin,
                        None,
                        f"the row is {kind}, not an object",
                        'write each row as {"column": value, …}',
                    )
                )
    except (gzip.BadGzipFile, EOFError) as error:
        why = f"the gzip file is broken ({error})"
        faults.append(Violation(key, str(file), why, "compress it again"))
    if faults:
        raise shorten(faults, str(file))
    if not count:
        raise UserError(Violation(key, str(file), "the file has no row", "give a file with at least one row"))


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> Violation:
    byte = error.object[error.start]
    return Violation(
        f"{file.name} line {line}",
        None,
        f"byte {error.start + 1} of the line (0x{byte:02x}) is not UTF-8",
        f"convert the file, e.g. iconv -f latin1 -t utf-8 {file.name}",
    )


def _bad_json(origin: str, error: json.JSONDecodeError) -> Violation:
    at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
    return Violation(
        origin, None, f"is not JSON: {error.msg} at {at}", "repair the line; each row is one JSON object"
    )


def _jsonl(file: Path, faults: list[Violation]) -> Iterator[tuple[str, Any]]:
    with _open(file) as stream:
        for number, raw in enumerate(stream, 1):
            origin = f"{file.name} line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield origin, json.loads(text)
            except UnicodeDecodeError as error:
                faults.append(_not_utf8(file, number, error))
            except json.JSONDecodeError as error:
                faults.append(_bad_json(origin, error))


def _text(file: Path, faults: list[Violation]) -> str:
    with _open(file) as stream:
        raw = stream.read()
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            faults.append(_not_utf8(file, number, error))
    return "" if faults else raw.decode("utf-8-sig")


def _json(file: Path, faults: list[Violation]) -> Iterator[tuple[str, Any]]:
    text = _text(file, faults)
    if faults or not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":  # rows a line under the name .json
            yield from _jsonl(file, faults)
        else:
            faults.append(_bad_json(file.name, error))
        return
    if isinstance(rows, dict):
        why = f"holds one object (keys: {', '.join(list(rows)[:8])}), not a list of rows"
        faults.append(Violation(file.name, None, why, "write a list [row, …], or one row a line as .jsonl"))
    elif not isinstance(rows, list):
        faults.append(Violation(file.name, None, "does not hold a list of rows", "write a list [row, …]"))
    else:
        yield from ((f"{file.name} row {i}", row) for i, row in enumerate(rows, 1))


def _csv(file: Path, faults: list[Violation]) -> Iterator[tuple[str, Any]]:
    text = _text(file, faults)
    if faults or not text.strip():
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader)
    if len(set(header)) != len(header) or not all(header):
        why = f"the header has an empty or repeated column name: {', '.join(header)}"
        faults.append(Violation(f"{file.name} line 1", None, why, "give every column its own name"))
        return
    line = 2
    try:
        for cells in reader:
            origin, line = f"{file.name} line {line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                why = f"has {len(cells)} cells where the header has {len(header)}"
                faults.append(
                    Violation(
                        origin, None, why, 'quote cells that hold a comma, a quote or a line break: "…"'
                    )
                )
                continue
            yield origin, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        faults.append(
            Violation(
                f"{file.name} line {line}", None, f"is not CSV: {error}", "close the quotes in this row"
            )
        )


def _parquet(file: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        why = f"is not a parquet file that can be read ({str(error).splitlines()[0]})"
        raise UserError(Violation(key, str(file), why, "write the file again")) from error
    if not number:
        raise UserError(Violation(key, str(file), "the file has no row", "give a file with at least one row"))
