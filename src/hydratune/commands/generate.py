"""`hydratune generate`: completions of many prompts as JSON lines, in batches of our own sampler."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from hydratune.commands.common import Home, RunName, clear, require_new
from hydratune.errors import UserError, Violation
from hydratune.runs import HOME


@clear
def generate(
    run: RunName,
    source: Annotated[
        str | None, typer.Argument(metavar="-", help="Read stdin: a prompt or a JSON object each line.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows with prompt or messages: jsonl, json, csv or parquet.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write there, a new file; default: stdout.")] = None,
    num: Annotated[int, typer.Option(help="Completions of each prompt.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="The longest completion, in tokens.", min=1)] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: always the likeliest token. Default: 0, of several completions 1.", min=0),
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Of the likeliest tokens, this share of the probability.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same completions.")] = 42,
    system: Annotated[str | None, typer.Option(help="A system message for prompts that have none.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with a text as it is, without the chat template.")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="Of the model that the run started from.")] = False,
    batch_size: Annotated[int, typer.Option(help="Completions at a time.", min=1)] = 32,
    home: Home = HOME,
) -> None:
    """Complete prompts, as JSON lines.

    Example: `hydratune generate latest --prompt 'What is 2 + 3?' --num 4`
    """
    rows = [*_rows(source, prompt, file)]
    heat = temperature if temperature is not None else 1.0 if num > 1 else 0.0
    if num > 1 and heat == 0:
        raise UserError(
            Violation("--num", num, "completions at temperature 0 are all the same", "raise it, or --num 1")
        )
    if out is not None:
        require_new("--out", out, folder=False)
    asked = [_asked(row, system, raw) for row in rows]
    from hydratune.trained import find_writer, load_writer

    place = find_writer(run, home)
    from hydratune.tracking import quiet_libraries

    quiet_libraries()
    from hydratune.rollout import Sampling

    sampling = Sampling(max_new_tokens, temperature=heat, top_p=top_p, top_k=top_k)
    from hydratune.samples import Completer

    trained = load_writer(place)
    import torch

    generator = torch.Generator().manual_seed(seed)
    completer = Completer(trained.tokenizer, sampling, batch_size=batch_size)
    with _opened(out) as stream, trained.base() if base else trained.tuned() as model:
        # in parts, so that what is done is written; large enough that their lengths can be sorted
        many = max(1, 16 * batch_size // num)
        for start in range(0, len(rows), many):
            made = completer(model, asked[start : start + many], copies=num, generator=generator)
            for i, (text, stopped) in enumerate(zip(made.texts, made.stopped, strict=True)):
                line = {**rows[start + i // num], "completion": text, "finished": stopped}
                line |= {"sample": i % num} if num > 1 else {}
                stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            stream.flush()
    if out is not None:
        print(f"{len(rows) * num} completions in {out}", file=sys.stderr)


def _opened(out: Path | None) -> Any:
    if out is None:
        return nullcontext(sys.stdout)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.open("x", encoding="utf-8")


def _rows(source: str | None, prompts: list[str] | None, file: Path | None) -> Iterator[dict[str, Any]]:
    """What is asked, from the one place that was named.

    Raises:
        UserError: none or several were named, nothing is in it, or it cannot be read.
    """
    named = [name for name, value in (("-", source), ("--prompt", prompts), ("--file", file)) if value]
    if len(named) != 1 or source not in (None, "-"):
        what = source if source not in (None, "-") else " ".join(named) or None
        fix = "give one of --prompt TEXT, --file ROWS.jsonl, or - for stdin"
        raise UserError(Violation("prompts", what, "are taken from one place", fix))
    if prompts:
        yield from ({"prompt": text} for text in prompts)
        return
    many = 0
    for row in _of_lines(sys.stdin) if source else _of_files(str(file)):
        many += 1
        yield row
    if not many:
        raise UserError(Violation("prompts", str(file or "-"), "there is none", "give at least one"))


def _of_files(path: str) -> Iterator[dict[str, Any]]:
    from hydratune.data.read import files_of, read_rows

    for found in files_of(path, "--file"):
        for where, row in read_rows(found, "--file"):
            _check(row, where)
            yield row


def _of_lines(stream: TextIO) -> Iterator[dict[str, Any]]:
    for number, raw in enumerate(stream.buffer, 1):
        try:
            line = raw.decode(stream.encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            why = f"is not {stream.encoding.upper()} (byte {error.start + 1} of the line)"
            raise UserError(Violation(f"stdin:{number}", None, why, "convert it, e.g. with iconv")) from None
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        row = row if isinstance(row, dict) else {"prompt": line}
        _check(row, f"stdin:{number}")
        yield row


def _check(row: dict[str, Any], where: str) -> None:
    """
    Raises:
        UserError: nothing is asked.
    """
    asked = row.get("prompt") or row.get("messages")
    if isinstance(asked, str):
        return
    fine = isinstance(asked, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in asked
    )
    if not asked or not fine:
        why = "holds no prompt: a text, or messages with role and content"
        raise UserError(
            Violation(where, ", ".join(row) or None, why, 'name it prompt or messages, e.g. {"prompt": "…"}')
        )


def _asked(row: dict[str, Any], system: str | None, raw: bool) -> Any:
    """Text, or messages up to the answer that is wanted."""
    from hydratune.completions import asked

    prompt = asked(row)
    if isinstance(prompt, str):
        if raw:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if system is not None and not any(m["role"] == "system" for m in prompt or ()):
        return [{"role": "system", "content": system}, *(prompt or ())]
    return prompt
