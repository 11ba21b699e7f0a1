"""From the sections ``method``, ``bank``, ``retriever`` and ``objective`` to what is learned and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.models.attention import cudnn_lacks
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.splash import splash_lacks
from spt_jax.parallel.rules import attention_sharding, row_sharding
from spt_jax.prompting.adapters import (
    Adapter,
    EncodedPrompt,
    LowRank,
    Nothing,
    Prefixes,
    SoftPrompts,
    WholeModel,
    num_conditions,
)
from spt_jax.prompting.objective import LM_ALONE, Objective
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import SelectiveLM

TEXTUAL = ("zero_shot", "few_shot")
"""Methods that learn nothing: the LM is prompted with text alone."""


def describe(config: Config, decoder: DecoderConfig, mesh: Mesh | None = None) -> SelectiveLM:
    """The static description of what is learned before an LM.

    Args:
        config: The configuration.
        decoder: The LM.
        mesh: Rows go over its row axes, and its devices decide which kernels the LM takes; None for no devices.

    Raises:
        UserError: ``model.attention`` asks for what the devices cannot do.
    """
    if mesh is not None:
        decoder = on_devices(decoder, config.model.attention, mesh)
    return SelectiveLM(
        decoder=decoder,
        adapter=adapter_of(config),
        retriever_config=retriever_of(config) if config.method.kind == "spt" else None,
        max_logit_rows=config.model.max_logit_rows,
        dropout=config.model.dropout,
        row_sharding=None if mesh is None else row_sharding(mesh),
    )


def on_devices(decoder: DecoderConfig, attention: str, mesh: Mesh) -> DecoderConfig:
    """The same decoder in the form that is fastest on a mesh; no result changes beyond rounding.

    Args:
        decoder: The LM.
        attention: ``model.attention``.
        mesh: Its devices.

    Raises:
        UserError: cuDNN's attention, or splash attention, is asked for where it cannot serve.
    """
    device = mesh.devices.flat[0]
    kernel = attention_kernel(decoder, attention, device, mesh.shape["tensor"])
    on_gpu = device.platform == "gpu"
    return dataclasses.replace(
        decoder,
        attention_kernel=kernel,
        attention_sharding=attention_sharding(mesh) if kernel == "splash" else None,
        unrolled=on_gpu,
        # Side by side, kernels that are split among devices would have to be moved.
        joint_projections=on_gpu and mesh.shape["tensor"] == 1,
    )


def attention_kernel(decoder: DecoderConfig, attention: str, device: Any, tensor: int) -> str:
    """The kernel of a decoder's attention over whole rows.

    Args:
        decoder: The LM.
        attention: ``model.attention``.
        device: One of its devices, or what is known of it: its platform, kind and compute capability.
        tensor: Among how many devices heads are split.

    Raises:
        UserError: See `on_devices`.
    """
    lacks = kernels_lack(decoder, device, tensor)
    if reason := lacks.get(attention):
        raise UserError(f"model.attention is {attention}, but {reason}; allowed: xla, or auto for what can serve")
    serving = [kernel for kernel, reason in lacks.items() if not reason and attention in ("auto", kernel)]
    return serving[0] if serving else "xla"


def kernels_lack(decoder: DecoderConfig, device: Any, tensor: int) -> dict[str, str]:
    """Why each fused kernel cannot compute a decoder's attention on a device; empty for one that can."""
    return {"cudnn": cudnn_lacks(decoder, device), "splash": splash_lacks(decoder, device, tensor)}


def attention_remark(decoder: DecoderConfig, attention: str, mesh: Mesh) -> str:
    """What a user of accelerators should know of ``model.attention`` = auto: that it takes XLA's, and why."""
    device = mesh.devices.flat[0]
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
    lacks = kernels_lack(decoder, device, mesh.shape["tensor"])[kernel] if kernel and attention == "auto" else ""
    return f"model.attention = auto: xla, since {lacks}" if lacks else ""


def adapter_of(config: Config) -> Adapter:
    """What ``method.kind`` learns."""
    b, method = config.bank, config.method
    match method.kind:
        case "spt" if b.kind == "prefixes":
            return Prefixes(b.num_prompts, b.prompt_length, b.init_stddev, keys=True)
        case "spt":
            return SoftPrompts(b.num_prompts, b.prompt_length, b.init_stddev)
        case "prompt_tuning":
            return SoftPrompts(1, b.prompt_length, b.init_stddev)
        case "prefix_tuning":
            return Prefixes(1, b.prompt_length, b.init_stddev, encoder_width=method.hidden_size)
        case "p_tuning":
            return EncodedPrompt(b.prompt_length, method.hidden_size)
        case "lora":
            lora = config.lora
            return LowRank(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))
        case "full":
            return WholeModel()
        case _:
            return Nothing()


def num_prompts_of(config: Config) -> int:
    """K, among which the retriever selects."""
    return num_conditions(adapter_of(config))


def front_length(config: Config) -> int:
    """P, the places that stand before a row's text."""
    return 0 if config.method.kind in ("lora", "full", *TEXTUAL) else config.bank.prompt_length


def retriever_of(config: Config) -> RetrieverConfig:
    """The section ``retriever``."""
    r = config.retriever
    return RetrieverConfig(
        kind=r.kind,
        sides=r.sides,
        share=r.share,
        activation=r.activation,
        context=r.context,
        layers=r.layers,
        heads=r.heads,
        feed_forward=r.feed_forward,
        dropout=r.dropout,
    )


def objective_of(config: Config) -> Objective:
    """Weights and temperatures from the section ``objective``; the rivals learn from L_LM alone."""
    if config.method.kind != "spt":
        return LM_ALONE
    o = config.objective
    return Objective(
        lm_weight=o.lm_weight,
        selection_weight=o.selection_weight,
        contrastive_weight=o.contrastive_weight,
        fusion_weight=o.fusion_weight,
        gold_temperature=o.gold_temperature,
        score_temperature=o.score_temperature,
        pairs=o.pairs,
        gold_noise=o.gold_noise,
        annealing=o.annealing,
        annealing_bounds=(o.annealing_min, o.annealing_max),
        balance_weight=o.balance_weight,
        prompts_per_step=o.prompts_per_step,
    )


def remat_of(config: Config) -> str:
    """The policy to load the LM with; ``auto`` is chosen when the train step is known, and matters to it alone."""
    return "none" if config.model.remat == "auto" else config.model.remat
