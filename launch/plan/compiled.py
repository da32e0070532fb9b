"""One layer of a decode step, compiled for a whole mesh, and what the compiler says of it."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import meshes
from shardpage import PagedKVCache, ShardLayout, page_attention, write_kv

from .workload import LayerKind, Workload


class DoesNotFitError(ValueError):
    """The compiler ran out of device memory."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh as the library sees it."""

    mesh: Mesh
    layout: ShardLayout
    seq_shards: int
    head_shards: int
    context_shards: int

    @property
    def spec(self) -> str:
        """The axes as text."""
        return ",".join(f"{name}={size}" for name, size in self.mesh.shape.items())


@dataclasses.dataclass(frozen=True)
class CompiledLayer:
    """What the compiler says of one layer, per device.

    Attributes:
      kind: which layers of the model.
      cache_bytes: the layer's pages, in the layout the compiler gave them (padding included).
      pages: how many pages those are.
      other_bytes: the other arguments: queries, new keys and values, tables.
      output_bytes: results that are not in the place of an argument.
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


def split_for(workload: Workload, mesh: Mesh) -> Split:
    """How a workload lies on a mesh; KV heads that the mesh does not divide give to context.

    Raises:
      ValueError: if the batch does not divide over the mesh.
    """
    plan = meshes.plan_heads(workload.model.num_heads, workload.model.num_kv_heads, mesh)
    assert isinstance(plan.mesh, Mesh)
    seq_shards = plan.mesh.shape[plan.seqs] if plan.seqs else 1
    if workload.batch % seq_shards:
        fewer = workload.batch // seq_shards * seq_shards
        raise ValueError(
            f"a batch of {workload.batch} does not divide over {plan.seqs}={seq_shards}; "
            f"{f'{fewer} or ' if fewer else ''}{fewer + seq_shards} would"
        )
    return Split(plan.mesh, plan.layout, seq_shards, plan.head_shards, plan.context_shards)


def compile_layer(workload: Workload, split: Split, kind: LayerKind) -> CompiledLayer:
    """Compiles `write_kv` and `page_attention` of one layer, the cache donated.

    Raises:
      DoesNotFitError: if this one layer already exceeds a device's memory.
    """
    start = time.perf_counter()
    step, arguments, num_pages = layer_program(workload, split, kind)
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).split("\n")[0]) from error
    elapsed = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    plain_bytes = sum(map(_shard_bytes, jax.tree.leaves(arguments[0])))
    aliased = memory.alias_size_in_bytes >= plain_bytes
    others = sum(map(_shard_bytes, jax.tree.leaves(arguments[1:])))
    in_place = memory.alias_size_in_bytes
    cache_bytes = in_place if aliased else memory.argument_size_in_bytes - others
    return CompiledLayer(
        kind=kind,
        cache_bytes=cache_bytes,
        pages=num_pages // (split.seq_shards * split.context_shards),
        other_bytes=memory.argument_size_in_bytes - cache_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - in_place,
        copied_bytes=0 if aliased else plain_bytes - in_place,
        collectives=tuple(meshes.collectives(compiled.as_text() or "", split.mesh)),
        compile_s=elapsed,
    )


def layer_program(
    workload: Workload, split: Split, kind: LayerKind
) -> tuple[Any, tuple[Any, ...], int]:
    """A layer as a jitted function, its arguments, and the pages of the cache over all devices."""
    arguments, num_pages = _arguments(workload, split)
    out_shardings = (arguments[0].array_formats, None)
    layer = _layer(workload, split, kind)
    return jax.jit(layer, donate_argnums=0, out_shardings=out_shardings), arguments, num_pages


def _layer(workload: Workload, split: Split, kind: LayerKind) -> Any:
    where = {"mesh": split.mesh, "layout": split.layout, "backend": workload.backend}
    model = workload.model

    def layer(cache, query, key, value, sinks, context_lens, block_tables):
        rows = jnp.arange(workload.batch, dtype=jnp.int32)
        cache = write_kv(cache, key, value, rows, context_lens - 1, block_tables, **where)
        out = page_attention(
            query,
            cache.key,
            cache.value,
            context_lens,
            block_tables,
            attn_scale=model.scale,
            attn_logits_soft_cap=model.soft_cap,
            sliding_window=kind.window,
            sinks=sinks,
            kv_layout=cache.kv_layout,
            **where,
        )
        return cache, out

    return layer


def _arguments(workload: Workload, split: Split) -> tuple[tuple[Any, ...], int]:
    """Shapes and shardings of a layer's arguments, and the pages of the cache over all devices."""
    model, layout = workload.model, split.layout
    page_shards = split.seq_shards * split.context_shards
    pages_per_seq_shard = workload.batch // split.seq_shards * workload.max_blocks
    num_pages = -(-pages_per_seq_shard // split.context_shards) * page_shards

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(split.mesh, spec))

    cache = PagedKVCache.abstract(
        num_pages,
        model.num_kv_heads,
        workload.page_size,
        model.head_dim,
        dtype=workload.dtype,
        kv_layout=workload.kv_layout,
        mesh=split.mesh,
        layout=layout,
    )
    new = (workload.batch, model.num_kv_heads, model.head_dim)
    query = (workload.batch, model.num_heads, model.head_dim)
    ints = jnp.int32
    return (
        cache,
        array(query, workload.query_dtype, layout.spec("seqs", "heads", None)),
        array(new, workload.dtype, layout.spec("seqs", "heads", None)),
        array(new, workload.dtype, layout.spec("seqs", "heads", None)),
        array((model.num_heads,), jnp.float32, layout.spec("heads")) if model.sinks else None,
        array((workload.batch,), ints, layout.spec("seqs")),
        array((workload.batch, workload.max_blocks), ints, layout.spec("seqs", None)),
    ), num_pages


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
