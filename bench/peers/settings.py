"""The settings that a reinforcement-learning benchmark gives to every arm, ours and the peers', as one JSON file.

Only the standard library, so that each environment can read it. The names are TRL's PPO names, and mean what they mean
there; docs of each field say what GRPO makes of it. A batch of episodes is one rollout; it is split into
`num_mini_batches`, each of them one optimizer step, and these into micro-batches, each one forward and backward.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """One comparison. All sizes are of one process.

    A field that says "directory or null" builds from the architecture below, with random weights, when it is null.
    """

    tokenizer: str
    """Directory of a tokenizer with pad and EOS tokens."""
    rows: list[dict[str, Any]]
    """The prompts: {"prompt_ids": token ids without padding, "answer": what the reward rule is given or null}."""

    # models
    model: str | None = None
    """Policy, and reference: directory or null."""
    reward: str = "verify"
    """A rule of `common.RULES` ("verify", "digits"), "model" (random weights), or a reward model's directory."""
    value_model: str | None = None
    """Directory or null. GRPO has none."""
    hidden: int = 64
    """Width; the MLP is three times as wide."""
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    tie_word_embeddings: bool = True
    seed: int = 0
    """Of weights (policy: seed, reward: seed + 1, value: seed + 2), of shuffling and of sampling."""

    # amount
    episodes: int = 128
    """Completions sampled in all; a multiple of the batch."""
    per_device_train_batch_size: int = 16
    """Sequences in one forward and backward, unless a mini-batch has fewer."""
    gradient_accumulation_steps: int = 1
    """The batch is this many times the above. More than 1 is unfair to TRL's PPO: it steps once for this many
    micro-batches whatever the mini-batches, and at each micro-batch of the last batch of an epoch."""
    num_ppo_epochs: int = 4
    """Passes over one rollout; GRPO's `num_iterations`."""
    num_mini_batches: int = 1
    """Optimizer steps in one pass; divides the batch."""

    # rollout
    response_length: int = 53
    """New tokens at most; GRPO's `max_completion_length`."""
    temperature: float = 0.7
    stop_token: str | None = "eos"
    """ "eos", or null: never stop (PPO only)."""
    missing_eos_penalty: float | None = None
    """Taken off the score of a completion without EOS (PPO only)."""
    local_rollout_forward_batch_size: int | None = None
    """Sequences generated and scored at once; null: the whole batch, which is fastest where memory allows (PPO only)."""
    num_generations: int = 8
    """Completions of one prompt (GRPO only); divides the batch."""

    # optimisation
    learning_rate: float = 3e-6
    lr_scheduler_type: str = "linear"
    max_grad_norm: float = 1.0
    """TRL's PPO ignores it."""
    kl_coef: float = 0.05
    """Weight of the KL penalty in the reward; GRPO's `beta` (in its loss; 0: no reference model)."""
    kl_estimator: str = "k1"
    """ "k1" or "k3" (PPO only)."""
    whiten_rewards: bool = False
    cliprange: float = 0.2
    """GRPO's `epsilon`."""
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    loss_type: str = "dapo"
    """GRPO only."""
    scale_rewards: str = "group"
    """GRPO only."""

    # machine
    use_cpu: bool = True
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Autocast. TRL's default is true for this and for checkpointing, also on a CPU."""
    gc_freeze: bool = True
    """`gc.freeze()` before training. TRL's PPO collects garbage twice a rollout, which walks all objects of all imports
    (0.2 s each, most of the time of a tiny model); frozen ones are passed over. False: as a user would have it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More arguments for the peer's config, as they are."""

    def __post_init__(self) -> None:
        if self.batch % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches={self.num_mini_batches} must divide the batch of {self.batch}"
            )
        if self.mini_batch % self.micro_batch:
            raise ValueError(
                f"a mini-batch of {self.mini_batch} must be a multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size}, or at most that: it is a whole number of micro-batches"
            )
        if self.episodes % self.batch:
            raise ValueError(f"episodes={self.episodes} must be a multiple of the batch of {self.batch}")
        if not self.rows:
            raise ValueError("rows is empty: at least one prompt is needed")

    @property
    def batch(self) -> int:
        """Episodes in one rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def mini_batch(self) -> int:
        """Episodes in one optimizer step."""
        return self.batch // self.num_mini_batches

    @property
    def micro_batch(self) -> int:
        """Episodes in one forward and backward."""
        return min(self.mini_batch, self.per_device_train_batch_size)

    @property
    def rollouts(self) -> int:
        return self.episodes // self.batch

    @property
    def optimizer_steps(self) -> int:
        """As meant, in all rollouts."""
        return self.rollouts * self.num_ppo_epochs * self.num_mini_batches

    @classmethod
    def read(cls, path: str | Path) -> Settings:
        """From a JSON file.

        Raises:
            ValueError: a key that is not a field, or values that do not fit together.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; settings.py lists them")
        return cls(**values)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
