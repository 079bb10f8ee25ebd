"""Rewards give the numbers that functions and the verifier say, and tell what is wrong when they cannot."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rewarding import (
    ANSWERS,
    QUESTIONS,
    TOKENS,
    chat_rows,
    fails,
    ids_of,
    judge,
    plain_rows,
    rewards,
    tree,
    wrong,
)

from hydratune.completions import Completions, asked
from hydratune.errors import TrainingFailed, UserError
from hydratune.held import in_child
from hydratune.reward_sources import unique
from hydratune.rewards import check_sources, correct

# ------------------------------------------------------------------ functions


def test_a_function_gets_what_the_ecosystem_gives_it():
    """Conversations: messages; text: text; the other columns as lists; ids as lists of ints without padding."""
    seen = {}

    def look(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [len(ids) for ids in completion_ids]

    scored = judge(rewards(look))
    _, completions = ids_of(chat_rows())
    assert seen == {
        "prompts": [[{"role": "user", "content": q}] for q in QUESTIONS],
        "completions": [[{"role": "assistant", "content": a}] for a in ANSWERS],
        "completion_ids": [ids.tolist() for ids in completions],
        "tag": [0, 1, 2, 3, 4],
    }
    assert scored.total.tolist() == [len(a) + 1 for a in ANSWERS]
    seen.clear()
    judge(rewards(look), plain_rows(), trainer_state="state")
    assert (
        seen["prompts"] == QUESTIONS and seen["completions"] == ANSWERS and seen["trainer_state"] == "state"
    )


def test_weights_none_and_names():
    # row 0: 2·1 + (−0.5)·10 = −3; row 1: only the second, −0.5·20 = −10; rows 2…4: 2·3 and −0.5·0
    first = lambda completions, **_: [1, None, 3, 3, 3]  # noqa: E731

    def second(completions):
        return [10.0, 20.0, 0.0, 0.0, None]

    scored = judge(rewards(first, second, second, weights=[2, -0.5, 0]))
    assert scored.total.tolist() == [-3.0, -10.0, 6.0, 6.0, 6.0]
    assert [*scored.each] == ["lambda", "second", "second_2"]
    assert scored.each["lambda"].isnan().tolist() == [False, True, False, False, False]
    assert judge(rewards(second, first)).total.tolist() == [11.0, 20.0, 3.0, 3.0, 3.0]
    assert unique(["a", "a", "a_2", "a"]) == ("a", "a_3", "a_2", "a_4")


def test_functions_come_in_many_kinds(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Judge:
        def __call__(self, completions, tag):
            return torch.tensor(tag)

    def scaled(completions, scale, **_):
        return np.full(len(completions), scale)

    async def slowly(completions, **_):
        await asyncio.sleep(0.01)
        return [4.0] * len(completions)

    made = rewards(
        "my_rewards.half", "my_rewards:half", Judge(), functools.partial(scaled, scale=3), slowly, "correct"
    )
    assert made.names == ("half", "half_2", "Judge", "scaled", "slowly", "correct")
    rows = [dict(row, answer=a) for row, a in zip(chat_rows(), [2, 5, "42", None, "x"], strict=True)]
    scored = judge(made, rows)
    assert scored.each["correct"].nan_to_num(-1).tolist() == [1.0, 0.0, 1.0, -1.0, -1.0]
    # 0.5 + 0.5 + tag + 3 + 4 + whether it is right
    assert scored.total.tolist() == [9.0, 9.0, 11.0, 11.0, 12.0]


def test_a_function_cannot_change_what_others_see():
    rows = chat_rows()

    def spoil(prompts, completions, tag):
        for messages in prompts:
            messages[0]["content"] = "spoiled"
            messages.append("more")
        tag.clear()
        completions.clear()
        return [0.0] * 5

    def look(prompts, completions, tag):
        assert [p[0]["content"] for p in prompts] == QUESTIONS and len(completions) == len(tag) == 5
        return [1.0] * 5

    assert judge(rewards(spoil, look), rows).total.tolist() == [1.0] * 5
    assert rows == chat_rows()


def test_async_functions_run_at_once_also_inside_a_running_loop_and_in_a_fork():
    running: list[str] = []

    async def meet(completions):
        """Ends when two others have begun, and so never if each waited for the one before."""
        running.append("here")
        while len(running) % 3:
            await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    made = rewards(meet, meet, meet, timeout=20)
    assert judge(made).total.tolist() == [3.0] * 5

    async def notebook():
        return judge(made).total.tolist()

    assert asyncio.run(notebook()) == [3.0] * 5
    # the parent's loop runs in the parent alone
    assert in_child(lambda: judge(made).total.tolist()) == [3.0] * 5


def test_one_loop_serves_all_calls():
    """A client made in the first call works in the second."""
    loops = []

    async def client(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    made = rewards(client)
    judge(made)
    judge(made)
    assert loops[0] is loops[1]


def test_a_function_that_raises_is_named():
    def careless(completions):
        return [1 / 0]

    async def late(completions):
        raise KeyError("url")

    async def slow(completions):
        raise TimeoutError("the server sleeps")

    for function, said, kind in (
        (careless, "careless failed on 5 rows (ZeroDivisionError: division by zero)", ZeroDivisionError),
        (late, "late failed on 5 rows (KeyError: 'url')", KeyError),
        (slow, "slow failed on 5 rows (TimeoutError: the server sleeps)", TimeoutError),
    ):
        with pytest.raises(TrainingFailed) as caught:
            judge(rewards(function))
        assert said in str(caught.value) and isinstance(caught.value.__cause__, kind)


def test_an_async_function_that_does_not_end_is_left():
    async def hangs(completions):
        await asyncio.sleep(60)

    began = time.monotonic()
    assert "hangs gave nothing for 5 rows within 0.2 s" in fails(hangs, timeout=0.2)

    release = threading.Event()

    async def blocks(completions):
        release.wait(30)

    try:
        assert "within 0.2 s" in fails(blocks, timeout=0.2)
        assert time.monotonic() - began < 20
    finally:
        release.set()


def test_a_failure_cancels_what_still_runs():
    started, cancelled = threading.Event(), threading.Event()

    async def hangs(completions):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    def broken(completions):
        assert started.wait(20)
        raise ValueError("first")

    with pytest.raises(TrainingFailed, match="broken failed"):
        judge(rewards(hangs, broken))
    assert cancelled.wait(20)


@pytest.mark.parametrize(
    "result,said",
    [
        ([1.0, 2.0], "2 rewards for 5 rows"),
        ([1.0] * 6, "6 rewards for 5 rows"),
        (None, "a NoneType, not a list"),
        (1.0, "a float, not a list"),
        ("12345", "a str, not a list"),
        ({0: 1.0}, "a dict, not a list"),
        ((float(i) for i in range(5)), "a generator, not a list"),
        (torch.tensor(1.0), "a Tensor, not a list"),
        ([1.0, "2", 3.0, 4.0, 5.0], '2, a str for row 2 of 5 ("Say hi.")'),
        ([1.0, 1.0, [2.0], 1.0, 1.0], "[2.0], a list for row 3 of 5"),
        ([1.0, 1.0, 1.0, 1j, 1.0], "1j, a complex for row 4 of 5"),
        ([float("nan")] + [0.0] * 4, 'nan for row 1 of 5 ("What is 1 + 1?")'),
        (np.array([0.0, np.nan, 0.0, np.inf, 0.0]), "nan for row 2 of 5 (\"Say hi.\") and 1 more"),
        ([0.0, 0.0, 0.0, 0.0, -float("inf")], "-inf for row 5 of 5"),
        ([0.0, 0.0, 0.0, 1e39, 0.0], "1e+39 for row 4 of 5"),
        ([0.0, 0.0, 0.0, 0.0, 10**400], "for row 5 of 5"),
        (np.zeros((5, 2)), "[0.0, 0.0], a list for row 1 of 5"),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_no_list_of_finite_numbers_is_refused(result, said):
    def odd(completions):
        return result

    message = fails(odd)
    assert (
        message.startswith("the reward function odd returned") and said in message and "None where" in message
    )


def test_a_row_without_any_reward_is_named():
    def shy(completions):
        return [1.0, None, 1.0, None, 1.0]

    assert 'row 2 of 5 ("Say hi."), nor to 1 others: shy gave None' in fails(shy)
    rows = [dict(row, answer="many") for row in chat_rows()]
    assert "needs a whole number as answer: 'many'" in fails("correct", rows=rows)


def test_dotted_paths_that_lead_nowhere(tmp_path, monkeypatch):
    source = "RATE = 3\nclass Judge:\n    pass\ndef wants(completions, level):\n    return []\n"
    (tmp_path / "odd_rewards.py").write_text(source)
    (tmp_path / "bad_rewards.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "No module named" in wrong("no_such_module.fn")
    assert "RuntimeError: at import" in wrong("bad_rewards.fn")
    assert "did you mean 'wants'?" in wrong("odd_rewards.want")
    assert "not a function" in wrong("odd_rewards.RATE")
    assert "is a class" in wrong("odd_rewards.Judge")
    assert "is a int, not a source" in wrong(7)
    said = wrong("odd_rewards.wants", columns=["prompt", "answer"])
    assert "needs level, and the rows have prompt, answer" in said
    assert not check_sources(["odd_rewards.wants"], columns=["level"])
    assert not check_sources("odd_rewards.wants", columns=None)  # not known yet
    assert "wants" in fails("odd_rewards.wants", UserError)  # and so it is found when it is called
    two = check_sources(["no_such_module.fn", "bad_rewards.fn"], columns=None, weights=[1])
    assert len(two) == 3  # all at once
    with pytest.raises(UserError) as caught:
        rewards("no_such_module.fn", "bad_rewards.fn", weights=[1])
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize(
    "weights,said",
    [
        ([1.0], "1 weights for 2 rewards"),
        ([1.0, 1.0, 1.0], "3 weights for 2 rewards"),
        ([1.0, float("nan")], "not all finite numbers"),
        ([1.0, "2"], "not all finite numbers"),
        ([True, 1.0], "not all finite numbers"),
        ([0, 0.0], "all 0"),
        (3.0, "1 weights for 2"),
    ],
)
def test_weights_that_cannot_be(weights, said):
    function = lambda completions: [0.0]  # noqa: E731
    assert said in wrong(function, function, weights=weights)
    with pytest.raises(UserError, match=said):
        rewards(function, function, weights=weights)


def test_no_source_needs_answers():
    for given in ((), None, []):
        (found,) = check_sources(given, columns=["prompt", "label"])
        assert "column answer" in str(found) and "dotted path" in str(found) and "algo=reward" in str(found)
        assert not check_sources(given, columns=["prompt", "answer"])
    assert "needs answer" in wrong("correct", columns=["prompt"])
    made = rewards()
    assert made.names == ("correct",)
    with pytest.raises(UserError, match="needs answer, and the rows have tag"):
        judge(made)
    scored = judge(made, [dict(row, answer=a) for row, a in zip(chat_rows(), (2, 1, 42, 1, 1), strict=True)])
    assert scored.total.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_the_verifier_takes_any_text():
    assert correct(["9" * 5000, "3"], ["3", 3]) == [0.0, 1.0]  # more digits than Python reads
    assert correct([[{"role": "assistant", "content": "-4"}]], ["-4"]) == [1.0]
    assert correct(["1", "1"], [None, "1.5"]) == [None, None]


# ------------------------------------------------------------------ what both read


def test_what_a_row_asks():
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert asked({"prompt": "text", "messages": [user]}) == "text"
    assert asked({"messages": [user, assistant]}) == [user]
    assert asked({"messages": [user, assistant, user]}) == [user, assistant, user]
    assert asked({"prompt_ids": [1]}) is None


def test_completions_are_decoded_without_special_tokens():
    prompts, completions = ids_of(chat_rows())
    completions[0] = completions[0][:-1]
    batch = Completions(chat_rows(), prompts, completions, TOKENS)
    assert batch.texts == ANSWERS and batch.finished == [False, True, True, True, True]
    assert batch.name(1) == 'row 2 of 5 ("Say hi.")'
    assert Completions([{"prompt": "w" * 99}], [[1]], [[2]], TOKENS).name(0) == f'row 1 of 1 ("{"w" * 59}…")'


def test_no_row_gives_no_reward():
    scored = rewards("correct")([], [], [])
    assert scored.total.shape == (0,) and scored.each["correct"].shape == (0,)


def test_checks_do_not_import_torch(tmp_path):
    tree().save_pretrained(tmp_path / "judge")
    code = (
        "import sys; from hydratune.rewards import Rewards, check_sources\n"
        f"found = check_sources([{str(tmp_path / 'judge')!r}, 'math.sqrt', 'correct'], columns=['answer'])\n"
        "assert not found, found\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
