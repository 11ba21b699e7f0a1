"""Dialogues: a persona and the turns its speaker answered; a split that never lets a persona leak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spt_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class Turn:
    """One (context, response) pair to learn from: what the partner said and what the persona's speaker answered.

    `candidates` are the replies of a ranking task (hits@1) as the file gives them; ConvAI2 puts the answer last.
    """

    query: str
    response: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A persona and its turns, oldest first; `source` is the "file:line" of the dialogue's first line."""

    persona: tuple[str, ...]
    turns: tuple[Turn, ...]
    partner_persona: tuple[str, ...] = ()
    source: str = ""

    @property
    def told(self) -> tuple[object, ...]:
        """Everything in it that rows, prompts or figures may follow from, as JSON has it: all but where it was read."""
        return self.persona, self.partner_persona, [(t.query, t.response, t.candidates) for t in self.turns]


def dialogues_digest(dialogues: Iterable[Dialogue]) -> str:
    """The sha256 of all that dialogues tell (`Dialogue.told`), in their order; not of where, or in what format."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(json.dumps(dialogue.told).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class DialogueSet:
    """The dialogues of one source; `skipped` holds one sentence for each malformed line ("file:line: reason")."""

    dialogues: tuple[Dialogue, ...]
    skipped: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.dialogues)

    @property
    def turns(self) -> int:
        """The number of turns of all dialogues together."""
        return sum(len(dialogue.turns) for dialogue in self.dialogues)


def persona_key(persona: Sequence[str]) -> frozenset[str]:
    """What makes two personas the same: their lines whatever the order, letter case and spacing."""
    return frozenset(" ".join(line.casefold().split()) for line in persona)


def split_by_persona(dialogues: Sequence[Dialogue], count: int, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """Cuts a held-out part that shares no persona with the rest.

    Dialogues are grouped by `persona_key`; a dialogue without persona is a group of its own. The groups held out are
    drawn by `seed` among the choices whose size is the smallest reachable one that is at least `count`.

    Args:
      dialogues: the dialogues to split.
      count: how many dialogues to hold out, at least.
      seed: of the draw; the same seed gives the same split.

    Returns:
      (rest, held), both in the order of `dialogues`.

    Raises:
      UserError: `count` or `seed` is negative, or nothing would be left for the rest.
    """
    if count < 0 or seed < 0:
        raise UserError(f"A persona split needs a count and a seed of at least 0, not {count} and {seed}.")
    if count == 0:
        return list(dialogues), []
    groups: dict[object, list[int]] = {}
    for index, dialogue in enumerate(dialogues):
        groups.setdefault(persona_key(dialogue.persona) or index, []).append(index)
    members = list(groups.values())
    order = np.random.default_rng(seed).permutation(len(members))
    shuffled = [members[i] for i in order]
    chosen = _smallest_sum_at_least([len(group) for group in shuffled], count, below=len(dialogues))
    if chosen is None:
        raise UserError(
            f"Cannot hold out {count} of {len(dialogues)} dialogues by persona: they have {len(members)} distinct "
            "personas and at least one must remain for training."
        )
    held = {index for position in chosen for index in shuffled[position]}
    rest = [dialogue for index, dialogue in enumerate(dialogues) if index not in held]
    return rest, [dialogue for index, dialogue in enumerate(dialogues) if index in held]


def draw_fraction(dialogues: Sequence[Dialogue], fraction: float, seed: int) -> list[Dialogue]:
    """A share of the dialogues, drawn without replacement, in their order.

    With one seed a smaller share is part of every larger one, so that runs on less data see nothing new.

    Args:
      dialogues: what to draw from.
      fraction: the share, more than 0, up to 1; rounded to whole dialogues, one at least (of none: none).
      seed: of the draw.

    Raises:
      UserError: `fraction` is not in (0, 1], or `seed` is negative.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction is {fraction}; allowed: more than 0, up to 1")
    if seed < 0:
        raise UserError(f"The seed of a draw is {seed}; allowed: 0 or more")
    count = max(1, round(fraction * len(dialogues)))
    chosen = np.random.default_rng(seed).permutation(len(dialogues))[:count]
    return [dialogues[index] for index in sorted(chosen)]


def _smallest_sum_at_least(sizes: list[int], count: int, below: int) -> list[int] | None:
    """Positions whose sizes add up to the smallest reachable sum in [count, below), or None; early positions first."""
    # The smallest reachable sum that is large enough is one group above `count` at most.
    mask = (1 << min(below, count + max(sizes, default=0))) - 1
    # reachable[i] has bit s set when sizes[i:] can add up to s.
    reachable = [1]
    for size in reversed(sizes):
        reachable.append((reachable[-1] | reachable[-1] << size) & mask)
    reachable.reverse()
    above = reachable[0] >> count
    if not above:
        return None
    remaining = count + (above & -above).bit_length() - 1
    chosen = []
    for position, size in enumerate(sizes):
        if size <= remaining and reachable[position + 1] >> (remaining - size) & 1:
            chosen.append(position)
            remaining -= size
    return chosen
