"""Mesh specs: `"dcn.data=2,data=4,context=2,kv=8"` and the rules they must keep."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Self

from shardpage.arguments import instance, integer, shown

DCN_PREFIX = "dcn."
UNKNOWN = -1  # a size to be deduced from the number of devices

# Page attention communicates over `context` only (the merge), so its devices go next to each other.
# Sequences never communicate, so `data` is the axis that may span slices without being asked to.
COMMUNICATING_AXES = ("context",)
SLICED_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """One mesh axis: `ici` devices inside each of `dcn` slices; -1 leaves a size open."""

    name: str
    ici: int = 1
    dcn: int = 1

    def __post_init__(self):
        instance("name", self.name, str, "the name of a mesh axis")
        for name in ("ici", "dcn"):
            if getattr(self, name) != UNKNOWN:
                integer(name, getattr(self, name), f"the size of a mesh axis, or {UNKNOWN}")

    @property
    def size(self) -> int:
        """Devices along this axis, slices included."""
        return self.ici * self.dcn


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """The axes of a mesh in order, each with its size inside a slice and across slices.

    The text form is a comma-separated list of `NAME=SIZE` and `dcn.NAME=SIZE`; one SIZE may be
    -1: whatever is left. `dcn.data=2,data=4` is one axis `data` of size 8 whose two halves
    lie in different slices.
    """

    axes: tuple[MeshAxis, ...]

    def __post_init__(self):
        several = isinstance(self.axes, tuple) and all(isinstance(x, MeshAxis) for x in self.axes)
        if not several or not self.axes:
            raise ValueError(
                f"axes={shown(self.axes)} must be a tuple of MeshAxis, at least one; "
                "MeshSpec.parse('data=2,kv=4') makes them from a text"
            )
        if len(set(self.names)) < len(self.axes):
            raise ValueError(f"mesh '{self}' has an axis twice; each needs a name of its own")
        if (self.ici_shape + self.dcn_shape).count(UNKNOWN) > 1:
            raise ValueError(f"mesh '{self}' leaves more than one size open; only one may be -1")

    @classmethod
    def of(cls, spec: Any) -> "MeshSpec":
        """A spec, given as one or in the text form.

        Raises:
          ValueError: if it is neither, or the text breaks the grammar.
        """
        what = "a text such as 'data=2,kv=4', or a MeshSpec"
        instance("spec", spec, str | MeshSpec, what)
        return cls.parse(spec) if isinstance(spec, str) else spec

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text form.

        Raises:
          ValueError: naming the entry that breaks the grammar, and the grammar.
        """
        instance("text", text, str, "axes and their sizes, such as 'data=2,kv=4'")
        sizes: dict[str, dict[bool, int]] = {}
        for entry in text.split(","):
            name, is_dcn, size = _parse_entry(entry, text)
            if is_dcn in sizes.setdefault(name, {}):
                raise ValueError(
                    f"mesh {text!r} sizes the axis {entry.split('=')[0].strip()!r} twice"
                )
            sizes[name][is_dcn] = size
        axes = tuple(MeshAxis(name, s.get(False, 1), s.get(True, 1)) for name, s in sizes.items())
        return cls(axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The axis names in order."""
        return tuple(axis.name for axis in self.axes)

    @property
    def ici_shape(self) -> tuple[int, ...]:
        """The size of each axis inside one slice."""
        return tuple(axis.ici for axis in self.axes)

    @property
    def dcn_shape(self) -> tuple[int, ...]:
        """The number of slices along each axis."""
        return tuple(axis.dcn for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis, slices included."""
        return tuple(axis.size for axis in self.axes)

    @property
    def num_slices(self) -> int:
        """The number of slices that the spec asks for (an open size counts as 1)."""
        return math.prod(max(size, 1) for size in self.dcn_shape)

    def __str__(self) -> str:
        parts = []
        for axis in self.axes:
            if axis.dcn != 1:
                parts.append(f"{DCN_PREFIX}{axis.name}={axis.dcn}")
            if axis.ici != 1 or axis.dcn == 1:
                parts.append(f"{axis.name}={axis.ici}")
        return ",".join(parts)

    def over_slices(self, num_slices: int) -> Self:
        """Lets `data` span the slices if no axis does: sequences never communicate."""
        if integer("num_slices", num_slices) == 1 or any(size != 1 for size in self.dcn_shape):
            return self
        axes = []
        for axis in self.axes:
            if axis.name == SLICED_AXIS and (axis.ici == UNKNOWN or axis.ici % num_slices == 0):
                ici = axis.ici if axis.ici == UNKNOWN else axis.ici // num_slices
                axis = MeshAxis(axis.name, ici, num_slices)
            axes.append(axis)
        return type(self)(tuple(axes))

    def resolve(self, num_devices: int, num_slices: int = 1) -> Self:
        """Fills in an open size and checks that every device is used exactly once.

        Args:
          num_devices: all devices, over all slices.
          num_slices: the number of slices that those devices form.

        Returns:
          The same axes with all sizes known; their product is `num_devices`.

        Raises:
          ValueError: naming the axes and the factorings that work.
        """
        if integer("num_devices", num_devices) % integer("num_slices", num_slices):
            raise ValueError(f"{num_devices=} do not divide into {num_slices} equal slices")
        per_slice = num_devices // num_slices
        dcn = self._fill(self.dcn_shape, num_slices, num_devices, num_slices)
        ici = self._fill(self.ici_shape, per_slice, num_devices, num_slices)
        if math.prod(dcn) != num_slices or math.prod(ici) != per_slice:
            raise ValueError(self._misfit(num_devices, num_slices))
        return type(self)(tuple(map(MeshAxis, self.names, ici, dcn)))

    def _fill(
        self, shape: tuple[int, ...], total: int, num_devices: int, num_slices: int
    ) -> tuple[int, ...]:
        if UNKNOWN not in shape:
            return shape
        known = math.prod(size for size in shape if size != UNKNOWN)
        if total % known:
            raise ValueError(self._misfit(num_devices, num_slices))
        return tuple(total // known if size == UNKNOWN else size for size in shape)

    def _misfit(self, num_devices: int, num_slices: int) -> str:
        per_slice = num_devices // num_slices
        axes = ", ".join(self.names)
        if UNKNOWN in self.ici_shape + self.dcn_shape:
            asks = "has sizes that do not divide them"
        else:
            asks = f"uses {math.prod(self.shape)}"
        if num_slices != 1 or self.num_slices != 1:
            where = f"{num_devices} devices in {num_slices} slices of {per_slice}"
            asks += f" in {self.num_slices} slices"
        else:
            where = f"{num_devices} devices"
        return (
            f"there are {where}, and mesh '{self}' {asks}; none may be left over. "
            f"Axes {axes} fit as {self._suggest(per_slice, num_slices)}"
        )

    def _suggest(self, per_slice: int, num_slices: int, most: int = 8) -> str:
        """Specs that fit, nearest to the requested sizes first."""
        dcn = self.dcn_shape
        if math.prod(dcn) != num_slices:
            sliced = self.names.index(SLICED_AXIS) if SLICED_AXIS in self.names else 0
            dcn = tuple(num_slices if i == sliced else 1 for i in range(len(self.axes)))

        def distance(shape: tuple[int, ...]) -> float:
            return sum(
                abs(math.log(size / asked))
                for size, asked in zip(shape, self.ici_shape, strict=True)
                if asked != UNKNOWN
            )

        shapes = sorted(factorings(per_slice, len(self.axes)), key=distance)
        specs = [str(MeshSpec(tuple(map(MeshAxis, self.names, s, dcn)))) for s in shapes[:most]]
        more = len(shapes) - len(specs)
        return " | ".join(specs) + (f" | ... ({more} more)" if more > 0 else "")


def factorings(total: int, num_axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered product of `num_axes` positive sizes.

    Raises:
      ValueError: if either is no positive integer.
    """
    return _factorings(integer("total", total), integer("num_axes", num_axes))


def _factorings(total: int, num_axes: int) -> Iterator[tuple[int, ...]]:
    if num_axes == 1:
        yield (total,)
        return
    for first in divisors(total):
        for rest in _factorings(total // first, num_axes - 1):
            yield (first, *rest)


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return list(dict.fromkeys(itertools.chain(low, (number // d for d in reversed(low)))))


def _parse_entry(entry: str, text: str) -> tuple[str, bool, int]:
    """`dcn.data=2` -> ("data", True, 2)."""
    name, equals, size_text = (part.strip() for part in entry.partition("="))
    is_dcn = name.startswith(DCN_PREFIX)
    name = name.removeprefix(DCN_PREFIX)
    try:
        size = int(size_text)
    except ValueError:
        size = 0
    if not equals or not name.isidentifier() or (size < 1 and size != UNKNOWN):
        raise ValueError(
            f"mesh {text!r} has the entry {entry.strip()!r}; write NAME=SIZE or dcn.NAME=SIZE, "
            f"separated by commas, with sizes from 1, or -1 once for what is left: "
            f"'data=2,kv=4', 'dcn.data=2,data=-1,context=4'"
        )
    return name, is_dcn, size
