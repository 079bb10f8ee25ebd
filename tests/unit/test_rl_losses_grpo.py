"""Group advantages and the losses of GRPO against arithmetic by hand, padded oracles and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from hydratune.rl_losses import (
    GRPO_LOSSES,
    clip_fractions,
    group_advantages,
    grpo_divisor,
    grpo_loss,
    sequence_means,
)

NAN = float("nan")


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- group advantages ------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    rewards = row(1, 2, 3, 0, 0, 6)
    # 1, 2, 3: mean 2, std 1; 0, 0, 6: mean 2, deviations −2, −2, 4, variance 24/2 = 12, std 3.464102
    found, zero = group_advantages(rewards, 3)
    expected = [-1 / 1.0001, 0, 1 / 1.0001, -2 / 3.464202, -2 / 3.464202, 4 / 3.464202]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and zero.item() == 0
    # all: mean 2, deviations −1, 0, 1, −2, −2, 4, variance 26/5 = 5.2, std 2.280351
    found, _ = group_advantages(rewards, 3, "batch")
    assert found.tolist() == pytest.approx([d / 2.280451 for d in (-1, 0, 1, -2, -2, 4)], abs=1e-6)
    assert group_advantages(rewards, 3, "none")[0].tolist() == [-1, 0, 1, -2, -2, 4]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_spread_give_nothing(scale):
    # 0.1 eight times (whose mean in fp32 is not 0.1), one reward among failures, none at all, and 1, 2 among failures
    equal, one, none, two = [0.1] * 8, [5.0] + [NAN] * 7, [NAN] * 8, [1.0, 2.0] + [NAN] * 6
    found, zero = group_advantages(torch.tensor(equal + one + none + two), 8, scale)
    assert found[:24].tolist() == [0.0] * 24 and found[26:].tolist() == [0.0] * 6
    assert found[24].item() == -found[25].item() and found[25].item() > 0.2
    assert zero.item() == 0.75
    assert group_advantages(torch.tensor([1.0, 2.0]), 1, scale)[0].tolist() == [0.0, 0.0]
    assert group_advantages(torch.zeros(0), 3, scale)[0].shape == (0,)


def nan_std(values, **dims):
    """TRL's `nanstd`: unbiased, NaN left out, of one value NaN."""
    mean = torch.nanmean(values, **dims, keepdim=True)
    count = (~values.isnan()).sum(**dims, keepdim=True)
    variance = torch.nanmean((values - mean).square(), **dims, keepdim=True) * count / (count - 1)
    return torch.where(count > 1, variance, NAN).sqrt()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("holes", [0, 5])
def test_group_advantages_are_those_of_trl(scale, holes):
    generator = torch.Generator().manual_seed(holes)
    rewards = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    rewards[5] = 0.5
    rewards.view(-1)[torch.randperm(20, generator=generator)[:holes]] = NAN
    oracle = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        std = nan_std(rewards, dim=1) if scale == "group" else nan_std(rewards, dim=(0, 1))
        oracle = oracle / (std + 1e-4)
    found, zero = group_advantages(rewards.flatten(), 4, scale)
    torch.testing.assert_close(found, oracle.flatten().nan_to_num(nan=0.0))
    assert zero.item() == pytest.approx(1 / 6)


# -- GRPO ------------------------------------------------------------------------------------------------------------

LENGTHS = [3, 0, 1, 5, 2]  # the second is masked whole, as a truncated completion may be
TYPES = pytest.mark.parametrize("loss_type", GRPO_LOSSES)
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])


def batch(seed: int = 0, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    logps = -torch.rand(count, dtype=torch.float64, generator=generator) * 3
    shifts = torch.randn(3, count, dtype=torch.float64, generator=generator) * 0.4
    return {
        "logps": logps, "old_logps": logps + shifts[0], "ref_logps": logps + shifts[1],
        "advantages": torch.randn(len(lengths), dtype=torch.float64, generator=generator),
        "sequences": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    }  # fmt: skip


def options(loss_type: str, level: str = "token", **more) -> dict:
    return {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": 0.04, "epsilon": 0.2,
        "epsilon_high": 1.05 if loss_type == "cispo" else 0.28, "max_completion_length": 8,
    } | more  # fmt: skip


def mean(found) -> torch.Tensor:
    return found.total / found.divisor


def oracle(rows, lengths, loss_type, level, beta, epsilon, epsilon_high, max_completion_length):
    """GRPOTrainer._compute_loss of TRL 1.16 in one process, without accumulation, on padded tensors."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    padding = torch.zeros(mask.shape, dtype=torch.float64)
    logps, old, ref = (padding.masked_scatter(mask, rows[k]) for k in ("logps", "old_logps", "ref_logps"))
    weight, advantages = mask.double(), rows["advantages"][:, None]
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * weight).sum(-1) / weight.sum(-1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        losses = -ratio.clamp(max=epsilon_high).detach() * advantages * logps
    else:
        losses = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    losses = losses + beta * ((ref - logps).exp() - (ref - logps) - 1)
    sums = (losses * weight).sum(-1)
    return {
        "grpo": (sums / weight.sum(-1).clamp(min=1)).mean(),
        "dr_grpo": sums.sum() / (len(lengths) * max_completion_length),
    }.get(loss_type, sums.sum() / weight.sum())


@TYPES
@LEVELS
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_is_that_of_trl(loss_type, level, beta):
    rows, chosen = batch(), options(loss_type, level, beta=beta)
    leaf, other = (rows["logps"].clone().requires_grad_() for _ in range(2))
    result = grpo_loss(**rows | {"logps": leaf}, **chosen)
    assert result.high.any() or level == "sequence"  # bounds are not idle
    assert result.kl is not None and not result.kl.requires_grad
    found = mean(result)
    chosen["level"] = chosen.pop("importance_sampling_level")
    expected = oracle(rows | {"logps": other}, LENGTHS, **chosen)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_grpo_by_hand():
    # completions of 2 and 1 tokens, A = 1 and −1, ε = 0.2 and 0.5 above. Ratios 2, 1 and 0.5:
    # min(2, 1.5) = 1.5, min(1, 1) = 1, min(−0.5, −0.8) = −0.8: losses −1.5, −1, 0.8
    old, sequences, advantages = row(-3, -2, -1), torch.tensor([0, 0, 1]), row(1, -1)
    logps = old + row(2, 1, 0.5).log()

    def of(loss_type, **more):
        return grpo_loss(
            logps, old, advantages, sequences, loss_type=loss_type, epsilon=0.2, max_completion_length=5,
            **{"epsilon_high": 0.5} | more,
        )  # fmt: skip

    sums = {"dapo": (-1.7, 3), "bnpo": (-1.7, 3), "dr_grpo": (-1.7, 10)}
    sums["grpo"] = (-0.45, 2)  # (−1.5 − 1)/2 + 0.8
    for loss_type, expected in sums.items():
        found = of(loss_type)
        assert (found.total.item(), found.divisor) == pytest.approx(expected)
        assert found.high.tolist() == [True, False, False] and found.low.tolist() == [False, False, True]
        assert found.kl is None
    # weights min(r, 1.5) = 1.5, 1, 0.5 times −A·log π: −1.5·(−3 + log 2) + 1·2 + 0.5·(−1 + log 0.5)
    # = 1.5·2.306853 + 2 − 0.5·1.693147 = 4.613706
    found = of("cispo", epsilon_high=1.5)
    assert (found.total.item(), found.divisor) == pytest.approx((4.613706, 3), abs=1e-6)
    assert found.high.tolist() == [True, False, False] and not found.low.any()
    assert not grpo_loss(
        logps, old, -advantages, sequences, loss_type="cispo", epsilon_high=1.5
    ).high.any()  # what is pushed down is not held back
    # GSPO: s = √(2·1) = 1.414214 and 0.5: losses −1.414214 and 0.8, of one token each
    found = of("grpo", importance_sampling_level="sequence")
    assert (found.total.item(), found.divisor) == pytest.approx((-0.614214, 2), abs=1e-6)
    assert found.high.tolist() == [False, False] and found.low.tolist() == [False, True]
    # β·k3 of each token, π_ref/π = 2: 2 − 1 − log 2 = 0.306853, three times 0.1 of it
    found = of("dapo", ref_logps=logps + math.log(2), beta=0.1)
    assert found.total.item() == pytest.approx(-1.7 + 0.092056, abs=1e-6)
    assert found.kl.tolist() == pytest.approx([0.306853] * 3, abs=1e-6)


@pytest.mark.parametrize("loss_type", [name for name in GRPO_LOSSES if name != "cispo"])
@LEVELS
def test_grpo_gradients_are_those_of_finite_differences(loss_type, level):
    rows = batch(1)
    leaf = rows["logps"].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(**rows | {"logps": x}, **options(loss_type, level)).total, (leaf,)
    )


@LEVELS
def test_cispo_gradients_are_those_of_held_weights(level):
    """Its weights are constants, which finite differences do not see: so they are held at where they are."""
    rows, cap = batch(1), 1.05
    leaf = rows["logps"].clone().requires_grad_()
    grpo_loss(**rows | {"logps": leaf}, **options("cispo", level, beta=0.0)).total.backward()
    log_ratio = rows["logps"] - rows["old_logps"]
    if level == "sequence":
        log_ratio = sequence_means(log_ratio, rows["sequences"], 5)[rows["sequences"]]
    weights = log_ratio.exp().clamp(max=cap)
    assert (weights == cap).any() and (weights < cap).any()
    torch.testing.assert_close(leaf.grad, -weights * rows["advantages"][rows["sequences"]])


@TYPES
@LEVELS
def test_first_pass_is_the_policy_gradient(loss_type, level):
    rows = batch(2)
    leaf = rows["logps"].clone().requires_grad_()
    chosen = options(loss_type, level, beta=0.0)
    given = grpo_loss(**rows | {"logps": leaf, "old_logps": rows["logps"]}, **chosen)
    without = grpo_loss(**rows | {"logps": leaf, "old_logps": None}, **chosen)
    assert torch.equal(given.total, without.total)
    assert not without.low.any() and not without.high.any()
    without.total.backward()
    of_token = rows["advantages"][rows["sequences"]]
    lengths = torch.tensor(LENGTHS)[rows["sequences"]]
    expected = -of_token / (lengths if loss_type == "grpo" else 1)
    torch.testing.assert_close(leaf.grad, expected)  # at sequence level Σ_t A·s/|y| over |y| tokens: the same


@TYPES
@LEVELS
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_accumulated_parts_are_the_whole(loss_type, level, cut):
    rows, chosen = batch(3), options(loss_type, level)
    whole = grpo_loss(**rows, **chosen)
    parts = []
    for lo, hi in ((0, cut), (cut, 5)):
        inside = (rows["sequences"] >= lo) & (rows["sequences"] < hi)
        part = {k: v[inside] for k, v in rows.items() if k != "advantages"}
        part |= {"advantages": rows["advantages"][lo:hi], "sequences": part["sequences"] - lo}
        parts.append(grpo_loss(**part, **chosen))
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert sum(p.divisor for p in parts) == whole.divisor
    assert whole.divisor == grpo_divisor(loss_type, 5, sum(LENGTHS), 8)


@TYPES
@LEVELS
def test_a_batch_whose_completions_are_all_masked(loss_type, level):
    nothing = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    found = grpo_loss(
        nothing, None, torch.ones(3), none, ref_logps=torch.zeros(0), **options(loss_type, level)
    )
    found.total.backward()
    assert found.total.item() == 0.0 and not found.high.any()
    fractions = clip_fractions(found.low, found.high, None if level == "sequence" else none, 3)
    assert all(math.isfinite(v.item()) for v in fractions.values())


@TYPES
def test_grpo_does_not_overflow(loss_type):
    logps = torch.tensor([0.0, 0.0, -500.0], requires_grad=True)
    old, ref = torch.tensor([-500.0, -500.0, 0.0]), torch.tensor([-500.0, 0.0, 0.0])
    found = grpo_loss(
        logps, old, torch.tensor([1.0, 0.0, -1.0]), torch.arange(3), ref_logps=ref, **options(loss_type)
    )
    found.total.backward()
    assert torch.isfinite(found.total) and torch.isfinite(logps.grad).all()


def test_clip_fractions_by_hand():
    sequences = torch.tensor([0, 0, 0, 0, 2, 2])  # of 4, 0 and 2 tokens
    low = torch.tensor([True, False, False, False, True, False])
    high = torch.tensor([False, True, True, True, False, False])
    found = {k: v.item() for k, v in clip_fractions(low, high, sequences, 3).items()}
    # low 2 of 6, 1/4 and 1/2; high 3 of 6, 3/4 and 0; either 5 of 6
    expected = {"low_mean": 1 / 3, "low_min": 0.25, "high_mean": 0.5, "high_max": 0.75, "region_mean": 5 / 6}
    assert found == pytest.approx(expected)
    found = {k: v.item() for k, v in clip_fractions(low[:4], high[:4], None, 4).items()}
    assert found == {"low_mean": 0.25, "low_min": 0.0, "high_mean": 0.75, "high_max": 1.0, "region_mean": 1.0}


def test_clipped_tokens_are_those_without_gradient():
    rows = batch(4, [40, 60]) | {"advantages": row(1.0, -1.0)}
    leaf = rows["logps"].clone().requires_grad_()
    found = grpo_loss(**rows | {"logps": leaf}, **options("dapo", beta=0.0))
    found.total.backward()
    assert found.low.any() and found.high.any() and torch.equal(leaf.grad == 0, found.low | found.high)


def test_bad_options_are_refused():
    rows = batch()
    unreferenced = {k: v for k, v in rows.items() if k != "ref_logps"}
    for match, wrong in {
        "scale_rewards is one of group, batch, none": lambda: group_advantages(row(1, 2), 2, "groups"),
        "num_generations = 2": lambda: group_advantages(row(1, 2, 3), 2),
        "num_generations = 0": lambda: group_advantages(row(1, 2, 3), 0),
        "loss_type is one of dapo.*not 'ppo'": lambda: grpo_loss(**rows, loss_type="ppo"),
        "importance_sampling_level is": lambda: grpo_loss(**rows, importance_sampling_level="tokens"),
        "set it": lambda: grpo_loss(**rows, loss_type="dr_grpo"),
        "give ref_logps": lambda: grpo_loss(**unreferenced, beta=0.1),
        "needs epsilon_high": lambda: grpo_loss(**rows, loss_type="cispo"),
    }.items():
        with pytest.raises(ValueError, match=match):
            wrong()
    with pytest.raises(AssertionError):  # [N] against [S, 1] would be a loss of N² pairs
        grpo_loss(**rows | {"advantages": rows["advantages"][:, None]})


@TYPES
@LEVELS
def test_nothing_waits_for_the_device(loss_type, level):
    """On "meta" tensors, which have no values, whatever would fetch one raises."""
    rows = {name: value.to("meta") for name, value in batch().items()}
    found = grpo_loss(**rows, **options(loss_type, level))
    clip_fractions(found.low, found.high, rows["sequences"] if level == "token" else None, 5)
    for scale in ("group", "batch", "none"):
        group_advantages(torch.zeros(8, device="meta"), 4, scale)
