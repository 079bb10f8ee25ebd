"""GRPO's losses, gradients, KL and clip statistics against TRL 1.16's own `_compute_loss` on the same tokens."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL, the oracle, comes with the extra [bench]")

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

from hydratune.rl_losses import GRPO_LOSSES, clip_fractions, group_advantages, grpo_loss  # noqa: E402

pytestmark = pytest.mark.peer

LENGTHS = [6, 4, 1, 9, 3, 7]
EPSILON, LENGTH = 0.2, 12


class Trainer(SimpleNamespace):
    """What `_compute_loss` reads of a GRPOTrainer in one process without accumulation; the rest is refused."""

    _compute_loss = GRPOTrainer._compute_loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logps, torch.zeros_like(self.logps), None


def theirs(logps, rows, mask, loss_type, level, beta, high):
    trainer = Trainer(
        logps=logps, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=EPSILON,
        epsilon_high=high, max_completion_length=LENGTH, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.long)
    loss = trainer._compute_loss(None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": rows["advantages"], "num_items_in_batch": mask.sum(),
        "old_per_token_logps": rows["old"], "ref_per_token_logps": rows["ref"],
    })  # fmt: skip
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(3))
def test_same_loss_gradient_and_metrics(loss_type, level, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    logps = -3 * torch.rand(mask.shape, dtype=torch.float64, generator=generator)
    old, ref = (
        logps + 0.5 * torch.randn(mask.shape, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    rows = {"old": old, "ref": ref, "advantages": torch.randn(6, dtype=torch.float64, generator=generator)}
    high = 1.1 if loss_type == "cispo" else 0.28
    sequences = torch.arange(6)[:, None].expand_as(mask)[mask]

    one, two = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    expected, metrics = theirs(one, rows, mask, loss_type, level, beta, high)
    found = grpo_loss(
        two[mask], old[mask], rows["advantages"], sequences, ref_logps=ref[mask] if beta else None, beta=beta,
        epsilon=EPSILON, epsilon_high=high, loss_type=loss_type, importance_sampling_level=level,
        max_completion_length=LENGTH,
    )  # fmt: skip
    loss = found.total / found.divisor
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(two.grad, one.grad)

    fractions = clip_fractions(found.low, found.high, sequences if level == "token" else None, 6)
    if loss_type == "cispo":
        ours = {"cispo_clip_ratio": fractions["high_mean"].item()}
    else:
        ours = {f"clip_ratio/{name}": value.item() for name, value in fractions.items()}
    if beta:
        ours["kl"] = found.kl.mean().item()
    assert ours == pytest.approx({name: metrics[name] for name in metrics if name != "entropy"}, abs=1e-6)
    assert level == "sequence" or any(ours.values())


def test_same_std_of_rewards():
    rewards = torch.randn(5, 4, dtype=torch.float64)
    rewards[1, 2] = rewards[3, 0] = torch.nan
    centred = rewards - rewards.nanmean(1, keepdim=True)
    for scale, std in (("group", nanstd(rewards, dim=1)[:, None]), ("batch", nanstd(rewards))):
        expected = (centred / (std + 1e-4)).nan_to_num(nan=0.0).flatten()
        torch.testing.assert_close(group_advantages(rewards.flatten(), 4, scale)[0], expected)
