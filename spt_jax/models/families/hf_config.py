"""A Hugging Face ``config.json``, read field by field into the fields of a `DecoderConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.errors import UserError, nearest
from spt_jax.models.decoder_config import LayerKind, Rope, RopeScaling, refuse_too_many

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """A parsed ``config.json``.

    Attributes:
        fields: Its fields.
        where: Its place, for messages.
    """

    fields: Mapping[str, Any]
    where: str

    def with_defaults(self, **defaults: Any) -> HFConfig:
        """The same with fields that the file may leave out, as transformers fills them."""
        return HFConfig({**defaults, **self.fields}, self.where)

    def _number(self, key: str, default: Any, kind: type) -> Any:
        value = self.fields.get(key)
        if value is None:
            value = default
        if value is _ABSENT:
            raise UserError(f"{self.where} has no field {key!r}, which describes the model; the file is incomplete")
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not known or (kind is int and value != int(value)):
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"{self.where}: {key} is {value!r}; it must be {wanted}")
        return kind(value)

    def integer(self, key: str, default: Any = _ABSENT) -> int:
        """A whole number; `UserError` when it is absent without a default, or no whole number."""
        return self._number(key, default, int)

    def layers(self, key: str = "num_hidden_layers") -> int:
        """How many layers there are; `UserError` as `integer`, or when no model has so many."""
        return refuse_too_many(self.integer(key), f"{self.where}: {key}")

    def number(self, key: str, default: Any = _ABSENT) -> float:
        """A number; `UserError` as `integer`."""
        return self._number(key, default, float)

    def optional(self, key: str) -> float | None:
        """A number, or None where the field is absent or null."""
        return None if self.fields.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.fields.get(key)
        if value is not None and value not in (True, False):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be true or false")
        return default if value is None else bool(value)

    def section(self, key: str) -> HFConfig:
        """The object under `key`; one without fields where it is absent or null."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be an object")
        return HFConfig(value or {}, f"{self.where} ({key})")

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """Raises `UserError` when `key` is present with a value outside `allowed`; null always passes."""
        value = self.fields.get(key)
        if value is not None and value not in allowed:
            names = ", ".join(repr(choice) for choice in allowed) or "none"
            raise UserError(f"{self.where}: {key} is {value!r}, which is not supported; supported: {names}")

    def refuse_what_no_family_can(self) -> None:
        """Refuses by name what would change the arithmetic of any family."""
        if self.fields.get("quantization_config"):
            method = self.section("quantization_config").fields.get("quant_method", "unnamed")
            raise UserError(
                f"{self.where}: the weights are quantised by {method!r}, which is not supported; "
                "give the unquantised folder or a GGUF file, and model.quantization to quantise here"
            )
        self.refuse_unless("is_encoder_decoder", False)
        self.refuse_unless("add_cross_attention", False)
        self.refuse_unless("use_bidirectional_attention", False)

    def activation(self, *keys: str, default: str) -> str:
        """Our name of the activation that the first present of `keys` names."""
        name = next((self.fields[key] for key in keys if self.fields.get(key) is not None), default)
        if name not in _ACTIVATIONS:
            raise UserError(
                f"{self.where}: the activation ({keys[0]}) is {name!r}, which is not supported; supported: "
                f"{', '.join(_ACTIVATIONS)}.{nearest(str(name), _ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def sizes(self) -> dict[str, Any]:
        """The sizes that every Llama-shaped family spells alike."""
        heads = self.integer("num_attention_heads")
        hidden_size = self.integer("hidden_size")
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self.integer("intermediate_size"),
            "num_layers": self.layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", hidden_size // heads),
            "max_position_embeddings": self.integer("max_position_embeddings"),
        }

    def rope(
        self, theta: float = 10_000.0, *, layer_type: str | None = None, types: Sequence[str] = ROPE_TYPES
    ) -> Rope:
        """The rotation, in transformers 5's spelling (``rope_parameters``) or 4's (``rope_theta``, ``rope_scaling``).

        Args:
            theta: The base where the file names none.
            layer_type: The entry of ``rope_parameters`` to read where they differ by kind of layer.
            types: The types of scaling that the family has.

        Raises:
            UserError: An unknown type, or a field it needs is missing.
        """
        parameters = self.rope_parameters(layer_type)
        kind = parameters.fields.get("rope_type", parameters.fields.get("type")) or "default"
        if kind not in types:
            raise UserError(
                f"{self.where}: rope_type is {kind!r}, which is not supported; supported: {', '.join(types)}"
            )
        base = parameters.number("rope_theta", self.number("rope_theta", theta))
        return Rope(base, None if kind == "default" else self._scaling(kind, parameters))

    def rope_parameters(self, layer_type: str | None = None) -> HFConfig:
        """The fields that describe the rotation, old and new spelling together."""
        merged = {**self.section("rope_scaling").fields, **self.section("rope_parameters").fields}
        parameters = HFConfig(merged, f"{self.where} (rope_parameters)")
        if layer_type is not None:
            return parameters.section(layer_type) if layer_type in merged else parameters
        for key, value in merged.items():
            if isinstance(value, Mapping):
                raise UserError(
                    f"{self.where}: rope_parameters differ by kind of layer ({key}), which is not supported here; "
                    "supported: the same for all layers"
                )
        return parameters

    def _scaling(self, kind: str, p: HFConfig) -> RopeScaling:
        longest = self.integer("max_position_embeddings")
        original = p.integer("original_max_position_embeddings", longest)
        match kind:
            case "linear":
                return RopeScaling(kind, p.number("factor"))
            case "dynamic":
                return RopeScaling(kind, p.number("factor"), longest)
            case "llama3":
                low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
                return RopeScaling(kind, p.number("factor"), original, low, high)
            case "yarn":
                factor = p.number("factor", longest / original)
                return RopeScaling(
                    kind,
                    factor,
                    original,
                    beta_fast=p.optional("beta_fast") or 32.0,
                    beta_slow=p.optional("beta_slow") or 1.0,
                    truncate=p.flag("truncate", True),
                    attention_factor=p.number("attention_factor", _yarn_attention(factor, p)),
                )
            case _:
                factor = p.number("factor", longest / original)
                stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
                return RopeScaling(
                    kind,
                    factor,
                    original,
                    attention_factor=p.number("attention_factor", stretched),
                    factors=p.numbers("short_factor"),
                    long_factors=p.numbers("long_factor"),
                )

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers; `UserError` when it is none."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
            raise UserError(f"{self.where}: {key} is {value!r}; it must be a list of numbers")
        return tuple(float(x) for x in value)

    def windows(self, layers: int, window: int | None, layer_types: Sequence[str]) -> list[int | None]:
        """Each layer's window; ``layer_types`` of the file wins over `layer_types`.

        Raises:
            UserError: A type is unknown, or their number is not that of the layers.
        """
        types = self.fields.get("layer_types") or layer_types
        known = {"full_attention": None, "sliding_attention": window}
        for kind in types:
            if kind not in known:
                raise UserError(
                    f"{self.where}: layer_types holds {kind!r}, which is not supported; supported: {', '.join(known)}"
                )
        if len(types) != layers:
            raise UserError(f"{self.where}: layer_types names {len(types)} layers; num_hidden_layers is {layers}")
        return [known[kind] for kind in types]


def _yarn_attention(factor: float, p: HFConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, over_all = p.optional("mscale"), p.optional("mscale_all_dim")
    return mscale(weight) / mscale(over_all) if weight and over_all else mscale(1.0)


def layers_of(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """The fields ``layer_kinds`` and ``layer_pattern`` for each layer's kind."""
    distinct = tuple(dict.fromkeys(kinds))
    pattern = tuple(distinct.index(kind) for kind in kinds) if len(distinct) > 1 else ()
    return {"layer_kinds": distinct, "layer_pattern": pattern}


def rotated(head_dim: int, share: float) -> dict[str, int | None]:
    """The field ``rotary_dim`` for a share of every head."""
    width = int(head_dim * share)
    return {"rotary_dim": None if width == head_dim else width}
