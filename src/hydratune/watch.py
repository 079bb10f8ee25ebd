"""Warnings of an online run that goes wrong, with what it comes from and what may help; each is given once."""

from __future__ import annotations

import logging

log = logging.getLogger("hydratune")
_FAR = 1.0  # KL in nats a token, of a policy that has left its reference
_APART = 0.1  # nats a token: bf16 kernels differ by a few hundredths
_FLAT, _FALLEN = (
    0.02,
    0.2,
)  # entropy in nats a token of a policy that always says the same, and as a share of the first


class Watch:
    """Looks at what is logged.

    Args:
        kl_option: what holds the policy to the reference.
    """

    def __init__(self, kl_option: str) -> None:
        self.kl_option = kl_option
        self.first_entropy: float | None = None
        self._said: set[str] = set()

    def look(
        self,
        step: int,
        *,
        equal_rewards: float | None = None,
        kl: float = 0.0,
        entropy: float | None = None,
        gap: float = 0.0,
    ) -> None:
        """
        Args:
            equal_rewards: the reward that every completion got, if they all got the same.
            kl, entropy: nats a token.
            gap: between the log-probs of the sampler and of the policy, nats a token.
        """
        if equal_rewards is not None:
            self._say(
                step,
                "equal rewards",
                f"every completion was rewarded {equal_rewards:g}: nothing can be learnt from equal rewards; start from a "
                "policy that is sometimes right (algo=sft first), raise algo.temperature, or grade the reward",
            )
        if kl > _FAR:
            self._say(
                step,
                "kl",
                f"the KL from the reference is {kl:.2f} nats a token: the policy has left it, and may be gaming the reward; "
                f"lower lr, or raise {self.kl_option}",
            )
        if gap > _APART:
            self._say(
                step,
                "gap",
                f"the server's log-probs are {gap:.2f} nats a token off the policy's: it may have other weights, or "
                "another tokenizer, dtype or quantization; start it anew with the policy's model",
            )
        if entropy is None:
            return
        if self.first_entropy is None:
            self.first_entropy = entropy
        if entropy < _FLAT and entropy < _FALLEN * self.first_entropy:
            self._say(
                step,
                "entropy",
                f"the entropy has fallen from {self.first_entropy:.2f} to {entropy:.3f} nats a token: the policy always says "
                f"the same; lower lr, raise {self.kl_option} or algo.temperature, or stop here",
            )

    def _say(self, step: int, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("step %d: %s", step, line)
