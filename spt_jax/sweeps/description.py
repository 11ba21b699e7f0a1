"""What a sweep file says: the base configuration, what varies, who chooses, and what is to be small or large."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, NopPruner

from spt_jax.commands.configuration import load_config
from spt_jax.commands.python_file import run_python_file, where_raised
from spt_jax.config import Config, default_config, flat_json, flatten, set_option, validate
from spt_jax.errors import UserError, nearest

SAMPLERS = ("grid", "random", "tpe")
_NOT_SWEPT = ("seed", "tracking.", "evaluation.")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The figure that a sweep makes small or large.

    Attributes:
        metric: A name of metrics.jsonl; or, with ``file = "results.json"``, a figure of the trained model (``f1``).
        direction: ``minimize`` or ``maximize``.
        file: ``metrics.jsonl``, written as a run goes, so that a pruner can judge it early; or ``results.json``, for
            which every run is evaluated when it ends.
        take: Of the values in metrics.jsonl the ``best``, as early selection takes it, or the ``last``.
    """

    metric: str = "development/perplexity"
    direction: Literal["minimize", "maximize"] = "minimize"
    file: Literal["metrics.jsonl", "results.json"] = "metrics.jsonl"
    take: Literal["best", "last"] = "best"

    def problems(self) -> list[str]:
        """A sentence for each field that cannot be used."""
        allowed = {
            "direction": ("minimize", "maximize"),
            "file": ("metrics.jsonl", "results.json"),
            "take": ("best", "last"),
        }
        return [
            f"objective.{name} is {getattr(self, name)!r}; allowed: {', '.join(values)}"
            for name, values in allowed.items()
            if getattr(self, name) not in values
        ]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, as ``get_sweep()`` of a sweep file gives it.

    Attributes:
        base: The config file, ``FILE`` or ``FILE:TEXT``; relative to the sweep file's folder.
        space: Optuna's distribution for each option that varies, by the option's name.
        sampler: ``grid`` (every combination), ``random`` or ``tpe``.
        num_trials: How many trials; 0, allowed for a grid alone, for every combination.
        objective: What is to be small or large.
        fixed: Options that the sweep sets for all trials, by name.
        pruner: Optuna's, fed with the objective of a trial's first seed; None lets every run finish.
        seeds: A trial is a run for each; its value is their mean.
        sampler_seed: Seed of what random and TPE draw.
    """

    base: str
    space: Mapping[str, BaseDistribution]
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    num_trials: int = 0
    objective: Objective = dataclasses.field(default_factory=Objective)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pruner: BasePruner | None = None
    seeds: tuple[int, ...] = (0,)
    sampler_seed: int = 0


def load_sweep(path: Path) -> Sweep:
    """The sweep that ``get_sweep()`` of a Python file gives, its fields checked one by one.

    Raises:
        UserError: No such file, it does not run, it gives no `Sweep`, or a field of that cannot be used.
    """
    function = getattr(run_python_file(path, "--sweep", "sweep file"), "get_sweep", None)
    if not callable(function):
        raise UserError(f"{path} has no function get_sweep(), which gives the sweep")
    try:
        sweep = function()
    except Exception as error:
        raise UserError(where_raised(path, error, "sweep file")) from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep() of {path} returns a {type(sweep).__name__}; it must return a spt_jax Sweep")
    if problems := _wrong_types(sweep) or _problems(sweep):
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    file, colon, text = sweep.base.partition(":")
    base = f"{(path.resolve().parent / file).resolve()}{colon}{text}"
    return dataclasses.replace(sweep, base=base, seeds=tuple(sweep.seeds))


def _wrong_types(sweep: Sweep) -> list[str]:
    """A sentence for each field that is none of its kind, of which nothing else can be said."""

    def named(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)

    def counts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    rules = {
        "base": (isinstance(sweep.base, str), "a config file, as text"),
        "space": (named(sweep.space), "a dictionary from names of options to distributions of Optuna's"),
        "fixed": (named(sweep.fixed), "a dictionary from names of options to their values"),
        "sampler": (isinstance(sweep.sampler, str), ", ".join(SAMPLERS)),
        "objective": (isinstance(sweep.objective, Objective), "an Objective, as Objective('f1', 'maximize')"),
        "objective.metric": (isinstance(getattr(sweep.objective, "metric", ""), str), "the name of a figure, as text"),
        "seeds": (
            isinstance(sweep.seeds, tuple | list | range) and all(map(counts, sweep.seeds)),
            "a tuple of whole numbers of 0 or more, as (0, 1, 2)",
        ),
        "sampler_seed": (counts(sweep.sampler_seed), "a whole number of 0 or more"),
    }
    return [
        f"{name} is {functools.reduce(getattr, name.split('.'), sweep)!r}; allowed: {allowed}"
        for name, (right, allowed) in rules.items()
        if not right
    ]


def _problems(sweep: Sweep) -> list[str]:
    known = flatten(default_config())
    problems = sweep.objective.problems()
    if sweep.sampler not in SAMPLERS:
        hint = nearest(sweep.sampler, SAMPLERS)
        problems.append(f"sampler is {sweep.sampler!r}; allowed: {', '.join(SAMPLERS)}.{hint}")
    if not sweep.space:
        problems.append("space is empty; it names at least one option of the configuration and its distribution")
    for name, distribution in sweep.space.items():
        if not isinstance(distribution, BaseDistribution):
            kind = type(distribution).__name__
            problems.append(f"space[{name!r}] is a {kind}; allowed: a distribution of optuna.distributions")
        if name in sweep.fixed:
            problems.append(f"{name!r} is both in space and in fixed; name it once")
    for name in (*sweep.space, *sweep.fixed):
        if name not in known:
            problems.append(f"there is no option {name!r} in the configuration.{nearest(name, known)}")
        elif name.startswith(_NOT_SWEPT) and name in sweep.space:
            problems.append(f"{name!r} cannot vary in a sweep: it does not change what is learned, or is in seeds")
    least = 0 if sweep.sampler == "grid" else 1
    if isinstance(sweep.num_trials, bool) or not isinstance(sweep.num_trials, int) or sweep.num_trials < least:
        problems.append(f"num_trials is {sweep.num_trials!r}; allowed for {sweep.sampler}: {least} or more")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        problems.append(f"seeds is {sweep.seeds!r}; allowed: one or more different whole numbers")
    if sweep.pruner is not None and not isinstance(sweep.pruner, BasePruner):
        problems.append(f"pruner is a {type(sweep.pruner).__name__}; allowed: a pruner of optuna.pruners, or None")
    if sweep.pruner is not None and sweep.objective.file != "metrics.jsonl":
        problems.append("a pruner needs an objective of metrics.jsonl, which is known before a run ends")
    return problems


def base_config(sweep: Sweep, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration that all trials share.

    Args:
        sweep: The sweep.
        overrides: Values by option's name, set after ``sweep.fixed``.

    Raises:
        UserError: The base cannot be used, or a value has another type than its option.
    """
    config = load_config(sweep.base)
    for name, value in (*sweep.fixed.items(), *(overrides or {}).items()):
        if name in sweep.space:
            raise UserError(f"{name!r} varies in this sweep; it cannot be set for all trials")
        set_option(config, name, value)
    validate(config)
    return config


def trial_config(base: Config, params: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run: `params` and a seed over the base.

    Raises:
        UserError: The values do not go together, by the configuration's own rules.
    """
    config = base.copy_and_resolve_references()
    for name, value in params.items():
        set_option(config, name, value)
    config.seed = seed
    validate(config)
    return config


def record(sweep: Sweep, base: Config) -> dict[str, Any]:
    """What makes a sweep this one and not another, as JSON values; the number of trials may grow, so it is left out."""
    from optuna.distributions import distribution_to_json

    return {
        "base": flat_json(base),
        "space": {name: distribution_to_json(distribution) for name, distribution in sweep.space.items()},
        "sampler": sweep.sampler,
        "sampler_seed": sweep.sampler_seed,
        "objective": dataclasses.asdict(sweep.objective),
        "pruner": _described(sweep.pruner or NopPruner()),
        "seeds": list(sweep.seeds),
    }


def _described(value: Any) -> Any:
    """An object of Optuna's as its class and fields; it has no description of its own."""
    if isinstance(value, BasePruner):
        return [type(value).__name__, {name: _described(field) for name, field in sorted(vars(value).items())}]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
