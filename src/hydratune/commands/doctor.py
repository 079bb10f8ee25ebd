"""`hydratune doctor`: what is here, what is missing and how to get it, and what can therefore be trained."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hydratune import terminal
from hydratune.commands.common import clear
from hydratune.errors import UserError, Violation
from hydratune.runs import HOME

_PURPOSES = {
    "flash": "FlashAttention 2 kernels",
    "quant": "4-bit and 8-bit bases (peft=qlora), 8-bit optimizers",
    "postgres": "a sweep's storage in PostgreSQL",
    "slurm": "sweeps on SLURM",
    "ray": "sweeps on a Ray cluster",
    "dashboard": "the page of all runs and studies",
}
_NEEDS_CUDA = {"flash"}
_WIDTH = 20  # of names
_ANSWER = 10.0  # seconds that a server has


@dataclass
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok", "note" (optional, or slower), or "bad" (something cannot work).
        fix: how to get what is missing.
    """

    name: str
    level: str
    says: str
    fix: str = ""


@clear
def doctor(
    vllm_server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this vLLM server, too, what it serves and takes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say what is here, what is missing, and what can be trained.

    Exit code 1 when nothing can be. Example: `hydratune doctor`
    """
    if vllm_server is not None and not vllm_server.startswith(("http://", "https://")):
        fix = "give http://HOST:PORT"
        raise UserError(Violation("--vllm-server", vllm_server, "is no address of a server", fix))
    shown = None if as_json else Console()
    found: dict[str, list[Finding]] = {}
    for title, look in (
        ("packages", packages), ("optional packages", optional), ("devices", devices), ("attention", backends),
        ("algorithms", algorithms), ("adapters", adapters), ("completions of PPO and GRPO", lambda: sampling(vllm_server)),
        ("accounts", accounts), ("room", room),
    ):  # fmt: skip
        if shown is not None:
            terminal.say(shown, Text(title, style="bold"))
        found[title] = []
        try:
            for finding in look():
                found[title].append(finding)
                if shown is not None:
                    _show(shown, finding)  # at once: what comes next may have to import torch
        except Exception as error:  # a broken installation is what this is for: of a library, many kinds
            first = (str(error).splitlines() or [""])[0]
            says = f"cannot be told: {type(error).__name__}: {first}"
            found[title].append(Finding(title, "bad", says, "mend what it names, or: pip install -e ."))
            if shown is not None:
                _show(shown, found[title][-1])
    able = all(f.level != "bad" for f in found["packages"])
    able = able and any(f.level != "bad" for f in found["algorithms"])
    if shown is None:
        print(json.dumps({"able": able, **{k: [asdict(f) for f in v] for k, v in found.items()}}, indent=2))
    else:
        verdict = "training works here" if able else "training cannot work here: see ✗ above"
        terminal.say(shown, Text(verdict, style="green" if able else "red"))
    if not able:
        raise typer.Exit(1)


def _show(console: Console, finding: Finding) -> None:
    mark, style = {"ok": ("✓", "green"), "note": ("–", "yellow"), "bad": ("✗", "red")}[finding.level]
    line = Text.assemble("  ", (mark, style), f" {finding.name:<{_WIDTH}}", finding.says)
    terminal.say(console, line)
    if finding.fix:
        terminal.say(console, Text(f"    {'':<{_WIDTH}}→ {finding.fix}", style="dim"))


# ------------------------------------------------------------------ packages


def _required() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(text) for text in metadata.requires("hydratune") or []]
    except metadata.PackageNotFoundError:
        return []


def _extra(requirement: Any) -> str | None:
    """The extra that a requirement belongs to."""
    return next(
        (e for e in _PURPOSES if requirement.marker and requirement.marker.evaluate({"extra": e})), None
    )


def _held(requirement: Any) -> tuple[str | None, bool]:
    """The installed version, and whether it is in the range that we were tested with."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None, False
    return version, requirement.specifier.contains(version, prereleases=True)


def packages() -> list[Finding]:
    """What every run needs."""
    wanted = [r for r in _required() if r.marker is None or r.marker.evaluate({"extra": ""})]
    rows = []
    if not wanted:
        rows.append(
            Finding(
                "hydratune", "note", "is not installed as a package, ranges are unknown", "pip install -e ."
            )
        )
    python = platform.python_version()
    rows.append(
        Finding("python", "ok" if sys.version_info >= (3, 11) else "bad", f"{python}, needs 3.11 or newer")
    )
    for requirement in wanted:
        version, fits = _held(requirement)
        says = f"{version or 'missing'}, needs {requirement.specifier}"
        fix = "" if fits else f'pip install "{requirement.name}{requirement.specifier}"'
        rows.append(Finding(requirement.name, "ok" if fits else "bad", says, fix))
    return rows


def optional() -> list[Finding]:
    """What some runs need, by the extra that brings it."""
    rows = []
    for requirement in _required():
        extra = _extra(requirement)
        if extra is None:
            continue
        version, fits = _held(requirement)
        says = f"{version or 'missing'}: {_PURPOSES[extra]}"
        if version and not fits:
            says += f", needs {requirement.specifier}"
        fix = "" if fits else f'pip install "hydratune[{extra}]"'
        if not fits and extra in _NEEDS_CUDA:
            fix += " (of use with a CUDA GPU only)"
        rows.append(Finding(requirement.name, "ok" if fits else "note", says, fix))
    return rows


# ------------------------------------------------------------------ this machine


def devices() -> list[Finding]:
    """GPUs and the CPU, and in which precision they train."""
    import torch

    rows = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16 (fp16 or fp32)"
        says = f"{torch.cuda.get_device_name(i)}, {_gib(total)} ({_gib(free)} free), {bf16}"
        rows.append(Finding(f"cuda:{i}", "ok", says))
    if not rows:
        built = torch.version.cuda or torch.version.hip
        why = "torch sees none" if built else "this torch is built for the CPU alone"
        fix = (
            "check nvidia-smi and the driver"
            if built
            else "https://pytorch.org/get-started: a build for your GPU"
        )
        rows.append(Finding("gpu", "note", f"{why}: runs take the CPU, which is for small models", fix))
    rows.append(
        Finding("cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 and fp32")
    )
    return rows


def backends() -> list[Finding]:
    """The attention backends, and which of them `attn_implementation: auto` takes."""
    from transformers import LlamaConfig

    from hydratune import attention
    from hydratune.checks_model import device_facts

    kind = device_facts().kind
    chosen = {packed: attention.choose(kind, packed=packed, model=LlamaConfig()) for packed in (False, True)}
    rows = []
    for name, here in attention.available(kind).items():
        uses = [
            word for packed, word in ((False, "padded rows"), (True, "packed rows")) if chosen[packed] == name
        ]
        says = "works here" if here else "not here"
        if name == attention.NAME and kind == "cuda" and not attention.has_kernel():
            says = "works here, one sdpa call a document: this torch has no varlen kernel"
        rows.append(
            Finding(
                name,
                "ok" if here else "note",
                says + (f"; auto takes it for {' and '.join(uses)}" if uses else ""),
            )
        )
    return rows


def room() -> list[Finding]:
    """Memory, and disk space where runs and prepared data go."""
    from hydratune.data.cache import directory

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    rows = [Finding("memory", "ok", f"{_gib(total)}, {_gib(free)} unused")]
    for name, folder in (("runs", HOME.absolute()), ("prepared data", directory())):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        left = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        says = f"{folder}, {_gib(left)} free" + ("" if writable else ", cannot be written")
        rows.append(Finding(name, "ok" if writable and left > 2**30 else "note", says))
    return rows


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def accounts() -> list[Finding]:
    """Logins, whether there are any: no name and no key is read out."""
    from hydratune.tracking import has_login

    rows = []
    mode = os.environ.get("WANDB_MODE")
    if mode:
        rows.append(Finding("W&B", "ok", f"WANDB_MODE={mode}"))
    elif has_login():
        rows.append(Finding("W&B", "ok", "logged in: runs are recorded online"))
    else:
        rows.append(
            Finding("W&B", "note", "no login: runs are recorded offline", "wandb login, or tracking=none")
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    try:
        from huggingface_hub import get_token

        login = get_token() is not None
    except ImportError:
        login = False
    says = "HF_HUB_OFFLINE is set: only what was downloaded before" if offline else ""
    says = says or ("logged in" if login else "no login: public models and data only")
    rows.append(
        Finding(
            "hub", "ok" if login or offline else "note", says, "" if login or offline else "hf auth login"
        )
    )
    return rows


# ------------------------------------------------------------------ verdicts


def algorithms() -> Iterator[Finding]:
    """For each algorithm what `train.py` would say to it here."""
    from hydratune import algos

    yield from (_verdict(name, f"algo={name}") for name in algos.names())


def adapters() -> Iterator[Finding]:
    """The same for each adapter."""
    from hydratune.command import entries

    yield from (_verdict(name, f"peft={name}") for name in entries("peft"))


def _verdict(name: str, override: str) -> Finding:
    from hydratune import algos
    from hydratune.checks import check_settings
    from hydratune.checks_model import check_device, device_facts
    from hydratune.command import settings_of
    from hydratune.tracking import quiet_libraries

    quiet_libraries()
    device = device_facts()
    try:
        settings = settings_of([override, "tracking=none"])
        wrong = check_settings(settings).merge(check_device(settings, device)).errors
        algos.classes(settings.algo)
    except UserError as error:
        wrong = error.violations
    except ImportError as error:
        return Finding(name, "bad", f"cannot be imported: {error}", "pip install -e .")
    if wrong:
        return Finding(
            name, "bad", "; ".join(v.why for v in wrong), "; ".join(dict.fromkeys(v.fix for v in wrong))
        )
    where = "on the CPU, small models" if device.kind == "cpu" else f"on {device.count} × {device.name}"
    return Finding(name, "ok", f"ready, {where}")


def sampling(url: str | None) -> Iterator[Finding]:
    """What can complete prompts for PPO and GRPO: our sampler, and a vLLM server where its address is given."""
    from hydratune.vllm_server import KEY, START, Refused, VLLMServer

    yield Finding("own sampler", "ok", "works here, nothing else is needed")
    whole, adapter = (START[kind].format("MODEL") for kind in (False, True))
    if url is None:
        try:
            here = f"vllm {metadata.version('vllm')} is installed here"
        except metadata.PackageNotFoundError:
            here = "vllm is not installed here"
        fix = f"where there is a CUDA GPU: pip install vllm; {whole}; then {KEY}=URL, and --vllm-server URL here asks it"
        yield Finding("vLLM server", "note", f"optional; no address was given; {here}", fix)
        return
    name = f"vLLM {url}"
    try:
        served, takes_weights, takes_adapters = VLLMServer(
            url, timeout=_ANSWER, folder=Path(), adapter=False
        ).offers()
    except Refused as error:
        yield Finding(name, "bad", str(error), f"start it: {whole}; or leave {KEY} out")
        return
    takes = [word for word, can in (("whole weights", takes_weights), ("adapters", takes_adapters)) if can]
    says = f"serves {', '.join(served) or 'nothing'}, takes {' and '.join(takes) or 'no weights'}"
    missing = [how for how, can in ((whole, takes_weights), (adapter, takes_adapters)) if not can]
    fix = (
        f"for the other start it so: {missing[0]}"
        if takes and missing
        else ""
        if takes
        else f"start it so: {whole}"
    )
    yield Finding(name, "ok" if takes and served else "bad", says, fix)
