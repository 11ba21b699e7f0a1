"""The paper's template: `given persona: …; context: Q: u1 R: r1 … Q: ut R: rt`, and the prompt that ends with `R:`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spt_jax.data.dialogue import Dialogue
from spt_jax.errors import UserError

QUERY_MARK = "Q:"
RESPONSE_MARK = "R:"


class TextEncoder(Protocol):
    """Text to token ids, without any special token; the ids that frame a row (`bos_id` None: rows have none)."""

    @property
    def bos_id(self) -> int | None:
        """First token of a row."""
        ...

    @property
    def eos_id(self) -> int:
        """Last target of every response."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows up to their bucket's length; any id, it is masked."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, nothing added in front or behind."""
        ...


class DialogueTooLongError(UserError):
    """The persona and the last query (in training, with the response) do not fit into the limit of tokens."""


def context_text(persona: Sequence[str], history: Sequence[str]) -> str:
    """The inference prompt's text, from `given persona:` through the last `R:`.

    Args:
      persona: the persona's lines.
      history: alternating utterances, oldest first, of which the last is the partner's; an even number of them begins
        with the persona's own words.

    Raises:
      UserError: `history` is empty.
    """
    if not history:
        raise UserError("The history is empty; it must end with the partner's utterance.")
    marks = (QUERY_MARK, RESPONSE_MARK)
    said = " ".join(f"{marks[(len(history) - 1 - i) % 2]} {utterance}" for i, utterance in enumerate(history))
    return f"given persona: {' '.join(persona)}; context: {said} {RESPONSE_MARK}"


def response_text(context: str, response: str) -> str:
    """A context with the response behind its last `R:`; without the end of sequence."""
    return f"{context} {response}"


def turn_history(dialogue: Dialogue, turn: int, start: int = 0) -> list[str]:
    """The utterances of `dialogue` from turn `start` up to the query of turn `turn` (both 0-based)."""
    history = []
    for earlier in dialogue.turns[start:turn]:
        history += [earlier.query, earlier.response]
    return [*history, dialogue.turns[turn].query]


def encode_context(
    encoder: TextEncoder,
    persona: Sequence[str],
    history: Sequence[str],
    *,
    max_length: int,
    place: str = "the conversation",
) -> list[int]:
    """Token ids of the inference prompt, bos first, T <= `max_length`.

    The oldest (query, response) pairs go first when it is too long; persona and last query stay.

    Args:
      encoder: the LM's tokenizer.
      persona: the persona's lines.
      history: alternating utterances that end with the partner's.
      max_length: limit in tokens, bos included; the soft prompt and the reply are not counted.
      place: what the error names, for example "input.jsonl:7".

    Raises:
      DialogueTooLongError: persona and last query alone are longer.
      UserError: `history` is empty.
    """
    bos = [] if encoder.bos_id is None else [encoder.bos_id]
    # A lone response in front is the first to go, then whole pairs, so that what is left begins with a query.
    starts = [0, *range(1 + len(history) % 2, len(history), 2)]
    for start in starts:
        tokens = bos + encoder.encode([context_text(persona, history[start:])])[0]
        if len(tokens) <= max_length:
            return tokens
    raise DialogueTooLongError(f"{place}: persona and last query need {len(tokens)} tokens, the limit is {max_length}.")
