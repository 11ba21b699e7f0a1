"""Likelihood of every turn under every prompt, and the perplexities that follow; no generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spt_jax.data.loader import consecutive_batches, sequential_batches
from spt_jax.data.packing import Row
from spt_jax.errors import UserError
from spt_jax.models.decoder import FrozenTree
from spt_jax.parallel.rules import place_whole_batch, replicated, row_devices
from spt_jax.prompting.adapters import Trainable
from spt_jax.prompting.selective_lm import SelectiveLM, score_turns


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """One entry a turn, in the order of the dialogues.

    Attributes:
        dialogue: int ``[U]``, index of the dialogue.
        turn: int ``[U]``, number of the turn in it, from 0.
        tokens: int ``[U]``, target tokens, end of sequence included.
        nll: float32 ``[U, K]``, mean negative log likelihood a target token, nats.
        scores: float32 ``[U, K]``, the retriever's.
    """

    dialogue: np.ndarray
    turn: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.turn)

    @classmethod
    def joined(cls, parts: Iterable[Likelihoods]) -> Likelihoods:
        """Several after one another."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part._arrays() for part in parts), strict=True)))

    def at(self, places: Sequence[int] | np.ndarray) -> Likelihoods:
        """The turns at some places, in their order."""
        return Likelihoods(*(array[places] for array in self._arrays()))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.dialogue, self.turn, self.tokens, self.nll, self.scores

    @property
    def selected(self) -> np.ndarray:
        """int ``[U]``, the prompt with the highest score; among ties the lowest."""
        return np.argmax(self.scores, axis=1)

    @property
    def selected_nll(self) -> np.ndarray:
        """float32 ``[U]``, nats a token under the selected prompt."""
        return np.take_along_axis(self.nll, self.selected[:, None], axis=1)[:, 0]

    @property
    def perplexity(self) -> float:
        """``exp(Σ nll under the selected prompt / tokens)``, per token (METHOD, "Perplexity")."""
        return self._perplexity(self.selected_nll)

    @property
    def oracle_perplexity(self) -> float:
        """The same under each turn's best prompt in hindsight."""
        return self._perplexity(self.nll.min(axis=1))

    @property
    def usage(self) -> np.ndarray:
        """float ``[K]``, share of turns that select each prompt."""
        return np.bincount(self.selected, minlength=self.nll.shape[1]) / len(self.tokens)

    def perplexity_per_word(self, words: Sequence[int]) -> float:
        """The total nll under the selected prompt over whitespace words; `words` counts each response's."""
        total = float(np.sum(self.selected_nll.astype(np.float64) * self.tokens))
        return float(np.exp(total / max(1, sum(words))))

    def _perplexity(self, nll: np.ndarray) -> float:
        return float(np.exp(np.sum(nll.astype(np.float64) * self.tokens) / self.tokens.sum()))


@cache
def _compiled(mesh: Mesh) -> Any:
    return jax.jit(score_turns, static_argnums=0, out_shardings=replicated(mesh))


def score_rows(
    model: SelectiveLM,
    params: FrozenTree,
    trainable: Trainable,
    rows: Sequence[Row],
    *,
    mesh: Mesh,
    batch_size: int,
    pad_id: int,
    max_buckets: int = 4,
    known: Likelihoods | None = None,
    on_batch: Callable[[Likelihoods, bool], None] | None = None,
    between: Callable[[], None] | None = None,
) -> Likelihoods:
    """Scores every turn of packed rows, forward only.

    Args:
        model: The description. In the official mode batches are neighbours in the order of `rows`, and every score
            depends on its batch.
        params: The frozen tree.
        trainable: What was learned.
        rows: Packed rows of either layout.
        mesh: The mesh of `params`.
        batch_size: Rows scored at once, rounded up to a multiple of the devices that share rows.
        pad_id: Fills rows up to their bucket.
        max_buckets: Length buckets; each is a compilation.
        known: Turns that the same call has scored before, with the same `batch_size` and rows; a batch of such turns
            alone is taken from there.
        on_batch: Called after each batch with what was found, and whether it was known.
        between: Called before each batch but the first; what it raises ends the scoring.

    Returns:
        See `Likelihoods`.

    Raises:
        UserError: In the official mode, the batch cannot be shared equally by the devices.
    """
    devices = row_devices(mesh)
    batches = consecutive_batches if model.official else sequential_batches
    if model.official and batch_size % devices:
        raise UserError(
            f"the batch is {batch_size} turns; in the official mode, where scores depend on it, allowed: a multiple of "
            f"{devices}, the devices that share it (mesh.data × mesh.fsdp)"
        )
    batch_size = batch_size if model.official else -(-min(batch_size, len(rows)) // devices) * devices
    places = {} if known is None else {turn: place for place, turn in enumerate(_turns(known.dialogue, known.turn))}
    parts: list[Likelihoods] = []
    for batch, _ in batches(rows, batch_size=batch_size, pad_id=pad_id, max_buckets=max_buckets):
        if parts and between is not None:
            between()
        present = batch["turn_mask"] > 0
        dialogue = np.broadcast_to(batch["dialogue_ids"][:, None], present.shape)[present]
        turn = batch["turn_ids"][present]
        taken = [places.get(key) for key in _turns(dialogue, turn)]
        there = [place for place in taken if place is not None]
        if known is not None and len(there) == len(taken):
            part = known.at(there)
        else:
            placed = place_whole_batch(mesh, batch)
            nll, scores, tokens = jax.device_get(_compiled(mesh)(model, params, trainable, placed))
            part = Likelihoods(dialogue, turn, tokens[present].astype(np.int64), nll[present], scores[present])
        parts.append(part)
        if on_batch is not None:
            on_batch(part, len(there) == len(taken))
    found = Likelihoods.joined(parts)
    return found.at(np.lexsort((found.turn, found.dialogue)))


def _turns(dialogue: np.ndarray, turn: np.ndarray) -> Iterable[tuple[int, int]]:
    return zip(dialogue.tolist(), turn.tolist(), strict=True)


class DevelopmentEvaluator:
    """Measures a training state on the development dialogues; the loop's `Evaluator`.

    Args:
        model: The description.
        params: The frozen tree.
        rows: Packed development rows.
        options: Keyword arguments of `score_rows`.
    """

    def __init__(self, model: SelectiveLM, params: FrozenTree, rows: Sequence[Row], **options: Any) -> None:
        self._model, self._params, self._rows, self._options = model, params, rows, options

    def run(self, state: Any, between: Callable[[], None] | None = None) -> Iterable[tuple[str, float]]:
        """Perplexity of the selected and of the best prompt, and the share of turns that select each."""
        options = {**self._options, "between": between}
        likelihoods = score_rows(self._model, self._params, state.trainable, self._rows, **options)
        yield "development/perplexity", likelihoods.perplexity
        yield "development/oracle_perplexity", likelihoods.oracle_perplexity
        for k, share in enumerate(likelihoods.usage):
            yield f"development/usage/{k}", float(share)
