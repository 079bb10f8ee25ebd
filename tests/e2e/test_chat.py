"""`hydratune chat`: in a pseudo-terminal, as a person sees it, and on a pipe."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

import pytest
from commands import greedy, run

PROGRAM = str(Path(sys.executable).parent / "hydratune")


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *command, width=100):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.environ.update(TERM="xterm-256color", COLUMNS=str(width))
            os.execv(command[0], [str(c) for c in command])
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self._bytes, self._seen = b"", 0

    @property
    def shown(self):
        return self._bytes.decode(errors="replace")

    def wait_for(self, text, seconds=90):
        """What was shown since the last such text, up to this one."""
        end = time.monotonic() + seconds
        while (at := self._bytes.find(text.encode(), self._seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self._bytes[self._seen :]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self._bytes += os.read(self.fd, 65536)
        start, self._seen = self._seen, at + len(text.encode())
        return self._bytes[start : self._seen].decode(errors="replace")

    def type(self, text):
        os.write(self.fd, text.encode())

    def press(self, key, text):
        """Presses a key until it is heard: readline misses one that comes between its prompt and its wait for input."""
        for _ in range(12):
            self.type(key)
            with suppress(AssertionError):
                return self.wait_for(text, seconds=5)
        return self.wait_for(text)

    def end(self, seconds=60):
        """The exit code, once everything was shown."""
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            if not select.select([self.fd], [], [], 0.2)[0]:
                continue
            try:
                if not (data := os.read(self.fd, 65536)):
                    break
            except OSError:  # so Linux tells that the other side is closed
                break
            self._bytes += data
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("width", [60, 120])
def test_chat_in_a_terminal(home, width):
    """Answers of both models, a conversation begun anew, an answer stopped by Ctrl-C, and the end by Ctrl-D."""
    command = [
        PROGRAM,
        "chat",
        home / "adapter",
        "--max-new-tokens",
        "400",
        "--temperature",
        "1",
        "--seed",
        "1",
    ]
    terminal = Terminal(*command, width=width)
    assert "base: random weights" in terminal.wait_for("you ›")
    for _ in range(10):  # an answer may end before the Ctrl-C comes
        terminal.type("What is 1 + 1?\n")
        terminal.wait_for("tuned")
        terminal.wait_for("base")
        terminal.type("\x03")
        if "(stopped)" in terminal.wait_for("you ›"):
            break
    assert "(stopped)" in terminal.shown
    terminal.type("/reset\n")
    terminal.wait_for("begun anew")
    terminal.wait_for("you ›")
    terminal.type("/what\n")
    terminal.wait_for("there is no /what")
    terminal.wait_for("you ›")
    terminal.press("\x03", "Ctrl-D ends")
    terminal.wait_for("you ›")  # before that, a Ctrl-D is the line discipline's, not ours
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown and "error" not in terminal.shown


def test_chat_on_a_pipe_prints_plain_answers(home):
    question = "What is 3 + 4?"
    done = [
        run("chat", home / "whole", "--temperature", 0, "--max-new-tokens", 12, stdin=text)
        for text in (f"{question}\n", f"{question}\n{question}\n/reset\n{question}\n/exit\nno\n")
    ]
    answer = greedy(home / "whole" / "model", [{"role": "user", "content": question}], 12)
    assert "\n".join(done[0][0].splitlines()) == answer and "\x1b" not in done[0][0]
    assert "trained from random weights" in done[0][1]
    first = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    second = greedy(home / "whole" / "model", [*first, {"role": "user", "content": question}], 12)
    assert done[1][0] == f"{answer}\n{second}\n{answer}\n"


def test_chat_keeps_two_conversations(home):
    lines = "What is 3 + 4?\nWhat is 3 + 4?\n"
    flags = ["--temperature", 0, "--max-new-tokens", 6]
    both, _ = run("chat", home / "adapter", *flags, stdin=lines)
    alone, _ = run("chat", home / "adapter", *flags, "--no-base", stdin=lines)
    tuned = [line.removeprefix("tuned: ") for line in both.splitlines() if line.startswith("tuned: ")]
    assert len(tuned) == 2 and "base: " in both
    assert tuned == [line for line in alone.splitlines() if line in tuned]
