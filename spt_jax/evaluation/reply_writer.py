"""Replies to turns of dialogues under chosen conditions, kept as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from spt_jax.data.packing import Row
from spt_jax.evaluation.journal import KeptColumn
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import ReplyText
from spt_jax.generation.seeds import seed_at
from spt_jax.progress import ProgressBar


def turn_contexts(rows: Sequence[Row]) -> dict[tuple[int, int], list[int]]:
    """Token ids of every turn's inference prompt, ``<bos>`` through the last ``R:``, by (dialogue, turn)."""
    return {
        (row.dialogue, int(turn)): (
            row.tokens[:length] if row.inference_prompt is None else row.inference_prompt
        ).tolist()
        for row in rows
        for turn, length in zip(row.turns, row.context_lengths, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class ReplyWriter:
    """Replies to turns under chosen conditions.

    Attributes:
        engine: Generates.
        bank: See `GenerationEngine.generate`.
        contexts: Inference prompts by (dialogue, turn).
        text: What tokens say.
        max_new_tokens: Tokens of a reply at most.
        decoding: How tokens are chosen.
        seed: Of draws.
    """

    engine: GenerationEngine
    bank: jax.Array
    contexts: dict[tuple[int, int], list[int]]
    text: ReplyText
    max_new_tokens: int
    decoding: Decoding
    seed: int

    def replies(
        self,
        keys: Sequence[tuple[int, int]],
        selected: Sequence[int],
        bar: ProgressBar | None = None,
        kept: KeptColumn | None = None,
        places: Sequence[int] | None = None,
    ) -> list[str]:
        """Replies to the turns ``(dialogue, turn)`` under the given conditions, cut.

        Args:
            keys: The turns.
            selected: The condition of each.
            bar: Counts the replies.
            kept: Replies that it knows are not generated again, and it gets the others, batch by batch.
            places: Where each turn stands among those that are answered, for its draws; None for the order of `keys`.
        """
        known = {} if kept is None else kept.replies()
        replies = [known.get(key) for key in keys]
        open_places = [place for place, reply in enumerate(replies) if reply is None]
        bar = bar or ProgressBar("replying", len(keys), shown=False)
        bar.skip(len(keys) - len(open_places))

        def on_rows(rows: Sequence[int], found: Sequence[list[int]]) -> None:
            places = [open_places[row] for row in rows]
            for place, tokens in zip(places, found, strict=True):
                replies[place] = self.text.of(tokens)
            if kept is not None:
                kept.keep_replies([keys[place] for place in places], [str(replies[place]) for place in places])
            bar.advance(len(rows))

        if open_places:
            self.engine.generate(
                self.bank,
                [self.contexts[keys[place]] for place in open_places],
                [selected[place] for place in open_places],
                max_new_tokens=self.max_new_tokens,
                decoding=self.decoding,
                # A turn draws as it would in an evaluation that was not stopped.
                seed=[seed_at(self.seed, places[place] if places else place) for place in open_places],
                ended=self.text.ended,
                stopped=self.text.stopped,
                on_rows=on_rows,
            )
        return [str(reply) for reply in replies]
