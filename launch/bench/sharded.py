"""Splits over the devices of a host: how exact, and how much faster than one device."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from shardpage import page_attention

from ..devices import is_simulated
from . import inputs, timing
from .decode import REPEATS, in_one_program
from .report import Row
from .shapes import Shape, Suite

ALONE = "1 device"


@dataclasses.dataclass(frozen=True)
class Split:
    """The number of devices along sequences, KV heads and context."""

    data: int = 1
    kv: int = 1
    context: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes longer than 1."""
        return {name: size for name, size in dataclasses.asdict(self).items() if size > 1}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items())

    @property
    def work(self) -> str:
        """Its work: "many" sequences, or a "long" one for context without data."""
        return "many" if self.data > 1 or self.context == 1 else "long"

    def mesh(self) -> Mesh:
        axes = (jax.sharding.AxisType.Auto,) * len(self.sizes)
        devices = jax.devices()[: self.num_devices]
        return jax.make_mesh(
            tuple(self.sizes.values()), tuple(self.sizes), axis_types=axes, devices=devices
        )

    def grown(self, shape: Shape) -> Shape:
        """The shape with each dimension multiplied by its split: the same work per device."""
        lens = shape.lens
        if isinstance(lens, tuple):
            lens = (lens[0] * self.context, lens[1] * self.context)
        return dataclasses.replace(
            shape,
            name=f"{shape.name} per device",
            num_seqs=shape.num_seqs * self.data,
            num_heads=shape.num_heads * self.kv,
            num_kv_heads=shape.num_kv_heads * self.kv,
            context=shape.context * self.context,
            lens=lens,
        )


def splits(num_devices: int, suite: Suite) -> list[Split]:
    """Each split alone over all devices; in the full suite their products too."""
    half = num_devices // 2
    alone = [Split(data=num_devices), Split(kv=num_devices), Split(context=num_devices)]
    products = [Split(data=half, kv=2), Split(data=2, context=half), Split(kv=2, context=half)]
    if num_devices == 8:
        products.append(Split(data=2, kv=2, context=2))
    return alone + (products if half > 1 and suite == "full" else [])


def rows(
    work: Mapping[str, Sequence[Shape]], suite: Suite, platform: str, roof_gbps: float
) -> Iterator[Row]:
    """Measures every split over all devices, with the same work in all and per device."""
    if jax.device_count() < 2:
        name = f"{jax.device_count()} device"
        yield Row(
            "sharded", "", name, why="needs 2 devices or more: --simulate 8, or a larger host"
        )
        return
    for split in splits(jax.device_count(), suite):
        for shape in work[split.work]:
            yield from measure(split, shape, 1 if platform == "cpu" else REPEATS, roof_gbps)
            jax.clear_caches()


def measure(split: Split, shape: Shape, repeats: int, roof_gbps: float) -> Iterator[Row]:
    """Measures one split, and in turn with it one device with the same work."""
    mesh = split.mesh()
    same = inputs.make(shape, repeats, mesh)
    alone = inputs.Inputs(shape, *jax.device_put(same.arrays, jax.devices()[0]))
    grown = inputs.make(split.grown(shape), repeats, mesh)
    programs = {
        ALONE: (alone, _compile(alone, None)),
        split.name: (same, _compile(same, mesh)),
        f"{split.name}, work x {split.num_devices}": (grown, _compile(grown, mesh)),
    }
    calls, outs = {}, {}
    for name, (given, compiled) in programs.items():
        calls[name] = functools.partial(compiled, *given.calls())
        outs[name] = calls[name]()[-1]
    wrong = _wrong(programs, outs, split)
    timed = timing.in_turn(calls, repeats, queued=timing.QUEUED if repeats > 1 else 1)
    for name, (given, compiled) in programs.items():
        row = functools.partial(Row, "sharded", f"{split.name}: {shape.name}", name)
        if name in wrong:
            yield row(why=wrong[name])
            continue
        efficiency = timed[ALONE].median_us / timed[name].median_us
        if name == split.name:
            efficiency /= split.num_devices
        yield row(
            timed[name],
            given.shape.kv_bytes,
            timing.temp_bytes(compiled),
            roof_gbps * (1 if name == ALONE or is_simulated(mesh) else split.num_devices),
            efficiency=None if name == ALONE else round(efficiency, 3),
        )


def _wrong(programs: Mapping, outs: Mapping[str, jax.Array], split: Split) -> dict[str, str]:
    """The programs that miss the oracle, or one device's answer, by more than rounding excuses."""
    found = {}
    for name, (given, _) in programs.items():
        expected = inputs.expected(given)
        error, limit = expected.error_of(outs[name]), expected.limit
        if name == split.name:
            ours, alone = (np.asarray(outs[which], np.float64) for which in (name, ALONE))
            error = float(np.maximum(error, np.abs(ours - alone).max()))  # NaN stays
        if not error <= limit:
            found[name] = f"wrong: error {error:.1e}, rounding allows {limit:.1e}"
    return found


def _compile(given: inputs.Inputs, mesh: Mesh | None):
    attend = functools.partial(page_attention, kv_layout="blocks_first", mesh=mesh)
    return jax.jit(in_one_program(attend)).lower(*given.calls()).compile()
