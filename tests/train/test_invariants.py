"""Settings that should not matter do not, and what should be the same is: trajectories, resumes, fresh models."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback

from hydratune import SFTConfig, SFTTrainer, UserError, attention, merge_adapter
from hydratune.compiling import compile_layers
from hydratune.data.builtin import arithmetic
from hydratune.meter import host_peak
from hydratune.models import ModelRecipe, byte_tokenizer

ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def rows(count: int = 64) -> Dataset:
    return Dataset.from_list([{"messages": row["messages"]} for row in arithmetic(count, seed=3)])


def config(folder, **options) -> SFTConfig:
    defaults = {
        "output_dir": str(folder), "max_steps": 10, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "seed": 5, "use_cpu": True, "disable_tqdm": True, "assistant_only_loss": True,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    return SFTConfig(**defaults | options)


def trainer(
    folder,
    *,
    data: Dataset | None = None,
    attn_implementation="sdpa",
    callbacks=None,
    compute_metrics=None,
    **options,
) -> SFTTrainer:
    attention.register()
    return SFTTrainer(
        args=config(folder, **options),
        train_dataset=rows() if data is None else data,
        processing_class=byte_tokenizer(),
        recipe=ModelRecipe(architecture=ARCHITECTURE, seed=1, attn_implementation=attn_implementation),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def trajectory(run: SFTTrainer, resume=None) -> dict[str, list[float]]:
    run.train(resume_from_checkpoint=resume)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    return {key: [float(e[key]) for e in logged] for key in ("loss", "grad_norm", "num_tokens")}


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("batch,accumulation", [(4, 2), (2, 4), (1, 8)])
def test_batch_times_accumulation_equals_one_batch(tmp_path, batch, accumulation):
    whole = trajectory(trainer(tmp_path / "a"))
    parts = trajectory(
        trainer(tmp_path / "b", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    )
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert parts["num_tokens"] == whole["num_tokens"]


@pytest.mark.parametrize("short", [0, 64])
def test_padding_free_equals_padding(tmp_path, monkeypatch, short):
    """Also where nobody asks for it: with the attention that keeps rows apart it is the default, but for short rows on a CPU."""
    padded = trajectory(trainer(tmp_path / "a", padding_free=False))
    monkeypatch.setattr("hydratune.algos.sft._SHORT", short)
    default = trainer(tmp_path / "c", attn_implementation=attention.NAME)
    shape = next(iter(default.get_train_dataloader()))["input_ids"].shape
    assert default.args.padding_free and len(shape) == 2 and shape[0] == (8 if short else 1)
    for free in (trajectory(trainer(tmp_path / "b", padding_free=True)), trajectory(default)):
        assert free["loss"] == pytest.approx(padded["loss"], abs=1e-5)
        assert free["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
        assert free["num_tokens"] == padded["num_tokens"]


@pytest.mark.parametrize(
    "attn,options",
    [
        ("sdpa", {}),
        (attention.NAME, {"neftune_noise_alpha": 5.0}),
        (attention.NAME, {"compute_metrics": dict}),
    ],
    ids=["a dense mask", "NEFTune", "metrics of logits"],
)
def test_rows_are_padded_where_that_is_quicker_or_each_row_counts(tmp_path, attn, options):
    run = trainer(tmp_path, attn_implementation=attn, **options)
    assert run.args.padding_free is False and len(next(iter(run.get_train_dataloader()))["input_ids"]) == 8


OF_ITS_OWN = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("kind", OF_ITS_OWN)
def test_a_model_with_attention_of_its_own_is_padded(tmp_path, kind):
    """It would let rows that are laid end to end see each other."""
    attention.register()
    architecture = {"model_type": kind, "vocab_size": 259} | OF_ITS_OWN[kind]
    recipe = ModelRecipe(architecture=architecture, seed=1)
    chosen = attention.choose("cpu", packed=True, model=recipe.outline())

    def made(name: str = chosen, **options) -> SFTTrainer:
        return SFTTrainer(
            args=config(tmp_path, max_steps=3, **options), train_dataset=rows(), processing_class=byte_tokenizer(),
            model=replace(recipe, attn_implementation=name).build(),
        )  # fmt: skip

    run = made()
    found = trajectory(run)
    assert run.args.padding_free is False and all(map(math.isfinite, found["loss"]))
    assert found["loss"] == trajectory(made(padding_free=False))["loss"]
    for option in ("packing", "padding_free"):
        with pytest.raises(UserError, match=f"algo.{option}.*see each other\n.*→ leave it out"):
            made(**{option: True})
    with pytest.raises(UserError, match=r"model.attn_implementation.*attention of its own"):
        made(attention.NAME)


def test_predictions_have_a_row_for_each_row(tmp_path):
    run = trainer(tmp_path, attn_implementation=attention.NAME, per_device_eval_batch_size=4)
    ready = run.train_dataset.select(range(6))
    found = run.predict(ready)
    longest = max(map(len, ready["input_ids"]))
    assert found.predictions.shape == (6, longest, 259) and found.label_ids.shape == (6, longest)
    assert run.evaluate(ready)["eval_loss"] == pytest.approx(found.metrics["test_loss"], rel=1e-5)
    run.model = run._ready_model()  # as a trial has it
    assert run.predict(ready).predictions.shape == found.predictions.shape
    assert run.data_collator.padding_free


def test_packing_equals_no_packing(tmp_path):
    """One block that holds all rows is one batch of all rows, whatever their order."""
    data = rows(12)
    one_block = trajectory(
        trainer(tmp_path / "a", data=data, packing=True, max_length=2048, per_device_train_batch_size=1)
    )
    one_batch = trajectory(trainer(tmp_path / "b", data=data, per_device_train_batch_size=12))
    assert one_block["loss"] == pytest.approx(one_batch["loss"], abs=1e-5)
    assert one_block["grad_norm"] == pytest.approx(one_batch["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_and_offloading_change_nothing(tmp_path):
    plain = trajectory(trainer(tmp_path / "a", max_steps=4))
    checkpointed = trajectory(trainer(tmp_path / "b", max_steps=4, gradient_checkpointing=True))
    offloaded = trajectory(trainer(tmp_path / "c", max_steps=4, activation_offloading=True))
    assert checkpointed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert offloaded["loss"] == plain["loss"]


@pytest.mark.parametrize("attn", ["sdpa", attention.NAME])
def test_compiled_layers_change_nothing(tmp_path, monkeypatch, attn):
    """Traced by the compiler and run without its code generator, which takes a minute on a CPU."""
    counted = []

    def traced(model):
        counted.append(compile_layers(model, backend="eager"))

    monkeypatch.setattr("hydratune.compiling.compile_layers", traced)
    plain = trajectory(trainer(tmp_path / "a", max_steps=4, attn_implementation=attn))
    compiled = trainer(tmp_path / "b", max_steps=4, attn_implementation=attn, compile_layers=True)
    names = [*compiled.model.state_dict()]
    found = trajectory(compiled)
    for key, values in plain.items():
        assert found[key] == pytest.approx(values, rel=1e-5)
    layers = compiled.model.model.layers
    assert counted == [len(layers)] and all(layer._compiled_call_impl is not None for layer in layers)
    assert names == [*trainer(tmp_path / "c").model.state_dict()]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, logging_steps):
    """Stopped at step 5 of 10, in the middle of a logging window of 4: losses and counters are those of one run."""
    options = {"logging_steps": logging_steps, "lr_scheduler_type": "cosine"}
    whole = trajectory(trainer(tmp_path / "a", **options))
    trajectory(trainer(tmp_path / "b", callbacks=[StopAt(5)], **options))
    resumed = trajectory(trainer(tmp_path / "b", **options), resume=True)
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert resumed["num_tokens"] == whole["num_tokens"]


def test_two_processes_with_one_seed_give_the_same_run(tmp_path):
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[2])\n"
        "from test_invariants import trainer, trajectory, fingerprint\n"
        "run = trainer(sys.argv[1], max_steps=4)\n"
        "print(json.dumps([trajectory(run)['loss'], fingerprint(run.model)]))\n"
    )
    here = str(__import__("pathlib").Path(__file__).parent)
    results = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / name), here],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines()[-1]
        )
        for name in "ab"
    ]
    assert results[0] == results[1]


def test_metrics_are_token_weighted_sums(tmp_path):
    """eval_loss over batches of 1 equals that over one batch of all rows, though the rows differ in length."""
    data = rows(9)
    losses = []
    for batch in (1, 4, 9):
        run = SFTTrainer(
            args=config(tmp_path / str(batch), per_device_eval_batch_size=batch),
            train_dataset=data,
            eval_dataset=data,
            processing_class=byte_tokenizer(),
            recipe=ModelRecipe(architecture=ARCHITECTURE, seed=1),
        )
        metrics = run.evaluate()
        losses.append((metrics["eval_loss"], metrics["eval_entropy"], metrics["eval_mean_token_accuracy"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_memory_is_logged_on_the_cpu_where_it_is_logged_at_all(tmp_path, monkeypatch):
    asked = []

    def peak() -> int:
        asked.append(host_peak())
        return asked[-1]

    monkeypatch.setattr("hydratune.meter.host_peak", peak)
    run = trainer(tmp_path, logging_steps=5)
    run.train()
    logged = [e["peak_memory_gib"] * 2**30 for e in run.state.log_history if "peak_memory_gib" in e]
    assert logged == asked[:2] and len(asked) <= 3  # of ten steps, and at the end
    assert 2**26 < asked[0] <= asked[1] <= host_peak()  # Torch alone takes more than 64 MiB


def test_compute_metrics_gets_logits(tmp_path):
    seen = {}

    def shapes(prediction):
        seen["logits"] = prediction.predictions.shape
        return {"rows": len(prediction.predictions)}

    run = SFTTrainer(
        args=config(tmp_path, per_device_eval_batch_size=4),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        processing_class=byte_tokenizer(),
        recipe=ModelRecipe(architecture=ARCHITECTURE, seed=1),
        compute_metrics=shapes,
    )
    metrics = run.evaluate()
    assert metrics["eval_rows"] == 4
    assert seen["logits"][-1] == ARCHITECTURE["vocab_size"]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    fields = {k: v for k, v in ARCHITECTURE.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(Qwen2Config(**fields)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_recipe_gives_the_same_pristine_model_and_keeps_its_kwargs(saved_model):
    kwargs = {"attn_implementation": "eager", "dtype": "float32"}
    before = copy.deepcopy(kwargs)
    recipe = ModelRecipe(
        name_or_path=saved_model, init_kwargs=kwargs, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM")
    )
    first = recipe.build()
    mark = fingerprint(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    torch.rand(3)  # other random numbers drawn in between must not matter
    assert fingerprint(recipe.build()) == mark
    assert kwargs == before


def test_hyperparameter_search_builds_a_fresh_model_for_every_trial(saved_model, tmp_path):
    starts = []

    class Remember(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            starts.append((fingerprint(model), args.learning_rate))

    run = SFTTrainer(
        model=saved_model,
        args=config(tmp_path, max_steps=3),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        callbacks=[Remember()],
    )
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        n_trials=3,
        direction="minimize",
        backend="optuna",
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert best.objective > 0
    assert len({mark for mark, _ in starts}) == 1
    assert len({lr for _, lr in starts}) == 3


def test_hyperparameter_search_of_an_instance_says_what_to_pass(saved_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    run = SFTTrainer(
        model=model, args=config(tmp_path), train_dataset=rows(8), processing_class=byte_tokenizer()
    )
    with pytest.raises(UserError, match="directory"):
        run.hyperparameter_search(n_trials=1)


def test_older_argument_names(saved_model, tmp_path):
    run = SFTTrainer(
        model=saved_model, config=config(tmp_path), train_dataset=rows(8), tokenizer=byte_tokenizer()
    )
    assert run.args.seed == 5
    with pytest.raises(UserError, match="twice"):
        SFTTrainer(
            model=saved_model, args=config(tmp_path), train_dataset=rows(8), tokenizer=byte_tokenizer(),
            processing_class=byte_tokenizer(),
        )  # fmt: skip
    made = []

    def model_init():
        made.append(1)
        return AutoModelForCausalLM.from_pretrained(saved_model)

    SFTTrainer(
        model_init=model_init, args=config(tmp_path), train_dataset=rows(8), processing_class=byte_tokenizer()
    )
    assert made == [1]


def test_an_adapter_is_saved_reloaded_and_merged(saved_model, tmp_path):
    run = SFTTrainer(
        model=saved_model,
        args=config(tmp_path / "run", max_steps=6),
        train_dataset=rows(32),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    run.model.eval()
    with torch.no_grad():
        wanted = run.model(input_ids=ids).logits
        reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = AutoModelForCausalLM.from_pretrained(saved_model).eval()
        assert torch.allclose(reloaded(input_ids=ids).logits, wanted, atol=1e-5)
        assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
        assert not torch.allclose(base(input_ids=ids).logits, wanted, atol=1e-4)
    with pytest.raises(UserError, match="already there"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_nan_ends_the_run_with_advice(tmp_path):
    from hydratune.errors import TrainingFailed

    run = trainer(tmp_path, learning_rate=1e8, max_grad_norm=0.0, max_steps=60, optim="sgd")
    with pytest.raises(TrainingFailed, match="lower lr"):
        run.train()


def test_several_gpus_of_one_process_are_not_torchs_dataparallel(tmp_path, caplog):
    args = config(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    run = SFTTrainer(
        args=args, train_dataset=rows(8), processing_class=byte_tokenizer(), recipe=ModelRecipe(architecture=ARCHITECTURE)
    )  # fmt: skip
    assert run.args.n_gpu == 1 and args.n_gpu == 2 and "accelerate launch" in caplog.text


def test_labels_that_a_collator_around_ours_changes_are_counted_again(tmp_path):
    class Masking:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, features):
            batch = self.inner(features)
            batch["labels"] = torch.where(batch["labels"] % 2 == 0, -100, batch["labels"])
            return batch

    run = trainer(tmp_path, max_steps=2)
    run.data_collator = Masking(run.data_collator)
    batch = next(iter(run.get_train_dataloader()))
    assert (batch["labels"] != -100).sum() < batch["labelled"]
    outputs = run.model(**{k: v for k, v in batch.items() if k != "labelled"})
    found = run.compute_loss(run.model, batch)
    assert found.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
