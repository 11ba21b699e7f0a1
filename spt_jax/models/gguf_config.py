"""A GGUF file's metadata, read field by field into the fields of a `DecoderConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import Rope, RopeScaling


@dataclasses.dataclass(frozen=True)
class GGUFConfig:
    """Metadata of a GGUF file; keys are given without the architecture that starts them.

    Attributes:
        metadata: The fields.
        shapes: Shape of every tensor by name.
        where: The file, for messages.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    where: str

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``{architecture}.{key}``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def required(self, key: str) -> Any:
        """The same; `UserError` when it is absent."""
        value = self.get(key)
        if value is None:
            name = f"{self.architecture}.{key}"
            raise UserError(f"{self.where} has no field {name!r}, which describes the model; the file is incomplete")
        return value

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """Raises `UserError` when ``{architecture}.{key}`` is present with a value outside `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            names = ", ".join(repr(choice) for choice in allowed)
            raise UserError(
                f"{self.where}: {self.architecture}.{key} is {value!r}, which is not supported; supported: {names}"
            )

    def sizes(self) -> dict[str, Any]:
        """The fields that every architecture spells alike.

        Raises:
            UserError: A field is missing, or says something the decoder cannot do.
        """
        self.refuse_unless("expert_count", 0)
        heads = int(self.required("attention.head_count"))
        hidden_size = int(self.required("embedding_length"))
        head_dim = int(self.get("attention.key_length") or hidden_size // heads)
        self.refuse_unless("attention.value_length", head_dim)
        key_value_heads = self.get("attention.head_count_kv") or heads
        if not isinstance(key_value_heads, int):
            raise UserError(f"{self.where}: layers with different numbers of key-value heads are not supported")
        table = self.shapes.get("token_embd.weight")
        if table is None:
            raise UserError(f"{self.where} holds no tensor 'token_embd.weight'; the file is incomplete")
        width = int(self.get("rope.dimension_count") or head_dim)
        return {
            "vocab_size": table[0],
            "hidden_size": hidden_size,
            "intermediate_size": int(self.required("feed_forward_length")),
            "num_layers": int(self.required("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
            "rotary_dim": None if width == head_dim else width,
            "max_position_embeddings": int(self.required("context_length")),
            "norm_eps": float(self.required("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "qkv_bias": "blk.0.attn_q.bias" in self.shapes,
            "output_bias": "blk.0.attn_output.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in self.shapes,
        }

    def rope(self, theta: float = 10_000.0) -> Rope:
        """The rotation.

        Llama 3's scaled frequencies and LongRoPE's factors are not metadata but the tensors ``rope_freqs.weight`` and
        ``rope_factors_short.weight``, ``rope_factors_long.weight``; the file's reader puts their values into the
        metadata as ``rope_freqs``, ``rope_factors_short`` and ``rope_factors_long``.

        Raises:
            UserError: A scaling that the decoder does not have.
        """
        base = float(self.get("rope.freq_base", theta))
        kind = self.get("rope.scaling.type", "none")
        longest = int(self.required("context_length"))
        original = int(self.get("rope.scaling.original_context_length", longest))
        if "rope_factors_short" in self.metadata:
            stretched = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
            scaling = RopeScaling(
                "longrope",
                longest / original,
                original,
                attention_factor=float(self.get("rope.scaling.attn_factor", stretched)),
                factors=tuple(float(x) for x in self.metadata["rope_factors_short"]),
                long_factors=tuple(float(x) for x in self.metadata["rope_factors_long"]),
            )
        elif "rope_freqs" in self.metadata and kind == "none":
            scaling = RopeScaling("factors", factors=tuple(float(x) for x in self.metadata["rope_freqs"]))
        elif "rope_freqs" in self.metadata or kind not in ("none", "linear", "yarn"):
            raise UserError(
                f"{self.where}: rope scaling is {kind!r}, which is not supported here; supported: none, linear, yarn"
            )
        elif kind == "none":
            scaling = None
        elif kind == "linear":
            scaling = RopeScaling("linear", float(self.required("rope.scaling.factor")))
        else:
            factor = float(self.required("rope.scaling.factor"))
            stretched = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            scaling = RopeScaling(
                "yarn",
                factor,
                original,
                beta_fast=float(self.get("rope.scaling.yarn_beta_fast", 32.0)),
                beta_slow=float(self.get("rope.scaling.yarn_beta_slow", 1.0)),
                attention_factor=stretched * float(self.get("rope.scaling.attn_factor", 1.0)),
            )
        return Rope(base, scaling)
