"""Data sets made from a seed, so that a first run needs no download: verifiable small arithmetic."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

NAMES = ("arithmetic",)


def arithmetic(size: int, seed: int) -> list[dict[str, Any]]:
    """`size` conversations of one question and one answer, the same for the same seed.

    Each row is `{"messages": [user, assistant], "answer": str}`, e.g. "What is 17 + 25?" → "17 + 25 = 42".
    Sums and differences are of numbers up to 50, products of numbers up to 12.
    """
    rng = random.Random(seed)
    return [_problem(rng) for _ in range(size)]


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


def verify(row_or_answer: Mapping[str, Any] | str | int, completion: str) -> bool:
    """True when the last whole number in the completion is the answer (of the row, or given itself)."""
    answer = row_or_answer["answer"] if isinstance(row_or_answer, Mapping) else row_or_answer
    numbers = re.findall(r"(?<![\w.])-?\d+(?![\w]|\.\d)", completion)
    return bool(numbers) and int(numbers[-1]) == int(answer)
