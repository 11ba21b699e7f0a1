"""The device mesh: axes ``data`` (rows), ``fsdp`` (rows and weights) and ``tensor`` (heads, MLP, vocabulary)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from spt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, slices: int = -1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices.

    Args:
        data: Devices along ``data``; one of the three axes may be -1, which takes what the other two leave.
        fsdp: Devices along ``fsdp``.
        tensor: Devices along ``tensor``.
        slices: Groups of devices with a slow network between them, such as TPU slices; the data axis runs over them
            outermost, so that only its sums cross it. -1 for as many as the devices say they form.
        devices: All of the backend's devices when None.

    Raises:
        UserError: The product does not equal the number of devices, or the slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    slices = _slices_of(devices) if slices == -1 else slices
    if slices < 1 or sizes[0] % slices:
        raise UserError(
            f"mesh.slices is {slices}; allowed: a divisor of mesh.data ({sizes[0]}), since the data axis alone runs "
            "over several slices"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    return Mesh(sliced_devices(sizes, slices, devices), AXES, axis_types=axis_types)


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The sizes of the three axes on so many devices; see `make_mesh`.

    Raises:
        UserError: They do not fit.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name} is {size}; allowed: 1 or more, or -1 for the rest")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        names = " and ".join(f"mesh.{name}" for name in rest)
        raise UserError(f"{names} are both -1; one axis alone can take the rest: give mesh.{rest[0]} = 1")
    for name in rest:
        sizes[name] = 1
        sizes[name] = max(1, devices // math.prod(sizes.values()))
    product = math.prod(sizes.values())
    if product != devices:
        raise UserError(
            f"the mesh data × fsdp × tensor = {' × '.join(map(str, sizes.values()))} has {product} places, "
            f"but there are {devices} devices; change mesh.data, mesh.fsdp or mesh.tensor"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def sliced_devices(sizes: tuple[int, int, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array ``[data, fsdp, tensor]`` in which the first index runs over slices outermost.

    Args:
        sizes: Of the three axes.
        slices: In how many slices the devices fall: TPU chips by their ``slice_index``, others in equal runs in their
            order, in which the devices of a host stand side by side.
        devices: The devices.

    Raises:
        UserError: They fall into another number of slices.
    """
    inner = (sizes[0] // slices, *sizes[1:])
    found = _slices_of(devices)
    if found == slices:
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
    if found > 1:
        raise UserError(f"mesh.slices is {slices}, but the devices form {found} slices; allowed: {found}, or -1")
    return np.asarray(devices).reshape(sizes)


def _slices_of(devices: Sequence[Any]) -> int:
    """How many slices TPU chips form; other devices count as one, though JAX numbers their hosts as slices."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
