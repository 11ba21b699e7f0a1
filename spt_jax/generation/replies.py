"""From new tokens to a reply: their text before the first role marker, line break or stop string."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from spt_jax.data.template import PlainTemplate

_CUT_OFFICIAL = re.compile(r"R:|Q:|Summary:|\n|:")
# More text, of no white space alone: a reply that stays the same with it is over.
_SENTINEL = " \x00"


def cut_reply(text: str) -> str:
    """The reply in a generated text: everything before the first ``R:``, ``Q:``, ``Summary:`` or line break, stripped.

    A colon alone does not end a reply ("at 5:30" stays whole), and a marker inside a longer word ("FAQ:") is not one.
    Cutting is idempotent: a cut reply is cut no further.

    Args:
      text: What the LM generated after the inference prompt's last ``R:``.
    """
    return PlainTemplate().cut(text)


def cut_reply_official(text: str) -> str:
    """The reply as the authors' program cuts it: before the first match of ``R:|Q:|Summary:|\\n|:``, stripped.

    Any colon ends the reply ("at 5:30" becomes "at 5"); kept to reproduce published figures.

    Args:
      text: What the LM generated after the inference prompt's last ``R:``.
    """
    return _CUT_OFFICIAL.split(text, maxsplit=1)[0].strip()


@dataclasses.dataclass(frozen=True)
class ReplyText:
    """What a reply's tokens say, and when it is over.

    Attributes:
        decode: From ids to text, where more ids extend the text.
        cut: The reply in a generated text, stripped.
        stop: Texts that end a reply too; it does not contain them.
    """

    decode: Callable[[Sequence[int]], str]
    cut: Callable[[str], str] = cut_reply
    stop: tuple[str, ...] = ()

    def of(self, ids: Sequence[int]) -> str:
        """The reply in new tokens."""
        return self.reply(self.decode(ids))

    def reply(self, text: str) -> str:
        """The reply in a generated text."""
        return self.cut(
            text[: min((found for stop in self.stop if (found := text.find(stop)) >= 0), default=len(text))]
        )

    def over(self, text: str) -> bool:
        """Whether more text would change nothing: a marker or a stop string is in it."""
        return any(stop in text for stop in self.stop) or self.cut(text + _SENTINEL) == self.cut(text)

    @property
    def stopped(self) -> Callable[[Sequence[int]], bool] | None:
        """Whether new tokens hold a stop string, which ends a hypothesis of a beam search; None where there is none.

        Markers and line breaks, as in the authors' program, cut what a search found and do not end a hypothesis.
        """
        return self._stopped if self.stop else None

    def _stopped(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.stop)

    def ended(self, ids: Sequence[int]) -> bool:
        """As `over`, of new tokens: what `GenerationEngine.generate` asks."""
        return self.over(self.decode(ids))
