"""`page_attention`: the public function, from arguments to a sharded call."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from . import backends, validate
from .layout import ShardLayout, axis_names
from .pages import local_range, plan
from .partial import add_sinks, merge_over_axis, spread_nan
from .placement import as_int32, place, platform_of
from .spec import DEFAULT_MASK_VALUE, AttentionSpec, MegacoreMode


def page_attention(
    query: Float[Array, "num_seqs num_heads head_dim"],
    key_cache: Float[Array, "..."],
    value_cache: Float[Array, "..."] | None,
    context_lens: Int[Array, " num_seqs"],
    block_tables: Int[Array, "num_seqs max_blocks"],
    attn_scale: float | None = None,
    max_context_len: int | None = None,
    num_splits: int = 0,
    *,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: MegacoreMode | None = None,
    inline_seq_dim: bool = True,
    sliding_window: int | None = None,
    kv_layout: validate.KVLayoutName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    layout: ShardLayout | None = None,
    backend: Literal["xla", "pallas_tpu"] | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    return_lse: bool = False,
    interpret: bool | None = None,
) -> (
    Float[Array, "num_seqs num_heads head_dim"]
    | tuple[Float[Array, "num_seqs num_heads head_dim"], Float[Array, "num_seqs num_heads"]]
):
    """Attends with one query token a sequence over keys and values kept in pages.

    Query head `h` uses KV head `h // (num_heads // num_kv_heads)`. Softmax and accumulation are
    in float32; matmul operands have the cache's dtype.

    Args:
      query: `[num_seqs, num_heads, head_dim]`, any float dtype.
      key_cache: pages of keys in one of the layouts of `kv_layout`; float32, bfloat16 or float16.
      value_cache: pages of values, as key_cache; None with a fused cache.
      context_lens: `[num_seqs]` int32, tokens of each sequence in the cache. 0 gives zeros, and
        -inf in lse.
      block_tables: `[num_seqs, max_blocks]` int32, page ids, *global* on a mesh. Entries at or
        past `ceil(context_len / page_size)` are never looked at.
      attn_scale: factor on the logits; None for `head_dim ** -0.5`.
      max_context_len: bound on context_lens, in tokens: what lies past it in the table is not
        looked at, and a longer context is invalid. None for the table's width.
      num_splits: in how many parts a sequence may be split and merged again. 0 chooses; 1 never
        splits; n splits into at most n. The result is the same up to rounding.
      mask_value: finite stand-in for -inf, at most -1e30. No result depends on it.
      attn_logits_soft_cap: `cap * tanh(logits / cap)` on scaled logits, before masking.
      pages_per_compute_block: pages of one step of the streaming loop; None chooses.
      megacore_mode: how `pallas_tpu` splits work over the two cores of a v4 or v5p chip:
        "kv_head", "batch", "auto" or None. `xla` has no cores to split over: None and "auto" do
        nothing there, the others are refused.
      inline_seq_dim: True walks over all sequences in one kernel. False, a grid step a sequence,
        is refused by `pallas_tpu`, which could not fetch ahead then; `xla` has one walk for both.
      sliding_window: attend to positions `>= context_len - sliding_window` only; pages before
        that are not fetched and may have been freed.
      kv_layout: "blocks_first" `[pages, kv_heads, page, dim]`, "heads_first"
        `[kv_heads, pages, page, dim]`, or "fused" `[pages, 2, kv_heads, page, dim]` (keys, then
        values). None takes the only one that these shapes allow. The last two axes of each may
        be packed, `page * dim / 128, 128`, where head_dim divides 128.
      mesh: splits the call over the devices of this mesh. None attends on one device, without
        collectives, also inside a `shard_map` of your own.
      layout: which mesh axis splits what; None for `ShardLayout.of(mesh)`.
      backend: "xla" or "pallas_tpu"; None for the one made for the mesh's devices.
      sinks: `[num_heads]`, a logit a query head that joins the softmax denominator once.
      return_lse: also return the natural log of the softmax denominator (sinks included).
      interpret: run a Pallas kernel in interpret mode; None where there is no TPU.

    Returns:
      `[num_seqs, num_heads, head_dim]` in the query's dtype; with `return_lse`, a pair of that
      and lse, `[num_seqs, num_heads]` float32, which `merge_partials` and `merge_across` take.
      A sequence whose context is longer than its table, or whose table holds a bad page id where
      it is looked at, gets NaN in both; `validate_tables` says on the host which and why.

    Raises:
      ValueError: if arguments contradict each other or the mesh; the message says what would work.
      NotImplementedError: if the backend does not have an option; the message says which does.
    """
    validate.attention_arrays(query, key_cache, value_cache, context_lens, block_tables, sinks)
    validate.options(
        attn_scale=attn_scale,
        max_context_len=max_context_len,
        num_splits=num_splits,
        mask_value=mask_value,
        attn_logits_soft_cap=attn_logits_soft_cap,
        pages_per_compute_block=pages_per_compute_block,
        megacore_mode=megacore_mode,
        inline_seq_dim=inline_seq_dim,
        sliding_window=sliding_window,
        backend=backend,
        interpret=interpret,
    )
    kv = validate.kv_layout(kv_layout, query, key_cache, value_cache)
    validate.cache_row(key_cache, query.shape[-1])
    sizes = kv.sizes(key_cache.shape, query.shape[-1])
    validate.head_sizes(query, sizes)
    validate.table_width(block_tables, sizes)
    platform = platform_of(mesh, key_cache)
    spec = AttentionSpec(
        kv=kv,
        scale=query.shape[-1] ** -0.5 if attn_scale is None else float(attn_scale),
        platform=platform,
        max_context_len=None if max_context_len is None else int(max_context_len),
        sliding_window=None if sliding_window is None else int(sliding_window),
        soft_cap=None if attn_logits_soft_cap is None else float(attn_logits_soft_cap),
        num_splits=int(num_splits),
        pages_per_compute_block=(
            None if pages_per_compute_block is None else int(pages_per_compute_block)
        ),
        megacore_mode=megacore_mode,
        inline_seq_dim=inline_seq_dim,
        interpret=interpret,
    )
    call = _Call(spec, backend or backends.default_for(platform))
    arrays = _Arrays(
        query, key_cache, value_cache, as_int32(context_lens), as_int32(block_tables), sinks
    )
    if mesh is None:
        if layout is not None:
            raise ValueError(f"{layout=} names axes of a mesh; pass mesh= as well")
    else:
        layout = layout or ShardLayout.of(mesh)
        validate.mesh_layout(mesh, layout)
        validate.divisibility(layout.shards(mesh), layout, sizes, query.shape[0])
        call = dataclasses.replace(call, mesh=mesh, layout=layout)
        arrays = place(arrays, call.array_specs(), mesh, caches=("key_cache", "value_cache"))
    out, lse = _attend(call, arrays)
    return (out, lse) if return_lse else out


# A collective costs a GPU some 30 us, in which NVLink would move more than this.
_AT_ONCE_BYTES = {"gpu": 1 << 20}


class _Arrays(NamedTuple):
    """The arrays of a call; as a tree of PartitionSpecs, their split."""

    query: Any
    key_cache: Any
    value_cache: Any
    context_lens: Any
    block_tables: Any
    sinks: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static of a call."""

    spec: AttentionSpec
    backend: str
    mesh: Mesh | AbstractMesh | None = None
    layout: ShardLayout | None = None

    def array_specs(self) -> _Arrays:
        assert self.layout is not None
        layout, cache = self.layout, self.layout.cache_spec(self.spec.kv)
        return _Arrays(
            layout.query_spec, cache, cache, layout.lens_spec, layout.tables_spec, layout.sinks_spec
        )


@functools.partial(jax.jit, static_argnums=0)
def _attend(call: _Call, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    attend_shard = functools.partial(_attend_shard, call)
    if call.mesh is None:
        return attend_shard(arrays)
    assert call.layout is not None
    return jax.shard_map(
        attend_shard,
        mesh=call.mesh,
        in_specs=(call.array_specs(),),
        out_specs=(call.layout.query_spec, call.layout.lse_spec),
        check_vma=True,
    )(arrays)


def _attend_shard(call: _Call, arrays: _Arrays) -> tuple[jax.Array, jax.Array]:
    """One device's part: plan, attend, merge."""
    spec, layout, query = call.spec, call.layout, arrays.query
    sizes = spec.kv.sizes(arrays.key_cache.shape, query.shape[-1])
    with jax.named_scope("plan"):
        pages, invalid = plan(
            arrays.context_lens,
            arrays.block_tables,
            sizes.page_size,
            local_range(sizes.num_pages, layout),
            max_context_len=spec.max_context_len,
            sliding_window=spec.sliding_window,
        )
    with jax.named_scope("attend"):
        attend = backends.load(call.backend)
        partial = attend(query, arrays.key_cache, arrays.value_cache, pages, spec)
    with jax.named_scope("merge"):
        if layout is not None and axis_names(layout.context):
            partial = merge_over_axis(
                partial,
                axis_names(layout.context),
                at_once_bytes=_AT_ONCE_BYTES.get(spec.platform, 0),
            )
        if arrays.sinks is not None:
            partial = add_sinks(partial, arrays.sinks)
        partial = spread_nan(partial)
    out = jnp.where(invalid[:, None, None], jnp.nan, partial.out)
    lse = jnp.where(invalid[:, None], jnp.nan, partial.lse)
    return out.astype(query.dtype), lse
