"""Low-rank updates under the names and in the layout of PEFT's LoRA adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.errors import UserError
from spt_jax.models.families.family import TensorRule
from spt_jax.models.loading import OpenedLM
from spt_jax.prompting.adapters import LowRank

_PREFIX = "base_model.model."
_PARTS = ("attention", "mlp")


def check_lora(opened: OpenedLM, targets: Sequence[str]) -> None:
    """Raises UserError, as `lora_tensors`, where the update of one of some projections cannot be exported."""
    for name in targets:
        _rule(opened, name)


def lora_config(adapter: LowRank, opened: OpenedLM, tree: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT must know of the updates, beside the fields that all adapters share.

    Args:
        adapter: Rank, alpha and dropout.
        opened: The LM.
        tree: As for `lora_tensors`.
    """
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(_module(_rule(opened, name), 0, opened).rsplit(".", 1)[-1] for name in tree),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def lora_tensors(opened: OpenedLM, tree: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` of every layer and projection, by PEFT's names.

    Args:
        opened: The LM, for its family's names.
        tree: ``{"q_proj": {"down": [L, in..., r], "up": [L, r, out...]}, …}``.

    Raises:
        UserError: The family keeps a projection joined with others or transposed, or the LM is part of a model of
            text and images: there PEFT's updates belong to other matrices.
    """
    tensors = {}
    for name, update in tree.items():
        rule = _rule(opened, name)
        for layer, (down, up) in enumerate(zip(update["down"], update["up"], strict=True)):
            module, rank = _PREFIX + _module(rule, layer, opened), down.shape[-1]
            tensors[f"{module}.lora_A.weight"] = down.reshape(-1, rank).T
            tensors[f"{module}.lora_B.weight"] = up.reshape(rank, -1).T
    return tensors


def _rule(opened: OpenedLM, projection: str) -> TensorRule:
    """Where a projection lies in transformers' model of the family, whatever files ours was read from."""
    family = opened.family
    if "text_config" in opened.fields:
        raise UserError(
            f"{opened.source.name} is a model of text and images, whose towers PEFT would both update; low-rank "
            "updates can be exported for models of text alone"
        )
    kernels = [rule for rule in family.hf_tensors.rules if rule.path.endswith("/kernel")]
    users = Counter(name for rule in kernels for name in rule.names)
    rule = next(rule for part in _PARTS for rule in kernels if rule.path == f"layers/{part}/{projection}/kernel")
    if any(users[name] > 1 for name in rule.names):
        raise UserError(
            f"PEFT cannot carry the update of {projection} for {family.name}: transformers keeps it joined with other "
            f"projections in {_leaf(rule)}, and PEFT would update them all; export runs whose lora.targets are not "
            "joined"
        )
    # Two sizes that no layout could confuse, with the heads' axes where the projection has them.
    ours = {"q_proj": (2, 3, 5), "k_proj": (2, 3, 5), "v_proj": (2, 3, 5), "o_proj": (3, 5, 2)}.get(projection, (2, 3))
    inputs = 2 if projection == "o_proj" else 1
    if rule.layout.stored_shape(opened.config, ours) != (math.prod(ours[inputs:]), math.prod(ours[:inputs])):
        raise UserError(
            f"PEFT cannot carry the update of {projection} for {family.name}: transformers keeps it transposed in "
            f"{_leaf(rule)}, a name that several of its matrices have"
        )
    return rule


def _leaf(rule: TensorRule) -> str:
    return rule.names[0].removesuffix(".weight").rsplit(".", 1)[-1]


def _module(rule: TensorRule, layer: int, opened: OpenedLM) -> str:
    prefix = opened.family.hf_tensors.prefixes[0]
    return rule.names[0].removesuffix(".weight").format(prefix=prefix, layer=layer)
