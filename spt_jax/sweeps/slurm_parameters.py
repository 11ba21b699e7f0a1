"""What ``--slurm=NAME=VALUE`` says, as parameters of submitit's executor."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def _read(text: str, value: str) -> Any:
    if value[:1] + value[-1:] not in ("[]", "{}"):
        return _scalar(value)
    try:
        # As texts: YAML's own rules take 4:00:00 for 14400, 0123 for 83 and off for False.
        read = yaml.load(value, yaml.BaseLoader)
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
