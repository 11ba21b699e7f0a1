"""What the retriever's choice is worth: who is served by which prompt, and how far the best one was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spt_jax.data.dialogue import persona_key
from spt_jax.evaluation.likelihood import Likelihoods

SELECTION_DEFINITIONS = {
    "usage_entropy": "Entropy of the shares of turns that select each prompt, nats; log K where all serve alike.",
    "effective_prompts": "exp of the usage entropy: so many prompts in equal use have the same entropy; 1 to K.",
    "score_entropy": "Entropy of softmax(score / τ_sim) over prompts, mean over turns, nats; 0 is certain.",
    "regret": "nll of the selected prompt minus the lowest of any prompt, mean over target tokens, nats.",
    "regret_of_chance": "The regret of a prompt drawn evenly at random; a retriever that knows nothing has it.",
    "regret_of_one": "The regret of the one prompt that is best for all turns together.",
    "oracle_agreement": "Share of turns whose selected prompt has the lowest nll of all, percent.",
}


def selection_figures(likelihoods: Likelihoods, score_temperature: float) -> dict[str, float]:
    """The figures of `SELECTION_DEFINITIONS`.

    Args:
        likelihoods: Of U turns under K prompts.
        score_temperature: τ_sim.
    """
    nll, tokens = likelihoods.nll.astype(np.float64), likelihoods.tokens.astype(np.float64)
    regret = nll - nll.min(axis=1, keepdims=True)
    scaled = likelihoods.scores.astype(np.float64) / score_temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    probabilities = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    usage = entropy(likelihoods.usage)
    return {
        "usage_entropy": float(usage),
        "effective_prompts": float(np.exp(usage)),
        "score_entropy": float(entropy(probabilities).mean()),
        "regret": _per_token(np.take_along_axis(regret, likelihoods.selected[:, None], axis=1)[:, 0], tokens),
        "regret_of_chance": _per_token(regret.mean(axis=1), tokens),
        "regret_of_one": min(_per_token(regret[:, k], tokens) for k in range(regret.shape[1])),
        "oracle_agreement": 100.0 * float(np.mean(likelihoods.selected == nll.argmin(axis=1))),
    }


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Over the last axis, nats."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return np.abs(np.sum(probabilities * logs, axis=-1))  # a sum of no positive number; 0 rather than -0


def _per_token(values: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.sum(values * tokens) / tokens.sum())


class PersonaTable(NamedTuple):
    """How well each prompt serves each persona.

    Attributes:
        personas: G tuples of lines, in the order in which they first speak.
        nll: float64 ``[K, G]``, mean nll a target token, nats.
        usage: float64 ``[K, G]``, share of the persona's turns that select each prompt.
        turns: int ``[G]``.
    """

    personas: list[tuple[str, ...]]
    nll: np.ndarray
    usage: np.ndarray
    turns: np.ndarray


def persona_table(likelihoods: Likelihoods, personas: Sequence[tuple[str, ...]]) -> PersonaTable:
    """Turns gathered by persona, as `spt_jax.data.dialogue.persona_key` tells personas apart.

    Args:
        likelihoods: Of U turns.
        personas: The lines of each dialogue's persona.
    """
    groups: dict[frozenset[str], int] = {}
    names: list[tuple[str, ...]] = []
    member = np.empty(len(likelihoods.turn), np.int64)
    for place, dialogue in enumerate(likelihoods.dialogue.tolist()):
        lines = personas[dialogue]
        key = persona_key(lines)
        if key not in groups:
            groups[key] = len(names)
            names.append(lines)
        member[place] = groups[key]
    prompts = likelihoods.nll.shape[1]
    onehot = (member[None] == np.arange(len(names))[:, None]).astype(np.float64)  # [G, U]
    tokens = onehot * likelihoods.tokens
    chosen = np.eye(prompts)[likelihoods.selected]
    turns = onehot.sum(axis=1)
    return PersonaTable(
        names,
        (tokens @ likelihoods.nll.astype(np.float64) / tokens.sum(axis=1, keepdims=True)).T,
        (onehot @ chosen / turns[:, None]).T,
        turns.astype(np.int64),
    )


class Map(NamedTuple):
    """Directions of contexts and prompts in a plane.

    Attributes:
        contexts: float64 ``[U, 2]``.
        prompts: float64 ``[K, 2]``.
        explained: float64 ``[2]``, the share of the contexts' variance along each axis.
    """

    contexts: np.ndarray
    prompts: np.ndarray
    explained: np.ndarray


def retriever_map(contexts: np.ndarray, prompts: np.ndarray) -> Map:
    """What the retriever compares, seen along the two directions in which the contexts differ most.

    Scores are of cosines, so every vector is divided by its length; the plane is that of the contexts' first two
    principal components, and the prompts are laid onto it.

    Args:
        contexts: ``[U, M]``.
        prompts: ``[K, M]``.
    """
    units = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (contexts, prompts)]
    units = [x.astype(np.float64) for x in units]
    middle = units[0].mean(axis=0)
    centred = units[0] - middle
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    spread, axes = np.pad(spread, (0, 2))[:2], np.pad(axes, ((0, 2), (0, 0)))[:2]
    # A component's sign is arbitrary: its largest entry is made positive, so that a picture does not flip.
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])
    axes = axes * np.where(signs == 0, 1.0, signs)[:, None]
    total = max(float(np.sum(centred**2)), 1e-300)
    return Map(centred @ axes.T, (units[1] - middle) @ axes.T, spread**2 / total)
