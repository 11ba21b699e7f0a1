"""Perplexities of a trained run with its bank as it is, taken away, untrained, zeroed and shuffled; prints JSON.

Run as a program (``python ablation.py WORKDIR DIALOGUES``), because the tests' own process compiles for other devices.
"""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np

from spt_jax.commands.restored import open_run
from spt_jax.evaluation.likelihood import score_rows
from spt_jax.prompting.selective_lm import without_prompt
from spt_jax.training.experiment import pack_dialogues, read_splits


def main(workdir: str, dialogues: int) -> None:
    run = open_run(workdir)
    model, trained = run.experiment.model, run.trainable
    prompts = jnp.asarray(trained["bank"]["prompts"])
    rows = pack_dialogues(run.config, read_splits(run.config).test[:dialogues], run.lm.tokenizer, run.template).rows
    order = np.random.default_rng(0).permutation(prompts.shape[1])

    def with_bank(bank):
        return model, {"bank": {"prompts": bank}, "retriever": trained["retriever"]}

    variants = {
        "after": (model, trained),
        "none": (without_prompt(model), {}),
        "before": (model, run.initial),
        "zeroed": with_bank(jnp.zeros_like(prompts)),
        "shuffled": with_bank(prompts[:, order]),
    }
    options = {"mesh": run.experiment.mesh, "batch_size": 2, "pad_id": run.lm.tokenizer.pad_id, "max_buckets": 1}
    perplexities = {
        name: score_rows(described, run.lm.params, tree, rows, **options).perplexity
        for name, (described, tree) in variants.items()
    }
    print(json.dumps(perplexities))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
