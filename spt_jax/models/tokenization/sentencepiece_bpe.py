"""Sentencepiece's BPE (pieces with scores, bytes for what has no piece) as a `tokenizers` backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError
from spt_jax.models.tokenization.special_tokens import NamedTokens

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of pieces, by sentencepiece's and GGUF's numbers; 2 is unknown, 6 a byte."""

_PROBE = "a  ﬁ "  # two spaces, a ligature and a space at the end: any normalisation would change one
_SPACE = "▁"


def sentencepiece_backend(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    unknown_id: int | None,
    add_space_prefix: bool,
) -> Backend:
    """Builds the backend of a BPE sentencepiece model without text normalisation, such as Llama 2's or Gemma's.

    User-defined pieces are found in the text before anything is joined. Those made of spaces are the exception: they
    are joined first of all instead, which is how transformers' Gemma tokenizers read them; the two ways differ on
    runs of spaces longer than the longest piece alone (Gemma: 31). As in transformers, a text goes on behind a
    user-defined piece with a space prefix of its own, where the model has one.

    Args:
        pieces: Every piece; its place is its id.
        scores: Every piece's score; a higher one is joined first.
        kinds: Every piece's kind, such as `NORMAL`.
        unknown_id: The piece for what even bytes cannot spell.
        add_space_prefix: Whether a text is encoded as if a space stood before it.
    """
    # GGUF files spell runs of spaces with spaces, sentencepiece models with their own sign for one.
    blank = [kind == USER_DEFINED and not p.strip(f" {_SPACE}") for p, kind in zip(pieces, kinds, strict=True)]
    spelled = [_SPACE * len(p) if is_blank else p for p, is_blank in zip(pieces, blank, strict=True)]
    joined = [is_blank or kind in (NORMAL, UNUSED) for is_blank, kind in zip(blank, kinds, strict=True)]
    order = sorted((i for i, join in enumerate(joined) if join), key=lambda i: (not blank[i], -scores[i], i))
    backend = Backend(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(spelled)},
            merges=_merges({spelled[i]: i for i in order}),
            unk_token=None if unknown_id is None else spelled[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [
        AddedToken(p, normalized=False, special=True) for p, k in zip(pieces, kinds, strict=True) if k == CONTROL
    ]
    backend.add_special_tokens(special)
    whole = [p for p, k, join in zip(pieces, kinds, joined, strict=True) if k == USER_DEFINED and not join]
    backend.add_tokens([AddedToken(p, normalized=False) for p in whole])
    return backend


def read_sentencepiece(path: Path) -> tuple[Backend, NamedTokens]:
    """The backend of a ``tokenizer.model`` file, and the special tokens that it names.

    transformers 5 leaves out the leading space when it converts such a file, so we convert it.

    Raises:
        UserError: A damaged file, or a model that is not BPE or normalises its text.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        kinds = _kinds(model.serialized_model_proto())
        ids = range(model.vocab_size())
        pieces, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
        normalised = model.normalize(_PROBE)
    except (OSError, RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    plain = all(math.isfinite(score) and score == int(score) for score in scores)
    if not plain or normalised.removeprefix(_SPACE) != _PROBE.replace(" ", _SPACE):
        raise UserError(
            f"{path} is not a plain BPE sentencepiece model, which is the only kind supported; "
            "give a folder with tokenizer.json"
        )
    special = [None if i < 0 else i for i in (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id())]
    unknown_id, bos_id, eos_id, pad_id = special
    prefix = normalised.startswith(_SPACE)
    try:
        backend = sentencepiece_backend(pieces, scores, kinds, unknown_id=unknown_id, add_space_prefix=prefix)
    except Exception as error:  # the Rust side raises nothing narrower
        raise UserError(f"{path} describes no tokenizer that can be built: {error}") from error
    return backend, NamedTokens(bos_id, eos_id, pad_id)


def _merges(ranked: dict[str, int]) -> list[tuple[str, str]]:
    """Sentencepiece joins, of all neighbours that form a piece, the pair whose piece scores highest.

    As ranked merges: every cut of every piece into two pieces, the best piece first.

    Args:
        ranked: The pieces that joining may form, best first, with their ids.
    """
    merges: list[tuple[str, str]] = []
    for piece in ranked:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ranked and piece[i:] in ranked]
        merges.extend(sorted(cuts, key=lambda cut: (ranked[cut[0]], ranked[cut[1]])))
    return merges


def _kinds(model: bytes) -> list[int]:
    """Every piece's kind in a serialized sentencepiece model.

    The library's interface does not tell user-defined pieces from normal ones, and its generated message classes tie
    themselves to one version of protobuf; so the wire format is read here: ``ModelProto.pieces`` is field 1, and
    ``SentencePiece.type`` field 3 of each, `NORMAL` by default.
    """
    return [
        next((int(kind) for field, kind in _wire_fields(piece) if field == 3), NORMAL)
        for number, piece in _wire_fields(model)
        if number == 1 and isinstance(piece, bytes)
    ]


def _wire_fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protobuf message, by number; fixed-width values as their bytes."""
    fields: list[tuple[int, int | bytes]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            fields.append((number, varint()))
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"a field of wire type {wire_type}")
        length = varint() if wire_type == 2 else 8 if wire_type == 1 else 4
        fields.append((number, message[position : position + length]))
        position += length
    return fields
