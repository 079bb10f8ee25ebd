"""All benchmarks of one kind of machine, and the table of ratios that they make, written into RESULTS.md.

    python bench/suite.py cpu                  what `make bench` does
    python bench/suite.py gpu                  what `make bench-gpu` does; first `bash bench/peers/setup_trl_ppo.sh` for PPO
    python bench/suite.py cpu --only sft-lora,kto --dry

Real rows and a real tokenizer are taken from `--data` where it is there; without it the cases that need them are left out,
which the table says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import BEST, DEFAULTS, OURS, machine, speed

BENCH = Path(__file__).resolve().parent
CONVERSATIONS, LABELLED, PAIRS = (
    "sft/capybara_like.jsonl",
    "kto/kto_en.jsonl",
    "preference/kto_mix_pairs.jsonl",
)
QUESTIONS = "math/gsm8k_train_2k.jsonl"
NEOX, QWEN = "tokenizer/gpt-neox-20b", "tokenizer/qwen2.5"


@dataclass(frozen=True)
class Case:
    """A command of this folder, {NAME} for a file of the data, and what its ratios should be.

    Attributes:
        defaults, best: times as fast as TRL at its defaults, at its best; None: nothing was promised.
        memory: at most this share of TRL's peak at its defaults.
        table: its own table alone, without ratios to TRL.
    """

    command: str
    defaults: float | None = None
    best: float | None = None
    memory: float | None = None
    table: bool = False


def _offline(algo: str, rest: str, *targets: float | None) -> Case:
    return Case(f"offline.py {algo} {rest}", *targets)


_REAL = f"--tokenizer {{{NEOX}}} --max-length 384 --rows 48 --steps 6"
_HALF = f"--size qwen2.5-0.5b --tokenizer {{{QWEN}}} --max-length 1024 --rows 256 --batch 16 --steps 12"
CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "sft": _offline("sft", f"--plain --data {{{CONVERSATIONS}}} {_REAL}", 5, 2.5, 0.8),
        "sft-lora": _offline("sft", f"--plain --lora --size wide --data {{{CONVERSATIONS}}} {_REAL}", 5, 2.5, 0.8),
        "sft-packed": _offline("sft", f"--packed --batch 2 --data {{{CONVERSATIONS}}} {_REAL}", 5, 2.5, 0.8),
        "sft-151k": _offline(
            "sft", f"--size tiny --data {{{CONVERSATIONS}}} --tokenizer {{{QWEN}}} --max-length 384 --rows 40 --steps 5",
            5, 2.5, 0.8,
        ),
        "sft-bytes": _offline("sft", "--size tiny --batch 32 --rows 512 --steps 16", 5, 2.5, 0.8),
        "reward": _offline("reward", f"--data {{{PAIRS}}} {_REAL}", None, 3),
        "reward-1024": _offline(  # what both take if not told otherwise
            "reward", f"--data {{{PAIRS}}} --tokenizer {{{NEOX}}} --max-length 1024 --rows 48 --steps 6", None, 3,
        ),
        "dpo": _offline("dpo", f"--data {{{PAIRS}}} {_REAL}", None, 3),
        "dpo-lora": _offline("dpo", f"--lora --data {{{PAIRS}}} {_REAL}", None, 3),
        "kto": _offline("kto", f"--data {{{LABELLED}}} {_REAL}", None, 3),
        "ppo": Case("rl.py ppo", None, 2),
        "ppo-50k": Case(f"rl.py ppo-50k --tokenizer {{{NEOX}}}", None, 2),
        "ppo-mixed": Case(f"rl.py ppo-mixed --tokenizer {{{NEOX}}} --questions {{{QUESTIONS}}}", None, 2),
        "grpo": Case("rl.py grpo", None, 1.2),
        "grpo-50k": Case(f"rl.py grpo-50k --tokenizer {{{NEOX}}}", None, 1.2),
        "sweep": Case("sweep.py --cold-trials 4", table=True),
        "head": Case("head.py", table=True),
        "head-bf16": Case("head.py --dtype bfloat16", table=True),
        "growth": Case(f"growth.py --tokenizer {{{NEOX}}}", table=True),
        "generation": Case("generation.py --rounds 2 --sequences 32 --new-tokens 32", table=True),
    },
    "gpu": {
        "sft": _offline("sft", f"--plain --compiled --data {{{CONVERSATIONS}}} {_HALF}", 2, 1.5, 0.8),
        "sft-lora": _offline("sft", f"--plain --lora --data {{{CONVERSATIONS}}} {_HALF}", 2, 1.5, 0.8),
        "sft-packed": _offline(
            "sft", f"--packed --data {{{CONVERSATIONS}}} --size qwen2.5-1.5b --tokenizer {{{QWEN}}} --max-length 2048 "
            "--rows 600 --batch 8 --steps 12", 2, 1.5, 0.8,
        ),
        "sft-llama-1b": _offline(
            "sft", f"--compiled --data {{{CONVERSATIONS}}} --size llama-3.2-1b --tokenizer {{{NEOX}}} --max-length 1024 --rows 256 "
            "--batch 16 --steps 12", 2, 1.5, 0.8,
        ),
        "sft-lora-8b": _offline(
            "sft", f"--lora --data {{{CONVERSATIONS}}} --size llama-3.1-8b --tokenizer {{{NEOX}}} --max-length 1024 --rows 96 "
            "--batch 8 --steps 8", 2, 1.5, 0.8,
        ),
        "reward": _offline("reward", f"--data {{{PAIRS}}} {_HALF}", None, 2),
        "dpo": _offline("dpo", f"--data {{{PAIRS}}} {_HALF}", None, 2),
        "dpo-lora": _offline("dpo", f"--lora --data {{{PAIRS}}} {_HALF}", None, 2),
        "kto": _offline("kto", f"--data {{{LABELLED}}} {_HALF}", None, 2),
        "ppo": Case(f"rl.py ppo-half-b --cuda --tokenizer {{{NEOX}}}", None, 3),
        "grpo": Case(f"rl.py grpo-half-b --cuda --tokenizer {{{NEOX}}}", None, 1.5),
        "sweep": Case("sweep.py --cold-trials 4", table=True),
        "sweep-4-at-a-time": Case("sweep.py --cold-trials 4 --workers 4", table=True),
        "head": Case("head.py --rows 8192 --hidden 4096 --vocabulary 152064 --dtype bfloat16 --masked 0", table=True),
        "growth": Case(f"growth.py --size qwen2.5-0.5b --tokenizer {{{QWEN}}}", table=True),
        "generation": Case("generation.py --rounds 3 --sequences 128 --new-tokens 128", table=True),
    },
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=CASES)
    parser.add_argument("--only", default="", help="cases, separated by commas")
    parser.add_argument("--rounds", type=int, default=2, help="of the cases against TRL")
    parser.add_argument("--data", type=Path, default=BENCH.parent.parent / "shared" / "data")
    parser.add_argument("--dry", action="store_true", help="say what would be run")
    parser.add_argument("--keep", type=Path, help="folder for figures, from which a stopped suite goes on")
    options = parser.parse_args()
    options.cases = [*filter(None, options.only.split(","))] or [*CASES[options.kind]]
    if unknown := [name for name in options.cases if name not in CASES[options.kind]]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES[options.kind])}")
    return options


def words(case: Case, data: Path) -> list[str]:
    """The command with the data's files in their places."""
    return [str(data / word[1:-1]) if word.startswith("{") else word for word in case.command.split()]


def run(name: str, case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of a case, or why there are none."""
    script, *arguments = words(case, options.data)
    absent = [word for word in arguments if word.startswith(str(options.data)) and not Path(word).exists()]
    if absent:
        return {"why": f"{Path(absent[0]).name} is not there"}
    path = folder / f"{name}.json"
    if not path.is_file():
        figures = [] if case.table and script != "sweep.py" else ["--json", str(path)]
        rounds = [] if case.table else ["--rounds", str(options.rounds)]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(BENCH / script), *arguments, *rounds, *figures],
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if done.returncode:
            return {"why": f"{script} ended with {done.returncode}"}
        if not path.is_file():
            path.write_text(json.dumps({"table": done.stdout.strip()}))
    return json.loads(path.read_text())


def row(name: str, case: Case, found: dict[str, Any]) -> str:
    """The line of a case in the table of ratios."""
    if "why" in found:
        return f"| {name} | not run: {found['why']} |" + " |" * 6
    arms, unit = found["arms"], found["unit"]
    ours = arms[OURS]
    best = max(
        (arm for arm in arms if arm.startswith(BEST)), key=lambda arm: arms[arm][unit] / arms[arm]["seconds"]
    )
    cells = [name, f"{ours[unit] / ours['seconds']:.0f} {unit}/s"]
    reached = []
    for arm, wanted in ((DEFAULTS, case.defaults), (best, case.best)):
        times = speed(ours, arms[arm], unit)
        share = ours["peak_mib"] / arms[arm]["peak_mib"]
        cells += [f"{times:.1f}× ({speed(ours, arms[arm], unit, 'cpu_seconds'):.1f}×)", f"{share:.2f}"]
        if wanted is not None:
            reached.append(times >= wanted)
        if case.memory is not None and arm == DEFAULTS:
            reached.append(share <= case.memory)
    aims = [f"{w:g}× {n}" for w, n in ((case.defaults, "defaults"), (case.best, "best")) if w is not None]
    aims += [f"{case.memory:g} memory"] if case.memory is not None else []
    cells += [", ".join(aims) or "–", "yes" if all(reached) else "**no**"]
    return "| " + " | ".join(cells) + " |"


def section(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    """What RESULTS.md says of this kind of machine."""
    own = CASES[options.kind]
    head = [
        "case",
        "ours",
        "than TRL's defaults",
        "memory",
        "than TRL at its best",
        "memory",
        "aim",
        "reached",
    ]
    lines = [
        f"## Against TRL, {options.kind.upper()}, {datetime.date.today()}\n",
        f"    make bench{'-gpu' * (options.kind == 'gpu')}\n",
        f"{machine()}; {options.rounds} rounds, arms alternating, medians. Times as fast (by CPU time), and ours of their peak memory.\n",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    lines += [row(name, own[name], found[name]) for name in found if not own[name].table]
    for name, figures in found.items():
        if own[name].table and "why" in figures:
            lines.append(f"\n### {name}\n\nNot run: {figures['why']}.")
        if "table" in figures:
            shown = " ".join(
                f"DATA/{word[1:-1]}" if word.startswith("{") else word for word in own[name].command.split()
            )
            text = "\n".join(
                line for line in figures["table"].splitlines() if not line.startswith(("##", "    "))
            )
            lines.append(f"\n### {name}\n\n    python bench/{shown}\n\n{text.strip()}")
    return "\n".join(lines)


def write(kind: str, text: str) -> None:
    """Put the section of a kind into RESULTS.md, in place of an older one."""
    path = BENCH / "RESULTS.md"
    begin, end = f"<!-- suite {kind} -->", f"<!-- end of suite {kind} -->"
    old = path.read_text(encoding="utf-8")
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2] if rest else ""
    path.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}\n{after}", encoding="utf-8")


def main() -> None:
    options = parse()
    own = CASES[options.kind]
    if options.dry:
        for name in options.cases:
            print(f"{name}: python bench/{' '.join(words(own[name], options.data))}")
        return
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: run(name, own[name], options, folder) for name in options.cases}
    text = section(options, found)
    print(text)
    if not options.only:
        write(options.kind, text)
    if any("why" in figures for figures in found.values()):
        sys.exit("not all cases ran: see the table")


if __name__ == "__main__":
    main()
