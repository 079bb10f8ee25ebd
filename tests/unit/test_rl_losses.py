"""KL, advantages and the losses of PPO against arithmetic by hand, plain loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from hydratune.rl_losses import (
    AdaptiveKL,
    approx_kl,
    gae,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    ratio_moments,
    token_rewards,
    whiten,
)

NAN = float("nan")
BAD = [NAN, 1e9, -math.inf]  # what may stand at padding


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int], width: int | None = None) -> torch.Tensor:
    width = max(lengths) if width is None else width
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


# -- KL --------------------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    logps, ref = row(-1.0, -2.0), row(-1.5, -1.0)
    assert kl_estimate(logps, ref, "k1").tolist() == [0.5, -1.0]
    # d = −0.5: e^−0.5 − 1 + 0.5 = 0.606531 − 0.5; d = 1: e − 1 − 1 = 0.718282
    assert kl_estimate(logps, ref, "k3").tolist() == pytest.approx([0.106531, 0.718282], abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_average_to_the_kl(kind):
    policy, ref = torch.log_softmax(row(0.3, -1.0, 2.0), 0), torch.log_softmax(row(0.0, 0.5, 1.0), 0)
    exact = (policy.exp() * (policy - ref)).sum()
    assert (policy.exp() * kl_estimate(policy, ref, kind)).sum().item() == pytest.approx(
        exact.item(), abs=1e-12
    )


def test_k3_is_exact_when_small_and_finite_when_large():
    # d = 1e-4: d²/2 + d³/6 = 5.00017e-9, which e^d − 1 − d in fp32 is far from
    found = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-4]), "k3").item()
    assert found == pytest.approx(5.00017e-9, rel=2e-3)
    logps = torch.tensor([-500.0, 0.0], requires_grad=True)
    found = kl_estimate(logps, torch.tensor([0.0, -500.0]), "k3")
    found.sum().backward()
    assert torch.isfinite(found).all() and (found > 0).all() and torch.isfinite(logps.grad).all()


def test_distance_from_the_rollout_by_hand():
    old = row(-1.0, -2.0, -3.0)
    logps = old + row(0.2, -0.4, 0.0)
    # (0.04 + 0.16 + 0)/3/2
    assert approx_kl(logps, old).item() == pytest.approx(0.0333333, abs=1e-7)
    # ratios e^0.2 = 1.221403, e^−0.4 = 0.670320, 1: mean 0.963908; deviations 0.257495, −0.293588, 0.036092, squares
    # 0.066304 + 0.086194 + 0.001303 = 0.153800, over 2
    mean, variance = ratio_moments(logps, old)
    assert (mean.item(), variance.item()) == pytest.approx((0.963908, 0.076900), abs=1e-6)


def test_first_pass_has_ratio_one_and_no_kl():
    logps = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert approx_kl(logps, logps).item() == 0.0 and not approx_kl(logps, logps).requires_grad
    assert [m.item() for m in ratio_moments(logps, logps)] == [1.0, 0.0]
    advantages = torch.randn(7, dtype=torch.float64)
    losses, clipped = ppo_policy_loss(logps, logps.detach(), advantages, 0.2)
    assert torch.equal(losses, -advantages) and not clipped.any()
    losses.sum().backward()  # the policy gradient: d(−r·A) = −A·d log π
    torch.testing.assert_close(logps.grad, -advantages)


def test_nothing_has_no_distance():
    nothing = torch.zeros(0)
    assert approx_kl(nothing, nothing).item() == 0.0
    assert [m.item() for m in ratio_moments(nothing, nothing)] == [0.0, 0.0]
    assert ratio_moments(torch.zeros(1), torch.zeros(1))[1].item() == 0.0  # one has no variance


# -- rewards, whitening, advantages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
def test_token_rewards_by_hand(bad):
    kl = torch.tensor([[0.5, 1.0, bad], [2.0, bad, bad], [1.0, 2.0, 3.0], [bad, bad, bad]])
    found = token_rewards(torch.tensor([10.0, -1.0, 0.0, 7.0]), kl, mask_of([2, 1, 3, 0]), 0.1)
    # −0.05, −0.1 + 10; −0.2 − 1; −0.1, −0.2, −0.3 + 0; a completion without tokens has nowhere to put its score
    expected = [[-0.05, 9.9, 0.0], [-1.2, 0.0, 0.0], [-0.1, -0.2, -0.3], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("bad", BAD)
def test_whitening_by_hand(bad):
    # 1, 2, 3, 6: mean 3, deviations −2, −1, 0, 3, variance (4 + 1 + 0 + 9)/3 = 4.666667, its root 2.160247
    values, mask = torch.tensor([[1.0, 2.0, bad], [3.0, 6.0, bad]], dtype=torch.float64), mask_of([2, 2], 3)
    expected = torch.tensor([[-0.925820, -0.462910, 0.0], [0.0, 1.388730, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whiten(values, mask), expected, atol=1e-6, rtol=0)
    kept = torch.where(mask, expected + 3, 0.0)  # the mean stays
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), kept, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("size", [3.0, 1e-4])
def test_whitening_is_that_of_trl(shift_mean, size):
    """TRL's masked_whiten (0.x, with its PPO) as an oracle: (x − m)·rsqrt(v·n/(n − 1) + 1e-8), v over n."""
    values = torch.randn(5, 9, dtype=torch.float64) * size + 1
    mask = mask_of([9, 4, 1, 0, 6])
    weight = mask.double()
    n = weight.sum()
    mean = (values * weight).sum() / n
    variance = ((values - mean).square() * weight).sum() / n * n / (n - 1)
    oracle = (values - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)
    torch.testing.assert_close(whiten(values, mask, shift_mean), oracle * weight)


@pytest.mark.parametrize("bad", BAD)
def test_gradients_do_not_see_padding(bad):
    mask = mask_of([2, 1], 3)
    for of in (
        lambda x: whiten(x, mask),
        lambda x: gae(x, x, mask, 0.9, 0.9)[0],
        lambda x: token_rewards(x[:, 0], x, mask, 0.1),
    ):
        leaf = torch.tensor([[1.0, 2.0, bad], [4.0, bad, bad]], requires_grad=True)
        of(leaf).square().sum().backward()
        assert torch.isfinite(leaf.grad).all() and not leaf.grad[~mask].any() and leaf.grad[mask].any()


@pytest.mark.parametrize("lengths", [[1, 0], [4, 4], [0, 0]])
def test_whitening_of_what_has_no_spread(lengths):
    """The mean of eight times 0.1 in fp32 is not 0.1."""
    mask = mask_of(lengths, 4)
    values = torch.where(mask, 0.1, NAN)
    assert torch.equal(whiten(values, mask), torch.zeros(2, 4))
    assert torch.equal(whiten(values, mask, shift_mean=False), torch.where(mask, 0.1, 0.0))


def test_whitening_does_not_hide_what_is_not_finite():
    assert whiten(torch.tensor([[1.0, NAN]]), mask_of([2])).isnan().all()
    assert whiten(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def gae_by_loops(rewards, values, lengths, gamma, lam):
    """Equation 16, term by term."""
    advantages = torch.zeros_like(rewards)
    for s, length in enumerate(lengths):
        after = [*values[s, :length].tolist(), 0.0]
        deltas = [rewards[s, t].item() + gamma * after[t + 1] - after[t] for t in range(length)]
        for t in range(length):
            advantages[s, t] = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
    return advantages


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5), (1.0, 1e-200)]
)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 13])
def test_gae_is_the_sum_of_equation_16(gamma, lam, width, bad):
    lengths = [width, width // 2, 1, 0, max(width - 1, 0)]
    mask = mask_of(lengths, width)
    generator = torch.Generator().manual_seed(width)
    rewards, values = (torch.randn(mask.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = gae_by_loops(rewards, values, lengths, gamma, lam)
    advantages, returns = gae(rewards.where(mask, bad), values.where(mask, bad), mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(returns, expected + values.where(mask, 0.0), atol=1e-12, rtol=1e-10)


def test_gae_by_hand():
    # γ = 0.5, λ = 0.5: δ₂ = 2 − 1 = 1; δ₁ = 0 + 0.5·1 − 2 = −1.5; δ₀ = 1 + 0.5·2 − 0 = 2
    # A₂ = 1; A₁ = −1.5 + 0.25·1 = −1.25; A₀ = 2 − 0.25·1.25 = 1.6875
    advantages, returns = gae(row(1, 0, 2)[None], row(0, 2, 1)[None], mask_of([3]), 0.5, 0.5)
    assert advantages.tolist() == [[1.6875, -1.25, 1.0]] and returns.tolist() == [[1.6875, 0.75, 2.0]]


def test_gae_without_discount_is_return_less_value():
    rewards, values = torch.randn(4, 11, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask_of([11] * 4), 1.0, 1.0)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)


def test_gae_of_long_completions_keeps_its_digits():
    rewards, values = torch.randn(3, 3000, dtype=torch.float64), torch.randn(3, 3000, dtype=torch.float64)
    mask = mask_of([3000, 2999, 17])
    exact = gae(rewards, values, mask, 1.0, 0.95)[0]
    short = gae(rewards.float(), values.float(), mask, 1.0, 0.95)[0]
    assert short.dtype == torch.float32
    torch.testing.assert_close(short.double(), exact, atol=1e-5, rtol=1e-5)


# -- PPO -------------------------------------------------------------------------------------------------------------


def test_ppo_policy_by_hand():
    ratios = row(1.5, 1.5, 0.5, 0.5, 1.1, 1.25)
    advantages = row(2, -2, 2, -2, 3, 2)
    losses, clipped = ppo_policy_loss(ratios.log(), torch.zeros(6).double(), advantages, 0.2)
    # min(3, 1.2·2) = 2.4; min(−3, −2.4) = −3; min(1, 1.6) = 1; min(−1, −1.6) = −1.6; 3.3; min(2.5, 2.4) = 2.4
    assert losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -3.3, -2.4])
    assert clipped.tolist() == [True, False, False, True, False, True]
    losses, clipped = ppo_policy_loss(ratios.log(), torch.zeros(6).double(), advantages, 0.2, clip_high=0.3)
    # bound 1.3: 2.6, and 2.5 for 1.25, which is free now
    assert losses.tolist() == pytest.approx([-2.6, 3.0, -1.0, 1.6, -3.3, -2.5])
    assert clipped.tolist() == [True, False, False, True, False, False]


def test_ppo_value_by_hand():
    values, old, returns = row(1.0, 1.0, 0.1, 2.0), row(0.5, 0.5, 0.0, 0.0), row(2.0, 0.0, 1.0, 1.0)
    losses, clipped = ppo_value_loss(values, old, returns, 0.2)
    # V clipped to 0.7: max(1, 1.69)/2; max(1, 0.49)/2; 0.1 is free: 0.81/2; 0.2: max(1, 0.64)/2
    assert losses.tolist() == pytest.approx([0.845, 0.5, 0.405, 0.5])
    assert clipped.tolist() == [True, False, False, False]


def test_ppo_gradients_are_those_of_finite_differences():
    logps = torch.tensor([-1.0, -0.5, -2.0, -0.1, -3.0], dtype=torch.float64, requires_grad=True)
    old = logps.detach() - row(0.5, -0.6, 0.05, 0.3, -0.4)  # over, under and within the bounds
    advantages = row(1.0, -1.0, 0.7, -0.3, 0.5)
    assert torch.autograd.gradcheck(lambda x: ppo_policy_loss(x, old, advantages, 0.2, 0.28)[0], (logps,))
    clipped = ppo_policy_loss(logps, old, advantages, 0.2)[1]
    ppo_policy_loss(logps, old, advantages, 0.2)[0].sum().backward()
    assert clipped.any() and torch.equal(logps.grad == 0, clipped)  # a clipped token has none
    values = torch.tensor([1.0, 0.3, -0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: ppo_value_loss(v, row(0.5, 0.4, -0.3, 0.1), row(2.0, 0.0, 0.2, 1.0), 0.2)[0], (values,)
    )


def test_ppo_ratios_do_not_overflow():
    logps = torch.tensor([0.0, 0.0, 0.0, -500.0], requires_grad=True)
    losses, _ = ppo_policy_loss(
        logps, torch.tensor([-500.0, -500.0, -500.0, 0.0]), torch.tensor([1.0, 0.0, -1.0, -1.0]), 0.2
    )
    losses.sum().backward()
    assert losses.tolist()[:2] == pytest.approx([-1.2, 0.0]) and losses.tolist()[3] == pytest.approx(0.8)
    assert torch.isfinite(losses).all() and torch.isfinite(logps.grad).all()


def test_adaptive_kl_by_hand():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    # 9/6 − 1 = 0.5 → 0.2: 0.1·(1 + 0.2·100/1000); 5.4/6 − 1 = −0.1: ·(1 − 0.1·0.5); 0 → −0.2: ·(1 − 0.2·0.1)
    assert controller.update(9.0, 100) == pytest.approx(0.102)
    assert controller.update(5.4, 500) == pytest.approx(0.102 * 0.95)
    assert controller.update(0.0, 100) == pytest.approx(0.102 * 0.95 * 0.98)
    assert controller.update(6.0, 100) == pytest.approx(controller.coef)  # at the target it stays
    assert AdaptiveKL(0.1, 6.0, 10).update(0.0, 1000) == pytest.approx(
        0.08
    )  # never 0 or below, where it would stay


def test_adaptive_kl_resumes():
    one = AdaptiveKL(0.1, target=6.0, horizon=1000)
    one.update(9.0, 64)
    state = one.state_dict()
    assert all(type(value) is float for value in state.values())
    two = AdaptiveKL(0.3, target=6.0, horizon=1000)
    two.load_state_dict(state)
    assert two.update(3.0, 64) == one.update(3.0, 64)


def test_adaptive_kl_refuses_what_cannot_work():
    for name, values in {"kl_coef": (0, 1, 1), "target_kl": (1, -1, 1), "kl_horizon": (1, 1, NAN)}.items():
        with pytest.raises(ValueError, match=name):
            AdaptiveKL(*values)
    controller = AdaptiveKL(0.1, 6.0)
    with pytest.raises(ValueError, match="NaN"):
        controller.update(NAN, 8)
    assert controller.coef == 0.1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="kl_estimator is 'k1' or 'k3', not 'k2'"):
        kl_estimate(row(0), row(0), "k2")
    flat, column = torch.zeros(3), torch.zeros(3, 1)  # [N] against [N, 1] would be a loss of N² pairs
    for wrong in (
        lambda: ppo_policy_loss(flat, flat, column, 0.2),
        lambda: ppo_value_loss(flat, column, flat, 0.2),
        lambda: approx_kl(flat, column),
        lambda: ratio_moments(flat, column),
        lambda: gae(column, flat[None], mask_of([1]), 1.0, 1.0),
        lambda: token_rewards(column, column, mask_of([1, 1, 1]), 0.1),
        lambda: whiten(flat, mask_of([3])),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_nothing_waits_for_the_device():
    """On "meta" tensors, which have no values, whatever would fetch one raises."""
    flat, wide = torch.zeros(6, device="meta"), torch.zeros(2, 3, device="meta")
    mask, coef = torch.zeros(2, 3, dtype=torch.bool, device="meta"), torch.zeros((), device="meta")
    kl_estimate(flat, flat, "k3"), approx_kl(flat, flat), ratio_moments(flat, flat)
    token_rewards(wide[:, 0], wide, mask, coef), whiten(wide, mask, False), gae(wide, wide, mask, 1.0, 0.95)
    ppo_policy_loss(flat, flat, flat, 0.2), ppo_value_loss(flat, flat, flat, 0.2)
    with pytest.raises(RuntimeError):
        coef.item()
