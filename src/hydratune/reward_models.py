"""Reward models as judges of completions: loaded with the head that was trained, and run in batches of bounded size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hydratune import attention
from hydratune.completions import Completions, asked
from hydratune.data.collate_preference import Layout
from hydratune.data.render import RowFault, encode_conversations
from hydratune.errors import TrainingFailed, UserError, Violation
from hydratune.packing import settle_padding
from hydratune.reference import frozen
from hydratune.reward_sources import ACCEPTED, config_faults, model_home, no_head
from hydratune.score import ScoreHead, score_head

_NOT_OF_THE_MODEL = {"positions", "targets", "sequences", "ordinals", "lengths", "ends"}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_SPARE = (
    0.01  # share of embedding rows that models have beyond their tokenizer's tokens, rounded up for speed
)


class RewardModel:
    """A sequence-classification model with one label that scores prompts with completions.

    With the policy's vocabulary and special tokens it reads the policy's token ids as they are; in conversations
    followed by what the chat template writes after the end of a turn (a line break, in ChatML), where the policy came to
    one, because that is the token at which reward models learn their score. Otherwise it reads text in its own tokens:
    conversations through its own chat template, which ends the answer's turn whether or not the policy did; and plain
    text, decoded, with its own EOS after a completion that ended with the policy's. The score is that of the last
    token. Models without a `score` head (encoders) give their own logit.

    Args:
        source: instance (used as it is: moved to the device, frozen, without dropout), directory (of an adapter or a
            run too), or hub id.
        tokenizer: the model's: instance, directory or hub id; None: what lies beside the model.
        policy_tokenizer, device, dtype, token_budget, padding_free, key: as for `Rewards`.

    Raises:
        UserError: it is no such model, its head was not trained, or its tokenizer does not fit it.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any = None,
        *,
        policy_tokenizer: Any,
        device: Any,
        dtype: Any = None,
        token_budget: int = 16384,
        trust_remote_code: bool = False,
        padding_free: bool | None = None,
        key: str = "algo.reward_funcs",
    ) -> None:
        self._key, self._trust, self._budget = key, trust_remote_code, token_budget
        attention.register()
        packed = padding_free is not False
        model = self._load(source, device, dtype, packed) if isinstance(source, str) else source
        if not getattr(model, "is_quantized", False):  # quantised weights are where they were made
            model = model.to(device)
        self.model = frozen(model)
        self._device, self._policy = device, policy_tokenizer
        self._called = source if isinstance(source, str) else type(source).__name__
        home = source if isinstance(source, str) else getattr(model.config, "_name_or_path", "")
        own = self._tokenizer(tokenizer, home)
        self._fit(own)
        self._turn_end = turn_end(own if own is not None and own.chat_template else policy_tokenizer)
        self._own: Any = None if own is None or same_tokens(own, policy_tokenizer) else own
        settled = SimpleNamespace(padding_free=padding_free)
        settle_padding(settled, model)
        self._head = score_head(model) is not None
        reader = self._own or policy_tokenizer
        pad = next((i for i in (reader.pad_token_id, reader.eos_token_id) if i is not None), 0)
        self._layout = Layout(pad, bool(settled.padding_free) and self._head)
        text = model.config.get_text_config()
        if text.pad_token_id is None:  # without one transformers refuses batches
            text.pad_token_id = pad
        self._longest = getattr(text, "max_position_embeddings", None)

    @property
    def shares_tokens(self) -> bool:
        """Whether it reads the policy's tokens as they are."""
        return self._own is None

    # -- loading -------------------------------------------------------------------------------------------------

    def _load(self, source: str, device: Any, dtype: Any, packed: bool) -> Any:
        home = model_home(Path(source).expanduser())
        name = str(home or source)
        if home is not None and (home / "adapter_config.json").is_file():
            return self._load_adapter(source, home, device, dtype, packed)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=self._trust)
        except (OSError, ValueError) as error:
            raise self._unreadable(source, error) from error
        auto_map = getattr(config, "auto_map", None)
        if wrong := config_faults(source, config.architectures, config.num_labels, auto_map, self._key):
            raise UserError(wrong)
        model, missing = self._weights(source, name, config, device, dtype, packed)
        if missing:
            raise UserError(no_head(self._key, source, f"its weights lack {', '.join(missing[:3])}"))
        return model

    def _load_adapter(self, source: str, home: Path, device: Any, dtype: Any, packed: bool) -> Any:
        from peft import PeftConfig, PeftModel
        from peft.utils import load_peft_weights

        try:
            adapter = PeftConfig.from_pretrained(str(home))
            saved = load_peft_weights(str(home), device="cpu")
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(source, error) from error
        if adapter.task_type != "SEQ_CLS":
            raise UserError(no_head(self._key, source, f"its adapter is of the kind {adapter.task_type}"))
        base = _base_of(home)
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=self._trust, num_labels=1)
        except (OSError, ValueError) as error:
            raise self._unreadable(source, error, f"its base {base} cannot be read") from error
        model, missing = self._weights(source, base, config, device, dtype, packed)
        heads = {name.split(".")[0] for name in missing}
        if lacking := [h for h in heads if not any(f".{h}." in f".{name}" for name in saved)]:
            raise UserError(no_head(self._key, source, f"its adapter holds no {', '.join(lacking)}"))
        return PeftModel.from_pretrained(model, str(home))

    def _weights(
        self, source: str, name: str, config: Any, device: Any, dtype: Any, packed: bool
    ) -> tuple[Any, list[str]]:
        """The model, and the names of parameters that its weights lack."""
        kind = torch.device(device).type
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=dtype or "auto",
                attn_implementation=attention.choose(kind, packed=packed, model=config),
                trust_remote_code=self._trust,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(source, error) from error
        return model, sorted(found["missing_keys"])

    def _unreadable(self, source: str, error: Exception, why: str = "cannot be loaded") -> UserError:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(Violation(self._key, source, f"{why} ({said})", ACCEPTED))

    # -- tokens --------------------------------------------------------------------------------------------------

    def _tokenizer(self, given: Any, home: str) -> Any:
        """The model's own tokenizer; None when none is to be had."""
        name = given
        if given is None:
            path = Path(home).expanduser() if home else None
            if path is not None and path.is_dir():
                path = model_home(path) or path
                # asked without files, transformers makes one of no tokens
                if not any((path / file).is_file() for file in _TOKENIZER_FILES):
                    return None
            name = str(path) if path is not None and path.is_dir() else home
        if not isinstance(name, str):
            return name
        if not name:
            return None
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self._trust)
        except (OSError, ValueError, KeyError) as error:
            if given is None:
                return None
            raise self._unreadable(name, error, "is no tokenizer that can be loaded") from error

    def _fit(self, own: Any) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        if own is not None and len(own) > rows:
            why = f"embeds {rows} tokens, its tokenizer has {len(own)}"
            raise UserError(
                Violation(self._key, self._called, why, "pass the tokenizer that it was trained with")
            )
        tokens = len(self._policy)
        if own is None and not tokens <= rows <= tokens * (1 + _SPARE) + 8:
            why = f"brings no tokenizer, and embeds {rows} tokens, where the policy's has {tokens}: another vocabulary"
            fix = "save its tokenizer beside it, or pass it (tokenizers=[…], one a reward)"
            raise UserError(Violation(self._key, self._called, why, fix))

    def _tokens(self, batch: Completions, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the model reads of each row, in two parts, end to end."""
        if self._own is None:
            return [
                (np.asarray(p, dtype=np.int64), self._closed(np.asarray(c, dtype=np.int64), asked(row)))
                for row, p, c in zip(batch.rows, batch.prompt_ids, batch.completion_ids, strict=True)
            ]
        ids: dict[int, np.ndarray] = {}
        chats = [i for i, prompt in enumerate(batch.prompts) if not isinstance(prompt, str)]
        texts = [i for i, prompt in enumerate(batch.prompts) if isinstance(prompt, str)]
        if chats:
            ids |= zip(chats, self._rendered(batch, chats, name), strict=True)
        if texts:
            eos = self._own.eos_token or ""
            whole = [batch.whole_texts[i] + eos * batch.finished[i] for i in texts]
            ids |= zip(texts, map(np.asarray, self._own(whole, verbose=False)["input_ids"]), strict=True)
        nothing = np.empty(0, dtype=np.int64)
        return [(nothing, ids[i].astype(np.int64)) for i in range(len(batch))]

    def _closed(self, completion: np.ndarray, prompt: Any) -> np.ndarray:
        end = self._turn_end
        if isinstance(prompt, list) and len(end) > 1 and len(completion) and completion[-1] == end[0]:
            return np.concatenate((completion, end[1:]))
        return completion

    def _rendered(self, batch: Completions, which: list[int], name: str) -> list[np.ndarray]:
        if not self._own.chat_template:
            why = "its tokenizer has no chat template, and the rows are conversations"
            fix = "pass a tokenizer that has one (tokenizers=[…], one a reward)"
            raise UserError(Violation(self._key, self._called, why, fix))
        faults: list[RowFault] = []
        made = [
            ids for ids, _, _ in encode_conversations(batch.conversations(which), self._own, False, faults)
        ]
        if faults:
            first = faults[0]
            raise TrainingFailed(
                f"the reward model {name} cannot read {batch.name(which[first.row])}: {first.why}; pass a tokenizer whose "
                "template takes these conversations"
            )
        return made

    # -- scores --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, batch: Completions, name: str) -> torch.Tensor:
        """Scores [B], fp32, on the device.

        Args:
            name: of this reward, for messages.

        Raises:
            TrainingFailed: a row has no token or too many for the model, or its score is not finite.
        """
        pairs = self._tokens(batch, name)
        lengths = [len(p) + len(c) for p, c in pairs]
        for i, length in enumerate(lengths):
            if not length:
                raise TrainingFailed(
                    f"the reward model {name} is given no token of {batch.name(i)}: remove this row"
                )
            if self._longest and length > self._longest:
                raise TrainingFailed(
                    f"the reward model {name} has {self._longest} positions, and {batch.name(i)} with its completion is of "
                    f"{length} tokens: allow shorter completions, leave out long prompts, or use another reward model"
                )
        scores = torch.empty(len(pairs), dtype=torch.float32, device=self._device)
        for group in micro_batches(lengths, self._budget, padded=not self._layout.padding_free):
            layout = self._layout([pairs[i][0] for i in group], [[pairs[i][1] for i in group]])
            scores[torch.tensor(group, device=self._device)] = self._forward(layout)
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise TrainingFailed(
                f"the reward model {name} gave {scores[bad[0]].item()} for {batch.name(bad[0])}: its weights are broken, or "
                "too large for its dtype; try dtype=float32"
            )
        return scores

    def _forward(self, layout: dict[str, Any]) -> torch.Tensor:
        layout = {k: v.to(self._device) if isinstance(v, torch.Tensor) else v for k, v in layout.items()}
        inputs = {k: v for k, v in layout.items() if k not in _NOT_OF_THE_MODEL}
        if not self._head:
            return self.model(**inputs).logits[:, 0].float()
        with ScoreHead(self.model, layout) as head:
            self.model(**inputs, use_cache=False)
        return head.scores.float()


def reward_outline(source: str, trust_remote_code: bool = False) -> tuple[Any, int]:
    """A model with a score head without memory (meta device), and the bytes of a saved weight.

    Args:
        source: directory (of an adapter or a run too), or hub id.

    Raises:
        UserError: its config cannot be read, or is not that of such a model.
    """
    home = model_home(Path(source).expanduser())
    name = str(home or source)
    try:
        if home is not None and (home / "adapter_config.json").is_file():
            name = _base_of(home)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, num_labels=1)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(Violation("algo", source, f"cannot be read ({said})", ACCEPTED)) from error
    return model, (config.dtype or torch.float32).itemsize


def _base_of(home: Path) -> str:
    """Where the base of an adapter lies."""
    from peft import PeftConfig

    base, beside = PeftConfig.from_pretrained(str(home)).base_model_name_or_path or "", home.parent / "base"
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base  # the run directory was moved


def turn_end(tokenizer: Any) -> np.ndarray:
    """The ids that a chat template writes after an answer, which begin with the end of its turn; none where unknown."""
    answer = "Blue."
    probe = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except (
        jinja2.TemplateError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
    ):  # no template, or one for other turns
        return np.empty(0, dtype=np.int64)
    tail = text.rpartition(answer)[2]
    return np.asarray(tokenizer(tail, add_special_tokens=False)["input_ids"], dtype=np.int64)


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary, and begin and end texts with the same tokens."""
    ends = [(t.bos_token_id, t.eos_token_id) for t in (one, other)]
    return one is other or (ends[0] == ends[1] and one.get_vocab() == other.get_vocab())


def micro_batches(lengths: list[int], budget: int, *, padded: bool) -> list[list[int]]:
    """Indices of sequences in groups, longest first, none of more tokens than the budget unless it is of one sequence.

    Args:
        padded: a group counts as its longest sequence times its size; else as the sum of its lengths.
    """
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = lengths[groups[-1][0]] if padded and groups else lengths[i]
        if not groups or used + cost > budget:
            groups.append([])
            used, cost = 0, lengths[i]
        groups[-1].append(i)
        used += cost
    return groups
