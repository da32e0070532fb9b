"""The chip that kernels are compiled for, and what stands in for one."""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from ...options import Tuning

MIB = 1 << 20

_COPY_LATENCY_US = 2.5


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore, as far as block sizes depend on it."""

    name: str  # JAX's, of the generation
    cores: int  # per device
    vmem_bytes: int  # that a kernel may ask for
    smem_bytes: int
    hbm_bytes_per_us: float
    step_blocks: int = 8  # that a kernel works on at once, to hide the latencies of each
    widens: bool = False  # quantised elements first: its matrix units take none beside bfloat16
    integers: bool = False  # its matrix units multiply int8

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that must be on their way at any time to keep the memory busy."""
        return int(self.hbm_bytes_per_us * _COPY_LATENCY_US)


# What every generation has; the VMEM is v4's. Mostly interpreted, where more blocks at once only
# take longer to compile.
UNKNOWN_CHIP = Chip("unknown", 1, 16 * MIB, MIB, 1.0e6, step_blocks=2)


def chip_of(tuning: Tuning) -> Chip:
    """The chip that is named, or being compiled for, if JAX knows it, else `UNKNOWN_CHIP`."""
    if tuning.chip is not None:
        return tuning.chip
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return UNKNOWN_CHIP
    return Chip(
        name=str(info.chip_version),
        cores=info.num_cores,
        # Half: XLA keeps arrays of its own there, and more would not be faster.
        vmem_bytes=max(16 * MIB, info.vmem_capacity_bytes // 2),
        smem_bytes=info.smem_capacity_bytes,
        hbm_bytes_per_us=info.mem_bw_bytes_per_second / 1e6,
        widens=info.generation < 5,
        integers=info.int8_ops_per_second > 0,
    )


def _num_threads() -> int:
    """Threads of XLA's CPU client: one per core, or NPROC, and at least one per device."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    named = os.environ.get("NPROC", "")
    num_devices = len(jax.local_devices(backend="cpu"))
    return max(int(named) if named.isdigit() else cores, num_devices)


def interpreter(tuning: Tuning) -> Any:
    """What `pallas_call` takes as `interpret`.

    Raises:
      NotImplementedError: where an interpreted kernel would never end: in several processes, and
        on so many devices that they take all threads in which their kernels are interpreted.
    """
    if not tuning.interpret:
        return False
    if jax.process_count() > 1:
        raise NotImplementedError(
            "Pallas kernels are interpreted where there is no TPU, and JAX's interpreter knows one "
            f"process, not {jax.process_count()}: it would wait for ever; use backend='xla'"
        )
    devices = jax.sharding.get_abstract_mesh().size
    if devices > 1 and devices >= (threads := _num_threads()):
        raise NotImplementedError(
            f"interpreted kernels of {devices} CPU devices wait for each other in XLA's {threads} "
            f"threads, for ever: start Python with NPROC={2 * devices} in its environment, "
            "simulate more devices than the mesh uses, or use backend='xla'"
        )
    return pltpu.InterpretParams() if tuning.interpret is True else tuning.interpret
