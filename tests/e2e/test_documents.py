"""The documents say what is true: every command line is understood, the recipes run, what is named and linked exists.

A command in a fenced block that no rule here understands fails, so that none escapes. Words in capitals stand for files
and runs; they are replaced by real ones, which the README's recipes leave.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from hydratune import algos
from hydratune.checks import check_settings
from hydratune.command import arguments, check_command, entries, resumed, rewrite, with_kept_search
from hydratune.config import SECTIONS, key_of
from hydratune.errors import UserError
from hydratune.options import adapter_types, config_class, options_of
from hydratune.run import run as real_run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# those that tell users what to type; design and log also name parts of the code
GUIDES = [n for n in NAMES if n not in ("docs/design.md", "docs/log.md", "docs/options.md")]
SHELL = ("bash", "sh", "shell", "console")
FOREIGN = {"git", "cd", "vllm", "wandb", "source", "pip", "export"}  # programs of others, looked at below

_spec = importlib.util.spec_from_file_location("train_entry", ROOT / "train.py")
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)

# what makes a recipe small: keys that it sets are replaced
SMALL = {
    "data.size": 48, "data.eval_fraction": 0.2, "max_steps": 2, "batch_size": 8, "algo.num_generations": 4,
    "tracking": "none", "tracking.samples": 0,
}  # fmt: skip
ROWS = {
    "FILE.jsonl": [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(8)],
    "PAIRS.jsonl": [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": "no"} for i in range(8)],
    "LABELS.jsonl": [{"prompt": f"{i}?", "completion": f"{i}", "label": i % 2 == 0} for i in range(8)],
    "QUESTIONS.jsonl": [{"prompt": f"{i}?", "answer": i} for i in range(8)],
}


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """First line, language and text of every fenced block of a page."""
    fence: list[str] | None = None
    start, language = 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            if fence is None:
                fence, start, language = [], number + 1, line.strip().strip("`").split(" ")[0]
            else:
                yield start, language, "\n".join(fence)
                fence = None
        elif fence is not None:
            fence.append(line)
    assert fence is None, f"{page}: a block is not closed"


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """The command lines of a page: all lines of shell blocks, and those behind `$ ` in others; a block's variables put in."""
    for start, language, text in blocks(page):
        whole = ""
        variables: dict[str, str] = {}
        for offset, line in enumerate(text.splitlines()):
            shown = line.strip().startswith("$ ")
            if not whole and not shown and language not in SHELL:
                continue
            whole += line.strip().removeprefix("$ ")
            if whole.endswith("\\"):
                whole = whole[:-1]
            else:
                for name, value in variables.items():
                    whole = whole.replace(f"${name}", value)
                if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', whole):
                    variables[assigned[1]] = assigned[2]
                elif shlex.split(whole, comments=True):
                    yield start + offset, whole
                whole = ""


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
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRATUNE_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.syspath_prepend(str(folder))
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
        run_recipes()
        look_at_recipes(folder)
        yield folder


def run_recipes() -> None:
    """Run the README's recipes that are of built-in data (the others are marked `# or`), small."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, last = (
        text[: text.index(head)].count("\n") for head in ("## Five recipes", "## What a run leaves")
    )
    for line, command in commands(ROOT / "README.md"):
        words = shlex.split(command, comments=True)
        if not first < line < last or re.search(r"# or\b", command) or words[:2] != ["python", "train.py"]:
            continue
        if "-m" not in words:
            assert train.main(small(words[2:])) == 0, f"README.md:{line}: {command}"
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


def real(word: str) -> str:
    """A word with what stands in capitals replaced by what the recipes have left."""
    word = re.sub(r"outputs/\d{4}-[\w./-]+", "RUN", word)
    for name, path in (
        ("REWARD_RUN", "outputs/reward"), ("MERGED_MODEL", "merged"), ("RUN_DIRECTORY", "RUN"), ("BASE/model", "RUN/model"),
        ("DIR_OR_ID", "RUN/model"),
    ):  # fmt: skip
        word = word.replace(name, path)
    word = re.sub(r"(?<![\w/])DIR\b", "RUN/model", word)
    return re.sub(r"(?<![\w/.])RUN\b", "outputs/base", word)


def test_the_recipes_run_and_every_command_line_is_understood(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "hydratune.run", types.SimpleNamespace(run=_check))
    where = {command: f"{name}:{line}" for name in NAMES for line, command in commands(ROOT / name)}
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


WRONG = (
    "python train.py lrr=1", "python train.py algo=kto batch_size=1", "python train.py -m lr=1e-4,abc",
    "accelerate launch train.py peft=lorra", "hydratune sweep stats", "hydratune merge RUN", "make nothing",
    "python bench/nothing.py", "python bench/sft.py --nothing", "python -m hydratune.nothing",
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
        train.main(shlex.split(command)[3:])
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
        return "" if train.main(words) == 0 else "failed"
    if "-m" not in words:
        expected = 2 if "trainer.max_grad_nrom=1" in words else 0  # the README's example of an error
        return "" if train.main([w for w in words if w != "check=true"]) == expected else "failed"
    try:
        args = arguments(resumed(words))
        train._register_resolvers({})
        train._register_searches()
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


@pytest.mark.parametrize("name", NAMES)
def test_python_in_the_documents_is_python(name):
    for start, language, text in blocks(ROOT / name):
        if language in ("python", "py"):
            compile(text, f"{name}:{start}", "exec")


# ------------------------------------------------------------------ names


def known_options() -> dict[str, set[str]]:
    declared = {
        name: {*options_of(f"hydratune.settings:{name.title()}Settings")}
        for name in ("model", "data", "tracking", "sweep")
    }
    declared["trainer"] = {*options_of("transformers.training_args:TrainingArguments")}
    declared["algo"] = {"name"}
    for algo in algos.names():
        declared["algo"] |= {*options_of(config_class(f"hydratune.algos.{algo}", "BaseConfig"))}
    declared["peft"] = {"type"}
    for kind in adapter_types():
        found = config_class(f"peft.tuners.{kind}.config")
        declared["peft"] |= {*options_of(found)} if found else set()
    return declared


def test_every_option_that_is_named_exists():
    known = known_options()
    assert {"r", "lora_alpha", "target_modules", "modules_to_save"} <= known["peft"]
    wrong = []
    for name in GUIDES:
        text = re.sub(r"```python.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        for section, option in re.findall(
            r"(?<![\w./])(" + "|".join(SECTIONS) + r")\.([a-z_]\w*)(?![\w(./])", text
        ):
            if option not in {*known[section], "max_grad_nrom", "md", "yml", "yaml"}:
                wrong.append(f"{name}: {section}.{option}")
    assert not wrong


def test_every_entry_that_is_named_exists():
    groups = ("algo", "model", "data", "peft", "trainer", "tracking", "sweep")
    wrong = []
    for name in GUIDES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for group, named in re.findall(
            r"(?<![\w./])(" + "|".join(groups) + r")=([a-z][\w.]*(?:[,|][a-z][\w.]*)*)", text
        ):
            wrong += [
                f"{name}: {group}={e}"
                for e in re.split(r"[,|]", named)
                if e.rstrip(".") not in entries(group)
            ]
    assert not wrong


# ------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    outside = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_exist(name):
    page = ROOT / name
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name} links to {target}, a heading that is not there"
        if file.suffix == ".png":
            assert file.stat().st_size < 150_000, f"{target} is too large for a page"


# ------------------------------------------------------------------ site


def test_the_site_builds_strictly_and_asks_nothing_of_anyone(tmp_path):
    for module in ("mkdocs", "material", "latex2mathml"):
        pytest.importorskip(module, reason="the extra [docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 15
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", html), (
            page
        )
        assert "arithmatex" not in html, f"{page}: an equation was not read"
    assert (tmp_path / "site" / "algorithms" / "dpo.html").read_text(encoding="utf-8").count("<math") > 40
