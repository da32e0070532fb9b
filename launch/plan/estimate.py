"""The stages one after the other: compile, read, bound. Also for batches and contexts that fit."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

import meshes

from . import issue as issues
from .bound import Bounds, Device
from .compile import DoesNotFitError, Split, compile_layer, split_for
from .read import Layer, read_layer
from .workload import Workload


@dataclasses.dataclass(frozen=True)
class Pod:
    """The devices that are asked about.

    Attributes:
      topology: a TPU slice to compile for; else
      simulate: this many CPU devices; else the devices that are there.
      num_slices: how many of those slices, or parts of the simulated devices.
      reserved_bytes: memory of each device to leave alone, for weights for example.
    """

    topology: str | None = None
    simulate: int | None = None
    num_slices: int = 1
    reserved_bytes: int = 0

    def __post_init__(self) -> None:
        if self.topology is not None and self.simulate is not None:
            raise ValueError("give --topology or --simulate, not both")

    def mesh(self, spec: str) -> Mesh:
        """A mesh over all of them."""
        if self.topology is not None:
            jax.config.update("jax_platforms", "cpu")  # compiling needs no TPU: leave it alone
            return meshes.topology(self.topology, spec, num_slices=self.num_slices)
        if self.simulate is not None:
            return meshes.simulate(self.simulate, spec, num_slices=self.num_slices)
        return meshes.make(spec)


def estimate(
    workload: Workload, mesh: Mesh, *, reserved_bytes: int = 0, issue: bool = True
) -> Bounds:
    """Compiles one layer of each kind for the whole mesh and says what follows.

    Args:
      workload: the model and its sequences.
      mesh: compile-only, simulated or real devices.
      reserved_bytes: see `Pod`.
      issue: also read the kernel's schedule, where there is one.

    Raises:
      ValueError: if the workload does not divide over the mesh.
      DoesNotFitError: if a single layer exceeds a device.
    """
    split, device = split_for(workload, mesh), Device.of(mesh)
    # in another process, while this one compiles the layers
    schedule = issues.begin(workload, split, device.chip) if issue else None
    layers = _layers(workload, split)
    known = schedule() if schedule else issues.Issue(reason="not asked for")
    return Bounds(workload, split, device, layers, reserved_bytes, known)


def _layers(workload: Workload, split: Split) -> tuple[Layer, ...]:
    """Compiles and reads one layer of each kind."""
    compiled = (compile_layer(workload, split, kind) for kind in workload.model.layers)
    return tuple(map(read_layer, compiled))


def confirm_largest_batch(bounds: Bounds, tries: int = 3) -> int | None:
    """Compiles the largest batch, and a smaller one where scratch memory grew too much.

    Returns:
      A batch that the compiler says fits; 0 if none was found, None where HBM is not known.
    """
    batch = _grown(bounds).largest_batch
    for _ in range(tries):
        if not batch:
            return batch
        larger = dataclasses.replace(bounds.workload, batch=batch)
        layers = _layers(larger, bounds.split)
        grown = dataclasses.replace(bounds, workload=larger, layers=layers)
        if grown.memory.fits:
            return batch
        assert grown.largest_batch is not None
        batch = min(grown.largest_batch, batch - bounds.split.seq_shards)
    return 0


def _grown(bounds: Bounds) -> Bounds:
    """With what grows with the batch as large as the largest batch makes it: a first guess."""
    factor = max(1.0, (bounds.largest_batch or 0) / bounds.workload.batch)
    growing = ("temp_bytes", "other_bytes", "output_bytes")
    layers = (
        dataclasses.replace(
            layer, **{name: math.ceil(getattr(layer, name) * factor) for name in growing}
        )
        for layer in bounds.layers
    )
    return dataclasses.replace(bounds, layers=tuple(layers))


def shrink_to_fit(workload: Workload, mesh: Mesh, *, reserved_bytes: int = 0) -> Bounds:
    """The bounds of a smaller workload, for when not even one layer of this one compiles.

    Takes the smallest batch, then halves the context until it compiles.
    """
    smaller = dataclasses.replace(workload, batch=split_for(workload, mesh).seq_shards)
    while True:
        try:
            return estimate(smaller, mesh, reserved_bytes=reserved_bytes, issue=False)
        except DoesNotFitError:
            if smaller.context <= workload.page_size:
                raise
            smaller = dataclasses.replace(smaller, context=smaller.context // 2)
