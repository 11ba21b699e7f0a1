"""What a decoder family is: how its files describe it and where each of their tensors goes in our tree."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.gguf_config import GGUFConfig
from spt_jax.models.families.hf_config import HFConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor lies in a file, given the decoder and the shape of our parameter (of one layer, where stacked).

    Attributes:
        stored_shape: The decoder and our shape to the shape in the file.
        arrange: The decoder, the file's array and our shape to an array of our shape; a view where that is possible,
            so that a shard of a memory-mapped tensor touches its own pages alone.
    """

    stored_shape: Callable[[DecoderConfig, Shape], Shape]
    arrange: Callable[[DecoderConfig, np.ndarray, Shape], np.ndarray]


def linear(num_inputs: int = 1) -> Layout:
    """A kernel stored ``(out, in)``; ours is ``(in..., out...)`` with `num_inputs` input axes."""

    def stored_shape(config: DecoderConfig, ours: Shape) -> Shape:
        return math.prod(ours[num_inputs:]), math.prod(ours[:num_inputs])

    return Layout(stored_shape, lambda config, array, ours: array.T.reshape(ours))


def conv1d(num_inputs: int = 1) -> Layout:
    """A kernel stored ``(in, out)``, as GPT-2's ``Conv1D`` does."""

    def stored_shape(config: DecoderConfig, ours: Shape) -> Shape:
        return math.prod(ours[:num_inputs]), math.prod(ours[num_inputs:])

    return Layout(stored_shape, lambda config, array, ours: array.reshape(ours))


AS_STORED = Layout(lambda config, ours: ours, lambda config, array, ours: array)
"""Same shape here and there: norms, the embedding table."""

FLAT = Layout(lambda config, ours: (math.prod(ours),), lambda config, array, ours: array.reshape(ours))
"""A vector here split over several axes: the bias of a projection to heads."""

LINEAR = linear()
"""A kernel with one input axis, stored ``(out, in)``."""


def minus_one(layout: Layout) -> Layout:
    """A norm's scale that the file keeps with Gemma's one added: subtracted, what was there to 6e-8."""
    return Layout(layout.stored_shape, lambda config, array, ours: layout.arrange(config, array, ours) - 1.0)


def slice_of(
    layout: Layout, axis: int, start: Callable[[DecoderConfig], int], total: Callable[[DecoderConfig], int]
) -> Layout:
    """A parameter that shares a tensor with others, side by side.

    Args:
        layout: How the parameter's own part lies.
        axis: The stored axis along which the parts are joined.
        start: Where the part begins.
        total: The length of the joined axis.
    """

    def stored_shape(config: DecoderConfig, ours: Shape) -> Shape:
        shape = list(layout.stored_shape(config, ours))
        shape[axis] = total(config)
        return tuple(shape)

    def arrange(config: DecoderConfig, array: np.ndarray, ours: Shape) -> np.ndarray:
        size, first = layout.stored_shape(config, ours)[axis], start(config)
        part = array[first : first + size] if axis == 0 else array[:, first : first + size]
        return layout.arrange(config, part, ours)

    return Layout(stored_shape, arrange)


def third_of_each_head(layout: Layout, which: int) -> Layout:
    """Rows stored as query, key and value of the first head, of the second, … (GPT-NeoX); `which` of the three."""

    def stored_shape(config: DecoderConfig, ours: Shape) -> Shape:
        rows, *rest = layout.stored_shape(config, ours)
        return (3 * rows, *rest)

    def arrange(config: DecoderConfig, array: np.ndarray, ours: Shape) -> np.ndarray:
        rest = array.shape[1:]
        heads = array.reshape(config.num_attention_heads, 3, config.head_dim, *rest)[:, which]
        return layout.arrange(config, heads.reshape(-1, *rest), ours)

    return Layout(stored_shape, arrange)


def interleaved_pairs(layout: Layout) -> Layout:
    """Rows of each head in GGUF's order for Llama (a rotated pair side by side) to ours (half a head apart)."""

    def arrange(config: DecoderConfig, array: np.ndarray, ours: Shape) -> np.ndarray:
        rest = array.shape[1:]
        heads = array.reshape(-1, config.head_dim // 2, 2, *rest).swapaxes(1, 2)
        return layout.arrange(config, heads.reshape(array.shape), ours)

    return Layout(layout.stored_shape, arrange)


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one kind of tensor goes.

    Attributes:
        path: Our parameter, ``"layers/attention/q_proj/kernel"``. A rule whose parameter a configuration does not
            have (a bias, an untied head) is passed over.
        names: The tensor in the file, or several spellings of which a file has one. ``{prefix}`` stands for one of
            the table's prefixes, ``{layer}`` for the layer's number where layers are stacked, ``{head}`` for the
            head's where each head has a tensor.
        layout: How it lies there.
    """

    path: str
    names: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class TensorTable:
    """The tensors of a family in one kind of file.

    Attributes:
        rules: One for each parameter that any configuration of the family may have.
        ignored: Regular expressions of tensors that carry nothing the configuration does not say.
        prefixes: What may stand before the names: files of the bare decoder lack the outer module's name.
        embedding: The embedding table's name; it tells which prefix a file has.
        heads: Names of the head; one found in a file whose configuration ties it must equal the table.
    """

    rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...]
    prefixes: tuple[str, ...]
    embedding: str
    heads: tuple[str, ...]

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` may be left unread."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def prefix_in(self, names: Mapping[str, Any]) -> str:
        """The prefix that a file's tensors carry; the usual one where its embedding table is missing."""
        found = [prefix for prefix in self.prefixes if self.embedding.format(prefix=prefix) in names]
        return found[0] if found else self.prefixes[0]


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder family as data: adding one is an entry in `spt_jax.models.families.registry` and a parity test.

    Attributes:
        name: Its name in messages.
        model_types: ``model_type`` in a Hugging Face ``config.json``.
        architectures: Class names accepted under ``architectures`` there.
        hf_fields: The parsed ``config.json`` to the fields of its `DecoderConfig`; raises `UserError` for what the
            decoder cannot do.
        hf_tensors: Its tensors in Hugging Face's weight files.
        gguf_architectures: ``general.architecture`` in a GGUF file.
        gguf_fields: A GGUF file's metadata, likewise; None where the family is not read from GGUF.
        gguf_tensors: Its tensors in GGUF files.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    hf_fields: Callable[[HFConfig], dict[str, Any]]
    hf_tensors: TensorTable
    gguf_architectures: tuple[str, ...] = ()
    gguf_fields: Callable[[GGUFConfig], dict[str, Any]] | None = None
    gguf_tensors: TensorTable | None = None

    def config_from_hf(self, fields: Mapping[str, Any], where: str) -> DecoderConfig:
        """The decoder that a parsed ``config.json`` at `where` describes.

        Raises:
            UserError: A field is missing, or says something the decoder cannot do.
        """
        config = HFConfig(fields, where)
        with _naming(where):
            config.refuse_what_no_family_can()
            return DecoderConfig(**self.hf_fields(config))

    def config_from_gguf(self, metadata: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> DecoderConfig:
        """The decoder that a GGUF file's metadata describes; ties and biases show in which tensors it holds.

        Raises:
            UserError: As `config_from_hf`.
        """
        assert self.gguf_fields is not None
        with _naming(where):
            return DecoderConfig(**self.gguf_fields(GGUFConfig(metadata, shapes, where)))


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts the file before sentences that do not know it: those about a decoder's fields."""
    try:
        yield
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}") from error
