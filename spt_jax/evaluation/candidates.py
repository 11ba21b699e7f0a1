"""The candidates of ranked turns as tokens: what the file gives, behind the context that the turn's row has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import Row
from spt_jax.data.template import EncodedTurn, Prompt, Template, TextEncoder, turn_history
from spt_jax.errors import UserError
from spt_jax.evaluation.evaluation_files import turn_name

_TURNS_AT_ONCE = 32  # 20 candidates each: enough to keep a fast tokenizer's threads busy


@dataclass(frozen=True, eq=False)
class RankedTurn:
    """One turn with N candidates.

    Attributes:
        row: Which row holds its context.
        context_length: Tokens of that row up to and with the context's last.
        dialogue: Index of the dialogue.
        turn: Number of the turn in it.
        texts: The N distinct candidates, in the file's order.
        response: The place of the true response among them.
        ids: The tokens of each candidate, without what ends a turn.
        end_id: What ends a turn: the last target of every candidate.
    """

    row: int
    context_length: int
    dialogue: int
    turn: int
    texts: tuple[str, ...]
    response: int
    ids: tuple[tuple[int, ...], ...]
    end_id: int

    @property
    def tokens(self) -> int:
        """Tokens of all candidates together, their ends not counted."""
        return sum(map(len, self.ids))


def ranked_turns(
    rows: Sequence[Row],
    dialogues: Sequence[Dialogue],
    wanted: Iterable[tuple[int, int]],
    template: Template,
    encoder: TextEncoder,
) -> list[RankedTurn]:
    """The turns of `wanted` that have candidates with the true response among them, in that order.

    A candidate is tokenised as the response of its turn would be, behind the context that the turn's row has (which
    may lack the oldest turns, where the row was too long). Equal candidates are one.

    Args:
        rows: The packed rows of the dialogues, of either layout.
        dialogues: The dialogues.
        wanted: Turns as (dialogue, turn).
        template: How the rows were written.
        encoder: The tokenizer they were written with.
    """
    places = {
        (row.dialogue, int(turn)): (number, int(length))
        for number, row in enumerate(rows)
        for turn, length in zip(row.turns, row.context_lengths, strict=True)
    }
    chosen = [
        (d, t, texts)
        for d, t in wanted
        if dialogues[d].turns[t].response in (texts := tuple(dict.fromkeys(dialogues[d].turns[t].candidates)))
    ]
    found = []
    for start in range(0, len(chosen), _TURNS_AT_ONCE):
        block = chosen[start : start + _TURNS_AT_ONCE]
        contexts = [rows[places[d, t][0]].tokens[: places[d, t][1]].tolist() for d, t, _ in block]
        asked = [(dialogues[d], t, texts) for d, t, texts in block]
        for (d, t, texts), encoded in zip(block, _encode(template, encoder, asked, contexts), strict=True):
            ids = tuple(tuple(turn.tokens[turn.length :]) for turn in encoded)
            place = texts.index(dialogues[d].turns[t].response)
            found.append(RankedTurn(*places[d, t], d, t, texts, place, ids, encoded[0].end_id))
    return found


_Asked = tuple[Dialogue, int, tuple[str, ...]]


def _encode(
    template: Template, encoder: TextEncoder, asked: Sequence[_Asked], contexts: Sequence[list[int]]
) -> Iterator[list[EncodedTurn]]:
    """The candidates of several turns, tokenised in one call where their contexts hold the whole history."""
    prompts = [Prompt(d.persona, turn_history(d, t), template.demonstrations) for d, t, _ in asked]
    repeated = [prompt for prompt, (_, _, texts) in zip(prompts, asked, strict=True) for _ in texts]
    encoded = iter(template.encode_turns(encoder, repeated, [text for _, _, texts in asked for text in texts]))
    for (dialogue, t, texts), context in zip(asked, contexts, strict=True):
        turns = list(itertools.islice(encoded, len(texts)))
        if turns[0].tokens[: turns[0].length] != context:
            prompt = _prompt_of(template, encoder, dialogue, t, context)
            turns = template.encode_turns(encoder, [prompt] * len(texts), texts)
        yield turns


def _prompt_of(template: Template, encoder: TextEncoder, dialogue: Dialogue, turn: int, context: list[int]) -> Prompt:
    """What a shortened context was written from: with fewer demonstrations, or without the oldest turns."""
    levels = [(start, shots) for start in range(turn + 1) for shots in range(template.demonstrations, -1, -1)]
    for start, shots in levels:
        prompt = Prompt(dialogue.persona, turn_history(dialogue, turn, start), shots)
        if template.encode_contexts(encoder, [prompt])[0] == context:
            return prompt
    raise UserError(
        f"{dialogue.source or 'a dialogue'}: the context of turn {turn + 1} is not what its template writes, so its "
        "candidates cannot be ranked"
    )


def check_room(turns: Sequence[RankedTurn], front: int, longest_row: int) -> None:
    """Refuses candidates that stand beyond the LM's context.

    Args:
        turns: The turns.
        front: Tokens before the text, those of a soft prompt.
        longest_row: Tokens that a row may have.

    Raises:
        UserError: A candidate does not fit; the first is named.
    """
    for turn in turns:
        needed = front + turn.context_length + int(np.max([len(ids) for ids in turn.ids]))
        if needed > longest_row:
            raise UserError(
                f"a candidate of {turn_name(turn.dialogue, turn.turn)} needs {needed} positions, but this LM has "
                f"{longest_row}; leave hits out of the metrics, or the candidate out of the dialogues"
            )
