"""A decode step of a model, compiled for a mesh: what stands around the kernels in each layer."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import meshes
from shardpage import PagedKVCache, attend, make_plan, write_kv

from ..plan.compile import Split, split_for
from ..plan.workload import Workload
from . import bundles, hlo, timing, worker
from .core import Core
from .execute import Subject, compile_kernels
from .machine import Machine
from .program import Program

# The body of the loop is the same whatever their number, and caches of so few fit.
_MOST_LAYERS = 8
# Parts of a path that say how, not what.
_CALLS = ("closed_call", "shard_map", "while", "body", "cond")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction of the compiled step outside the kernels.

    Attributes:
      name, opcode: in HLO.
      maker: "model", "write" or "attend", with the part of the library; "compiler" for copies that
        it adds.
      cycles: executed, waits for results included; None if it has no program of its own.
      us: with waits for copies at 1 us latency, if those are all its own.
      estimated_cycles: what the compiler thinks.
      in_layers: whether it runs in each layer, or once a step.
      is_equal: whether nothing that it reads differs between layers but their number; not said
        of what is in a loop of its own.
      times: how often it runs in a layer.
      reason: why it was not executed, and its cycles are the compiler's estimate.
    """

    name: str
    opcode: str
    maker: str
    cycles: int | None
    us: float
    estimated_cycles: int | None
    in_layers: bool = False
    is_equal: bool = False
    times: int = 1
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on one of the devices.

    Attributes:
      title: model, sequences, mesh.
      topology, device_kind: what it was compiled for.
      kernels: microseconds of the first pass of each kernel: (name, issue only, at 1 us latency);
        at every latency more for operands that only other devices know.
      ops: all others.
      collectives: those in a layer: kind, axes, bytes.
      temp_bytes, alias_bytes: of the compiled step.
    """

    title: str
    topology: str
    device_kind: str
    kernels: list[tuple[str, float, float]]
    ops: list[Op]
    collectives: list[tuple[str, str, int]]
    temp_bytes: int
    alias_bytes: int


def analyze(topology: str, spec: str | None, work: Workload) -> Step:
    """Compiles a step and reads it; in the worker.

    Args:
      topology, spec: the slice, and axes of the mesh over it; None for its first device alone.
      work: model, batch, context, page size; the first kind of layer, as often as all.
    """
    mesh = worker.one_device(topology) if spec is None else meshes.topology(topology, spec)
    split, dump = split_for(work, mesh), worker.dump()
    subject = _subject(work, split)
    kernels = compile_kernels(subject, split.mesh, dump)
    core, text = Core.of(split.mesh.devices.flat[0].device_kind), kernels.compiled.as_text()
    runs = [max(of, key=lambda run: run.cycles) for of in kernels.run(subject.arguments)]
    times = [_us(run, core) for run in runs]
    memory = kernels.compiled.memory_analysis()
    found = hlo.computations(text)
    programs = bundles.dumps(dump)
    once = [_op(i, programs, core) for i in found["ENTRY"] if _counts(i)]
    loops = [loop[0] for i in found["ENTRY"] if (loop := hlo.loop(i))]
    # The plan has loops too, of which none has a kernel.
    layers = [body for body in loops if any(i.is_kernel for i in found[body])]
    ops = once + [op for body in layers for op in _in_layers(found, body, programs, core)]
    lines = (
        f"  %{i.name} = {i.result} {i.opcode}({i.text}" for body in layers for i in found[body]
    )
    sent = meshes.collectives("\n".join(lines), split.mesh)
    shape = f"{work.batch} x {work.context}, page {work.page_size}"
    return Step(
        title=f"{work.model.name}, {shape}, {split.spec}",
        topology=topology,
        device_kind=core.device_kind,
        kernels=[(n, *us) for n, us in zip(kernels.names, times, strict=True)],
        ops=ops,
        collectives=[(c.kind, ", ".join(c.axes), c.num_bytes) for c in sent],
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
    )


def _in_layers(
    found: dict[str, list[hlo.Instruction]],
    body: str,
    programs: dict[str, pathlib.Path],
    core: Core,
    times: int = 1,
) -> Iterator[Op]:
    """What the loop over layers runs in each, also in loops of its own."""
    changed = hlo.varying(found[body])
    for instruction in found[body]:
        if (inner := hlo.loop(instruction)) is not None:
            yield from _in_layers(found, inner[0], programs, core, times * inner[1])
        elif _counts(instruction):
            op = _op(instruction, programs, core)
            is_equal = instruction.name not in changed and times == 1
            yield dataclasses.replace(op, in_layers=True, is_equal=is_equal, times=times)


def _counts(instruction: hlo.Instruction) -> bool:
    return instruction.takes_time and not instruction.is_kernel


def _op(instruction: hlo.Instruction, programs: dict[str, pathlib.Path], core: Core) -> Op:
    cycles, us, reason = None, 0.0, ""
    path = programs.get(instruction.name)
    if path is not None and not instruction.opcode.startswith(_COLLECTIVES):
        try:
            cycles, us = _executed(path, core)
        except ValueError as error:  # an instruction that the executor does not know
            cycles, reason = instruction.estimated_cycles, str(error)
            us = round((cycles or 0) / core.clock_hz * 1e6, 3)
    return Op(
        instruction.name,
        instruction.opcode,
        _maker(instruction),
        cycles,
        us,
        instruction.estimated_cycles,
        reason=reason,
    )


def _executed(path: pathlib.Path, core: Core) -> tuple[int, float]:
    """Cycles of an operation, and its microseconds at 1 us of latency."""
    # Operands that are not integers do not matter, and XLA's loops have fixed lengths.
    run = Machine(Program(bundles.parse(path.read_text(errors="replace")), core), ()).run()
    try:
        return run.cycles, _us(run, core)[1]
    except RuntimeError:  # it waits for another core or device
        return run.cycles, round(run.cycles / core.clock_hz * 1e6, 3)


def _us(run: Any, core: Core) -> tuple[float, float]:
    """Microseconds, issue only and at 1 us of latency."""
    cycles = (timing.replay(run, memory, core).cycles for memory in (timing.ISSUE, timing.ONE_US))
    issue, with_latency = (round(each / core.clock_hz * 1e6, 3) for each in cycles)
    return issue, with_latency


def _maker(instruction: hlo.Instruction) -> str:
    """By the named scope of the step that it was traced in, and the library's own within."""
    if instruction.opcode.startswith(_COLLECTIVES):
        return "collective"
    parts = instruction.op_name.split("/")
    for scope in ("write", "attend"):
        if f"step_{scope}" in parts:
            inner = parts[parts.index(f"step_{scope}") + 1 : -1]
            named = [part for part in inner if part.isidentifier() and part not in _CALLS]
            return f"{scope}: {named[0]}" if named else scope
    return "model" if instruction.op_name else "compiler"


def _subject(work: Workload, split: Split) -> Subject:
    """All layers in a `scan`, which carries one cache of all layers; planned before."""
    num_layers, num_seqs = min(_MOST_LAYERS, work.model.num_layers), work.batch
    where = {"mesh": split.mesh, "layout": split.layout}

    def attention(x, weights, cache, plan, number):
        query, key, value = (
            (x @ weights[name]).reshape(num_seqs, -1, work.model.head_dim)
            for name in ("query", "key", "value")
        )
        with jax.named_scope("step_write"):
            cache = write_kv(cache, key, value, plan, layer=number)
        with jax.named_scope("step_attend"):
            out: Any = attend(query, cache, plan, layer=number)
        return x + out.reshape(num_seqs, -1) @ weights["out"], cache

    def step(cache, weights, x, lens, tables):
        plan = make_plan(
            cache, lens, tables, num_heads=work.model.num_heads,
            window=work.model.layers[0].window, **where,
        )  # fmt: skip

        def layer(carry, xs):
            x, cache = carry
            weights, number = xs
            return attention(x, weights, cache, plan, number), None

        numbers = jnp.arange(num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(layer, (x, cache), (weights, numbers))
        return cache, x

    return Subject("step", "", step, _arguments(work, split, num_layers), donate=(0,))


def _arguments(work: Workload, split: Split, num_layers: int) -> tuple[Any, ...]:
    """Cache, weights, activations, lengths and tables of a step."""
    model, layout, num_seqs = work.model, split.layout, work.batch
    hidden, pages = model.num_heads * model.head_dim, num_seqs * work.pages_per_seq

    def array(shape: Sequence[int], *spec: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(split.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(tuple(shape), work.query_dtype, sharding=sharding)

    dims, layers = (model.num_kv_heads, work.page_size, model.head_dim), {"num_layers": num_layers}
    cache = PagedKVCache.abstract(
        pages, *dims, dtype=work.dtype, mesh=split.mesh, layout=layout, **layers
    )
    wide, narrow = (
        array((num_layers, hidden, heads * model.head_dim), None, None, layout.heads)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    out = array((num_layers, hidden, hidden), None, layout.heads, None)
    weights = {"query": wide, "key": narrow, "value": narrow, "out": out}
    lens = np.full(num_seqs, work.context, np.int32)
    tables = np.arange(pages, dtype=np.int32).reshape(num_seqs, -1)
    return cache, weights, array((num_seqs, hidden), layout.seqs, None), lens, tables


def table(step: Step) -> str:
    """Ops, cycles and time of a layer, by who made them."""
    cells = [("made by", "ops", "cycles", "us", "equal in all layers: ops", "cycles")]
    groups: dict[str, list[Op]] = collections.defaultdict(list)
    for op in step.ops:
        groups[op.maker if op.in_layers else "once a step"].append(op)
    ours = [op for maker, ops in groups.items() for op in ops if _is_ours(maker)]
    rows = [*sorted(groups.items()), ("attention's, in a layer", ours)]
    for maker, ops in rows:
        equal = [op for op in ops if op.is_equal]
        cycles = [str(sum(op.times * (op.cycles or 0) for op in some)) for some in (ops, equal)]
        us = f"{sum(op.times * op.us for op in ops):.1f}"
        runs = str(sum(op.times for op in ops))
        cells.append((maker, runs, cycles[0], us, str(len(equal)), cycles[1]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    kernels = [f"{n}: {issue:.1f} us issue, {us:.1f} at 1 us" for n, issue, us in step.kernels]
    sent = [f"{kind} over {axes or 'all'}, {size} B" for kind, axes, size in step.collectives]
    guessed = [
        f"{op.name}, by the compiler's estimate: {op.reason}" for op in step.ops if op.reason
    ]
    return "\n".join([
        "", f"{step.device_kind} ({step.topology}): {step.title}", *lines, *guessed, *kernels,
        f"sent in a layer: {'; '.join(sent) or 'nothing'}",
        f"scratch {step.temp_bytes / 1e6:.1f} MB, in place {step.alias_bytes / 1e6:.0f} MB",
    ])  # fmt: skip


def _is_ours(maker: str) -> bool:
    return maker.startswith(("write", "attend", "collective"))
