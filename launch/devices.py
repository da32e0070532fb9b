"""From the options --mesh and --simulate to a mesh, with errors that say what would work."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import typer
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import meshes

from .processes import bootstrap

AXES = {"data": "sequences", "kv": "KV heads", "context": "the pages of a sequence"}


def open_mesh(
    spec: str | None,
    simulate: int | None,
    *,
    num_kv_heads: int | None = None,
    spare_cpu_devices: bool = False,
) -> Mesh:
    """Makes the mesh that the options ask for, joining the other processes if there are any.

    Args:
      spec: the option --mesh.
      simulate: the option --simulate.
      num_kv_heads: KV heads that the axis `kv` must divide; None for any number.
      spare_cpu_devices: simulate twice as many CPU devices and leave half of them idle. Each has
        a thread, and interpreted Pallas kernels wait for others in theirs: with none to spare,
        a mesh of all devices can hang.

    Raises:
      typer.BadParameter: if the mesh does not fit the devices or the KV heads.
    """
    with _blaming("SHARDPAGE_*"):
        bootstrap.Settings.read(os.environ)  # here a mistake in them is one of the user's
    processes = bootstrap.initialize(spare_cpu_devices=spare_cpu_devices)
    with _blaming("--mesh"):
        parsed = meshes.MeshSpec.parse(spec or "context=-1")
    with _blaming("--simulate"):
        devices = _find_devices(processes, parsed, simulate, spare_cpu_devices)
    with _blaming("--mesh", _fitting(len(devices), num_kv_heads)):
        _check_axes(parsed)
        mesh = meshes.make(parsed, devices)
        _check_heads(mesh, num_kv_heads)
    return mesh


@contextlib.contextmanager
def _blaming(option: str, advice: str = "") -> Iterator[None]:
    """Makes an error of the body one of this option, followed by advice."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text = f"{error}. {advice}" if advice else str(error)
        raise typer.BadParameter(text, param_hint=option) from None


def _find_devices(
    processes: bootstrap.Processes,
    spec: meshes.MeshSpec,
    simulate: int | None,
    spare_cpu_devices: bool,
) -> list[Any]:
    """The devices for a mesh: of all processes, simulated, or those of this machine."""
    if simulate is None and processes.count == 1:
        wanted = math.prod(spec.shape)
        return _local_devices(wanted if wanted > 0 else None, spare_cpu_devices)
    if simulate is None:
        return processes.devices()
    if processes.count > 1:
        raise ValueError(
            f"these are {processes.count} processes, which have their devices; leave it out here "
            f"and use shardpage simulate --devices-per-process"
        )
    meshes.simulate(2 * simulate if spare_cpu_devices else simulate)
    return jax.devices("cpu")[:simulate]


def _check_axes(spec: meshes.MeshSpec) -> None:
    for name in spec.names:
        if name not in AXES:
            axes = ", ".join(f"{name} ({what})" for name, what in AXES.items())
            raise ValueError(f"mesh {str(spec)!r} has the axis {name!r}; the axes are {axes}")


def _check_heads(mesh: Mesh, num_kv_heads: int | None) -> None:
    shards = mesh.shape.get("kv", 1)
    if num_kv_heads is not None and num_kv_heads % shards:
        raise ValueError(
            f"mesh {mesh_text(mesh)!r} splits {num_kv_heads} KV heads over kv={shards} devices, "
            f"which must divide them; the other devices can go to context at no cost in copies"
        )


def mesh_text(mesh: Mesh) -> str:
    """A mesh as the option that makes it: `data=2,context=4`."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def describe_mesh(mesh: Mesh, simulated: bool) -> str:
    """A mesh in words."""
    device = mesh.devices.flat[0]
    kind = "simulated CPU" if simulated else device.device_kind
    split = "; ".join(f"{name} splits {AXES[name]}" for name, n in mesh.shape.items() if n > 1)
    plural = "s" if mesh.size > 1 else ""
    return f"{mesh_text(mesh)}: {mesh.size} {kind} device{plural}{'; ' if split else ''}{split}"


def is_simulated(mesh: Mesh) -> bool:
    """Whether several devices of the mesh share one CPU."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array as NumPy; of several processes all must call this, and all get it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _local_devices(num_wanted: int | None, spare_cpu_devices: bool) -> list[Any]:
    """The machine's devices; where it has only a CPU, as many simulated ones as are wanted."""
    if num_wanted is not None and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        config: Any = jax.config  # its options are attributes that type checkers do not see
        count = max(num_wanted * (1 + spare_cpu_devices), config.jax_num_cpu_devices)
        with contextlib.suppress(RuntimeError):  # JAX has started: it has what it has
            config.update("jax_num_cpu_devices", count)
    devices = bootstrap.Processes().devices()
    if num_wanted is not None and devices[0].platform == "cpu":
        return devices[:num_wanted]
    return devices


def _fitting(num_devices: int, num_kv_heads: int | None, most: int = 12) -> str:
    """The meshes that work, as a sentence."""
    specs = list(fitting_specs(num_devices, num_kv_heads))
    more = f" | ... ({len(specs) - most} more)" if len(specs) > most else ""
    return f"Meshes of {num_devices} device(s) that work here: {' | '.join(specs[:most])}{more}"


def fitting_specs(num_devices: int, num_kv_heads: int | None) -> Iterator[str]:
    """All meshes over data, kv and context that use every device and divide the KV heads."""
    for sizes in meshes.factorings(num_devices, len(AXES)):
        spec = dict(zip(AXES, sizes, strict=True))
        if num_kv_heads is None or num_kv_heads % spec["kv"] == 0:
            yield ",".join(f"{name}={size}" for name, size in spec.items() if size > 1) or "data=1"
