"""Compiles a program for a TPU that is not there, and executes its kernels on a modelled core."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import bundles, timing, units
from .core import Core
from .machine import Machine, Run
from .operands import integers, kernel_calls
from .phases import breakdown, longest
from .program import Program

# Kernels in compiled HLO, in order.
_KERNEL = re.compile(
    r'^\s*(?:ROOT )?%?(\S+) = .*custom_call_target="tpu_custom_call"', re.MULTILINE
)


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
      flops: that a call must compute; 0 where nobody asks.
    """

    name: str
    kernel: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    num_bytes: int | None = None
    donate: tuple[int, ...] = ()
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Executed:
    """One kernel's call, all cores that run it; figures are of the slowest.

    Attributes:
      device_kind: what it was compiled for.
      cores: TensorCores that run it.
      clock_hz: cycles per second.
      cycles: that issue, waits for results included and for copies not.
      empty: of those, the cycles that waited for a result.
      hbm_cycles: in which HBM delivers `num_bytes`, that a call must move, to all those cores.
      copies, copied_bytes: from and to HBM, all cores.
      us: microseconds by model of memory.
      wait_us: of those, waiting for copies.
      phases: where the cycles go, the longest first, with waits for copies at 1 us latency.
      guessed: loads of scalars that nobody had written (0 is taken); unknown: instructions whose
        values are not known, by name.
      topology, case, kernel: as they are named in tables.
      mxu_cycles: in which the matrix units compute what a call must; 0 where nobody asks.
      units: how busy each unit is; see `units.shares`.
      temp_bytes: scratch of the whole program in HBM; compile_s: seconds to compile it.
    """

    device_kind: str
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
    topology: str = ""
    case: str = ""
    kernel: str = ""
    temp_bytes: int = 0
    compile_s: float = 0.0
    mxu_cycles: float = 0.0
    units: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Executed":
        """From what `to_json` made."""
        return cls(**{name: value for name, value in row.items() if name != "ratio"})

    def to_json(self) -> dict[str, Any]:
        """With the ratio, for other programs."""
        return dataclasses.asdict(self) | {"ratio": round(self.ratio, 4)}

    @property
    def ratio(self) -> float:
        """Issue over HBM: above 1 the core is the bottleneck."""
        return self.cycles / self.hbm_cycles


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a compiled program, in the order in which it calls them.

    Attributes:
      traced, compiled: JAX's stages of the program.
      names, programs: of the kernels.
      compile_s: seconds.
    """

    traced: Any
    compiled: Any
    names: list[str]
    programs: list[Program]
    compile_s: float

    def run(self, arguments: Any) -> list[list[Run]]:
        """Runs each kernel with these arguments, on all cores that have something to do."""
        values = [integers(leaf) for leaf in jax.tree.leaves(arguments)]
        calls = kernel_calls(self.traced.jaxpr, values)
        runs = []
        for name, program in zip(self.names, self.programs, strict=True):
            # The compiler may have changed the order of two calls of one kernel.
            of_name = [call for call in calls if call.name == name]
            call = next((call for call in of_name if _takes(program, call)), of_name[0])
            calls = [other for other in calls if other is not call]
            runs.append(_run(program, call.operands))
        return runs


def _takes(program: Program, call: Any) -> bool:
    """Whether a program has the call's integers as operands, by how many they are."""
    inputs = [o for o in program.operands.values() if not o.is_output]
    given = [o for o in inputs if o.index < len(call.operands)]
    sizes = {
        o.index: math.prod(map(int, re.findall(r"\d+", o.shape.partition("[")[2]))) for o in given
    }
    return all(call.operands[i] is None or call.operands[i].size == n for i, n in sizes.items())


def _run(program: Program, operands: Sequence[Any]) -> list[Run]:
    runs = [Machine(program, operands, core).run() for core in range(program.num_cores)]
    # One of two cores may find nothing to do.
    most = max(run.cycles for run in runs)
    return [run for run in runs if run.cycles > most / 10]


def compile_kernels(subject: Subject, mesh: Mesh, dump: pathlib.Path) -> Kernels:
    """Compiles a program for the device of a mesh of one.

    Libtpu must have been told to write to `dump` before it was loaded: see `worker`.

    Raises:
      ValueError: if there is no kernel in it, or the executor does not know an instruction.
    """
    for path in dump.iterdir():
        path.unlink()
    start = time.perf_counter()
    traced, device = _trace(subject, mesh), mesh.devices.flat[0]
    compiled = traced.lower().compile()
    elapsed = time.perf_counter() - start
    written, left = bundles.dumps(dump), _KERNEL.findall(compiled.as_text())
    unknown = [None] * len(jax.tree.leaves(subject.arguments))
    names = [call.name for call in kernel_calls(traced.jaxpr, unknown)]
    if not names:
        raise ValueError(f"no pallas_call in {subject.name}")
    core, cores = Core.of(device.device_kind), getattr(device, "num_cores", 1)
    paths = [_written(_take(name, left), written) for name in names]
    parsed = {path: bundles.parse(path.read_text(errors="replace")) for path in {*paths}}
    programs = [Program(parsed[path], core, cores) for path in paths]
    return Kernels(traced, compiled, names, programs, elapsed)


def execute(subject: Subject, topology: str, mesh: Mesh, dump: pathlib.Path) -> list[Executed]:
    """Compiles a program and executes each of its kernels; see `compile_kernels`.

    Of a case by name, the calls that a large batch is cut into count together.
    """
    kernels = compile_kernels(subject, mesh, dump)
    runs = kernels.run(subject.arguments)
    temp_bytes = kernels.compiled.memory_analysis().temp_size_in_bytes
    rows = [
        dataclasses.replace(
            _report(subject, program, of_kernel),
            topology=topology,
            case=subject.name,
            kernel=subject.kernel or name,
            temp_bytes=temp_bytes,
            compile_s=round(kernels.compile_s, 2),
        )
        for name, program, of_kernel in zip(kernels.names, kernels.programs, runs, strict=True)
    ]
    if not subject.kernel:
        return rows
    whole = functools.reduce(joined, rows)
    if not subject.num_bytes:  # each call's are what it moved
        totals = {name: sum(getattr(r, name) for r in rows) for name in ("num_bytes", "hbm_cycles")}
        whole = dataclasses.replace(whole, **totals)
    return [whole]


def joined(one: Executed, other: Executed) -> Executed:
    """Two calls, one after the other, as one."""
    add = lambda a, b: {name: round(a.get(name, 0) + b.get(name, 0), 3) for name in {**a, **b}}
    phases: dict[Any, dict[str, Any]] = {}
    for phase in (*one.phases, *other.phases):
        key = tuple(value for value in phase.values() if isinstance(value, str))
        before = phases.get(key, {})
        phases[key] = {
            name: value if isinstance(value, str) else value + before.get(name, 0)
            for name, value in phase.items()
        }
    summed = ("cycles", "empty", "copies", "copied_bytes", "guessed")
    return dataclasses.replace(
        one,
        **{name: getattr(one, name) + getattr(other, name) for name in summed},
        us=add(one.us, other.us),
        wait_us=add(one.wait_us, other.wait_us),
        unknown=add(one.unknown, other.unknown),
        units=_weighted(one, other),
        phases=sorted(phases.values(), key=lambda phase: -phase["cycles"]),
    )


def _weighted(one: Executed, other: Executed) -> dict[str, float]:
    """How busy units are during two calls."""
    cycles = one.cycles + other.cycles
    return {
        unit: round((share * one.cycles + other.units[unit] * other.cycles) / cycles, 4)
        for unit, share in one.units.items()
    }


def _trace(subject: Subject, mesh: Mesh) -> Any:
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


def _written(instruction: str, written: dict[str, pathlib.Path]) -> pathlib.Path:
    """What the compiler wrote of an instruction: of several equal ones, of the first alone."""
    name = re.sub(r"[.\d]+$", "", instruction)
    alike = (path for other, path in written.items() if re.sub(r"[.\d]+$", "", other) == name)
    path = written.get(instruction) or next(alike, None)
    if path is None:
        raise ValueError(f"the compiler wrote nothing of {instruction}, only of {[*written]}")
    return path


def _report(subject: Subject, program: Program, runs: Sequence[Run]) -> Executed:
    core = program.core
    timings = {
        memory.name: max((timing.replay(run, memory, core) for run in runs), key=lambda t: t.cycles)
        for memory in timing.MEMORIES
    }
    slowest = max(runs, key=lambda run: run.cycles)
    counted = [timing.copies(run.events) for run in runs]
    copies, copied_bytes = sum(n for n, _ in counted), sum(size for _, size in counted)
    num_bytes = subject.num_bytes or copied_bytes
    us = lambda cycles: round(cycles / core.clock_hz * 1e6, 3)
    phases = longest(breakdown(program, slowest, timing.replay(slowest, timing.ONE_US, core)))
    visited = zip(slowest.visits, program.bundles, strict=True)
    return Executed(
        device_kind=core.device_kind,
        cores=len(runs),
        clock_hz=core.clock_hz,
        cycles=slowest.cycles,
        empty=sum(visits for visits, bundle in visited if not bundle.ops),
        hbm_cycles=num_bytes / (len(runs) * core.bytes_per_s) * core.clock_hz,
        mxu_cycles=subject.flops / (len(runs) * core.flops_per_cycle),
        copies=copies,
        copied_bytes=copied_bytes,
        num_bytes=num_bytes,
        us={name: us(t.cycles) for name, t in timings.items()},
        wait_us={name: us(sum(t.waits.values())) for name, t in timings.items()},
        phases=[dataclasses.asdict(phase) for phase in phases],
        guessed=sum(run.guessed for run in runs),
        unknown=dict(program.unknown),
        units=units.shares(program.bundles, slowest.visits),
    )
