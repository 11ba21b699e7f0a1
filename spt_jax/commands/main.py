"""The command ``spt-jax``: finds the door, reads its flags, and turns a user's mistake into one sentence."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import spt_jax
from spt_jax.config import default_config, flatten
from spt_jax.errors import UserError, nearest

DOORS = {
    "train": "train a bank of prompts and a retriever, or resume",
    "evaluate": "figures, predictions and a report on held-out dialogues",
    "score": "likelihood and scores of every turn under every prompt",
    "chat": "talk with the trained model in the terminal",
    "generate": "replies to a file of contexts",
}


def overview() -> str:
    """The help of the command itself."""
    doors = "\n".join(f"  {name:<10}{text}" for name, text in DOORS.items())
    return (
        f"spt-jax {spt_jax.__version__}: Selective Prompt Tuning of a frozen LLM\n\n"
        f"Usage: spt-jax DOOR [flags]\n\nDoors:\n{doors}\n\nspt-jax DOOR --help shows a door's flags and examples."
    )


def _parse(door: str, flag_values: flags.FlagValues, arguments: Sequence[str]) -> None:
    try:
        rest = flag_values([f"spt-jax {door}", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise UserError(f"there is no flag --{name} for {door}.{_nearest_flag(name, flag_values)}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_flag_sentence(door, flag_values, arguments, error)) from error
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag of {door}; flags are written --name=value")


def _nearest_flag(name: str, flag_values: flags.FlagValues) -> str:
    if name.startswith("config."):
        return nearest(name, ["config." + option for option in flatten(default_config())])
    hint = nearest(name, list(flag_values))
    return hint.replace("'", "--", 1).replace("'", "", 1)


def _flag_sentence(door: str, flag_values: flags.FlagValues, arguments: Sequence[str], error: BaseException) -> str:
    """One sentence for whatever absl or ml_collections raised."""
    known = flatten(default_config())
    for argument in arguments:
        match = re.fullmatch(r"--config\.([^=]+)(=(.*))?", argument, re.DOTALL)
        if not match:
            continue
        name, value = match.group(1), match.group(3)
        if name not in known:
            return f"there is no option {name!r} in the configuration.{nearest(name, known)}"
        if isinstance(error, flags.IllegalFlagValueError | TypeError) and name in str(error):
            return f"--config.{name}={value} is not allowed; it takes a value of type {type(known[name]).__name__}"
    return " ".join(str(error).split()) or type(error).__name__


def _prepare_jax() -> None:
    """Settings that every door shares: a persistent compilation cache, quiet libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_home / "spt_jax" / "compiled"))


def main(arguments: Sequence[str]) -> int:
    """Runs a door; returns the exit code: 0, or 2 after a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(spt_jax.__version__)
        return 0
    door, rest = arguments[0], arguments[1:]
    try:
        if door not in DOORS:
            raise UserError(f"there is no door {door!r}; allowed: {', '.join(DOORS)}.{nearest(door, DOORS)}")
        _prepare_jax()
        module = importlib.import_module(f"spt_jax.commands.{door}")
        flag_values = flags.FlagValues()
        module.define_flags(flag_values)
        if any(argument in ("-h", "--help", "-help") for argument in rest):
            print(
                f"{(module.__doc__ or '').strip()}\n\nFlags:\n{flag_values.main_module_help() or flag_values.get_help()}"
            )
            return 0
        _parse(door, flag_values, rest)
        return module.run(flag_values)
    except UserError as error:
        print(f"spt-jax {door}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; nothing more can be said to it
        return 1


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main(sys.argv[1:]))
