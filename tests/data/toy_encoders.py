"""Encoders of a few lines that stand in for tokenizers: two whose tokens never cross a space, one whose tokens do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer


class CharacterEncoder:
    """A token a character: every prefix of a text is a prefix of its tokens."""

    bos_id: int | None = 0
    eos_id = 1
    pad_id = 2

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) + 3 for character in text] for text in texts]


class NoBosEncoder(CharacterEncoder):
    bos_id = None


class WordEncoder(CharacterEncoder):
    """A token a word, numbered by first appearance."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.vocabulary.setdefault(word, len(self.vocabulary) + 3) for word in t.split(" ")] for t in texts]


class MergingEncoder(CharacterEncoder):
    """Cuts texts into pieces of `size` characters, so that a longer text changes the last token of a shorter one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.vocabulary: dict[str, int] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [
                self.vocabulary.setdefault(text[i : i + self.size], len(self.vocabulary) + 3)
                for i in range(0, len(text), self.size)
            ]
            for text in texts
        ]


class FastEncoder:
    """A tokenizer of the tokenizers library as a TextEncoder."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int | None, eos_id: int, pad_id: int) -> None:
        self.tokenizer: Any = tokenizer
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
