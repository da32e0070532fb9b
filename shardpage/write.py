"""`write_kv`: new tokens into the pages of their sequences, in place."""

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import array_checks, backends, sharded
from .cache import PagedKVCache
from .options import BackendName, Tuning
from .plan import PageRange, plan_writes
from .shard_layout import ShardLayout, Split

_TOKENS = ("seqs", "heads", None)
_INPUT_DIMS = (_TOKENS, _TOKENS, ("seqs",), ("seqs",), ("seqs", None))


def write_kv(
    cache: PagedKVCache,
    key: Float[Array, "num_tokens num_kv_heads head_dim"],
    value: Float[Array, "num_tokens num_kv_heads head_dim"],
    seq_ids: Int[Array, " num_tokens"],
    positions: Int[Array, " num_tokens"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    *,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    backend: BackendName | None = None,
    interpret: bool | None = None,
) -> PagedKVCache:
    """Writes tokens into the pages of their sequences, in place.

    Appending is one token per sequence, prefill many; a call may mix both. On a mesh, tokens are
    split over `seqs` in equal contiguous parts like queries, and each device writes into its own
    pages what its part brings, without communication: pad a part with `seq_ids == -1`.

    Args:
      cache: the cache; **donated**: use the result in its stead.
      key: `[num_tokens, num_kv_heads, head_dim]`, any float dtype of 16 bits or more; cast to the
        cache's.
      value: as key.
      seq_ids: `[num_tokens]` int32, the row of `block_tables` that a token belongs to, counted
        over all devices. -1 drops the token.
      positions: `[num_tokens]` int32, the token's position in its sequence. If two tokens of a
        call have the same sequence and position, which one is kept is unspecified.
      block_tables: `[num_seqs, max_blocks]` int32, global page ids.
      mesh: the mesh that the cache is split over; None for one device, or inside a `shard_map`.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      backend: "xla" or "pallas_tpu"; None for the one made for the mesh's devices.
      interpret: run a Pallas kernel in interpret mode; None where there is no TPU.

    Returns:
      The cache with the tokens written. A token outside its table, of a row of another `seqs`
      shard, or whose table entry is no page of that shard is dropped; `validate_writes` finds
      such tokens on the host.

    Raises:
      ValueError: if shapes contradict each other or the mesh.
      NotImplementedError: if the backend does not have such a cache; the message says which does.
    """
    array_checks.write(cache, key, value, seq_ids, positions, block_tables)
    split = Split.of(mesh, layout)
    if split is not None:
        split.check_rows("num_seqs", block_tables.shape[0], "sequences that have no tokens")
        split.check_rows("num_tokens", key.shape[0], "seq_ids of -1")
        split.check_cache(cache.format, cache.num_pages)
    tuning = sharded.resolve(Tuning(backend=backend, interpret=interpret), split, cache)
    inputs = (key, value, *map(sharded.as_int32, (seq_ids, positions, block_tables)))
    return sharded.run(_write_here, tuning, split, cache, inputs, _INPUT_DIMS, donate=True)


def _write_here(
    tuning: Tuning, split: Split | None, cache: PagedKVCache, key, value, ids, positions, tables
) -> PagedKVCache:
    """One device's part: finds where each token goes, and writes those of its own pages."""
    pages = PageRange.here(cache.num_pages, split)
    writes = plan_writes(ids, positions, tables, cache.format.page_size, pages, split)
    key, value = (x.astype(cache.format.dtype) for x in (key, value))
    return backends.load(tuning).write(cache, key, value, writes, tuning)
