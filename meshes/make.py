"""Makes a mesh from a spec and devices, with the axes that communicate on neighbouring chips."""

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from shardpage.arguments import instance, shown

from .placement import Device, place
from .spec import MeshSpec

_AXIS_TYPES = "a jax.sharding.AxisType, or one for each axis"


def make(
    spec: str | MeshSpec,
    devices: Sequence[Device] | None = None,
    *,
    axis_types: AxisType | Sequence[AxisType] = AxisType.Auto,
) -> Mesh:
    """Makes a mesh that uses every device exactly once.

    Inside a slice, axes named `context` get neighbouring chips; after them, later axes of the
    spec get nearer ones than earlier axes. Over several slices, `dcn.` sizes count whole slices;
    if the spec has none, the axis `data` spans the slices. CPU devices form no slices: they are
    cut into as many equal parts as the `dcn.` sizes ask for.

    Args:
      spec: axes in the mesh's order, e.g. `"data=2,kv=-1"` or `"dcn.data=2,data=4,context=2"`.
      devices: the devices, every one of which is used; default `jax.devices()`, those of all
        processes.
      axis_types: one type for all axes, or one per axis. Auto by default: the compiler propagates
        shardings, so code around the attention needs no annotations. Explicit works as well:
        each array's type then shows its sharding.

    Returns:
      A mesh whose axis names and order are the spec's.

    Raises:
      ValueError: if the spec is malformed, or the devices do not divide into it; the message
        lists factorings that work.
    """
    spec = MeshSpec.of(spec)
    devices = _checked(devices)
    slices = split_slices(devices, spec.num_slices)
    resolved = spec.over_slices(len(slices)).resolve(len(devices), len(slices))
    instance("axis_types", axis_types, AxisType | Sequence, _AXIS_TYPES)
    if isinstance(axis_types, AxisType):
        axis_types = (axis_types,) * len(resolved.axes)
    for axis_type in axis_types:
        instance("axis_types", axis_type, AxisType, _AXIS_TYPES)
    if len(axis_types) != len(resolved.axes):
        raise ValueError(
            f"{len(axis_types)} axis types for the {len(resolved.axes)} axes of mesh '{spec}'; "
            f"give one for each, or one for all"
        )
    return Mesh(place(resolved, slices), resolved.names, axis_types=tuple(axis_types))


def _checked(devices: Sequence[Device] | None) -> list[Device]:
    """The devices of a mesh; by default all, in the same order on every process."""
    if devices is None:
        return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    instance("devices", devices, Sequence | np.ndarray, "a list of JAX devices")
    devices = list(devices)
    if not all(hasattr(device, "device_kind") for device in devices):
        raise ValueError(f"devices must all be JAX devices; got {shown(devices)}")
    if len(set(devices)) != len(devices) or not devices:
        raise ValueError(f"a mesh needs distinct devices, at least one; got {devices}")
    return devices


def split_slices(devices: Sequence[Device], num_simulated_slices: int = 1) -> list[list[Device]]:
    """Groups devices by slice; devices without slices (CPU) are cut into equal parts, in order.

    Raises:
      ValueError: if slices are of unequal size.
    """
    by_slice = defaultdict(list)
    for index, device in enumerate(devices):
        simulated = index * num_simulated_slices // len(devices)
        slice_index = getattr(device, "slice_index", None)
        by_slice[simulated if slice_index is None else slice_index].append(device)
    slices = [by_slice[index] for index in sorted(by_slice)]
    if len({len(members) for members in slices}) > 1:
        counts = {index: len(members) for index, members in sorted(by_slice.items())}
        raise ValueError(
            f"slices must have equally many devices; got {counts} (slice: devices). Pass "
            f"devices= with the same number from each"
        )
    return slices
