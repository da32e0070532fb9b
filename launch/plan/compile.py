"""First stage: one layer of a step, compiled for a whole mesh."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import meshes
from shardpage import PagedKVCache, ShardLayout, Tuning, attend, make_plan, write_kv

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

    @property
    def page_shards(self) -> int:
        """Into how many parts the pages of a cache are split."""
        return self.seq_shards * self.context_shards


@dataclasses.dataclass(frozen=True)
class Program:
    """One layer, ready to be compiled: a jitted function that has its cache donated."""

    step: Any
    arguments: tuple[Any, ...]  # shapes and shardings; the cache comes first
    num_pages: int  # of the cache, over all devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One layer, compiled: a `jax.stages.Compiled`, and the seconds that took."""

    kind: LayerKind
    split: Split
    program: Program
    executable: Any
    seconds: float


def split_for(workload: Workload, mesh: Mesh) -> Split:
    """How a workload lies on a mesh; KV heads that the mesh does not divide give to context.

    Raises:
      ValueError: if the batch does not divide over the mesh.
    """
    heads = meshes.plan_heads(workload.model.num_heads, workload.model.num_kv_heads, mesh)
    assert isinstance(heads.mesh, Mesh)
    seq_shards = heads.mesh.shape[heads.seqs] if heads.seqs else 1
    if workload.batch % seq_shards:
        fewer = workload.batch // seq_shards * seq_shards
        raise ValueError(
            f"a batch of {workload.batch} does not divide over {heads.seqs}={seq_shards}; "
            f"{f'{fewer} or ' if fewer else ''}{fewer + seq_shards} would"
        )
    return Split(heads.mesh, heads.layout, seq_shards, heads.head_shards, heads.context_shards)


def compile_layer(workload: Workload, split: Split, kind: LayerKind) -> Compiled:
    """Compiles one layer.

    Raises:
      DoesNotFitError: if this one layer already exceeds a device's memory.
    """
    start = time.perf_counter()
    program = layer_program(workload, split, kind)
    try:
        executable = program.step.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).split("\n")[0]) from error
    return Compiled(kind, split, program, executable, time.perf_counter() - start)


def layer_program(workload: Workload, split: Split, kind: LayerKind) -> Program:
    """Makes the program of one layer."""
    pages_per_seq_shard = workload.batch // split.seq_shards * workload.pages_per_seq
    num_pages = -(-pages_per_seq_shard // split.context_shards) * split.page_shards
    arguments = _arguments(workload, split, num_pages)
    out_shardings = (arguments[0].array_formats, None)
    layer = _layer(workload, split, kind)
    step = jax.jit(layer, donate_argnums=0, out_shardings=out_shardings)
    return Program(step, arguments, num_pages)


def _layer(workload: Workload, split: Split, kind: LayerKind) -> Any:
    model, tuning = workload.model, Tuning(backend=workload.backend)
    where = {"mesh": split.mesh, "layout": split.layout, "tuning": tuning}
    queries = {"num_heads": model.num_heads, "num_queries": workload.num_queries}

    def layer(cache, query, key, value, sinks, context_lens, block_tables):
        one_each = workload.new_tokens == 1
        lens = None if one_each else jnp.minimum(workload.new_tokens, context_lens)
        plan = make_plan(
            cache, context_lens, block_tables, lens, window=kind.window, **queries, **where
        )
        cache = write_kv(cache, key, value, plan)
        options = {"scale": model.scale, "soft_cap": model.soft_cap, "sinks": sinks}
        return cache, attend(query, cache, plan, **options)

    return layer


def _arguments(workload: Workload, split: Split, num_pages: int) -> tuple[Any, ...]:
    """Shapes and shardings of a layer's arguments."""
    model, layout = workload.model, split.layout

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
    num_seqs, num_queries, dim = workload.batch, workload.num_queries, model.head_dim
    by_head = layout.spec("seqs", "heads", None)
    new = array((num_queries, model.num_kv_heads, dim), workload.new_dtype, by_head)
    return (
        cache,
        array((num_queries, model.num_heads, dim), workload.query_dtype, by_head),
        new,
        new,
        array((model.num_heads,), jnp.float32, layout.spec("heads")) if model.sinks else None,
        array((num_seqs,), jnp.int32, layout.spec("seqs")),
        array((num_seqs, workload.pages_per_seq), jnp.int32, layout.spec("seqs", None)),
    )
