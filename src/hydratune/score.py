"""The score head of a reward or value model, applied where its result counts, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hydratune.fused_head import Replaced, base_of, rows_at


def score_head(model: nn.Module) -> nn.Module | None:
    """The head of a model for sequence classification, inside wrappers and adapters."""
    return getattr(base_of(model), "score", None)


class ScoreHead(Replaced):
    """`with ScoreHead(model, layout) as head: model(**batch)`, then `head.scores`, [S].

    Args:
        model: for sequence classification with one label, wrapped or not.
        layout: of `data.collate_preference.Layout`.
    """

    scores: torch.Tensor

    def __init__(self, model: nn.Module, layout: dict[str, Any]) -> None:
        head = score_head(model)
        assert head is not None
        super().__init__(head)
        self._length, self._ends = layout["input_ids"].shape[1], layout["ends"]

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = rows_at(hidden, self._length, self._ends)
        self.scores = self._project(states, *args, **kwargs).squeeze(-1)
        # in the shape in which the model looks for a last token of its own
        return self.scores.sum().expand(*hidden.shape[:2], 1)


class ValueHead(Replaced):
    """`with ValueHead(model, layout) as head: model(**batch)`, then `head.values`, [N]: of the states before each target.

    Args: as for `ScoreHead`.
    """

    values: torch.Tensor

    def __init__(self, model: nn.Module, layout: dict[str, Any]) -> None:
        head = score_head(model)
        assert head is not None
        super().__init__(head)
        self._length, self._positions = layout["input_ids"].shape[1], layout["positions"]

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = rows_at(hidden, self._length, self._positions)
        self.values = self._project(states, *args, **kwargs).squeeze(-1)
        return self.values.sum().expand(*hidden.shape[:2], 1)  # as `ScoreHead`
