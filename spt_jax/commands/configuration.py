"""The flag --config: a config file with typed arguments, and ``--config.a.b=value`` over what it gives."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from spt_jax.commands.python_file import run_python_file, where_raised
from spt_jax.config import Config, default_config, flatten
from spt_jax.errors import UserError, nearest

EXAMPLE = "--config=configs/quickstart.py"
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
_OPTION = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_NAMES = ("evaluation.metrics", "lora.targets")
"""Options that list names, which have no comma; the texts of others may."""
_TRUTHS = ("true", "false", "t", "f", "yes", "no", "y", "n", "1", "0")


def attach_config(flag_values: flags.FlagValues, arguments: Sequence[str], *, file_needed: bool = True) -> list[str]:
    """Replaces the text flag --config by the config of the file it names, and defines the flags of the overrides.

    Args:
        flag_values: Has a flag ``config``; afterwards its value is the config, without the overrides until parsed.
        arguments: As the user typed them.
        file_needed: Whether --config must be given; else the defaults serve without it.

    Returns:
        The arguments left to parse: without --config, every override as ``--config.name=value``.

    Raises:
        UserError: The file cannot be used, or an override names no option.
    """
    rest = list(arguments)
    file: str | None = None
    left: list[str] = []
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            left += [argument, *rest]
            break
        if match := _FILE.fullmatch(argument):
            if file is not None:
                raise UserError("--config is given twice; give one config file, and overrides as --config.name=value")
            file = match.group(1) if match.group(1) is not None else _following(argument, rest)
        elif match := _OPTION.fullmatch(argument):
            left.append(_override(argument, match, rest))
        else:
            left.append(argument)
    if not file and (file_needed or file is not None):
        raise UserError(f"--config is missing; give a config file, such as {EXAMPLE}")
    config = load_config(file) if file else default_config()
    delattr(flag_values, "config")
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=["spt-jax", *left])
    return left


def _override(argument: str, match: re.Match[str], rest: list[str]) -> str:
    negated, name, value = match.groups()
    known = flatten(default_config())
    if name not in known:
        inside = [option for option in known if option.startswith(f"{name}.")]
        if inside:
            raise UserError(f"{name!r} is a section of the configuration; set its options, such as {inside[0]!r}")
        raise UserError(f"there is no option {name!r} in the configuration.{nearest(name, known)}")
    truth = isinstance(known[name], bool)
    if negated and (not truth or value is not None):
        raise UserError(f"{argument} is not allowed; write --config.{name}=value")
    if truth and value is None:
        spoken = not negated and rest and rest[0].lower() in _TRUTHS
        return f"--config.{name}={rest.pop(0) if spoken else str(not negated).lower()}"
    value = _following(argument, rest) if value is None else value
    return f"--config.{name}={_quoted(name, value) if isinstance(known[name], tuple) else value}"


def _quoted(name: str, value: str) -> str:
    """A value of a tuple: what is no Python literal is names with commas between them, or one text with whatever."""
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return repr(tuple(part.strip() for part in value.split(","))) if name in _NAMES else repr(value)
    return value


def _following(argument: str, rest: list[str]) -> str:
    if not rest or (rest[0].startswith("--") and not rest[0][2:3].isdigit()):
        raise UserError(f"{argument} needs a value, as in {argument}=value")
    return rest.pop(0)


def load_config(file: str) -> Config:
    """The config that ``get_config()`` of a Python file gives; ``FILE:TEXT`` calls ``get_config("TEXT")``.

    Raises:
        UserError: No such file, it does not run, it has no ``get_config``, or that gives no config.
    """
    path, _, text = file.partition(":")
    function = getattr(run_python_file(Path(path), "--config", "config file", EXAMPLE), "get_config", None)
    if not callable(function):
        raise UserError(f"{path} has no function get_config(), which gives the configuration")
    given = [text] if ":" in file else []
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        takes = f"an argument, as in --config={path}:TEXT" if not given else f"none, so write --config={path}"
        raise UserError(f"--config={file}: get_config() of this file takes {takes} ({error})") from error
    try:
        config = function(*given)
    except Exception as error:
        raise UserError(where_raised(Path(path), error, "config file")) from error
    if not isinstance(config, ConfigDict):
        kind = "nothing (is its return missing?)" if config is None else f"a {type(config).__name__}"
        raise UserError(f"get_config() of {path} returns {kind}; it must return a ConfigDict, as default_config() does")
    return config
