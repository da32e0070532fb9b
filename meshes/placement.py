"""Which device goes where: axes that communicate on neighbouring chips, slices outermost."""

from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from .spec import COMMUNICATING_AXES, MeshSpec

Device = Any  # jax.Device, which type checkers see as a variable


def place(spec: MeshSpec, slices: list[list[Device]]) -> np.ndarray:
    """Devices in the shape of the spec: slices laid out alike, joined along `dcn.` sizes."""
    quiet_first = sorted(range(len(spec.axes)), key=lambda i: spec.names[i] in COMMUNICATING_AXES)
    shape = [spec.ici_shape[i] for i in quiet_first]
    joined = np.empty((len(slices), *spec.ici_shape), dtype=object)
    for index, members in enumerate(slices):
        joined[index] = place_slice(shape, members).transpose(np.argsort(quiet_first))
    num_axes = len(spec.axes)
    joined = joined.reshape(*spec.dcn_shape, *spec.ici_shape)
    dcn_outside_ici = [axis for i in range(num_axes) for axis in (i, num_axes + i)]
    return joined.transpose(dcn_outside_ici).reshape(spec.shape)


def place_slice(shape: list[int], devices: list[Device]) -> np.ndarray:
    """Devices of one slice in `shape`, whose later axes get nearer neighbours.

    JAX's `create_device_mesh` lays out the chips. If a chip is two devices, these are the nearest
    neighbours there are, so they become the inner part of the last axis whose size is even.
    """
    chips: dict[tuple[int, ...], list[Device]] = {}
    for device in devices:
        chips.setdefault(tuple(getattr(device, "coords", (device.id,))), []).append(device)
    cores = [sorted(chip, key=lambda d: getattr(d, "core_on_chip", 0)) for chip in chips.values()]
    per_chip = len(cores[0])
    split = max((i for i, size in enumerate(shape) if size % per_chip == 0), default=None)
    if per_chip == 1 or split is None or any(len(chip) != per_chip for chip in cores):
        return _create_device_mesh(shape, devices)
    chip_shape = [size // per_chip if i == split else size for i, size in enumerate(shape)]
    first = _create_device_mesh(chip_shape, [chip[0] for chip in cores])
    by_first = {chip[0]: chip for chip in cores}
    both = np.array([by_first[device] for device in first.flat], dtype=object)
    both = both.reshape(*chip_shape, per_chip)
    return np.moveaxis(both, -1, split + 1).reshape(shape)


def _create_device_mesh(shape: list[int], devices: list[Device]) -> np.ndarray:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
