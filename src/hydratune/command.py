"""A command line before Hydra composes it: what it resumes, what it stands for, and what is wrong with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONF = Path(__file__).resolve().parents[2] / "conf"
SWEEPS = CONF.parent / "sweeps"
_PICKED_BY = {"model.name_or_path": "model=local", "data.path": "data=local", "data.name": "data=hub"}
_SAFE = re.compile(r"[\w./:@%+,=-]*")  # needs no quotes
_MOST_VALUES = 64  # of one swept key that are checked up front


def resumed(typed: list[str]) -> list[str]:
    """The command line of `resume=RUN`: the overrides that the run was started with, those given now after them.

    The run goes on in its own directory, and so does a sweep, which its study's name stands for as well. A directory
    that holds neither is left to the checks, which say so.

    Raises:
        UserError: a run is to go on with another algorithm, which would not even know its options.
    """
    given = next((a.partition("=")[2].strip("'\"") for a in typed if a.startswith("resume=")), "")
    run = Path(given).expanduser()
    if given and not run.exists() and (Path("outputs/sweeps") / given).is_dir():
        run = Path("outputs/sweeps") / given
    run = run.parent.parent if run.name.startswith("checkpoint-") else run
    if given and (command := run / "command.json").is_file():
        mine = {_key(a) for a in typed}
        begun = json.loads(command.read_text(encoding="utf-8"))
        before = [a for a in begun["arguments"] if _key(a) not in mine or a[:1] == "-"]
        before = [a for a in before if _key(a) not in ("output_dir", "check", "sweep.name")]
        now = [a for a in typed if _key(a) != "resume" and a not in ("-m", "--multirun")]
        named = (
            [] if "sweep.name" in mine or "name" not in begun else [f"sweep.name={text(begun['name'])}"]
        )  # also when its folder was renamed
        return [*before, f"output_dir={text(str(run))}", *named, *now]
    saved = run / ".hydra" / "overrides.yaml"
    if not given or not saved.is_file():
        return typed
    import yaml

    _require_same_algorithm(run, typed)
    mine = {_key(a) for a in typed}
    before = [o for o in yaml.safe_load(saved.read_text(encoding="utf-8")) or [] if _key(o) not in mine]
    before = [o for o in before if _key(o) not in ("output_dir", "resume", "check")]
    place = [] if "output_dir" in mine else [f"output_dir='{run}'"]
    return [*before, *place, *typed]


def _require_same_algorithm(run: Path, typed: list[str]) -> None:
    import yaml

    from hydratune.errors import UserError, Violation

    config = run / "config.yaml"
    saved = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {}
    had = (saved.get("algo") or {}).get("name")
    for asked in (a.partition("=")[2].strip("'\"") for a in typed if _key(a) in ("algo", "algo.name")):
        if had and asked != had:
            why = f"the run in {run} is of algo={had}, and its checkpoints are of no use to another"
            fix = f"leave it out; or start a new run from what it has learnt: model.name_or_path={run / 'model'}"
            raise UserError(Violation("algo", asked, why, fix))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def with_kept_search(overrides: list[str]) -> list[str]:
    """The overrides, with what `sweep=NAME` starts from before them and what it searches after them.

    A key that is set on the command line, to a value or to several, is left as it is there.
    """
    name = next((o.partition("=")[2] for o in overrides if o.startswith("sweep=")), "none")
    search, mine = kept_search(name), {_key(o) for o in overrides}
    before = [o for o in search.get("base") or [] if _key(o) not in mine]
    space = {k: v for k, v in (search.get("space") or {}).items() if k not in mine}
    return [*before, *overrides, *(f"{key}={as_values(values)}" for key, values in space.items())]


def as_values(values: Any) -> str:
    """Values of a search's file in the grammar of the command line: a list stands for its items."""
    return ",".join(text(v) for v in values) if isinstance(values, list) else str(values)


def without_secrets(typed: list[str]) -> list[str]:
    """The words of a command line with each token or password in this process's environment, and its name in its place.

    Whatever writes them down (Hydra, a study, command.sh) so holds no secret. Processes that are started from here inherit it;
    one that comes later has to be told again, and is told so.

    Raises:
        UserError: a secret inside a list or a {…}, or beside an interpolation, which has no place of its own.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from hydratune.errors import UserError, Violation
    from hydratune.secrets import hide_password, is_secret, names_variable, redact_override, variable_of

    made = []
    for word in typed:
        key = _key(word)
        if hide_password(word) == redact_override(word) or word.startswith("-") or names_variable(word):
            made.append(word)
            continue
        try:
            (parsed,) = OverridesParser.create().parse_overrides([word])
        except OverrideParseException:  # which the checks tell
            made.append(word)
            continue
        value = None if parsed.is_sweep_override() else parsed.value()
        if not is_secret(key) or isinstance(value, list | dict) or value is None:
            why = "holds a token or password among other values, where it would be written to disk"
            fix = "give it by itself, KEY.token=…, or from the environment: '${oc.env:NAME}'"
            raise UserError(Violation(key, "***", why, fix))
        if isinstance(value, str) and "${" in value:
            why = "holds text beside an interpolation, or as its default, which may be a token or password"
            fix = "give the token by itself, or only say where it is: '${oc.env:NAME}'"
            raise UserError(Violation(key, "***", why, fix))
        name = variable_of(key)
        os.environ[name] = value if isinstance(value, str) else word.partition("=")[2].strip()  # 1e5 as it is
        made.append(f"{word.partition('=')[0]}=${{oc.env:{name}}}")
    return made


def rewrite(overrides: list[str]) -> list[str]:
    """Overrides as Hydra shall see them.

    A declared field needs no `+`: fields of our groups are forced in, and judged by `parse`. Naming a model or data
    of one's own picks the entry for it, so that what the default entry sets for its small model does not stay.
    """
    from hydratune.config import SECTIONS, key_of

    picked = {key_of(o) for o in overrides}
    result = [
        f"++{o}" if o.partition(".")[0] in SECTIONS and "." in o.partition("=")[0] and "=" in o else o
        for o in overrides
    ]
    for override in overrides:
        entry, (key, _, value) = _PICKED_BY.get(key_of(override)), override.partition("=")
        group = entry.partition("=")[0] if entry else ""
        if entry and group not in picked and value not in ("", "null") and not key.startswith("~"):
            result.append(entry)
            picked.add(group)
    return result


def settings_of(overrides: list[str]) -> Any:
    """The `RunSettings` that `python train.py OVERRIDES` would have.

    Raises:
        UserError: they cannot be composed, or hold a value that is wrong.
    """
    from hydra import compose, initialize_config_dir

    from hydratune.config import parse

    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=rewrite(overrides), return_hydra_config=True)
    return parse(cfg, choices=dict(cfg.hydra.runtime.choices), overrides=overrides, conf=CONF)


_OTHER_ROWS = {"data", "data.source", "data.name", "data.subset", "data.path", "data.split"}


def read_run(run: Path, overrides: list[str]) -> tuple[Any, bool]:
    """The `RunSettings` of a run directory, its data changed by overrides.

    Returns:
        Them, and whether all rows shall be evaluated: the overrides name other rows than the run's, and do not say which
        of them are held out. They are the training rows of these settings.

    Raises:
        UserError: the directory holds no config, an override is wrong, or is not of the data.
    """
    import yaml
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from hydratune.config import SECTIONS, SHORTCUTS, key_of, misspelt_top_level, parse
    from hydratune.errors import UserError, Violation

    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, yaml.YAMLError, AssertionError):
        fault = Violation("config.yaml", str(file), "is not there, or cannot be read", "give a run directory")
        raise UserError(fault) from None
    keys = {key_of(o) for o in overrides}
    if others := sorted(k for k in keys if k.partition(".")[0] != "data"):
        why = "is the run's own, only its data can be changed here"
        fix = "leave it out, or train a run with it"
        raise UserError(
            Violation(key, None, why, fix)
            if key.partition(".")[0] in (*SECTIONS, *SHORTCUTS)
            else Violation(key, None, "there is no such key", misspelt_top_level(key))
            for key in others
        )
    if keys:
        own = {} if "data" in keys else config.get("data") or {}
        if keys & {"data.path", "data.name"}:  # which say where rows come from
            own = {k: v for k, v in own.items() if k != "source"}
        whole = [*(f"++data.{k}={text(v)}" for k, v in own.items()), *rewrite(overrides)]
        check_command(whole, multirun=False, args=arguments([]))
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            config["data"] = OmegaConf.to_container(compose("train", overrides=whole).data, resolve=True)
    config |= {"resume": None, "check": False}
    settings = parse(OmegaConf.create(config), output_dir=str(run))
    data = settings.data
    held_out = "data" in keys and (data.eval_path or data.eval_split)
    told = keys & {"data.eval_path", "data.eval_split", "data.eval_fraction"}
    every = bool(keys & _OTHER_ROWS) and not told and not held_out
    if every:
        data.eval_path, data.eval_split, data.eval_fraction = None, None, 0.0
        data.max_samples = data.max_eval_samples
    return settings, every


def group_names() -> list[str]:
    from hydratune.config import SECTIONS

    return [
        *SECTIONS,
        *sorted(f.name for f in CONF.iterdir() if f.is_dir() and f.name not in (*SECTIONS, "hydra")),
    ]


def entries(group: str) -> list[str]:
    if group == "sweep":
        return ["none", *sorted(p.stem for p in SWEEPS.glob("*.yaml"))]
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def kept_search(name: str) -> dict[str, Any]:
    """A search of `sweeps/`: the fields of `SweepSettings` that it sets."""
    import yaml

    path = SWEEPS / f"{name}.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def arguments(typed: list[str]) -> Any:
    """The command line as Hydra's own parser splits it.

    Raises:
        UserError: an option that does not exist.
    """
    from hydra._internal.utils import get_args_parser

    from hydratune.errors import UserError, Violation, nearest

    parser = get_args_parser()

    def refuse(text: str) -> None:
        bad = next(
            (a for a in typed if a.startswith("-") and a.split("=")[0] not in parser._option_string_actions),
            None,
        )
        known = [o for o in parser._option_string_actions if o.startswith("--")]
        fix = nearest(bad, known) if bad else "see --help"
        raise UserError(Violation(bad or "command line", None, text, fix))

    parser.error = refuse  # type: ignore[method-assign, assignment]
    args = parser.parse_args(typed)
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(
            Violation("--config-dir", args.config_dir, "there is no such folder", "give an existing one")
        )
    if args.multirun and args.cfg:
        raise UserError(Violation("--multirun", None, "cannot go with --cfg", "leave out one of them"))
    return args


def check_command(overrides: list[str], *, multirun: bool, args: Any) -> None:
    """Every override by itself, then what they compose to, for each value of a sweep.

    Raises:
        UserError: with all that is wrong.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from hydratune.checks import check_settings
    from hydratune.config import parse
    from hydratune.errors import UserError, Violation

    violations: list[Violation] = []
    good: list[list[str]] = []  # for each override, the single-valued ones that it stands for
    parser = OverridesParser.create()
    own_files = bool(args.config_dir or args.config_name)
    for text in overrides:
        try:
            (parsed,) = parser.parse_overrides([text])
        except OverrideParseException as error:
            violations.append(Violation(text.lstrip("+"), None, *explain(error)))
            continue
        wrong = list(_check_override(parsed, multirun=multirun, own_files=own_files))
        violations += wrong
        if not wrong:
            good.append(list(_single(parsed, text)))
    main, beside = CONF, Path(args.config_dir).resolve() if args.config_dir else None
    if beside is not None:
        if args.config_name and (beside / f"{args.config_name}.yaml").is_file():
            main, beside = beside, CONF  # the primary config is looked for in the first of them alone
        good.append([f"hydra.searchpath=[file://{beside}]"])
    first = [values[0] for values in good if values]
    variants = [first]
    for i, values in enumerate(values for values in good if values):
        variants += [[*first[:i], other, *first[i + 1 :]] for other in values[1:]]
    with initialize_config_dir(config_dir=str(main), version_base="1.3"):
        for variant in variants:
            try:
                cfg = compose(args.config_name or "train", overrides=variant, return_hydra_config=True)
                choices = dict(cfg.hydra.runtime.choices)
                if args.cfg is None:
                    settings = parse(cfg, choices=choices, overrides=variant, conf=CONF)
                    if multirun:  # a run checks itself; of a sweep, nothing shall start that cannot work
                        check_settings(settings).raise_if_any()
            except UserError as error:
                violations += error.violations
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                if not violations:
                    violations.append(Violation("command line", None, *explain(error)))
    if violations:
        raise UserError({str(v): v for v in violations}.values())


def _check_override(parsed: Any, *, multirun: bool, own_files: bool) -> Iterator[Any]:
    """What is wrong with one override by itself: its key, a group's entry, several values without -m."""
    from hydratune.config import SECTIONS, SHORTCUTS, misspelt_top_level
    from hydratune.errors import Violation, nearest

    key, groups = parsed.key_or_group, group_names()
    shown = parsed.get_value_string() if parsed.value_type is not None else None
    if key.partition(".")[0].partition("/")[0] == "hydra":
        return
    if key.partition(".")[0] == "sweep" and not multirun and shown != "none":
        yield Violation(key, shown, "is of a sweep, this is one run", "add -m")
        return
    if parsed.is_sweep_override() and not multirun:
        as_list = f"; a list is {key}=[{shown}]" if "." in key else ""
        yield Violation(
            key, shown, "has several values, one run takes one", f"add -m for one run each{as_list}"
        )
        return
    if key in groups:
        known = entries(key)
        if parsed.is_add():
            yield Violation(
                f"+{key}", shown, "this group has an entry already", f"leave out the +: {key}={shown}"
            )
        for entry in [] if own_files or parsed.is_delete() else _texts(parsed):
            if entry not in known:
                near = nearest(entry, known)
                also = "" if near.startswith("known") else f" (known: {', '.join(known)})"
                yield Violation(key, entry, f"there is no such entry in conf/{key}", near + also)
    elif key.partition(".")[0] not in (*SECTIONS, *SHORTCUTS) and not own_files:
        yield Violation(key, shown, "there is no such key", misspelt_top_level(key))


def _texts(parsed: Any) -> list[str]:
    """The values of an override as texts, one for each value of a sweep."""
    if not parsed.is_sweep_override():
        return [parsed.get_value_element_as_str().strip("'\"")]
    return [s.partition("=")[2].strip("'\"") for s in _single(parsed, "")]


def _single(parsed: Any, text: str) -> Iterator[str]:
    """An override as overrides with one value each: a sweep's values, an interval's two ends."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    if not parsed.is_sweep_override():
        yield text
        return
    key, value = parsed.get_key_element(), parsed.value()
    if isinstance(value, IntervalSweep):
        yield from (f"{key}={value.start}", f"{key}={value.end}")
    elif isinstance(value, Glob):
        yield from (f"{key}={name}" for name in value.filter(entries(parsed.key_or_group)))
    else:
        for i, one in enumerate(parsed.sweep_string_iterator()):
            if i < _MOST_VALUES:
                yield f"{key}={one}"


def explain(error: Exception) -> tuple[str, str]:
    """Why, and the way out, for an error of Hydra or OmegaConf."""
    from hydra.errors import MissingConfigException, OverrideParseException

    from hydratune.errors import nearest

    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return "is not KEY=VALUE", "write it as KEY=VALUE; --help lists the groups and keys"
        return (
            "cannot be read as KEY=VALUE",
            "one = between key and value; quote special characters twice: 'KEY=\"a, b=c\"'",
        )
    if isinstance(error, MissingConfigException):
        options = [str(o) for o in error.options or []]
        missing = str(error.missing_cfg_file or "")
        return " ".join(lines[:1]), nearest(
            missing.rpartition("/")[2], options
        ) if options else "check the name and --config-dir"
    return " ".join(lines[:2]) or type(error).__name__, "see --help for groups, keys and examples"


def text(value: Any) -> str:
    """A value as Hydra's grammar reads it back; a text is one of the grammar's already, or quoted by us."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(text(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
    word = str(value)
    if (_SAFE.fullmatch(word) and "," not in word and "=" not in word) or word[:1] in "'\"[{":
        return word
    # the grammar reads a backslash as one, but before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), word)
    return f"'{escaped}'"
