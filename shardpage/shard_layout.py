"""Which mesh axis splits what: `ShardLayout`, and `Split`, a layout on its mesh."""

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .arguments import instance, shown
from .page_format import Axis, PageFormat


def platform_of_device(device: Any) -> str:
    """The platform of a device, or of what is known of an abstract mesh's."""
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind  # JAX 0.9 knows no more of an abstract one
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else "gpu"


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

    def __post_init__(self):
        for name, axis in vars(self).items():
            several = axis if isinstance(axis, tuple) else (axis or "",)
            if not all(isinstance(each, str) for each in several):
                raise ValueError(
                    f"{name}={shown(axis)} must be an axis name, a tuple of them, or None"
                )

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh) -> "ShardLayout":
        """The default layout for a mesh: those of "data", "kv" and "context" that it has."""
        _check_mesh(mesh)
        names = dataclasses.astuple(cls())
        return cls(*(name if name in mesh.axis_names else None for name in names))

    @property
    def pages(self) -> Axis:
        """The axes that split the pages of a cache, outermost first."""
        return (*axis_names(self.seqs), *axis_names(self.context)) or None

    def shards(self, mesh: Mesh | AbstractMesh) -> "ShardCounts":
        """How many shards each of the three splits makes on this mesh."""
        _check_mesh(mesh)
        count = lambda axis: math.prod(mesh.shape[name] for name in axis_names(axis))
        return ShardCounts(count(self.seqs), count(self.heads), count(self.context))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The split of an array whose axes are these: `spec("seqs", "heads", None)`."""
        return PartitionSpec(*(None if dim is None else getattr(self, dim) for dim in dims))

    @property
    def all_heads(self) -> Axis:
        """The axes that split the heads of an output whose merge leaves each device its share."""
        return (*axis_names(self.heads), *axis_names(self.context)) or None


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    seqs: int = 1
    heads: int = 1
    context: int = 1

    @property
    def pages(self) -> int:
        return self.seqs * self.context


@dataclasses.dataclass(frozen=True)
class Split:
    """A layout on the mesh that it is for. Checks itself."""

    mesh: Mesh | AbstractMesh
    layout: ShardLayout

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh | None, layout: ShardLayout | None) -> "Split | None":
        """The split that a call asks for; None on one device."""
        if layout is not None:
            instance("layout", layout, ShardLayout, "a ShardLayout, or None for the mesh's own")
        if mesh is None:
            if layout is not None:
                raise ValueError(f"{layout=} names axes of a mesh; pass mesh= as well")
            return None
        _check_mesh(mesh)
        return cls(mesh, layout or ShardLayout.of(mesh))

    def __post_init__(self):
        layout = self.layout
        used = [n for axis in dataclasses.astuple(layout) for n in axis_names(axis)]
        for name in used:
            if name not in self.mesh.axis_names:
                raise ValueError(
                    f"{layout} names {name!r}; the mesh has the axes {self.mesh.axis_names}"
                )
            if used.count(name) > 1:
                raise ValueError(
                    f"{layout} uses mesh axis {name!r} twice; an axis splits one thing"
                )

    @property
    def shards(self) -> ShardCounts:
        return self.layout.shards(self.mesh)

    @property
    def device(self) -> Any:
        """What the devices are: `device_kind` and more; None of a mesh that does not say."""
        return self.mesh.abstract_mesh.abstract_device

    @property
    def platform(self) -> str | None:
        """The platform of the devices; None of an AbstractMesh that does not say."""
        return None if self.device is None else platform_of_device(self.device)

    def check_rows(self, name: str, count: int, padding: str) -> None:
        """Checks that sequences, or tokens, split evenly; `padding` is what to pad them with."""
        if count % self.shards.seqs:
            padded = -(-count // self.shards.seqs) * self.shards.seqs
            raise ValueError(
                f"{name}={count} must be divisible by the {self.shards.seqs} shards of mesh axis "
                f"{self.layout.seqs!r}; pad to {padded} with {padding}"
            )

    def check_out_split(self, num_heads: int) -> None:
        """Checks that each device's query heads split over the context axis."""
        shards = self.shards
        if num_heads // shards.heads % shards.context:
            raise ValueError(
                f"out_split='heads' splits the {num_heads // shards.heads} query heads of a device "
                f"over the {shards.context} shards of mesh axis {self.layout.context!r}, which "
                "must divide them; use out_split=None"
            )

    def check_cache(self, page_format: PageFormat, num_pages: int) -> None:
        """Checks that the pages and KV heads of a cache split evenly."""
        shards, layout, num_kv_heads = self.shards, self.layout, page_format.num_kv_heads
        if num_pages % shards.pages:
            padded = -(-num_pages // shards.pages) * shards.pages
            raise ValueError(
                f"{num_pages=} must be divisible by the {shards.pages} page shards of mesh axes "
                f"{layout.pages!r}; make the cache of {padded} pages"
            )
        if num_kv_heads % shards.heads:
            common = math.gcd(shards.heads, num_kv_heads)
            works = [n for n in range(common, 0, -1) if common % n == 0]
            factorings = ", ".join(f"{n} x {shards.heads // n}" for n in works)
            raise ValueError(
                f"{num_kv_heads=} must be divisible by the {shards.heads} shards of mesh axis "
                f"{layout.heads!r}. These heads x context factorings of the axis work: "
                f"{factorings}. Moving the surplus to context={layout.context or 'context'!r} "
                "costs no KV copies: each device keeps other pages of the same heads"
            )
        if page_format.layout.token_major and page_format.token_shape[0] % shards.heads:
            raise ValueError(
                f"the {num_kv_heads} KV heads of a token lie in {page_format.token_shape[0]} words "
                f"{page_format.word}, which the {shards.heads} shards of mesh axis "
                f"{layout.heads!r} do not divide; give the surplus to "
                f"context={layout.context or 'context'!r}"
            )


def _check_mesh(mesh: object) -> None:
    instance("mesh", mesh, Mesh | AbstractMesh, "a jax.sharding.Mesh, or None for one device")


def axis_names(axis: Axis) -> tuple[str, ...]:
    """An axis, several or none, as a tuple of names."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)
