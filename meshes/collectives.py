"""What a compiled program sends between devices: read from its HLO, named by mesh axis."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from shardpage.arguments import instance

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>.*?) "
    rf"(?P<kind>{_KINDS}|collective-broadcast|send)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]*)\]")
_GROUPS = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\}|mesh\[.*?\] ?\{.*?\}|\[[\d,]+\]<=\S+)")
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\}|\{\})")
_LIST = re.compile(r"\{([\d,]+)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\] ?\{(.*?)\}")
_MESH_AXIS = re.compile(r"'(.+?)'=(\d+)")
_MESH_AXIS_PART = re.compile(r"'(.+?)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communicating instruction of the program; one inside a loop is listed once.

    Attributes:
      kind: its name in HLO, `all-reduce` and so on; `dcn-...` between slices.
      num_bytes: bytes of the whole value: the one that an all-reduce reduces, an all-gather
        ends with, a reduce-scatter starts with or a permute passes on.
      axes: the mesh axes along which the members of a group differ; for `dcn-...`, every axis
        that spans slices.
      group_size: devices per group; for `dcn-...`, slices per group.
      crosses_hosts: whether any group has devices of more than one process.
      name: the source operation that asked for it, or else the instruction's name.
    """

    kind: str
    num_bytes: int
    axes: tuple[str, ...]
    group_size: int
    crosses_hosts: bool
    name: str

    @property
    def crosses_slices(self) -> bool:
        """Whether it goes over the data centre network."""
        return self.kind.startswith("dcn-")


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Lists the communication of a program compiled for `mesh`.

    Args:
      hlo: `compiled.as_text()`.
      mesh: the mesh that it was compiled for.

    Returns:
      One entry per instruction, in program order. A TPU collective over several slices is two
      entries: one inside each slice, and one, `dcn-...`, between slices.

    Raises:
      ValueError: if an argument is of another type, or replica groups are written in a new way.
    """
    instance("hlo", hlo, str, "the text of a compiled program, compiled.as_text()")
    instance("mesh", mesh, Mesh, "the jax.sharding.Mesh, with devices, that it was compiled for")
    of_first_slice, of_slices = _slice_view(mesh)
    found = []
    for line in hlo.splitlines():
        match = _OPERATION.match(line)
        if match is None:
            continue
        if match["kind"] == "send":
            if "xla_megascale" in line:
                found.append(_between_slices(match, line, of_slices))
            continue
        groups = _groups(line, of_first_slice.size)
        found.append(_inside_slice(match, line, groups, of_first_slice, mesh.axis_names))
    return found


def _slice_view(mesh: Mesh) -> tuple[np.ndarray, dict[str, int]]:
    """The devices of the first slice in the shape of the mesh, and slices per axis that spans some.

    A TPU program is compiled for one slice, so its device numbers count inside a slice.
    """
    slice_of = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0)(mesh.devices)
    inside = np.nonzero(slice_of == slice_of.flat[0])
    shape = [len(set(indices.tolist())) for indices in inside]
    num_slices = mesh.size // math.prod(shape)
    view = mesh.devices[inside].reshape(shape) if num_slices > 1 else mesh.devices
    sizes = zip(mesh.axis_names, mesh.devices.shape, shape, strict=True)
    spans = {str(name): size // in_slice for name, size, in_slice in sizes if size != in_slice}
    return view, spans


def _inside_slice(
    match: re.Match[str], line: str, groups: np.ndarray, view: np.ndarray, axis_names: Any
) -> Collective:
    positions = np.stack(np.unravel_index(groups, view.shape))  # [axis, group, member]
    differs = (positions != positions[:, :, :1]).any(axis=(1, 2))
    hosts = np.array([device.process_index for device in view.flat])[groups]
    if match["kind"] == "collective-permute":
        group_size = math.prod(size for size, d in zip(view.shape, differs, strict=True) if d)
    else:
        group_size = groups.shape[1]
    return Collective(
        kind=match["kind"],
        num_bytes=_payload_bytes(match, group_size),
        axes=tuple(str(name) for name, d in zip(axis_names, differs, strict=True) if d),
        group_size=group_size,
        crosses_hosts=bool((hosts != hosts[:, :1]).any()),
        name=_source(match, line),
    )


def _between_slices(match: re.Match[str], line: str, spans: dict[str, int]) -> Collective:
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="([\w.-]+)"', line)
    return Collective(
        kind="dcn-" + (transfer[1].lower().replace("_", "-") if transfer else "send"),
        num_bytes=max(_array_bytes(match["result"])),
        axes=tuple(spans),
        group_size=math.prod(spans.values()),
        crosses_hosts=True,
        name=rendezvous[1] if rendezvous else match["name"],
    )


def _payload_bytes(match: re.Match[str], group_size: int) -> int:
    """Bytes of the whole value. An asynchronous start returns its operands, then its results."""
    sizes = list(_array_bytes(match["result"]))
    kind = match["kind"]
    if match["start"] and kind in ("all-gather", "collective-permute"):
        operands = [size for size in sizes if size > 4 or len(sizes) <= 2]  # less the u32 contexts
        sizes = operands[len(operands) // 2 :]
    return sum(sizes) * (group_size if kind == "reduce-scatter" else 1)


def _array_bytes(result: str) -> Iterator[int]:
    for dtype, dims in _ARRAY.findall(result):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        yield math.prod(map(int, dims.split(",") if dims else [])) * bits // 8


def _source(match: re.Match[str], line: str) -> str:
    op_name = re.search(r'op_name="([^"]*)"', line)
    return op_name[1] if op_name else match["name"]


def _groups(line: str, num_devices: int) -> np.ndarray:
    """Device numbers as [group, member], read from any notation that XLA prints."""
    pairs = _PAIRS.search(line)
    if pairs:
        return np.array([_numbers(pair) for pair in _LIST.findall(pairs[1])]).reshape(-1, 2)
    text = _GROUPS.search(line)
    if text is None or text[1] == "{}":
        return np.arange(num_devices)[None]
    if text[1].startswith("{{"):
        return np.array([_numbers(group) for group in _LIST.findall(text[1])])
    iota = _IOTA.fullmatch(text[1].rstrip(","))
    if iota:
        shape, dims = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else list(range(len(dims)))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    named = _MESH.fullmatch(text[1])
    if named is None:
        raise ValueError(f"cannot read the replica groups {text[1]!r}")
    return _mesh_groups(named[1], named[2])


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
    """`'data'=2,'context'=4` and `'context'` (or a part of it, `'context':(2)2`) to groups."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh)}
    split: list[tuple[int, bool]] = []  # (size, sends), axes cut where a part begins or ends
    parts = {name: (int(pre or 1), int(size or 0)) for name, pre, size in
             _MESH_AXIS_PART.findall(axes)}  # fmt: skip
    for name, size in sizes.items():
        if name in parts:
            before, sending = parts[name][0], parts[name][1] or size
            split += [(before, False), (sending, True), (size // before // sending, False)]
        else:
            split.append((size, False))
    order = sorted(range(len(split)), key=lambda i: split[i][1])
    group_size = math.prod(size for size, sends in split if sends)
    numbers = np.arange(math.prod(sizes.values())).reshape([size for size, _ in split])
    return numbers.transpose(order).reshape(-1, group_size)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
