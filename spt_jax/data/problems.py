"""What happens to malformed data: it stops the reading, or is left out and counted."""

from __future__ import annotations

from spt_jax.errors import UserError, nearest

ON_ERROR = ("raise", "skip")


MOST_SHOWN = 100


class MalformedError(UserError):
    """One line or record does not follow its format; the message is the reason without the place."""


class Problems:
    """Collects "file:line: reason" for every malformed line of a source; raises at the end unless they may be skipped.

    Args:
      name: the source's name, as the user gave it.
      on_error: "raise" or "skip".

    Raises:
      UserError: `on_error` is neither.
    """

    def __init__(self, name: str, on_error: str) -> None:
        if on_error not in ON_ERROR:
            raise UserError(f"data.on_error is {on_error!r}, allowed are {ON_ERROR}.{nearest(on_error, ON_ERROR)}")
        self.name = name
        self.on_error = on_error
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, reason: str) -> None:
        """Notes that line (or record) number `line`, counted from 1, is malformed."""
        self._found.append((line, reason))

    def place(self, line: int) -> str:
        """The place "file:line" of a line."""
        return f"{self.name}:{line}"

    def finish(self) -> tuple[str, ...]:
        """One sentence for each malformed line, in the order of the lines.

        Raises:
          UserError: something was malformed and `on_error` is "raise"; a line for each, the first 100 of them.
        """
        found = sorted(self._found)
        if found and self.on_error == "raise":
            line, reason = found[0]
            advice = "data.on_error='skip', or --on_error=skip of evaluate and score, leaves malformed lines out."
            if len(found) == 1:
                raise UserError(f"{self.place(line)}: {reason}; {advice}")
            shown = [f"{self.place(line)}: {reason}" for line, reason in found[:MOST_SHOWN]]
            hidden = [f"and {len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
            raise UserError("\n".join([*shown, *hidden, f"{len(found)} problems in all; {advice}"]))
        return tuple(f"{self.place(line)}: {reason}" for line, reason in found)
