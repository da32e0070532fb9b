"""The time to issue the attention kernels of a layer, executed as the compiler made them."""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

import meshes
from shardpage import ShardLayout

from ..schedule import worker
from ..schedule.execute import Kernels, Subject, compile_kernels
from .compile import Split, layer_program
from .workload import LayerKind, Workload

# Tokens that are executed; of more, as many sequences as hold so many, and the rest by proportion.
_MOST_TOKENS = 1 << 20
# New tokens of a sequence that take a kernel about as long as one does.
_TOKENS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one device's kernels of a layer issue: they write the new tokens, and attend.

    Attributes:
      cycles: of a layer whose sequences have so many pages each on the device, by those pages;
        waits for results are in it, waits for copies are not.
      executed_seqs: sequences that were executed, of `num_seqs`: the rest by proportion.
      cores: TensorCores that run them.
      clock_hz: cycles per second.
    """

    cycles: dict[int, float]
    executed_seqs: int
    num_seqs: int
    cores: int
    clock_hz: float


@dataclasses.dataclass(frozen=True)
class Issue:
    """Executed kernels, or the reason why there are none."""

    schedule: Schedule | None = None
    reason: str = ""

    def seconds(self, pages: int) -> float:
        """The time to issue a layer's kernels; 0 if their schedule is not known."""
        if self.schedule is None:
            return 0.0
        return self.schedule.cycles[pages] / self.schedule.clock_hz

    def as_json(self) -> dict[str, Any]:
        """The schedule's figures, or {"none": the reason}."""
        return dataclasses.asdict(self.schedule) if self.schedule else {"none": self.reason}


def device_pages(workload: Workload, split: Split, kind: LayerKind) -> int:
    """Pages of a sequence that a device reads: all shards hold as many, or others hold more."""
    return math.ceil(workload.window_pages(kind) / split.context_shards)


def begin(workload: Workload, split: Split, chip: meshes.Chip | None) -> Callable[[], Issue]:
    """Begins to execute what one device of a split runs, in a process of its own.

    Shapes that were asked for before are not compiled again. What it returns waits for the answer.
    """
    if chip is None:
        return lambda: Issue(reason="no schedule of a kernel for devices that are no TPUs")
    if workload.backend not in (None, "pallas_tpu"):
        reason = f"backend {workload.backend} has no kernel of its own whose schedule could be read"
        return lambda: Issue(reason=reason)
    is_cut = split.context_shards > 1 or any(kind.window for kind in workload.model.layers)
    if workload.new_tokens > 1 and is_cut:
        reason = "chunks of prompts are executed for whole contexts only"
        return lambda: Issue(reason=reason)
    cores = {device.core_on_chip for device in split.mesh.devices.flat}
    separate = chip.megacore_config is not None and len(cores) > 1
    pages = tuple({device_pages(workload, split, kind): 0 for kind in workload.model.layers})
    schedule = submit(local(workload, split), chip.name, separate, pages)

    def finish() -> Issue:
        try:
            return Issue(schedule.result())
        except (RuntimeError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            return Issue(reason=f"the compiler gave no schedule: {first_line}")

    return finish


def local(workload: Workload, split: Split) -> Workload:
    """What one device has of a workload, as far as its kernels depend on it.

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
    work: Workload, chip: str, separate: bool, pages: tuple[int, ...]
) -> "concurrent.futures.Future[Schedule]":
    """Has the worker execute one device's work; `separate`: a device is one core of its chip."""
    return worker.submit(execute, work, chip, separate, pages)


def execute(
    work: Workload,
    chip: str,
    separate: bool,
    pages: tuple[int, ...],
    most_tokens: int = _MOST_TOKENS,
) -> Schedule:
    """Executes the kernels of a layer with so many pages a sequence each; in the worker."""
    host = meshes.chips()[chip].host[: meshes.chips()[chip].dims]
    name = f"{chip}:{'x'.join(map(str, host))}"
    pod = meshes.topology(name, megacore=False if separate else None)
    mesh = Mesh(pod.devices.flat[:1], ("data",))
    program = layer_program(work, Split(mesh, ShardLayout.of(mesh), 1, 1, 1), work.model.layers[0])
    subject = Subject("a layer", "", program.step, program.arguments)
    kernels = compile_kernels(subject, mesh, worker.dump())
    seen = max(pages) * work.page_size * -(-work.new_tokens // _TOKENS_AT_ONCE)
    num_seqs = max(1, min(work.batch, most_tokens // seen))
    executed = {each: _cycles(kernels, work, program.arguments, each, num_seqs) for each in pages}
    return Schedule(
        cycles={each: cycles for each, (cycles, _) in executed.items()},
        executed_seqs=num_seqs,
        num_seqs=work.batch,
        cores=max(cores for _, cores in executed.values()),
        clock_hz=kernels.programs[0].core.clock_hz,
    )


def _cycles(
    kernels: Kernels, work: Workload, arguments: Any, pages: int, num_seqs: int
) -> tuple[float, int]:
    """Cycles of all kernels of a layer, and the cores that run them."""
    lens = np.zeros(work.batch, np.int32)
    lens[:num_seqs] = pages * work.page_size
    ids = np.random.default_rng(0).permutation(work.batch * work.pages_per_seq)
    tables = ids.astype(np.int32).reshape(work.batch, -1)
    runs = kernels.run((*arguments[:-2], lens, tables))
    cycles = sum(max(run.cycles for run in of_kernel) for of_kernel in runs)
    return cycles * work.batch / num_seqs, max(map(len, runs))
