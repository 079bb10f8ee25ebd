"""Losses as pure functions of tensors.

In what follows log π(y|x) is summed over the tokens of a completion unless said otherwise, and a log-ratio is
log π(y|x) − log π_ref(y|x).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


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


def reward_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | None = None,
    center_coefficient: float | None = None,
) -> torch.Tensor:
    """−log σ(r₊ − r₋ − margin) + c·(r₊ + r₋)²: Bradley–Terry, with the margin of Llama 2 (arXiv:2307.09288, eq. 2) and
    rewards drawn to zero (arXiv:2312.09244, eq. 2).

    Args:
        chosen, rejected: rewards of each pair, [B].
        margin: [B], or None for 0.
        center_coefficient: c; None for 0.

    Returns:
        [B].
    """
    difference = chosen - rejected
    loss = -F.logsigmoid(difference if margin is None else difference - margin)
    if center_coefficient is not None:
        loss = loss + center_coefficient * (chosen + rejected).square()
    return loss


def kto_loss(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO (arXiv:2402.01306, section 4): w₊·(1 − σ(β(r − kl))) for desirable rows, w₋·(1 − σ(β(kl − r))) for the others.

    Args:
        log_ratios: r, [B].
        desirable: [B], bool.
        kl: the reference point, a scalar without gradient.
        loss_type: "apo_zero_unpaired" is the same with kl = 0 (the unpaired form of arXiv:2408.06266, eq. 7).

    Returns:
        [B].
    """
    if loss_type == "apo_zero_unpaired":
        kl = torch.zeros_like(kl)
    elif loss_type != "kto":
        raise ValueError(f"loss_type is 'kto' or 'apo_zero_unpaired', not {loss_type!r}")
    above = beta * (log_ratios - kl)
    # 1 − σ(x) = σ(−x), which keeps its digits where σ(x) is close to 1
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-above), undesirable_weight * torch.sigmoid(above)
    )


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_MOST = 80.0  # exp of more overflows fp32


def divergence_score(
    log_ratios: torch.Tensor, divergence: str = "reverse_kl", alpha: float = 0.5
) -> torch.Tensor:
    """f′(π/π_ref) of an f-divergence, up to a constant: what takes the place of the log-ratio in DPO's reward
    (arXiv:2309.16240, table 1).

    With t = π/π_ref: reverse KL log t, forward KL −1/t, Jensen–Shannon log(2t/(1 + t)), α-divergence
    (t^(α−1) − 1)/(α − 1), which tends to log t as α → 1.

    Args:
        log_ratios: log t, any shape.

    Returns:
        The same shape. Forward KL is given as 1 − 1/t: constants cancel between chosen and rejected.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return log_ratios
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=_MOST))
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if divergence == "alpha_divergence":
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=_MOST)) / (alpha - 1)
    raise ValueError(f"f_divergence_type is one of {', '.join(DIVERGENCES)}, not {divergence!r}")


def dpo_loss(
    chosen_ratios: torch.Tensor,
    rejected_ratios: torch.Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    policy_margins: torch.Tensor | None = None,
) -> torch.Tensor:
    """The losses of direct preference optimisation, of each pair.

    With s the `divergence_score` of a log-ratio r, Δ = s₊ − s₋, and ε the label smoothing:

    - sigmoid: −log σ(βΔ) (arXiv:2305.18290, eq. 7)
    - hinge: max(0, 1 − βΔ) (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657)
    - ipo: (s₊/|y₊| − s₋/|y₋| − 1/(2β))², scores a token (arXiv:2310.12036, eq. 17)
    - exo_pair: KL(σ(±βΔ) ‖ (1 − ε, ε)) (arXiv:2402.00856, eq. 16), which needs ε > 0
    - nca_pair: −log σ(βr₊) − ½ log σ(−βr₊) − ½ log σ(−βr₋) (arXiv:2402.05369)
    - robust: (−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε) (arXiv:2403.00409)
    - bco_pair: −log σ(βr₊) − log σ(−βr₋) (arXiv:2404.04656, without its running mean)
    - sppo_hard: (r₊ − 1/(2β))² + (r₋ + 1/(2β))² (arXiv:2405.00675, eq. 4.7)
    - aot, aot_unpaired: −(1 − ε) log σ(βδ) − ε log σ(−βδ), δ the difference of sorted values over the batch: of policy
      margins and reference margins, or of r₊ and r₋ (arXiv:2406.05882)
    - apo_zero: σ(−βr₊) + σ(βr₋); apo_down: σ(βr₊) + σ(−β(r₊ − r₋)) (arXiv:2408.06266, eqs. 7, 8)
    - discopop: (1 − m)·(−log σ(βΔ)) + m·exp(−βΔ), m = σ(βΔ/τ) (arXiv:2406.08414, eq. 5)
    - sigmoid_norm: −log σ(β(s₊/|y₊| − s₋/|y₋|)) (arXiv:2411.15124)

    ("sft" is no function of these: the trainer adds the chosen completions' cross-entropy itself.)

    Args:
        chosen_ratios, rejected_ratios: r₊ and r₋, [B].
        chosen_lengths, rejected_lengths: |y₊| and |y₋| in tokens, [B]; of ipo and sigmoid_norm.
        policy_margins: log π(y₊|x) − log π(y₋|x), [B]; of aot.

    Returns:
        [B].
    """
    r_w, r_l = chosen_ratios, rejected_ratios
    s_w, s_l = (divergence_score(r, divergence, divergence_alpha) for r in (r_w, r_l))
    if loss_type in ("ipo", "sigmoid_norm"):
        assert chosen_lengths is not None and rejected_lengths is not None
        s_w, s_l = s_w / chosen_lengths.clamp(min=1), s_l / rejected_lengths.clamp(min=1)
    scaled = beta * (s_w - s_l)
    match loss_type:
        case "sigmoid" | "sigmoid_norm":
            return -F.logsigmoid(scaled)
        case "hinge":
            return torch.relu(1 - scaled)
        case "ipo":
            return (s_w - s_l - 1 / (2 * beta)).square()
        case "exo_pair":
            right, wrong = F.logsigmoid(scaled), F.logsigmoid(-scaled)
            return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (
                wrong - math.log(label_smoothing)
            )
        case "nca_pair":
            return -F.logsigmoid(beta * r_w) - (F.logsigmoid(-beta * r_w) + F.logsigmoid(-beta * r_l)) / 2
        case "robust":
            flipped = label_smoothing * F.logsigmoid(-scaled)
            return (flipped - (1 - label_smoothing) * F.logsigmoid(scaled)) / (1 - 2 * label_smoothing)
        case "bco_pair":
            return -F.logsigmoid(beta * r_w) - F.logsigmoid(-beta * r_l)
        case "sppo_hard":
            return (r_w - 1 / (2 * beta)).square() + (r_l + 1 / (2 * beta)).square()
        case "aot" | "aot_unpaired":
            if loss_type == "aot":
                assert policy_margins is not None
                ours, theirs = policy_margins, policy_margins - (r_w - r_l)
            else:
                ours, theirs = r_w, r_l
            gap = beta * (ours.sort().values - theirs.sort().values)
            return -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
        case "apo_zero":
            return torch.sigmoid(-beta * r_w) + torch.sigmoid(beta * r_l)
        case "apo_down":
            return torch.sigmoid(beta * r_w) + torch.sigmoid(-beta * (r_w - r_l))
        case "discopop":
            share = torch.sigmoid(scaled / discopop_tau)
            return (1 - share) * -F.logsigmoid(scaled) + share * torch.exp(-scaled)
    raise ValueError(f"loss_type is one of {', '.join(DPO_LOSSES)}, not {loss_type!r}")
