"""A trained model back from its run directory, with the model that it started from where that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydratune.errors import UserError, Violation
from hydratune.reward_sources import model_home
from hydratune.runs import HOME, Run, find_run

BASE = "base"  # names the model that a run started from


@dataclass(frozen=True)
class Place:
    """Where a trained model lies.

    Attributes:
        name: what the user called it.
        folder: its weights, or its adapter's.
        run: the run that it is of; None for a model without one.
    """

    name: str
    folder: Path
    run: Run | None

    @property
    def adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()


def find_model(name: str, home: Path = HOME, *, key: str = "RUN") -> Place:
    """The model of a run, or of a directory with a model or adapter in it, such as a checkpoint.

    Raises:
        UserError: there is no such run or directory, or it holds no model.
    """
    given = Path(name).expanduser()
    if given.is_dir() and (folder := model_home(given)) is not None:
        above = (folder, *folder.absolute().parents[:3])
        run = next((Run(p, p.name) for p in above if (p / "config.yaml").is_file()), None)
        return Place(name, folder, run)
    run = find_run(name, home)
    folder = model_home(run.path / "model")
    if folder is None:
        checkpoints = sorted((run.path / "checkpoints").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        fix = f"give a checkpoint: {checkpoints[-1]}" if checkpoints else "choose a run that has completed"
        raise UserError(Violation(key, run.name, f"it is {run.status}, and holds no model", fix))
    return Place(run.name, folder, run)


class Trained:
    """A model with its tokenizer, in evaluation mode on its device.

    Args:
        place: of `find_model`.
        model, tokenizer: loaded ones; the adapter of a `PeftModel` is what was trained.

    Attributes:
        scores: whether it is a reward model.
        base_name: what the base is called; None when there is none to be had.
        no_base: why there is none.
    """

    def __init__(self, place: Place, model: Any, tokenizer: Any) -> None:
        self.place, self.model, self.tokenizer = place, model.eval(), tokenizer
        self.scores = "SequenceClassification" in type(self._inner).__name__
        self.base_name, self.no_base = _base_of(place)
        self._base: Any = None

    @property
    def _inner(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The model that it started from: with its adapter off, or loaded at the first time.

        Raises:
            UserError: it is not known, or not to be had.
        """
        if self.base_name is None:
            raise UserError(Violation("base", self.place.name, str(self.no_base), "name another model"))
        if self.place.adapter:
            with self.model.disable_adapter():
                yield self._inner
            return
        if self._base is None:
            dtype = next(self.model.parameters()).dtype
            base = load_whole(self.base_name, dtype, trust_remote_code=_trusts(self.place))
            self._base = base.to(self.model.device).eval()
        yield self._base

    def tuned(self) -> Any:
        """The same for the trained model itself."""
        return nullcontext(self.model)


def _base_of(place: Place) -> tuple[str | None, str | None]:
    """Name of the model that one started from; else why there is none."""
    if place.adapter:
        from hydratune.adapters import base_of_adapter

        base = base_of_adapter(place.folder) or "its base"
        made = place.run is not None and Path(base).name == "base" and Path(base).is_dir()
        return ("random weights" if made else base), None
    if place.run is None or not place.run.config:
        return None, "no config.yaml tells what it started from"
    named = place.run.config.get("model.name_or_path")
    return (str(named), None) if named else (None, "it was trained from random weights")


def load(place: Place, *, device: str | None = None) -> Trained:
    """The model as it was trained: its adapter on its base, quantised as it was; in the dtype that was saved.

    Args:
        device: None: the first GPU, else the CPU.

    Raises:
        UserError: it, its base or its tokenizer is not to be had.
    """
    import torch

    from hydratune import adapters, attention
    from hydratune.models import load_tokenizer
    from hydratune.tracking import quiet_libraries

    quiet_libraries()
    attention.register()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = place.run.config if place.run else {}
    trust = _trusts(place)
    if place.adapter:
        kind: Any = config.get("model.quantization")
        how: dict[str, Any] = {}
        if kind is not None and device == "cuda":
            how["quantization_config"] = adapters.quantization(kind, torch.bfloat16)
        model = adapters.load_adapter(place.folder, trust_remote_code=trust, **how)
    else:
        model = load_whole(str(place.folder), trust_remote_code=trust)
    tokenizer = load_tokenizer(str(place.folder), trust_remote_code=trust)
    return Trained(place, model if getattr(model, "is_quantized", False) else model.to(device), tokenizer)


def _trusts(place: Place) -> bool:
    return bool(place.run and place.run.config.get("model.trust_remote_code"))


def load_whole(name: str, dtype: Any = None, *, trust_remote_code: bool = False) -> Any:
    """A model with the head that its config names: one score, or next tokens.

    Args:
        dtype: None: as saved.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    trust = trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        scores = any("SequenceClassification" in kind for kind in config.architectures or ())
        auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        return auto.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=trust)
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "give the folder that save_pretrained wrote, or check the connection"
        raise UserError(Violation("model", name, f"cannot be loaded ({said})", fix)) from error


def find_writer(name: str, home: Path = HOME, *, key: str = "RUN") -> Place:
    """A model that writes, as far as its run tells; torch is not needed for that.

    Raises:
        UserError: as `find_model`; or it is a reward model.
    """
    place = find_model(name, home, key=key)
    if place.run is not None and place.run.value("algo") == "reward":
        raise _speechless(place, key)
    return place


def load_writer(place: Place, *, key: str = "RUN") -> Trained:
    """A model that writes.

    Raises:
        UserError: as `load`; or it is a reward model.
    """
    trained = load(place)
    if trained.scores:
        raise _speechless(place, key)
    return trained


def _speechless(place: Place, key: str) -> UserError:
    why = "is a reward model: it scores answers and writes none"
    return UserError(Violation(key, place.name, why, "give a run of another algorithm"))
