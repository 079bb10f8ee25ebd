"""The rules of single algorithms on values alone, for the command line and for Python; as light as `checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydratune.errors import Violation, nearest
from hydratune.options import constant
from hydratune.reward_sources import check_sources

Problem = Violation | str
_OF_A_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    Attributes:
        options: fields of the algorithm's config; one that is missing has its default.
        adapter: train an adapter.
        streaming: the training rows are a stream.
        evaluates: there are evaluation rows.
        pairs_given: KTO's rows bring their mismatched completions.
        rewards_given: rewards are given as objects, which are checked where they are used.
    """

    options: Mapping[str, Any]
    adapter: bool = False
    streaming: bool = False
    evaluates: bool = False
    pairs_given: bool = False
    rewards_given: bool = False


def _positive(case: Case, *names: str) -> Iterator[Problem]:
    for name in names:
        value = case.options.get(name)
        if value is not None and value <= 0:
            yield Violation(f"algo.{name}", value, "is not above 0", "give a positive number")


def _reference_fits(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(case, "beta", "precompute_ref_batch_size", "ref_model_sync_steps")
    share = options.get("ref_model_mixup_alpha")
    if share is not None and not 0 < share <= 1:
        yield Violation(
            "algo.ref_model_mixup_alpha", share, "is no share", "give a number above 0, at most 1"
        )
    if options.get("sync_ref_model"):
        if case.adapter:
            why = "with an adapter the reference is the policy without it, which has nothing to follow with"
            yield Violation("algo.sync_ref_model", True, why, "use peft=none, or leave it out")
        if options.get("precompute_ref_log_probs"):
            why = "algo.precompute_ref_log_probs fixes the reference before training"
            yield Violation("algo.sync_ref_model", True, why, "keep one of the two")
    if options.get("precompute_ref_log_probs") and case.streaming:
        why = "rows of a stream are not there before training"
        yield Violation(
            "algo.precompute_ref_log_probs", True, why, "use data.streaming=false, or leave it out"
        )


def _dpo_losses_fit(case: Case) -> Iterator[Problem]:
    options = case.options
    given = options.get("loss_type", "sigmoid")
    losses, known = (
        [given] if isinstance(given, str) else list(given),
        constant("hydratune.losses", "DPO_LOSSES"),
    )
    for name in losses:
        if name not in known:
            fix = f"{nearest(str(name), known)} (there are: {', '.join(known)})"
            yield Violation("algo.loss_type", name, "there is no such loss", fix)
    if not losses:
        yield Violation("algo.loss_type", losses, "names no loss", f"choose among {', '.join(known)}")
    weights = options.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        why = f"{len(losses)} losses need as many weights"
        yield Violation(
            "algo.loss_weights", weights, why, "give one for each of algo.loss_type, or leave it out"
        )
    smoothing = options.get("label_smoothing", 0.0)
    if not 0 <= smoothing < 0.5:
        why = "with half of the labels wrong there is nothing to learn"
        yield Violation("algo.label_smoothing", smoothing, why, "give 0 or more, below 0.5")
    elif smoothing == 0 and "exo_pair" in losses:
        why = "exo_pair compares with a distribution that must give the rejected answer something"
        yield Violation("algo.label_smoothing", smoothing, why, "algo.label_smoothing=1e-3")
    elif smoothing and not set(losses) & {*_SMOOTHED}:
        yield f"algo.label_smoothing={smoothing} has no effect on {', '.join(losses)}"
    divergence = options.get("f_divergence_type", "reverse_kl")
    odd = [name for name in losses if name in known and name not in _OF_A_DIFFERENCE]
    if divergence != "reverse_kl" and odd:
        why = f"{', '.join(odd)} is no function of a difference of scores, so that another divergence has no meaning"
        yield Violation(
            "algo.f_divergence_type", divergence, why, f"use one of {', '.join(_OF_A_DIFFERENCE)}"
        )
    sorted_ones = [name for name in losses if name in ("aot", "aot_unpaired")]
    if options.get("use_weighting") and sorted_ones:
        why = f"{sorted_ones[0]} compares sorted values, so that no loss belongs to one pair"
        yield Violation("algo.use_weighting", True, why, "leave it out, or use another algo.loss_type")
    alpha = options.get("ld_alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        yield Violation("algo.ld_alpha", alpha, "is no share", "give a number from 0 to 1, or null")


def _kto_can_estimate(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(
        case, "desirable_weight", "undesirable_weight", "max_prompt_length", "max_completion_length"
    )
    if options.get("loss_type", "kto") != "kto" or options.get("precompute_ref_log_probs"):
        return
    if case.pairs_given:
        return
    keys = {"batch_size": "train"}
    if case.evaluates:
        keys["trainer.per_device_eval_batch_size"] = "eval"
    for key in [k for k, name in keys.items() if options.get(f"per_device_{name}_batch_size") == 1][:1]:
        yield Violation(
            key,
            1,
            "KTO's reference point is estimated on prompts with other rows' completions, of which a batch of one has none",
            f"{key}=2 or more, algo.precompute_ref_log_probs=true (pairs are then made over all rows), "
            "or algo.loss_type=apo_zero_unpaired",
        )


def _lengths_fit(case: Case) -> Iterator[Problem]:
    most = case.options.get("max_length", 1024)
    if most is None:
        return
    prompt = case.options.get("max_prompt_length")
    if prompt is not None and prompt >= most:
        why = f"leaves no room for a completion in algo.max_length={most}"
        yield Violation("algo.max_prompt_length", prompt, why, "give less")


def _reward_is_bounded(case: Case) -> Iterator[Problem]:
    value = case.options.get("center_rewards_coefficient")
    if value is not None and value < 0:
        why = "would drive rewards away from zero"
        yield Violation("algo.center_rewards_coefficient", value, why, "give 0 or more, e.g. 0.01")


def _reward_has_no_router(case: Case) -> Iterator[Problem]:
    if case.options.get("router_aux_loss_coef"):
        yield "algo.router_aux_loss_coef has no effect on a reward model, whose forward pass gives no balance loss"


def _rows_have_one_length(case: Case) -> Iterator[Problem]:
    if case.options.get("train_sampling_strategy") == "group_by_length":
        why = "rows hold a prompt and completions, of which none is the row's length"
        fix = "leave it out: sequences are laid end to end, so that nothing is padded"
        yield Violation("trainer.train_sampling_strategy", "group_by_length", why, fix)


def _sampling_fits(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(
        case, "temperature", "top_k", "max_prompt_length", "local_rollout_forward_batch_size", "response_length",
        "max_completion_length",
    )  # fmt: skip
    if options.get("compile_layers"):
        why = "sampling would compile them again for each length of its cache"
        yield Violation("algo.compile_layers", True, why, "leave it out: it is for sft, reward, dpo and kto")
    for name in ("top_p", "min_p"):
        value = options.get(name)
        if value is not None and not (0 < value <= 1 if name == "top_p" else 0 <= value <= 1):
            yield Violation(f"algo.{name}", value, "is no probability", "give a number from 0 to 1")
    if case.streaming:
        why = "prompts are drawn from all rows, and those of a stream are not there"
        yield Violation("data.streaming", True, why, "use data.streaming=false")
    if options.get("packing") or options.get("train_sampling_strategy") == "group_by_length":
        why = "completions are laid out by their own lengths as they are"
        yield Violation("trainer.train_sampling_strategy", "group_by_length", why, "leave it out")


def _server_is_usable(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(case, "vllm_server_timeout")
    url = options.get("vllm_server_base_url")
    if url is None:
        if options.get("vllm_server_folder") is not None:
            yield "algo.vllm_server_folder has no effect without algo.vllm_server_base_url"
        return
    if not str(url).startswith(("http://", "https://")):
        fix = "begin with http:// or https://, e.g. http://127.0.0.1:8000"
        yield Violation("algo.vllm_server_base_url", url, "is no address of a server", fix)
    for name in ("fsdp", "deepspeed"):
        if options.get(name):
            why = "the policy's weights are in parts, and a server is sent whole ones"
            yield Violation(f"trainer.{name}", options[name], why, "leave it out, or sample here")


def _rewards_are_there(case: Case) -> Iterator[Problem]:
    if case.rewards_given:
        return
    options = case.options
    model = options.get("reward_model")
    sources = [*([] if model is None else [model]), *(options.get("reward_funcs") or ())]
    for problem in check_sources(sources, columns=None, weights=options.get("reward_weights")):
        named = problem.key == "algo.reward_funcs" and problem.value == model
        yield replace(problem, key="algo.reward_model") if named else problem


def _ppo_fits(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(
        case, "num_ppo_epochs", "num_mini_batches", "total_episodes", "cliprange", "cliprange_value",
        "adaptive_kl_target", "adaptive_kl_horizon", "target_kl", "value_learning_rate",
    )  # fmt: skip
    for name in ("gamma", "lam"):
        value = options.get(name)
        if value is not None and not 0 <= value <= 1:
            yield Violation(f"algo.{name}", value, "is no share", "give a number from 0 to 1")
    for name in ("kl_coef", "vf_coef", "missing_eos_penalty"):
        value = options.get(name)
        if value is not None and value < 0:
            yield Violation(
                f"algo.{name}", value, "would reward what it is there to prevent", "give 0 or more"
            )
    if options.get("adaptive_kl") and options.get("kl_coef") == 0:
        why = "algo.kl_coef=0 stays 0, whatever it is multiplied by"
        yield Violation("algo.adaptive_kl", True, why, "start from a number above 0")
    stops = options.get("stop_token", "eos") or options.get("stop_token_id") is not None
    if not stops and options.get("missing_eos_penalty"):
        why = "with algo.stop_token=null every completion is cut"
        yield Violation(
            "algo.missing_eos_penalty", options["missing_eos_penalty"], why, "set algo.stop_token=eos"
        )
    if (value := options.get("value_model")) is not None:
        path = Path(str(value)).expanduser()
        local = path.is_absolute() or str(value).startswith((".", "~")) or "/" not in str(value)
        if local and not path.is_dir():
            yield Violation(
                "algo.value_model", value, "there is no such directory", "give one, or leave it out"
            )
    if options.get("total_episodes") is not None and options.get("max_steps", -1) > 0:
        why = f"algo.total_episodes={options['total_episodes']} says how long to train, too"
        yield Violation("max_steps", options["max_steps"], why, "keep one of the two")


def _grpo_fits(case: Case) -> Iterator[Problem]:
    options = case.options
    yield from _positive(case, "num_iterations", "steps_per_generation", "epsilon", "epsilon_high")
    many, size = options.get("num_generations", 8), options.get("per_device_train_batch_size", 8)
    accumulated = options.get("gradient_accumulation_steps", 1)
    parts = options.get("steps_per_generation") or accumulated
    if many < 2:
        why = "a completion is held against the others of its prompt, and there are none"
        yield Violation("algo.num_generations", many, why, "give 2 or more, e.g. 8")
    elif size * parts % many:
        why = f"the {size * parts} completions of a rollout (batch_size × micro-batches) are not whole groups of {many}"
        yield Violation(
            "algo.num_generations", many, why, f"batch_size={-(-size // many) * many}, or a divisor of it"
        )
    if parts % accumulated:
        why = (
            f"is no multiple of accumulation={accumulated}, so that a rollout would end inside an update step"
        )
        yield Violation(
            "algo.steps_per_generation", parts, why, f"give {-(-parts // accumulated) * accumulated}"
        )
    if options.get("beta", 0.0) < 0:
        yield Violation("algo.beta", options["beta"], "would drive the policy away", "give 0 or more")
    if options.get("loss_type") == "cispo" and options.get("epsilon_high") is None:
        why = "cispo needs the largest weight of a token"
        yield Violation("algo.epsilon_high", None, why, "algo.epsilon_high=5")
    scale = options.get("scale_rewards", "group")
    if not isinstance(scale, bool) and scale not in ("group", "batch", "none"):
        yield Violation(
            "algo.scale_rewards",
            scale,
            "is none of group, batch, none",
            nearest(str(scale), ("group", "batch", "none")),
        )


RULES: dict[str, list[Callable[..., Iterator[Any]]]] = {
    "reward": [_reward_is_bounded, _reward_has_no_router, _rows_have_one_length],
    "dpo": [_reference_fits, _dpo_losses_fit, _rows_have_one_length],
    "ppo": [_sampling_fits, _server_is_usable, _rewards_are_there, _ppo_fits],
    "grpo": [_sampling_fits, _server_is_usable, _rewards_are_there, _grpo_fits],
    "kto": [_reference_fits, _kto_can_estimate, _lengths_fit, _rows_have_one_length],
}
