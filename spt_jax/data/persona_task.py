"""The persona task: what is learned is the persona, told from the whole dialogue.

`<bos>context: Q: u1 R: r1 … Q: uT R: rT; persona: {persona}<eos>`, one row and one turn a dialogue (METHOD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spt_jax.data.template import (
    RESPONSE_MARK,
    EncodedTurn,
    Prompt,
    TextEncoder,
    encode_continued,
    encode_texts,
    said_text,
)


def persona_context_text(history: Sequence[str]) -> str:
    """The inference prompt's text, from `context:` through `persona:`.

    Args:
      history: alternating utterances, oldest first, of which the last is said by the one whose persona is asked for.

    Raises:
      UserError: `history` is empty.
    """
    return f"context: {said_text(history, RESPONSE_MARK)}; persona:"


@dataclass(frozen=True)
class PersonaTemplate:
    """The text of the persona task, for `pack` and `encode_context`.

    Targets are the tokens of the persona (its lines joined by a space) and the end of sequence. The one turn of a row
    carries the number of the dialogue's last turn. When a row is too long its oldest (query, response) pairs go; the
    last pair stays. `encode_context` ignores the persona it is given.
    """

    demonstrations = 0
    learns_persona = True

    def encode_contexts(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Template.encode_contexts`; a prompt's history ends with the words of the persona's speaker."""
        return encode_texts(encoder, [persona_context_text(prompt.history) for prompt in prompts])

    def encode_turns(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[EncodedTurn]:
        """See `Template.encode_turns`; a turn's response ends its context, and its persona is learned."""
        contexts = [
            persona_context_text([*prompt.history, response])
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return encode_continued(encoder, contexts, [" ".join(prompt.persona) for prompt in prompts])

    def end_id(self, encoder: TextEncoder) -> int:
        """The end of sequence."""
        return encoder.eos_id

    def cut(self, text: str) -> str:
        """The first line, stripped: a persona is written in one, whatever marks it holds."""
        return text.strip().partition("\n")[0].strip()
