"""Text to token ids and back, behind one small interface."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Sequence

import tokenizers

from spt_jax.errors import UserError


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
        stop_ids: Every token that ends a generated text, `eos_id` first: a model may name several, and a chat model
            ends a turn and a text with different ones.
        own_pad_id: Padding as the tokenizer's own files or its family name it; None where they name none. `pad_id` may
            be the model's choice, or the end of sequence.
        lm_vocab_size: V of the LM, once `fitted` to one; None before.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    own_pad_id: int | None = None
    lm_vocab_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(dict.fromkeys((self.eos_id, *self.stop_ids))))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def text_vocab_size(self) -> int:
        """One more than the highest id that encoding a text can give; special tokens are never among them."""
        added = self.backend.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        return 1 + max(n for n in self.backend.get_vocab(with_added_tokens=True).values() if n not in special)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's spelling and id; those that the LM has no embedding for are left out."""
        added = self.backend.get_added_tokens_decoder()
        limit = self.vocab_size if self.lm_vocab_size is None else self.lm_vocab_size
        return {token.content: number for number, token in added.items() if token.special and number < limit}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary (every token and id) and of bos, eos and pad, in hexadecimal.

        What else ends a reply is left out: nothing is trained on it.
        """
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: (item[1], item[0]))
        content = json.dumps([vocabulary, self.bos_id, self.eos_id, self.pad_id], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def content_digest(self) -> str:
        """SHA-256 of all that rows of tokens depend on, merges and the cutting into words too; more than `fingerprint`.

        A checkpoint keeps the fingerprint, since a tokenizer that the same model got from other files still fits it.
        """
        ids = [self.bos_id, self.eos_id, self.pad_id, self.own_pad_id, self.lm_vocab_size, self.chat_template]
        return hashlib.sha256(f"{self.backend.to_str()}{json.dumps(ids)}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, no special token added; the texts are spread over the cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_specials(self, texts: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Token ids of texts that hold special tokens, as the backend itself would read them.

        What is text stays text, a special token's spelling included (as in `encode`); a word may run across strings.

        Args:
            texts: Each in parts: strings, and ids of `special_tokens`.

        Raises:
            UserError: An id that is no special token.
        """
        backend, spelled, numbers = self._with_secret_names
        unknown = next((n for parts in texts for n in parts if isinstance(n, int) and n not in spelled), None)
        if unknown is not None:
            raise UserError(f"token {unknown} is no special token of this tokenizer")
        joined = ["".join(spelled[part] if isinstance(part, int) else part for part in parts) for parts in texts]
        encodings = backend.encode_batch_fast(joined, add_special_tokens=False)
        return [[numbers.get(n, n) for n in encoding.ids] for encoding in encodings]

    @functools.cached_property
    def _with_secret_names(self) -> tuple[tokenizers.Tokenizer, dict[int, str], dict[int, int]]:
        """A backend that knows special tokens by names that no text can hold, the names by id, and its ids to ours.

        The names are drawn anew in every process, as the boundary of a MIME message is; no id depends on them.
        """
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder()
        name = secrets.token_hex(16)
        spelled = {number: f"<{name}:{number}>" for number in self.special_tokens.values()}
        backend.add_tokens(
            [
                tokenizers.AddedToken(spelled[n], normalized=False, lstrip=added[n].lstrip, rstrip=added[n].rstrip)
                for n in spelled
            ]
        )
        ours: dict[int, int] = {}
        for number, spelling in spelled.items():
            theirs = backend.token_to_id(spelling)
            assert theirs is not None
            ours[theirs] = number
        return backend, spelled, ours

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out, spaces as they were."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def fitted(self, vocab_size: int, where: str) -> Tokenizer:
        """This tokenizer for an LM whose embedding table has V = `vocab_size` rows.

        A larger table is padding: generation should choose among the first `self.vocab_size` ids alone. Special
        tokens beyond a smaller one are never met (Gemma 3's image token in a text-only model, a pad that somebody
        added): such a pad gives way to the end of sequence, such stops are left out.

        Args:
            vocab_size: The LM's V.
            where: The LM, for messages.

        Raises:
            UserError: Text, the bos or the eos would need an id that the LM does not have.
        """
        if self.text_vocab_size > vocab_size:
            raise UserError(
                f"{where}: the tokenizer has {self.text_vocab_size} tokens, but the LM's vocabulary holds "
                f"{vocab_size}; they do not belong together"
            )
        for name, token in {"bos": self.bos_id, "eos": self.eos_id}.items():
            if token is not None and not 0 <= token < vocab_size:
                raise UserError(
                    f"{where}: the tokenizer's {name} token is {token}; allowed: 0 to {vocab_size - 1}, "
                    "the LM's vocabulary"
                )
        return dataclasses.replace(
            self,
            pad_id=self.pad_id if 0 <= self.pad_id < vocab_size else self.eos_id,
            stop_ids=tuple(token for token in self.stop_ids if token < vocab_size),
            lm_vocab_size=vocab_size,
        )
