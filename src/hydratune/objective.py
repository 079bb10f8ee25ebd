"""What a run is judged by: `METRIC` or `METRIC:RULE`, and whether less or more of it is better.

The rule says which of the logged values counts: `last` (the default), `best`, or `meanK`, the mean of the last K. It is
part of the run's own config, so that a trial of a sweep and a single run of its command give the same value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["minimize", "maximize"]

# Facts of summary.json that may be an objective or a constraint: name → (path in the summary, factor).
FACTS: dict[str, tuple[tuple[str, ...], float]] = {
    "train_tokens_per_second": (("tokens_per_second",), 1.0),
    "peak_memory_gib": (("peak_memory", "bytes"), 2.0**-30),
    "training_seconds": (("seconds", "training"), 1.0),
}
REWARDS = ("eval_reward", "reward", "objective/scores")  # mean rewards of online runs
_DEFAULTS = ("eval_loss", *REWARDS)
REWARD_ACCURACY = ("eval_rewards/accuracies", "eval_accuracy")  # shares of pairs or rows on the right side
# Of these the name tells nothing: a KL is a budget, and the reward of one side is no goal of its own.
_NEITHER = re.compile(r"(rewards/(chosen|rejected|std)|non_score_reward)$")
_LESS = re.compile(r"(loss|perplexity|seconds|runtime|memory_gib|entropy|grad_norm|error)$")
_MORE = re.compile(
    r"(accuracy|accuracies|reward|rewards?/\w+|margins?|per_second|scores?|win_rate|bleu|f1|mfu)$"
)


@dataclass(frozen=True)
class Objective:
    """One objective: the metric's name, and which of its values counts."""

    metric: str
    rule: str = "last"

    @classmethod
    def parse(cls, text: str) -> Objective:
        """
        Raises:
            ValueError: the rule is none of last, best, meanK.
        """
        metric, _, rule = str(text).partition(":")
        if rule and not re.fullmatch(r"last|best|mean[1-9]\d*", rule):
            raise ValueError(f"'{rule}' is no rule: last, best, or mean3 for the mean of the last three")
        return cls(metric.strip(), rule or "last")

    def __str__(self) -> str:
        return self.metric if self.rule == "last" else f"{self.metric}:{self.rule}"

    def value(
        self, events: Iterable[Mapping[str, Any]], summary: Mapping[str, Any] | None = None
    ) -> float | None:
        """The value over log events (as in metrics.jsonl), or of a fact of the summary; None when never logged."""
        if self.metric in FACTS:
            return fact(self.metric, summary or {})
        # what was logged as null was not finite
        values = [
            math.nan if e[self.metric] is None else float(e[self.metric]) for e in events if self.metric in e
        ]
        if not values:
            return None
        if self.rule == "best":
            finite = [v for v in values if math.isfinite(v)] or [math.nan]
            return max(finite) if direction(self.metric) == "maximize" else min(finite)
        if self.rule.startswith("mean"):
            last = values[-int(self.rule[4:]) :]
            return sum(last) / len(last)
        return values[-1]


def direction(metric: str) -> Direction | None:
    """Whether less or more of a metric is better, told from its name; None when the name does not tell."""
    if _NEITHER.search(metric):
        return None
    if _MORE.search(metric):
        return "maximize"
    return "minimize" if _LESS.search(metric) else None


def last_values(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric; none of one whose last value was not finite, which is logged as null."""
    last = {k: v for event in events for k, v in event.items() if k not in ("step", "epoch", "time")}
    return {k: v for k, v in last.items() if isinstance(v, int | float)}


def fact(name: str, summary: Mapping[str, Any]) -> float | None:
    """A fact of a run's summary, e.g. peak_memory_gib."""
    path, factor = FACTS[name]
    value: Any = summary
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else value * factor


def default(logged: Collection[str]) -> str:
    """What a run is judged by that names nothing: the first of a few that it logs, else its loss."""
    return next((name for name in _DEFAULTS if name in logged), "loss")


def named(objective: str | Sequence[str] | None) -> list[Objective]:
    """The objectives of a setting that is one text, a list, or nothing."""
    if objective is None:
        return []
    return [Objective.parse(o) for o in ([objective] if isinstance(objective, str) else objective)]
