"""Losses against arithmetic by hand, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from hydratune.losses import (
    DIVERGENCES,
    DPO_LOSSES,
    divergence_score,
    dpo_loss,
    kto_loss,
    reward_loss,
    token_loss,
)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_reward_by_hand():
    # difference 1, margin 0.5: −log σ(0.5) = log(1 + e^−0.5) = log 1.60653 = 0.474077
    assert reward_loss(number(2), number(1), number(0.5)).item() == pytest.approx(0.474077, abs=1e-6)
    # −log σ(1) = log(1 + e^−1) = log 1.367879 = 0.313262, and 0.1·(2 + 1)² = 0.9
    assert reward_loss(number(2), number(1), None, 0.1).item() == pytest.approx(1.213262, abs=1e-6)
    assert reward_loss(number(3), number(3)).item() == pytest.approx(math.log(2))


def test_kto_by_hand():
    ratios, kl = torch.tensor([3.0, 3.0]), torch.tensor(1.0)
    # β(r − kl) = 0.5·2 = 1, σ(1) = 0.731059: desirable 1.5·(1 − 0.731059) = 0.403412; undesirable, β(kl − r) = −1 and
    # 1 − σ(−1) = 0.731059, times 2 = 1.462117
    desirable = torch.tensor([True, False])
    found = kto_loss(ratios, desirable, kl, beta=0.5, desirable_weight=1.5, undesirable_weight=2.0)
    assert found.tolist() == pytest.approx([0.403412, 1.462117], abs=1e-6)
    # without reference point β·r = 1.5, σ(1.5) = 0.817574
    found = kto_loss(ratios, desirable, kl, beta=0.5, loss_type="apo_zero_unpaired")
    assert found.tolist() == pytest.approx([0.182426, 0.817574], abs=1e-6)


# r₊ = 2, r₋ = −1, β = 0.5, ε = 0.1 where it counts: Δ = 3, βΔ = 1.5, βr₊ = 1, βr₋ = −0.5; lengths 4 and 2.
# σ(1.5) = 0.817574, −log σ(1.5) = 0.201413, −log σ(−1.5) = 1.701413; −log σ(1) = 0.313262, −log σ(−1) = 1.313262;
# −log σ(0.5) = 0.474077, −log σ(−0.5) = 0.974077
BY_HAND = {
    "sigmoid": 0.201413,
    "hinge": 0.0,  # max(0, 1 − 1.5)
    "ipo": 0.0,  # (2/4 + 1/2 − 1/(2·0.5))² = (1 − 1)²
    # 0.817574·(−0.201413 − log 0.9) + 0.182426·(−1.701413 − log 0.1) = −0.078530 + 0.109666
    "exo_pair": 0.031137,
    "nca_pair": 1.207,  # 0.313262 + (1.313262 + 0.474077)/2 = 1.206932
    "robust": 0.013913,  # (0.9·0.201413 − 0.1·1.701413)/0.8 = (0.181272 − 0.170141)/0.8
    "bco_pair": 0.787339,  # 0.313262 + 0.474077
    "sppo_hard": 1.0,  # (2 − 1)² + (−1 + 1)²
    "aot": 0.351413,  # one pair: β·3 = 1.5, 0.9·0.201413 + 0.1·1.701413
    "aot_unpaired": 0.351413,
    "apo_zero": 0.646482,  # σ(−1) + σ(−0.5) = 0.268941 + 0.377541
    "apo_down": 0.913485,  # σ(1) + σ(−1.5) = 0.731059 + 0.182426
    # τ = 0.05: m = σ(30) = 1, so exp(−1.5)
    "discopop": 0.223130,
    "sigmoid_norm": 0.474077,  # −log σ(0.5·(2/4 + 1/2))
}


def dpo(loss: str, chosen=None, rejected=None, **more):
    chosen, rejected = (number(2.0), number(-1.0)) if chosen is None else (chosen, rejected)
    options = {
        "beta": 0.5, "label_smoothing": 0.1, "chosen_lengths": torch.full_like(chosen, 4).detach(),
        "rejected_lengths": torch.full_like(chosen, 2).detach(), "policy_margins": chosen - rejected,
    }  # fmt: skip
    return dpo_loss(chosen, rejected, loss_type=loss, **options | more)


@pytest.mark.parametrize("loss", [name for name in DPO_LOSSES if name != "sft"])
def test_dpo_by_hand(loss):
    assert dpo(loss).item() == pytest.approx(BY_HAND[loss], abs=1e-4)


@pytest.mark.parametrize("loss", [name for name in DPO_LOSSES if name != "sft"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(loss, divergence):
    chosen = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)

    def of(a, b):
        return dpo(loss, a, b, divergence=divergence, divergence_alpha=0.3, discopop_tau=0.5)

    assert torch.autograd.gradcheck(of, (chosen, rejected))


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_gradients_are_those_of_finite_differences(loss):
    ratios = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, True])
    kl = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r: kto_loss(r, desirable, kl, beta=0.5, loss_type=loss, undesirable_weight=2.0), (ratios,)
    )


def test_reward_gradients_are_those_of_finite_differences():
    values = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    margin = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, margin, 0.1), values)


def test_divergences_by_hand():
    t = number(math.log(2.0))  # π/π_ref = 2
    assert divergence_score(t).item() == pytest.approx(math.log(2))
    assert divergence_score(t, "forward_kl").item() == pytest.approx(0.5)  # 1 − 1/2
    assert divergence_score(t, "js_divergence").item() == pytest.approx(math.log(4 / 3))  # log(2·2/3)
    assert divergence_score(t, "alpha_divergence", 0.5).item() == pytest.approx(
        2 - math.sqrt(2)
    )  # (2^−½ − 1)/(−½)
    near = divergence_score(t, "alpha_divergence", 1 + 1e-5)
    assert near.item() == pytest.approx(math.log(2), abs=1e-5)  # tends to log t


def test_equal_settings_are_equal_losses():
    assert dpo("robust", label_smoothing=0.0).item() == pytest.approx(dpo("sigmoid").item())
    assert dpo("sigmoid", number(0.0), number(0.0)).item() == pytest.approx(math.log(2))
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -1.0])
    shuffled = dpo("aot_unpaired", a, b[[2, 0, 1]])
    assert dpo("aot_unpaired", a, b).tolist() == pytest.approx(shuffled.tolist())  # pairs do not matter to it


@pytest.mark.parametrize(
    "loss", [name for name in DPO_LOSSES if name not in ("sft", "sppo_hard", "ipo", "discopop")]
)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_ratios_stay_finite(loss, size):
    chosen, rejected = (torch.tensor([v], requires_grad=True) for v in (size, -size))
    for divergence in ("reverse_kl", "js_divergence"):
        dpo(loss, chosen, rejected, divergence=divergence).sum().backward()
        assert math.isfinite(dpo(loss, chosen, rejected).item())
        assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_extreme_kto_stays_finite():
    ratios = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    found = kto_loss(ratios, desirable, torch.tensor(0.0), beta=1.0)
    found.sum().backward()
    assert found.tolist() == [0.0, 1.0, 1.0, 0.0] and torch.isfinite(ratios.grad).all()


def test_unknown_names_are_refused():
    for wrong in (
        lambda: dpo("sigmod"),
        lambda: dpo("sft"),
        lambda: divergence_score(number(1), "kl"),
        lambda: kto_loss(number(1), torch.tensor([True]), number(0), beta=1, loss_type="kt"),
        lambda: token_loss(number(-1), "nl"),
    ):
        with pytest.raises(ValueError, match=r"loss_type is|f_divergence_type is"):
            wrong()
