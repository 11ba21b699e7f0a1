"""The figures of one bank of prompts on a set of dialogues: a column of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spt_jax.data.dialogue import Dialogue
from spt_jax.data.packing import Row
from spt_jax.evaluation.likelihood import Likelihoods, score_rows
from spt_jax.evaluation.text_metrics import TextMetrics, text_metrics
from spt_jax.generation.engine import GenerationEngine
from spt_jax.generation.replies import cut_reply
from spt_jax.models.loading import LanguageModel
from spt_jax.prompting.selective_lm import SelectiveLM, Trainable

PERPLEXITY_DEFINITIONS = {
    "perplexity": "exp(total nll under the selected prompt / target tokens), end of sequence included",
    "perplexity_per_word": "the same sum over the whitespace words of the responses",
    "oracle_perplexity": "as perplexity, under each turn's best prompt in hindsight",
    "usage": "share of the turns whose highest score is each prompt's",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """What one bank does on the dialogues.

    Attributes:
        likelihoods: Of every turn.
        answered: int ``[R]``, which turns (indices into `likelihoods`) have a reply.
        replies: The R replies, cut.
        metrics: Text metrics of the replies.
        figures: Name of a figure to its value, as in ``results.json``.
    """

    likelihoods: Likelihoods
    answered: np.ndarray
    replies: list[str]
    metrics: TextMetrics
    figures: dict[str, Any]


def without_prompt(model: SelectiveLM, trainable: Trainable) -> tuple[SelectiveLM, Trainable]:
    """The LM alone, as a bank ``[1, 0, M]`` of one prompt without tokens."""
    bare = dataclasses.replace(model, num_prompts=1, prompt_length=0)
    prompts = jnp.zeros(bare.bank_shape, jnp.float32)
    return bare, {"bank": {"prompts": prompts}, "retriever": trainable["retriever"]}


def turn_contexts(rows: Sequence[Row]) -> dict[tuple[int, int], list[int]]:
    """Token ids of every turn's inference prompt, ``<bos>`` through the last ``R:``, by (dialogue, turn)."""
    return {
        (row.dialogue, int(turn)): row.tokens[:length].tolist()
        for row in rows
        for turn, length in zip(row.turns, row.context_lengths, strict=True)
    }


def spread_evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` indices, evenly apart; all of them when `wanted` is 0 or larger."""
    if not 0 < wanted < count:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


class ColumnEvaluator:
    """Evaluates banks on the same rows, LM and limits.

    Args:
        lm: The frozen LM.
        mesh: Its mesh.
        dialogues: The dialogues.
        rows: Their rows.
        batch_size: Rows scored and replies decoded at once.
        max_buckets: Length buckets.
        max_new_tokens: Tokens of a reply at most.
        replies: How many turns get a reply, spread evenly; 0 for all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        mesh: Mesh,
        dialogues: Sequence[Dialogue],
        rows: Sequence[Row],
        *,
        batch_size: int,
        max_buckets: int,
        max_new_tokens: int,
        replies: int = 0,
    ) -> None:
        self._lm, self._mesh, self._dialogues, self._rows = lm, mesh, dialogues, rows
        self._batch_size, self._max_buckets, self._max_new_tokens = batch_size, max_buckets, max_new_tokens
        self._contexts = turn_contexts(rows)
        self.answered = spread_evenly(len(self._contexts), replies)
        tokenizer = lm.tokenizer
        self._engine = GenerationEngine(
            lm.config,
            lm.params,
            eos_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            max_batch=batch_size,
        )

    @property
    def turns(self) -> int:
        """How many turns are scored."""
        return len(self._contexts)

    def reference(self, dialogue: int, turn: int) -> str:
        """The response that the dialogue has."""
        return self._dialogues[dialogue].turns[turn].response

    def run(self, model: SelectiveLM, trainable: Trainable, on_turns: Callable[[int], None]) -> Column:
        """Scores every turn, replies to the chosen ones under their selected prompts, and measures both.

        Args:
            model: The description; K and P are those of `trainable`.
            trainable: The bank and the retriever.
            on_turns: Called with the number of turns scored, then answered, after each batch.
        """
        likelihoods = score_rows(
            model,
            self._lm.params,
            trainable,
            self._rows,
            mesh=self._mesh,
            batch_size=self._batch_size,
            pad_id=self._lm.tokenizer.pad_id,
            max_buckets=self._max_buckets,
            on_batch=lambda turns, _: on_turns(turns),
        )
        keys = [(int(likelihoods.dialogue[u]), int(likelihoods.turn[u])) for u in self.answered]
        done = 0

        def on_batch(answered: int, _: int) -> None:
            nonlocal done
            on_turns(answered - done)
            done = answered

        selected = [int(k) for k in likelihoods.selected[self.answered]]
        replies = self.replies(trainable, keys, selected, on_batch)
        metrics = text_metrics(replies, [self.reference(*key) for key in keys])
        words = [len(self.reference(d, t).split()) for d, t in zip(likelihoods.dialogue, likelihoods.turn, strict=True)]
        figures = {
            "perplexity": likelihoods.perplexity,
            "perplexity_per_word": likelihoods.perplexity_per_word(words),
            "oracle_perplexity": likelihoods.oracle_perplexity,
            # Without a prompt there is nothing to select.
            "usage": likelihoods.usage.tolist() if model.prompt_length else None,
        }
        return Column(likelihoods, self.answered, replies, metrics, figures | dict(metrics.values))

    def replies(
        self,
        trainable: Trainable,
        keys: Sequence[tuple[int, int]],
        selected: Sequence[int],
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Greedy replies to the turns ``(dialogue, turn)`` under the given prompts, cut at role markers."""
        ids = self._engine.generate(
            trainable["bank"]["prompts"],
            [self._contexts[key] for key in keys],
            selected,
            max_new_tokens=self._max_new_tokens,
            on_batch=on_batch,
        )
        return [cut_reply(self._lm.tokenizer.decode(row)) for row in ids]
