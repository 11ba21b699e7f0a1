"""The tokenizer that a GGUF file's metadata describes, built with `tokenizers` alone.

Two of the format's model kinds: ``gpt2``, byte-level BPE with a named way of cutting text into words first, and
``llama``, sentencepiece's BPE (pieces with scores, bytes for what has no piece).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError, nearest
from spt_jax.models.sentencepiece_bpe import sentencepiece_backend
from spt_jax.models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}"

# Each expression cuts what the one before left, as llama.cpp does for the same name (src/llama-vocab.cpp).
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not merged up from bytes
_UNICODE_COMPOSED = ("qwen2",)


def tokenizer_of_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer that `metadata` describes.

    Args:
        metadata: The fields of the file.
        where: The file, for messages.

    Raises:
        UserError: A model kind or a pre-tokenizer that is not supported, or a missing field.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in builders:
        raise UserError(
            f"{where}: tokenizer kind is {kind!r}, which is not supported; supported: {', '.join(builders)}"
        )
    tokens = _field(metadata, "tokens", where)
    try:
        backend: Backend = builders[kind](metadata, tokens, where)
    except UserError:
        raise
    except Exception as error:  # the Rust side raises nothing narrower
        raise UserError(f"{where}: its tokenizer cannot be built, so the file is damaged ({error})") from error
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UserError(f"{where} describes {len(tokens)} tokens but {len(kinds)} token types; the file is damaged")
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    )
    eos_id = int(_field(metadata, "eos_token_id", where))
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    pad_id = metadata.get("tokenizer.ggml.padding_token_id", eos_id)
    return Tokenizer(backend, bos_id, eos_id, int(pad_id), metadata.get("tokenizer.chat_template"))


def _field(metadata: Mapping[str, Any], name: str, where: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise UserError(f"{where} has no field 'tokenizer.ggml.{name}', so its tokenizer cannot be built")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], where: str) -> Backend:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise UserError(
            f"{where}: pre-tokenizer is {name!r}, which is not supported; supported: {', '.join(_SPLITS)}."
            f"{nearest(name, _SPLITS)}"
        )
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _field(metadata, "merges", where))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    if name in _UNICODE_COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _SPLITS[name]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], where: str) -> Backend:
    scores = _field(metadata, "scores", where)
    if len(scores) != len(tokens):
        raise UserError(f"{where} describes {len(tokens)} tokens but {len(scores)} scores; the file is damaged")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_backend(tokens, scores, unknown_id=unknown, add_space_prefix=prefix)
