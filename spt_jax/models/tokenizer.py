"""Text to token ids and back: the tokenizer of a Hugging Face folder, behind one small interface."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
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


def tokenizer_of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, through transformers.

    A ``tokenizer.json`` is taken as it stands; without one, transformers builds the tokenizer from ``tokenizer.model``
    or ``vocab.json`` and ``merges.txt``. An end of sequence that the tokenizer does not name is taken from
    ``generation_config.json`` or ``config.json``.

    Raises:
        UserError: No tokenizer there, a damaged one, one without a fast form, or no end of sequence.
    """
    # transformers takes seconds to import; reading a GGUF file does without it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # With the class that a config names, transformers would rebuild parts of tokenizer.json by its own rules.
    kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the class differs from the one named
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises anything from OSError to pyo3's bare Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} holds no tokenizer that transformers can load: {reason}") from error
    finally:
        logger.setLevel(level)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: {type(loaded).__name__} has no fast form (tokenizer.json), which we need")
    eos_id = loaded.eos_token_id
    if eos_id is None:
        eos_id = _configured_eos(folder)
    template = loaded.chat_template
    return Tokenizer(
        backend=backend,
        bos_id=loaded.bos_token_id,
        eos_id=eos_id,
        pad_id=eos_id if loaded.pad_token_id is None else loaded.pad_token_id,
        chat_template=template if isinstance(template, str) else None,
    )


def _configured_eos(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            value = json.loads(file.read_text()).get("eos_token_id")
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None:
                return int(value)
    raise UserError(f"{folder}: neither the tokenizer nor config.json names an end-of-sequence token, which we need")
