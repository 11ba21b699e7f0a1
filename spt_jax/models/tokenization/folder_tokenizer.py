"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError
from spt_jax.json_text import json_object
from spt_jax.models.tokenization.byte_level_bpe import byte_level_backend
from spt_jax.models.tokenization.sentencepiece_bpe import read_sentencepiece
from spt_jax.models.tokenization.special_tokens import (
    SPECIAL_TOKEN_RULES,
    NamedTokens,
    mark_special,
    rule_of,
    special_tokens,
)
from spt_jax.models.tokenization.tokenizer import Tokenizer


def tokenizer_of_folder(folder: Path, model_type: str = "") -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    A ``tokenizer.json`` is taken as it stands, through transformers. Without one a ``tokenizer.model`` is read with
    sentencepiece, and the ``vocab.json`` and ``merges.txt`` of a family that has no more than these (OPT) become a
    byte-level BPE; anything else is left to transformers' own conversion. Special tokens are those that
    ``tokenizer_config.json``, ``special_tokens_map.json``, the tokenizer itself, ``generation_config.json`` and
    ``config.json`` name, in this order; what they leave out is the family's
    (`spt_jax.models.tokenization.special_tokens`).

    Args:
        folder: Where the files are.
        model_type: The family, as in ``config.json``; empty: what the folder's own ``config.json`` says.

    Raises:
        UserError: No tokenizer there, a damaged one, one without a fast form, or no end of sequence.
    """
    config = _json(folder / "config.json")
    model_type = model_type or str(config.get("model_type") or "")
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    chat_template = _chat_template(folder, settings)
    own = NamedTokens()
    bare = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    split = next((rule.split for rule in SPECIAL_TOKEN_RULES if model_type in rule.model_types), None)
    if (folder / "tokenizer.json").is_file():
        backend, _ = _through_transformers(folder)
    elif (folder / "tokenizer.model").is_file():
        backend, own = read_sentencepiece(folder / "tokenizer.model")
    elif bare and split is not None:
        backend = _bare_byte_level(folder, split, settings.get("added_tokens_decoder") or {})
    elif bare and not model_type and not settings:
        raise UserError(
            f"{folder} holds vocab.json and merges.txt alone, which do not say what model they belong to; "
            "put its config.json beside them"
        )
    else:
        backend, own = _through_transformers(folder)
    ids = backend.get_vocab(with_added_tokens=True)
    rule = rule_of(model_type, ids)
    named = _named(settings, own, _json(folder / "generation_config.json"), config, ids, folder)
    special = special_tokens(named, rule, ids, str(folder))
    mark_special(backend, special)
    return Tokenizer(
        backend,
        special.bos_id,
        special.eos_id,
        special.pad_id,
        chat_template,
        special.stop_ids,
        special.own_pad_id,
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    return json_object(path) if path.is_file() else {}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The folder's Jinja template for chats: a file of its own wins over a field; of several the one named default.

    Raises:
        UserError: The file is not UTF-8 text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text, so its chat template cannot be read") from error
    template: Any = _json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def _through_transformers(folder: Path) -> tuple[Backend, NamedTokens]:
    # transformers takes seconds to import; reading a GGUF file does without it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # With the class that a config names, transformers would rebuild parts of tokenizer.json by its own rules.
    kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the class differs from the one named
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from OSError to pyo3's bare Exception
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} holds no tokenizer that transformers can load: {reason}") from error
    finally:
        logger.setLevel(level)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: {type(loaded).__name__} has no fast form (tokenizer.json), which we need")
    if len(loaded) <= len(loaded.all_special_tokens):
        # From settings alone transformers makes a tokenizer of special tokens that can spell nothing.
        raise UserError(f"{folder} holds no tokenizer: its settings are there, but no tokenizer.json or vocabulary")
    own = NamedTokens(loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    return backend, own


def _bare_byte_level(folder: Path, split: str, added: Any) -> Backend:
    """transformers 5 would give such files GPT-2's special tokens, whatever model they belong to."""
    try:
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        backend = byte_level_backend(vocabulary, merges, split)
    except Exception as error:  # the Rust side raises nothing narrower
        raise UserError(f"{folder}: vocab.json and merges.txt do not make a tokenizer ({error})") from error
    settings = folder / "tokenizer_config.json"
    for number, token in _numbered(added, settings):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise UserError(
                f"{settings}: the added token {token.content!r} has id {number}, which does not follow the "
                f"{len(vocabulary)} tokens of vocab.json"
            )
    return backend


def _numbered(added: Any, settings: Path) -> list[tuple[int, AddedToken]]:
    """The tokens of ``added_tokens_decoder`` with their ids, ascending."""
    if not isinstance(added, dict):
        raise UserError(f"{settings}: added_tokens_decoder is a {type(added).__name__}; expected an object")
    found = []
    for number, token in added.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch(r"\d{1,9}", number) or not isinstance(content, str):
            raise UserError(
                f"{settings}: added_tokens_decoder has {number[:40]!r}: {str(token)[:40]}; expected an id, and an "
                "object with its text as 'content'"
            )
        found.append((int(number), AddedToken(content, normalized=False, special=bool(token.get("special")))))
    return sorted(found, key=lambda one: one[0])


def _named(
    settings: Mapping[str, Any],
    own: NamedTokens,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
    folder: Path,
) -> NamedTokens:
    """What the folder's files say, each more than the next; an id beyond the vocabulary says nothing."""
    text_config = config.get("text_config")
    configs = (generation, config, text_config if isinstance(text_config, dict) else {})
    highest = max(ids.values(), default=-1)

    def listed(fields: Mapping[str, Any], role: str) -> list[int]:
        value = fields.get(f"{role}_token_id")
        values = value if isinstance(value, list) else [value]
        return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= highest]

    def token(role: str, own_id: int | None, elsewhere: bool = True) -> int | None:
        spelled = settings.get(f"{role}_token")
        spelled = spelled.get("content") if isinstance(spelled, dict) else spelled
        if isinstance(spelled, str):
            if spelled in ids:
                return ids[spelled]
            if role != "pad":
                raise UserError(f"{folder}: its {role} token is {spelled!r}, which its vocabulary does not have")
        if own_id is not None:
            return own_id
        return next((number for fields in configs for number in listed(fields, role) if elsewhere), None)

    without_bos = "bos_token" in settings and settings["bos_token"] is None
    add_bos = settings.get("add_bos_token")
    return NamedTokens(
        bos_id=None if without_bos else token("bos", own.bos_id),
        eos_id=token("eos", own.eos_id),
        pad_id=token("pad", own.pad_id),
        stop_ids=tuple(next((ends for fields in configs if (ends := listed(fields, "eos"))), [])),
        without_bos=without_bos,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        own_pad_id=token("pad", own.pad_id, elsewhere=False),
    )
