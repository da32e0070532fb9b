"""The cycles in which a TensorCore issues the attention kernel, asked of the compiler."""

import atexit
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import subjaxprs

import meshes
from shardpage import ShardLayout

from ..schedule.bundles import block_loop, read_dump
from ..schedule.measure import core_rates, dumping_to
from .compile import Split, layer_program
from .workload import LayerKind, Workload

# Worker process only: where the compiler writes its schedules.
_dump: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of one device's decode kernel.

    Attributes:
      block_cycles: bundles of the loop over blocks; block_pages: pages that a pass works on.
      sequence_cycles: bundles of the loop over sequences around it, which work on one block, too.
      call_cycles: bundles of the kernel that are in neither.
      cores: TensorCores that run it; walks: parts that the blocks are shared out in, fewer than
        cores if those share the heads of every block.
      clock_hz: bundles per second.
    """

    block_cycles: int
    block_pages: int
    sequence_cycles: int
    call_cycles: int
    cores: int
    walks: int
    clock_hz: float

    def cycles(self, num_seqs: int, pages: float) -> float:
        """The least that a core issues for sequences with this many pages each on the device."""
        further_blocks = max(0.0, pages / self.block_pages - 1)
        walked = num_seqs * (self.sequence_cycles + further_blocks * self.block_cycles)
        return self.call_cycles + walked / self.walks


@dataclasses.dataclass(frozen=True)
class Issue:
    """A kernel's schedule, or the reason why there is none."""

    schedule: Schedule | None = None
    reason: str = ""

    def seconds(self, num_seqs: int, pages: float) -> float:
        """The least time to issue the kernel; 0 if the schedule is not known."""
        if self.schedule is None:
            return 0.0
        return self.schedule.cycles(num_seqs, pages) / self.schedule.clock_hz

    def as_json(self) -> dict[str, Any]:
        """The schedule's figures, or {"none": the reason}."""
        return dataclasses.asdict(self.schedule) if self.schedule else {"none": self.reason}


def begin(workload: Workload, split: Split, chip: meshes.Chip | None) -> Callable[[], Issue]:
    """Begins to compile what one device of a split runs, in a process of its own.

    Shapes that were asked for before are not compiled again. What it returns waits for the answer.
    """
    if chip is None:
        return lambda: Issue(reason="no schedule of a kernel for devices that are no TPUs")
    if workload.backend not in (None, "pallas_tpu"):
        reason = f"backend {workload.backend} has no kernel of its own whose schedule could be read"
        return lambda: Issue(reason=reason)
    first = split.mesh.devices.flat[0]
    cores = {device.core_on_chip for device in split.mesh.devices.flat}
    separate = chip.megacore_config is not None and len(cores) > 1
    schedule = submit(local(workload, split), chip.name, first.device_kind, separate)

    def finish() -> Issue:
        try:
            return Issue(schedule.result())
        except (RuntimeError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            return Issue(reason=f"the compiler gave no schedule: {first_line}")

    return finish


def local(workload: Workload, split: Split) -> Workload:
    """What one device has of a workload, as far as its kernel depends on it.

    Tables keep their width: which of a sequence's pages a device holds is not known beforehand.
    Windows only shorten the walk, and sinks join after the kernel.
    """
    model = dataclasses.replace(
        workload.model,
        name="one device's",
        num_heads=workload.model.num_heads // split.head_shards,
        num_kv_heads=workload.model.num_kv_heads // split.head_shards,
        layers=(LayerKind(1),),
        sinks=False,
        source="",
    )
    return dataclasses.replace(workload, model=model, batch=workload.batch // split.seq_shards)


@functools.cache
def submit(
    work: Workload, chip: str, kind: str, separate: bool
) -> "concurrent.futures.Future[Schedule]":
    """Has the worker compile one device's work; `separate`: a device is one core of its chip."""
    return _worker().submit(_compile, work, chip, kind, separate)


@functools.cache
def _worker() -> concurrent.futures.ProcessPoolExecutor:
    """One process for all: libtpu is told where to write when it loads, and loads once."""
    folder = tempfile.TemporaryDirectory(prefix="shardpage_issue_")
    worker = concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _enter, (folder.name,)
    )
    atexit.register(folder.cleanup)
    return worker


def _enter(folder: str) -> None:
    global _dump
    _dump = pathlib.Path(folder)
    os.environ.update(dumping_to(_dump))
    jax.config.update("jax_platforms", "cpu")


def _compile(work: Workload, chip: str, kind: str, separate: bool) -> Schedule:
    for path in _dump.iterdir():
        path.unlink()
    host = meshes.chips()[chip].host[: meshes.chips()[chip].dims]
    pod = meshes.topology(
        f"{chip}:{'x'.join(map(str, host))}", megacore=False if separate else None
    )
    mesh = jax.sharding.Mesh(pod.devices[:1], ("data",))
    program = layer_program(work, Split(mesh, ShardLayout.of(mesh), 1, 1, 1), work.model.layers[0])
    traced = program.step.trace(*program.arguments)
    traced.lower().compile()
    call = _find_call(traced.jaxpr.jaxpr)
    trees = {name: tree for name, tree in read_dump(_dump).items() if "decode" in name}
    if call is None or not trees:
        raise RuntimeError("the compiler wrote no schedule of the decode kernel")
    tree = max(trees.values(), key=lambda tree: tree.count("matmul"))
    loop, sequences = block_loop(tree)
    block_pages = loop.count("dma_in") // len(jax.tree.leaves(program.arguments[0]))
    if not block_pages:
        raise RuntimeError("none with a loop that fetches and multiplies the pages of a block")
    clock_hz, _ = core_rates(kind)
    # The kernel's first operand has an entry for each walk and sequence, and one more per walk.
    return Schedule(
        block_cycles=loop.bundles,
        block_pages=block_pages,
        sequence_cycles=sequences.bundles - loop.bundles,
        call_cycles=tree.bundles - sequences.bundles,
        cores=call.outvars[0].aval.shape[0],
        walks=call.invars[0].aval.shape[0] // (work.batch + 1),
        clock_hz=clock_hz,
    )


def _find_call(jaxpr: Any) -> Any:
    """The equation of the decode kernel, however deep in calls."""
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "shardpage_decode":
            return equation
    return next(filter(None, map(_find_call, subjaxprs(jaxpr))), None)
