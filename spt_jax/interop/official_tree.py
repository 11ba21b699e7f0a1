"""The trainable tree here of what the authors' program had learned."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.interop.official import OfficialTensors
from spt_jax.prompting.adapters import Trainable
from spt_jax.prompting.encoder import from_torch


def official_trainable(tensors: OfficialTensors, config: Config) -> Trainable:
    """``{"bank": {"prompts": [K, P, M]}, "retriever": {"lin": ..., "encoder": ...}}`` in float32, on the host.

    The retriever holds what `spt_jax.prompting.retriever.Retriever` asks for in the official mode: ``lin`` with the
    kernel ``[in, out]``, the transpose of torch's, and ``encoder`` where it is a transformer. A transformer without
    their normaliser gets the identity, which is what their program had in its place. A retriever without parameters is
    left out.

    Raises:
        UserError: The tensors are not those of the configuration: both numbers are named.
    """
    num_prompts, prompt_length, width = tensors.prompts.shape
    for what, found, said in (
        ("soft prompts", num_prompts, config.bank.num_prompts),
        ("virtual tokens in a soft prompt", prompt_length, config.bank.prompt_length),
    ):
        if found != said:
            raise UserError(f"{tensors.where} holds {found} {what}, but the run's config file says {said}")
    retriever = _retriever(tensors, config, width)
    return {"bank": {"prompts": tensors.prompts}} | ({"retriever": retriever} if retriever else {})


def _retriever(tensors: OfficialTensors, config: Config, width: int) -> dict[str, Any]:
    r = config.retriever
    transformer = r.kind == "transformer"
    if bool(tensors.encoder) != transformer:
        there, said = ("a", "none") if tensors.encoder else ("no", "one")
        raise UserError(f"{tensors.where} holds {there} transformer retriever, but the run's config file names {said}")
    retriever: dict[str, Any] = {}
    if r.sides == "none":
        return retriever
    if transformer:
        try:
            retriever["encoder"] = jax.device_get(from_torch(tensors.encoder, r.layers, r.heads))
        except UserError as error:
            raise UserError(f"{tensors.where}: {error}") from error
        if r.sides == "contexts":  # their normaliser stands before the encoder, on the side of the prompts alone
            return retriever
    if not transformer and not tensors.normalizer:
        raise UserError(f"{tensors.where} holds no prompt_normalizer, but the run's config file has one (normalizer)")
    kernel = tensors.normalizer["weight"].T if tensors.normalizer else np.eye(width, dtype=np.float32)
    bias = tensors.normalizer["bias"] if tensors.normalizer else np.zeros(width, np.float32)
    return retriever | {"lin": {"kernel": np.ascontiguousarray(kernel), "bias": bias}}
