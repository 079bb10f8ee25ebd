"""Data sets made from a seed, so that a first run needs no download: verifiable small arithmetic."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

NAMES = ("arithmetic",)
QUESTIONS = 51 * 51 + 51 * 52 // 2 + 13 * 13  # that there are: sums, differences (none below 0), products


def arithmetic(size: int, seed: int, goal: str = "tokens", distinct: bool = False) -> list[dict[str, Any]]:
    """`size` questions with answers, the same for the same seed.

    Sums and differences are of numbers up to 50, products of numbers up to 12, e.g. "What is 17 + 25?" → "17 + 25 = 42".

    Args:
        size: with `distinct` at most `QUESTIONS`.
        goal: "tokens" and "prompts" give `{"messages": [user, assistant], "answer": str}`. "preference" gives prompt, chosen and
            rejected, the right answer and a wrong one; "unpaired" prompt, completion and label, about half of them
            wrong; both with the same questions and `answer` too.
        distinct: no question twice; else they are drawn one by one, and many come again.
    """
    rng, slips = random.Random(seed), random.Random(f"{seed} slips")
    rows: list[dict[str, Any]] = []
    asked: set[str] = set()
    while len(rows) < size:
        row = _problem(rng)
        question = row["messages"][0]["content"]
        if not (distinct and question in asked):
            rows.append(row)
            asked.add(question)
    return rows if goal in ("tokens", "prompts") else [_judged(row, goal, slips) for row in rows]


def _problem(rng: random.Random) -> dict[str, Any]:
    operator = rng.choice("+-*")
    top = 12 if operator == "*" else 50
    a, b = rng.randint(0, top), rng.randint(0, top)
    if operator == "-" and a < b:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return {
        "messages": [
            {"role": "user", "content": f"What is {a} {operator} {b}?"},
            {"role": "assistant", "content": f"{a} {operator} {b} = {result}"},
        ],
        "answer": str(result),
    }


def _judged(row: dict[str, Any], goal: str, rng: random.Random) -> dict[str, Any]:
    """The question with its answer and a wrong one: off by one, two or ten, as people are, or as often any number."""
    question, right = row["messages"]
    result = answer = int(row["answer"])
    while result == answer or result < 0:
        result = answer + rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < 0.5 else rng.randint(0, 100)
    wrong = {"role": "assistant", "content": f"{right['content'].rpartition('= ')[0]}= {result}"}
    if goal == "preference":
        return {"prompt": [question], "chosen": [right], "rejected": [wrong], "answer": row["answer"]}
    label = rng.random() < 0.5
    return {
        "prompt": [question],
        "completion": [right if label else wrong],
        "label": label,
        "answer": row["answer"],
    }


def verifiable(answer: Any) -> bool:
    """Whether a column `answer` holds a whole number, against which completions can be held."""
    return isinstance(answer, int | str) and re.fullmatch(r"-?\d+", str(answer)) is not None


def answered(row: Mapping[str, Any]) -> bool:
    """Whether a formatted row can be verified."""
    return verifiable(row.get("answer"))


def verify(row_or_answer: Mapping[str, Any] | str | int, completion: str) -> bool:
    """True when the last whole number in the completion is the answer (of the row, or given itself)."""
    answer = row_or_answer["answer"] if isinstance(row_or_answer, Mapping) else row_or_answer
    numbers = re.findall(r"(?<![\w.])-?\d+(?![\w]|\.\d)", completion)
    # more digits than any answer has are more than Python reads
    return bool(numbers) and len(numbers[-1]) <= len(str(answer)) + 20 and int(numbers[-1]) == int(answer)
