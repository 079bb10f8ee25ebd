"""`hydratune chat`: talk to a trained model, with the model that it started from beside it."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hydratune import terminal
from hydratune.commands.common import Home, RunName, clear
from hydratune.errors import UserError
from hydratune.runs import HOME

_BESIDE = 72  # characters of a terminal from which on two answers stand side by side
_HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@clear
def chat(
    run: RunName,
    base: Annotated[
        bool,
        typer.Option(
            "--base/--no-base", help="Also ask the model that it started from, where that is known."
        ),
    ] = True,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Of the likeliest tokens, this share of the probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For the same answers each time.")] = None,
    home: Home = HOME,
) -> None:
    """Talk to a run's model, the base beside it.

    Example: `hydratune chat latest --temperature 0`
    """
    from hydratune.trained import find_writer, load_writer

    place = find_writer(run, home)
    from hydratune.tracking import quiet_libraries

    quiet_libraries()
    from hydratune.rollout import Sampling

    sampling = Sampling(max_new_tokens, temperature=temperature, top_p=top_p)
    trained = load_writer(place)
    console, talks = Console(), sys.stdin.isatty() and sys.stdout.isatty()
    said = Console(stderr=True)  # what is no answer, so that a pipe gets answers alone
    names = ["tuned"]
    if base and trained.base_name is None:
        terminal.say(said, f"no base beside it: {trained.no_base}")
    elif base:
        names.append("base")
    if talks:
        terminal.say(console, trained.place.name + (f", base: {trained.base_name}" if len(names) > 1 else ""))
        terminal.say(console, _HELP)
    talk = Talk(trained, names, sampling, system, seed)
    while (line := _read(talks, console)) is not None:
        word = line.strip()
        if word == "/exit":
            return
        if word == "/reset":
            talk.reset()
            terminal.say(said, "begun anew")
        elif word.startswith("/"):
            terminal.say(said, f"there is no {word.split()[0]}: {_HELP}")
        elif word:
            try:
                answers = talk.ask(line.rstrip("\r\n"))
                _show(console, names, answers) if talks else _print(names, answers)
            except UserError as error:  # of a conversation that has become too long
                talk.forget()
                terminal.say(said, f"{error}\n    → or begin anew: /reset")
                if not talks:
                    raise


def _read(talks: bool, console: Console) -> str | None:
    """The next line; None at the end."""
    if not talks:
        return sys.stdin.buffer.readline().decode(sys.stdin.encoding, errors="replace") or None
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing, where Python has it
    while True:
        try:
            return input("you › ")
        except EOFError:
            terminal.say(console, "")
            return None
        except KeyboardInterrupt:
            terminal.say(console, "\nCtrl-D ends")
        except UnicodeDecodeError:
            terminal.say(console, f"that line was not {sys.stdin.encoding.upper()}")


class Talk:
    """A conversation with one model or with two, each of which remembers its own answers.

    Args:
        names: "tuned", "base".
    """

    def __init__(
        self, trained: Any, names: list[str], sampling: Any, system: str | None, seed: int | None
    ) -> None:
        import torch

        self._trained, self._names, self._sampling = trained, names, sampling
        self._system = system
        self._generator = torch.Generator()
        self._generator.manual_seed(seed) if seed is not None else self._generator.seed()
        self.reset()

    def reset(self) -> None:
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._messages: dict[str, list[dict[str, str]]] = {name: [*first] for name in self._names}

    def forget(self) -> None:
        """Take back a question without an answer."""
        for messages in self._messages.values():
            if messages and messages[-1]["role"] == "user":
                messages.pop()

    def ask(self, question: str) -> Generator[list[str], None, None]:
        """The answers as far as they have come, after each token.

        A closed or interrupted one is remembered as far as it came.
        """
        for messages in self._messages.values():
            messages.append({"role": "user", "content": question})
        answers = dict.fromkeys(self._names, "")
        streams: dict[str, Generator[str, None, None]] = {}
        for name in self._names:
            with self._of(name) as model:
                streams[name] = self._stream(name, model)
        try:
            while streams:
                for name in [*streams]:
                    with self._of(name):
                        text = next(streams[name], None)
                    if text is None:
                        del streams[name]
                    else:
                        answers[name] = text
                yield [*answers.values()]
        finally:
            for stream in streams.values():
                stream.close()
            if any(answers.values()):
                for name, messages in self._messages.items():
                    messages.append({"role": "assistant", "content": answers[name]})

    def _of(self, name: str) -> Any:
        return self._trained.base() if name == "base" else self._trained.tuned()

    def _stream(self, name: str, model: Any) -> Generator[str, None, None]:
        """The answer after each token; of the base, only to be asked for the next while the adapter is off."""
        from hydratune.rollout import stream
        from hydratune.samples import Completer, encode_prompt

        tokenizer = self._trained.tokenizer
        _, prompt = encode_prompt(tokenizer, self._messages[name])
        sampling = Completer(tokenizer, self._sampling, batch_size=1).settled(model, conversation=True)
        ids: list[int] = []
        for token in stream(model, prompt, sampling, generator=self._generator):
            ids.append(token)
            yield tokenizer.decode(ids, skip_special_tokens=True)


def _print(names: list[str], answers: Iterator[list[str]]) -> None:
    """Whole answers as plain lines."""
    *_, last = [[""] * len(names), *answers]
    for name, text in zip(names, last, strict=True):
        text = terminal.harmless(text)
        print(f"{name}: {text}" if len(names) > 1 else text, flush=True)


def _show(console: Console, names: list[str], answers: Generator[list[str], None, None]) -> None:
    """Answers while they grow, side by side where there is room; Ctrl-C stops them."""
    view = _Answers(names)
    live = Live(view, console=console, refresh_per_second=12)
    try:
        live.start()  # in here too: it may be interrupted while it hides the cursor
        for view.texts in answers:
            live.update(view)
    except KeyboardInterrupt:
        view.stopped = True
    finally:
        answers.close()
        view.whole = True
        live.update(view)
        live.stop()


class _Answers:
    """What Rich draws: answers side by side or below each other; while they grow only as many last lines as fit."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.texts = names, [""] * len(names)
        self.stopped = self.whole = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines = console.render_lines(self._drawn(console), options, pad=False)
        most = max(4, console.height - 2)
        for line in lines if self.whole else lines[-most:]:
            yield from line
            yield Segment.line()

    def _drawn(self, console: Console) -> Table:
        styles = {"tuned": "bold green", "base": "bold blue"}
        texts = [Text(terminal.harmless(text)) for text in self.texts]
        if self.stopped:
            for text in texts:
                text.append(" (stopped)", style="dim")
        if len(self.names) > 1 and console.width >= _BESIDE:
            table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True)
            for name in self.names:
                table.add_column(Text(name, style=styles[name]), ratio=1, overflow="fold")
            table.add_row(*texts)
            return table
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(overflow="fold")
        for name, text in zip(self.names, texts, strict=True):
            table.add_row(Text(name, style=styles[name]) if len(self.names) > 1 else text)
            if len(self.names) > 1:
                table.add_row(text)
        return table
