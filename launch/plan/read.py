"""Second stage: what the compiler says of a layer, as figures per device."""

import dataclasses
import math

import jax

import meshes

from .compile import Compiled
from .workload import LayerKind


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, per device.

    Attributes:
      kind: which layers of the model are like it.
      cache_bytes: its pages and their scales, padded as the compiler lays them out.
      pages: how many pages those are.
      other_bytes: the other arguments: queries, new keys and values, tables.
      output_bytes: results that do not take the place of an argument.
      temp_bytes: scratch memory.
      copied_bytes: cache results that do not alias the cache given: 0, or a copy was made.
      collectives: what it sends.
      compile_s: seconds to lower and compile.
    """

    kind: LayerKind
    cache_bytes: int
    pages: int
    other_bytes: int
    output_bytes: int
    temp_bytes: int
    copied_bytes: int
    collectives: tuple[meshes.Collective, ...]
    compile_s: float


def read_layer(compiled: Compiled) -> Layer:
    """Reads memory and traffic off a compiled layer."""
    memory = compiled.executable.memory_analysis()
    cache, *others = compiled.program.arguments
    in_place = memory.alias_size_in_bytes
    copied_bytes = max(0, _shard_bytes(cache) - in_place)
    cache_bytes = memory.argument_size_in_bytes - _shard_bytes(others) if copied_bytes else in_place
    return Layer(
        kind=compiled.kind,
        cache_bytes=cache_bytes,
        pages=compiled.program.num_pages // compiled.split.page_shards,
        other_bytes=memory.argument_size_in_bytes - cache_bytes,
        output_bytes=memory.output_size_in_bytes - in_place,
        temp_bytes=memory.temp_size_in_bytes,
        copied_bytes=copied_bytes,
        collectives=tuple(
            meshes.collectives(compiled.executable.as_text() or "", compiled.split.mesh)
        ),
        compile_s=compiled.seconds,
    )


def _shard_bytes(arrays: object) -> int:
    """Bytes of a device's parts of arrays, without padding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )
