"""The documents say what is true: every command line is understood, recipes and `hydratune` commands are run.

A command that no rule here understands fails, so that none escapes. Words in capitals stand for files and runs; they are
replaced by real ones, which the README's recipes leave.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from commands import ROOT, entry, made_once
from documents import NAMES, blocks, command_lines, in_text
from typer.testing import CliRunner

from hydratune.checks import check_settings
from hydratune.cli import app
from hydratune.command import arguments, check_command, resumed, rewrite, with_kept_search
from hydratune.config import key_of
from hydratune.errors import UserError
from hydratune.run import run as real_run

FOREIGN = {"git", "cd", "vllm", "wandb", "source", "pip", "export"}  # programs of others, looked at below

# what makes a recipe small: keys that it sets are replaced
SMALL = {
    "data.size": 48, "data.eval_fraction": 0.2, "max_steps": 2, "batch_size": 8, "algo.num_generations": 4,
    "tracking": "none", "tracking.samples": 0,
}  # fmt: skip
ROWS = {
    "FILE.jsonl": [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(8)],
    "PAIRS.jsonl": [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": "no"} for i in range(8)],
    "LABELS.jsonl": [{"prompt": f"{i}?", "completion": f"{i}", "label": i % 2 == 0} for i in range(8)],
    "test.jsonl": [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(20)],
    "all.jsonl": [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(20)],
    "QUESTIONS.jsonl": [{"prompt": f"{i}?", "answer": i} for i in range(8)],
}


def small(words: list[str]) -> list[str]:
    """The overrides of a recipe with fewer rows and steps."""
    kept = [w for w in words if key_of(w) not in SMALL and key_of(w) not in ("epochs", "sweep.n_trials")]
    algo = next((w.partition("=")[2] for w in words if w.startswith("algo=")), "sft")
    made = [
        f"{key}={value}" for key, value in SMALL.items() if key != "algo.num_generations" or algo == "grpo"
    ]
    return [*kept, *made]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """A folder in which the words in capitals are real: the README's recipes have run in it."""
    folder = made_once(tmp_path_factory, "world", make_world)
    with inside(folder):
        yield folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRATUNE_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.syspath_prepend(str(folder))
        yield


def make_world(folder: Path) -> None:
    (folder / "my").mkdir()
    (folder / "my" / "__init__.py").write_text("")
    (folder / "my" / "module.py").write_text(
        "def fn(completions, **columns):\n    return [1.0 for _ in completions]\n\n\n"
        "def row(row):\n    return {'prompt': 'a', 'completion': 'b'}\n\n\n"
        "def space(trial):\n    return {'lr': trial.suggest_float('lr', 1e-5, 1e-3)}\n"
    )
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "FILE.csv").write_text("question,answer\n1?,1\n2?,2\n")
    with inside(folder):
        run_recipes()
        look_at_recipes(folder)
        run_named()


def run_recipes() -> None:
    """Run the README's recipes that are of built-in data (the others are marked `# or`), small."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, last = (
        text[: text.index(head)].count("\n") for head in ("## Five recipes", "## What a run leaves")
    )
    for line, command in command_lines(ROOT / "README.md"):
        words = shlex.split(command, comments=True)
        if not first < line < last or re.search(r"# or\b", command) or words[:2] != ["python", "train.py"]:
            continue
        if "-m" not in words:
            assert entry.main(small(words[2:])) == 0, f"README.md:{line}: {command}"
            continue
        search = ["sweep.n_trials=2", "sweep.name=STUDY", "model.architecture.num_hidden_layers=1"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *small(words[2:]), *search],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"README.md:{line}: {command}\n{done.stdout}{done.stderr}"


def look_at_recipes(folder: Path) -> None:
    """All have run: SFT, KTO, a reward model, PPO, GRPO and a sweep."""
    made = [json.loads(path.read_text()) for path in (folder / "outputs").rglob("summary.json")]
    steps = {s["algo"]: s["steps"] for s in made if s["status"] == "completed"}
    assert steps == dict.fromkeys(("sft", "kto", "reward", "ppo", "grpo"), 2)
    assert len(json.loads((folder / "outputs/sweeps/STUDY/study.json").read_text())["trials"]) == 2


def run_named() -> None:
    """The runs that docs/commands.md works on, as it says that they were made, small; the last one written is of SFT."""
    own = [*small(["data.seed=7"]), "tracking.samples=2"]
    runs = {
        "sums": [],
        "sums-lora": ["model.name_or_path=outputs/sums/model", "peft=lora", "lr=2e-3"],
    }
    for name, words in runs.items():
        assert entry.main([*own, *words, f"output_dir=outputs/{name}"]) == 0
    for name, same in (("sft", "sums"), ("lora", "sums-lora"), ("judge", "reward")):
        shutil.copytree(f"outputs/{same}", f"outputs/{name}")  # with their times


def real(word: str) -> str:
    """A word with what stands in capitals replaced by what the recipes have left."""
    word = re.sub(r"outputs/\d{4}-[\w./-]+", "RUN", word)
    for name, path in (
        ("REWARD_RUN", "outputs/reward"), ("TEST.jsonl", "LABELS.jsonl"), ("MERGED_MODEL", "merged"), ("RUN_DIRECTORY", "RUN"), ("BASE/model", "RUN/model"),
        ("DIR_OR_ID", "RUN/model"),
    ):  # fmt: skip
        word = word.replace(name, path)
    word = re.sub(r"(?<![\w/])DIR\b", "RUN/model", word)
    return re.sub(r"(?<![\w/.])RUN\b", "outputs/base", word)


def typed() -> dict[str, str]:
    """Every command line of the documents, and where it stands."""
    lines = (
        (name, found) for name in NAMES for find in (command_lines, in_text) for found in find(ROOT / name)
    )
    return {command: f"{name}:{line}" for name, (line, command) in lines}


def test_the_recipes_run_and_every_command_line_is_understood(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "hydratune.run", types.SimpleNamespace(run=_check))
    where = typed()
    assert len(where) > 50
    wrong = []
    for command, place in where.items():
        words = [real(w) for w in shlex.split(command, comments=True) if w != "…"]
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # of its environment
            words = words[1:]
        if problem := understand(words):
            wrong.append(f"{place}: {command}\n    {problem}: {capsys.readouterr().err.strip()}")
        capsys.readouterr()
    assert not wrong, "\n".join(wrong)


# parsed above and not run, because
NOT_RUN = {
    "hydratune dashboard": "it is a server for a browser, which tests/e2e/test_dashboard.py drives",
    "hydratune sweep dashboard": "it is the same server",
    "data=gsm8k": "its rows are on the hub",
}
# what is asked of the study of two trials and of runs of two steps
FEWER = {"--trial 3": "--trial 1", "max_steps=5000": "max_steps=1", "sweep.n_trials=60": "sweep.n_trials=3"}
QUESTION = "What is 12 + 30?\n"


def labels(text: str) -> set[str]:
    """The first words of lines that begin at the edge."""
    return {re.split(r"  +", line)[0] for line in text.splitlines() if re.match(r"[^\s…]", line)}


def test_the_commands_of_the_documents_do_what_they_say(world, monkeypatch, tmp_path, capfd):
    """They end well, on a pipe without markup, and print the lines that the documents show."""
    monkeypatch.chdir(world)
    texts = [text.partition("\n") for name in NAMES for _, _, text in blocks(ROOT / name)]
    answers = {command[2:]: answer for command, _, answer in texts if command.startswith("$ ")}
    wrong, ran = [], []
    for number, (command, place) in enumerate(typed().items()):
        if not command.startswith("hydratune ") or any(part in command for part in NOT_RUN):
            continue
        line = command
        for asked, less in FEWER.items():
            line = line.replace(asked, less)
        words = shlex.split(line, comments=True)[1:]
        if words[0] in ("export", "merge"):
            words[2] = str(tmp_path / str(number))
        if words[0] == "merge":
            words[1] = "outputs/lora"
        done = CliRunner().invoke(app, [real(word) for word in words], input=QUESTION)
        out = done.stdout + capfd.readouterr().out  # of processes that it starts
        shown = answers.get(command, "") if words[0] in ("eval", "compare", "doctor") else ""
        if done.exit_code or not out or "\x1b" in out:
            wrong.append(f"{place}: {command}\n    {done.exit_code} {done.exception!r} {done.output}")
        elif missing := labels(shown) - labels(out):
            wrong.append(f"{place}: {command}\n    does not print {missing}, but\n{out}")
        ran.append(words[0] if words[0] != "sweep" else f"sweep {words[1]}")
    assert not wrong, "\n".join(wrong)
    assert {*ran} == {
        "runs", "compare", "chat", "generate", "eval", "export", "merge", "doctor",
        *(f"sweep {c}" for c in ("status", "best", "rerun", "resume")),
    }  # fmt: skip


WRONG = (
    "python train.py lrr=1", "python train.py algo=kto batch_size=1", "python train.py -m lr=1e-4,abc",
    "accelerate launch train.py peft=lorra", "hydratune sweep stats", "hydratune merge RUN", "make nothing",
    "python bench/nothing.py", "python bench/offline.py sft --nothing", "python -m hydratune.nothing",
    "pip install 'hydratune[nothing]'", "wandb sweep sweeps/wandb/nothing.yaml", "nothing",
)  # fmt: skip


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_line_is_found(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "hydratune.run", types.SimpleNamespace(run=_check))
    assert understand(shlex.split(command))
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_shown_is_the_real_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = [
        (name, text) for name in NAMES for _, _, text in blocks(ROOT / name) if text.startswith("$ python")
    ]
    assert len(shown) > 1
    for name, text in shown:
        command, _, answer = text.partition("\n")
        entry.main(shlex.split(command)[3:])
        assert capsys.readouterr().err.strip() == answer.strip(), name


def _check(settings):
    """In the place of a run: `check=true` where model and data are here, else the rules on its values.

    A device, a package or a server that this machine lacks is no fault of the command.
    """
    model, data = settings.model, settings.data
    here = model.architecture or Path(str(model.name_or_path)).is_dir()
    here = here and data.source != "hub" and model.quantization is None
    try:
        check_settings(settings).raise_if_any()
        if here:
            few = replace(data, size=min(data.size, 64))
            real_run(replace(settings, check=True, data=few))
    except UserError as error:
        if not all(
            re.search("is not installed|there is one process|nothing answers there", v.why)
            for v in error.violations
        ):
            raise
    return 0.0


def understand(words: list[str]) -> str:
    """What is wrong with a command line, or nothing."""
    program = words[0]
    if program == "accelerate":
        words = ["python", *words[words.index("train.py") :]]
    if words[:2] == ["python", "train.py"] or program == "accelerate":
        return of_train(words[2:])
    if program == "hydratune":
        return of_cli(words[1:])
    if program == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        return done.stderr if done.returncode else ""
    if program == "python":
        return of_script(words[1:])
    if program == "pip":
        return of_pip(words)
    if words[:2] == ["wandb", "sweep"]:
        return "" if (ROOT / words[2]).is_file() else "there is no such file"
    if program == "source":
        return "" if words[1] == ".venv/bin/activate" else "is not what make makes"
    return "" if program in FOREIGN else "is understood by no rule of this test"


def of_train(words: list[str]) -> str:
    if "--help" in words:
        return "" if entry.main(words) == 0 else "failed"
    if "-m" not in words:
        expected = 2 if "trainer.max_grad_nrom=1" in words else 0  # the README's example of an error
        return "" if entry.main([w for w in words if w != "check=true"]) == expected else "failed"
    try:
        args = arguments(resumed(words))
        entry._register_resolvers({})
        entry._register_searches()
        check_command(rewrite(with_kept_search(args.overrides)), multirun=True, args=args)
    except UserError as error:
        return str(error)
    return ""


def of_cli(words: list[str]) -> str:
    """The words are parsed by the commands themselves, which do nothing."""
    from hydratune.cli import app

    command = typer.main.get_command(app)
    _idle(command)
    try:
        command.main(words, prog_name="hydratune", standalone_mode=False)
    except Exception as error:  # click's, of whichever copy typer uses
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return ""


def _idle(command) -> None:
    command.callback = lambda *args, **kwargs: None
    for inner in getattr(command, "commands", {}).values():
        _idle(inner)


def of_script(words: list[str]) -> str:
    """A script of the repository, and its options as its source declares them; or a module of ours."""
    if words[0] == "-m":
        return "" if importlib.util.find_spec(words[1]) else "there is no such module"
    path = ROOT / words[0]
    if not path.is_file():
        return "there is no such file"
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    added = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"]
    known = {a.value for c in added for a in c.args if isinstance(a, ast.Constant)}
    given = {w.partition("=")[0] for w in words[1:] if w.startswith("--")}
    return "" if given <= known else f"knows no {', '.join(sorted(given - known))}"


def of_pip(words: list[str]) -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
    missing = {e for group in asked for e in group.split(",")} - {*extras}
    return f"there is no extra {', '.join(missing)}" if missing else ""
