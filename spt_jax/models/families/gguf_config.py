"""A GGUF file's metadata, read field by field into the fields of a `DecoderConfig`.

Keys and their meaning are those of llama.cpp's converter (``conversion/``) and loader (``llama-model.cpp``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spt_jax.errors import UserError
from spt_jax.models.decoder_config import Rope, RopeScaling, refuse_too_many

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.layer_norm_epsilon": (),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (),
    "attention.output_scale": (),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.key_length_mla": (),
    "attention.shared_kv_layers": (0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "embedding_scale": (1.0,),
    "embedding_length_out": (),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
    "swin_norm": (False,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "pooling_type": (0,),
}
"""Keys that change the arithmetic in a way the decoder does not have, and the values that leave it alone."""

_ROPE_TYPES = ("none", "linear", "yarn", "longrope")


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
            names = ", ".join(repr(choice) for choice in allowed) or "none"
            raise UserError(
                f"{self.where}: {self.architecture}.{key} is {value!r}, which is not supported; supported: {names}"
            )

    def number_for_all(self, key: str, value: Any) -> int:
        """A whole number that a file may list layer by layer; `UserError` where layers differ."""
        values = set(value) if isinstance(value, list) else {value}
        if len(values) != 1:
            raise UserError(
                f"{self.where}: {self.architecture}.{key} differs from layer to layer ({sorted(values)}), "
                "which is not supported"
            )
        return int(values.pop())

    def sizes(self) -> dict[str, Any]:
        """The fields that every architecture spells alike.

        Raises:
            UserError: A field is missing, or says something the decoder cannot do.
        """
        for key, allowed in _UNSUPPORTED.items():
            self.refuse_unless(key, *allowed)
        heads = self.number_for_all("attention.head_count", self.required("attention.head_count"))
        hidden_size = int(self.required("embedding_length"))
        head_dim = int(self.get("attention.key_length") or hidden_size // heads)
        for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
            self.refuse_unless(key, head_dim)
        table = self.shapes.get("token_embd.weight")
        if table is None:
            raise UserError(f"{self.where} holds no tensor 'token_embd.weight'; the file is incomplete")
        width = int(self.get("rope.dimension_count") or head_dim)
        self.refuse_unless("rope.dimension_count_swa", width)
        return {
            "vocab_size": table[0],
            "hidden_size": hidden_size,
            "intermediate_size": self.number_for_all("feed_forward_length", self.required("feed_forward_length")),
            "num_layers": self.layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number_for_all(
                "attention.head_count_kv", self.get("attention.head_count_kv") or heads
            ),
            "head_dim": head_dim,
            "rotary_dim": None if width == head_dim else width,
            "max_position_embeddings": int(self.required("context_length")),
            "norm_eps": float(self.required("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "qkv_bias": "blk.0.attn_q.bias" in self.shapes or "blk.0.attn_qkv.bias" in self.shapes,
            "output_bias": "blk.0.attn_output.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in self.shapes,
        }

    def layers(self) -> int:
        """How many layers there are; `UserError` when that is not told, or no model has so many."""
        return refuse_too_many(int(self.required("block_count")), f"{self.where}: {self.architecture}.block_count")

    def windows(self, default: int = 0, period: int = 0) -> list[int | None]:
        """Each layer's window.

        ``attention.sliding_window`` is its length, 0 for none; ``attention.sliding_window_pattern`` says which layers
        have it: a truth value for each, or a number n for all but every n-th, 0 for all.

        Args:
            default: The window where the file names none.
            period: n where the file names no pattern.

        Raises:
            UserError: The pattern has not one value for each layer.
        """
        layers, window = self.layers(), int(self.get("attention.sliding_window", default))
        pattern = self.get("attention.sliding_window_pattern", period)
        if not isinstance(pattern, list):
            every = int(pattern)
            pattern = [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]
        if len(pattern) != layers:
            raise UserError(
                f"{self.where}: {self.architecture}.attention.sliding_window_pattern names {len(pattern)} layers; "
                f"{self.architecture}.block_count is {layers}"
            )
        return [window if sliding and window else None for sliding in pattern]

    def rope(self, theta: float = 10_000.0) -> Rope:
        """The rotation.

        Llama 3's scaled frequencies and LongRoPE's factors are not metadata but tensors
        (`spt_jax.models.files.gguf_file.ROPE_TENSORS`), whose values the file's reader puts into the metadata.

        Raises:
            UserError: A scaling that the decoder does not have.
        """
        # A file that names a factor and no type means linear; most name neither.
        factor = float(self.get("rope.scaling.factor") or self.get("rope.scale_linear") or 0.0)
        kind = self.get("rope.scaling.type", "linear" if factor else "none")
        longest = int(self.required("context_length"))
        original = int(self.get("rope.scaling.original_context_length", longest))
        short, freqs = self.metadata.get("rope_factors_short"), self.metadata.get("rope_freqs")
        if kind not in _ROPE_TYPES or (kind == "longrope" and short is None) or (kind == "yarn" and factor == 0):
            missing = "" if kind not in _ROPE_TYPES else ", but what it needs is not in the file"
            raise UserError(
                f"{self.where}: {self.architecture}.rope.scaling.type is {kind!r}{missing}; supported: none, linear, "
                "yarn (with rope.scaling.factor), longrope (with the tensors rope_factors_short and _long)"
            )
        if freqs is not None and (short is not None or kind != "none"):
            raise UserError(f"{self.where}: the tensor rope_freqs.weight beside rope scaling {kind!r} is not supported")
        scaling = None
        if short is not None:
            scaling = self._longrope(short, longest, original)
        elif freqs is not None:
            scaling = RopeScaling("factors", factors=tuple(freqs))
        elif kind == "linear" and factor not in (0.0, 1.0):
            scaling = RopeScaling("linear", factor)
        elif kind == "yarn":
            scaling = self._yarn(factor, original)
        return Rope(float(self.get("rope.freq_base", theta)), scaling)

    def _longrope(self, short: list[float], longest: int, original: int) -> RopeScaling:
        long = self.metadata.get("rope_factors_long")
        if long is None or len(long) != len(short):
            raise UserError(f"{self.where} holds rope_factors_short.weight, but no rope_factors_long.weight like it")
        stretched = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
        return RopeScaling(
            "longrope",
            longest / original,
            original,
            attention_factor=float(self.get("rope.scaling.attn_factor", stretched)),
            factors=tuple(short),
            long_factors=tuple(long),
        )

    def _yarn(self, factor: float, original: int) -> RopeScaling:
        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        # Hugging Face's attention_factor where the converter found one; llama.cpp itself passes it over.
        whole = self.get("rope.scaling.yarn_attn_factor")
        whole = mscale(1.0) / mscale(self.get("rope.scaling.yarn_log_multiplier", 0.0)) if whole is None else whole
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=float(self.get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(self.get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=float(whole) * float(self.get("rope.scaling.attn_factor", 1.0)),
        )
