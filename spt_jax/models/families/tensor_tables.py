"""Names and layouts of tensors in each family's files."""

from __future__ import annotations

from collections.abc import Callable

from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.families.family import (
    AS_STORED,
    FLAT,
    LINEAR,
    Layout,
    TensorRule,
    TensorTable,
    conv1d,
    interleaved_pairs,
    linear,
    minus_one,
    slice_of,
    third_of_each_head,
)

_JOINED = linear(num_inputs=2)
_HEADS = ("q_proj", "k_proj", "v_proj")


def _dense(ours: str, theirs: str, layout: Layout, bias: Layout = FLAT) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{ours}/kernel", (f"{theirs}.weight",), layout),
        TensorRule(f"{ours}/bias", (f"{theirs}.bias",), bias),
    )


def _norm(ours: str, theirs: str, layout: Layout = AS_STORED) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{ours}/scale", (f"{theirs}.weight",), layout),
        TensorRule(f"{ours}/bias", (f"{theirs}.bias",), AS_STORED),
    )


def _flat(*groups: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    return tuple(rule for group in groups for rule in group)


def _attention_width(config: DecoderConfig) -> int:
    return config.num_attention_heads * config.head_dim


def _key_value_width(config: DecoderConfig) -> int:
    return config.num_key_value_heads * config.head_dim


def _side_by_side(layout: Layout, axis: int) -> tuple[Layout, Layout, Layout]:
    """Query, key and value joined along a stored axis, one after the other."""

    def total(config: DecoderConfig) -> int:
        return _attention_width(config) + 2 * _key_value_width(config)

    starts: tuple[Callable[[DecoderConfig], int], ...] = (
        lambda config: 0,
        _attention_width,
        lambda config: _attention_width(config) + _key_value_width(config),
    )
    query, key, value = (slice_of(layout, axis, start, total) for start in starts)
    return query, key, value


def _joined_dense(theirs: str, kernels: tuple[Layout, ...], biases: tuple[Layout, ...]) -> tuple[TensorRule, ...]:
    rules = []
    for name, kernel, bias in zip("qkv", kernels, biases, strict=True):
        rules += _dense(f"layers/attention/{name}_proj", theirs, kernel, bias)
    return tuple(rules)


def _gate_up(theirs: str) -> tuple[TensorRule, ...]:
    def gate_and_up(config: DecoderConfig) -> int:
        return 2 * config.intermediate_size

    gate = slice_of(LINEAR, 0, lambda config: 0, gate_and_up)
    up = slice_of(LINEAR, 0, lambda config: config.intermediate_size, gate_and_up)
    return (
        TensorRule("layers/mlp/gate_proj/kernel", (theirs,), gate),
        TensorRule("layers/mlp/up_proj/kernel", (theirs,), up),
    )


_BLOCK = "{prefix}layers.{layer}."
_LLAMA_DENSE = {
    "attention/q_proj": ("self_attn.q_proj", LINEAR),
    "attention/k_proj": ("self_attn.k_proj", LINEAR),
    "attention/v_proj": ("self_attn.v_proj", LINEAR),
    "attention/o_proj": ("self_attn.o_proj", _JOINED),
    "mlp/gate_proj": ("mlp.gate_proj", LINEAR),
    "mlp/up_proj": ("mlp.up_proj", LINEAR),
    "mlp/down_proj": ("mlp.down_proj", LINEAR),
}
LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
OLMO2_NORMS = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
GEMMA2_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_LLAMA_BUFFERS = (r"(.*\.)?rotary_emb\.inv_freq",)


def llama_tensors(
    norms: dict[str, str] = LLAMA_NORMS,
    *,
    prefixes: tuple[str, ...] = ("model.", ""),
    ignored: tuple[str, ...] = (),
    heads: tuple[str, ...] = ("lm_head.weight",),
    query_key_norm: str = "self_attn.{which}_norm",
) -> TensorTable:
    """The names that Llama began and most families keep, in Hugging Face's files.

    Args:
        norms: Our norms of a block and theirs.
        prefixes: What may stand before the names.
        ignored: Patterns of further tensors that may be left unread.
        heads: Spellings of the head.
        query_key_norm: The norms of queries and keys, ``{which}`` for ``q`` or ``k``.
    """
    return TensorTable(
        rules=(
            TensorRule("embed_tokens", ("{prefix}embed_tokens.weight",), AS_STORED),
            *_flat(*(_dense(f"layers/{ours}", _BLOCK + name, lay) for ours, (name, lay) in _LLAMA_DENSE.items())),
            *_flat(*(_norm(f"layers/{ours}", _BLOCK + theirs) for ours, theirs in norms.items())),
            *_flat(
                *(
                    _norm(f"layers/attention/{which}_norm", _BLOCK + query_key_norm.replace("{which}", which), FLAT)
                    for which in "qk"
                )
            ),
            *_norm("final_norm", "{prefix}norm"),
            TensorRule("lm_head", heads, LINEAR),
        ),
        ignored=_LLAMA_BUFFERS + ignored,
        prefixes=prefixes,
        embedding="{prefix}embed_tokens.weight",
        heads=heads,
    )


def phi3_tensors() -> TensorTable:
    """Phi-3's names: Llama's with query, key and value joined, gate and up joined."""
    joined = _side_by_side(LINEAR, 0)
    base = llama_tensors()
    separate = tuple(f"layers/{name}/" for name in _LLAMA_DENSE if name not in ("attention/o_proj", "mlp/down_proj"))
    return TensorTable(
        rules=(
            *(rule for rule in base.rules if not rule.path.startswith(separate)),
            *_joined_dense(_BLOCK + "self_attn.qkv_proj", joined, _side_by_side(FLAT, 0)),
            *_gate_up(_BLOCK + "mlp.gate_up_proj.weight"),
        ),
        ignored=base.ignored,
        prefixes=base.prefixes,
        embedding=base.embedding,
        heads=base.heads,
    )


def opt_tensors() -> TensorTable:
    """OPT's names (arXiv 2205.01068)."""
    return TensorTable(
        rules=(
            TensorRule("embed_tokens", ("{prefix}embed_tokens.weight",), AS_STORED),
            TensorRule("embed_positions", ("{prefix}embed_positions.weight",), AS_STORED),
            TensorRule("project_in", ("{prefix}project_in.weight",), LINEAR),
            TensorRule("project_out", ("{prefix}project_out.weight",), LINEAR),
            *_flat(*(_dense(f"layers/attention/{n}", _BLOCK + f"self_attn.{n}", LINEAR) for n in _HEADS)),
            *_dense("layers/attention/o_proj", _BLOCK + "self_attn.out_proj", _JOINED),
            *_dense("layers/mlp/up_proj", _BLOCK + "fc1", LINEAR),
            *_dense("layers/mlp/down_proj", _BLOCK + "fc2", LINEAR),
            *_norm("layers/attention_norm", _BLOCK + "self_attn_layer_norm"),
            *_norm("layers/mlp_norm", _BLOCK + "final_layer_norm"),
            *_norm("final_norm", "{prefix}final_layer_norm"),
            TensorRule("lm_head", ("lm_head.weight",), LINEAR),
        ),
        ignored=(r"(model\.)?(decoder\.)?version",),
        prefixes=("model.decoder.", "decoder.", ""),
        embedding="{prefix}embed_tokens.weight",
        heads=("lm_head.weight",),
    )


def gpt2_tensors() -> TensorTable:
    """GPT-2's names; its ``Conv1D`` kernels are stored ``(in, out)``."""
    block = "{prefix}h.{layer}."
    return TensorTable(
        rules=(
            TensorRule("embed_tokens", ("{prefix}wte.weight",), AS_STORED),
            TensorRule("embed_positions", ("{prefix}wpe.weight",), AS_STORED),
            *_joined_dense(block + "attn.c_attn", _side_by_side(conv1d(), 1), _side_by_side(FLAT, 0)),
            *_dense("layers/attention/o_proj", block + "attn.c_proj", conv1d(num_inputs=2)),
            *_dense("layers/mlp/up_proj", block + "mlp.c_fc", conv1d()),
            *_dense("layers/mlp/down_proj", block + "mlp.c_proj", conv1d()),
            *_norm("layers/attention_norm", block + "ln_1"),
            *_norm("layers/mlp_norm", block + "ln_2"),
            *_norm("final_norm", "{prefix}ln_f"),
            TensorRule("lm_head", ("lm_head.weight",), LINEAR),
        ),
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        prefixes=("transformer.", ""),
        embedding="{prefix}wte.weight",
        heads=("lm_head.weight",),
    )


def neox_tensors() -> TensorTable:
    """GPT-NeoX's names (arXiv 2204.06745); its query, key and value lie head by head."""
    kernels = tuple(third_of_each_head(LINEAR, which) for which in range(3))
    biases = tuple(third_of_each_head(FLAT, which) for which in range(3))
    return TensorTable(
        rules=(
            TensorRule("embed_tokens", ("{prefix}embed_in.weight",), AS_STORED),
            *_joined_dense(_BLOCK + "attention.query_key_value", kernels, biases),
            *_dense("layers/attention/o_proj", _BLOCK + "attention.dense", _JOINED),
            *_dense("layers/mlp/up_proj", _BLOCK + "mlp.dense_h_to_4h", LINEAR),
            *_dense("layers/mlp/down_proj", _BLOCK + "mlp.dense_4h_to_h", LINEAR),
            *_norm("layers/attention_norm", _BLOCK + "input_layernorm"),
            *_norm("layers/mlp_norm", _BLOCK + "post_attention_layernorm"),
            *_norm("final_norm", "{prefix}final_layer_norm"),
            TensorRule("lm_head", ("embed_out.weight", "lm_head.weight"), LINEAR),
        ),
        ignored=(
            r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)",
            r"(gpt_neox\.)?layers\.\d+\.attention\.rotary_emb\.inv_freq",
            r"(gpt_neox\.)?rotary_emb\.inv_freq",
        ),
        prefixes=("gpt_neox.", ""),
        embedding="{prefix}embed_in.weight",
        heads=("embed_out.weight", "lm_head.weight"),
    )


_GGUF_DENSE = {
    "attention/q_proj": ("attn_q", LINEAR),
    "attention/k_proj": ("attn_k", LINEAR),
    "attention/v_proj": ("attn_v", LINEAR),
    "attention/o_proj": ("attn_output", _JOINED),
    "mlp/gate_proj": ("ffn_gate", LINEAR),
    "mlp/up_proj": ("ffn_up", LINEAR),
    "mlp/down_proj": ("ffn_down", LINEAR),
}
_GGUF_NORMS = {
    "layers/attention_norm": "blk.{layer}.attn_norm",
    "layers/attention_output_norm": "blk.{layer}.post_attention_norm",
    "layers/mlp_norm": "blk.{layer}.ffn_norm",
    "layers/mlp_output_norm": "blk.{layer}.post_ffw_norm",
    "layers/attention/q_norm": "blk.{layer}.attn_q_norm",
    "layers/attention/k_norm": "blk.{layer}.attn_k_norm",
    "final_norm": "output_norm",
}


def gguf_tensors(*, interleaved: bool = False, plus_one: bool = False, joined: bool = False) -> TensorTable:
    """The names of GGUF files, one set for all architectures.

    Args:
        interleaved: Whether rotated pairs of queries and keys lie side by side (``llama``).
        plus_one: Whether norms are stored with Gemma's one added.
        joined: Whether query, key and value, and gate and up, share a tensor (``phi3``).
    """
    block, rules = "blk.{layer}.", []
    for ours, (theirs, layout) in _GGUF_DENSE.items():
        if joined and ours not in ("attention/o_proj", "mlp/down_proj"):
            continue
        bias = FLAT
        if interleaved and theirs in ("attn_q", "attn_k"):
            layout, bias = interleaved_pairs(LINEAR), interleaved_pairs(FLAT)
        rules += _dense(f"layers/{ours}", block + theirs, layout, bias)
    if joined:
        rules += _joined_dense(block + "attn_qkv", _side_by_side(LINEAR, 0), _side_by_side(FLAT, 0))
        rules += _gate_up(block + "ffn_up.weight")
    scale = minus_one(AS_STORED) if plus_one else AS_STORED
    for ours, theirs in _GGUF_NORMS.items():
        rules += _norm(ours, theirs, scale)
    return TensorTable(
        rules=(
            TensorRule("embed_tokens", ("token_embd.weight",), AS_STORED),
            *rules,
            TensorRule("lm_head", ("output.weight",), LINEAR),
        ),
        ignored=(r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight"),
        prefixes=("",),
        embedding="token_embd.weight",
        heads=("output.weight",),
    )
