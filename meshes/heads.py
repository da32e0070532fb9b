"""Which devices hold which KV heads, for any number of heads on any mesh."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jax.sharding import AbstractMesh, AxisType, Mesh

from shardpage import ShardLayout
from shardpage.arguments import choice, instance, integer

from .spec import MeshSpec, divisors

Surplus = Literal["context", "replicate", "refuse"]
REST = "rest"


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """How heads lie on a mesh, in the form that `page_attention` and `PagedKVCache` take.

    Attributes:
      mesh: the given mesh, or the same devices in the same order with the KV axis cut in two,
        e.g. `kv=16` into `kv=8,kv_rest=2`. An AbstractMesh if only sizes were given.
      seqs, heads, context: the mesh axes of the three splits; see `layout`.
      head_shards: number of shards that the KV heads are split into.
      context_shards: number of shards that the pages of one sequence are split into.
      copies: number of devices that hold each part of the cache; 1 unless replicated.
      extra_bytes: cost of the copies over all devices; None if the cache's size is not known.
      reason: one sentence for people.
    """

    mesh: Mesh | AbstractMesh
    seqs: str | None
    heads: str | None
    context: str | tuple[str, ...] | None
    head_shards: int
    context_shards: int
    copies: int
    extra_bytes: int | None
    reason: str

    @property
    def layout(self) -> ShardLayout:
        """The `layout` argument of the library's functions."""
        return ShardLayout(seqs=self.seqs, heads=self.heads, context=self.context)


def plan_heads(
    num_q_heads: int,
    num_kv_heads: int,
    mesh: Mesh | AbstractMesh | MeshSpec | str | Mapping[str, int],
    *,
    surplus: Surplus = "context",
    cache_bytes: int | None = None,
    seqs: str = "data",
    heads: str = "kv",
    context: str = "context",
) -> HeadPlan:
    """Lays KV heads on a mesh whose KV axis need not divide them.

    If the size of the axis divides the number of heads, the heads are split over it. Otherwise
    the heads are split over its largest factor that does. `surplus` says what becomes of the
    other factor:

    - `"context"`: it splits the pages of each sequence. No copies, but a merge.
    - `"replicate"`: its devices hold copies of the cache and repeat the same work.
    - `"refuse"`: an error that names the nearest sizes that divide.

    Args:
      num_q_heads: query heads of the model.
      num_kv_heads: its KV heads; must divide the query heads.
      mesh: a mesh, or just sizes: `"data=2,kv=8"`, a `MeshSpec` without open sizes, a mapping.
      surplus: what the factor of the KV axis that does not divide the heads is used for.
      cache_bytes: bytes of the whole cache, to compute what copies cost.
      seqs, heads, context: names of the mesh axes that split sequences, KV heads and the pages of
        a sequence; an axis that the mesh does not have splits nothing.

    Returns:
      The plan; pass `mesh=plan.mesh, layout=plan.layout`.

    Raises:
      ValueError: if the KV heads do not divide the query heads, or if `surplus="refuse"` and the
        KV axis does not divide the KV heads.
    """
    choice("surplus", surplus, get_args(Surplus))
    for name, axis in {"seqs": seqs, "heads": heads, "context": context}.items():
        instance(name, axis, str, "the name of a mesh axis; one that the mesh lacks splits nothing")
    if cache_bytes is not None:
        integer("cache_bytes", cache_bytes, "of the whole cache, or None", most=sys.maxsize)
    if integer("num_q_heads", num_q_heads) % integer("num_kv_heads", num_kv_heads):
        raise ValueError(
            f"{num_q_heads=} must be a multiple of {num_kv_heads=}: each KV head serves equally "
            f"many query heads"
        )
    mesh = _as_mesh(mesh)
    sizes = {str(name): int(size) for name, size in mesh.shape.items()}
    kv_size = sizes.get(heads, 1)
    head_shards = math.gcd(num_kv_heads, kv_size)
    rest = kv_size // head_shards
    if rest > 1 and surplus == "refuse":
        raise ValueError(_refusal(num_kv_heads, heads, kv_size))
    plan = HeadPlan(
        mesh=mesh,
        seqs=seqs if seqs in sizes else None,
        heads=heads if heads in sizes else None,
        context=context if context in sizes else None,
        head_shards=head_shards,
        context_shards=sizes.get(context, 1),
        copies=1,
        extra_bytes=0,
        reason=f"{num_kv_heads} KV heads over {heads}={kv_size}, evenly",
    )
    if rest == 1:
        return plan
    return _with_rest(plan, num_kv_heads, rest, surplus, cache_bytes, context)


def _with_rest(
    plan: HeadPlan,
    num_kv_heads: int,
    rest: int,
    surplus: Surplus,
    cache_bytes: int | None,
    context: str,
) -> HeadPlan:
    """The plan with the KV axis cut in two: a factor for heads, and the rest."""
    heads = plan.heads
    assert heads is not None
    each = num_kv_heads // plan.head_shards
    start = (
        f"{num_kv_heads} KV heads over {heads}={plan.head_shards * rest}: {each} each on "
        f"{plan.head_shards} shard(s), and the other factor {rest}"
    )
    cut = dataclasses.replace(plan, mesh=_cut_axis(plan.mesh, heads, plan.head_shards))
    if surplus == "replicate":
        extra = None if cache_bytes is None else (rest - 1) * cache_bytes
        cost = "" if extra is None else f", {extra / 2**30:.3g} GiB more over all devices"
        reason = f"{start} holds copies: {rest} times the cache{cost}"
        return dataclasses.replace(cut, copies=rest, extra_bytes=extra, reason=reason)
    return dataclasses.replace(
        cut,
        context=(*([context] if plan.context else []), f"{heads}_{REST}"),
        context_shards=plan.context_shards * rest,
        reason=f"{start} splits the pages of each sequence: no copies, and a merge over it",
    )


def _refusal(num_kv_heads: int, heads: str, kv_size: int) -> str:
    fitting = divisors(num_kv_heads)
    nearest = sorted(fitting, key=lambda size: abs(math.log(size / kv_size)))[:3]
    return (
        f"{num_kv_heads} KV heads do not divide over {heads}={kv_size}; the nearest sizes that "
        f"work are {', '.join(f'{heads}={size}' for size in sorted(nearest))}. Give the surplus to "
        f"context (surplus='context', no copies), or replicate it (surplus='replicate')"
    )


def _as_mesh(mesh: Mesh | AbstractMesh | MeshSpec | str | Mapping[str, int]) -> Mesh | AbstractMesh:
    if isinstance(mesh, Mesh | AbstractMesh):
        return mesh
    what = "a mesh, or sizes such as 'data=2,kv=8' or {'data': 2, 'kv': 8}"
    instance("mesh", mesh, str | MeshSpec | Mapping, what)
    if not isinstance(mesh, Mapping):
        spec = MeshSpec.of(mesh)
        mesh = dict(zip(spec.names, spec.shape, strict=True))
    for name, size in mesh.items():
        instance("mesh", name, str, what)
        integer(f"mesh[{name!r}]", size, "sizes must be known here, without -1")
    return AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))


def _cut_axis(mesh: Mesh | AbstractMesh, name: str, first: int) -> Mesh | AbstractMesh:
    """Cuts an axis in two, `name` of size `first` outside `name_rest`; devices keep their order.

    The order matters: arrays on the uncut mesh can go into one jit with arrays on this one.
    """
    names, shape, types = list(mesh.axis_names), list(mesh.axis_sizes), list(mesh.axis_types)
    at = names.index(name)
    names[at : at + 1] = [name, f"{name}_{REST}"]
    shape[at : at + 1] = [first, shape[at] // first]
    types[at : at + 1] = [types[at]] * 2
    settings: dict[str, Any] = {"axis_types": tuple(types)}
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(shape), tuple(names), **settings)
    return Mesh(mesh.devices.reshape(shape), tuple(names), **settings)
