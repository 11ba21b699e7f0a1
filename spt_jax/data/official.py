"""The authors' rows, one a turn, to the last token: what their program reads, how it cuts, what it learns (METHOD).

Rows of `retriever.context = "official"`; padding and batches are for whoever collates them. One thing we do not copy: a
dialogue without persona stays a dialogue of its own, while their reader runs it into the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.packing import Row
from spt_jax.data.template import QUERY_MARK, RESPONSE_MARK, TextEncoder
from spt_jax.errors import UserError

# Turns tokenised in one call: enough to keep a fast tokenizer's threads busy, little enough to bound memory.
_CHUNK = 1024


class OfficialEncoder(TextEncoder, Protocol):
    """A `TextEncoder` that shows its vocabulary: the authors look for `context:` and `R:` in the tokens' spelling."""

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` behind it."""
        ...


@dataclass(frozen=True, slots=True)
class OfficialTurn:
    """A turn as the authors' program reads it.

    Attributes:
      turn: its number in the dialogue, from 0.
      persona: the persona's lines, which are also the text of the contrastive loss (joined by a space).
      context: the utterances in front of the response, oldest first, each with its mark (`Q: hello`).
      target: the response.
    """

    turn: int
    persona: tuple[str, ...]
    context: tuple[str, ...]
    target: str


def official_turns(dialogue: Dialogue, *, max_turns: int = 0, last_turn_only: bool = False) -> list[OfficialTurn]:
    """The turns of a dialogue as the authors' reader sees its lines.

    A persona line ends at its second colon, the partner's lines are persona too, and so is every later line that holds
    `persona:` anywhere: it is no turn, and what stands between its first two colons joins the persona of the turns
    behind it. Marks alternate from the dialogue's first utterance.

    Args:
      dialogue: the dialogue.
      max_turns: n > 0 keeps the last 2n - 1 utterances; together with `last_turn_only` the last 2n - 2, since there
        the program counts the response before it takes it away.
      last_turn_only: the last turn alone.
    """
    persona = [_between_colons(f"persona:{line}") for line in (*dialogue.persona, *dialogue.partner_persona)]
    said: list[str] = []
    turns: list[OfficialTurn] = []
    for number, turn in enumerate(dialogue.turns):
        line = _line(turn)
        if "persona:" in line:
            persona.append(_between_colons(line))
            continue
        said += [_as_written(turn.query), _as_written(turn.response)]
        marked = tuple(f"{(QUERY_MARK, RESPONSE_MARK)[i % 2]} {text}" for i, text in enumerate(said))
        counted = marked if last_turn_only else marked[:-1]
        if max_turns:
            counted = counted[-(2 * max_turns - 1) :]
        context = counted[:-1] if last_turn_only else counted
        turns.append(OfficialTurn(number, tuple(persona), context, said[-1]))
    # The last turn is written down when the next dialogue begins, so with the whole persona.
    return [replace(turn, persona=tuple(persona)) for turn in turns[-1:]] if last_turn_only else turns


def official_rows(
    dialogues: Sequence[Dialogue],
    tokenizer: OfficialEncoder,
    *,
    max_length: int,
    max_turns: int = 0,
    last_turn_only: bool = False,
    freeze_persona: bool = True,
    freeze_context: bool = True,
    pad_id: int | None = None,
) -> list[Row]:
    """The authors' rows, one a turn, in file order, unpadded (METHOD: where the authors' program differs).

    `Row.tokens` is `<bos>given persona: ...; context: Q: ... R: r<eos>`, eos included; beyond `max_length` it loses its
    left side, and so does `Row.inference_prompt`. A target is a position whose label the program does not ignore:
    labels equal to the padding are ignored, so that with pad = eos the end of sequence is never learned.
    `Row.context_lengths` counts the tokens in front of the first target's token.

    Args:
      dialogues: what to read.
      tokenizer: the LM's tokenizer.
      max_length: limit of T and of the inference prompt, bos and eos included, the soft prompt not.
      max_turns: n > 0 keeps the last 2n - 1 utterances of every history.
      last_turn_only: learns the last turn of each dialogue alone and, as the program does, not the last dialogue's.
        The program has this for training data only.
      freeze_persona: ignores labels up to the first `context:`, in a row that shows `given persona:`.
      freeze_context: ignores labels from the last `context:` through the last `R:`; where one of them is missing none.
      pad_id: the padding that the program ignores; None for the tokenizer's. The program takes the pad token that the
        tokenizer itself names, else the eos (or the bos: `pad_token: bos` in its YAML).

    Raises:
      UserError: `max_length` below 1, `max_turns` below 0, a dialogue without turns, or a turn in which nothing is
        learned (the program's loss becomes NaN there).
    """
    if max_length < 1:
        raise UserError(f"data.max_length is {max_length}; a row needs at least 1 token.")
    if max_turns < 0:
        raise UserError(f"data.max_turns is {max_turns}; use 0 for the whole history or a positive number of turns.")
    for index, dialogue in enumerate(dialogues):
        if not dialogue.turns:
            raise UserError(f"{_place(dialogue, index)} has no turns, so nothing to learn from.")
    if last_turn_only and len(dialogues) == 1:
        raise UserError(
            "data.last_turn_only with retriever.context = official leaves out the last dialogue, as the authors' "
            "program does, and there is only one; give it two or more."
        )
    kept = dialogues[:-1] if last_turn_only else dialogues
    turns = [
        (index, turn)
        for index, dialogue in enumerate(kept)
        for turn in official_turns(dialogue, max_turns=max_turns, last_turn_only=last_turn_only)
    ]
    spelling = _Spelling(tokenizer)
    mask = _Mask(tokenizer, tokenizer.pad_id if pad_id is None else pad_id, freeze_persona, freeze_context)
    rows: list[Row] = []
    for start in range(0, len(turns), _CHUNK):
        chunk = turns[start : start + _CHUNK]
        texts = [text for _, turn in chunk for text in (_text(turn, turn.target), _text(turn, ""))]
        encoded = spelling.encode(texts)
        tokens = [np.asarray([*ids, tokenizer.eos_id][-max_length:], dtype=np.int32) for ids in encoded[::2]]
        prompts = [np.asarray(ids[-max_length:], dtype=np.int32) for ids in encoded[1::2]]
        labels = mask.labels(tokens)
        for (index, turn), ids, prompt, label in zip(chunk, tokens, prompts, labels, strict=True):
            positions = np.flatnonzero(label != mask.pad_id).astype(np.int32)
            if not positions.size:
                raise UserError(
                    f"{_place(dialogues[index], index)}: turn {turn.turn + 1} leaves nothing to learn in the official "
                    "mode. The authors' program ignores labels equal to its padding token, and finds the response by "
                    "a token that ends with 'context' in front of one that ends with ':'; with an empty response, or a "
                    "tokenizer that cuts 'context' in pieces, nothing is left."
                )
            rows.append(
                Row(
                    tokens=ids,
                    context_lengths=positions[:1] + 1,
                    target_positions=positions,
                    target_ids=label[positions],
                    target_turns=np.zeros(len(positions), dtype=np.int32),
                    dialogue=index,
                    turns=np.asarray([turn.turn], dtype=np.int32),
                    inference_prompt=prompt,
                )
            )
    return rows


def official_prompt(
    persona: Sequence[str], history: Sequence[str], tokenizer: OfficialEncoder, *, max_length: int
) -> np.ndarray:
    """The authors' inference prompt of a conversation: `<bos>given persona: ...; context: Q: ... R: `.

    Lines and utterances are those that their reader would make of them, as in `official_turns`.

    Args:
      persona: the persona's lines.
      history: alternating utterances, oldest first, of which the last is the partner's.
      tokenizer: the LM's tokenizer.
      max_length: limit in tokens; what is longer loses its left side, the bos first.

    Returns:
      [C] int32.

    Raises:
      UserError: `history` is empty.
    """
    if not history:
        raise UserError("The history is empty; it must end with the partner's utterance.")
    marks = (QUERY_MARK, RESPONSE_MARK)
    context = tuple(f"{marks[(len(history) - 1 - i) % 2]} {_as_written(text)}" for i, text in enumerate(history))
    lines = tuple(_between_colons(f"persona:{line}") for line in persona)
    text = _text(OfficialTurn(0, lines, context, ""), "")
    return np.asarray(_Spelling(tokenizer).encode([text])[0][-max_length:], dtype=np.int32)


def _text(turn: OfficialTurn, target: str) -> str:
    return f"given persona: {' '.join(turn.persona)}; context: {' '.join(turn.context)} {RESPONSE_MARK} {target}"


def _line(turn: Turn) -> str:
    """The line of the file behind its number, as far as the authors' reader can tell lines apart."""
    fields = [turn.query, turn.response, *(["", "|".join(turn.candidates)] if turn.candidates else [])]
    return "\t".join(_as_written(text) for text in fields)


def _as_written(text: str) -> str:
    r"""Their reader knows nothing of ParlAI's `\n` for a line break."""
    return text.replace("\n", "\\n").strip()


def _between_colons(line: str) -> str:
    return _as_written(line.split(":")[1])


def _place(dialogue: Dialogue, index: int) -> str:
    return dialogue.source or f"dialogue {index}"


class _Spelling:
    """Texts to ids as the tokenizers that the program used (transformers 4.30, not the fast ones) did.

    Those cut a text at every spelling of a special token and encode the pieces each by itself. So `<s>given` is the
    bos and then what `given` alone encodes to (with Llama's space in front, with OPT none), and a special token spelled
    inside a persona or an utterance is that token, while elsewhere in this package text is only ever text. Spaces
    around such a spelling stay, as they do with the files of OPT and Llama 2.
    """

    def __init__(self, tokenizer: OfficialEncoder) -> None:
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        backend = tokenizer.backend
        self.special = {
            token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special
        }
        unknown = getattr(backend.model, "unk_token", None)
        if unknown is not None:
            self.special[unknown] = backend.token_to_id(unknown)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text behind a bos; the texts' pieces are encoded in one call."""
        pieces = [self.pattern.split(text) if self.pattern else [text] for text in texts]
        # A split by a group alternates between text and what the group matched.
        encoded = iter(self.tokenizer.encode([text for split in pieces for text in split[::2] if text]))
        return [self.bos + list(self._joined(split, encoded)) for split in pieces]

    def _joined(self, split: Sequence[str], encoded: Iterator[list[int]]) -> Iterator[int]:
        for place, piece in enumerate(split):
            if place % 2:
                yield self.special[piece]
            elif piece:
                yield from next(encoded)


class _Mask:
    """The labels that the program learns, found as it finds them: by how tokens are spelled."""

    def __init__(self, tokenizer: OfficialEncoder, pad_id: int, freeze_persona: bool, freeze_context: bool) -> None:
        self.backend = tokenizer.backend
        self.pad_id = pad_id
        self.freeze_persona = freeze_persona
        self.freeze_context = freeze_context
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.ends = {ending: np.zeros(1 + max(ids.values()), dtype=bool) for ending in ("context", "R", ":")}
        for token, number in ids.items():
            for ending, has in self.ends.items():
                has[number] = token.endswith(ending)

    def labels(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Every row's next tokens, [T] int32, the padding where nothing is learned."""
        shown = self.backend.decode_batch([row[1:].tolist() for row in rows], skip_special_tokens=False)
        return [self._labels(row, "given persona:" in text) for row, text in zip(rows, shown, strict=True)]

    def _labels(self, row: np.ndarray, shows_persona: bool) -> np.ndarray:
        labels = np.append(row[1:], np.int32(self.pad_id))
        if self.freeze_persona and shows_persona:
            starts = self._colons_behind("context", labels)
            labels[: starts[0] if starts.size else len(labels)] = self.pad_id
        if self.freeze_context:
            starts, marks = self._colons_behind("context", labels), self._colons_behind("R", labels)
            if starts.size and marks.size:
                labels[starts[-1] : marks[-1] + 2] = self.pad_id
        return labels

    def _colons_behind(self, ending: str, labels: np.ndarray) -> np.ndarray:
        """Where a token that ends with `ending` stands before one that ends with a colon."""
        return np.flatnonzero(self.ends[ending][labels[:-1]] & self.ends[":"][labels[1:]])
