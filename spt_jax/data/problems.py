"""What happens to malformed data: it stops the reading, or is left out and counted."""

from __future__ import annotations

from spt_jax.errors import UserError, nearest

ON_ERROR = ("raise", "skip")


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
          UserError: something was malformed and `on_error` is "raise"; names the first place and how many more.
        """
        found = sorted(self._found)
        if found and self.on_error == "raise":
            line, reason = found[0]
            others = [str(number) for number, _ in found[1:]]
            more = ""
            if others:
                shown = ", ".join(others[:8]) + (", …" if len(others) > 8 else "")
                more = f"; {len(found)} problems in all, also at lines {shown}"
            raise UserError(f"{self.place(line)}: {reason}{more}; data.on_error='skip' leaves malformed lines out.")
        return tuple(f"{self.place(line)}: {reason}" for line, reason in found)
