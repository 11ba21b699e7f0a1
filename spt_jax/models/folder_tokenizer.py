"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from spt_jax.errors import UserError
from spt_jax.models.sentencepiece_bpe import tokenizer_of_sentencepiece
from spt_jax.models.tokenizer import Tokenizer


def tokenizer_of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    A ``tokenizer.json`` is taken as it stands, through transformers; without one a ``tokenizer.model`` is read with
    sentencepiece, and anything else is left to transformers' own conversion. An end of sequence that the tokenizer does
    not name is taken from ``generation_config.json`` or ``config.json``.

    Raises:
        UserError: No tokenizer there, a damaged one, one without a fast form, or no end of sequence.
    """
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        return tokenizer_of_sentencepiece(folder / "tokenizer.model")
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
