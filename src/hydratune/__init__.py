"""hydratune: experiments and sweeps for LLM post-training.

Public names are imported on first use, so that a config error or `--help` never waits for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DPOConfig": "hydratune.algos.dpo",
    "DPOTrainer": "hydratune.algos.dpo",
    "GRPOConfig": "hydratune.algos.grpo",
    "GRPOTrainer": "hydratune.algos.grpo",
    "KTOConfig": "hydratune.algos.kto",
    "KTOTrainer": "hydratune.algos.kto",
    "PPOConfig": "hydratune.algos.ppo",
    "PPOTrainer": "hydratune.algos.ppo",
    "RewardConfig": "hydratune.algos.reward",
    "RewardTrainer": "hydratune.algos.reward",
    "SFTConfig": "hydratune.algos.sft",
    "SFTTrainer": "hydratune.algos.sft",
    "ModelRecipe": "hydratune.models",
    "merge_adapter": "hydratune.adapters",
    "UserError": "hydratune.errors",
}
__all__ = [
    "DPOConfig", "DPOTrainer", "GRPOConfig", "GRPOTrainer", "KTOConfig", "KTOTrainer", "ModelRecipe", "PPOConfig", "PPOTrainer",
    "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer", "UserError", "merge_adapter",
]  # fmt: skip

if TYPE_CHECKING:
    from hydratune.adapters import merge_adapter
    from hydratune.algos.dpo import DPOConfig, DPOTrainer
    from hydratune.algos.grpo import GRPOConfig, GRPOTrainer
    from hydratune.algos.kto import KTOConfig, KTOTrainer
    from hydratune.algos.ppo import PPOConfig, PPOTrainer
    from hydratune.algos.reward import RewardConfig, RewardTrainer
    from hydratune.algos.sft import SFTConfig, SFTTrainer
    from hydratune.errors import UserError
    from hydratune.models import ModelRecipe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hydratune' has no attribute '{name}'")
