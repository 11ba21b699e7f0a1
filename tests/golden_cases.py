"""The authors' reference numbers as this package meets them: their texts, configuration and parameters, read by us."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from watched_step import watched_step

from spt_jax.config import Config
from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate, inference_contexts, similar_pairs, training_contexts
from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.official import official_rows
from spt_jax.data.packing import Row
from spt_jax.data.similarity import BleuSimilarity
from spt_jax.interop.official import OfficialTensors
from spt_jax.interop.official_config import read_official_run
from spt_jax.interop.official_tree import official_trainable
from spt_jax.models.decoder import decode, embed, vocabulary_head, vocabulary_logits
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.prompting import retriever as retriever_module
from spt_jax.prompting.encoder import to_torch
from spt_jax.prompting.losses import target_losses
from spt_jax.prompting.objective import Objective
from spt_jax.prompting.retriever import RetrieverConfig, cosine_similarity
from spt_jax.prompting.selective_lm import (
    SelectiveLM,
    at_targets,
    batch_scores,
    join,
    logit_chunks,
    target_hidden,
    target_turn_onehot,
    without_prompt,
)
from spt_jax.training.description import describe, objective_of

CASES = (
    "llama436_gqa_b4_k4_v1",
    "llama_b2_k4_v1",
    "opt_b2_only_longest",
    "opt_b4_annealing",
    "opt_b4_k2_v1_prompt",
    "opt_b4_no_contrastive",
    "opt_b4_no_ensemble",
    "opt_b4_relu",
    "opt_b4_retriever_extra_lm",
    "opt_b4_selective_off",
    "opt_b4_tau",
    "opt_base_b2_k4_v8_both",
    "opt_trained_b8",
)
PROGRESS = 0.25
"""Steps done over all steps, which the reference kept fixed: its annealing weights are 0.75 a softmax."""

_ENCODER = "retriever."
_NORMALIZER = "prompt_normalizer."
_LENGTHS, _TARGETS = (128, 256, 368, 400), (48, 112, 256)
"""The few sizes to which the reference's rows are padded, so that cases share compiled functions."""
_PROMPT_WIDTH = 400
"""Every inference prompt fits."""


@functools.cache
def language_model(folder: Path) -> LanguageModel:
    """A tiny LM, loaded once for all cases that use it."""
    return load_lm(str(folder))


class GoldenCase:
    """One folder of reference numbers.

    Attributes:
        name: Of the folder.
        manifest: ``manifest.json``.
        config: What `read_official_run` makes of the manifest's configuration.
        lm: The frozen LM, float32.
        model: The description.
        objective: Weights and temperatures.
        steps: How many training steps have numbers.
    """

    def __init__(self, golden: Path, name: str, scratch: Path) -> None:
        self.name, self._folder = name, golden / name
        self.manifest: dict[str, Any] = self._json("manifest.json")
        source = golden / "models" / self.manifest["model"]
        theirs = scratch / f"{name}.yml"
        theirs.write_text(yaml.safe_dump(self.manifest["config"]))
        self.config: Config = read_official_run(theirs, str(source), {}).config
        # Torch's default is 0.1; the reference had none ("notes" in the manifest).
        self.config.retriever.dropout = 0.0
        self.lm = language_model(source)
        self.model: SelectiveLM = describe(self.config, self.lm.config)
        self.objective: Objective = objective_of(self.config)
        self.steps = len(list(self._folder.glob("step*.npz")))
        self.entries: list[dict[str, Any]] = self._json("test_step.json")
        self._batches: list[dict[str, Any]] = self._json("batches.json")

    def _json(self, name: str) -> Any:
        return json.loads((self._folder / name).read_text())

    def numbers(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of ``step{step}.npz``."""
        with np.load(self._folder / f"step{step}.npz") as arrays:
            return dict(arrays)

    def parameters(self, name: str) -> dict[str, np.ndarray] | None:
        """The tensors of ``params_{name}.npz`` by the reference's names; None where there is no such file."""
        path = self._folder / f"params_{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as arrays:
            return dict(arrays)

    def trainable(self, name: str) -> Any:
        """The trainable tree of ``params_{name}.npz``."""
        tensors = self.parameters(name)
        assert tensors is not None
        encoder = {key.removeprefix(_ENCODER): value for key, value in tensors.items() if key.startswith(_ENCODER)}
        normalizer = {key.removeprefix(_NORMALIZER): x for key, x in tensors.items() if key.startswith(_NORMALIZER)}
        prompts = np.stack([tensors[f"models.{k}.prompt"] for k in range(self.model.num_prompts)])
        official = OfficialTensors(self.name, prompts, normalizer, encoder, {})
        return jax.tree.map(jnp.asarray, official_trainable(official, self.config))

    @functools.cached_property
    def _rows(self) -> list[list[Row]]:
        return [self._rows_of(batch) for batch in self._batches]

    def _rows_of(self, batch: dict[str, Any]) -> list[Row]:
        dialogues = [_dialogue(*told) for told in _told(batch)]
        data = self.config.data
        rows = official_rows(
            dialogues,
            self.lm.tokenizer,
            max_length=data.max_length,
            freeze_persona=data.freeze_persona,
            freeze_context=data.freeze_context,
        )
        return [[row for row in rows if row.dialogue == d][-1] for d in range(len(dialogues))]

    def bleu(self, step: int) -> np.ndarray:
        """BLEU between the personas of a batch, float64 ``[U, U]``."""
        personas = [" ".join(persona) for persona in self._batches[step]["persona_list"]]
        return BleuSimilarity(personas).matrix(np.arange(len(personas)))

    @functools.cache  # noqa: B019 - cases live as long as the tests
    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step in the reference's order."""
        rows = self._rows[step]
        indices = np.arange(len(rows))
        longest = max(len(row) for batch in self._rows for row in batch)
        targets = max(len(row.target_ids) for batch in self._rows for row in batch)
        shape = BucketShape(_fitting(longest, _LENGTHS), _fitting(targets, _TARGETS), 1)
        pad_id, width = self.lm.tokenizer.pad_id, self.config.data.max_length
        batch = collate(rows, indices, shape, pad_id) | training_contexts(rows, indices, width, pad_id)
        personas = BleuSimilarity([" ".join(persona) for persona in self._batches[step]["persona_list"]])
        batch["similar"] = similar_pairs(personas, indices, self.config.objective.bleu_threshold)
        return {name: jnp.asarray(array) for name, array in batch.items()}

    def prompts(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """The inference prompts of a test entry."""
        prompts = [row.inference_prompt for row in self._rows_of(entry["batch"])]
        return [prompt for prompt in prompts if prompt is not None]

    def inference_batch(self, entry: dict[str, Any]) -> dict[str, jax.Array]:
        """What the retriever reads of a test entry."""
        arrays = inference_contexts(self.prompts(entry), self.lm.tokenizer.pad_id, multiple=_PROMPT_WIDTH)
        return {name: jnp.asarray(array) for name, array in arrays.items()}

    @functools.cache  # noqa: B019
    def step(self, name: str, step: int) -> Any:
        """`watched_step` at the parameters of ``params_{name}.npz``."""
        return self.step_at(self.trainable(name), step)

    def step_at(self, trainable: Any, step: int, progress: float = PROGRESS) -> Any:
        """`watched_step` anywhere, on the batch of a step."""
        return watched_step(self.model, self.objective, self.lm.params, trainable, self.batch(step), progress)

    def scores(self, trainable: Any, batch: dict[str, jax.Array]) -> np.ndarray:
        """The retriever's scores ``[U, K]``."""
        return np.asarray(_SCORES(self._reader(self.model.retriever_config), self.lm.params, trainable, batch))[:, 0]

    def cosines(self, trainable: Any, batch: dict[str, jax.Array]) -> np.ndarray:
        """The cosines behind the scores ``[U, K]``, through the one activation that can be undone."""
        assert self.model.retriever_config is not None
        invertible = dataclasses.replace(self.model.retriever_config, activation="leaky_relu")
        scores = np.asarray(_SCORES(self._reader(invertible), self.lm.params, trainable, batch))[:, 0]
        return np.where(scores >= 0, scores, scores / np.float32(0.01))

    def _reader(self, retriever: RetrieverConfig | None) -> SelectiveLM:
        return dataclasses.replace(self.model, retriever_config=retriever)

    def target_losses(self, trainable: Any, batch: dict[str, jax.Array], scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """Losses position by position: ``[U, S, K]``, and ``[U, S]`` of the logits weighted by `scores` ``[U, K]``."""
        model = dataclasses.replace(without_prompt(self.model), adapter=self.model.adapter)
        bank = {"bank": trainable["bank"]}
        arrays = {name: x for name, x in batch.items() if name != "similar" and not name.startswith("retriever")}
        losses = _TARGET_LOSSES(model, self.lm.params, bank, arrays, jnp.asarray(scores)[:, None])
        return np.asarray(losses.nll), np.asarray(losses.fusion)

    def compared_vectors(self, trainable: Any, batch: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """What the cosine compares: of the contexts ``[U, M]``, and of the prompts ``[K, M]``."""
        contexts, prompts = _VECTORS(self.model, self.lm.params, trainable, batch)
        return np.asarray(contexts)[:, 0], np.asarray(prompts)

    def logits(self, trainable: Any, batch: dict[str, jax.Array]) -> np.ndarray:
        """Logits at every position of prompt, text and the padding up to the limit of a row: ``[K, U, P + R, V]``."""
        return np.asarray(_LOGITS(self.model, self.lm.params, trainable, batch))

    def logits_sumsq(self, trainable: Any, batch: dict[str, jax.Array]) -> np.ndarray:
        """The sum of their squares: ``[K, U]``."""
        squares = _SQUARES(self.model, self.lm.params, trainable, batch)
        return np.asarray(squares, np.float64).sum(axis=-1)


def by_their_names(tree: Any, num_prompts: int) -> dict[str, np.ndarray]:
    """A trainable tree, or gradients, by the reference's names and in torch's layout."""
    named = {f"models.{k}.prompt": np.asarray(tree["bank"]["prompts"][k]) for k in range(num_prompts)}
    retriever = tree.get("retriever", {})
    if "lin" in retriever:
        named["prompt_normalizer.weight"] = np.asarray(retriever["lin"]["kernel"]).T
        named["prompt_normalizer.bias"] = np.asarray(retriever["lin"]["bias"])
    if "encoder" in retriever:
        named |= {f"{_ENCODER}{name}": array for name, array in to_torch(retriever["encoder"]).items()}
    return named


def _told(batch: dict[str, Any]) -> list[tuple[list[str], list[str], str]]:
    return list(zip(batch["persona_list"], batch["context_input"], batch["target"], strict=True))


def _dialogue(persona: Sequence[str], context: Sequence[str], target: str) -> Dialogue:
    """A dialogue whose last turn has this context and this response."""
    said = [*(line[len("Q: ") :] for line in context), target]
    return Dialogue(tuple(persona), tuple(Turn(q, r) for q, r in zip(said[::2], said[1::2], strict=True)))


def _fitting(size: int, allowed: Sequence[int]) -> int:
    return next(length for length in allowed if size <= length)


_SCORES = jax.jit(batch_scores, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _TARGET_LOSSES(model: SelectiveLM, params: Any, trainable: Any, batch: Any, scores: jax.Array) -> Any:
    conditions = model.adapter.conditions(model.decoder, params, trainable)
    hidden = target_hidden(model, conditions, batch)
    return target_losses(
        lambda head, h: vocabulary_logits(model.decoder, head, h),
        vocabulary_head(conditions.params),
        hidden,
        at_targets(scores, target_turn_onehot(batch)),
        batch["target_ids"],
        batch["target_mask"],
        logit_chunks(model, hidden.shape[0], model.num_prompts, hidden.shape[1]),
    )


@functools.partial(jax.jit, static_argnums=0)
def _VECTORS(model: SelectiveLM, params: Any, trainable: Any, batch: Any) -> Any:
    seen: list[Any] = []

    def noted(contexts: jax.Array, prompts: jax.Array) -> jax.Array:
        seen.append((contexts, prompts))
        return cosine_similarity(contexts, prompts)

    with mock.patch.object(retriever_module, "cosine_similarity", noted):
        batch_scores(model, params, trainable, batch)
    return seen[0]


def _logits(model: SelectiveLM, params: Any, trainable: Any, batch: Any) -> jax.Array:
    bank = trainable["bank"]["prompts"]
    num_prompts, front, _ = bank.shape
    rows = join(bank, embed(model.decoder, params, batch["retriever_tokens"]))
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])
    valid = positions < (jnp.repeat(batch["lengths"], num_prompts) + front)[:, None]
    if "embed_positions" in params:
        # Their padding has the position before the first; its logits are nobody's but for the sum of all squares.
        table, offset = params["embed_positions"], model.decoder.position_offset
        rows = rows + jnp.where(valid[..., None], 0.0, table[offset - 1] - table[positions + offset])
    hidden, _ = decode(model.decoder, params, rows, positions, valid)
    logits = vocabulary_logits(model.decoder, vocabulary_head(params), hidden)
    return jnp.swapaxes(logits.reshape(-1, num_prompts, *logits.shape[1:]), 0, 1)


_LOGITS = jax.jit(_logits, static_argnums=0)
_SQUARES = jax.jit(lambda *given: jnp.sum(jnp.square(_logits(*given)), axis=-1), static_argnums=0)
