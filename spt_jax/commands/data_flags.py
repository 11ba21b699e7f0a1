"""What the doors that measure a run may say of how dialogues are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:  # --help does not wait for it
    from spt_jax.config import Config


def define_on_error(flag_values: flags.FlagValues) -> None:
    """Adds ``--on_error``."""
    text = "A malformed line of the dialogues: raise, or skip (told on standard error). Else the run's data.on_error."
    flags.DEFINE_enum("on_error", None, ["raise", "skip"], text, flag_values=flag_values)


def reading_of(config: Config, given: Mapping[str, Any]) -> Config:
    """A run's configuration as the dialogues are read that it is measured on; what it learned from is read as ever."""
    reading = config.copy_and_resolve_references()
    if given["on_error"] is not None:
        reading.data.on_error = given["on_error"]
    return reading
