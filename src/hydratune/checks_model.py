"""The rules of the checks that need the device, the tokenizer, or the model's outline (its modules without memory)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from hydratune.checks import Findings, Problem, collect, packs
from hydratune.errors import Violation, nearest
from hydratune.options import config_class, options_of
from hydratune.settings import RunSettings


@dataclass(frozen=True)
class DeviceFacts:
    """What the checks need to know of the device; memory in bytes."""

    kind: str
    name: str
    bf16: bool
    fp16: bool
    total_bytes: int
    count: int = 1
    world_size: int = 1
    flash_attn: bool = False


def device_facts() -> DeviceFacts:
    """Facts of the device that a run would use."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return DeviceFacts(
            "cuda", torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False), True, total, torch.cuda.device_count(),
            world, find_spec("flash_attn") is not None,
        )  # fmt: skip
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceFacts("cpu", "the CPU", bf16=True, fp16=False, total_bytes=total, world_size=world)


def check_device(settings: RunSettings, device: DeviceFacts) -> Findings:
    """The rules on precision, attention and quantisation against the device that is there."""
    return collect(_DEVICE_RULES, settings, device)


def check_tokenizer(tokenizer: Any, settings: RunSettings) -> Findings:
    """The rules on special tokens and the vocabulary."""
    return collect(_TOKENIZER_RULES, tokenizer, settings)


def check_model(outline: Any, peft: dict[str, Any] | None, tokenizer: Any, settings: RunSettings) -> Findings:
    """The rules on the model's modules and sizes against the adapter and the tokenizer."""
    return collect(_MODEL_RULES, outline, peft, tokenizer, settings)


# ------------------------------------------------------------------ the device


def _precision_is_supported(settings: RunSettings, device: DeviceFacts) -> Iterator[Problem]:
    for kind in ("bf16", "fp16"):
        if settings.algo_options.get(kind) and not getattr(device, kind):
            yield f"trainer.{kind}=true is not supported on {device.name}: training in fp32"
    if settings.algo_options.get("tf32") and device.kind != "cuda":
        yield Violation("trainer.tf32", True, f"{device.name} has no TF32", "leave it out")
    if settings.model.dtype == "float16" and device.kind == "cpu":
        yield Violation("model.dtype", "float16", "is not trained on a CPU", "use auto, float32 or bfloat16")


def _attention_is_there(settings: RunSettings, device: DeviceFacts) -> Iterator[Problem]:
    name = settings.model.attn_implementation
    if "flash_attention" not in name:
        return
    if device.kind != "cuda":
        yield Violation(
            "model.attn_implementation",
            name,
            f"needs a CUDA GPU, here is {device.name}",
            "use model.attn_implementation=auto",
        )
    elif name == "flash_attention_2" and not device.flash_attn:
        yield Violation(
            "model.attn_implementation",
            name,
            "the package flash-attn is not installed",
            'pip install "hydratune[flash]", or use auto',
        )


def _quantisation_has_a_gpu(settings: RunSettings, device: DeviceFacts) -> Iterator[Problem]:
    if settings.model.quantization and device.kind != "cuda":
        yield Violation(
            "model.quantization",
            settings.model.quantization,
            f"needs a CUDA GPU, here is {device.name}",
            "use peft=lora",
        )


_DEVICE_RULES = [_precision_is_supported, _attention_is_there, _quantisation_has_a_gpu]


# ------------------------------------------------------------------ the tokenizer


def _pad_is_not_eos(tokenizer: Any, settings: RunSettings) -> Iterator[Problem]:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield f"the pad token is the EOS token ({tokenizer.eos_token}): padding is masked, but set algo.pad_token if the tokenizer has another"


def _vocabulary_is_covered(tokenizer: Any, settings: RunSettings) -> Iterator[Problem]:
    given = (settings.model.architecture or {}).get("vocab_size")
    if given and given < len(tokenizer):
        yield f"model.architecture.vocab_size={given} is raised to the tokenizer's {len(tokenizer)}"


_TOKENIZER_RULES = [_pad_is_not_eos, _vocabulary_is_covered]


# ------------------------------------------------------------------ the model


def _embeddings_hold_the_vocabulary(
    outline: Any, peft: Any, tokenizer: Any, settings: RunSettings
) -> Iterator[Problem]:
    rows = outline.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        yield Violation(
            "model.tokenizer",
            settings.model.tokenizer,
            f"has {len(tokenizer)} tokens, the model embeds {rows}",
            "use the model's own tokenizer",
        )


def _positions_reach(outline: Any, peft: Any, tokenizer: Any, settings: RunSettings) -> Iterator[Problem]:
    most = getattr(outline.config.get_text_config(), "max_position_embeddings", None)
    declared = config_class(f"hydratune.algos.{settings.algo}", "BaseConfig")
    own = options_of(declared).get("max_length") if declared else None
    length = settings.algo_options.get("max_length", own.default if own else None)
    if most and length and length > most:
        yield f"algo.max_length={length} is longer than the {most} positions that the model was made for"


def _modules_exist(
    outline: Any, peft: dict[str, Any] | None, tokenizer: Any, settings: RunSettings
) -> Iterator[Problem]:
    import torch

    names = [name for name, _ in outline.named_modules()]
    linear = sorted(
        {n.rsplit(".", 1)[-1] for n, m in outline.named_modules() if isinstance(m, torch.nn.Linear)}
    )
    for key in ("target_modules", "modules_to_save"):
        wanted = (peft or {}).get(key)
        if not wanted or str(wanted).lower() == "all-linear":
            continue
        patterns = [wanted] if isinstance(wanted, str) else list(wanted)

        def matches(pattern: str, regex: bool = isinstance(wanted, str)) -> bool:
            if regex:
                try:
                    return any(re.fullmatch(pattern, n) for n in names)
                except re.error:
                    return False
            return any(n == pattern or n.endswith(f".{pattern}") for n in names)

        missing = [p for p in patterns if not matches(p)]
        if missing:
            yield Violation(
                f"peft.{key}",
                ", ".join(missing),
                "matches no module of this model",
                f"{nearest(missing[0], linear)} (there are: {', '.join(linear)}; or all-linear)",
            )


def _rank_is_low(
    outline: Any, peft: dict[str, Any] | None, tokenizer: Any, settings: RunSettings
) -> Iterator[Problem]:
    rank, width = (peft or {}).get("r"), getattr(outline.config.get_text_config(), "hidden_size", None)
    if isinstance(rank, int) and width and rank > width:
        yield f"peft.r={rank} is above the model's width {width}: the adapter is larger than what it adapts"


def _documents_can_be_kept_apart(
    outline: Any, peft: Any, tokenizer: Any, settings: RunSettings
) -> Iterator[Problem]:
    from hydratune.attention import obeyed

    config = outline.config.get_text_config()
    kinds = {
        *(getattr(config, "layer_types", None) or []),
        *(getattr(config, "layers_block_type", None) or []),
    }
    stateful = kinds & {"linear_attention", "mamba", "mamba2", "recurrent"} or re.search(
        "mamba|rwkv", str(config.model_type)
    )
    if (packing := packs(settings)) and (stateful or not obeyed(outline)):
        does = "carries a state across documents" if stateful else "is not known to keep documents apart"
        yield Violation(
            f"algo.{packing}",
            True,
            f"{config.model_type} {does}",
            f"set algo.{packing}=false",
        )


_MODEL_RULES = [
    _embeddings_hold_the_vocabulary, _positions_reach, _modules_exist, _rank_is_low, _documents_can_be_kept_apart,
]  # fmt: skip
