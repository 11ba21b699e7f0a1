"""The command ``spt-jax``: finds the door, reads its flags, and turns a user's mistake into one sentence."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from absl import flags

import spt_jax
from spt_jax.cache_folder import cache_home, drop_cut_short
from spt_jax.commands.failures import sentence_of
from spt_jax.commands.flag_reading import door_help, read_flags
from spt_jax.commands.terminal import OutputError, flushed, never_miss_an_interrupt, prepare_streams, unwritable
from spt_jax.errors import UserError, nearest
from spt_jax.exit_codes import TERMINATED
from spt_jax.user_paths import expanded

_PATHS = ("config", "workdir", "input", "out", "runs", "baseline")
"""Flags whose value is a path, of which no door reads ``~`` itself."""

DOORS = {
    "train": "train a bank of soft prompts and a retriever, or resume",
    "evaluate": "figures, predictions and a report on held-out dialogues",
    "compare": "runs side by side: one table, intervals, significance",
    "score": "likelihood and scores of every turn under every prompt",
    "chat": "talk with the trained model in the terminal",
    "generate": "replies to a file of conversations",
    "inspect": "what a model is and takes, from its metadata alone",
    "plan": "what a run takes on hardware that is not here",
    "convert": "authors' checkpoints and PEFT adapters, in and out",
}
_HELP = ("-h", "-help", "--help")


def overview() -> str:
    """The help of the command itself."""
    doors = "\n".join(f"  {name:<10}{text}" for name, text in DOORS.items())
    return (
        f"spt-jax {spt_jax.__version__}: Selective Prompt Tuning of a frozen LLM\n\n"
        f"Usage: spt-jax DOOR [flags]\n\nDoors:\n{doors}\n\nspt-jax DOOR --help shows a door's flags and examples."
    )


def _prepare_libraries() -> None:
    """Settings that every door shares: a persistent compilation cache, quiet libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    home = cache_home()
    if home is not None:  # an account without a home compiles anew each time
        compiled = home / "compiled"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
        # JAX writes a program in place: a kill leaves it cut short, and it is never written again while it is there.
        drop_cut_short(compiled)
        # A start compiles some sixty programs of a twentieth of a second each, which JAX would not keep.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Or another process reads it half written. Then it is compiled, and nobody need be told.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)


def _with_home(argument: str) -> str:
    """``--workdir=~/run`` as ``--workdir ~/run`` is read, of which a shell makes a path."""
    name, equals, value = argument.partition("=")
    if equals and name.lstrip("-") in _PATHS and value.startswith("~"):
        return f"{name}={expanded(value, name)}"
    return argument


def main(arguments: Sequence[str]) -> int:
    """Runs a door.

    Args:
        arguments: Those behind the command's name: a door, then its flags.

    Returns:
        The exit code, of `spt_jax.exit_codes`; standard error tells a user's mistake in one sentence.
    """
    try:
        return _through_the_door(list(arguments))
    except (BrokenPipeError, OutputError) as error:
        return unwritable(error)


def _through_the_door(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:3], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"spt-jax {spt_jax.__version__}")
        return 0
    door, rest = arguments[0], arguments[1:]
    name = f"spt-jax {door}" if door in DOORS else "spt-jax"
    try:
        if door not in DOORS:
            what = "the door comes first, then its flags" if door.startswith("-") else f"there is no door {door!r}"
            raise UserError(f"{what}; allowed: {', '.join(DOORS)}.{nearest(door, DOORS)}")
        rest = [_with_home(argument) for argument in rest]
        _prepare_libraries()
        module = importlib.import_module(f"spt_jax.commands.{door}")
        if hasattr(module, "branch") and rest[:1] and rest[0] not in _HELP:
            door, rest = f"{door} {module.branch(rest[0])}", rest[1:]
            name = f"spt-jax {door}"
            module = importlib.import_module(f"spt_jax.commands.{door.replace(' ', '_')}")
        flag_values = flags.FlagValues()
        module.define_flags(flag_values)
        if any(argument in _HELP for argument in rest):
            groups = {"Flags": flag_values}
            if hasattr(module, "branch_flags"):
                groups = {f"Flags of {door} {word}": own for word, own in module.branch_flags().items()}
            print(door_help(module.__doc__ or "", groups))
            return 0
        read_flags(door, flag_values, rest, **getattr(module, "ARGUMENTS", {}))
        return module.run(flag_values)
    except (UserError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        told = sentence_of(error)
        if told is None:
            raise
        sentence, code = told
        with contextlib.suppress(OSError):
            print("\n" * isinstance(error, KeyboardInterrupt) + f"{name}: {sentence}", file=sys.stderr)
        return code


def run() -> None:
    """The entry point of the installed command."""
    if os.getpid() == 1:
        # The first process of a container is spared by every signal that it does not handle.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(TERMINATED))
    never_miss_an_interrupt()
    prepare_streams()
    sys.exit(flushed(main(sys.argv[1:])))
