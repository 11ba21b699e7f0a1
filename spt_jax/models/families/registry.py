"""The families we can load, and how a file's own description finds its family.

To add one: say which fields of `DecoderConfig` its ``config.json`` means, name its tensors
(`spt_jax.models.families.tensor_tables`), list it in `FAMILIES`, and give it cases in the parity tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spt_jax.errors import UserError, nearest
from spt_jax.models.families.family import Family
from spt_jax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from spt_jax.models.families.gpt import GPT2, NEOX, OPT
from spt_jax.models.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3, STABLELM

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    SMOLLM3,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    STABLELM,
    OPT,
    GPT2,
    NEOX,
)
"""Every supported family."""


def family_of_hf(fields: Mapping[str, Any], where: str) -> Family:
    """The family of a parsed ``config.json`` that lies at `where`.

    Raises:
        UserError: The model type or the architecture is unknown; names it and lists what is supported.
    """
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{where}: architectures is {architectures!r}; it must be a list of names")
    supported = {kind: family for family in FAMILIES for kind in family.model_types}
    if not isinstance(model_type, str) or model_type not in supported:
        raise UserError(
            f"{where}: model_type is {model_type!r}, which is not supported; supported: {', '.join(supported)}."
            f"{nearest(str(model_type), supported)}"
        )
    family = supported[model_type]
    for architecture in architectures:
        if architecture not in family.architectures:
            raise UserError(
                f"{where}: architecture is {architecture!r}, which is not a causal LM of the {family.name} family; "
                f"supported: {', '.join(family.architectures)}"
            )
    return family


def family_of_gguf(fields: Mapping[str, Any], where: str) -> Family:
    """The family of a GGUF file's metadata.

    Raises:
        UserError: The architecture is unknown; names it and lists what is supported.
    """
    architecture = fields.get("general.architecture")
    supported = {kind: family for family in FAMILIES for kind in family.gguf_architectures}
    if not isinstance(architecture, str) or architecture not in supported:
        raise UserError(
            f"{where}: GGUF architecture is {architecture!r}, which is not supported; supported: "
            f"{', '.join(supported)}.{nearest(str(architecture), supported)}"
        )
    return supported[architecture]
