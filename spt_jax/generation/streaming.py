"""A reply's text while it is being generated: nothing is shown that the finished reply would not contain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from spt_jax.generation.replies import ReplyText

_LAST_WORD = re.compile(r"\S*\Z")
# Longer than the longest role marker, "Summary:"; text without spaces (Chinese, a link) still flows.
_LONGEST_TAIL = 12


def _settled(text: str, stop: tuple[str, ...]) -> str:
    """What later tokens cannot turn into part of a role marker, of a stop string or of another character.

    Incomplete UTF-8 decodes to replacement characters at the end; a role marker holds no space, so one in the making
    lies within the last word.
    """
    text = text.rstrip("\ufffd")
    last_word = _LAST_WORD.search(text)
    assert last_word is not None
    settled = max(last_word.start(), len(text) - _LONGEST_TAIL)
    for ending in stop:
        begun = next((n for n in range(min(len(ending), len(text)), 0, -1) if text.endswith(ending[:n])), 0)
        settled = min(settled, len(text) - begun)
    return text[:settled]


class ReplyStream:
    """Turns token ids into pieces of text whose sum is the cut reply.

    ``"".join(stream)`` equals ``reply.of(ids)``, and once the reply is cut no further token is asked for. Words come
    whole: the last word, and a character whose bytes are not complete, is held back until what follows settles it.

    Args:
        ids: The tokens, as they are chosen.
        reply: Reads and cuts them.

    Attributes:
        text: What has been given out so far.
    """

    def __init__(self, ids: Iterable[int], reply: ReplyText) -> None:
        self.text = ""
        self._ids = ids
        self._reply = reply

    def __iter__(self) -> Iterator[str]:
        seen: list[int] = []
        text = ""
        for token in self._ids:
            seen.append(token)
            text = self._reply.decode(seen)
            if self._reply.over(text):
                break
            yield from self._grown(self._reply.reply(_settled(text, self._reply.stop)))
        yield from self._grown(self._reply.reply(text))

    def _grown(self, visible: str) -> Iterator[str]:
        # What was shown stays: text that a decoder revised is waited for.
        if visible.startswith(self.text) and len(visible) > len(self.text):
            piece = visible[len(self.text) :]
            self.text = visible
            yield piece
