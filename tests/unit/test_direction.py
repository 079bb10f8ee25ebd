"""The direction of imports that docs/design.md promises, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hydratune import algos

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hydratune"
MODULES = sorted(p for p in SOURCE.rglob("*.py"))
LIGHT = [
    "settings",
    "errors",
    "options",
    "config",
    "command",
    "checks",
    "checks_model",
    "completions",
    "reward_sources",
    "rewards",
    "__init__",
]  # read before torch may be imported


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Modules that a file imports, anywhere or at its top level (outside `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(names: set[str]) -> set[str]:
    return {name.removeprefix("hydratune.") for name in names if name.startswith("hydratune.")}


@pytest.mark.parametrize("name", ["losses.py", "rl_losses.py"])
def test_losses_import_torch_alone(name):
    assert {module.split(".")[0] for module in imports(SOURCE / name)} <= {
        "torch",
        "__future__",
        "typing",
        "math",
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_config_and_the_command_line_see_hydra(path):
    if path.name not in ("config.py", "command.py"):
        assert not {n for n in imports(path) if n.split(".")[0] in ("hydra", "omegaconf")}


def test_algorithms_do_not_import_each_other():
    algorithms = {*algos.names()}
    for name in algorithms:
        used = {
            n.removeprefix("algos.")
            for n in own(imports(SOURCE / "algos" / f"{name}.py"))
            if n.startswith("algos.")
        }
        assert not used & (algorithms - {name})


def test_nothing_below_imports_run():
    for path in MODULES:
        if path.parent.name == "commands":  # which stand beside train.py
            continue
        assert "run" not in own(imports(path)), path


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_import_torch(name):
    heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "wandb", "optuna"}
    assert not {n.split(".")[0] for n in imports(SOURCE / f"{name}.py", top_only=True)} & heavy


def test_there_is_no_circle():
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {n for n in own(imports(path)) if n != name}

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        for other in graph[name] & graph.keys():
            walk(other, (*above, name))

    for name in graph:
        walk(name, ())


def test_no_file_is_too_long():
    assert not [
        p for p in [*MODULES, ROOT / "train.py"] if len(p.read_text(encoding="utf-8").splitlines()) > 500
    ]


def test_no_two_test_files_have_one_name():
    """pytest imports them by name, and leaves out the second."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert len(names) == len(set(names))
