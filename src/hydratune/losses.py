"""Losses as pure functions of tensors."""

from __future__ import annotations

import torch


def token_loss(logps: torch.Tensor, loss_type: str = "nll") -> torch.Tensor:
    """Loss of each labelled token.

    Args:
        logps: log p(label), [N].
        loss_type: "nll" is −log p. "dft" is −sg(p)·log p with p held constant, which takes the 1/p out of the
            gradient (Dynamic Fine-Tuning, arXiv:2508.05629, eq. 9).

    Returns:
        Losses, [N], in the dtype of `logps`.
    """
    if loss_type == "nll":
        return -logps
    if loss_type == "dft":
        return -logps.exp().detach() * logps
    raise ValueError(f"loss_type is 'nll' or 'dft', not {loss_type!r}")
