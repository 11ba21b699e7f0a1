"""Everything that `selection.py` and `nearest_tokens.py` say of a run, as JSON for ``results.json`` and the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spt_jax.data.loader import sequential_batches
from spt_jax.data.packing import Row
from spt_jax.evaluation.likelihood import Likelihoods
from spt_jax.evaluation.nearest_tokens import nearest_tokens
from spt_jax.evaluation.selection import persona_table, retriever_map, selection_figures
from spt_jax.evaluation.spread import spread_evenly
from spt_jax.parallel.rules import place_whole_batch, replicated, row_devices
from spt_jax.prompting.adapters import Trainable
from spt_jax.prompting.selective_lm import retriever_vectors
from spt_jax.training.experiment import Experiment, pad_id_of

MOST_DIALOGUES = 128
"""On the map; more points hide one another."""
MOST_PERSONAS = 24
"""In the table of prompts and personas: those with the most turns."""
NEAREST = 5


def diagnose(
    experiment: Experiment,
    trainable: Trainable,
    rows: Sequence[Row],
    likelihoods: Likelihoods,
    personas: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    """Diagnostics of a retriever over a bank, and of the bank's soft prompts; empty where there are neither.

    Args:
        experiment: The LM and the model; the likelihoods' mesh.
        trainable: What was learned.
        rows: The packed rows of all dialogues.
        likelihoods: Of every turn of them.
        personas: The lines of each dialogue's persona.

    Returns:
        ``figures``: see `SELECTION_DEFINITIONS`. ``personas``: a list of ``lines``, ``turns``, ``nll`` and ``usage``
        (K each). ``map``: ``contexts`` (``[x, y, selected, dialogue, turn]`` each), ``prompts`` and ``explained``; left
        out in the official mode, where a context's vector depends on its batch. All three tell of a choice among
        several prompts, and are absent without one. ``nearest_tokens``: K lists of P lists of ``[text, cosine]``; for a
        bank of embeddings alone.
    """
    model = experiment.model
    found: dict[str, Any] = {}
    if model.retriever_config is not None and model.num_prompts > 1:
        found["figures"] = selection_figures(likelihoods, experiment.config.objective.score_temperature)
        found["personas"] = _personas(likelihoods, personas)
        if not model.official:
            found["map"] = _map(experiment, trainable, rows, likelihoods)
    if "prompts" in trainable.get("bank", {}):
        found["nearest_tokens"] = _nearest(experiment, trainable["bank"]["prompts"])
    return found


def _personas(likelihoods: Likelihoods, personas: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    table = persona_table(likelihoods, personas)
    most = sorted(range(len(table.personas)), key=lambda g: (-table.turns[g], g))[:MOST_PERSONAS]
    return [
        {
            "lines": list(table.personas[g]),
            "turns": int(table.turns[g]),
            "nll": table.nll[:, g].tolist(),
            "usage": table.usage[:, g].tolist(),
        }
        for g in most
    ]


@cache
def _compiled(mesh: Mesh) -> Any:
    return jax.jit(retriever_vectors, static_argnums=0, out_shardings=replicated(mesh))


def _map(experiment: Experiment, trainable: Trainable, rows: Sequence[Row], likelihoods: Likelihoods) -> dict[str, Any]:
    e, config = experiment, experiment.config
    selected = {
        (int(d), int(t)): int(k)
        for d, t, k in zip(likelihoods.dialogue, likelihoods.turn, likelihoods.selected, strict=True)
    }
    shown = [rows[i] for i in spread_evenly(len(rows), MOST_DIALOGUES)]
    devices = row_devices(e.mesh)
    size = -(-min(config.evaluation.batch, len(shown)) // devices) * devices
    vectors, names, prompts = [], [], None
    batches = sequential_batches(
        shown, batch_size=size, pad_id=pad_id_of(config, e.lm.tokenizer), max_buckets=config.data.max_buckets
    )
    for batch, _ in batches:
        placed = place_whole_batch(e.mesh, batch)
        contexts, prompts = jax.device_get(_compiled(e.mesh)(e.model, e.lm.params, trainable, placed))
        present = batch["turn_mask"] > 0
        vectors.append(contexts[present])
        dialogues = np.broadcast_to(batch["dialogue_ids"][:, None], present.shape)[present]
        names += zip(dialogues.tolist(), batch["turn_ids"][present].tolist(), strict=True)
    found = retriever_map(np.concatenate(vectors), np.asarray(prompts))
    points = [
        [round(float(x), 5), round(float(y), 5), selected[name], *name]
        for (x, y), name in zip(found.contexts, names, strict=True)
    ]
    return {
        "contexts": points,
        "prompts": np.round(found.prompts, 5).tolist(),
        "explained": found.explained.tolist(),
    }


def _nearest(experiment: Experiment, prompts: jax.Array) -> list[list[list[list[Any]]]]:
    lm = experiment.lm

    def spelled(token: int) -> str:
        return lm.tokenizer.decode([token]) or f"token {token}"  # a special token has no text

    found = nearest_tokens(lm.config, lm.params, prompts, NEAREST, lm.tokenizer.text_vocab_size)
    return [
        [
            [[spelled(int(token)), round(float(cosine), 4)] for token, cosine in zip(*near, strict=True)]
            for near in zip(ids, cosines, strict=True)
        ]
        for ids, cosines in zip(found.ids, found.cosines, strict=True)
    ]
