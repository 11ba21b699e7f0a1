"""P-tuning (arXiv 2103.10385): a soft prompt whose virtual tokens come through an MLP, as PEFT defines it."""

from __future__ import annotations

import flax.linen as nn
import jax

from spt_jax.prompting.retriever import Linear


class PromptEncoder(nn.Module):
    """One soft prompt through an MLP that is shared by its virtual tokens.

    ``embedding -> Linear(M, h) -> relu -> Linear(h, h) -> relu -> Linear(h, M)``. Parameters, float32:
    ``{"embedding": [P, M], "lin_0": {"kernel": [M, h], "bias": [h]}, "lin_1": {"kernel": [h, h], "bias": [h]},
    "lin_2": {"kernel": [h, M], "bias": [M]}}``; the embedding starts as N(0, 1), the layers as torch's ``nn.Linear``.

    The MLP serves training alone: for inference its output is kept as a bank of one prompt.

    Attributes:
        prompt_length: P.
        hidden_size_out: M.
        width: h.
    """

    prompt_length: int
    hidden_size_out: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """float32 ``[1, P, M]``."""
        x = self.param("embedding", nn.initializers.normal(1.0), (self.prompt_length, self.hidden_size_out))
        x = jax.nn.relu(Linear(self.width, name="lin_0")(x))
        x = jax.nn.relu(Linear(self.width, name="lin_1")(x))
        return Linear(self.hidden_size_out, name="lin_2")(x)[None]
