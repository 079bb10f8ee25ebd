"""Declared options read from source text: names, types, defaults and help, without importing what declares them.

`transformers.TrainingArguments` alone takes seconds to import, a command line answers in well under one. So the
dataclasses are read with `ast`: fields of a class and of its bases, the type as written, enums as their values.
`convert` holds a value against such a type, with the conversions that OmegaConf would make.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Declared more narrowly than what the class takes: `fsdp=True` is transformers' own way to turn it on.
_WIDER = {"TrainingArguments.fsdp": "bool | str | None"}
_REEXPORTED = {"TrainingArguments": "transformers.training_args"}
_SCALARS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_CONTAINERS = {
    "list": list,
    "List": list,
    "Sequence": list,
    "tuple": list,
    "set": list,
    "dict": dict,
    "Dict": dict,
}


@dataclass(frozen=True)
class Option:
    """One field of a config class. `type` is an annotation as source text; `default` is None when it is computed."""

    name: str
    type: str
    default: Any
    help: str
    owner: str  # the class that declares it last


# ------------------------------------------------------------------ reading declarations


@cache
def package_folder(package: str) -> Path:
    """The folder of an importable top-level package, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package '{package}' is not installed", name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def _path(module: str) -> Path:
    top, *rest = module.split(".")
    path = package_folder(top).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _module(module: str) -> tuple[dict[str, ast.ClassDef], dict[str, str]]:
    """The classes that a module defines, and for each name imported at its top the module it comes from."""
    path = _path(module)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    classes, imported = {}, {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            for alias in node.names:
                imported[alias.asname or alias.name] = ".".join(filter(None, (base, node.module)))
    return classes, imported


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Where a class used in `module` is defined, followed through its imports."""
    for _ in range(4):
        classes, imported = _module(module)
        if name in classes:
            return module, classes[name]
        if (origin := _REEXPORTED.get(name) or imported.get(name)) is None or origin == module:
            return None
        if find_spec(origin.split(".")[0]) is None or not _path(origin).is_file():
            return None
        module = origin
    return None


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _EnumsAsLiterals(ast.NodeTransformer):
    """`SchedulerType | str` says less than it knows: an enum becomes the Literal of its values."""

    def __init__(self, module: str):
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in _SCALARS or node.id in _CONTAINERS or not node.id[:1].isupper():
            return node
        values = _enum_values(self.module, node.id)
        if not values:
            return node
        return ast.parse(f"Literal[{', '.join(map(repr, values))}]", mode="eval").body


@cache
def _enum_values(module: str, name: str) -> tuple[str, ...]:
    if not module.startswith("transformers.") or name in ("Any", "Optional", "Union", "Literal"):
        return ()
    found = _find(module, name)
    if found is None or not any("Enum" in _last_name(b) for b in found[1].bases):
        return ()
    assigned = [n.value for n in found[1].body if isinstance(n, ast.Assign)]
    return tuple(v.value for v in assigned if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _annotation(node: ast.expr, module: str, owner: str, name: str) -> str:
    if wider := _WIDER.get(f"{owner}.{name}"):
        return wider
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    text = ast.unparse(_EnumsAsLiterals(module).visit(ast.parse(ast.unparse(node), mode="eval").body))
    # `Enum | str` also takes text, but only the text of the enum's values
    return text.removesuffix(" | str") if text.startswith("Literal[") and text.endswith("] | str") else text


def _declaration(value: ast.expr | None) -> tuple[Any, str, bool]:
    """Default, help and whether the field can be passed, of `field(...)`, `option(...)` or a plain default."""
    if not isinstance(value, ast.Call):
        return _literal(value), "", True
    keywords = {k.arg: k.value for k in value.keywords if k.arg}
    help_text, default = "", keywords.get("default")
    if _last_name(value.func) == "option":
        default = value.args[0] if value.args else default
        help_text = str(_literal(value.args[1] if len(value.args) > 1 else keywords.get("help")) or "")
    elif isinstance(meta := keywords.get("metadata"), ast.Dict):
        pairs = zip(meta.keys, meta.values, strict=True)
        help_text = str(
            next((_literal(v) for k, v in pairs if k is not None and _literal(k) == "help"), "") or ""
        )
    return _literal(default), help_text, _literal(keywords.get("init")) is not False


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:  # a computed default, e.g. a name or a call
        return None


def _fields(module: str, node: ast.ClassDef) -> Iterator[Option]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        name = item.target.id
        default, help_text, settable = _declaration(item.value)
        if settable and not ast.unparse(item.annotation).startswith("ClassVar"):
            kind = _annotation(item.annotation, module, node.name, name)
            if (
                default is None
                and isinstance(item.value, ast.Call)
                and "None" not in kind
                and _defaults_to_none(item.value)
            ):
                kind += " | None"
            yield Option(name, kind, default, help_text, node.name)


def _defaults_to_none(call: ast.Call) -> bool:
    given = [k.value for k in call.keywords if k.arg == "default"] or call.args[:1]
    return any(isinstance(v, ast.Constant) and v.value is None for v in given)


@cache
def options_of(target: str) -> dict[str, Option]:
    """Every field of `"package.module:Class"`, those of its bases included, by name.

    Raises:
        LookupError: the module does not define (or import) that class.
    """
    module, _, name = target.partition(":")
    found = _find(module, name)
    if found is None:
        raise LookupError(f"no class {name} in {module}")
    module, node = found
    options: dict[str, Option] = {}
    for base in reversed(node.bases):
        if (origin := _find(module, _last_name(base))) is not None:
            options |= options_of(f"{origin[0]}:{origin[1].name}")
    for own in _fields(module, node):
        inherited = options.get(own.name)
        options[own.name] = replace(own, help=own.help or (inherited.help if inherited else ""))
    return options


def constant(module: str, name: str) -> Any:
    """The value of a literal that a module assigns at its top; None when there is none."""
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    found = (n.value for n in tree.body if isinstance(n, ast.Assign) and _last_name(n.targets[0]) == name)
    return _literal(next(found, None))


def config_class(module: str, base: str | None = None) -> str | None:
    """The `module:Class` of the config class in a module: its name ends in Config and it derives from `base`."""
    if not _path(module).is_file():
        return None
    for name, node in _module(module)[0].items():
        if name.endswith("Config") and (base is None or base in _ancestors(module, node)):
            return f"{module}:{name}"
    return None


def _ancestors(module: str, node: ast.ClassDef) -> set[str]:
    names = {_last_name(b) for b in node.bases}
    for name in tuple(names):
        if (found := _find(module, name)) is not None:
            names |= _ancestors(*found)
    return names


@cache
def adapter_types() -> tuple[str, ...]:
    """The adapters that the installed peft has: the folders of its tuners that hold a config."""
    folders = package_folder("peft").joinpath("tuners").iterdir()
    return tuple(sorted(f.name for f in folders if (f / "config.py").is_file() and f.name != "mixed"))


# ------------------------------------------------------------------ values against types


def convert(value: Any, annotation: str) -> Any:
    """The value as its declared type has it, e.g. '1e-4' as a float; unknown types take anything.

    Raises:
        ValueError: the value is not of that type; the message says which one is needed.
    """
    node = ast.parse(annotation, mode="eval").body
    exact = [member for member in _members(node) if _is_exactly(value, member)]
    for member in exact or _members(node):
        try:
            return _convert(value, member)
        except ValueError:
            continue
    raise ValueError(describe(annotation))


def describe(annotation: str) -> str:
    """What a value of this type is, for a message."""
    said: list[str] = []
    for member in _members(ast.parse(annotation, mode="eval").body):
        name = _last_name(member.value if isinstance(member, ast.Subscript) else member)
        if choices := _choices(member):
            said.append(
                ("one of " if len(choices) > 1 else "")
                + ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
            )
        elif name in _CONTAINERS:
            said.append("a list [a,b]" if _CONTAINERS[name] is list else "a mapping {a: b}")
        elif _is_none(member):
            said.append("null")
        else:
            said.append(_SCALARS.get(name, name))
    return " or ".join(dict.fromkeys(said))


def choices_of(annotation: str) -> list[str]:
    """The text values that a Literal (or a union with one) names."""
    members = _members(ast.parse(annotation, mode="eval").body)
    return [c for m in members for c in _choices(m) if isinstance(c, str)]


def _members(node: ast.expr) -> list[ast.expr]:
    """The alternatives of a union, however it is written."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _members(node.left) + _members(node.right)
    if isinstance(node, ast.Subscript) and _last_name(node.value) == "Optional":
        return [*_members(node.slice), ast.Constant(None)]
    if isinstance(node, ast.Subscript) and _last_name(node.value) == "Union":
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [m for p in parts for m in _members(p)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _members(ast.parse(node.value, mode="eval").body)
    return [node]


def _choices(node: ast.expr) -> list[Any]:
    if not (isinstance(node, ast.Subscript) and _last_name(node.value) == "Literal"):
        return []
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return [_literal(p) for p in parts]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_exactly(value: Any, node: ast.expr) -> bool:
    if value is None or _is_none(node):
        return value is None and _is_none(node)
    if choices := _choices(node):
        return any(c == value and type(c) is type(value) for c in choices)
    if isinstance(value, list | dict) and isinstance(node, ast.Subscript):
        try:
            _convert(value, node)
        except ValueError:
            return False
        return True
    name = _last_name(node.value if isinstance(node, ast.Subscript) else node)
    kind = _CONTAINERS.get(name, {"int": int, "float": float, "bool": bool, "str": str}.get(name))
    return kind is not None and type(value) is kind


def _convert(value: Any, node: ast.expr) -> Any:
    name = _last_name(node.value if isinstance(node, ast.Subscript) else node)
    if _is_none(node):
        return _expect(value is None, None)
    if choices := _choices(node):
        if isinstance(value, bool) and value not in choices:  # YAML 1.1 reads a bare `no` as false
            value = {False: ("no", "off"), True: ("yes", "on")}[value]
            return _expect(bool(found := [c for c in choices if c in value]), found[0] if found else None)
        found = [c for c in choices if str(c) == str(value)]
        if not found and any(_is_numbered(c, value) for c in choices):
            return value
        return _expect(bool(found), found[0] if found else None)
    if name in _CONTAINERS:
        return _container(value, node, _CONTAINERS[name])
    if name not in _SCALARS:
        return value  # a type that is not known here is judged by the class that takes it
    if isinstance(value, list | dict) or value is None:
        raise ValueError(name)
    conversions: dict[str, Callable[[Any], Any]] = {"int": _int, "float": _float, "bool": _bool, "str": str}
    return conversions[name](value)


def _is_numbered(choice: Any, value: Any) -> bool:
    """peft spells a family of names as 'pissa_niter_[number of iters]'."""
    head, bracket, _ = str(choice).partition("[")
    return bool(bracket) and str(value).startswith(head) and str(value)[len(head) :].isdigit()


def _container(value: Any, node: ast.expr, kind: type) -> Any:
    _expect(isinstance(value, kind), None)
    parts = node.slice if isinstance(node, ast.Subscript) else None
    inner = (
        [ast.unparse(e) for e in (parts.elts if isinstance(parts, ast.Tuple) else [parts])] if parts else []
    )
    if kind is dict:
        return (
            {convert(k, inner[0]): convert(v, inner[1]) for k, v in value.items()}
            if len(inner) == 2
            else value
        )
    if len(inner) == 1:
        return [convert(v, inner[0]) for v in value]
    return value


def _expect(holds: bool, value: Any) -> Any:
    if not holds:
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or (
        isinstance(value, float) and not (math.isfinite(value) and value.is_integer())
    ):
        raise ValueError("int")
    return int(value)


def _float(value: Any) -> float:
    _expect(not isinstance(value, bool), None)
    return float(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    return words[str(value).lower()] if str(value).lower() in words else _expect(False, None)
