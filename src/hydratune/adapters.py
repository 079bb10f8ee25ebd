"""Adapters: from plain fields to a peft config, from a model to an adapted one, and back to a stand-alone model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from hydratune.errors import UserError, Violation, nearest

_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "reward": "SEQ_CLS",
}  # with SEQ_CLS peft trains and saves the score head too


def peft_config(fields: dict[str, Any] | None, task: str = "causal_lm") -> Any:
    """`{"type": "lora", "r": 8, …}` as the `peft.PeftConfig` of that type; None for no adapter.

    Args:
        task: `models.ModelRecipe.task`.

    Raises:
        UserError: a type that peft does not have, or fields that its config refuses.
    """
    if not fields or not fields.get("type"):
        return None
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    values = copy.deepcopy(fields)
    kind = values.pop("type")
    classes = {str(getattr(k, "value", k)).lower(): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind.lower() not in classes:
        raise UserError(Violation("peft.type", kind, "peft has no such adapter", nearest(kind, classes)))
    try:
        return classes[kind.lower()](**{"task_type": _TASKS[task], **values})
    except (TypeError, ValueError) as error:
        raise UserError(
            Violation("peft", kind, f"{classes[kind.lower()].__name__} refuses these fields", str(error))
        ) from error


def starts_as_nothing(config: Any) -> bool:
    """Whether a fresh adapter of a `peft.PeftConfig` leaves the model as it is, and the base's weights too.

    PiSSA, OLoRA, CorDA, LoftQ and others take the adapter's share out of the base; `init_lora_weights=False` is noise.
    """
    how = getattr(config, "init_lora_weights", True)
    return how is True or str(how).lower() in ("gaussian", "eva", "mica")


def quantization(kind: str | None, dtype: torch.dtype, task: str = "causal_lm") -> Any:
    """The bitsandbytes config of '4bit' (NF4, double quantisation: QLoRA, arXiv:2305.14314) or '8bit'.

    A reward model's score head is left as it is, because it is trained.
    """
    if kind is None:
        return None
    from transformers import BitsAndBytesConfig

    left: dict[str, Any] = {"llm_int8_skip_modules": ["score"]} if task == "reward" else {}
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **left)
    return BitsAndBytesConfig(
        **left,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if dtype != torch.float32 else torch.bfloat16,
    )


def wrap(model: Any, config: Any) -> Any:
    """The model with a fresh adapter: the base frozen as it is, the adapter in fp32.

    Raises:
        UserError: the target modules match nothing in this model.
    """
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise UserError(
            Violation(
                "peft",
                config.peft_type,
                "the model already carries an adapter",
                "merge that one first, or set peft=none",
            )
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = copy.deepcopy(config)
    if hasattr(model, "score"):
        config.task_type = _TASKS["reward"]  # else its head would be frozen, and not be saved
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        leaves = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise UserError(
            Violation(
                "peft.target_modules",
                str(getattr(config, "target_modules", None)),
                str(error).splitlines()[0],
                f"choose among {', '.join(leaves)}, or peft.target_modules=all-linear",
            )
        ) from error


def find_adapter(source: str | Path) -> Path:
    """The adapter's directory, given itself or its run directory."""
    for candidate in (Path(source), Path(source) / "model"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise UserError(
        Violation(
            "adapter",
            str(source),
            "no adapter_config.json here or in its model/ folder",
            "give a run directory or a saved adapter",
        )
    )


def load_adapter(source: str | Path, *, dtype: Any = None, **kwargs: Any) -> Any:
    """A saved adapter on its base, as a `PeftModel`.

    Args:
        source: a run directory or an adapter's directory.
        dtype: of the base; None keeps what it was saved in.
        kwargs: passed to `from_pretrained` of the base.

    Raises:
        UserError: no adapter at `source`, or its base is not to be had.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    adapter = find_adapter(source)
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scores = saved.get("task_type") == _TASKS["reward"]
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    base = base_of_adapter(adapter)
    labels = {"num_labels": 1} if scores else {}
    try:
        model = auto.from_pretrained(base, dtype=dtype or "auto", **labels, **kwargs)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            Violation(
                "base_model_name_or_path",
                base,
                "the adapter's base model is not to be had",
                str(error).splitlines()[0],
            )
        ) from error
    return PeftModel.from_pretrained(model, adapter)


def base_of_adapter(adapter: Path) -> str | None:
    """Directory or hub id of an adapter's base; the one beside it where its run directory was moved."""
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    beside = adapter.parent / "base"
    return str(beside) if not Path(base or "").is_dir() and beside.is_dir() else base


def merge_adapter(source: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Merge an adapter into its base and save a model that plain transformers loads.

    Args:
        source: a run directory or an adapter's directory.
        target: a directory that does not exist yet, or is empty.
        dtype: of the saved weights; None keeps the base's.

    Raises:
        UserError: no adapter at `source`, its base is not to be had, or `target` is taken.
    """
    from transformers import AutoTokenizer

    adapter, target = find_adapter(source), free_folder(target)
    model = load_adapter(adapter, dtype=dtype).merge_and_unload()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(target)
    return target


def free_folder(target: str | Path) -> Path:
    """
    Raises:
        UserError: something is there already.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(Violation("target", str(target), "is already there", "name a new directory"))
    return target
