"""Samplers and pruners by name, from settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from hydratune.errors import UserError, Violation, nearest

SAMPLERS = {
    "random": "RandomSampler",
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
    "qmc": "QMCSampler",
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "asha": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "patient": "PatientPruner",
    "wilcoxon": "WilcoxonPruner",
}
_NEEDS = {"gp": "scipy", "cmaes": "cmaes", "wilcoxon": "scipy"}


class SamplerFactory:
    """Makes the sampler of the next trial.

    The built-in samplers keep what they know in the study, so a new one is made for every trial with a seed of its
    own: a restarted sweep goes on with fresh draws in place of repeating its first ones. The low-discrepancy sequence
    of `qmc` needs one seed throughout, and of a sampler that someone else wrote one instance is kept.

    Raises:
        UserError: the options have a seed that is no whole number.
    """

    def __init__(self, name: str, options: Mapping[str, Any], seed: int):
        self.name, self._options = name, dict(options)
        given = self._options.pop("seed", None)
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            why = "is no whole number"
            raise UserError(Violation("sweep.sampler_options.seed", given, why, "give e.g. 0"))
        self._seed = seed if given is None else given  # each trial's sampler has one made from it
        self._kept: BaseSampler | None = None

    def make(self, n_trials: int) -> BaseSampler:
        """
        Args:
            n_trials: trials that the study has so far.
        """
        if self.name == "grid":
            return optuna.samplers.RandomSampler(seed=self._seed)  # never asked: every point is enqueued
        if self._kept is not None:
            return self._kept
        seed = self._seed if self.name == "qmc" else (self._seed * 1_000_003 + n_trials) % 2**32
        sampler = _make("sampler", self.name, SAMPLERS, self._options, optuna.samplers, BaseSampler, seed)
        if self.name not in SAMPLERS or self.name == "qmc":
            self._kept = sampler
        return sampler


def make_pruner(name: str, options: Mapping[str, Any]) -> BasePruner:
    """
    Raises:
        UserError: no such pruner, or options that it does not take.
    """
    given = dict(options)
    if name == "percentile":
        given.setdefault("percentile", 25.0)
    if name == "patient":
        given.setdefault("patience", 2)
        wrapped = given.pop("wrapped", None)
        inner = {k: given.pop(k) for k in list(given) if k not in ("patience", "min_delta")}
        given["wrapped_pruner"] = make_pruner(wrapped, inner) if wrapped else None
    return _make("pruner", name, PRUNERS, given, optuna.pruners, BasePruner, None)


def _make(
    kind: str,
    name: str,
    known: dict[str, str],
    options: dict[str, Any],
    module: Any,
    base: type,
    seed: int | None,
) -> Any:
    key = f"sweep.{kind}"
    if name in known:
        factory = getattr(module, known[name])
    elif "." in name:
        where, _, attribute = name.rpartition(".")
        try:
            factory = getattr(import_module(where), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                Violation(key, name, f"cannot be imported ({error})", "check the dotted path")
            ) from error
    else:
        extra = ["auto", "grid"] if kind == "sampler" else []
        raise UserError(Violation(key, name, f"there is no such {kind}", nearest(name, [*known, *extra])))
    if seed is not None and "seed" not in options and "seed" in inspect.signature(factory).parameters:
        options = {**options, "seed": seed}
    try:
        made = factory(**options)
    except ImportError as error:
        package = _NEEDS.get(name, str(error))
        raise UserError(
            Violation(key, name, f"needs the package {package}", f"pip install {package}")
        ) from error
    except (TypeError, ValueError) as error:
        takes = ", ".join(inspect.signature(factory).parameters)
        raise UserError(Violation(f"{key}_options", options, str(error), f"{name} takes: {takes}")) from error
    if not isinstance(made, base):
        raise UserError(
            Violation(key, name, f"is no Optuna {kind}", f"give a class below optuna.{kind}s.{base.__name__}")
        )
    return made
