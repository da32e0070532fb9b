"""What `shardpage schedule` executes: this library's kernels, and JAX's own in the same shapes."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from shardpage import PagedKVCache, Tuning, attend, make_plan, page_attention, write_kv
from shardpage.options import CoresMode
from shardpage.page_format import PACKED_ROW, QUANTISED

from ..bench.shapes import SHAPES, Shape, Step
from .execute import Subject


@dataclasses.dataclass(frozen=True)
class PlacedShape(Shape):
    """A shape that says how many pages of a sequence follow each other in memory."""

    run_pages: int = 1


def _case(
    num_seqs: int, context: int, queries: int, kv_heads: int, page: int, **rest
) -> PlacedShape:
    shape = f"G{queries} K{kv_heads}, page {page}"
    dim = f", dim {rest['head_dim']}" if "head_dim" in rest else ""
    runs = f", runs of {rest['run_pages']}" if "run_pages" in rest else ""
    dtype = f", {rest['dtype']}" if "dtype" in rest else ""
    lens = f"1..{context}" if "lens" in rest else f"{context}"
    heads = {"num_heads": queries * kv_heads, "num_kv_heads": kv_heads, "page_size": page}
    name = f"{num_seqs} x {lens}, {shape}{dim}{runs}{dtype}"
    return PlacedShape(name, num_seqs, context, **heads, **rest)


# G is query heads per KV head, K is KV heads on the device: 8 with one are what tensor parallelism
# leaves of most models, 4 with 8 the whole of Llama 3 8B. `PageAllocator` hands out runs of 64
# tokens.
CASES = (
    _case(64, 4096, 8, 1, 16),
    _case(64, 4096, 8, 1, 16, run_pages=4),
    _case(64, 4096, 8, 1, 64),
    _case(64, 4096, 4, 8, 64),
    _case(64, 4096, 1, 32, 32),
    _case(64, 4096, 8, 1, 32, head_dim=64),
    _case(256, 256, 8, 1, 16),
    _case(256, 256, 8, 1, 16, run_pages=4),
    _case(256, 256, 4, 8, 16),
    _case(64, 4096, 8, 1, 16, lens=(1, 4096)),
)
QUANTISED_CASES = tuple(
    _case(64, 4096, *heads, 64, dtype=dtype) for heads in ((8, 1), (4, 8)) for dtype in QUANTISED
)


def _step(
    name: str, seqs: Sequence[tuple[int, int]], queries: int, kv_heads: int, page: int
) -> Step:
    heads = {"num_heads": queries * kv_heads, "num_kv_heads": kv_heads, "page_size": page}
    return Step(f"{name}, G{queries} K{kv_heads}, page {page}", tuple(seqs), **heads)


# Prompts in chunks, alone and among running sequences, and guesses to verify.
STEPS = (
    _step("512 of 8192", [(8192, 512)], 4, 8, 64),
    _step("1024 of 8192", [(8192, 1024)], 4, 8, 64),
    _step("2048 of 8192", [(8192, 2048)], 4, 8, 64),
    _step("1024 of 8192", [(8192, 1024)], 4, 8, 16),
    _step("1024 of 8192", [(8192, 1024)], 8, 1, 64),
    _step("2 x 512 of 4096", [(4096, 512)] * 2, 4, 8, 64),
    _step("62 x 1 of 4096", [(4096, 1)] * 62, 4, 8, 64),
    _step("both together", [(4096, 1)] * 62 + [(4096, 512)] * 2, 4, 8, 64),
    _step("64 x 8 of 4096", [(4096, 8)] * 64, 4, 8, 64),
    _step("64 x 1 of 4096", [(4096, 1)] * 64, 4, 8, 64),
)
_KNOWN: tuple[Shape | Step, ...] = (*CASES, *QUANTISED_CASES, *SHAPES, *STEPS)
ALL = {shape.name: shape for shape in _KNOWN}
# Of all pages, in a step: more than the compiler could keep within the chip.
_POOL_BYTES = 1 << 30
# Pages of a block of JAX's paged_attention.
_STOCK_BLOCK_PAGES = 32


def subject(kernel: str, shape: Any, mesh: Mesh, cores: CoresMode) -> Subject:
    """A kernel with a case, for the device of a mesh of one.

    Raises:
      ValueError: if JAX's kernel does not have the shape, or the case is a step of another.
    """
    if isinstance(shape, Step) != _is_of_steps(kernel):
        steps = "is" if isinstance(shape, Step) else "is not"
        of_steps = [name for name in KERNELS if _is_of_steps(name)]
        raise ValueError(f"{shape.name!r} {steps} a whole step, which {of_steps} are for")
    name = kernel if cores == "off" else f"{kernel}, {cores}"
    return dataclasses.replace(KERNELS[kernel](shape, mesh, cores), kernel=name)


def default_cases(kernel: str) -> Sequence[Shape | Step]:
    """What a kernel is executed with if nobody names a case."""
    return STEPS if _is_of_steps(kernel) else CASES


def _is_of_steps(kernel: str) -> bool:
    return kernel.startswith("step")


def tables(shape: Shape) -> np.ndarray:
    """[num_seqs, max_blocks] int32: runs of pages lie anywhere, as after hours of serving."""
    run = shape.run_pages if isinstance(shape, PlacedShape) else 1
    num_runs = shape.num_seqs * shape.max_blocks // run
    first = np.random.default_rng(0).permutation(num_runs) * run
    ids = first[:, None] + np.arange(run)
    return ids.astype(np.int32).reshape(shape.num_seqs, shape.max_blocks)


def page_bytes(shape: Shape) -> int:
    """Bytes of the pages with tokens of a sequence: what a call must read."""
    pages = -(-shape.context_lens.astype(np.int64) // shape.page_size)
    return int(pages.sum()) * shape.page_size * shape.token_bytes


def _query(shape: Shape) -> jax.ShapeDtypeStruct:
    dims = (shape.num_seqs, shape.num_heads, shape.head_dim)
    return jax.ShapeDtypeStruct(dims, shape.query_dtype)


def _cache(shape: Shape, mesh: Mesh, layout: Any) -> PagedKVCache:
    pages, dims = shape.num_seqs * shape.max_blocks, (shape.page_size, shape.head_dim)
    return PagedKVCache.abstract(
        pages, shape.num_kv_heads, *dims, dtype=shape.dtype, kv_layout=layout, mesh=mesh
    )


def _decode(shape: Shape, mesh: Mesh, cores: CoresMode, *, layout: Any) -> Subject:
    cache = _cache(shape, mesh, layout)

    def attend(query, cache, lens, tables):
        return page_attention(
            query, cache.key, cache.value, lens, tables, kv_layout=cache.kv_layout,
            megacore_mode=cores, mesh=mesh, scales=cache.scales or None,
        )  # fmt: skip

    arguments = (_query(shape), cache, shape.context_lens, tables(shape))
    return Subject(shape.name, "", attend, arguments, page_bytes(shape))


def _write(shape: Shape, mesh: Mesh, cores: CoresMode, *, layout: Any = None) -> Subject:
    """One token a sequence, at its end."""
    dims = (shape.num_seqs, shape.num_kv_heads, shape.head_dim)
    new = jax.ShapeDtypeStruct(dims, shape.query_dtype)
    seq_ids = np.arange(shape.num_seqs, dtype=np.int32)
    write = functools.partial(write_kv, mesh=mesh)
    arguments = (_cache(shape, mesh, layout), new, new, seq_ids, shape.context_lens - 1)
    return Subject(shape.name, "", write, (*arguments, tables(shape)), donate=(0,))


def _step_cache(step: Step, mesh: Mesh, layout: Any) -> tuple[PagedKVCache, np.ndarray]:
    """A cache with room for a step, and the tables of its sequences."""
    columns = -(-step.context_lens.max() // step.page_size)
    page_bytes = step.kv_bytes // int((-(-step.context_lens // step.page_size)).sum())
    num_pages = max(len(step.seqs) * columns, _POOL_BYTES // page_bytes)
    ids = np.random.default_rng(0).permutation(num_pages)[: len(step.seqs) * columns]
    tables = ids.astype(np.int32).reshape(-1, columns)
    cache = PagedKVCache.abstract(
        num_pages, step.num_kv_heads, step.page_size, step.head_dim,
        dtype=jnp.dtype(step.dtype), kv_layout=layout, mesh=mesh,
    )  # fmt: skip
    return cache, tables


def _plan_and_attend(step: Step, mesh: Mesh, cores: CoresMode, *, layout: Any) -> Subject:
    """All kernels of a step's attention, in one layer."""
    cache, tables = _step_cache(step, mesh, layout)

    def plan_and_attend(query, cache, context_lens, query_lens, tables):
        how = {"num_heads": step.num_heads, "mesh": mesh, "tuning": Tuning(cores=cores)}
        lens = {"query_lens": query_lens, "num_queries": step.num_queries}
        return attend(query, cache, make_plan(cache, context_lens, tables, **lens, **how))

    dims = (step.num_queries, step.num_heads, step.head_dim)
    query = jax.ShapeDtypeStruct(dims, step.dtype)
    arguments = (query, cache, step.context_lens, step.query_lens, tables)
    return Subject(step.name, "", plan_and_attend, arguments, step.kv_bytes, flops=step.flops)


def _plan_and_write(step: Step, mesh: Mesh, cores: CoresMode, *, layout: Any) -> Subject:
    """All new tokens of a step, in one layer."""
    cache, tables = _step_cache(step, mesh, layout)

    def plan_and_write(cache, new, context_lens, query_lens, tables):
        how = {"num_heads": step.num_heads, "mesh": mesh, "tuning": Tuning(cores=cores)}
        lens = {"query_lens": query_lens, "num_queries": step.num_queries}
        return write_kv(cache, new, new, make_plan(cache, context_lens, tables, **lens, **how))

    dims = (step.num_queries, step.num_kv_heads, step.head_dim)
    new = jax.ShapeDtypeStruct(dims, step.dtype)
    arguments = (cache, new, step.context_lens, step.query_lens, tables)
    return Subject(step.name, "", plan_and_write, arguments, donate=(0,))


def _stock(shape: Shape, mesh: Mesh, cores: CoresMode) -> Subject:
    if shape.head_dim % PACKED_ROW:
        raise ValueError(f"JAX's paged_attention has no head_dim {shape.head_dim}")
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = min(_STOCK_BLOCK_PAGES, shape.max_blocks)
    attend = functools.partial(paged_attention, pages_per_compute_block=pages)
    cache = jax.ShapeDtypeStruct(
        (shape.num_kv_heads, shape.num_seqs * shape.max_blocks, shape.page_size, shape.head_dim),
        shape.dtype,
    )
    arguments = (_query(shape), cache, cache, shape.context_lens, tables(shape))
    return Subject(shape.name, "", attend, arguments, page_bytes(shape))


def _ragged(shape: Shape, mesh: Mesh, cores: CoresMode) -> Subject:
    name = "jax.experimental.pallas.ops.tpu.ragged_paged_attention"
    attend = importlib.import_module(name).ragged_paged_attention
    cache = jax.ShapeDtypeStruct(
        (
            shape.num_seqs * shape.max_blocks,
            shape.page_size,
            2 * shape.num_kv_heads,
            shape.head_dim,
        ),
        shape.dtype,
    )
    starts = np.arange(shape.num_seqs + 1, dtype=np.int32)
    count = np.array([shape.num_seqs], np.int32)
    arguments = (_query(shape), cache, shape.context_lens, tables(shape), starts, count)
    return Subject(shape.name, "", attend, arguments, page_bytes(shape))


KERNELS: dict[str, Callable[[Any, Mesh, CoresMode], Subject]] = {
    "decode": functools.partial(_decode, layout="fused"),
    "decode, two arrays": functools.partial(_decode, layout="blocks_first"),
    "decode, token-major": functools.partial(_decode, layout="interleaved_words"),
    "write": _write,
    "write, token-major": functools.partial(_write, layout="interleaved_words"),
    "step": functools.partial(_plan_and_attend, layout="fused"),
    "step, token-major": functools.partial(_plan_and_attend, layout="interleaved_words"),
    "step write": functools.partial(_plan_and_write, layout="fused"),
    "step write, token-major": functools.partial(_plan_and_write, layout="interleaved_words"),
    "jax paged_attention": _stock,
    "jax ragged_paged_attention": _ragged,
}
