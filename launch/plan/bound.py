"""Third stage: from figures per device to bounds. Does it fit, what moves, how long at least?"""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

import meshes

from .compile import Split
from .issue import Issue, device_pages
from .read import Layer
from .workload import Workload


@dataclasses.dataclass(frozen=True)
class Device:
    """What one jax device has of its chip, if that is known. Rates in bytes per second."""

    kind: str
    chip: meshes.Chip | None
    hbm_bytes: int = 0
    hbm_rate: float = 0.0
    flops_rate: float = 0.0  # bfloat16
    ici_rate: float = 0.0
    dcn_rate: float = 0.0

    @classmethod
    def of(cls, mesh: Mesh) -> "Device":
        """Reads the kind off a mesh's devices; devices of one chip share what the chip has."""
        first: Any = mesh.devices.flat[0]
        chip = meshes.Chip.of_kind(first.device_kind)
        if chip is None:
            return cls(first.device_kind, None)
        sharing = len({device.core_on_chip for device in mesh.devices.flat})
        # An unknown rate must not pass for a fast one: count the slowest that is known.
        slowest = min(c.dcn_gbit for c in meshes.chips().values() if c.dcn_gbit)
        return cls(
            first.device_kind,
            chip,
            hbm_bytes=int(chip.usable_gib * 2**30 * chip.devices) // sharing,
            hbm_rate=chip.hbm_gbps * 1e9 / sharing,
            flops_rate=chip.bf16_tflops * 1e12 / sharing,
            ici_rate=chip.ici_gbps * 1e9 / 2 / sharing,  # one direction
            dcn_rate=chip.dcn_gbit * 1e9 / 8 / sharing if chip.dcn_gbit else slowest * 1e9 / 8,
        )


@dataclasses.dataclass(frozen=True)
class Times:
    """The least seconds of a step's attention, by what is being waited for.

    Attributes:
      hbm: reading and writing memory.
      issue: issuing the kernels' instructions and waiting for their results; None where their
        schedule is not known.
      mxu: multiplying in the matrix units, in bfloat16, what the new tokens see.
      attend: the longest of the three in each layer: they overlap.
      ici, dcn: sending.
    """

    hbm: float
    issue: float | None
    mxu: float
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
class Bounds:
    """What follows for a workload on a mesh.

    Attributes:
      workload, split, device: what was compiled, and for what.
      layers: what the compiler said, one of each kind.
      reserved_bytes: memory of each device that is left alone.
      issue: the kernels, executed as on each device, or why they are not.
    """

    workload: Workload
    split: Split
    device: Device
    layers: tuple[Layer, ...]
    reserved_bytes: int
    issue: Issue

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling."""
        return sum(layer.compile_s for layer in self.layers)

    @property
    def memory(self) -> Memory:
        """Per device."""
        device = self.device
        return Memory(
            cache=sum(layer.kind.count * layer.cache_bytes for layer in self.layers),
            temp=max(layer.temp_bytes + layer.copied_bytes for layer in self.layers),
            other=max(layer.other_bytes + layer.output_bytes for layer in self.layers),
            limit=None if device.chip is None else device.hbm_bytes - self.reserved_bytes,
        )

    @property
    def read_bytes(self) -> int:
        """Bytes that a device cannot do without reading or writing in HBM, all layers, one step."""
        return sum(layer.kind.count * self._layer_read_bytes(layer) for layer in self.layers)

    def _layer_read_bytes(self, layer: Layer) -> int:
        # Every page that is needed is read once; a window leaves the pages before it alone.
        needed = self.workload.window_pages(layer.kind) / self.workload.pages_per_seq
        return int(layer.cache_bytes * needed) + layer.other_bytes + layer.output_bytes

    @property
    def times(self) -> Times | None:
        """Lower bounds; None where the device's rates are not known."""
        if self.device.chip is None:
            return None
        rate = self.device.hbm_rate
        reading = [x.kind.count * self._layer_read_bytes(x) / rate for x in self.layers]
        issuing = [x.kind.count * self._layer_issue_s(x) for x in self.layers]
        multiplying = [x.kind.count * self._layer_mxu_s(x) for x in self.layers]
        return Times(
            hbm=sum(reading),
            issue=sum(issuing) if self.issue.schedule else None,
            mxu=sum(multiplying),
            attend=sum(map(max, reading, issuing, multiplying)),
            ici=self._sending_s(between_slices=False),
            dcn=self._sending_s(between_slices=True),
        )

    def _layer_issue_s(self, layer: Layer) -> float:
        return self.issue.seconds(device_pages(self.workload, self.split, layer.kind))

    def _layer_mxu_s(self, layer: Layer) -> float:
        split = self.split
        shards = split.seq_shards * split.head_shards * split.context_shards
        return self.workload.flops(layer.kind) / shards / self.device.flops_rate

    def _sending_s(self, *, between_slices: bool) -> float:
        device, seconds = self.device, 0.0
        for layer in self.layers:
            for sent in layer.collectives:
                if sent.crosses_slices == between_slices:
                    links = device.ici_rate * links_used(self.split.mesh, sent.axes)
                    rate = device.dcn_rate if between_slices else links
                    seconds += layer.kind.count * sent_bytes(sent) / rate
        return seconds

    @property
    def tokens_per_s(self) -> float | None:
        """Upper bound: attention alone, nothing else of the model."""
        return None if self.times is None else self.workload.num_queries / self.times.total

    @property
    def _spare_pages(self) -> int | None:
        """Pages for which the devices of one shard of the sequences have room, if that is known."""
        memory = self.memory
        if memory.limit is None:
            return None
        per_page = memory.cache / self.layers[0].pages
        per_device = max(0, int((memory.limit - memory.temp - memory.other) // per_page))
        return per_device * self.split.context_shards

    @property
    def largest_batch(self) -> int | None:
        """The most sequences of this context that fit, by the bytes above."""
        pages = self._spare_pages
        return pages and pages // self.workload.pages_per_seq * self.split.seq_shards

    @property
    def longest_context(self) -> int | None:
        """The longest context with which this batch fits, in tokens."""
        pages, batch = self._spare_pages, self.workload.batch // self.split.seq_shards
        return pages and pages // batch * self.workload.page_size

    @property
    def largest_chunk(self) -> int | None:
        """The most new tokens of each sequence that fit, by the bytes above of those given."""
        memory = self.memory
        if memory.limit is None:
            return None
        each = (memory.temp + memory.other) / self.workload.new_tokens
        return min(self.workload.context, int(max(0, memory.limit - memory.cache) / each))


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


def quick_bound(workload: Workload, sizes: dict[str, int], device: Device) -> float:
    """A lower bound in seconds from shapes alone: what any mesh of these sizes must at least take.

    Used to decide what is worth compiling: it never exceeds what `Bounds.times` says. `sizes` are
    the shards "data", "kv" and "context"; the device's rates must be known.
    """
    model = workload.model
    data, kv, context = sizes["data"], sizes["kv"], sizes["context"]
    batch = workload.batch // data
    token_bytes = model.num_kv_heads // kv * workload.head_bytes
    seconds = 0.0
    for kind in model.layers:
        pages = math.ceil(batch * workload.pages_per_seq / context)
        pages = pages * workload.window_pages(kind) / workload.pages_per_seq
        hbm = pages * workload.page_size * token_bytes + 4 * batch * workload.pages_per_seq
        rows = batch * workload.new_tokens
        merged = 4 * rows * model.num_heads // kv * (model.head_dim + 2) if context > 1 else 0
        sent = 2 * merged * (context - 1) / context
        mxu = workload.flops(kind) / (data * kv * context) / device.flops_rate
        seconds += kind.count * (max(hbm / device.hbm_rate, mxu) + sent / device.ici_rate)
    return seconds
