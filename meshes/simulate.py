"""Simulated devices: many CPU devices in one process, standing in for a pod."""

from typing import Any, overload

import jax
from jax.sharding import Mesh

from .make import make
from .spec import MeshSpec

_config: Any = jax.config  # its options are attributes that type checkers do not see


@overload
def simulate(what: int) -> None: ...
@overload
def simulate(what: int, spec: str | MeshSpec) -> Mesh: ...
def simulate(what: int, spec: str | MeshSpec | None = None) -> Mesh | None:
    """Makes this process simulate devices on its CPU, before or after JAX has started.

    Without `spec` this only asks for the devices and does not start JAX, so that it can come
    before `jax.distributed.initialize`, where each process simulates `what` devices of its own.
    Where no platform was chosen yet it chooses the CPU, so that a TPU or GPU of this machine is
    neither waited for nor locked.

    Args:
      what: how many CPU devices.
      spec: if given, the mesh to make of exactly that many of them.

    Returns:
      Nothing without `spec`; with it, the mesh over the first `what` CPU devices.

    Raises:
      ValueError: if `what` is not positive, or the spec does not fit.
      RuntimeError: if JAX has already started with fewer CPU devices.
    """
    if what < 1:
        raise ValueError(f"cannot simulate {what} devices; ask for 1 or more")
    _request_cpu_devices(what)
    if spec is None:
        return None
    return make(spec, jax.devices("cpu")[:what])


def _request_cpu_devices(num_devices: int) -> None:
    platforms = _config.jax_platforms
    if platforms and "cpu" not in platforms.split(","):
        raise RuntimeError(
            f"cannot simulate devices: JAX is limited to the platforms {platforms!r}; "
            f"add cpu to JAX_PLATFORMS, or unset it"
        )
    try:
        requested = _config.jax_num_cpu_devices
        _config.update("jax_num_cpu_devices", max(num_devices, requested))
    except RuntimeError:  # JAX has started: what it has is what there is
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
