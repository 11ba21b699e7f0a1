"""Rows of tokens with known target positions: one row a dialogue, or one row a turn, with the same targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.template import DialogueTooLongError, TextEncoder, context_text, response_text, turn_history
from spt_jax.errors import UserError, nearest

LAYOUTS = ("dialogue", "turn")
# Dialogues tokenised in one call: enough to keep a fast tokenizer's threads busy, little enough to bound memory.
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the batch: its tokens and where its turns' targets are. N turns, T tokens, S targets; all int32.

    Attributes:
      tokens: [T], bos first; the last response's last token predicts eos, which is no input.
      context_lengths: [N], tokens of each turn's context, bos through its last `R:`.
      target_positions: [S], the position in `tokens` whose output predicts `target_ids`.
      target_ids: [S], response tokens; the last of every turn is eos.
      target_turns: [S], index in 0..N-1 of the turn a target belongs to.
      dialogue: index of the dialogue in its set.
      turns: [N], turn numbers within the dialogue, from 0.
    """

    tokens: np.ndarray
    context_lengths: np.ndarray
    target_positions: np.ndarray
    target_ids: np.ndarray
    target_turns: np.ndarray
    dialogue: int
    turns: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PackedRows:
    """Rows in file order (dialogue, then turn), and what could not be packed as asked.

    Attributes:
      rows: the rows.
      fallbacks: dialogues that became one row a turn because a prefix did not hold or the row was too long.
      truncated_turns: turns whose oldest history was dropped to fit `max_length`.
      split_turns: turn rows whose context and response had to be encoded apart, since together their tokens merge.
    """

    rows: list[Row]
    fallbacks: int
    truncated_turns: int
    split_turns: int = 0


@dataclass(frozen=True)
class _Encoded:
    """Token ids of one turn: the context with bos (`length` tokens), then the response without eos."""

    tokens: list[int]
    length: int
    whole: bool  # context and response were encoded as one text


def pack(
    dialogues: Sequence[Dialogue], encoder: TextEncoder, *, layout: str, max_length: int, max_turns: int = 0
) -> PackedRows:
    """Turns dialogues into rows (METHOD: dialogue packing).

    In the dialogue layout a dialogue is one row if every `…R:` and every `…R: r_t` of it is, in tokens, a prefix of the
    row and the row has at most `max_length` tokens; otherwise it becomes one row a turn. A turn row drops its oldest
    (query, response) pairs until it fits; the persona stays. Both layouts yield the same (dialogue, turn) pairs with
    the same target ids.

    Args:
      dialogues: what to pack.
      encoder: the LM's tokenizer.
      layout: "dialogue" or "turn".
      max_length: limit of T, bos included, soft prompt and eos not.
      max_turns: n > 0 keeps the last 2n - 1 utterances of every history and forces turn rows.

    Raises:
      DialogueTooLongError: persona, last query and response of a turn exceed `max_length`; names the place.
      UserError: an unknown layout, `max_length` below 1, `max_turns` below 0, or a dialogue without turns.
    """
    if layout not in LAYOUTS:
        raise UserError(f"data.layout is {layout!r}, allowed are {LAYOUTS}.{nearest(layout, LAYOUTS)}")
    if max_length < 1:
        raise UserError(f"data.max_length is {max_length}; a row needs at least 1 token.")
    if max_turns < 0:
        raise UserError(f"data.max_turns is {max_turns}; use 0 for the whole history or a positive number of turns.")
    for index, dialogue in enumerate(dialogues):
        if not dialogue.turns:
            raise UserError(f"{_place(dialogue, index)} has no turns, so nothing to learn from.")
    packer = _Packer(encoder, layout == "dialogue" and max_turns == 0, max_length, max_turns)
    for start in range(0, len(dialogues), _CHUNK):
        packer.add(dialogues[start : start + _CHUNK], start)
    return PackedRows(packer.rows, packer.fallbacks, packer.truncated_turns, packer.split_turns)


class _Packer:
    def __init__(self, encoder: TextEncoder, by_dialogue: bool, max_length: int, max_turns: int) -> None:
        self.encoder = encoder
        self.by_dialogue = by_dialogue
        self.max_length = max_length
        self.max_turns = max_turns
        self.bos = [] if encoder.bos_id is None else [encoder.bos_id]
        self.rows: list[Row] = []
        self.fallbacks = 0
        self.truncated_turns = 0
        self.split_turns = 0

    def add(self, dialogues: Sequence[Dialogue], first_index: int) -> None:
        keys = [
            (d, t, max(0, t + 1 - self.max_turns) if self.max_turns else 0)
            for d, dialogue in enumerate(dialogues)
            for t in range(len(dialogue.turns))
        ]
        turns: list[list[_Encoded]] = [[] for _ in dialogues]
        for (d, _, _), turn in zip(keys, self._encode(dialogues, keys), strict=True):
            turns[d].append(turn)
        packed = [self.by_dialogue and self._fits_one_row(encoded) for encoded in turns]
        fitted = self._fit(dialogues, keys, turns, packed, first_index)
        for d, encoded in enumerate(turns):
            if packed[d]:
                self.rows.append(_row(encoded, range(len(encoded)), self.encoder.eos_id, first_index + d))
                continue
            self.fallbacks += self.by_dialogue
            for t in range(len(encoded)):
                turn = fitted[d, t]
                self.split_turns += not turn.whole
                self.rows.append(_row([turn], [t], self.encoder.eos_id, first_index + d))

    def _encode(self, dialogues: Sequence[Dialogue], keys: Sequence[tuple[int, int, int]]) -> Iterator[_Encoded]:
        """Encodes turns (dialogue, turn, first turn of its history), all in one call of the encoder."""
        texts = []
        for d, t, start in keys:
            dialogue = dialogues[d]
            context = context_text(dialogue.persona, turn_history(dialogue, t, start))
            texts += [context, response_text(context, dialogue.turns[t].response)]
        encoded = self.encoder.encode(texts)
        apart = []
        for i, (d, t, _) in enumerate(keys):
            context, full = encoded[2 * i], encoded[2 * i + 1]
            if full[: len(context)] != context:
                apart.append(" " + dialogues[d].turns[t].response)
        responses = iter(self.encoder.encode(apart) if apart else [])
        for i in range(len(keys)):
            context, full = encoded[2 * i], encoded[2 * i + 1]
            whole = full[: len(context)] == context
            tokens = full if whole else context + next(responses)
            yield _Encoded(self.bos + tokens, len(self.bos) + len(context), whole)

    def _fits_one_row(self, encoded: list[_Encoded]) -> bool:
        """Whether every turn's tokens are a prefix of the last turn's, which then are the dialogue's row."""
        row = encoded[-1].tokens
        return len(row) <= self.max_length and all(
            turn.whole and row[: len(turn.tokens)] == turn.tokens for turn in encoded
        )

    def _fit(
        self,
        dialogues: Sequence[Dialogue],
        keys: Sequence[tuple[int, int, int]],
        turns: list[list[_Encoded]],
        packed: list[bool],
        first_index: int,
    ) -> dict[tuple[int, int], _Encoded]:
        """Turn rows within the limit: too long ones lose their oldest pair, round by round."""
        fitted: dict[tuple[int, int], _Encoded] = {}
        pending = [(key, turns[key[0]][key[1]]) for key in keys if not packed[key[0]]]
        truncated: set[tuple[int, int]] = set()
        while pending:
            shorter = []
            for (d, t, start), turn in pending:
                if len(turn.tokens) <= self.max_length:
                    fitted[d, t] = turn
                elif start == t:
                    raise DialogueTooLongError(
                        f"{_place(dialogues[d], first_index + d)}: persona, query and response of turn {t + 1} need "
                        f"{len(turn.tokens)} tokens, the limit is {self.max_length} (data.max_length)."
                    )
                else:
                    truncated.add((d, t))
                    shorter.append((d, t, start + 1))
            pending = list(zip(shorter, self._encode(dialogues, shorter), strict=True)) if shorter else []
        self.truncated_turns += len(truncated)
        return fitted


def _place(dialogue: Dialogue, index: int) -> str:
    return dialogue.source or f"dialogue {index}"


def _row(encoded: Sequence[_Encoded], numbers: Sequence[int], eos_id: int, dialogue: int) -> Row:
    """A row from turns of which each is a prefix of the next."""
    tokens = np.asarray(encoded[-1].tokens, dtype=np.int32)
    # The position before a token predicts it, so a turn's targets sit at length-1 .. end-1, the last one for eos.
    spans = [(turn.length, len(turn.tokens)) for turn in encoded]
    return Row(
        tokens=tokens,
        context_lengths=np.asarray([length for length, _ in spans], dtype=np.int32),
        target_positions=np.concatenate([np.arange(length - 1, end, dtype=np.int32) for length, end in spans]),
        target_ids=np.concatenate([np.append(tokens[length:end], np.int32(eos_id)) for length, end in spans]),
        target_turns=np.repeat(np.arange(len(spans), dtype=np.int32), [end - length + 1 for length, end in spans]),
        dialogue=dialogue,
        turns=np.asarray(numbers, dtype=np.int32),
    )
