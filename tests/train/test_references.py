"""References: which one is meant, that it stays what it is, and that it never sees noise."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_preference_invariants import CLASSES, LORA, fixed_pairs, recipe, rows, same, trainer, trajectory
from transformers.integrations.neftune import activate_neftune

from hydratune import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, UserError
from hydratune.algos.kto import with_fixed_pairs
from hydratune.models import ModelRecipe, byte_tokenizer
from hydratune.reference import Reference, without_dropout

NOISY = {
    "model_type": "opt", "vocab_size": 259, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "dropout": 0.3, "layerdrop": 0.2, "word_embed_proj_dim": 32,
}  # fmt: skip


def dpo(folder, **given) -> DPOTrainer:
    options = given.pop("options", {})
    return DPOTrainer(
        args=DPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, max_steps=2, logging_steps=1, **options),
        train_dataset=rows("dpo", 16), processing_class=byte_tokenizer(), **given,
    )  # fmt: skip


def test_kinds():
    plain, adapted = recipe().build(), get_peft_model(recipe().build(), copy.deepcopy(LORA))
    assert Reference(plain).kind == "frozen copy"
    assert Reference(plain, lasting=False).kind == "policy itself"
    assert Reference(plain, recipe().build()).kind == "given"
    assert Reference(adapted).kind == "adapter off"
    assert Reference(adapted, ours=False).kind == "first adapter"
    assert adapted.active_adapter == "default"


@pytest.mark.parametrize("how", ["pissa", "olora", False, "gaussian"])
def test_no_init_of_an_adapter_moves_policy_or_reference(how, tmp_path):
    """PiSSA and OLoRA change the base: without the adapter it is another model; making a reference does not change it."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=how)
    model, ids = get_peft_model(recipe().build(), copy.deepcopy(config)), torch.arange(8)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        reference = Reference(model)
        assert reference.kind == ("adapter off" if how == "gaussian" else "first adapter")
        assert torch.equal(model(input_ids=ids).logits, before)
        with reference.of(model) as held:
            torch.testing.assert_close(held(input_ids=ids).logits, before)
    assert Reference(model, lasting=False).kind == ("adapter off" if how == "gaussian" else "policy itself")
    run = dpo(tmp_path, recipe=recipe(peft_config=config))
    assert trajectory(run)["loss"][0] == pytest.approx(0.6931, abs=1e-4)


def test_the_adapter_of_an_embedding_is_kept_too():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    model, ids = get_peft_model(recipe().build(), config), torch.arange(8)[None]
    with torch.no_grad(), Reference(model).of(model) as held:
        kept = held(input_ids=ids).logits
    torch.testing.assert_close(kept, model(input_ids=ids).logits)


def test_an_adapter_is_off_only_inside():
    model = get_peft_model(recipe().build(), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        with Reference(model).of(model) as reference:
            base = reference(input_ids=ids).logits
            assert not base.requires_grad
        assert not torch.allclose(own, base) and torch.equal(own, model(input_ids=ids).logits)


def test_the_key_of_a_reference_changes_with_any_weight():
    model = recipe().build()
    reference = Reference(model, lasting=False)
    key = reference.fingerprint(model)
    assert key == reference.fingerprint(model)
    last = list(model.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    assert key != reference.fingerprint(model)


def test_a_reference_follows_by_its_share():
    policy = recipe().build()
    reference = Reference(policy)
    before = [p.clone() for p in reference.model.parameters()]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    reference.follow(policy, 0.25)
    for old, new in zip(before, reference.model.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt2", "qwen2", "falcon"])
def test_no_dropout_is_left(family):
    """Two passes in training mode are the same, whatever a family calls its dropout."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    noise = {
        "opt": {
            "dropout": 0.5,
            "attention_dropout": 0.5,
            "layerdrop": 0.5,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
        "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
        "qwen2": {"attention_dropout": 0.5, "num_key_value_heads": 2, "intermediate_size": 64},
    }[family]
    model = ModelRecipe(architecture={"model_type": family, **sizes, **noise}, seed=0).build().train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    without_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def brought() -> PeftModel:
    """With an adapter that changes something, and has a dropout of its own."""
    torch.manual_seed(3)
    model = get_peft_model(recipe().build(), copy.deepcopy(LORA_DROPOUT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


LORA_DROPOUT = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
NOISE = {
    "a frozen copy": {"disable_dropout": False},
    "adapter off": {"disable_dropout": False, "peft_config": LORA_DROPOUT},
    "adapter off, NEFTune": {"neftune_noise_alpha": 50.0, "peft_config": LORA_DROPOUT},
    "first adapter": {"model": brought},
}


@pytest.mark.parametrize("algo", ["dpo", "kto"])
@pytest.mark.parametrize("case", NOISE)
def test_the_reference_is_without_noise(algo, case, tmp_path):
    """Its log-probs in the midst of training are those of evaluation; so are those that KTO's KL is estimated from."""
    data = fixed_pairs(16) if algo == "kto" else rows(algo, 16)
    trainer_class, config_class = CLASSES[algo]
    given = dict(NOISE[case])
    source = {"model": given.pop("model")()} if "model" in given else {}
    if not source:
        adapter = copy.deepcopy(given.pop("peft_config", None))
        source = {
            "model_init": lambda: ModelRecipe(architecture=NOISY, seed=1).build(),
            "peft_config": adapter,
        }
    run = trainer_class(
        args=config_class(output_dir=str(tmp_path), report_to=[], use_cpu=True, **given),
        train_dataset=data, processing_class=byte_tokenizer(), **source,
    )  # fmt: skip
    if given.get("neftune_noise_alpha"):
        activate_neftune(run.model, 50.0, run.accelerator)
    batch = next(iter(run.get_train_dataloader()))
    layout = batch["pairs" if algo == "dpo" else "completions"]
    run.model.eval()
    still = run.judge_by_reference(layout)
    run.model.train()
    assert torch.equal(run.judge_by_reference(layout), still) and run.model.training
    if algo == "kto":
        first, second = dict(batch), dict(batch)
        run._estimate_kl([first])
        run._estimate_kl([second])
        assert torch.equal(first["kl"], second["kl"])
    if case in ("a frozen copy", "adapter off"):  # the policy has its dropout
        one, other = (run.judge(run.model, layout).logps for _ in range(2))
        assert not torch.allclose(one, other)


def test_a_given_reference_takes_the_attention_of_the_policy(tmp_path):
    """Batches are laid out for the policy's attention; under another one sequences would see each other."""
    other = recipe("eager").build()
    run = dpo(tmp_path / "a", model=recipe().build(), ref_model=other)
    padded = dpo(tmp_path / "b", model=recipe("sdpa").build(), ref_model=recipe("eager").build())
    assert run.args.padding_free and not padded.args.padding_free
    for (_, a), (_, b) in zip(trajectory(run).items(), trajectory(padded).items(), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_a_moving_reference_starts_anew_with_every_trial(tmp_path):
    """`hyperparameter_search` builds a fresh policy; with lr 0 the first loss is log 2 only if the reference is fresh too."""
    for given in (None, recipe().build()):
        run = DPOTrainer(
            args=DPOConfig(
                output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=3, logging_steps=1, sync_ref_model=True,
                ref_model_sync_steps=1, save_strategy="no",
            ),
            train_dataset=rows("dpo", 16), eval_dataset=rows("dpo", 8), processing_class=byte_tokenizer(),
            recipe=recipe(), ref_model=given,
        )  # fmt: skip
        rates, first = iter([5e-2, 0.0, 5e-2, 0.0]), []

        def judged(metrics, run=run, first=first) -> float:
            first.append(next(e["loss"] for e in run.state.log_history if "loss" in e))
            return 0.0

        run.hyperparameter_search(
            hp_space=lambda trial, rates=rates: {"learning_rate": next(rates)},
            compute_objective=judged,
            n_trials=4,
            backend="optuna",
        )
        assert first == pytest.approx([0.6931] * 4, abs=1e-4)


def test_a_function_that_makes_adapted_models_is_held_against_their_adapters(tmp_path):
    run = dpo(tmp_path, model_init=brought)
    assert run.reference.kind == "first adapter"
    assert trajectory(run)["loss"][0] == pytest.approx(0.6931, abs=1e-4)


def test_an_adapter_is_put_on_what_a_function_makes(tmp_path):
    run = dpo(tmp_path, model_init=lambda: recipe().build(), peft_config=copy.deepcopy(LORA))
    assert isinstance(run.model, PeftModel) and run.reference.kind == "adapter off"
    one, other = run.fresh_model().state_dict(), run.fresh_model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_precomputing_pairs_rows_that_were_prepared_elsewhere(tmp_path):
    """Prepared rows without mismatched completions get them once, for the cached log-probs and for training alike."""
    prepared, _ = KTOTrainer.prepare_rows(
        rows("kto"), byte_tokenizer(), KTOConfig(output_dir="x", report_to=[], use_cpu=True), where="rows", cache=False
    )  # fmt: skip
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    kept = trainer("kto", tmp_path / "a", data=prepared, precompute_ref_log_probs=True, **options)
    live = trainer("kto", tmp_path / "b", data=with_fixed_pairs(prepared, seed=5), **options)
    same(trajectory(live), trajectory(kept))


def test_completions_of_an_evaluation_are_kept_without_a_tracker(tmp_path):
    run = KTOTrainer(
        args=KTOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, generate_during_eval=True),
        train_dataset=rows("kto", 16), eval_dataset=rows("kto", 8), processing_class=byte_tokenizer(), recipe=recipe(),
    )  # fmt: skip
    run.evaluate()
    kept = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(kept) == 4 and all({"step", "prompt", "policy", "reference"} == {*row} for row in kept)


def test_a_mixture_of_experts_is_evaluated(tmp_path):
    experts = {
        "model_type": "qwen2_moe", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "router_aux_loss_coef": 0.1,
    }  # fmt: skip
    run = DPOTrainer(
        args=DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=2, logging_steps=1),
        train_dataset=rows("dpo", 16), eval_dataset=rows("dpo", 8), processing_class=byte_tokenizer(),
        recipe=ModelRecipe(architecture=experts, seed=0),
    )  # fmt: skip
    assert min(trajectory(run)["aux_loss"]) > 0
    assert run.evaluate()["eval_loss"] == pytest.approx(0.69, abs=0.05)


def test_arguments_are_not_settled_in_the_callers_object(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    run = DPOTrainer(
        args=args, train_dataset=rows("dpo", 8), processing_class=byte_tokenizer(), recipe=recipe()
    )
    assert run.args.padding_free is True and args.padding_free is None


@pytest.mark.parametrize(
    "given,told",
    [
        ({"ref_model_init_kwargs": {"dtype": "float32"}}, "the policy is no id"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "fixes the reference before training"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given, told, tmp_path):
    with pytest.raises(UserError, match=told):
        dpo(tmp_path, model=recipe().build(), options=given)


def test_a_search_whose_models_differ_cannot_use_precomputed_log_probs(tmp_path):
    seeds = iter(range(9))

    def make():
        return ModelRecipe(architecture=NOISY, seed=next(seeds)).build()

    run = DPOTrainer(
        args=DPOConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, precompute_ref_log_probs=True
        ),
        model_init=make, train_dataset=rows("dpo", 8), eval_dataset=rows("dpo", 8), processing_class=byte_tokenizer(),
    )  # fmt: skip
    with pytest.raises(UserError, match="not the one whose log-probs"):
        run.hyperparameter_search(hp_space=lambda trial: {}, n_trials=1, backend="optuna")


def test_trials_are_held_to_the_rules(tmp_path):
    run = KTOTrainer(
        args=KTOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1),
        train_dataset=rows("kto", 16), eval_dataset=rows("kto", 8), processing_class=byte_tokenizer(), recipe=recipe(),
    )  # fmt: skip
    with pytest.raises(UserError, match="batch of one"):
        run.hyperparameter_search(
            hp_space=lambda trial: {"per_device_train_batch_size": 1}, n_trials=1, backend="optuna"
        )
