"""The errors a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from spt_jax.exit_codes import MISTAKE


class UserError(ValueError):
    """A mistake in the user's input, told in one sentence: what was wrong, where, and what is allowed.

    The command line prints the message alone and exits with `exit_code`; library users may catch it as a ValueError.
    """

    exit_code = MISTAKE


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint ``" Did you mean 'x'?"`` for the allowed name nearest to `name`, or an empty string when none is near."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
