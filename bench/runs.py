"""How long `hydratune runs` and `compare` take on many recorded runs: whole commands, from the shell to the shell.

    python bench/runs.py [--runs 500] [--rounds 5] [--events 60]

The runs are written here, with the files that a run of SFT with LoRA leaves; a tenth of them is a study's trials. Wall
time depends on what else the machine does, so the processor's time is beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

PROGRAM = Path(sys.executable).parent / "hydratune"
SETTINGS = {
    "max_steps": None, "batch_size": 16, "accumulation": None, "seed": 42, "objective": None, "run_name": None, "resume": None,
    "check": False, "debug": False, "tracking": {"wandb": "disabled"},
    "data": {"source": "hub", "name": "trl-lib/Capybara", "split": "train", "eval_split": "test"},
    "model": {"name_or_path": "Qwen/Qwen2.5-0.5B"}, "algo": {"name": "sft", "packing": True, "assistant_only_loss": True},
}  # fmt: skip
FINAL = (
    "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "tokens_per_second", "eval_loss",
    "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens", "eval_runtime", "train_runtime", "verified_accuracy",
)  # fmt: skip


def record(folder: Path, number: int, events: int) -> None:
    """What a run leaves; numbers that differ from run to run."""
    folder.mkdir(parents=True)
    rate, rank = 1e-6 * 1.02**number, 8 * 2 ** (number % 3)
    trainer = {
        "learning_rate": rate,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 16,
        "warmup_steps": 0.03,
    }
    peft = (
        {"type": "lora", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
        if number % 2
        else None
    )
    config = {
        "lr": rate,
        "epochs": 2.0,
        **SETTINGS,
        "output_dir": str(folder),
        "trainer": trainer,
        "peft": peft,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    loss = [2 + math.exp(-step / 20) + number % 7 / 50 for step in range(events)]
    lines = [
        {
            "step": i,
            "epoch": i / events,
            "time": 1.0 * i,
            **({"eval_loss": v} if i % 10 == 9 else {"loss": v, "grad_norm": 1.0}),
        }
        for i, v in enumerate(loss)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.log").write_text("")
    for name in ("model", "checkpoints", ".hydra"):
        (folder / name).mkdir()
    final = dict.fromkeys(FINAL, loss[-1])
    summary = {
        "run_name": folder.name, "status": "completed", "algo": "sft", "model": "qwen2.5_0.5b", "data": "capybara",
        "peft": "lora" if peft else "none", "objective": {"name": "eval_loss", "value": loss[-1]},
        "metrics": {"final": final, "best": {"loss": loss[-1], "eval_loss": loss[-1]}}, "steps": events, "tokens": 10**6,
        "seconds": {"imports": 8.0, "data": 2.0, "training": 1.0 * events}, "tokens_per_second": 1e4,
        "peak_memory": {"bytes": 2**30, "kind": "cuda"}, "seed": 42, "started": "2026-01-01T00:00:00+0000",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))


def measure(command: list[str], home: Path) -> tuple[float, float]:
    """Wall and processor seconds of one command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([PROGRAM, *command, "--home", home], check=True, stdout=subprocess.DEVNULL, cwd=home)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for i in range(args.runs):
            trial = i >= args.runs - args.runs // 10
            day = (
                home / "sweeps" / "study" / str(i)
                if trial
                else home / f"2026-01-{i % 28 + 1:02}" / f"{i:04}-sft-qwen"
            )
            record(day, i, args.events)
        (home / "sweeps" / "study" / "study.json").write_text("{}")
        commands = {
            "runs": ["runs"],
            "runs, all of them": ["runs", "--limit", "0"],
            "runs, filtered and sorted": ["runs", "lr<1e-4", "peft=lora", "--sort", "eval_loss"],
            "runs --json, all": ["runs", "--json", "--limit", "0"],
            "compare two": ["compare", "0001-sft", "0002-sft"],
            f"compare a study of {args.runs // 10}": ["compare", "study"],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                found[name].append(measure(command, home))
    print(
        f"{args.runs} runs, median of {args.rounds}; {platform.machine()}, Python {platform.python_version()}\n"
    )
    print("| command | seconds | of the processor |\n|---|---|---|")
    for name, times in found.items():
        wall, busy = (statistics.median(t[i] for t in times) for i in (0, 1))
        print(f"| {name} | {wall:.2f} | {busy:.2f} |")


if __name__ == "__main__":
    main()
