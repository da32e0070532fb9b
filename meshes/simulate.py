"""Simulated devices: many CPU devices in one process, standing in for a pod."""

import os
from typing import Any, overload

import jax
from jax.sharding import Mesh

from shardpage.arguments import integer

from .make import make
from .slices import PodSlice
from .spec import MeshSpec

# Of one process: each takes some 200 kB and a thread; several pods' worth.
_MOST_DEVICES = 1 << 16

_config: Any = jax.config  # its options are attributes that type checkers do not see


@overload
def simulate(what: int) -> None: ...
@overload
def simulate(what: int | str, spec: str | MeshSpec, *, num_slices: int = 1) -> Mesh: ...
@overload
def simulate(what: str, spec: str | MeshSpec | None = None, *, num_slices: int = 1) -> Mesh: ...
def simulate(
    what: int | str, spec: str | MeshSpec | None = None, *, num_slices: int = 1
) -> Mesh | None:
    """Makes this process simulate devices on its CPU, before or after JAX has started.

    A number without `spec` only requests the devices and does not start JAX, so it can come
    before `jax.distributed.initialize`; each process then simulates `what` devices of its own.
    If no platform has been chosen yet this chooses the CPU, so JAX neither waits for nor locks a
    TPU or GPU of the machine.

    Args:
      what: the number of CPU devices, or the name of a slice to imitate: `"v5e:2x4"`.
      spec: the axes of a mesh of exactly that many devices; default `data=-1` for a named slice.
      num_slices: the number of such slices, or of equal parts of the number `what`. As in
        `topology`, the spec's `dcn.` sizes span them, or else `data` does.

    Returns:
      None for a number without `spec`; otherwise a mesh of the first CPU devices, with the axes of
      `topology(what, spec, num_slices=...)`.

    Raises:
      ValueError: if there is nothing to simulate, or the spec does not fit.
      RuntimeError: if JAX has already started with fewer CPU devices.
    """
    num_slices = integer("num_slices", num_slices)
    num_devices: Any = what
    if isinstance(what, str):
        num_devices = PodSlice.parse(what).num_devices * num_slices
    meaning = "CPU devices to simulate, or the name of a slice, such as 'v5e:2x4'"
    num_devices = integer("what", num_devices, meaning, most=_MOST_DEVICES)
    parsed = None if spec is None else MeshSpec.of(spec)
    _request_cpu_devices(num_devices)
    if parsed is None and not isinstance(what, str):
        return None
    over_slices = (parsed or MeshSpec.parse("data=-1")).over_slices(num_slices)
    if num_slices > 1:
        over_slices = over_slices.resolve(num_devices, num_slices)
    return make(over_slices, jax.devices("cpu")[:num_devices])


def _request_cpu_devices(num_devices: int) -> None:
    platforms = _config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        raise RuntimeError(
            f"cannot simulate devices: JAX is limited to the platforms {platforms!r}; "
            f"add cpu to JAX_PLATFORMS, or unset it"
        )
    try:
        requested = _config.jax_num_cpu_devices
        # The size of XLA's thread pool. While interpreted Pallas kernels wait for each other they
        # occupy one thread per device; with none to spare they deadlock.
        os.environ.setdefault("NPROC", str(max(2 * num_devices + 4, os.cpu_count() or 1)))
        _config.update("jax_num_cpu_devices", max(num_devices, requested))
    except RuntimeError:  # JAX has started: its devices can no longer change
        num_present = jax.local_device_count("cpu")
        if num_present < num_devices:
            raise RuntimeError(
                f"JAX has already started with {num_present} CPU device(s), too late to simulate "
                f"{num_devices}: call meshes.simulate({num_devices}) before the first array, jit "
                f"or jax.devices(), or set JAX_NUM_CPU_DEVICES={num_devices} in the environment"
            ) from None
        return
    if not platforms:
        _config.update("jax_platforms", "cpu")
