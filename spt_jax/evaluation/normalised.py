"""ParlAI's normalisation of texts before their words are compared."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")  # the 32 marks of ASCII, as ParlAI lists them
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, the words a, an, the removed."""
    return _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
