"""Where the rewards of online algorithms come from: functions, reward models, a verifier, and weighted mixes of them.

A reward gives each completion a number, or None where it does not apply; a completion's total is the weighted sum over
those that apply. Functions are called as the ecosystem's reward functions are: `fn(prompts=…, completions=…,
completion_ids=…, **columns) -> list[float | None]`, async ones too. Other than there, a completion to which no reward
applies, NaN and infinity end the run with a message that names the row, and do not become a silent 0.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TimedOut
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydratune.completions import Completions
from hydratune.errors import TrainingFailed, UserError, Violation
from hydratune.reward_sources import (
    CORRECT,
    check_sources,
    correct,
    function_of,
    is_model,
    is_path_of_function,
    lacks,
    listed,
    missing_parameters,
    name_of,
    taken,
    unique,
    weight_faults,
)

__all__ = ["Rewards", "Scored", "check_sources", "correct"]

if TYPE_CHECKING:
    import torch

_LARGEST = 3.4028234663852886e38  # of fp32


@dataclass
class Scored:
    """Rewards of B completions, fp32 on the device of `Rewards`.

    Attributes:
        total: [B], the weighted sums.
        each: by name, [B], NaN where a reward does not apply.
    """

    total: torch.Tensor
    each: dict[str, torch.Tensor]


class Rewards:
    """Rewards of a policy's completions.

    Args:
        sources: functions, dotted paths, reward models (directory, hub id or instance), `"correct"`; none: `"correct"`.
        policy_tokenizer: of the ids that will be scored.
        device: for reward models and results.
        weights: one a source; None: 1 each.
        tokenizers: one a source (instance, directory, hub id, or None: the model's own); unused for functions.
        token_budget: most tokens, padding included, of a reward model's forward pass; a longer sequence goes alone.
        dtype: of reward models that are loaded here; None: as saved.
        padding_free: reward models take sequences end to end; None: where their attention keeps them apart.
        timeout: seconds that async functions have for a call.
        key, weights_key: the options that sources and weights come from, for messages.

    Attributes:
        names: one a source, unique: of functions, and of models' directories.
        models: the reward models among the sources, by name.
        stop_tokens: what ends a completion; None: EOS.
        same_tokens: the names of those that read the policy's tokens.

    Raises:
        UserError: sources that cannot work.
    """

    def __init__(
        self,
        sources: Any = (),
        *,
        policy_tokenizer: Any,
        device: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        token_budget: int = 16384,
        dtype: Any = None,
        trust_remote_code: bool = False,
        padding_free: bool | None = None,
        timeout: float = 600.0,
        key: str = "algo.reward_funcs",
        weights_key: str = "algo.reward_weights",
    ) -> None:
        given = listed(sources)
        wrong = check_sources(given, columns=None, weights=weights, key=key, weights_key=weights_key)
        given = given or [CORRECT]
        own = [None] * len(given) if tokenizers is None else listed(tokenizers)
        if len(own) != len(given):
            why = f"{len(own)} tokenizers for {len(given)} rewards"
            wrong.append(Violation(key, None, why, "give one for each, None for functions"))
        if token_budget < 1:
            wrong.append(Violation("token_budget", token_budget, "holds no token", "give 1 or more"))
        if wrong:
            raise UserError(wrong)
        self.stop_tokens: tuple[int, ...] | None = None
        self.names = unique([name_of(source) for source in given])
        self.models: dict[str, Any] = {}
        self.same_tokens: list[str] = []
        self._functions: dict[str, Callable[..., Any]] = {}
        self._device, self._tokenizer, self._timeout, self._key = device, policy_tokenizer, timeout, key
        self._weights_key = weights_key
        self.weigh(weights)
        self._scorers: dict[str, Any] = {}
        for name, source, tokenizer in zip(self.names, given, own, strict=True):
            if is_model(source) or (isinstance(source, str) and not is_path_of_function(source)):
                from hydratune.reward_models import RewardModel

                self._scorers[name] = RewardModel(
                    source,
                    tokenizer,
                    policy_tokenizer=policy_tokenizer,
                    device=device,
                    dtype=dtype,
                    token_budget=token_budget,
                    trust_remote_code=trust_remote_code,
                    padding_free=padding_free,
                    key=key,
                )
                self.models[name] = self._scorers[name].model
                if self._scorers[name].shares_tokens:
                    self.same_tokens.append(name)
            else:
                self._functions[name] = function_of(source, key)

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Any],
        completion_ids: Sequence[Any],
        **also: Any,
    ) -> Scored:
        """Rewards of B completions.

        Args:
            rows: formatted rows, with `prompt` or `messages`, and with other columns; one a completion.
            prompt_ids, completion_ids: token ids without padding, B arrays each; a finished completion ends with EOS.
            also: further keyword arguments of functions, e.g. `trainer_state`.

        Raises:
            UserError: a function needs what the rows do not have.
            TrainingFailed: a reward fails, or gives no number, for rows that are named.
        """
        import torch

        batch = Completions(rows, prompt_ids, completion_ids, self._tokenizer, self.stop_tokens)
        found: dict[str, torch.Tensor] = {}
        begun: dict[str, Future[Any]] = {}
        if not len(batch):
            none = self._tensor([])
            return Scored(none, dict.fromkeys(self.names, none))
        try:
            for name, function in self._functions.items():
                result = self._call(name, function, batch, also)
                if isinstance(result, Future):
                    begun[name] = result
                else:
                    found[name] = self._tensor(_numbers(result, name, batch))
            for name, model in self._scorers.items():
                found[name] = model(batch, name)
            for name, future in begun.items():
                found[name] = self._tensor(_numbers(self._wait(name, future, batch), name, batch))
        finally:
            for future in begun.values():
                future.cancel()
        each = {name: found[name] for name in self.names}
        table = torch.stack([*each.values()])
        self._require_one(table, batch)
        total = (table.nan_to_num(nan=0.0) * self._weights[:, None]).sum(0)
        return Scored(total, each)

    def weigh(self, weights: Sequence[float] | None) -> None:
        """Add rewards up by these weights from now on; None: 1 each.

        Raises:
            UserError: they are not one finite number a reward, or all 0.
        """
        wrong = [] if weights is None else weight_faults(weights, len(self.names), self._weights_key)
        if wrong:
            raise UserError(wrong)
        self._weights = self._tensor([1.0] * len(self.names) if weights is None else [*weights])

    def _tensor(self, values: list[float]) -> torch.Tensor:
        import torch

        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _call(
        self, name: str, function: Callable[..., Any], batch: Completions, also: Mapping[str, Any]
    ) -> Any:
        """What a function returns; a future of it when that has to be awaited."""
        offered = {**batch.for_functions(), **also}
        if missing := missing_parameters(function, offered):
            raise UserError(lacks(name, missing, batch.columns, self._key))
        try:
            result = function(**taken(function, offered))
        except Exception as error:  # whatever the user's function raises
            raise _failed(name, batch, error) from error
        return _begin(result) if inspect.isawaitable(result) else result

    def _wait(self, name: str, future: Future[Any], batch: Completions) -> Any:
        try:
            return future.result(self._timeout)
        except TimedOut as error:
            if future.done():  # the function's own timeout
                raise _failed(name, batch, error) from error
            raise TrainingFailed(
                f"the reward function {name} gave nothing for {len(batch)} rows within {self._timeout:g} s: "
                "let it give up by itself and return None for what it could not judge"
            ) from error
        except Exception as error:
            raise _failed(name, batch, error) from error

    def _require_one(self, table: torch.Tensor, batch: Completions) -> None:
        bare = table.isnan().all(0).nonzero().flatten().tolist()
        if bare:
            hint = ""
            if CORRECT in self._functions and self._functions[CORRECT] is correct:
                hint = f" ('{CORRECT}' needs a whole number as answer: {batch.rows[bare[0]].get('answer')!r})"
            more = f", nor to {len(bare) - 1} others" if len(bare) > 1 else ""
            raise TrainingFailed(
                f"no reward applies to {batch.name(bare[0])}{more}: {', '.join(self.names)} gave None{hint}; add a reward "
                "that judges such rows, or remove them"
            )


# ------------------------------------------------------------------ functions


def _failed(name: str, batch: Completions, error: BaseException) -> TrainingFailed:
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return TrainingFailed(
        f"the reward function {name} failed on {len(batch)} rows ({said}): correct it, then resume"
    )


def _numbers(result: Any, name: str, batch: Completions) -> list[float]:
    """A function's result as B floats, NaN for None.

    Raises:
        TrainingFailed: it is no list of B finite numbers.
    """
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        what = f"a {type(result).__name__}, not a list"
    elif len(values) != len(batch):
        what = f"{len(values)} rewards for {len(batch)} rows"
    else:
        made = [_number(value) for value in values]
        bad = [i for i, value in enumerate(made) if value is None]
        if not bad:
            return [value for value in made if value is not None]
        value = values[bad[0]]
        kind = "" if isinstance(value, numbers.Real) else f", a {type(value).__name__}"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        what = f"{str(value)[:60]}{kind} for {batch.name(bad[0])}{more}"
    raise TrainingFailed(
        f"the reward function {name} returned {what}: it must return one finite number a row, "
        "None where it does not apply"
    )


def _number(value: Any) -> float | None:
    """As float, NaN for None; None when it is no finite number of fp32."""
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == ():
        value = value.item()  # a tensor's
    if not isinstance(value, numbers.Real):
        return None
    try:
        made = float(value)
    except OverflowError:
        return None
    return made if abs(made) <= _LARGEST else None


# One loop for all calls, in a thread of its own: it works where a loop runs already (notebooks), and what a function
# keeps between calls (a client's connections) stays bound to it. The thread ends with the process, and a forked process
# has none of its parent's threads, so each has its own.
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}


def _begin(awaitable: Any) -> Future[Any]:
    if os.getpid() not in _LOOPS:
        loop = _LOOPS[os.getpid()] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()

    async def wait() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(wait(), _LOOPS[os.getpid()])
