"""Few-shot prompting: whole dialogues of the training split, shown before the conversation that is to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.data.dialogue import Dialogue, persona_key
from spt_jax.data.template import (
    EncodedTurn,
    PlainTemplate,
    Prompt,
    Template,
    TextEncoder,
    context_text,
    encode_continued,
    encode_texts,
    response_text,
    turn_history,
)
from spt_jax.errors import UserError

BETWEEN = "\n\n"
"""What parts the demonstrations from one another and from the context: a blank line."""

# Dialogues a demonstration is drawn from, a shot: few, so that short ones are drawn and whole ones fit into a row.
_CHOICES = 4


@dataclass(frozen=True)
class FewShot:
    """The plain template behind demonstrations, `shots` whole dialogues each written in the same template.

    A turn sees the first `shots` of `dialogues` that have another persona than its own, whatever its history; the last
    one stands next to the context. When a row is too long demonstrations go before any history does, the farthest
    first; the persona never goes.

    Attributes:
      template: of the context and of the demonstrations.
      dialogues: the demonstrations to choose from, as `draw_demonstrations` draws them.
      shots: how many a turn sees.

    Raises:
      UserError: another template than the plain one, or too few dialogues for a turn whose persona one of them has.
    """

    template: Template
    dialogues: tuple[Dialogue, ...]
    shots: int

    learns_persona = False

    def __post_init__(self) -> None:
        if not isinstance(self.template, PlainTemplate):
            raise UserError("few-shot demonstrations are written in the plain template; use data.template = plain")
        personas = {persona_key(dialogue.persona) for dialogue in self.dialogues}
        if self.shots < 1 or len(self.dialogues) <= self.shots or len(personas) < len(self.dialogues):
            raise UserError(
                f"{self.shots} shots need at least {self.shots + 1} dialogues of distinct personas, so that none has "
                f"to be of the turn's own; there are {len(personas)}"
            )

    @property
    def demonstrations(self) -> int:
        """See `Template.demonstrations`."""
        return self.shots

    def encode_contexts(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Template.encode_contexts`."""
        return encode_texts(encoder, [self._context(prompt) for prompt in prompts])

    def encode_turns(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[EncodedTurn]:
        """See `Template.encode_turns`."""
        return encode_continued(encoder, [self._context(prompt) for prompt in prompts], responses)

    def end_id(self, encoder: TextEncoder) -> int:
        """The end of sequence."""
        return self.template.end_id(encoder)

    def cut(self, text: str) -> str:
        """As the plain template does; a line break ends a reply, so no further demonstration is made up."""
        return self.template.cut(text)

    def _context(self, prompt: Prompt) -> str:
        own = persona_key(prompt.persona)
        others = [dialogue for dialogue in self.dialogues if persona_key(dialogue.persona) != own][: self.shots]
        shown = others[len(others) - prompt.shots :]
        return BETWEEN.join([*map(demonstration_text, shown), context_text(prompt.persona, prompt.history)])


def demonstration_text(dialogue: Dialogue) -> str:
    """A whole dialogue in the plain template, its last response included.

    Raises:
      UserError: it has no turns.
    """
    if not dialogue.turns:
        raise UserError(f"{dialogue.source or 'a dialogue'} has no turns, so it demonstrates nothing.")
    last = len(dialogue.turns) - 1
    return response_text(context_text(dialogue.persona, turn_history(dialogue, last)), dialogue.turns[last].response)


def draw_demonstrations(dialogues: Sequence[Dialogue], shots: int, seed: int) -> tuple[Dialogue, ...]:
    """Draws what `FewShot` chooses from: `shots` + 1 dialogues of distinct personas, short ones.

    Of each persona the shortest dialogue counts, in characters of its text (the first one of equals). Among the
    4 · (`shots` + 1) shortest of these the seed draws. Dialogues without a persona are left out.

    Args:
      dialogues: the training split.
      shots: how many demonstrations a turn sees.
      seed: of the draw; the same seed gives the same dialogues in the same order.

    Raises:
      UserError: fewer than `shots` + 1 distinct personas, or a negative `seed`.
    """
    if seed < 0:
        raise UserError(f"The seed of a draw is {seed}; allowed: 0 or more")
    shortest: dict[frozenset[str], tuple[int, int]] = {}
    for index, dialogue in enumerate(dialogues):
        if any(line.strip() for line in dialogue.persona):
            entry = (len(demonstration_text(dialogue)), index)
            key = persona_key(dialogue.persona)
            shortest[key] = min(entry, shortest.get(key, entry))
    if len(shortest) <= shots:
        raise UserError(
            f"method.shots is {shots}, which needs training dialogues of {shots + 1} distinct personas; there are "
            f"{len(shortest)}"
        )
    choices = sorted(shortest.values())[: _CHOICES * (shots + 1)]
    drawn = np.random.default_rng(seed).permutation(len(choices))[: shots + 1]
    return tuple(dialogues[choices[place][1]] for place in drawn)
