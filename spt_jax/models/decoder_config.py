"""What makes one decoder family differ from another, as plain fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding

from spt_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")
QUANTIZATIONS = ("none", "int8", "int4")
ATTENTION_KERNELS = ("xla", "cudnn", "splash")

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": tuple(DTYPES),
    "remat": REMAT_POLICIES,
    "quantization": QUANTIZATIONS,
    "attention_kernel": ATTENTION_KERNELS,
    "activation": ACTIVATIONS,
    "norm": ("rms", "layer"),
    "norm_placement": ("input", "output", "both", "sum"),
    "parallel_residual": (None, "two norms", "one norm"),
    "query_key_norm": (None, "head", "each head", "width"),
    "position_embedding": ("rotary", "learned"),
}


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MOST_OF_A_KIND = 10_000
"""Of layers, or of heads in one: a file that names more lies, and lists of them would fill the memory."""


def refuse_too_many(count: int, what: str) -> int:
    """Gives `count` back.

    Raises:
        UserError: It is above `MOST_OF_A_KIND`.
    """
    if count > MOST_OF_A_KIND:
        raise UserError(f"{what} is {count}; allowed: at most {MOST_OF_A_KIND}")
    return count


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training length.

    Attributes:
        kind: ``"linear"`` divides every frequency by `factor` (position interpolation, arXiv 2306.15595).
            ``"dynamic"`` raises the base for contexts beyond the original length (NTK-aware scaling).
            ``"llama3"`` divides the frequencies of wavelengths beyond ``original / low_freq_factor``, leaves those
            below ``original / high_freq_factor`` and blends between (Llama 3.1, arXiv 2407.21783).
            ``"yarn"`` divides pairs that turn fewer than `beta_slow` times over the original length, leaves those that
            turn more than `beta_fast` times and blends between (arXiv 2309.00071).
            ``"longrope"`` divides each pair's frequency by its own factor, one list for contexts within the original
            length and one for longer ones (arXiv 2402.13753).
            ``"factors"`` divides each pair's frequency by its own factor (how GGUF files store Llama 3's).
        factor: The stretch.
        original_max_position_embeddings: The pre-training length in tokens.
        low_freq_factor: Llama 3 only.
        high_freq_factor: Llama 3 only.
        beta_fast: YaRN only, turns.
        beta_slow: YaRN only, turns.
        truncate: YaRN only; whether the blend's borders are rounded to whole pairs.
        attention_factor: Multiplies cosines and sines (YaRN and LongRoPE).
        factors: One divisor for each rotated pair; LongRoPE's short ones.
        long_factors: LongRoPE's long ones.
    """

    kind: str
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{field} of the rope scaling is {value}; allowed: a number above 0")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise UserError(
                f"low_freq_factor and high_freq_factor of the rope scaling are {self.low_freq_factor} and "
                f"{self.high_freq_factor}; allowed: two numbers above 0, the first below the second"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the context."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864).

    Attributes:
        theta: The base; pair i of a rotated width d turns by ``theta ** (-2 i / d)`` radians a position.
        scaling: None for the frequencies as they are.
    """

    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not 1 < self.theta < math.inf:
            raise UserError(f"the base of rotary positions (rope_theta) is {self.theta}; allowed: a number above 1")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What some layers do and others do not.

    Attributes:
        rope: None for a layer without rotary positions (NoPE, arXiv 2305.19466, or a family of learned positions).
        window: A query sees the last `window` positions, its own included; None for all.
    """

    rope: Rope | None = Rope()
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal decoder, described by what makes it differ.

    Hashable, so that it may be a static argument of a jitted function.

    Attributes:
        vocab_size: V, rows of the embedding table.
        hidden_size: M, the model width.
        intermediate_size: Width of the MLP.
        num_layers: Number of blocks.
        num_attention_heads: H, query heads.
        num_key_value_heads: Heads of keys and values; divides `num_attention_heads` (grouped-query attention).
        head_dim: Width of one head.
        max_position_embeddings: The longest context in tokens that the files describe.
        context_length: A context chosen by `with_context_length`; None as trained.
        embedding_size: Width of the embedding table where a projection leads from it to M and back (OPT-350m); None
            for M.
        embedding_scale: Multiplies the embeddings of tokens (Gemma's √M).
        embedding_dropout: Whether the LM's own dropout, where it is on, acts on what enters the first block too (GPT-2,
            GPT-NeoX; not OPT).
        position_embedding: ``"rotary"``, or ``"learned"``: a table added to what enters the first block.
        position_offset: Rows of that table before position 0 (OPT: 2).
        layer_kinds: The distinct kinds of layers.
        layer_pattern: For each layer the index of its kind; empty where there is one kind.
        rotary_dim: How many leading features of a head are rotated; None for all.
        norm: ``"rms"`` (arXiv 1910.07467) or ``"layer"`` (arXiv 1607.06450).
        norm_eps: Added to every mean square or variance.
        norm_affine: Whether norms have parameters.
        norm_plus_one: Whether a norm multiplies by ``1 + scale`` (Gemma).
        norm_placement: ``"input"`` normalises what enters attention and MLP, ``"output"`` what leaves them (OLMo 2),
            ``"both"`` does both (Gemma 2), ``"sum"`` normalises the residual sum after each (OPT-350m).
        final_norm: Whether the last block's output is normalised.
        parallel_residual: Attention and MLP side by side, each behind its own norm (``"two norms"``, GPT-NeoX) or both
            behind the first (``"one norm"``, StableLM 2); None for one after the other.
        query_key_norm: Normalises queries and keys before rotation: each head by one scale (``"head"``, Qwen 3), each
            by its own (``"each head"``, StableLM 2), all heads as one vector (``"width"``, OLMo 2); None for none.
        attention_scale: Multiplies query-key products; None for ``head_dim ** -0.5``.
        attention_scale_by_layer: Whether layer i (from 1) divides them by i as well (GPT-2's option).
        attention_softcap: c in ``c · tanh(x / c)`` over attention logits (Gemma 2); None for none.
        logit_softcap: The same over vocabulary logits.
        activation: ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"`` or ``"relu"``.
        gated_mlp: ``down(act(gate(x)) · up(x))`` (arXiv 2002.05202) or ``down(act(up(x)))``.
        qkv_bias: Whether the projections to queries, keys and values carry a bias.
        output_bias: Whether attention's output projection carries a bias.
        mlp_bias: Whether the MLP's projections carry a bias.
        tie_word_embeddings: Whether the vocabulary projection is the transposed embedding table.
        dtype: ``"float32"`` or ``"bfloat16"``; the type of parameters and activations. Softmaxes, norms and rotary
            tables are computed in float32 whatever it is.
        remat: ``"none"`` keeps every activation for the backward pass, ``"dots"`` keeps the results of weight matrix
            products, ``"full"`` keeps each block's input alone.
        quantization: How the blocks' kernels are stored: ``"none"``, ``"int8"`` or ``"int4"``.
        attention_kernel: What computes attention over whole rows: ``"xla"``, or where they can serve ``"cudnn"``
            (`spt_jax.models.attention.cudnn_lacks`) and ``"splash"`` (`spt_jax.models.splash.splash_lacks`).
        attention_sharding: How ``[B, T, H, head_dim]`` lies on the devices, for ``"splash"``, which XLA cannot split;
            None for one device.
        unrolled: Whether the compiled program repeats the blocks instead of looping over them. On a GPU a loop copies
            what it keeps for the backward pass and each layer's weights; on a CPU and a TPU it compiles in less time.
        joint_projections: Whether projections of one input may be one product; see
            `spt_jax.models.layers.project_together`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    context_length: int | None = None
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_dropout: bool = False
    position_embedding: str = "rotary"
    position_offset: int = 0
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)
    layer_pattern: tuple[int, ...] = ()
    rotary_dim: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_affine: bool = True
    norm_plus_one: bool = False
    norm_placement: str = "input"
    final_norm: bool = True
    parallel_residual: str | None = None
    query_key_norm: str | None = None
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    remat: str = "none"
    quantization: str = "none"
    attention_kernel: str = "xla"
    attention_sharding: NamedSharding | None = None
    unrolled: bool = False
    joint_projections: bool = False

    def __post_init__(self) -> None:
        for field in _SIZES:
            if (value := getattr(self, field)) < 1:
                raise UserError(f"{field} is {value}; allowed: 1 or more")
        for field in ("num_layers", "num_attention_heads"):
            refuse_too_many(getattr(self, field), field)
        for field in ("norm_eps", "attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{field} is {value}; allowed: a number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(f"{field} is {value!r}; allowed: {', '.join(str(choice) for choice in allowed)}")
        expected = self.num_layers if len(self.layer_kinds) > 1 else 0
        if len(self.layer_pattern) != expected or any(not 0 <= i < len(self.layer_kinds) for i in self.layer_pattern):
            raise UserError(
                f"layer_pattern names the kinds of {len(self.layer_pattern)} layers; "
                f"there are {self.num_layers} layers of {len(self.layer_kinds)} kinds"
            )
        if any(kind.window is not None and kind.window < 1 for kind in self.layer_kinds):
            raise UserError("a sliding window is below 1; allowed: 1 or more positions, or none")
        if self.position_embedding == "rotary":
            self._check_rotation(self.head_dim if self.rotary_dim is None else self.rotary_dim)

    def _check_rotation(self, rotated: int) -> None:
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise UserError(
                f"{rotated} features of a head are rotated; allowed: an even number from 2 to {self.head_dim}"
            )
        for scaling in self._scalings:
            lists = {"short_factor": scaling.factors, "long_factor": scaling.long_factors}
            for name, factors in lists.items():
                wanted = scaling.kind == "longrope" or factors
                if wanted and (len(factors) != rotated // 2 or not all(factor > 0 for factor in factors)):
                    raise UserError(
                        f"{name} of the rope scaling has {len(factors)} numbers; {rotated // 2} pairs of features are "
                        "rotated, and each needs one above 0"
                    )

    @property
    def jax_dtype(self) -> Any:
        """The JAX type of parameters and activations."""
        return DTYPES[self.dtype]

    @property
    def longest_row(self) -> int:
        """How many tokens a row may have, its soft prompt included.

        Rotary positions that depend on the length (LongRoPE) are taken for the pre-training length unless
        `with_context_length` says more.
        """
        if self.context_length is not None:
            return self.context_length
        lengths = [s.original_max_position_embeddings for s in self._scalings if s.depends_on_length]
        return min([self.max_position_embeddings, *lengths])

    def with_context_length(self, tokens: int) -> DecoderConfig:
        """The same decoder for rows of up to `tokens` tokens.

        Rotary positions that depend on the length (dynamic, LongRoPE) take their frequencies from it, for every row
        alike, so that a row's result does not depend on how it is packed or decoded.

        Raises:
            UserError: The decoder has no positions beyond a smaller length.
        """
        dynamic = [s.factor for s in self._scalings if s.kind == "dynamic"]
        longest = int(self.max_position_embeddings * max([1.0, *dynamic]))
        if not 1 <= tokens <= longest:
            raise UserError(f"a context of {tokens} tokens is asked for; this LM allows 1 to {longest}")
        return dataclasses.replace(self, context_length=tokens)

    @property
    def _scalings(self) -> list[RopeScaling]:
        return [kind.rope.scaling for kind in self.layer_kinds if kind.rope is not None and kind.rope.scaling]
