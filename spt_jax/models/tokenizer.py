"""Text to token ids and back, behind one small interface."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import tokenizers


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level or byte-falling-back BPE tokenizer with the ids that matter.

    Text is only ever text: the spelling of a special token inside a dialogue (``</s>``) is encoded letter by letter, so
    that no persona can end a row. Special tokens are added as ids by whoever builds rows.

    Attributes:
        backend: The `tokenizers` object that does the work.
        bos_id: Beginning of sequence; None where the LM has none.
        eos_id: End of sequence.
        pad_id: Padding; the end of sequence where the tokenizer names none (masks, not ids, mark padding).
        chat_template: The Jinja template of a chat model, where known.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary (every token and id) and of the special ids, in hexadecimal."""
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: (item[1], item[0]))
        content = json.dumps([vocabulary, self.bos_id, self.eos_id, self.pad_id], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, no special token added; the texts are spread over the cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out, spaces as they were."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)
