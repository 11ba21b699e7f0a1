"""A reply's text while it is being generated: nothing is shown that the finished reply would not contain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from spt_jax.generation.replies import cut_reply

_LAST_WORD = re.compile(r"\S*\Z")
# Longer than the longest role marker, "Summary:"; text without spaces (Chinese, a link) still flows.
_LONGEST_TAIL = 12
# A word no tokenizer gives: whether it survives a cut says whether the text before it was cut.
_SENTINEL = " \x00"


def _settled(text: str) -> str:
    """What later tokens cannot turn into part of a role marker or of another character.

    Incomplete UTF-8 decodes to replacement characters at the end; a role marker holds no space, so one in the making
    lies within the last word.
    """
    text = text.rstrip("\ufffd")
    last_word = _LAST_WORD.search(text)
    assert last_word is not None
    return text[: max(last_word.start(), len(text) - _LONGEST_TAIL)]


class ReplyStream:
    """Turns token ids into pieces of text whose sum is the cut reply.

    ``"".join(stream)`` equals ``cut(decode(ids))``, and once the reply is cut no further token is asked for. Words come
    whole: the last word, and a character whose bytes are not complete, is held back until what follows settles it.

    Args:
        ids: The tokens, as they are chosen.
        decode: From all ids so far to their text, where more ids extend the text.
        cut: Ends a reply, `spt_jax.generation.replies.cut_reply` by default.

    Attributes:
        text: What has been given out so far.
    """

    def __init__(
        self, ids: Iterable[int], decode: Callable[[Sequence[int]], str], cut: Callable[[str], str] = cut_reply
    ) -> None:
        self.text = ""
        self._ids = ids
        self._decode = decode
        self._cut = cut

    def __iter__(self) -> Iterator[str]:
        seen: list[int] = []
        text = ""
        for token in self._ids:
            seen.append(token)
            text = self._decode(seen)
            if not self._cut(text + _SENTINEL).endswith(_SENTINEL.strip()):
                break
            yield from self._grown(self._cut(_settled(text)))
        yield from self._grown(self._cut(text))

    def _grown(self, visible: str) -> Iterator[str]:
        # What was shown stays: text that a decoder revised is waited for.
        if visible.startswith(self.text) and len(visible) > len(self.text):
            piece = visible[len(self.text) :]
            self.text = visible
            yield piece
