"""What a sweep costs beside its training: overhead per trial of 20 trials, three ways.

    python bench/sweep.py [--trials 20] [--steps 10] [--rounds 2]

- ours: `python train.py -m …`, each trial a process of its own, forked from a warm one;
- cold: a new `python train.py …` for every trial;
- TRL: its SFTTrainer in an Optuna loop in one process, which isolates nothing; the rows are tokenised once, before
  the loop, as one who measures would do it.

All train the same architecture on the same rows for the same steps, evaluate once at the end and save the model; none
logs to W&B or completes samples. Overhead is the wall time of the whole command, imports included, less the time in
training and evaluation (`train_runtime` and `eval_runtime`, which every arm's Trainer measures itself), by trial; with
`--workers` above 1 trials overlap, and only the whole trial and trials an hour mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arms import machine

ROOT = Path(__file__).resolve().parents[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--cold-trials", type=int, default=5, help="of the cold arm, whose trials are all alike"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="trials of ours at the same time, on one device"
    )
    parser.add_argument("--json", help="file for the figures, for suite.py")
    parser.add_argument("--trl", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def rates(trials: int) -> list[float]:
    return [round(1e-4 * (i + 1), 6) for i in range(trials)]


def settings(options: argparse.Namespace) -> list[str]:
    return [
        f"max_steps={options.steps}",
        "tracking=none",
        "tracking.samples=0",
        "trainer.eval_strategy=no",
        "trainer.save_strategy=no",
    ]


def spent(folders: list[Path]) -> float:
    """Seconds in training and evaluation, as the runs' Trainers measured them."""
    total = 0.0
    for folder in folders:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            event = json.loads(line)
            total += event.get("train_runtime", 0.0) + event.get("eval_runtime", 0.0)
    return total


def ours(options: argparse.Namespace, folder: Path) -> tuple[float, float, int]:
    values = ",".join(map(str, rates(options.trials)))
    start = time.perf_counter()
    train(
        "-m", f"lr={values}", *settings(options), f"sweep.workers={options.workers}", f"output_dir={folder}"
    )
    wall = time.perf_counter() - start
    trials = [folder / str(i) for i in range(options.trials)]
    return wall, spent(trials), options.trials


def cold(options: argparse.Namespace, folder: Path) -> tuple[float, float, int]:
    trials = [folder / str(i) for i in range(options.cold_trials)]
    start = time.perf_counter()
    for rate, trial in zip(rates(options.trials), trials, strict=False):
        train(f"lr={rate}", *settings(options), f"output_dir={trial}")
    return time.perf_counter() - start, spent(trials), options.cold_trials


def train(*overrides: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "train.py"), *overrides], check=True, capture_output=True)


def trl(options: argparse.Namespace, folder: Path) -> tuple[float, float, int]:
    command = [
        sys.executable,
        __file__,
        "--trl",
        "--trials",
        str(options.trials),
        "--steps",
        str(options.steps),
    ]
    start = time.perf_counter()
    waits = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as train.py has it
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=waits)
    wall = time.perf_counter() - start
    return wall, float(done.stdout.strip().splitlines()[-1]), options.trials


def trl_loop(options: argparse.Namespace) -> None:
    """The Optuna loop of the third arm; prints the seconds in training and evaluation."""
    import optuna
    import torch
    import yaml
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from hydratune.data.builtin import arithmetic
    from hydratune.models import byte_tokenizer

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cuda = torch.cuda.is_available()
    tokenizer = byte_tokenizer()
    fields = yaml.safe_load((ROOT / "conf/model/tiny.yaml").read_text())["model"]["architecture"]
    config = AutoConfig.for_model(**fields, vocab_size=len(tokenizer))
    everything = [
        tokenizer.apply_chat_template(r["messages"], tokenize=True, return_dict=True)["input_ids"]
        for r in arithmetic(2048, seed=42)
    ]
    rows = Dataset.from_list([{"input_ids": ids} for ids in everything[:1946]])
    held_out = Dataset.from_list([{"input_ids": ids} for ids in everything[1946:]])
    seconds = 0.0

    def objective(trial: optuna.Trial) -> float:
        nonlocal seconds
        rate = trial.suggest_categorical("lr", rates(options.trials))
        set_seed(42)
        args = SFTConfig(
            output_dir=f"trl/{trial.number}", max_steps=options.steps, learning_rate=rate, per_device_train_batch_size=32,
            per_device_eval_batch_size=32, report_to="none", bf16=cuda, gradient_checkpointing=False, disable_tqdm=True,
            lr_scheduler_type="cosine", warmup_steps=0.03, eval_strategy="no", save_strategy="no", use_cpu=not cuda,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_config(config),
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        seconds += trainer.train().metrics["train_runtime"]
        metrics = trainer.evaluate()
        seconds += metrics["eval_runtime"]
        trainer.save_model(f"trl/{trial.number}/model")
        return metrics["eval_loss"]

    sampler = optuna.samplers.GridSampler({"lr": rates(options.trials)})
    optuna.create_study(sampler=sampler).optimize(objective, n_trials=options.trials)
    print(seconds)


def main() -> None:
    options = parse()
    if options.trl:
        trl_loop(options)
        return
    arms = {"ours": ours, "a cold process a trial": cold, "TRL in one process": trl}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for index in range(options.rounds):
        for name, arm in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                wall, training, trials = arm(options, Path(folder) / "study" if arm is ours else Path(folder))
            found[name].append(((wall - training) / trials, wall / trials))
            print(
                f"round {index + 1}, {name}: {found[name][-1][0]:.2f} s overhead a trial, {wall:.1f} s in all",
                file=sys.stderr,
            )
    mine = statistics.median(overhead for overhead, _ in found["ours"])
    lines = [
        f"{machine()}; {options.trials} trials of {options.steps} steps, {options.workers} at a time (ours)\n",
        "| arm | overhead a trial, s | whole trial, s | trials an hour | overhead against ours |\n|---|---|---|---|---|",
    ]
    arms_found = {}
    for name, pairs in found.items():
        overhead, whole = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        arms_found[name] = {"overhead": overhead, "whole": whole}
        overlaps = options.workers > 1  # then what is left of the wall time says nothing of one trial
        own = "–" if overlaps and name == "ours" else f"{overhead:.2f}"
        against = "–" if overlaps else f"{overhead / mine:.1f}×"
        lines.append(f"| {name} | {own} | {whole:.2f} | {3600 / whole:.0f} | {against} |")
    print("\n".join(lines))
    if options.json:
        figures = {"case": "sweep", "unit": "trials", "arms": arms_found, "table": "\n".join(lines)}
        Path(options.json).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
