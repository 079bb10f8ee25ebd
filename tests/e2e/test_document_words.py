"""What the documents name exists: options, entries, headings, pictures; their Python is Python, and they build as a site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from documents import NAMES, blocks

from hydratune import algos
from hydratune.command import entries
from hydratune.config import SECTIONS
from hydratune.options import adapter_types, config_class, options_of

# those that tell users what to type; design and log also name parts of the code
GUIDES = [n for n in NAMES if n not in ("docs/design.md", "docs/log.md", "docs/options.md")]


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
