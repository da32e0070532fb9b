"""From the options --mesh and --simulate to a mesh, with errors that say what would work."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXES",
        envvar="SHARDPAGE_MESH",
        help="Devices along data (sequences), kv (KV heads) and context (the pages of a "
        "sequence), e.g. data=2,context=4; one size may be -1 for what is left. "
        "Default: all devices on context.",
    ),
]
SimulateOption = Annotated[
    int | None,
    typer.Option(
        "--simulate",
        metavar="N",
        min=1,
        help="Simulate N devices on the CPU. Without this, a machine that has only a CPU "
        "simulates as many as --mesh asks for.",
    ),
]

AXES = {"data": "sequences", "kv": "KV heads", "context": "the pages of a sequence"}


def open_mesh(
    spec: str | None,
    simulate: int | None,
    *,
    num_kv_heads: int | None = None,
    spare_cpu_devices: bool = False,
) -> "Mesh":
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
    import jax

    import meshes

    from .processes import bootstrap

    processes = bootstrap.initialize(spare_cpu_devices=spare_cpu_devices)
    try:
        parsed = meshes.MeshSpec.parse(spec or "context=-1")
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--mesh") from None
    unknown = [name for name in parsed.names if name not in AXES]
    wanted = math.prod(parsed.shape)
    if simulate is not None and processes.count > 1:
        raise typer.BadParameter(
            f"these are {processes.count} processes, which have their devices; leave it out here "
            f"and use shardpage simulate --devices-per-process",
            param_hint="--simulate",
        )
    try:
        if processes.count > 1:
            devices = processes.devices()
        elif simulate is not None:
            meshes.simulate(2 * simulate if spare_cpu_devices else simulate)
            devices = jax.devices("cpu")[:simulate]
        else:
            devices = _devices(wanted if wanted > 0 else None, spare_cpu_devices)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--simulate") from None
    fitting = _fitting(len(devices), num_kv_heads)
    if unknown:
        axes = ", ".join(f"{name} ({what})" for name, what in AXES.items())
        raise typer.BadParameter(
            f"mesh {spec!r} has the axis {unknown[0]!r}; the axes are {axes}. {fitting}",
            param_hint="--mesh",
        )
    try:
        mesh = meshes.make(parsed, devices)
    except ValueError as error:
        raise typer.BadParameter(f"{error}. {fitting}", param_hint="--mesh") from None
    if num_kv_heads is not None and num_kv_heads % mesh.shape.get("kv", 1):
        raise typer.BadParameter(
            f"mesh {spec!r} splits {num_kv_heads} KV heads over kv={mesh.shape['kv']} devices, "
            f"which must divide them; the other devices can go to context at no cost in copies. "
            f"{fitting}",
            param_hint="--mesh",
        )
    return mesh


def mesh_text(mesh: "Mesh") -> str:
    """A mesh as the option that makes it: `data=2,context=4`."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def describe_mesh(mesh: "Mesh", simulated: bool) -> str:
    """A mesh in words."""
    device = mesh.devices.flat[0]
    kind = "simulated CPU" if simulated else device.device_kind
    split = "; ".join(f"{name} splits {AXES[name]}" for name, n in mesh.shape.items() if n > 1)
    plural = "s" if mesh.size > 1 else ""
    return f"{mesh_text(mesh)}: {mesh.size} {kind} device{plural}{'; ' if split else ''}{split}"


def is_simulated(mesh: "Mesh") -> bool:
    """Whether several devices of the mesh share one CPU."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def fetch(x: "jax.Array") -> np.ndarray:
    """The whole of an array as NumPy; of several processes all must call this, and all get it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _devices(num_wanted: int | None, spare_cpu_devices: bool) -> "list[Any]":
    """The machine's devices; where it has only a CPU, as many of it as are wanted."""
    import jax

    if num_wanted is not None and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        config: Any = jax.config  # its options are attributes that type checkers do not see
        count = max(num_wanted * (1 + spare_cpu_devices), config.jax_num_cpu_devices)
        with contextlib.suppress(RuntimeError):  # JAX has started: it has what it has
            config.update("jax_num_cpu_devices", count)
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
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
    import meshes

    for sizes in meshes.factorings(num_devices, len(AXES)):
        spec = dict(zip(AXES, sizes, strict=True))
        if num_kv_heads is None or num_kv_heads % spec["kv"] == 0:
            yield ",".join(f"{name}={size}" for name, size in spec.items() if size > 1) or "data=1"
