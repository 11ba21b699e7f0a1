"""Folders as the authors' training leaves them, made from the golden parameters, or with damage."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from spt_jax.commands.main import main

BASE = "opt_base_b2_k4_v8_both"
PROMPT = "models.{}.prompt_encoder.default.embedding.weight"
STATES = "mp_rank_00_model_states.pt"


def golden_arrays(shared: Path, case: str, file: str = "params_after_3.npz") -> dict[str, np.ndarray]:
    """Parameters by the names that torch gives them."""
    with np.load(shared / "golden" / case / file) as arrays:
        return {
            name.replace(".prompt", ".prompt_encoder.default.embedding.weight")
            if name.startswith("models.")
            else name: arrays[name]
            for name in arrays.files
        }


def golden_config(shared: Path, case: str) -> dict[str, Any]:
    """The case's configuration in the authors' words."""
    return json.loads((shared / "golden" / case / "manifest.json").read_text())["config"]


def as_saved(arrays: dict[str, np.ndarray], dtype: Any, **more: Any) -> dict[str, Any]:
    """What DeepSpeed (ZeRO stage 2) hands to torch.save; as there, the parameters are views of one flat buffer."""
    torch = pytest.importorskip("torch")
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()])).to(dtype)
    module, at = collections.OrderedDict(), 0
    for name, array in arrays.items():
        module[name] = flat[at : at + array.size].view(array.shape)
        at += array.size
    module._metadata = collections.OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    shapes = collections.OrderedDict((name, torch.Size(array.shape)) for name, array in arrays.items())
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": 3},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 3,
        "global_samples": 6,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8},
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0}},
            "bf16": {"enabled": False},
            "communication_data_type": torch.float16,
        },
        "ds_version": "0.9.5",
        **more,
    }


def write_checkpoint(folder: Path, states: Any, config: dict[str, Any] | None, **options: Any) -> Path:
    """Writes a run's folder: the checkpoint, what lies beside it, and the YAML file where there is a config."""
    torch = pytest.importorskip("torch")
    best = folder / "ds_ckpt" / "best"
    best.mkdir(parents=True)
    torch.save(states, best / STATES, **options)
    (best / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never read")
    (folder / "checkpoint_best.pth").write_bytes(b"never read")
    (folder / "ds_ckpt" / "latest").write_text("best")
    if config is not None:
        (folder / "opt.yml").write_text(yaml.safe_dump(config))
    return folder


def golden_checkpoint(shared: Path, folder: Path, case: str = BASE, dtype: str = "float32") -> Path:
    """The golden case's checkpoint after three steps."""
    torch = pytest.importorskip("torch")
    states = as_saved(golden_arrays(shared, case), getattr(torch, dtype))
    return write_checkpoint(folder, states, golden_config(shared, case))


def convert(folder: Path, shared: Path, out: Path, *more: str, model: str = "opt-tiny") -> int:
    """The door's exit code."""
    source = shared / "golden" / "models" / model
    return main(["convert", "official", str(folder), f"--model={source}", f"--workdir={out}", *more])
