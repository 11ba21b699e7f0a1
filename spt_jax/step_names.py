"""Names of checkpoints: a step's number, as Orbax writes it."""

from __future__ import annotations

_LONGEST = 18  # digits; Python converts no text of thousands of them


def names_a_step(name: str) -> bool:
    """Whether it is a step's number as Orbax writes it: neither 007 nor the digits of other scripts."""
    return name.isdecimal() and len(name) <= _LONGEST and name == str(int(name))
