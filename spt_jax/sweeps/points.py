"""Where a sweep's trials stand in the search space: each value a function of seeds, the trial's number and history."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.sweeps.description import Sweep, trial_config

MOST_POINTS = 10_000
"""A grid with more combinations is refused: no one means it."""


def grid(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination of the values of `space`, the last option varying fastest.

    Raises:
        UserError: An option has no finite list of values, or there are more than `MOST_POINTS` combinations.
    """
    values = {name: _values(name, distribution) for name, distribution in space.items()}
    if (count := math.prod(map(len, values.values()))) > MOST_POINTS:
        raise UserError(f"the grid has {count:,} combinations; allowed: at most {MOST_POINTS:,}")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _values(name: str, distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + index * distribution.step for index in range(count)]
    raise UserError(
        f"a grid cannot take {name!r} from {distribution}: it has no list of values; allowed: CategoricalDistribution, "
        "an IntDistribution without log, or a FloatDistribution with step"
    )


def num_trials(sweep: Sweep) -> int:
    """How many trials a sweep has.

    Raises:
        UserError: More are asked for than a grid has combinations.
    """
    if sweep.sampler != "grid":
        return sweep.num_trials
    count = len(grid(sweep.space))
    if sweep.num_trials > count:
        raise UserError(f"num_trials is {sweep.num_trials}, but the grid has {count} combinations; 0 takes them all")
    return sweep.num_trials or count


def check_space(sweep: Sweep, base: Config) -> None:
    """Checks what a sweep may try by the configuration's own rules, before anything runs.

    All points of a grid are checked; else every choice, and both ends of every range, with the others at the base's
    values. What only goes wrong together fails in its trial, with the same sentence.

    Raises:
        UserError: Names each value that is not allowed.
    """
    problems: list[str] = []
    for params in grid(sweep.space) if sweep.sampler == "grid" else _ends(sweep.space):
        try:
            trial_config(base, params, sweep.seeds[0])
        except UserError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise UserError("\n".join(f"the search space is not allowed: {problem}" for problem in problems))


def _ends(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    points = []
    for name, distribution in space.items():
        choices = getattr(distribution, "choices", None)
        ends = choices if choices is not None else (getattr(distribution, "low"), getattr(distribution, "high"))  # noqa: B009
        points += [{name: value} for value in ends]
    return points


def suggest(sweep: Sweep, study: optuna.Study, trial: optuna.Trial) -> dict[str, Any]:
    """The values of a trial, kept in the storage; those that it has already are not drawn again.

    The draw of an option is a function of the sweep's seed, the trial's number, the option's place in the space and,
    for TPE, the other trials in the storage at that moment: a trial that was interrupted between two draws goes on
    with what it would have drawn.

    Args:
        sweep: The sweep.
        study: Its study; its sampler is replaced.
        trial: A running trial of the study.
    """
    point = grid(sweep.space)[trial.number] if sweep.sampler == "grid" else {}
    params = {}
    for place, (name, distribution) in enumerate(sweep.space.items()):
        study.sampler = _sampler(sweep, trial.number, place, point)
        params[name] = _drawn(trial, name, distribution)
    return params


def _sampler(sweep: Sweep, number: int, place: int, point: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence([sweep.sampler_seed, number, place]).generate_state(1)[0])
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=False)
    return _Point(point) if point else optuna.samplers.RandomSampler(seed=seed)


class _Point(optuna.samplers.RandomSampler):
    """Gives the values of one point of a grid."""

    def __init__(self, point: Mapping[str, Any]) -> None:
        super().__init__()
        self._point = point

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The point's value of an option."""
        return self._point[param_name]


def _drawn(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_float(name, low, high, step=distribution.step, log=distribution.log)
    raise UserError(f"{name!r} has a {type(distribution).__name__}; allowed: Categorical, Float or IntDistribution")
