"""The decoder of `tiny` as an experiment, without any file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import tiny

from spt_jax.config import default_config
from spt_jax.models.loading import LanguageModel, LMIdentity
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.training.experiment import Experiment


class Characters(tiny.CharacterEncoder):
    """`tiny.CharacterEncoder` both ways."""

    text_vocab_size = tiny.CONFIG.vocab_size

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(token)) for token in ids if token > 2)


def experiment(prompts: int = 3, **options: Any) -> Experiment:
    """`options` are those of the section evaluation, ``max_new_tokens`` and others."""
    config = default_config()
    config.bank.num_prompts, config.bank.prompt_length = prompts, 4
    config.data.max_length, config.data.max_buckets = 224, 1
    config.evaluation.update({"batch": 4, "max_new_tokens": 3, "samples": 2} | options)
    lm = LanguageModel(tiny.CONFIG, tiny.params(), Characters(), LMIdentity("tiny", "", "0" * 64))  # pyright: ignore[reportArgumentType]
    model = dataclasses.replace(tiny.MODEL, adapter=SoftPrompts(prompts, 4, stddev=0.5))
    return Experiment(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]), lm, model)
