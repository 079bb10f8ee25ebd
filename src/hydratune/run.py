"""One run, from settings to an objective: check, data, model, train, evaluate, save, report.

The only place that knows all the rooms. Everything before `_train` leaves nothing on disk, so that bad input costs
nothing; everything after it ends in `RunTracker.finish`, whatever happens.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydratune import checks, checks_model, held
from hydratune.checkpoints import last_checkpoint
from hydratune.data.builtin import answered
from hydratune.errors import Interrupted, OutOfMemory, Pruned, UserError, Violation
from hydratune.objective import named
from hydratune.processes import quick_imports
from hydratune.settings import RunSettings
from hydratune.sweep.trial import current
from hydratune.tracking import (
    PhaseClock,
    RunTracker,
    collect_summary,
    quiet_libraries,
    setup_logging,
    write_config,
    write_summary,
)

log = logging.getLogger("hydratune")
_VERIFIED_ROWS = 256  # held-out rows with an `answer` that are completed and verified at the end


@dataclass
class Job:
    """All that a run needs, made and checked before any weight is loaded."""

    args: Any
    tokenizer: Any
    train: Any
    evaluation: Any
    eval_rows: list[dict[str, Any]]
    recipe: Any
    plan: Any
    reports: dict[str, Any]
    keys: dict[str, str]  # under which a warm process holds the tokenizer and the data


def run(settings: RunSettings) -> float | list[float] | None:
    """Check, train and report one run.

    Args:
        settings: the parsed configuration (`hydratune.config.parse`, or written by hand in a notebook).

    Returns:
        The objective: the metric `settings.objective` names, else eval_loss, eval_reward or loss; a list when it names several.
        None with `check`.

    Raises:
        UserError: the settings or the data cannot work; nothing was written.
        TrainingFailed: the loss is not finite, or memory ran out; the run directory says so.
        Pruned: the sweep that this is a trial of ended it early.
        Interrupted: stopped by Ctrl-C or SIGTERM after a checkpoint.
    """
    findings = checks.check_settings(settings)
    findings.raise_if_any()
    clock = PhaseClock(settings.began)
    with clock.phase("imports"), quick_imports():
        quiet_libraries()
        from hydratune import plan as plans
    job = prepare(settings, clock, findings)
    if _is_main_process():
        plans.show(job.plan)
    if settings.check:
        return None
    return _train(settings, job, clock)


def prepare(settings: RunSettings, clock: PhaseClock, findings: checks.Findings) -> Job:
    """Everything up to the weights: device, arguments, tokenizer, data, recipe and plan, checked together."""
    with clock.phase("imports"), quick_imports():
        from hydratune import algos, attention, plan
        from hydratune.models import load_tokenizer

        algos.classes(settings.algo)

        attention.register()
        quiet_libraries()
    device = checks_model.device_facts()
    findings = findings.merge(checks_model.check_device(settings, device))
    findings.raise_if_any()
    model = settings.model
    with clock.phase("data"):
        config_class, trainer_class = algos.classes(settings.algo)
        args = arguments(settings, config_class, device)
        args.dataset_num_proc = args.dataset_num_proc or settings.data.num_proc
        named: dict[str, Any] = {
            "name": model.tokenizer or str(model.name_or_path),
            "trust_remote_code": model.trust_remote_code,
            "chat_template_path": model.chat_template_path or args.chat_template_path,
            "eos_token": getattr(args, "eos_token", None),
            "pad_token": getattr(args, "pad_token", None),
        }
        keys = {"tokenizer": held.key_of("tokenizer", named), "data": _data_key(settings, args, named)}
        tokenizer = held.take(keys["tokenizer"], lambda: load_tokenizer(**named))
        findings = findings.merge(checks_model.check_tokenizer(tokenizer, settings))
        recipe, outline = recipe_of(settings, trainer_class, args, tokenizer, device)
        findings = findings.merge(checks_model.check_model(outline, settings.peft, tokenizer, settings))
        findings.raise_if_any()
        ready = held.take(keys["data"], lambda: _data(settings, trainer_class, args, tokenizer))
        train, evaluation, eval_rows, reports = ready
        _can_verify(settings, eval_rows)
        prepared = {"train": train, "eval": evaluation}
        trainer_class.check_rows(args, outline.config, {n: r for n, r in prepared.items() if r is not None})
        trainer_class.check_services(args, outline.config, recipe.peft_config)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    made = plan.make(
        settings, args=args, tokenizer=tokenizer, outline=outline, recipe=recipe, trainer_class=trainer_class,
        train=train, reports=reports, device=device, warnings=findings.warnings,
    )  # fmt: skip
    if args.auto_checkpointing:
        args.use_checkpointing(made.needs_checkpointing)
    return Job(args, tokenizer, train, evaluation, eval_rows, recipe, made, reports, keys)


def recipe_of(
    settings: RunSettings, trainer_class: Any, args: Any, tokenizer: Any, device: checks_model.DeviceFacts
) -> tuple[Any, Any]:
    """The recipe of a run's model, its attention chosen, and the model without its adapter on the meta device."""
    from hydratune import adapters, attention
    from hydratune.models import recipe_from, weights_dtype
    from hydratune.packing import packs

    peft_config = adapters.peft_config(settings.peft, trainer_class.task)
    dtype = weights_dtype(
        settings.model.dtype,
        frozen_base=peft_config is not None,
        bf16=device.kind == "cuda" and device.bf16,
    )
    size, task = len(tokenizer), trainer_class.task
    recipe = recipe_from(settings, peft_config, vocab_size=size, dtype=dtype, attention=None, task=task)
    outline = recipe.outline()
    chosen = settings.model.attn_implementation
    if chosen == "auto":
        shared = trainer_class.goal != "tokens"
        chosen = attention.choose(device.kind, packed=packs(args), model=outline, shared=shared)
    outline.config._attn_implementation = chosen  # which tells what of it is fused
    return replace(recipe, attn_implementation=chosen), outline


def arguments(settings: RunSettings, config_class: Any, device: checks_model.DeviceFacts) -> Any:
    """The algorithm's config of a run.

    Raises:
        UserError: it refuses a value.
    """
    options = dict(settings.algo_options)
    for kind in ("bf16", "fp16"):
        if options.get(kind) and not getattr(device, kind):
            options[kind] = False  # check_device has warned
    try:
        return config_class(
            **{
                "output_dir": str(Path(settings.output_dir) / "checkpoints"),
                "seed": settings.seed,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": device.kind == "cpu",
                "dataloader_pin_memory": device.kind == "cuda",
                "run_name": settings.run_name,
                **options,
                **({} if checks.evaluates(settings) else {"eval_strategy": "no"}),
            }
        )
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(
            Violation(
                "trainer", None, str(error).splitlines()[0], "change the trainer.* field that this names"
            )
        ) from error


def _data(
    settings: RunSettings, trainer_class: Any, args: Any, tokenizer: Any
) -> tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]:
    """Load, format and prepare both data sets; also a few formatted evaluation rows for samples."""
    from hydratune.data.format import format_rows
    from hydratune.data.load import load

    data, goal = settings.data, trainer_class.goal
    seed = settings.seed if data.seed is None else data.seed
    train_rows, eval_rows = load(data, seed, goal)
    reports: dict[str, Any] = {}
    ready: dict[str, Any] = {"train": None, "eval": None}
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        if rows is None:
            continue
        ready[name], reports[name] = trainer_class.prepare_rows(
            rows, tokenizer, args, where=name, training=name == "train", cache=data.cache, settings=data
        )
    few: list[dict[str, Any]] = []
    if eval_rows is not None and (shown := settings.tracking.samples):
        head = eval_rows.take(_VERIFIED_ROWS)
        few = [*format_rows(head, data, where="eval", goal=goal)]
        if not trainer_class.generates:
            few = few[: 4 * shown]  # some may be too long for a score
        elif not any(map(answered, few)):
            few = few[:shown]
    return ready["train"], ready["eval"], few, reports


def _can_verify(settings: RunSettings, rows: list[dict[str, Any]]) -> None:
    asked = any(o.metric == "verified_accuracy" for o in named(settings.objective))
    if asked and not any(map(answered, rows)):
        why = (
            "evaluation rows have no column answer with a whole number"
            if rows
            else "tracking.samples=0 makes none"
        )
        fix = "give rows with answers, set tracking.samples=8, or go by another metric, e.g. objective=eval_loss"
        raise UserError(Violation("objective", settings.objective, why, fix))


def _data_key(settings: RunSettings, args: Any, tokenizer: dict[str, Any]) -> str:
    """Everything that decides what `_data` gives."""
    from transformers import TrainingArguments

    shared = {f.name for f in fields(TrainingArguments)}
    own = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in shared}
    rest = (settings.seed, args.seed, settings.algo, settings.tracking.samples)
    return held.key_of("data", vars(settings.data), own, tokenizer, rest)


def warm(settings: RunSettings) -> None:
    """Hold tokenizer, data and base weights of a run in this process, for the runs that are forked from it.

    They are prepared in a child of their own, because that looks at the accelerator and runs in parallel; what comes
    back is mapped from the cache on disk.
    """

    def scout() -> tuple[dict[str, Any], Any]:
        job = prepare(settings, PhaseClock(), checks.check_settings(settings))
        data = (job.train, job.evaluation, job.eval_rows, job.reports)
        return {job.keys["tokenizer"]: job.tokenizer, job.keys["data"]: data}, job.recipe

    if settings.tracking.wandb != "disabled":
        import wandb  # noqa: F401  half a second that no trial has to spend
    ready, recipe = held.in_child(scout)
    for key, value in ready.items():
        held.hold(key, partial(_same, value))
    recipe.hold()


def _same(value: Any) -> Any:
    return value


def _train(settings: RunSettings, job: Job, clock: PhaseClock) -> float | list[float] | None:
    from transformers import PrinterCallback

    from hydratune import algos
    from hydratune.interrupt import StopOnSignal
    from hydratune.progress import ProgressCallback

    out = Path(settings.output_dir)
    main = _is_main_process()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        setup_logging(out, settings.debug)
        write_config(out, settings.resolved)
    trial = current()
    tracker = RunTracker(settings, out, clock, filed=trial.wandb() if trial else {})
    status, trainer = "failed", None
    stop, progress = StopOnSignal(), ProgressCallback()
    try:
        if main:
            tracker.start({"plan": job.plan.as_dict()})
        with clock.phase("model"):
            _, trainer_class = algos.classes(settings.algo)
            base = _save_base(out, job) if main else None
            trainer = trainer_class(
                args=job.args,
                train_dataset=job.train,
                eval_dataset=job.evaluation,
                processing_class=job.tokenizer,
                recipe=job.recipe,
                callbacks=[
                    tracker.callback(),
                    progress,
                    stop.callback(),
                    *([trial.callback()] if trial else []),
                ],
            )
            trainer.remove_callback(PrinterCallback)
            if base:
                trainer.model.peft_config["default"].base_model_name_or_path = base
        with clock.phase("training"), stop:
            trainer.train(resume_from_checkpoint=_checkpoint(settings))
        if stop.requested:
            status = "interrupted"
            raise Interrupted(
                f"stopped at step {trainer.state.global_step}; go on with: python train.py resume={out}"
            )
        if trial is not None and trial.pruned:
            status = "pruned"
            raise Pruned(f"pruned at step {trainer.state.global_step}: other trials were better by then")
        if job.evaluation is not None and not _just_evaluated(trainer):
            with clock.phase("evaluation"):
                trainer.evaluate()
        with clock.phase("saving"):
            trainer.save_model(str(out / "model"))
        with clock.phase("evaluation"):
            _samples(settings, job, trainer, tracker)
        status = "completed"
    except KeyboardInterrupt as error:
        status = "interrupted"
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(
            f"stopped at once; the last checkpoint, if any, is in {out / 'checkpoints'}"
        ) from None
    except _out_of_memory() as error:
        samples = job.plan.estimate.rollout > 0
        less = "algo.local_rollout_forward_batch_size" if samples else "algo.max_length"
        raise OutOfMemory(
            f"out of memory ({str(error).splitlines()[0]}): try trainer.gradient_checkpointing=true, a smaller batch_size "
            f"with more trainer.gradient_accumulation_steps, a smaller {less}, or peft=lora"
        ) from error
    finally:
        progress.close()
        objective = _close(settings, job, clock, tracker, trainer, status) if main else None
    return objective


def _close(
    settings: RunSettings, job: Job, clock: PhaseClock, tracker: RunTracker, trainer: Any, status: str
) -> float | list[float] | None:
    """Write what a run leaves behind: summary, model card, report; close the trackers."""
    from hydratune.card import write_card
    from hydratune.progress import final_table
    from hydratune.report import write_report

    out = Path(settings.output_dir)
    summary = collect_summary(settings, out, clock, status=status, trainer=trainer)
    write_summary(out, summary)
    if (out / "model").is_dir():
        write_card(out / "model", out)
    if current() is None:  # a trial's page is made by the sweep, off the path of its next trial
        write_report(out)
    tracker.finish(status, summary)
    if status == "completed":
        final_table(summary, out)
    return [*summary["objectives"].values()] if "objectives" in summary else summary["objective"]["value"]


def _save_base(out: Path, job: Job) -> str | None:
    """Keep a random-weight base beside its adapter: no one else has it, and reloading or merging needs it."""
    if job.recipe.architecture is None or job.recipe.peft_config is None:
        return None
    target = (out / "base").resolve()
    if not (target / "config.json").is_file():
        job.recipe.build(adapter=False).save_pretrained(target)
    return str(target)


def _samples(settings: RunSettings, job: Job, trainer: Any, tracker: RunTracker) -> None:
    if not job.eval_rows or not _is_main_process():
        return
    rows = trainer.samples(job.eval_rows, max_new_tokens=settings.tracking.sample_tokens)
    verified = [row["correct"] for row in rows if "correct" in row]
    if verified:
        trainer.log({"verified_accuracy": sum(verified) / len(verified)})
    if rows:
        tracker.samples(rows[: settings.tracking.samples])


def _checkpoint(settings: RunSettings) -> str | None:
    if settings.resume is None:
        return None
    folder = Path(settings.resume)
    if folder.name.startswith("checkpoint-"):
        return str(folder)
    last = last_checkpoint(folder)
    return None if last is None else str(last)


def _just_evaluated(trainer: Any) -> bool:
    """Whether the last step was evaluated already, so that the end need not do it again."""
    last = trainer.state.global_step
    return any(entry["step"] == last and "eval_runtime" in entry for entry in trainer.state.log_history)


def _out_of_memory() -> tuple[type[BaseException], ...]:
    import torch

    return (torch.OutOfMemoryError, MemoryError)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
