"""Text of an LM or of a file, as a terminal may show it."""

from __future__ import annotations

import unicodedata

_STEERING = ("Cc", "Cs")
"""Unicode's categories of control characters and of half surrogate pairs."""
_TURNING = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
"""Unicode's bidirectional classes of characters that turn round what follows."""


def shown(text: str) -> str:
    """Without control characters but line breaks, and without what turns round text: nobody must steer the terminal."""
    return "".join(
        character if character == "\n" else " " if character.isspace() else character
        for character in text
        if character.isspace() or not _steers(character)
    )


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _STEERING or unicodedata.bidirectional(character) in _TURNING


def shown_line(text: str) -> str:
    """The same on one line."""
    return " ".join(shown(text).split())


def typed(text: str) -> str:
    """What was typed or given as a flag; bytes outside UTF-8 come as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
