"""Meshes of TPU slices that this machine does not have, to compile for them with libtpu."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from shardpage.arguments import instance, integer

from .make import make
from .slices import PodSlice
from .spec import MeshSpec

# While libtpu loads: do not ask a metadata server what this machine is (outside Google Cloud none
# answers, and every request runs into its timeout), and let other processes load libtpu as well.
_LOADING = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


# What libtpu is asked to describe at once: more chips than any job has, in some seconds and 10 GB.
_MOST_DEVICES = 1 << 20


def topology(
    name: str | PodSlice,
    spec: str | MeshSpec | None = None,
    *,
    num_slices: int = 1,
    megacore: bool | None = None,
    axis_types: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh of compile-only devices of one or more TPU slices; needs no TPU.

    `jax.jit(f).lower(...).compile()` works for its devices and gives memory, cost and HLO; they
    cannot hold arrays.

    Args:
      name: a slice, e.g. `"v5p:4x4x4"`, or a product name, e.g. `"v5p-128"`.
      spec: the axes, as in `make`; default one axis `data` over everything.
      num_slices: the number of such slices, joined by the data centre network.
      megacore: whether the two TensorCores of a chip are one device (the default) or two; v4 and
        v5p only.
      axis_types: as in `make`; one type for all axes.

    Returns:
      A mesh of all the slices' devices.

    Raises:
      ValueError: for an unknown slice, a spec that does not fit, or `megacore` on a generation
        without it.
      RuntimeError: if libtpu is missing or refuses the slice.
    """
    pod = PodSlice.parse(name) if isinstance(name, str) else name
    instance("name", pod, PodSlice, "a slice such as 'v5p:4x4x4', or a PodSlice")
    instance("megacore", megacore, bool | None, "True, False or None")
    most = _MOST_DEVICES // pod.num_devices
    integer("num_slices", num_slices, f"{_MOST_DEVICES} devices in all", most=most)
    spec = MeshSpec.of("data=-1" if spec is None else spec)
    devices = _compile_only_devices(pod, num_slices, _config(pod, megacore))
    return make(spec, devices, axis_types=axis_types)


def _config(pod: PodSlice, megacore: bool | None) -> str | None:
    """The name of the chip configuration; None where there is only one."""
    if megacore is None:
        return pod.chip.megacore_config
    if pod.chip.megacore_config is None:
        raise ValueError(
            f"{pod.chip.name} has no megacore to switch: always {pod.chip.devices} device(s) per "
            f"chip; leave megacore=None (v4 and v5p have it)"
        )
    return pod.chip.megacore_config if megacore else pod.chip.separate_config


def _compile_only_devices(pod: PodSlice, num_slices: int, config: str | None) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for TPU slices needs libtpu: pip install 'shardpage[tpu]'")
    options: dict[str, Any] = {}
    if config is not None:
        options["chip_config_name"] = config
    if num_slices > 1:
        options["num_slices"] = num_slices
    if pod.num_chips < 4:
        options["chips_per_host_bounds"] = [1, 1, 1]
    with _environment_while_loading():
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=str(pod), **options
            )
        except Exception as error:
            raise RuntimeError(f"libtpu refuses {num_slices} slice(s) of {pod}: {error}") from error
    return list(described.devices)


@contextlib.contextmanager
def _environment_while_loading() -> Iterator[None]:
    """Sets the variables that libtpu reads when it loads, and restores the environment."""
    before = dict(os.environ)
    for name, value in _LOADING.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(("TPU_", "ALLOW_MULTIPLE_"))]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]
