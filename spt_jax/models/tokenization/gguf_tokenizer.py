"""The tokenizer that a GGUF file's metadata describes, built with `tokenizers` alone.

Two of the format's model kinds: ``gpt2``, byte-level BPE with a named way of cutting text into words first, and
``llama``, sentencepiece's BPE (pieces with scores, bytes for what has no piece).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError, nearest
from spt_jax.models.tokenization.byte_level_bpe import SPLITS, byte_level_backend
from spt_jax.models.tokenization.sentencepiece_bpe import CONTROL, USER_DEFINED, sentencepiece_backend
from spt_jax.models.tokenization.special_tokens import NamedTokens, mark_special, rule_of, special_tokens
from spt_jax.models.tokenization.tokenizer import Tokenizer

_FIELD = "tokenizer.ggml."


def tokenizer_of_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer that `metadata` describes.

    Special tokens that the file does not name are those of its architecture
    (`spt_jax.models.tokenization.special_tokens`).

    Args:
        metadata: The fields of the file.
        where: The file, for messages.

    Raises:
        UserError: A model kind or a pre-tokenizer that is not supported, or a missing field.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in builders:
        raise UserError(
            f"{where}: tokenizer kind is {kind!r}, which is not supported; supported: {', '.join(builders)}"
        )
    tokens = _listed(metadata, "tokens", where)
    kinds = _listed(metadata, "token_type", where) if metadata.get(_FIELD + "token_type") else [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UserError(f"{where} describes {len(tokens)} tokens but {len(kinds)} token types; the file is damaged")
    try:
        backend: Backend = builders[kind](metadata, tokens, kinds, where)
    except UserError:
        raise
    except Exception as error:  # the Rust side raises nothing narrower
        raise UserError(f"{where}: its tokenizer cannot be built, so the file is damaged ({error})") from error
    ids = {token: number for number, token in enumerate(tokens)}
    rule = rule_of(str(metadata.get("general.architecture", "")), ids)
    special = special_tokens(_named(metadata, len(tokens), where), rule, ids, where)
    mark_special(backend, special)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special.bos_id,
        special.eos_id,
        special.pad_id,
        template if isinstance(template, str) and template else None,
        special.stop_ids,
        special.own_pad_id,
    )


def _listed(metadata: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = metadata.get(_FIELD + name)
    if value is None:
        raise UserError(f"{where} has no field {_FIELD + name!r}, so its tokenizer cannot be built")
    if not isinstance(value, list):
        raise UserError(f"{where}: {_FIELD + name} is no list, so its tokenizer cannot be built; the file is damaged")
    return value


def _named(metadata: Mapping[str, Any], num_tokens: int, where: str) -> NamedTokens:
    def token(name: str) -> int | None:
        field = f"{_FIELD}{name}_token_id"
        value = metadata.get(field)
        if value is not None and not (type(value) is int and 0 <= value < num_tokens):
            raise UserError(f"{where}: {field} is {value!r}, but the file has {num_tokens} tokens; the file is damaged")
        return value

    ends = (token(name) for name in ("eos", "eot", "eom"))
    return NamedTokens(
        bos_id=token("bos"),
        eos_id=token("eos"),
        pad_id=token("padding"),
        own_pad_id=token("padding"),
        stop_ids=tuple(end for end in ends if end is not None),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token"),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], where: str) -> Backend:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise UserError(
            f"{where}: pre-tokenizer is {name!r}, which is not supported; supported: {', '.join(SPLITS)}."
            f"{nearest(name, SPLITS)}"
        )
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _listed(metadata, "merges", where))]
    backend = byte_level_backend({token: number for number, token in enumerate(tokens)}, merges, name)
    typed = list(zip(tokens, kinds, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == USER_DEFINED])
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], where: str) -> Backend:
    scores = _listed(metadata, "scores", where)
    if len(scores) != len(tokens):
        raise UserError(f"{where} describes {len(tokens)} tokens but {len(scores)} scores; the file is damaged")
    return sentencepiece_backend(
        tokens,
        scores,
        kinds,
        unknown_id=metadata.get("tokenizer.ggml.unknown_token_id"),
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
