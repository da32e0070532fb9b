"""`write_kv`: new tokens into the pages of their sequences, in place."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import array_checks, backends, sharded
from .attention import as_layer
from .cache import PagedKVCache
from .options import BackendName, Tuning
from .plan import Plan, Writes, plan_writes
from .quantise import store
from .shard_layout import ShardLayout, Split
from .tables import PageRange, linear_index

_TOKENS = ("seqs", "heads", None)
_INPUT_DIMS = (None, _TOKENS, _TOKENS, ("seqs",), ("seqs",), ("seqs", None), ())
_PLANNED_DIMS = (None, _TOKENS, _TOKENS, ("pages",), ())


def write_kv(
    cache: PagedKVCache,
    key: Float[Array, "num_tokens num_kv_heads head_dim"],
    value: Float[Array, "num_tokens num_kv_heads head_dim"],
    plan: Plan | Int[Array, " num_tokens"] | None = None,
    positions: Int[Array, " num_tokens"] | None = None,
    block_tables: Int[Array, "num_seqs max_blocks"] | None = None,
    *,
    seq_ids: Int[Array, " num_tokens"] | None = None,
    layer: int | Int[Array, ""] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    backend: BackendName | None = None,
    interpret: bool | None = None,
) -> PagedKVCache:
    """Writes tokens into the pages of their sequences, in place.

    With a plan, the step's new tokens, at their positions: `write_kv(cache, key, value, plan)`.
    Without one, any tokens: `write_kv(cache, key, value, seq_ids, positions, block_tables)`.
    Appending is one token per sequence, prefill many; a call may mix both. On a mesh, tokens are
    split over `seqs` in equal contiguous parts like queries, and each device writes into its own
    pages what its part brings, without communication: pad a part with `seq_ids == -1`.

    Args:
      cache: the cache; **donated**: use the result in its stead.
      key: `[num_tokens, num_kv_heads, head_dim]`, any float dtype of 16 bits or more; cast to the
        cache's, or quantised: divided by its scale, rounded to the nearest, clipped. With a plan, a
        row per query.
      value: as key.
      plan: of `make_plan`, for this cache: whose the tokens are, on which mesh, and how to write
        them; it takes the place of all arguments below but `layer`. Or, without one, `seq_ids`.
      positions: `[num_tokens]` int32, the token's position in its sequence. If two tokens of a
        call have the same sequence and position, which one is kept is unspecified.
      block_tables: `[num_seqs, max_blocks]` int32, global page ids.
      seq_ids: `[num_tokens]` int32, the row of `block_tables` that a token belongs to, counted
        over all devices. -1 drops the token.
      layer: which layer of a cache made with `num_layers`, from 0; may be traced. Tokens of one
        that there is not are dropped.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      backend: "xla", "pallas_tpu" or "pallas_gpu"; None for the one made for the mesh's devices.
      interpret: run a Pallas kernel in interpret mode; None where there is no TPU.

    Returns:
      The cache with the tokens written. A token outside its table, of a row of another `seqs`
      shard, or whose table entry is no page of that shard is dropped; `validate_writes` finds
      such tokens on the host.

    Raises:
      ValueError: if shapes contradict each other, the plan or the mesh.
      NotImplementedError: if the backend does not have such a cache; the message says which does.
    """
    if isinstance(plan, Plan):
        options = {"positions": positions, "block_tables": block_tables, "seq_ids": seq_ids}
        options |= {"mesh": mesh, "layout": layout, "backend": backend, "interpret": interpret}
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"the plan says {', '.join(given)}: leave them out, or the plan")
        return _write_planned(cache, key, value, plan, layer)
    if plan is not None and seq_ids is not None:
        raise ValueError("seq_ids is given twice: as an argument of its name and as the fourth")
    arrays = (plan if seq_ids is None else seq_ids, positions, block_tables)
    array_checks.write(cache, key, value, *arrays)
    assert block_tables is not None
    array_checks.layer(cache, layer)
    split = Split.of(mesh, layout)
    if split is not None:
        split.check_rows("num_seqs", len(block_tables), "sequences that have no tokens")
        split.check_rows("num_tokens", key.shape[0], "seq_ids of -1")
        split.check_cache(cache.format, cache.num_pages)
    tuning = sharded.resolve(Tuning(backend=backend, interpret=interpret), split, cache)
    inputs = (cache, key, value, *map(sharded.as_int32, arrays), as_layer(layer))
    return sharded.run(_write_here, tuning, split, inputs, _INPUT_DIMS, donate=True)


def _write_planned(
    cache: PagedKVCache, key: Any, value: Any, plan: Plan, layer: Any
) -> PagedKVCache:
    made_for = plan.made_for
    array_checks.new_tokens(cache, key, value)
    array_checks.made_for(cache, made_for)
    array_checks.layer(cache, layer)
    if key.shape[0] != plan.positions.shape[0]:
        raise ValueError(
            f"key has {key.shape[0]} tokens for a plan of num_queries={plan.positions.shape[0]}; "
            "pass one per query, padding included"
        )
    inputs = (cache, key, value, plan.writes, as_layer(layer))
    tuning, split = made_for.tuning, made_for.split
    return sharded.run(_write_planned_here, tuning, split, inputs, _PLANNED_DIMS, donate=True)


def _write_here(
    tuning: Tuning,
    split: Split | None,
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    layer: jax.Array | None,
) -> PagedKVCache:
    """One device's part: finds where each token goes, and writes those of its own pages."""
    num_pages, page_format = cache.num_pages, cache.format
    row = ids if split is None else ids - linear_index(split.layout.seqs) * len(tables)
    pages = PageRange.here(num_pages, split)
    writes = plan_writes(row, positions, tables, page_format.page_size, pages)
    work = backends.load(tuning).prepare_writes(writes, num_pages, page_format, tuning)
    return _write_planned_here(tuning, split, cache, key, value, (writes, work), layer)


def _write_planned_here(
    tuning: Tuning,
    split: Split | None,
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    planned: tuple[Writes, Any],
    layer: jax.Array | None,
) -> PagedKVCache:
    one = cache if layer is None else cache.of_layer(layer)
    with jax.named_scope("write"):
        tokens = store(one, key, value)
        written = backends.load(tuning).write(one, tokens, *planned, tuning)
    in_shape = lambda new, old: new.reshape(old.shape)
    arrays = map(in_shape, written.arrays, cache.arrays)
    if cache.scale != "token":
        return cache.replace(arrays)
    return cache.replace(arrays, map(in_shape, written.scales, cache.scales))
