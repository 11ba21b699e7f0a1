"""Parameters of submitit's executor: what ``--slurm=NAME=VALUE`` says, and what submitit does not see to itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from spt_jax.errors import UserError

_NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)


def read_parameters(given: Sequence[str]) -> dict[str, Any]:
    """Parameters by name, of texts ``NAME=VALUE``.

    A number is one where it would be written the same (``240``, ``7.5``, but not ``0123``), ``true`` and ``false`` are
    truth values, ``[…]`` is a list of texts, ``{…}`` a mapping; all else is text, as SLURM is to see it.

    Raises:
        UserError: A text has no name and value, a list or mapping cannot be read, or a time is not in minutes.
    """
    parameters = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--slurm={text} is not NAME=VALUE, as in --slurm=timeout_min=240")
        parameters[name] = _read(text, value)
        _check_time(text, name, parameters[name])
    return parameters


def with_srun_args(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with a list of what srun is told: how many CPUs its one task has, all that its job has.

    submitit tells sbatch alone, and since Slurm 22.05 srun does not take that over: where a cluster binds tasks by
    default a worker would have one CPU. What the user has srun told comes after, and wins; as one text it is split as a
    shell would.

    Args:
        parameters: Of `submitit.AutoExecutor`.
    """
    others = dict(parameters)
    own = [others.pop(name) for name in ("srun_args", "slurm_srun_args") if name in others]
    words = [word for given in own for word in (shlex.split(given) if isinstance(given, str) else given)]
    cpus = others.get("slurm_cpus_per_task", others.get("cpus_per_task"))
    if cpus is not None:
        words.insert(0, f"--cpus-per-task={cpus}")
    return others | ({"slurm_srun_args": words} if words else {})


def _read(text: str, value: str) -> Any:
    if value[:1] + value[-1:] not in ("[]", "{}"):
        return _scalar(value)
    try:
        # As texts, all that this loader makes: YAML's own rules take 4:00:00 for 14400, 0123 for 83 and off for False.
        read = yaml.BaseLoader(value).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"--slurm={text} is no list or mapping of YAML: {' '.join(str(error).split())}") from error
    if isinstance(read, dict):
        return {name: _scalar(inner) if isinstance(inner, str) else inner for name, inner in read.items()}
    return read


def _scalar(text: str) -> str | int | float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not _NUMBER.fullmatch(text):
        return text
    number = float(text) if "." in text else int(text)
    return number if str(number) == text else text


def _check_time(text: str, name: str, value: Any) -> None:
    """Refuses times of which submitit, which counts in minutes, could not tell whether they are over."""
    name = name.removeprefix("slurm_")
    if name == "time" or (name == "timeout_min" and type(value) is not int):
        raise UserError(f"--slurm={text}: give a job's time as whole minutes, as in --slurm=timeout_min=240")
