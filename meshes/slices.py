"""Pod slices by name, `"v5p:4x4x4"` or `"v5p-128"`, as described in `slices.toml`."""

import dataclasses
import functools
import importlib.resources
import math
import re
import tomllib
from typing import Any, Self

from shardpage.arguments import instance, shown


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. `slices.toml` says what each field is, with sources."""

    name: str
    device_kind: str
    cores: int
    devices: int
    dims: int
    wrap: int
    host: tuple[int, ...]
    max_chips: int
    shapes: tuple[str, ...]
    counts: str
    names: tuple[str, ...]
    hbm_gib: float
    usable_gib: float
    hbm_gbps: float
    bf16_tflops: float
    ici_gbps: float
    source: str
    dcn_gbit: float | None = None
    cubes: bool = False
    megacore_config: str | None = None
    separate_config: str | None = None

    @classmethod
    def of_kind(cls, device_kind: str) -> "Chip | None":
        """The generation with this `jax.Device.device_kind`; None for CPUs and others."""
        instance("device_kind", device_kind, str, "what a JAX device has under that name")
        return next((chip for chip in chips().values() if chip.device_kind == device_kind), None)


@functools.cache
def chips() -> dict[str, Chip]:
    """All generations by name."""
    text = importlib.resources.files("meshes").joinpath("slices.toml").read_text()
    return {name: _chip(name, entry) for name, entry in tomllib.loads(text).items()}


def _chip(name: str, entry: dict[str, Any]) -> Chip:
    config = entry.pop("config", {})
    lists: dict[str, Any] = {k: tuple(v) for k, v in entry.items() if isinstance(v, list)}
    configs = {f"{key}_config": value for key, value in config.items()}
    return Chip(name=name, **(entry | lists | configs))


@dataclasses.dataclass(frozen=True)
class PodSlice:
    """A slice of one generation: a box of chips in the network."""

    chip: Chip
    shape: tuple[int, ...]

    def __post_init__(self):
        instance("chip", self.chip, Chip, "one of meshes.chips()")
        _check_shape(self.chip, self.shape)

    @classmethod
    def parse(cls, name: str) -> Self:
        """Reads `"v5p:4x4x4"` or a product name such as `"v5p-128"` or `"v5litepod-16"`.

        Raises:
          ValueError: for an unknown generation, size or shape, listing the known ones.
        """
        instance("name", name, str, "the name of a slice, such as 'v5p:4x4x4'")
        topology = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9}){0,9})", name)
        product = re.fullmatch(r"(\w+?)-(\d{1,9})", name)
        if topology and topology[1] in chips():
            return cls(chips()[topology[1]], tuple(map(int, topology[2].split("x"))))
        for chip in chips().values():
            if product and product[1] in chip.names:
                return cls(chip, _shape_of_size(chip, name, int(product[2])))
        raise ValueError(
            f"unknown slice {shown(name)}; write GENERATION:SHAPE with one of "
            f"{', '.join(chips())}, as in v5p:4x4x4 or v5e:4x8, or a product name such as "
            f"v5p-128, v5litepod-32 or v6e-8"
        )

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """JAX devices of the slice, with its chips in their usual configuration."""
        return self.num_chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of the network closes to a ring."""
        if self.chip.cubes:  # links that close rings belong to whole cubes
            whole_cubes = all(size % self.chip.wrap == 0 for size in self.shape)
            return (whole_cubes,) * len(self.shape)
        return tuple(size % self.chip.wrap == 0 for size in self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def _check_shape(chip: Chip, shape: tuple[int, ...]) -> None:
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise ValueError(f"shape={shown(shape)} must be a tuple of integers, such as (4, 4, 4)")
    text = "x".join(map(str, shape))
    cubes = chip.cubes and len(shape) == 3 and all(size % 4 == 0 and size for size in shape)
    if text not in chip.shapes and not (cubes and math.prod(shape) <= chip.max_chips):
        others = f", or {chip.dims} multiples of 4" if chip.cubes else ""
        raise ValueError(
            f"{chip.name} has no slice of shape {text}; one slice has up to {chip.max_chips} "
            f"chips, and its shapes are {', '.join(chip.shapes)}{others}"
        )


def _shape_of_size(chip: Chip, name: str, count: int) -> tuple[int, ...]:
    per_chip = {"chips": 1, "cores": chip.cores, "devices": chip.devices}[chip.counts]
    shapes = [tuple(map(int, shape.split("x"))) for shape in chip.shapes]
    for shape in shapes:
        if math.prod(shape) * per_chip == count:
            return shape
    known = ", ".join(f"{name.split('-')[0]}-{math.prod(shape) * per_chip}" for shape in shapes)
    raise ValueError(
        f"unknown slice {name!r}: the number counts {chip.counts}, {per_chip} per chip; known are "
        f"{known}. The form {chip.name}:{chip.shapes[-1]} names a shape directly"
    )
