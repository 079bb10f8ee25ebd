"""Between two logs a training step asks the device for no value: on a GPU each such question waits for all that is queued."""

from __future__ import annotations

import traceback

import pytest
import torch
from datasets import Dataset
from test_invariants import ARCHITECTURE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import hydratune
from hydratune import attention
from hydratune.data.builtin import arithmetic
from hydratune.models import ModelRecipe, byte_tokenizer

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave"}
ON_THE_HOST = ("collate.py", "collate_preference.py")  # batches are made of tensors in host memory


class Watch(TorchDispatchMode):
    """Where values were asked for, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.places = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if (
            self.on and name in ASKING and func._overloadname != "self_int"
        ):  # repeating a fixed number of times
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            files = [frame.filename.rsplit("/", 1)[-1] for frame in frames]
            if not set(ON_THE_HOST) & set(files) and files[-1] != "data_loader.py":
                self.places.append((name, *(f"{f.filename}:{f.lineno}" for f in frames[-3:])))
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """Watches from the end of the first step, which tries the head out, to the end of the last but one."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.on = state.global_step < state.max_steps - 1


@pytest.mark.parametrize("algo", ["SFT", "DPO", "KTO", "Reward"])
def test_no_step_waits_for_the_device(algo, tmp_path):
    attention.register()
    goal = {"SFT": "tokens", "KTO": "unpaired"}.get(algo, "preference")
    rows = [{k: v for k, v in r.items() if k != "answer"} for r in arithmetic(64, 0, goal)]
    trainer_class = getattr(hydratune, f"{algo}Trainer")
    watch = Watch()
    run = trainer_class(
        args=getattr(hydratune, f"{algo}Config")(
            output_dir=str(tmp_path), max_steps=6, logging_steps=100, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=4, padding_free=True,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(), callbacks=[Steps(watch)],
        recipe=ModelRecipe(
            architecture=ARCHITECTURE, seed=1, attn_implementation=attention.NAME, task=trainer_class.task
        ),
    )  # fmt: skip
    with watch:
        run.train()
    assert not watch.places


def test_the_watch_sees_what_waits():
    watch = Watch()
    with watch:
        torch.ones(3).sum().item()
        watch.on = True
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert [name for name, *_ in watch.places] == ["_local_scalar_dense", "nonzero"]
