"""Our side of `train_step.py`: the package's own loader, packed rows, and jitted, donated train step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step_setup import BLEU_THRESHOLD, NUM_PROMPTS, PROMPT_LENGTH, rows_of_json

from spt_jax.config import default_config
from spt_jax.data.buckets import choose_buckets
from spt_jax.data.collate import Batch, collate, similar_pairs
from spt_jax.data.loader import DialogueLoader
from spt_jax.data.similarity import BleuSimilarity
from spt_jax.models.families.registry import family_of_hf
from spt_jax.models.files.weight_files import weights_of_folder
from spt_jax.models.weights import load_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.prompting.objective import losses_and_gradients
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step

_ENDLESS = 1 << 30


class Ours:
    """What `Rival` is for the others, with the same methods.

    Args:
        folder: What `train_step_setup.py` wrote.
        batch: Dialogues of a step.
        checking: Whether the turns are those of the comparison of losses, not those that are timed.
        device: ``"cpu"``, in float32, or ``"gpu"``, where the LM is bfloat16.
    """

    name = "ours"

    def __init__(self, folder: Path, batch: int, checking: bool = False, device: str = "cpu") -> None:
        self.on_gpu = device == "gpu"
        data = json.loads((folder / ("check.json" if checking else "timing.json")).read_text())
        self.folder, self.pad_id = folder, data["pad_id"]
        self.rows = rows_of_json(data["dialogue"])
        self.texts = [[data["personas"][row.dialogue]] * len(row.turns) for row in self.rows]
        config = default_config()
        config.bank.num_prompts, config.bank.prompt_length = NUM_PROMPTS, PROMPT_LENGTH
        config.optimizer.learning_rate, config.optimizer.clip_norm = data["learning_rate"], 0.0
        # Logits of 64 positions under four prompts: as fast on two cores as the default's 128, in less memory.
        config.model.max_logit_rows = 4096 if self.on_gpu else 256
        config.model.dtype = "bfloat16" if self.on_gpu else "float32"
        for name, weight in data["objective"].items():
            config.objective[f"{name}_weight"] = weight
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self._load(folder, config)
        self.loader = DialogueLoader(
            self.rows,
            batch_size=batch,
            pad_id=self.pad_id,
            seed=0,
            bucket_lengths=data["bucket_lengths"],
            pair_texts=self.texts,
            bleu_threshold=BLEU_THRESHOLD,
            prefetch=config.data.prefetch,
        )
        self._batches: Iterator[tuple[int, Batch]] = iter(())
        self._pending: Any = None

    def _load(self, folder: Path, config: Any) -> None:
        # load_lm would want a tokenizer, and hash the files.
        fields = json.loads((folder / "config.json").read_text())
        family = family_of_hf(fields, str(folder))
        decoder = dataclasses.replace(family.config_from_hf(fields, str(folder)), dtype=config.model.dtype)
        self.params = load_params(decoder, weights_of_folder(folder), family.hf_tensors)
        first = {name: np.asarray(array) for name, array in np.load(folder / "initial.npz").items()}
        self.trainable = {
            "bank": {"prompts": first["bank"]},
            "retriever": {"lin": {"kernel": first["kernel"], "bias": first["bias"]}},
        }
        optimizer = make_optimizer(config.optimizer, 1)
        self.model, self.objective = describe(config, decoder, self.mesh), objective_of(config)
        self.state = init_state(self.trainable, optimizer, self.mesh)
        self.step_fn = make_train_step(self.model, self.objective, optimizer, self.mesh)

    def check(self) -> dict[str, float]:
        """The losses of all turns; writes the gradients beside the data."""
        count = len(self.rows)
        [shape] = choose_buckets(self.rows, count, 1).shapes
        batch = collate(self.rows, np.arange(count), shape, self.pad_id)
        places = np.full((count, shape.turns), -1)
        done = 0
        for row, texts in enumerate(self.texts):
            places[row, : len(texts)] = np.arange(done, done + len(texts))
            done += len(texts)
        similarity = BleuSimilarity([text for texts in self.texts for text in texts])
        batch["similar"] = similar_pairs(similarity, places.reshape(-1), BLEU_THRESHOLD)
        compiled = jax.jit(losses_and_gradients, static_argnums=(0, 1))
        losses, gradients = compiled(
            self.model, self.objective, self.params, self.trainable, place_batch(self.mesh, batch)
        )
        arrays = {"bank": gradients["bank"]["prompts"], **gradients["retriever"]["lin"]}
        np.savez(self.folder / f"gradients_{self.name}.npz", **{name: np.asarray(x) for name, x in arrays.items()})
        return {name: float(getattr(losses, name)) for name in ("lm", "selection", "contrastive", "fusion", "total")}

    def _step(self, batch: Batch) -> float:
        """One step; its metrics are read while the next one runs, as in training. The turns of the batch."""
        self.state, metrics = self.step_fn(self.state, self.params, place_batch(self.mesh, batch))
        self._finish()
        self._pending = metrics
        return float(batch["turn_mask"].sum())

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and not np.isfinite(jax.device_get(pending)["loss/total"]):
            raise RuntimeError("the loss is not finite")

    def _one_of_each_shape(self) -> dict[Any, Batch]:
        shapes = {self.loader.shape(step): step for step in range(self.loader.steps_per_epoch)}
        return {shape: self.loader.batch(step) for shape, step in shapes.items()}

    def warm_up(self) -> None:
        """Compiles every shape and runs it once; the loader begins to prefetch."""
        for batch in self._one_of_each_shape().values():
            self._step(batch)
        self._finish()
        batches = self.loader.iterate(0, _ENDLESS)
        # Its threads start with the first batch, which a training waits for once.
        self._batches = itertools.chain([next(batches)], batches)

    def probe(self) -> dict[str, float]:
        """The second of two equal steps of middle length; as `run`."""
        batches = list(self._one_of_each_shape().values())
        batch = batches[len(batches) // 2]
        self._step(batch)
        self._finish()
        return self._timed(iter([(0, batch)]), 1)

    def run(self, steps: int) -> dict[str, float]:
        """The next `steps` steps, or a whole epoch where it is 0.

        Returns:
            Turns, seconds, seconds of all cores together, and those in which the step waited for the loader.
        """
        return self._timed(self._batches, steps or self.loader.steps_per_epoch)

    def _timed(self, batches: Iterator[tuple[int, Batch]], steps: int) -> dict[str, float]:
        begun, worked, turns, wait = time.perf_counter(), time.process_time(), 0.0, 0.0
        for _ in range(steps):
            before = time.perf_counter()
            _, batch = next(batches)
            wait += time.perf_counter() - before
            turns += self._step(batch)
        self._finish()
        seconds, cores = time.perf_counter() - begun, time.process_time() - worked
        return {"turns": turns, "seconds": seconds, "core_seconds": cores, "wait": wait}

    def device_memory(self) -> int:
        """Bytes, the most that was taken of the GPU; 0 on the CPU."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) if self.on_gpu else 0

    def product(self) -> float:
        """FLOP/s of a large square matrix product, the best of ten."""
        size, dtype = (8192, jnp.bfloat16) if self.on_gpu else (1024, jnp.float32)
        a, times = jax.random.normal(jax.random.key(0), (size, size), dtype), []
        product = jax.jit(lambda x: x @ x)
        for _ in range(11):
            begun = time.perf_counter()
            product(a).block_until_ready()
            times.append(time.perf_counter() - begun)
        return 2 * size**3 / min(times)
