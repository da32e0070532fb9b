"""Which mesh axis splits what: `ShardLayout`, and the PartitionSpecs that follow from it."""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .kv_layout import Axis, KVLayout


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Names the mesh axes that split sequences, KV heads and the pages of a sequence.

    | array | split |
    | --- | --- |
    | query, output | sequences over `seqs`, heads over `heads` |
    | key/value cache | KV heads over `heads`; pages over (`seqs`, `context`), contiguous ranges |
    | context_lens, block_tables | sequences over `seqs` |

    Attributes:
      seqs: axis (or axes, outermost first) that split sequences, and the pages they may use.
      heads: axis or axes that split KV heads; query heads follow their KV head.
      context: axis or axes that split the pages of one sequence; partial results merge over it.

    Each may be None: not split. With `layout=None`, calls take those of the axes "data", "kv"
    and "context" that their mesh has.
    """

    seqs: Axis = "data"
    heads: Axis = "kv"
    context: Axis = "context"

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh) -> "ShardLayout":
        """The default layout for a mesh: those of "data", "kv" and "context" that it has."""
        return cls(
            *(name if name in mesh.axis_names else None for name in dataclasses.astuple(cls()))
        )

    @property
    def pages(self) -> Axis:
        """The axes that split the pages of a cache, outermost first."""
        return (*axis_names(self.seqs), *axis_names(self.context)) or None

    def shards(self, mesh: Mesh | AbstractMesh) -> "ShardCounts":
        """How many shards each of the three splits makes on this mesh."""
        sizes: Mapping[str, int] = dict(mesh.shape)
        count = lambda axis: math.prod(sizes[name] for name in axis_names(axis))
        return ShardCounts(count(self.seqs), count(self.heads), count(self.context))

    @property
    def query_spec(self) -> PartitionSpec:
        """Split of queries and outputs [num_seqs, num_heads, head_dim]."""
        return PartitionSpec(self.seqs, self.heads, None)

    @property
    def lse_spec(self) -> PartitionSpec:
        """Split of lse [num_seqs, num_heads]."""
        return PartitionSpec(self.seqs, self.heads)

    @property
    def lens_spec(self) -> PartitionSpec:
        """Split of context_lens, and of anything with one entry a sequence or token."""
        return PartitionSpec(self.seqs)

    @property
    def tables_spec(self) -> PartitionSpec:
        """Split of block_tables [num_seqs, max_blocks]."""
        return PartitionSpec(self.seqs, None)

    @property
    def sinks_spec(self) -> PartitionSpec:
        """Split of sinks [num_heads]."""
        return PartitionSpec(self.heads)

    def cache_spec(self, kv: KVLayout) -> PartitionSpec:
        """Split of a key or value cache in the layout `kv`."""
        return kv.partition_spec(self.pages, self.heads)


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    seqs: int = 1
    heads: int = 1
    context: int = 1

    @property
    def pages(self) -> int:
        return self.seqs * self.context


def axis_names(axis: Axis) -> tuple[str, ...]:
    """An axis, several or none, as a tuple of names."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)
