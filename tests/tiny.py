"""A decoder, a bank and dialogues so small that every law of the method can be checked both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate, similar_pairs
from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.packing import Row, pack
from spt_jax.data.similarity import BleuSimilarity, pair_texts
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import abstract_params, random_params
from spt_jax.parallel.rules import parameter_sharding
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.objective import losses_and_gradients
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import SelectiveLM

CONFIG = DecoderConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
MODEL = SelectiveLM(CONFIG, SoftPrompts(3, 4, stddev=0.5), RetrieverConfig(), max_logit_rows=64)

STEP = jax.jit(losses_and_gradients, static_argnums=(0, 1, 5))
"""Compiled once a shape for all tests."""

DIALOGUES = (
    Dialogue(
        ("I mend clocks.", "I have two cats."),
        (
            Turn("hi there", "hello, do you like cats?"),
            Turn("yes!", "i have two."),
            Turn("nice", "they sleep on clocks"),
        ),
    ),
    Dialogue(
        ("I mend clocks.", "I have two dogs."),
        (Turn("what do you do?", "i mend clocks"), Turn("wow", "it is slow work")),
    ),
    Dialogue(
        ("I sail alone.",),
        (
            Turn("where are you?", "at sea"),
            Turn("still?", "yes"),
            Turn("and now?", "in port, at last"),
            Turn("ok", "bye"),
        ),
    ),
    Dialogue(("I bake bread at four in the morning.",), (Turn("tired?", "always, but the bread is warm"),)),
)


class CharacterEncoder:
    """A token a character, ids below 128: every prefix of a text is a prefix of its tokens."""

    bos_id = 1
    eos_id = 2
    pad_id = 0
    own_pad_id = 0
    lm_vocab_size = None
    stop_ids = (2,)
    vocab_size = 128

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[min(ord(character), 127) for character in text] for text in texts]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of both layouts for the same turns."""

    rows: list[Row]
    texts: list[list[str]]

    def batch(self, order: Sequence[int] | None = None, *, rows: int = 0, length: int = 0) -> dict[str, Any]:
        """One batch of all rows (or `order`), padded to `rows` rows and `length` tokens."""
        indices = np.array(range(len(self.rows)) if order is None else order, np.int64)
        indices = np.concatenate([indices, np.full(max(0, rows - len(indices)), -1, np.int64)])
        shape = BucketShape(
            max(length, max(len(row) for row in self.rows)),
            -(-max(len(row.target_ids) for row in self.rows) // 16) * 16,
            max(len(row.turns) for row in self.rows),
        )
        batch = collate(self.rows, indices, shape, CharacterEncoder.pad_id)
        similarity = BleuSimilarity([text for texts in self.texts for text in texts])
        first = np.cumsum([0] + [len(texts) for texts in self.texts])
        places = np.full((len(indices), shape.turns), -1, np.int64)
        for place, index in enumerate(indices):
            if index >= 0:
                places[place, : len(self.texts[index])] = first[index] + np.arange(len(self.texts[index]))
        batch["similar"] = similar_pairs(similarity, places.reshape(-1), 20.0)
        return {name: jnp.asarray(array) for name, array in batch.items()}


def packed(layout: str, dialogues: Sequence[Dialogue] = DIALOGUES) -> Packed:
    rows = pack(dialogues, CharacterEncoder(), layout=layout, max_length=224).rows
    return Packed(list(rows), pair_texts(rows, dialogues, "persona"))


def params(config: DecoderConfig = CONFIG, seed: int = 0) -> Any:
    """A random frozen tree with weights large enough that prompts and attention matter."""
    tree = random_params(config, jax.random.key(seed))
    return {**tree, "embed_tokens": tree["embed_tokens"] * 10, "lm_head": tree["lm_head"] * 20}


def trainable(model: SelectiveLM = MODEL, seed: int = 1) -> Any:
    return model.init(jax.random.key(seed))


def relative_difference(a: Any, b: Any) -> float:
    """max |a − b| / max |b| over one array, the largest over a tree of the same shapes; NaN where any is."""

    def one(x: Any, y: Any) -> float:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) if x.size else 0.0

    # Python's max passes over a NaN that is not the first.
    return float(np.max(jax.tree.leaves(jax.tree.map(one, a, b)), initial=0.0))


def layout_of(decoder: DecoderConfig, mesh: Any) -> Any:
    """Where a frozen tree of this decoder lies on a mesh."""
    boxes = abstract_params(decoder)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: parameter_sharding(mesh, box.names, box.value.shape), boxes, is_leaf=is_box)
