"""A small tokenizer in whose tokens the authors' marks can be found."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from spt_jax.models.tokenization.byte_level_bpe import byte_level_backend
from spt_jax.models.tokenization.tokenizer import Tokenizer

BOS, EOS, PAD = 0, 1, 2


def small_tokenizer(pad_id: int = PAD, words: Sequence[str] = ("context", "given", "persona")) -> Tokenizer:
    """A byte-level BPE with a token of its own for each of `words`, with and without a space in front."""
    merges = []
    for word in words:
        merges += [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
    tokens = ["<s>", "</s>", "<pad>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = byte_level_backend({token: i for i, token in enumerate(tokens)}, merges, "gpt-2")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    return Tokenizer(backend, BOS, EOS, pad_id)
