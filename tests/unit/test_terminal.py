"""What is printed: on a terminal as wide as it is, on a pipe plain lines; colours only where they are wanted."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from hydratune import memory, plan, terminal
from hydratune.commands.chat import _Answers
from hydratune.commands.compare import sparklines
from hydratune.progress import final_table
from hydratune.sweep.space import Space
from hydratune.sweep.study import Outcome, Record, StudyConfig
from hydratune.sweep.view import View

SOURCE = Path(plan.__file__).parent
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[;m]")


def console(*, width=80, tty=False, **environment):
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=tty,
        _environ={"TERM": "xterm-256color", **environment},
    )


def lines(console):
    return console.file.getvalue().splitlines()


def test_no_escape_is_written_by_hand():
    found = [
        p
        for p in SOURCE.rglob("*.py")
        if re.search(r"\\x1b|\\033|\\e\[|\\u001b", p.read_text(encoding="utf-8"))
    ]
    assert not found


def test_facts_are_folded_on_a_terminal_and_whole_on_a_pipe():
    rows = [("name", "word " * 30), ("rows", "one\ntwo")]
    pipe, tty = console(width=40), console(width=40, tty=True, NO_COLOR="1")
    terminal.facts(pipe, rows)
    assert lines(pipe) == ["name  " + ("word " * 30).rstrip(), "rows  one", "      two"]
    terminal.facts(tty, rows)
    assert len(lines(tty)) > 4 and all(len(terminal.Text.from_ansi(line).plain) <= 40 for line in lines(tty))


def test_a_table_is_cut_on_a_terminal_and_whole_on_a_pipe():
    header, rows = ["name", "n"], [["x" * 60, Text("1", style="red")], ["y", "22"]]
    pipe, tty = console(width=30), console(width=30, tty=True)
    terminal.columns(pipe, header, rows)
    assert lines(pipe) == ["name" + " " * 58 + "n", "x" * 60 + "  1", "y" + " " * 61 + "22"]
    terminal.columns(tty, header, rows)
    assert len(lines(tty)) == 3 and "…" in lines(tty)[1] and COLOUR.search(lines(tty)[1])


def test_no_color_is_respected():
    tty = console(tty=True, NO_COLOR="1")
    terminal.columns(tty, ["state"], [[terminal.state("failed")]])
    terminal.say(tty, Text("warning", style="yellow"))
    assert "failed" in tty.file.getvalue() and not COLOUR.search(tty.file.getvalue())


def test_what_is_said_is_neither_markup_nor_wrapped():
    pipe = console(width=20)
    terminal.say(pipe, "[red]1/2 :smile: " + "x" * 40)
    assert lines(pipe) == ["[red]1/2 :smile: " + "x" * 40]


@pytest.mark.parametrize(
    ("names", "width", "shown"),
    [
        (["day/a-sft", "day/b-sft"], 9, ["day/a-sft", "day/b-sft"]),
        (["day/a-sft-lora", "day/b-sft-lora"], 10, ["day/a…", "day/b…"]),
        (["day/a-sft-lora", "day/b-dpo-lora"], 11, ["day/a-sft…", "day/b-dpo…"]),
        (["day/a-sft", "day/b-sft"], 5, ["…y/a…", "…y/b…"]),
        (["one-run-alone"], 6, ["…alone"]),
    ],
    ids=["fits", "end", "word", "both", "alone"],
)
def test_names_lose_what_they_have_in_common_first(names, width, shown):
    found = terminal.distinct(names, width)
    assert found == shown and all(len(name) <= width for name in found)


def test_a_model_cannot_command_the_terminal():
    assert terminal.harmless("a\x1b[2Jb\x07\tc\nd\x9b") == "a�[2Jb�\tc\nd�"
    view = _Answers(["tuned"])
    view.texts = ["\x1b[2J[bold]x"]
    tty = console(tty=True)
    tty.print(view)
    assert "\x1b[2J" not in tty.file.getvalue() and "[bold]x" in tty.file.getvalue()


@pytest.mark.parametrize(("width", "beside"), [(60, False), (100, True)])
def test_two_answers_stand_side_by_side_where_there_is_room(width, beside):
    view = _Answers(["tuned", "base"])
    view.texts = ["one", "two"]
    tty = console(width=width, tty=True)
    tty.print(view)
    assert any("one" in line and "two" in line for line in lines(tty)) is beside


def test_a_long_answer_shows_its_end_while_it_grows_and_all_of_it_then():
    view = _Answers(["tuned"])
    view.texts = ["\n".join(f"line {i}" for i in range(100))]
    tty = Console(file=io.StringIO(), width=80, height=20, force_terminal=True)
    tty.print(view)
    assert len(lines(tty)) == 18 and "line 99" in lines(tty)[-1]
    view.whole = True
    tty.print(view)
    assert len(lines(tty)) == 118


def test_curves_share_a_scale():
    assert sparklines([[0.0, 7.0], [3.0]]) == ["▁█", "▄"]
    assert sparklines([[1.0, 1.0], []]) == ["▁▁", ""]
    assert len(sparklines([list(range(1000))])[0]) == 16
    assert sparklines([[float("nan"), 1.0, 2.0]]) == ["▁█"]


def made_plan(**changes):
    facts = {
        "algorithm": "sft",
        "memory": "about 48 MiB at its peak " * 8,
        "train rows": "9 of 9 rows kept\n99 tokens",
    }
    load = memory.MemoryEstimate(*[0.0] * len(memory.MemoryEstimate.__dataclass_fields__))
    values = {
        "facts": facts, "example": [("question ", False), ("answer", True)], "steps": 1, "tokens_per_epoch": 99,
        "parameters": 1, "trained_parameters": 1, "estimate": load, "available": 1, "changes": [],
        "warnings": ["mind the gap " * 20], "needs_checkpointing": False,
    }  # fmt: skip
    return plan.Plan(**{**values, **changes})


def test_a_plan_on_a_pipe_has_a_line_for_each_fact():
    pipe = console(width=40)
    plan.show(made_plan(), pipe)
    shown = lines(pipe)
    assert shown[:4] == [
        "algorithm   sft", "memory      " + ("about 48 MiB at its peak " * 8).rstrip(),
        "train rows  9 of 9 rows kept", "            99 tokens",
    ]  # fmt: skip
    assert "question ⟦answer⟧" in shown and "warning: " + "mind the gap " * 20 in shown
    assert "\x1b" not in pipe.file.getvalue()


@pytest.mark.parametrize(
    ("environment", "marked"), [({}, "green"), ({"NO_COLOR": "1"}, "⟦answer⟧")], ids=["colour", "none"]
)
def test_trained_tokens_are_green_or_in_brackets(environment, marked):
    tty = console(tty=True, **environment)
    plan.show(made_plan(), tty)
    assert marked in tty.file.getvalue()
    assert bool(COLOUR.search(tty.file.getvalue())) is (not environment)


def test_the_table_at_the_end_is_plain_on_a_pipe(tmp_path):
    summary = {
        "metrics": {"final": {"loss": 0.5, "eval_reward": 0.25}, "best": {}}, "seconds": {"training": 61.0}, "steps": 3,
        "tokens_per_second": 2000.0, "tokens": 122000, "peak_memory": {"bytes": 2**30, "kind": "host"},
    }  # fmt: skip
    pipe = console(width=30)
    final_table(summary, tmp_path, pipe)
    assert lines(pipe) == [
        "training loss             0.5000", "mean reward (evaluation)  0.250",
        "training                  3 steps, 122k tokens in 1:01, 2.0k tokens/s", "peak memory               1.0 GiB (host)",
        f"model                     {tmp_path / 'model'}", f"report                    {tmp_path / 'report.html'}",
    ]  # fmt: skip


def record(number, state, values=None, **settings):
    return Record(
        number=number, state=state, values=values, settings=settings, params={}, reason="", seconds=3.0, attempts=1,
        intermediate={}, started=0.0, ended=None, feasible=True, metrics={},
    )  # fmt: skip


def watched(console):
    config = StudyConfig("study", "", Space({}), ("eval_loss",), ("minimize",), n_trials=3)
    trials = [
        record(0, "complete", [0.5], lr=1e-4),
        record(1, "complete", [0.25], lr=1e-3),
        record(2, "running", lr=0.1),
    ]
    with View(console=console) as view:
        view.begin({"study": "study"}, [], config)
        view.told(trials[1], Outcome("complete", [0.25]), trials, [trials[1]])
        view.end(trials, [trials[1]], {})


@pytest.mark.parametrize("width", [80, 140])
def test_a_sweep_has_a_live_table_on_a_terminal(width):
    tty = console(width=width, tty=True)
    watched(tty)
    shown = Text.from_ansi(tty.file.getvalue()).plain
    assert "2 of 3 done" in shown and "left" in shown
    assert re.search(r"★ +1 +complete +0\.25 +0\.001", shown) and re.search(r" 2 +running", shown)


def test_a_sweep_has_plain_lines_on_a_pipe():
    pipe = console(width=40)
    watched(pipe)
    assert "\x1b" not in pipe.file.getvalue()
    assert any(
        line.startswith("trial 1 complete · eval_loss 0.25 · best 0.25 (trial 1) · 2 of 3 done")
        for line in lines(pipe)
    )
