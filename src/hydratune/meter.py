"""Metrics of a window of steps, kept on the device until they are logged."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch


class Meter:
    """Weighted sums and extremes by name, on the device until `take` fetches them all at once.

    Args:
        by_row: keep what `keep` is given: of an evaluation.
    """

    def __init__(self, *, by_row: bool = False) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._most: dict[str, torch.Tensor] = {}
        self._by_row = by_row
        self._rows: dict[str, list[torch.Tensor]] = {}

    def keep(self, name: str, totals: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """The parts of a weighted sum that each row gave, [N], with weights [N] or of 1: for its standard error."""
        if self._by_row:
            totals = totals.detach().double()
            weights = torch.ones_like(totals) if weights is None else weights.detach().double()
            self._rows.setdefault(name, []).append(torch.stack((totals, weights)))

    def standard_errors(self) -> dict[str, float]:
        """Of the means of what was kept in this process, by name; without those of fewer than two rows."""
        rows = {name: torch.cat(parts, dim=1) for name, parts in self._rows.items()}
        found = {name: error_of_ratio(*pair) for name, pair in rows.items()}
        return {name: error for name, error in found.items() if error is not None}

    def add(self, name: str, total: torch.Tensor, weight: torch.Tensor | int = 1) -> None:
        """Add to a weighted sum; a plain number is filled in on the device, which does not wait for it."""
        total = total.detach().double()
        if not isinstance(weight, torch.Tensor):
            weight = torch.full_like(total, weight)
        pair = torch.stack((total, weight.detach().double()))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def most(self, name: str, value: torch.Tensor) -> None:
        """Keep the largest value."""
        value = value.detach().double()
        self._most[name] = torch.maximum(self._most[name], value) if name in self._most else value

    def least(self, name: str, value: torch.Tensor) -> None:
        """Keep the smallest value."""
        self.most(f"-{name}", -value)

    def take(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, tuple[float, float]]:
        """(sum, weight) by name over all processes, of an extreme (value, 1); empties the meter.

        Args:
            reduce: sums a tensor over processes; gather: concatenates those of all.
        """
        found: dict[str, tuple[float, float]] = {}
        if self._sums:
            names = sorted(self._sums)
            pairs = reduce(torch.stack([self._sums[name] for name in names])).tolist()
            found |= zip(names, map(tuple, pairs), strict=True)
        if self._most:
            names = sorted(self._most)
            values = gather(torch.stack([self._most[name] for name in names])[None]).amax(0).tolist()
            found |= {
                n.removeprefix("-"): (-v if n[0] == "-" else v, 1.0)
                for n, v in zip(names, values, strict=True)
            }
        self._sums.clear()
        self._most.clear()
        return found

    def state(self) -> dict[str, dict[str, Any]]:
        return {kind: {n: t.tolist() for n, t in values.items()} for kind, values in self._kinds().items()}

    def load(self, state: dict[str, dict[str, Any]], device: torch.device) -> None:
        for kind, values in self._kinds().items():
            values.clear()
            for name, value in state.get(kind, {}).items():
                values[name] = torch.tensor(value, dtype=torch.float64, device=device)

    def _kinds(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"sums": self._sums, "most": self._most}


def error_of_ratio(totals: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Standard error of r = Σ totals / Σ weights, of independent rows: √(N/(N−1) Σ (total − r·weight)²) / Σ weights.

    With weights of 1 it is that of a mean. A loss over tokens has a row's summed loss as its total and the row's tokens as its
    weight: tokens of a row depend on each other, so that an error over tokens would be too small.

    Args:
        totals, weights: [N]; rows of weight 0 count for nothing.

    Returns:
        None for fewer than two rows.
    """
    totals, weights = totals[weights > 0].double(), weights[weights > 0].double()
    many = len(totals)
    if many < 2:
        return None
    apart = totals - totals.sum() / weights.sum() * weights
    return float((apart.square().sum() * many / (many - 1)).sqrt() / weights.sum())


_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "B200": 2250e12,
}


def host_peak() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_metrics(
    device: str, tokens_per_second: float | None, model: Any, devices: int
) -> dict[str, float]:
    """Peak memory in GiB, of a CPU what was resident; on CUDA also `utilisation`, as mfu.

    Args:
        device: its type, "cpu", "cuda", ….
    """
    if device != "cuda":
        return {"peak_memory_gib": host_peak() / 2**30}
    metrics = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    share = utilisation(tokens_per_second, model, devices)
    return metrics if share is None else metrics | {"mfu": share}


def utilisation(tokens_per_second: float | None, model: Any, devices: int = 1) -> float | None:
    """Model FLOPs utilisation: 6 FLOPs per trained parameter and token, 4 per frozen one, over the dense bf16 peak of CUDA devices.

    None of a device whose peak is not known here, without a speed, and of models whose parameters are not one product a token
    each: a mixture of experts, quantised weights.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for key, flops in _PEAK_FLOPS.items() if key in name), None)
    config = model.config.get_text_config()
    experts = any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    if peak is None or not tokens_per_second or experts or getattr(config, "quantization_config", None):
        return None
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (6 * trained + 4 * frozen) * tokens_per_second / (peak * devices)
