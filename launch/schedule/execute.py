"""Compiles a program for a TPU that is not there, and executes its kernels on a modelled core."""

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import bundles, timing
from .core import Core
from .machine import Machine, Run
from .operands import Call, integers, kernel_calls
from .phases import breakdown
from .program import Program

# Kernels in compiled HLO, in order.
_KERNEL = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*custom_call_target="tpu_custom_call"', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A program with kernels.

    Attributes:
      name: of the case; kernel: as in tables, "" for the kernels' own names.
      function: what is compiled; one device runs it.
      arguments: its arguments: integers as arrays, since trip counts follow from them, the rest as
        arrays or `jax.ShapeDtypeStruct`s.
      num_bytes: that a call must move; None for what its copies move.
      donate: positions of the arguments that it may overwrite.
    """

    name: str
    kernel: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_bytes: int | None = None
    donate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Executed:
    """One kernel's call, all cores that run it; figures are of the slowest.

    Attributes:
      topology, device_kind: what it was compiled for.
      case, kernel: names of the shapes and of the kernel.
      cores: TensorCores that run it.
      clock_hz: cycles per second.
      cycles: that issue, waits for results included and for copies not.
      empty: of those, the cycles that waited for a result.
      hbm_cycles: in which HBM delivers `num_bytes`, that a call must move, to all those cores.
      copies, copied_bytes: from and to HBM, all cores.
      us: microseconds by model of memory.
      wait_us: of those, waiting for copies.
      phases: where the cycles go, with waits for copies at 1 us latency.
      guessed: loads of scalars that nobody had written (0 is taken); unknown: instructions whose
        values are not known, by name.
      temp_bytes: scratch of the whole program in HBM; compile_s: seconds.
    """

    topology: str
    device_kind: str
    case: str
    kernel: str
    cores: int
    clock_hz: float
    cycles: int
    empty: int
    hbm_cycles: float
    copies: int
    copied_bytes: int
    num_bytes: int
    us: dict[str, float]
    wait_us: dict[str, float]
    phases: list[dict[str, Any]]
    guessed: int
    unknown: dict[str, int]
    temp_bytes: int
    compile_s: float

    @property
    def ratio(self) -> float:
        """Issue over HBM: above 1 the core is the bottleneck."""
        return self.cycles / self.hbm_cycles


def execute(subject: Subject, topology: str, mesh: Mesh, dump: pathlib.Path) -> list[Executed]:
    """Compiles a program for the device of a mesh of one and executes each of its kernels.

    Libtpu must have been told to write to `dump` before it was loaded: see `worker`.

    Raises:
      ValueError: if there is no kernel in it, or the executor does not know an instruction.
    """
    for path in dump.iterdir():
        path.unlink()
    start = time.perf_counter()
    traced, device = trace(subject, mesh), mesh.devices.flat[0]
    compiled = traced.lower().compile()
    elapsed = time.perf_counter() - start
    values = [integers(leaf) for leaf in jax.tree.leaves(subject.arguments)]
    written, kernels = bundles.dumps(dump), _KERNEL.findall(compiled.as_text())
    core = Core.of(device.device_kind)
    found = []
    for call in kernel_calls(traced.jaxpr, values):
        path = written[_take(call.name, kernels)]
        program = Program(bundles.parse(path.read_text(errors="replace")), core)
        runs = run(program, call, getattr(device, "num_cores", 1))
        found.append(_report(subject, call, program, runs, topology, compiled, elapsed))
    if not found:
        raise ValueError(f"no pallas_call in {subject.name}")
    return found


def trace(subject: Subject, mesh: Mesh) -> Any:
    """Traces a program as if it ran on the device of a mesh of one."""
    here = NamedSharding(mesh, PartitionSpec())

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    arguments = jax.tree.map(described, subject.arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _pretended(mesh.devices.flat[0]):
        return jax.jit(subject.function, donate_argnums=subject.donate).trace(*arguments)


@contextlib.contextmanager
def _pretended(device: Any) -> Iterator[None]:
    """Kernels that ask which device there is get the answer for this one."""
    before = jax.devices, jax.default_backend
    jax.devices, jax.default_backend = lambda *_: [device], lambda: "tpu"
    try:
        yield
    finally:
        jax.devices, jax.default_backend = before


def _take(name: str, compiled: list[str]) -> str:
    """Takes the instruction that a call became: the first of its name, or else the first."""
    if not compiled:
        raise ValueError(f"the compiler left nothing of kernel {name}")
    of_name = [i for i, other in enumerate(compiled) if re.sub(r"[.\d]+$", "", other) == name]
    return compiled.pop(of_name[0] if of_name else 0)


def run(program: Program, call: Call, cores_of_device: int) -> list[Run]:
    """Runs a call on each core, and leaves out those that have next to nothing to do."""
    cores = cores_of_device if program.core_id is not None else 1
    runs = [Machine(program, call.operands, core).run() for core in range(cores)]
    most = max(run.cycles for run in runs)
    return [run for run in runs if run.cycles > most / 10]


def _report(subject, call, program, runs: Sequence[Run], topology, compiled, elapsed) -> Executed:
    core: Core = program.core
    timings = {
        memory.name: max((timing.replay(run, memory, core) for run in runs), key=lambda t: t.cycles)
        for memory in timing.MEMORIES
    }
    slowest = max(runs, key=lambda run: run.cycles)
    copies, copied_bytes = (sum(n) for n in zip(*(timing.copies(r.events) for r in runs)))
    num_bytes = subject.num_bytes or copied_bytes
    us = lambda cycles: cycles / core.clock_hz * 1e6
    phases = breakdown(program, slowest, timing.replay(slowest, timing.MEMORIES[1], core))
    return Executed(
        topology=topology,
        device_kind=core.device_kind,
        case=subject.name,
        kernel=subject.kernel or call.name,
        cores=len(runs),
        clock_hz=core.clock_hz,
        cycles=slowest.cycles,
        empty=sum(
            v for v, b in zip(slowest.visits, program.bundles, strict=True) if not b.ops
        ),
        hbm_cycles=num_bytes / (len(runs) * core.bytes_per_s) * core.clock_hz,
        copies=copies,
        copied_bytes=copied_bytes,
        num_bytes=num_bytes,
        us={name: round(us(t.cycles), 3) for name, t in timings.items()},
        wait_us={name: round(us(sum(t.waits.values())), 3) for name, t in timings.items()},
        phases=[dataclasses.asdict(phase) for phase in phases],
        guessed=sum(run.guessed for run in runs),
        unknown=dict(program.unknown),
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
        compile_s=round(elapsed, 2),
    )
