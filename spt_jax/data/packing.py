"""Rows of tokens with known target positions: one row a dialogue, or one row a turn, with the same targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.template import (
    DialogueTooLongError,
    EncodedTurn,
    PlainTemplate,
    Prompt,
    Template,
    TextEncoder,
    turn_history,
)
from spt_jax.errors import UserError, nearest

LAYOUTS = ("dialogue", "turn")
# Dialogues tokenised in one call: enough to keep a fast tokenizer's threads busy, little enough to bound memory.
_CHUNK = 128


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the batch: its tokens and where its turns' targets are. N turns, T tokens, S targets; all int32.

    Attributes:
      tokens: [T], bos first; the last response's last token predicts its end, which is no input.
      context_lengths: [N], tokens of each turn's context, bos through its last `R:` (a chat template's answer mark).
      target_positions: [S], the position in `tokens` whose output predicts `target_ids`.
      target_ids: [S], response tokens; the last of every turn is what ends it (eos; a chat template's end of turn).
      target_turns: [S], index in 0..N-1 of the turn a target belongs to.
      dialogue: index of the dialogue in its set.
      turns: [N], turn numbers within the dialogue, from 0.
      inference_prompt: [C], the authors' inference prompt of the row's one turn, `<bos>given persona ... R: ` with its
        lone space token, cut as theirs; None outside the official mode (`spt_jax.data.official`).
    """

    tokens: np.ndarray
    context_lengths: np.ndarray
    target_positions: np.ndarray
    target_ids: np.ndarray
    target_turns: np.ndarray
    dialogue: int
    turns: np.ndarray
    inference_prompt: np.ndarray | None = None

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
      undemonstrated_turns: turns that show fewer demonstrations than the template has, to fit `max_length`.
    """

    rows: list[Row]
    fallbacks: int
    truncated_turns: int
    split_turns: int = 0
    undemonstrated_turns: int = 0

    @property
    def remark(self) -> str:
        """What could not be packed as asked, in words; empty where all could."""
        told = {
            "dialogues became one row a turn": self.fallbacks,
            "turns lost their oldest history": self.truncated_turns,
            "turns lost demonstrations": self.undemonstrated_turns,
            "turns had context and response encoded apart": self.split_turns,
        }
        return ", ".join(f"{count} {what}" for what, count in told.items() if count)


@dataclass(frozen=True, slots=True)
class _Key:
    """What a row shows of turn `t` of dialogue `d`: history from turn `start` on, behind `shots` demonstrations."""

    d: int
    t: int
    start: int
    shots: int


def pack(
    dialogues: Sequence[Dialogue],
    encoder: TextEncoder,
    *,
    layout: str,
    max_length: int,
    max_turns: int = 0,
    template: Template | None = None,
    last_turn_only: bool = False,
) -> PackedRows:
    """Turns dialogues into rows (METHOD: dialogue packing).

    In the dialogue layout a dialogue is one row if every context and every context with its response is, in tokens, a
    prefix of the row and the row has at most `max_length` tokens; otherwise it becomes one row a turn. A turn row that
    is too long drops its demonstrations, then its oldest (query, response) pairs; the persona stays. Both layouts
    yield the same (dialogue, turn) pairs with the same target ids.

    Args:
      dialogues: what to pack.
      encoder: the LM's tokenizer.
      layout: "dialogue" or "turn".
      max_length: limit of T, bos included, soft prompt and the last target not.
      max_turns: n > 0 keeps the last 2n - 1 utterances of every history and forces turn rows.
      template: how rows are written; None for `PlainTemplate`. One that learns the persona has one turn a dialogue.
      last_turn_only: learn the last turn of each dialogue alone: one row with one turn a dialogue, in either layout.

    Raises:
      DialogueTooLongError: persona, last query and response of a turn exceed `max_length`; names the place.
      UserError: an unknown layout, `max_length` below 1, `max_turns` below 0, a dialogue without turns (or without the
        persona that is to be learned), or one that the template refuses.
    """
    if layout not in LAYOUTS:
        raise UserError(f"data.layout is {layout!r}, allowed are {LAYOUTS}.{nearest(layout, LAYOUTS)}")
    if max_length < 1:
        raise UserError(f"data.max_length is {max_length}; a row needs at least 1 token.")
    if max_turns < 0:
        raise UserError(f"data.max_turns is {max_turns}; use 0 for the whole history or a positive number of turns.")
    template = template or PlainTemplate()
    for index, dialogue in enumerate(dialogues):
        if not dialogue.turns:
            raise UserError(f"{_place(dialogue, index)} has no turns, so nothing to learn from.")
        if template.learns_persona and not any(line.strip() for line in dialogue.persona):
            raise UserError(f"{_place(dialogue, index)} has no persona, which data.task = persona would learn.")
    packer = _Packer(
        encoder,
        template,
        by_dialogue=layout == "dialogue" and max_turns == 0,
        last_only=last_turn_only or template.learns_persona,
        max_length=max_length,
        max_turns=max_turns,
    )
    for start in range(0, len(dialogues), _CHUNK):
        packer.add(dialogues[start : start + _CHUNK], start)
    return PackedRows(
        packer.rows, packer.fallbacks, packer.truncated_turns, packer.split_turns, packer.undemonstrated_turns
    )


class _Packer:
    def __init__(
        self,
        encoder: TextEncoder,
        template: Template,
        *,
        by_dialogue: bool,
        last_only: bool,
        max_length: int,
        max_turns: int,
    ) -> None:
        self.encoder = encoder
        self.template = template
        self.by_dialogue = by_dialogue
        self.last_only = last_only
        self.max_length = max_length
        self.max_turns = max_turns
        self.rows: list[Row] = []
        self.fallbacks = 0
        self.truncated_turns = 0
        self.split_turns = 0
        self.undemonstrated_turns = 0

    def add(self, dialogues: Sequence[Dialogue], first_index: int) -> None:
        keys = [
            _Key(d, t, max(0, t + 1 - self.max_turns) if self.max_turns else 0, self.template.demonstrations)
            for d, dialogue in enumerate(dialogues)
            for t in range(len(dialogue.turns) - 1 if self.last_only else 0, len(dialogue.turns))
        ]
        turns: list[dict[int, EncodedTurn]] = [{} for _ in dialogues]
        for key, turn in zip(keys, self._encode(dialogues, keys), strict=True):
            turns[key.d][key.t] = turn
        packed = [self.by_dialogue and self._fits_one_row(list(encoded.values())) for encoded in turns]
        fitted = self._fit(dialogues, keys, turns, packed, first_index)
        for d, encoded in enumerate(turns):
            if packed[d]:
                self.rows.append(_row(list(encoded.values()), list(encoded), first_index + d))
                continue
            self.fallbacks += self.by_dialogue
            for t in encoded:
                turn = fitted[d, t]
                self.split_turns += not turn.whole
                self.rows.append(_row([turn], [t], first_index + d))

    def _encode(self, dialogues: Sequence[Dialogue], keys: Sequence[_Key]) -> list[EncodedTurn]:
        """Encodes turns, all in one call of the encoder."""
        prompts = [
            Prompt(dialogues[key.d].persona, turn_history(dialogues[key.d], key.t, key.start), key.shots)
            for key in keys
        ]
        responses = [dialogues[key.d].turns[key.t].response for key in keys]
        return self.template.encode_turns(self.encoder, prompts, responses)

    def _fits_one_row(self, encoded: Sequence[EncodedTurn]) -> bool:
        """Whether every turn's tokens are a prefix of the last turn's, which then are the dialogue's row."""
        row = encoded[-1].tokens
        return len(row) <= self.max_length and all(
            turn.whole and row[: len(turn.tokens)] == turn.tokens for turn in encoded
        )

    def _fit(
        self,
        dialogues: Sequence[Dialogue],
        keys: Sequence[_Key],
        turns: Sequence[dict[int, EncodedTurn]],
        packed: Sequence[bool],
        first_index: int,
    ) -> dict[tuple[int, int], EncodedTurn]:
        """Turn rows within the limit: too long ones lose a demonstration or their oldest pair, round by round."""
        fitted: dict[tuple[int, int], EncodedTurn] = {}
        pending = [(key, turns[key.d][key.t]) for key in keys if not packed[key.d]]
        truncated: set[tuple[int, int]] = set()
        undemonstrated: set[tuple[int, int]] = set()
        while pending:
            shorter: list[_Key] = []
            for key, turn in pending:
                if len(turn.tokens) <= self.max_length:
                    fitted[key.d, key.t] = turn
                elif key.shots:
                    undemonstrated.add((key.d, key.t))
                    shorter.append(_Key(key.d, key.t, key.start, key.shots - 1))
                elif key.start < key.t:
                    truncated.add((key.d, key.t))
                    shorter.append(_Key(key.d, key.t, key.start + 1, 0))
                else:
                    raise DialogueTooLongError(
                        f"{_place(dialogues[key.d], first_index + key.d)}: persona, query and response of turn "
                        f"{key.t + 1} need {len(turn.tokens)} tokens, the limit is {self.max_length} "
                        "(data.max_length)."
                    )
            pending = list(zip(shorter, self._encode(dialogues, shorter), strict=True)) if shorter else []
        self.truncated_turns += len(truncated)
        self.undemonstrated_turns += len(undemonstrated)
        return fitted


def _place(dialogue: Dialogue, index: int) -> str:
    return dialogue.source or f"dialogue {index}"


def _row(encoded: Sequence[EncodedTurn], numbers: Sequence[int], dialogue: int) -> Row:
    """A row from turns of which each is a prefix of the next."""
    tokens = np.asarray(encoded[-1].tokens, dtype=np.int32)
    spans = [(turn.length, len(turn.tokens), np.int32(turn.end_id)) for turn in encoded]
    # The position before a token predicts it, so a turn's targets sit at length-1 .. end-1, the last one for its end.
    return Row(
        tokens=tokens,
        context_lengths=np.asarray([turn.length for turn in encoded], dtype=np.int32),
        target_positions=np.concatenate([np.arange(length - 1, end, dtype=np.int32) for length, end, _ in spans]),
        target_ids=np.concatenate([np.append(tokens[length:end], end_id) for length, end, end_id in spans]),
        target_turns=np.repeat(np.arange(len(spans), dtype=np.int32), [end - length + 1 for length, end, _ in spans]),
        dialogue=dialogue,
        turns=np.asarray(numbers, dtype=np.int32),
    )
