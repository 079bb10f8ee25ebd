"""From a recipe to a pristine model, any number of times, and from settings to a tokenizer.

A recipe never changes: every `build()` gives the same parameters, whatever ran before it, because the weights come
from disk or from the recipe's own seed, and the keyword arguments are copied before they are handed on.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hydratune import adapters, attention, held
from hydratune.errors import UserError, Violation

# The head of a model by what it is for: a reward model gives one score a sequence.
_CLASSES = {"causal_lm": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + 'END' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + 'END' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def chatml(end_of_turn: str = "<|im_end|>") -> str:
    """The ChatML template with its assistant turns marked, ending each turn with the given token."""
    return _CHATML.replace("END", end_of_turn)


@dataclass(frozen=True)
class ModelRecipe:
    """Everything that determines a fresh model.

    Attributes:
        name_or_path: hub id or directory; None with `architecture`.
        architecture: config fields, with `model_type`, of a model with random weights drawn from `seed`.
        init_kwargs: keyword arguments of `from_pretrained`, never changed.
        quantization_config: bitsandbytes (or other) config, or None.
        peft_config: a `peft.PeftConfig` wrapped around every fresh model, or None.
        dtype: torch dtype of the weights; None leaves it to `init_kwargs`, else fp32.
        attn_implementation: name known to transformers; None leaves it to `init_kwargs`.
        seed: of random weights and of the adapter's initialisation.
        task: "causal_lm", or "reward" for one score a sequence; a head that the weights lack is drawn from `seed`.
    """

    name_or_path: str | None = None
    architecture: dict[str, Any] | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    quantization_config: Any = None
    peft_config: Any = None
    dtype: torch.dtype | None = None
    attn_implementation: str | None = None
    seed: int = 42
    trust_remote_code: bool = False
    task: str = "causal_lm"

    def config(self) -> Any:
        """The transformers config, read without any weights."""
        if self.architecture is not None:
            fields = copy.deepcopy(self.architecture) | self._labels
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        passed = {
            k: v for k, v in self.init_kwargs.items() if k in {"revision", "token", "subfolder", "cache_dir"}
        }
        try:
            return AutoConfig.from_pretrained(
                self.name_or_path,
                trust_remote_code=self.trust_remote_code,
                **self._labels,
                **copy.deepcopy(passed),
            )
        except (OSError, ValueError) as error:
            raise _unreadable("model.name_or_path", str(self.name_or_path), "model", error) from error

    @property
    def _labels(self) -> dict[str, int]:
        return {"num_labels": 1} if self.task == "reward" else {}

    def _kwargs(self) -> dict[str, Any]:
        kwargs = copy.deepcopy(self.init_kwargs) | self._labels
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            kwargs["dtype"] = self.dtype or torch.float32
        if self.attn_implementation is not None:
            kwargs.setdefault("attn_implementation", self.attn_implementation)
        if self.quantization_config is not None:
            kwargs["quantization_config"] = copy.deepcopy(self.quantization_config)
        kwargs.setdefault("trust_remote_code", self.trust_remote_code)
        return kwargs

    def build(self, *, adapter: bool = True) -> Any:
        """A new model, with its adapter unless `adapter` is false. The global random state is left as it was."""
        model = held.take(self._key(), self._base)
        if adapter and self.peft_config is not None:
            with torch.random.fork_rng():
                torch.manual_seed(
                    self.seed
                )  # anew, so that the adapter does not depend on where the base came from
                model = adapters.wrap(model, self.peft_config)
        return model

    def hold(self) -> None:
        """Keep a base model for the next `build` in this process, or in one forked from it."""
        if self.quantization_config is None:  # quantised weights are made on the accelerator
            held.hold(self._key(), self._base)
            with contextlib.suppress(Exception):  # what saving looks up, which transformers then keeps
                from transformers.conversion_mapping import get_checkpoint_conversion_mapping

                get_checkpoint_conversion_mapping(self.config().model_type)

    def _key(self) -> str:
        seed = self.seed if self.architecture is not None else None
        return held.key_of("base", self.task, self.name_or_path, self.architecture, self._kwargs(), seed)

    def _base(self) -> Any:
        """A new model without its adapter."""
        attention.register()  # for the process that holds models for a sweep, which does nothing else
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.architecture is not None:
                kwargs = self._kwargs()
                return _CLASSES[self.task].from_config(
                    self.config(),
                    dtype=kwargs["dtype"],
                    attn_implementation=kwargs.get("attn_implementation"),
                )
            try:
                return _CLASSES[self.task].from_pretrained(self.name_or_path, **self._kwargs())
            except (OSError, ValueError) as error:
                raise _unreadable("model.name_or_path", str(self.name_or_path), "model", error) from error

    def outline(self) -> Any:
        """The model without memory (meta device): names, shapes and counts for the checks."""
        with torch.device("meta"):
            return _CLASSES[self.task].from_config(self.config(), trust_remote_code=self.trust_remote_code)


def recipe_from(
    settings: Any,
    peft_config: Any,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    attention: str | None,
    task: str = "causal_lm",
) -> ModelRecipe:
    """The recipe of a run's `RunSettings`; a random-weight model gets an embedding row for every token."""
    model = settings.model
    architecture = None
    if model.architecture is not None:
        architecture = {**model.architecture}
        architecture["vocab_size"] = max(vocab_size, architecture.get("vocab_size") or 0)
    return ModelRecipe(
        name_or_path=None if architecture else model.name_or_path,
        architecture=architecture,
        init_kwargs=model.init_kwargs,
        quantization_config=adapters.quantization(model.quantization, dtype, task),
        peft_config=peft_config,
        dtype=dtype,
        attn_implementation=attention,
        seed=settings.seed,
        trust_remote_code=model.trust_remote_code,
        task=task,
    )


def weights_dtype(dtype: str, *, frozen_base: bool, bf16: bool) -> torch.dtype:
    """fp32 master weights for full fine-tuning; a frozen base is kept in bf16 where the device has it."""
    if dtype == "auto":
        return torch.bfloat16 if frozen_base and bf16 else torch.float32
    return getattr(torch, dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and three ChatML tokens, made here so that nothing has to be downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chatml()
    return tokenizer


def load_tokenizer(
    name: str,
    *,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    revision: str | None = None,
) -> Any:
    """The tokenizer of a directory or hub id ('byte': the built-in one), with its chat template and pad token settled.

    Raises:
        UserError: no tokenizer there, a template or token that does not exist.
    """
    if name == "byte":
        tokenizer = byte_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code, revision=revision
            )
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable("model.tokenizer", name, "tokenizer", error) from error
    return settle_tokenizer(
        tokenizer, chat_template_path=chat_template_path, eos_token=eos_token, pad_token=pad_token
    )


def settle_tokenizer(
    tokenizer: Any,
    *,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> Any:
    """Apply the chosen template and tokens; fall back to ChatML and to EOS for padding. Changes and returns it."""
    violations = [
        Violation(
            f"algo.{key}",
            token,
            "this token is not in the tokenizer's vocabulary",
            "name a token that it has",
        )
        for key, token in (("eos_token", eos_token), ("pad_token", pad_token))
        if token is not None and token not in tokenizer.get_vocab()
    ]
    if violations:
        raise UserError(violations)
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise UserError(
            Violation(
                "algo.eos_token",
                None,
                "the tokenizer has no end-of-sequence token",
                "name one of its tokens: algo.eos_token=…",
            )
        )
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path)
    elif tokenizer.chat_template is None:
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.chat_template = chatml(end)
    return tokenizer


def _read_template(path: str) -> str:
    if path.endswith((".jinja", ".j2")):
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                Violation(
                    "chat_template_path",
                    path,
                    f"cannot be read ({error.strerror})",
                    "give an existing .jinja file",
                )
            ) from error
    try:
        template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise _unreadable("chat_template_path", path, "tokenizer", error) from error
    if template is None:
        raise UserError(
            Violation(
                "chat_template_path",
                path,
                "this tokenizer has no chat template",
                "name one that has, or a .jinja file",
            )
        )
    return template


def _unreadable(key: str, value: str, what: str, error: Exception) -> UserError:
    """One clear error for a directory without the files, or a hub that cannot be reached."""
    directory = Path(value)
    if directory.is_dir():
        found = sorted(p.name for p in directory.iterdir())[:8]
        why = f"the directory holds no {what} that transformers can read (found: {', '.join(found) or 'nothing'})"
        fix = f"give the folder that save_pretrained wrote; transformers said: {str(error).strip().splitlines()[0]}"
    else:
        why = f"is neither a local directory nor a {what} that the hub gave"
        fix = "check the spelling and the connection, or give a local directory"
    return UserError(Violation(key, value, why, fix))
