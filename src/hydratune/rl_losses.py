"""The arithmetic of PPO and GRPO as pure functions of tensors.

Two layouts. Flat: the N tokens of all S completions of a micro-batch one after another, with `sequences` [N], the
index of each token's completion, 0 ≤ … < S, non-decreasing; a completion may have no token. Padded: [S, T] with a bool
`mask`, real tokens first; what stands at padding is never read, NaN included. All values are fp32 or fp64, results are
in the dtype of what they are made from, and nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

KL_ESTIMATORS = ("k1", "k3")
GRPO_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo")
REWARD_SCALES = ("group", "batch", "none")
IMPORTANCE_LEVELS = ("token", "sequence")
_MOST = 80.0  # exp of more overflows fp32, and 0·∞ is NaN
_STD_EPSILON = 1e-4


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kind: str = "k1") -> torch.Tensor:
    """KL(π ‖ π_ref) estimated from each sampled token (Schulman 2020, "Approximating KL divergence").

    - k1: log π − log π_ref, unbiased, of either sign
    - k3: exp(d) − 1 − d with d = log π_ref − log π, unbiased, never negative, of less variance near π = π_ref

    Args:
        logps, ref_logps: log π and log π_ref of the tokens, any shape.

    Returns:
        Nats of each token, the same shape.

    Raises:
        ValueError: of an unknown `kind`.
    """
    if kind == "k1":
        return logps - ref_logps
    if kind == "k3":
        difference = ref_logps - logps
        # expm1 keeps the digits of small differences, whose square is all that is left
        return torch.expm1(difference.clamp(max=_MOST)) - difference
    raise ValueError(f"kl_estimator is 'k1' or 'k3', not {kind!r}")


def approx_kl(logps: torch.Tensor, old_logps: torch.Tensor) -> torch.Tensor:
    """½·mean((log π − log π_old)²), k2 of the same note: how far an update has gone from its rollouts.

    Args:
        logps, old_logps: [N].

    Returns:
        Nats a token, a scalar without gradient; 0 of no tokens.
    """
    assert logps.shape == old_logps.shape
    difference = (logps - old_logps).detach()
    return difference.square().sum() / max(2 * difference.numel(), 1)


def ratio_moments(logps: torch.Tensor, old_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over tokens of the ratio π/π_old; 1 and 0 while π is π_old.

    Args:
        logps, old_logps: [N].

    Returns:
        Two scalars without gradient; 0 and 0 of no tokens.
    """
    assert logps.shape == old_logps.shape
    ratios = _ratio((logps - old_logps).detach())
    mean = ratios.sum() / max(ratios.numel(), 1)
    return mean, (ratios - mean).square().sum() / max(ratios.numel() - 1, 1)


# -- PPO -------------------------------------------------------------------------------------------------------------


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float | torch.Tensor
) -> torch.Tensor:
    """−kl_coef·KL of every token, and the score on the last one (arXiv:1909.08593, eq. 2, written token by token).

    Args:
        scores: of the completions, [S]; that of a completion without tokens goes nowhere.
        kl: nats, [S, T].
        mask: bool, [S, T].

    Returns:
        [S, T], 0 at padding.
    """
    assert kl.shape == mask.shape and scores.shape == mask.shape[:1]
    last = mask & ~F.pad(mask, (0, 1))[:, 1:]
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x − mean)/√(variance + 1e-8) over real tokens, variance unbiased; the mean added again without `shift_mean`.

    Equal values have no scale: they become exactly 0 (their mean, without `shift_mean`), as does a single one.

    Args:
        values: any shape; for statistics over several devices, what they gathered.
        mask: bool, the same shape.

    Returns:
        The same shape, 0 at padding.
    """
    assert values.shape == mask.shape
    if not values.numel():
        return values
    values = torch.where(mask, values, 0.0)
    mean, variance, _ = _moments(values, mask)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): A_t = Σ_l (γλ)^l·δ_{t+l},
    δ_t = r_t + γ·V_{t+1} − V_t, where V is 0 behind the last token of a completion.

    Args:
        rewards, values: [S, T].
        mask: bool, [S, T].
        gamma: discount a token; lam: weight of longer estimates, 0 for δ, 1 for the return less V.

    Returns:
        Advantages and returns (advantages + values), [S, T] each, 0 at padding.
    """
    assert rewards.shape == values.shape == mask.shape
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    # Sums of 1, 2, 4, … terms: those of 2n are those of n, and those of n that begin n later. So log T steps, not T.
    terms = 1
    while terms < rewards.shape[1] and (weight := (gamma * lam) ** terms):
        advantages = advantages + weight * F.pad(advantages[:, terms:], (0, terms))
        terms *= 2
    return advantages, advantages + values


def ppo_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    cliprange: float,
    clip_high: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−min(r·A, clip(r, 1 − ε, 1 + ε)·A) with r = π/π_old (arXiv:1707.06347, eq. 7).

    Args:
        logps: log π, [N].
        old_logps, advantages: without gradient, [N].
        cliprange: ε.
        clip_high: ε of the upper bound where it differs (DAPO's "clip-higher", arXiv:2503.14476).

    Returns:
        Loss of each token, [N], and where the bound was the smaller of the two, bool [N]: no gradient there.
    """
    assert logps.shape == old_logps.shape == advantages.shape
    ratio = _ratio(logps - old_logps)
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + (cliprange if clip_high is None else clip_high))
    return torch.maximum(free, bounded), bounded > free


def ppo_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²): the squared error of arXiv:1707.06347, eq. 9, with the value
    kept near that of the rollout, which the paper does not have but its authors' code does.

    Args:
        values: V, [N].
        old_values, returns: V_old and R, without gradient, [N].
        cliprange_value: ε, in units of the reward.

    Returns:
        Loss of each token, [N], and where the clipped error was the larger one, bool [N]: no gradient there.
    """
    assert values.shape == old_values.shape == returns.shape
    moved = values - old_values
    free = (values - returns).square()
    bounded = (old_values + moved.clamp(-cliprange_value, cliprange_value) - returns).square()
    # within the bound the two are equal but for rounding
    return torch.maximum(free, bounded) / 2, (bounded > free) & (moved.abs() > cliprange_value)


class AdaptiveKL:
    """The KL coefficient that keeps the KL near a target (arXiv:1909.08593, section 2.2).

    After n episodes: coef ← coef·(1 + e·min(n/horizon, 1)), e = clip(KL/target − 1, −0.2, 0.2). The paper has a gain of
    0.1 an update in the place of n/horizon, which is its authors' code and does not depend on the size of a batch.

    Args:
        coef: the first coefficient.
        target: nats a completion, as the `kl` that is given to `update`.
        horizon: episodes in which a KL that is off by 20 % or more changes the coefficient by about 20 %.

    Raises:
        ValueError: when one of the three is not above 0.
    """

    def __init__(self, coef: float, target: float, horizon: float = 10_000):
        for name, value in (("kl_coef", coef), ("target_kl", target), ("kl_horizon", horizon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} of an adaptive KL coefficient is above 0 and finite, not {value}")
        self.coef, self.target, self.horizon = float(coef), float(target), float(horizon)

    def update(self, kl: float, episodes: int) -> float:
        """The next coefficient, after `episodes` completions of mean KL `kl` (nats).

        Raises:
            ValueError: when `kl` is NaN, which no coefficient repairs.
        """
        if math.isnan(kl):
            raise ValueError(
                "the KL of the rollouts is NaN; their log-probs or the reference's are not finite"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * min(episodes / self.horizon, 1.0)  # a share above 5 would turn the sign
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs; target and horizon are of its config."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])


# -- GRPO ------------------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: torch.Tensor, num_generations: int, scale: str = "group"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r − mean)/(std + 1e-4), the mean over the K completions of a prompt (arXiv:2402.03300, section 4.1.2).

    `scale` says what std is (unbiased): "group", of the K; "batch", of all rewards; "none", no division
    (Dr. GRPO, arXiv:2503.20783). NaN is a completion without reward: it counts nowhere and its advantage is 0. So is
    that of every completion of a group whose rewards are equal.

    Args:
        rewards: [B], those of a prompt one after another; over several devices, what they gathered.
        num_generations: K, which divides B.

    Returns:
        Advantages, [B], and the fraction of groups without spread (fewer than two different rewards), a scalar.

    Raises:
        ValueError: of an unknown `scale`, or when K does not divide B.
    """
    if scale not in REWARD_SCALES:
        raise ValueError(f"scale_rewards is one of {', '.join(REWARD_SCALES)}, not {scale!r}")
    if rewards.dim() != 1 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} are not whole groups of num_generations = {num_generations}"
        )
    groups = rewards.reshape(-1, num_generations)
    if not len(groups):
        return rewards, rewards.new_zeros(())
    known = ~groups.isnan()
    mean, variance, spread = _moments(groups, known, dim=1)
    advantages = torch.where(known, groups - mean, 0.0)
    if scale == "batch":
        variance = _moments(groups, known)[1]
    if scale != "none":
        advantages = advantages / (variance.sqrt() + _STD_EPSILON)
    return advantages.flatten(), 1 - spread.to(rewards.dtype).mean()


class GrpoLoss(NamedTuple):
    """What `grpo_loss` found: loss of the accumulated batch = Σ total / Σ divisor over its micro-batches."""

    total: torch.Tensor  # scalar with gradient
    divisor: int
    low: torch.Tensor  # bool, [N], or [S] where ratios are of sequences: ratio under the bound that held it
    high: torch.Tensor  # the same, over it
    kl: torch.Tensor | None  # nats without gradient, [N]; None without ref_logps


def grpo_divisor(loss_type: str, sequences: Any, tokens: Any, max_completion_length: Any = None) -> Any:
    """What a summed loss of `grpo_loss` is divided by. All are sums over completions, so that the amounts of the whole
    accumulated batch give its divisor, and batch × accumulation is one and the same loss however it is cut:

    - grpo: completions, over accumulation and devices (every completion the same weight)
    - dr_grpo: completions × max_completion_length, over both (a constant, so that length has no weight)
    - dapo, cispo: tokens, over both (every token the same weight)
    - bnpo: tokens of this device over accumulation; devices are then averaged. TRL has those of the micro-batch, the
      same with one step of accumulation.

    Args:
        sequences: completions, masked ones too; tokens: those that count. Numbers or tensors.

    Raises:
        ValueError: of an unknown `loss_type`, or of dr_grpo without a length.
    """
    if loss_type == "grpo":
        return sequences
    if loss_type in ("bnpo", "dapo", "cispo"):
        return tokens
    if loss_type != "dr_grpo":
        raise ValueError(f"loss_type is one of {', '.join(GRPO_LOSSES)}, not {loss_type!r}")
    if max_completion_length is None:
        raise ValueError("loss_type 'dr_grpo' divides by max_completion_length, which is None: set it")
    return sequences * max_completion_length


def grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    sequences: torch.Tensor,
    *,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
) -> GrpoLoss:
    """The losses of group-relative policy optimisation, summed over what `grpo_divisor` counts.

    With r = π/π_old of a token and A the advantage of its completion, a token's loss is

    - grpo, bnpo, dapo, dr_grpo: −min(r·A, clip(r, 1 − ε, 1 + ε_high)·A) + β·k3 (arXiv:2402.03300, eq. 3; two bounds:
      arXiv:2503.14476, section 3.1; neither std nor own length: arXiv:2503.20783)
    - cispo: −sg(min(r, ε_high))·A·log π + β·k3: every token has its gradient, none with more weight than ε_high
      (MiniMax-M1, arXiv:2506.13585, without lower bound)

    and the total is their sum, of grpo the sum over completions of each one's mean. The types of the first line differ
    in the divisor alone.

    With importance_sampling_level "sequence" r is that of the completion, s = exp(mean over its tokens of log r)
    (GSPO, arXiv:2507.18071, section 4.1); the paper's loss is that with "grpo".

    Args:
        logps: log π, [N].
        old_logps: log π_old, [N]; None for π itself, the first pass over fresh rollouts.
        advantages: [S].
        sequences: [N], non-decreasing.
        ref_logps: log π_ref, [N]; needed by β ≠ 0, and enough to have the KL reported.
        epsilon_high: None for ε; of cispo the largest weight, a number such as 5 (arXiv:2510.13786), not None.
        max_completion_length: of dr_grpo.

    Raises:
        ValueError: of unknown names, of β ≠ 0 without `ref_logps`, of cispo without `epsilon_high`.
    """
    assert logps.shape == sequences.shape and advantages.dim() == 1
    divisor = grpo_divisor(loss_type, len(advantages), len(logps), max_completion_length)
    if importance_sampling_level not in IMPORTANCE_LEVELS:
        raise ValueError(
            f"importance_sampling_level is 'token' or 'sequence', not {importance_sampling_level!r}"
        )
    if beta and ref_logps is None:
        raise ValueError(f"beta = {beta} needs the log-probs of a reference; give ref_logps or set beta to 0")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("loss_type 'cispo' needs epsilon_high, the largest weight of a token; 5.0 is usual")
    high_bound = epsilon if epsilon_high is None else epsilon_high

    log_ratio = logps - (logps if old_logps is None else old_logps).detach()
    of_token = advantages.index_select(0, sequences)
    by_sequence = importance_sampling_level == "sequence"
    if by_sequence:
        ratio, own = _ratio(sequence_means(log_ratio, sequences, len(advantages))), advantages
    else:
        ratio, own = _ratio(log_ratio), of_token

    if loss_type == "cispo":
        weight = ratio.detach().clamp(max=high_bound)
        losses = -(weight.index_select(0, sequences) if by_sequence else weight) * of_token * logps
        low, high = torch.zeros_like(ratio, dtype=torch.bool), (ratio > high_bound) & (own > 0)
    else:
        losses = -torch.minimum(ratio * own, ratio.clamp(1 - epsilon, 1 + high_bound) * own)
        losses = losses.index_select(0, sequences) if by_sequence else losses
        low, high = (ratio < 1 - epsilon) & (own < 0), (ratio > 1 + high_bound) & (own > 0)

    kl = None
    if ref_logps is not None:
        kl = kl_estimate(logps, ref_logps, "k3")
        losses = losses + beta * kl if beta else losses
        kl = kl.detach()
    if loss_type == "grpo":
        losses = losses / _lengths(losses, sequences, len(advantages)).index_select(0, sequences)
    return GrpoLoss(losses.sum(), divisor, low, high, kl)


def clip_fractions(
    low: torch.Tensor, high: torch.Tensor, sequences: torch.Tensor | None, count: int
) -> dict[str, torch.Tensor]:
    """How much of a batch `grpo_loss` clipped, by the names under clip_ratio/.

    Args:
        low, high: bool, [N] with `sequences` [N]; or [S], one of each completion, with None.
        count: S.

    Returns:
        Scalars: low_mean, high_mean and region_mean (either) over tokens or completions; low_min and high_max, the
        least and greatest fraction of a completion that has tokens. Of nothing at all 0, but low_min 1.
    """
    kinds = torch.stack((low, high, low | high)).float()
    means = kinds.sum(1) / max(low.numel(), 1)
    if sequences is None:
        within, real = kinds, torch.ones_like(low)
    else:
        lengths = _lengths(kinds, sequences, count)
        within = kinds.new_zeros(3, count).index_add(1, sequences, kinds) / lengths.clamp(min=1)
        real = lengths > 0
    # padded by one completion that changes neither extreme, so that there always is one
    least = F.pad(torch.where(real, within[0], 1.0), (0, 1), value=1.0).amin()
    most = F.pad(torch.where(real, within[1], 0.0), (0, 1), value=0.0).amax()
    return {
        "low_mean": means[0], "low_min": least, "high_mean": means[1], "high_max": most, "region_mean": means[2],
    }  # fmt: skip


def sequence_means(values: torch.Tensor, sequences: torch.Tensor, count: int) -> torch.Tensor:
    """Means over the tokens of each completion: [N] → [S], 0 of a completion without tokens. `count` is S."""
    sums = values.new_zeros(count).index_add(0, sequences, values)
    return sums / _lengths(values, sequences, count).clamp(min=1)


# -- shared ----------------------------------------------------------------------------------------------------------


def _lengths(like: torch.Tensor, sequences: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens of each completion, [S], in the dtype of `like`."""
    return like.new_zeros(count).index_add(0, sequences, like.new_ones(len(sequences)))


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(max=_MOST).exp()


def _moments(
    values: torch.Tensor, mask: torch.Tensor, dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, unbiased variance, and whether two values differ, of what `mask` leaves, along `dim` (kept) or of all.

    Equal values are exactly their mean, which their rounded sum over their number need not be, and have a variance of 0.
    """
    axes = tuple(range(values.dim())) if dim is None else (dim,)
    count = mask.sum(axes, keepdim=True)
    mean = torch.where(mask, values, 0.0).sum(axes, keepdim=True) / count.clamp(min=1)
    least = torch.where(mask, values, math.inf).amin(axes, keepdim=True)
    most = torch.where(mask, values, -math.inf).amax(axes, keepdim=True)
    mean = torch.where(least == most, least, mean)
    deviations = torch.where(mask, values - mean, 0.0)
    return mean, deviations.square().sum(axes, keepdim=True) / (count - 1).clamp(min=1), least < most
