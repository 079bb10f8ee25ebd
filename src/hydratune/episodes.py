"""The buffer of a rollout: prompts with sampled completions and all that is known of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hydratune.data.collate_preference import Layout


@dataclass
class Episodes:
    """B completions, those of a prompt one after another.

    Attributes:
        prompts, completions: token ids, B arrays each; a stop token is the last one of its completion.
        stopped: bool [B], ended by a stop token.
        tensors: by name, [B] of completions or [B, T] of their tokens, zero behind a completion's end.
    """

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    stopped: torch.Tensor
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each completion, [B]."""
        return torch.tensor([len(c) for c in self.completions], device=self.stopped.device)

    @property
    def mask(self) -> torch.Tensor:
        """Where there is a token, bool [B, T]."""
        lengths = self.lengths
        return torch.arange(int(max(map(len, self.completions))), device=lengths.device) < lengths[:, None]

    def padded(self, values: Sequence[np.ndarray]) -> torch.Tensor:
        """Values of tokens, B arrays, as [B, T]."""
        made = np.zeros((len(self), max(map(len, self.completions))), dtype=np.float32)
        for row, own in zip(made, values, strict=True):
            row[: len(own)] = own
        return torch.from_numpy(made).to(self.stopped.device)

    def batch(self, groups: np.ndarray, layout: Layout) -> dict[str, Any]:
        """One forward pass over some completions.

        Args:
            groups: their numbers, [G, K]: K completions of the same prompt in each row.

        Returns:
            `layout`, and `index` [K·G]: which completion each of its sequences is.
        """
        prompts = [self.prompts[i] for i in groups[:, 0]]
        completions = [[self.completions[i] for i in column] for column in groups.T]
        return {
            "layout": layout(prompts, completions),
            "index": torch.from_numpy(np.ascontiguousarray(groups.T).reshape(-1)),
        }

    def of(self, name: str, batch: dict[str, Any]) -> torch.Tensor:
        """Values of a batch: [S] of its sequences, or [N] of its targets."""
        values = self.tensors[name].index_select(0, batch["index"])
        layout = batch["layout"]
        return values if values.dim() == 1 else values[layout["sequences"], layout["ordinals"]]

    def scored(
        self, parts: Sequence[np.ndarray], layout: Layout, score: Callable[[dict[str, Any]], torch.Tensor]
    ) -> torch.Tensor:
        """What a function gives for every token, [B, T].

        Args:
            parts: numbers of the completions of each forward pass.
            score: from a layout, on the device, to values [N].
        """
        device = self.stopped.device
        made = torch.zeros(self.mask.shape, device=device)
        for part in parts:
            batch = self.batch(part[:, None], layout)
            on_device = {
                k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch["layout"].items()
            }
            rows = torch.from_numpy(part).to(device).index_select(0, on_device["sequences"])
            made[rows, on_device["ordinals"]] = score(on_device).float()
        return made

    def state(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint."""
        return {
            "prompts": [torch.from_numpy(np.asarray(p)) for p in self.prompts],
            "completions": [torch.from_numpy(np.asarray(c)) for c in self.completions],
            "stopped": self.stopped.cpu(),
            "tensors": {name: value.cpu() for name, value in self.tensors.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Episodes:
        return cls(
            prompts=[p.numpy() for p in state["prompts"]],
            completions=[c.numpy() for c in state["completions"]],
            stopped=state["stopped"].to(device),
            tensors={name: value.to(device) for name, value in state["tensors"].items()},
        )
