"""Sentencepiece's BPE (pieces with scores, bytes for what has no piece) as a `tokenizers` backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from spt_jax.errors import UserError
from spt_jax.models.tokenizer import Tokenizer

_PROBE = "a  ﬁ "  # two spaces, a ligature and a space at the end: any normalisation would change one


def sentencepiece_backend(
    pieces: Sequence[str], scores: Sequence[float], *, unknown_id: int | None, add_space_prefix: bool
) -> Backend:
    """Builds the backend of a BPE sentencepiece model without text normalisation, such as Llama 2's.

    Args:
        pieces: Every piece; its place is its id.
        scores: Every piece's score; a higher one is joined first.
        unknown_id: The piece for what even bytes cannot spell.
        add_space_prefix: Whether a text is encoded as if a space stood before it.
    """
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of_scores(vocabulary, pieces, scores),
            unk_token=None if unknown_id is None else pieces[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def tokenizer_of_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model`` file.

    transformers 5 leaves out the leading space when it converts such a file, so we convert it.

    Raises:
        UserError: A damaged file, a model that is not BPE or normalises its text, or one without an end of sequence.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    ids = range(model.vocab_size())
    pieces, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    normalised = model.normalize(_PROBE)
    if any(score != int(score) for score in scores) or normalised.removeprefix("▁") != _PROBE.replace(" ", "▁"):
        raise UserError(
            f"{path} is not a plain BPE sentencepiece model, which is the only kind supported; "
            "give a folder with tokenizer.json"
        )
    unknown = model.unk_id()
    backend = sentencepiece_backend(
        pieces,
        scores,
        unknown_id=None if unknown < 0 else unknown,
        add_space_prefix=normalised.startswith("▁"),
    )
    control = [AddedToken(pieces[i], normalized=False, special=True) for i in ids if model.is_control(i)]
    backend.add_special_tokens(control)
    if model.eos_id() < 0:
        raise UserError(f"{path} names no end-of-sequence token, which we need")
    bos, pad = model.bos_id(), model.pad_id()
    return Tokenizer(backend, None if bos < 0 else bos, model.eos_id(), model.eos_id() if pad < 0 else pad)


def _merges_of_scores(
    vocabulary: dict[str, int], pieces: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Sentencepiece joins, of all neighbours that form a piece, the pair whose piece scores highest.

    As ranked merges: every cut of every piece into two pieces, the best piece first.
    """
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges.extend((score, vocabulary[left], vocabulary[right], (left, right)) for left, right in pairs)
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return [pair for *_, pair in merges]
