"""From what the compiler says to bounds: does it fit, what moves, how long at least."""

import concurrent.futures
import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

import meshes

from . import issue as issues
from .compiled import CompiledLayer, DoesNotFitError, Split, compile_layer, split_for
from .workload import ITEMSIZE, LayerKind, Workload


@dataclasses.dataclass(frozen=True)
class Device:
    """What one jax device has of its chip. Rates in bytes a second; None where not known."""

    kind: str
    chip: meshes.Chip | None
    hbm_bytes: int | None = None
    hbm_rate: float | None = None
    ici_rate: float | None = None
    dcn_rate: float | None = None

    @classmethod
    def of(cls, mesh: Mesh) -> "Device":
        """Reads the kind off a mesh's devices; devices of one chip share what the chip has."""
        first: Any = mesh.devices.flat[0]
        chip = meshes.Chip.of_kind(first.device_kind)
        if chip is None:
            return cls(first.device_kind, None)
        cores = {device.core_on_chip for device in mesh.devices.flat}
        return cls(
            first.device_kind,
            chip,
            hbm_bytes=int(chip.usable_gib * 2**30 * chip.devices) // len(cores),
            hbm_rate=chip.hbm_gbps * 1e9 / len(cores),
            ici_rate=chip.ici_gbps * 1e9 / 2 / len(cores),  # one direction
            dcn_rate=None if chip.dcn_gbit is None else chip.dcn_gbit * 1e9 / 8 / len(cores),
        )


@dataclasses.dataclass(frozen=True)
class Times:
    """The least seconds of a step's attention, by what is being waited for.

    Attributes:
      hbm: reading and writing memory.
      issue: issuing the kernel's instructions; None where its schedule is not known.
      attend: the longer of the two in each layer: they overlap.
      ici, dcn: sending.
    """

    hbm: float
    issue: float | None
    attend: float
    ici: float
    dcn: float

    @property
    def total(self) -> float:
        """One after the other: a merge waits for the attention whose results it merges."""
        return self.attend + self.ici + self.dcn


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device for the attention of all layers; the model's weights are not in it."""

    cache: int
    temp: int
    other: int
    limit: int | None

    @property
    def total(self) -> int:
        """All of it: every layer's cache, and the scratch and arguments of one layer at a time."""
        return self.cache + self.temp + self.other

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device; None where its size is not known."""
        return None if self.limit is None else self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a workload on a mesh.

    Attributes:
      workload, split, device: what was planned, and where.
      layers: what the compiler said, one of each kind.
      reserved_bytes: see `make_plan`.
      issue: the kernel's schedule on each device, or why there is none.
    """

    workload: Workload
    split: Split
    device: Device
    layers: tuple[CompiledLayer, ...]
    reserved_bytes: int = 0
    issue: issues.Issue | str = "not asked for"

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling."""
        return sum(layer.compile_s for layer in self.layers)

    @property
    def memory(self) -> Memory:
        """Per device."""
        limit = self.device.hbm_bytes
        return Memory(
            cache=sum(layer.kind.count * layer.cache_bytes for layer in self.layers),
            temp=max(layer.temp_bytes + layer.copied_bytes for layer in self.layers),
            other=max(layer.other_bytes + layer.output_bytes for layer in self.layers),
            limit=None if limit is None else limit - self.reserved_bytes,
        )

    @property
    def read_bytes(self) -> int:
        """Bytes that a device cannot do without reading or writing in HBM, all layers, one step."""
        return sum(layer.kind.count * self._layer_read_bytes(layer) for layer in self.layers)

    def _layer_read_bytes(self, layer: CompiledLayer) -> int:
        # Every page that is looked at is read once; a window leaves the pages before it alone.
        looked_at = self.workload.window_blocks(layer.kind) / self.workload.max_blocks
        return int(layer.cache_bytes * looked_at) + layer.other_bytes + layer.output_bytes

    @property
    def times(self) -> Times | None:
        """Lower bounds; None where the device's rates are not known."""
        device = self.device
        if device.hbm_rate is None or device.ici_rate is None:
            return None
        hbm = issue = attend = ici = dcn = 0.0
        for layer in self.layers:
            reading = layer.kind.count * self._layer_read_bytes(layer) / device.hbm_rate
            issuing = layer.kind.count * self._layer_issue_s(layer)
            hbm, issue = hbm + reading, issue + issuing
            attend += max(reading, issuing)
            for sent in layer.collectives:
                if not sent.crosses_slices:
                    rate = device.ici_rate * links_used(self.split.mesh, sent.axes)
                    ici += layer.kind.count * sent_bytes(sent) / rate
                else:
                    # An unknown rate must not pass for a fast one: count the slowest that is known.
                    rate = device.dcn_rate or _slowest_dcn_rate()
                    dcn += layer.kind.count * sent_bytes(sent) / rate
        return Times(hbm, None if isinstance(self.issue, str) else issue, attend, ici, dcn)

    def _layer_issue_s(self, layer: CompiledLayer) -> float:
        if isinstance(self.issue, str):
            return 0.0
        # Each of the shards of a context holds as many of its pages, or others hold more.
        pages = self.workload.window_blocks(layer.kind) / self.split.context_shards
        return self.issue.seconds(self.workload.batch // self.split.seq_shards, pages)

    @property
    def tokens_per_s(self) -> float | None:
        """Upper bound: attention alone, nothing else of the model."""
        return None if self.times is None else self.workload.batch / self.times.total

    @property
    def bytes_per_token(self) -> float:
        """Bytes of cache, all layers, that one token takes on each device holding some of it."""
        slots = self.layers[0].pages * self.workload.page_size
        return self.memory.cache / slots

    @property
    def spare_pages(self) -> int | None:
        """Pages (of all layers together) that a device could hold; None if HBM is not known."""
        memory = self.memory
        if memory.limit is None:
            return None
        per_page = self.bytes_per_token * self.workload.page_size
        return max(0, int((memory.limit - memory.temp - memory.other) // per_page))

    @property
    def largest_batch(self) -> int | None:
        """The most sequences of this context that fit, by the bytes above."""
        if self.spare_pages is None:
            return None
        pages = self.spare_pages * self.split.context_shards  # of one shard of the sequences
        return pages // self.workload.max_blocks * self.split.seq_shards

    @property
    def longest_context(self) -> int | None:
        """The longest context with which this batch fits, in tokens."""
        if self.spare_pages is None:
            return None
        pages = self.spare_pages * self.split.context_shards
        return pages // (self.workload.batch // self.split.seq_shards) * self.workload.page_size


def make_plan(
    workload: Workload, mesh: Mesh, *, reserved_bytes: int = 0, issue: bool = True
) -> Plan:
    """Compiles one layer of each kind for the whole mesh and gathers what came of it.

    Args:
      workload: the model and its sequences.
      mesh: compile-only, simulated or real devices.
      reserved_bytes: memory of each device to leave alone, for weights for example.
      issue: also read the kernel's schedule, where there is one.

    Raises:
      ValueError: if the workload does not divide over the mesh.
      DoesNotFitError: if a single layer exceeds a device.
    """
    split, device = split_for(workload, mesh), Device.of(mesh)
    schedule = _start_issue(workload, split, device) if issue else "not asked for"
    layers = tuple(compile_layer(workload, split, kind) for kind in _kinds(workload))
    if not isinstance(schedule, str):
        schedule = _finish_issue(schedule)
    return Plan(workload, split, device, layers, reserved_bytes, schedule)


def _start_issue(
    workload: Workload, split: Split, device: Device
) -> concurrent.futures.Future[issues.Issue] | str:
    if (reason := issues.why_not(workload, device.chip)) is not None:
        return reason
    assert device.chip is not None
    return issues.start(workload, split, device.chip)


def _finish_issue(schedule: concurrent.futures.Future[issues.Issue]) -> issues.Issue | str:
    try:
        return schedule.result()
    except (RuntimeError, ValueError) as error:
        return f"the compiler gave no schedule: {str(error).partition(chr(10))[0]}"


def confirm_largest_batch(plan: Plan, tries: int = 3) -> int | None:
    """Compiles the largest batch, and a smaller one where scratch memory grew too much.

    Returns:
      A batch that the compiler says fits; 0 if none was found, None where HBM is not known.
    """
    batch = _grown(plan).largest_batch
    step = plan.split.seq_shards
    for _ in range(tries):
        if not batch:
            return batch
        larger = dataclasses.replace(plan.workload, batch=batch)
        layers = tuple(compile_layer(larger, plan.split, kind) for kind in _kinds(larger))
        grown = dataclasses.replace(plan, workload=larger, layers=layers)
        if grown.memory.fits:
            return batch
        assert grown.largest_batch is not None
        batch = min(grown.largest_batch, batch - step)
    return 0


def _grown(plan: Plan) -> Plan:
    """With what grows with the batch as large as the largest batch makes it: a first guess."""
    factor = max(1.0, (plan.largest_batch or 0) / plan.workload.batch)
    grown = (
        dataclasses.replace(
            layer,
            temp_bytes=math.ceil(layer.temp_bytes * factor),
            other_bytes=math.ceil(layer.other_bytes * factor),
            output_bytes=math.ceil(layer.output_bytes * factor),
        )
        for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=tuple(grown))


def shrink_to_fit(workload: Workload, mesh: Mesh, *, reserved_bytes: int = 0) -> Plan:
    """The plan of a smaller workload, for when not even one layer of this one compiles.

    Takes the smallest batch, then halves the context until it compiles.
    """
    batch = split_for(workload, mesh).seq_shards
    context = workload.context
    while True:
        smaller = dataclasses.replace(workload, batch=batch, context=context)
        try:
            return make_plan(smaller, mesh, reserved_bytes=reserved_bytes, issue=False)
        except DoesNotFitError:
            if context <= workload.page_size:
                raise
            context //= 2


def sent_bytes(sent: meshes.Collective) -> float:
    """The least bytes that a device must send for a collective, whatever the algorithm."""
    others = (sent.group_size - 1) / sent.group_size
    kind = sent.kind.removeprefix("dcn-")
    if kind == "all-reduce":  # every part leaves once to be added, and once as a sum
        return 2 * others * sent.num_bytes
    if kind in ("all-gather", "reduce-scatter", "all-to-all"):
        return others * sent.num_bytes
    return sent.num_bytes


def links_used(mesh: Mesh, axes: tuple[str, ...]) -> float:
    """The part of a chip's links that lie in the dimensions along which `axes` extend."""
    chip = meshes.Chip.of_kind(mesh.devices.flat[0].device_kind)
    if chip is None or not axes:
        return 1.0
    first = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    coords = [device.coords for device in mesh.devices[first].flat]
    spanned = sum(len(set(along)) > 1 for along in zip(*coords, strict=True))
    return (spanned or chip.dims) / chip.dims  # both devices of one chip: not slower than links


def _kinds(workload: Workload) -> list[LayerKind]:
    return list(workload.model.layers)


def _slowest_dcn_rate() -> float:
    return min(c.dcn_gbit for c in meshes.chips().values() if c.dcn_gbit) * 1e9 / 8


def quick_bound(workload: Workload, sizes: dict[str, int], device: Device) -> float:
    """A lower bound in seconds from shapes alone: what any mesh of these sizes must at least take.

    Used to decide what is worth compiling: it never exceeds what `Plan.times` says.

    Args:
      workload: the model and its sequences.
      sizes: "data", "kv" and "context", as shards.
      device: its rates.
    """
    model = workload.model
    assert device.hbm_rate is not None
    assert device.ici_rate is not None
    data, kv, context = sizes["data"], sizes["kv"], sizes["context"]
    batch = workload.batch // data
    slot = 2 * model.num_kv_heads // kv * model.head_dim * ITEMSIZE[workload.dtype]
    seconds = 0.0
    for kind in model.layers:
        pages = batch * workload.max_blocks / context
        pages = math.ceil(pages) * workload.window_blocks(kind) / workload.max_blocks
        hbm = pages * workload.page_size * slot + 4 * batch * workload.max_blocks
        merged = 4 * batch * model.num_heads // kv * (model.head_dim + 2) if context > 1 else 0
        sent = 2 * merged * (context - 1) / context
        seconds += kind.count * (hbm / device.hbm_rate + sent / device.ici_rate)
    return seconds
