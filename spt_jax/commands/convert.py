"""Brings trained runs in and out: the authors' checkpoints in, PEFT adapters out.

The first word says what is converted; behind it, --help shows more of that conversion.

Examples:
  spt-jax convert official their_run --model=facebook/opt-125m --workdir=runs/official
  spt-jax convert peft --workdir=runs/quickstart --out=adapters
"""

from __future__ import annotations

import importlib

from absl import flags

from spt_jax.errors import UserError, nearest

BRANCHES = ("official", "peft")
"""First words of this door; each has a module ``convert_{word}`` of its own with ``define_flags`` and ``run``."""


def branch_flags() -> dict[str, flags.FlagValues]:
    """Each conversion's own flags, under its first word."""
    found = {}
    for word in BRANCHES:
        found[word] = flags.FlagValues()
        importlib.import_module(f"spt_jax.commands.convert_{word}").define_flags(found[word])
    return found


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of every conversion, for those who list them; `spt_jax.commands.main` reads a branch's own."""
    for own in branch_flags().values():
        for name in own:
            if name not in flag_values:
                flag_values[name] = own[name]
                flag_values.register_flag_by_module(__name__, own[name])


def branch(word: str) -> str:
    """The conversion that a first word names.

    Raises:
        UserError: It names none.
    """
    if word in BRANCHES:
        return word
    what = "the first word says what is converted" if word.startswith("-") else f"there is no conversion {word!r}"
    raise UserError(f"{what}; allowed: {', '.join(BRANCHES)}.{nearest(word, BRANCHES)}")


def run(flag_values: flags.FlagValues) -> int:
    """Refuses, since `spt_jax.commands.main` runs the branches.

    Raises:
        UserError: The first word is missing.
    """
    del flag_values
    raise UserError(f"the first word, what is converted, is missing; allowed: {', '.join(BRANCHES)}")
