"""The device mesh: axes ``data`` (rows), ``fsdp`` (rows and weights) and ``tensor`` (heads, MLP, vocabulary)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from spt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
        data: Devices along ``data``; -1 takes what the other two leave.
        fsdp: Devices along ``fsdp``.
        tensor: Devices along ``tensor``.
        devices: All of the backend's devices when None.

    Raises:
        UserError: The product does not equal the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise UserError(
                f"mesh.{name} is {size}; allowed: 1 or more{', or -1 for the rest' if name == 'data' else ''}"
            )
    if data == -1:
        sizes["data"] = max(1, len(devices) // (fsdp * tensor))
    product = sizes["data"] * fsdp * tensor
    if product != len(devices):
        raise UserError(
            f"the mesh data × fsdp × tensor = {sizes['data']} × {fsdp} × {tensor} has {product} places, "
            f"but there are {len(devices)} devices; change mesh.data, mesh.fsdp or mesh.tensor"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
