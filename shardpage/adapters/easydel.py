"""EasyDeL's operation `ragged_page_attention_v3`: `register()` puts ours in its place.

Models, scheduler and sampler stay EasyDeL's. So does its cache, `[pages, page, rows / n, n, 128]`,
pages split over its data-parallel axis and heads over its tensor axis: it is read and written as it
lies. Its tokens are packed, and the same on all data shards: to us that axis is `context`, and a
sequence may use any pages.
"""

from typing import Any

import jax.numpy as jnp

from ..options import Tuning
from ..shard_layout import ShardLayout
from . import errors_named, ragged

_WORDS = {"scale": "softmax_scale", "soft_cap": "logits_soft_cap", "window": "sliding_window"}


def register() -> type:
    """Has models made from now on attend with this library. Call it after `import easydel`.

    TurboQuant caches stay with EasyDeL's own operation.

    Returns:
      The operation's class, as EasyDeL's `OperationRegistry` has it under
      "ragged_page_attention_v3".

    Raises:
      ImportError: if EasyDeL is not installed.
    """
    from easydel.operations import OperationRegistry  # pyright: ignore[reportMissingImports]

    theirs = OperationRegistry.get("ragged_page_attention_v3")
    ours = type("ShardpageRaggedPageAttnV3", (theirs,), {"_forward_v3_standard": forward})
    return OperationRegistry.register(ours)


def forward(
    self: Any,
    query: Any,
    key: Any,
    value: Any,
    cache_view: Any,
    cache_metadata: Any,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    softmax_aux: Any = None,
    vmem_limit_bytes: int | None = None,
    **_not_for_attention: Any,
) -> Any:
    """EasyDeL's `_forward_v3_standard`: writes the new tokens into the view's pages, and attends.

    Args:
      self: the operation, which has the mesh and how its axes are named.
      query: `[tokens, num_heads, head_dim]`.
      key, value: `[tokens, num_kv_heads, head_dim]`, cast to the dtype of the pages.
      cache_view: holds `kv_pages`, replaced by those with the new tokens.
      cache_metadata: context_lens `[rows]`, pages_tables `[rows, pages]` of global ids and
        query_start_loc `[rows + 1]`; a row without new tokens is none.
      softmax_scale: factor on the logits; None for `head_dim ** -0.5`.
      logits_soft_cap, sliding_window: as in `attend` and `make_plan`.
      softmax_aux: `[num_heads]`, a sink logit for each head, or None.
      vmem_limit_bytes: tunes their kernel; has no effect.

    Returns:
      EasyDeL's `AttentionOutput`, `[tokens, num_heads, head_dim]` and the view.

    Raises:
      ValueError: if the pages do not fit the heads and their shards.
    """
    from easydel.operations import AttentionOutput  # pyright: ignore[reportMissingImports]

    ragged.checked_hints(vmem_limit_bytes=vmem_limit_bytes)
    mesh, layout = self.metadata.mesh, _layout(self.metadata.partition_manager, cache_view)
    pages = cache_view.kv_pages
    num_heads, head_dim = query.shape[1:]
    options = ragged.Options(softmax_scale, logits_soft_cap, sliding_window, tuning=Tuning())
    shards = layout.shards(mesh).heads
    shape = (key.shape[1], head_dim, options)
    cache = ragged.words(pages, *shape, shared=head_dim == 64, shards=shards)
    sinks = None if softmax_aux is None else softmax_aux.astype(jnp.float32)
    tokens = ragged.Tokens(query, key.astype(pages.dtype), value.astype(pages.dtype), sinks)
    with errors_named(**_WORDS, sinks="softmax_aux"):
        out, cache = ragged.step(
            tokens.filled(cache.format.num_kv_heads - key.shape[1]),
            cache,
            _rows(cache_metadata),
            options,
            mesh=mesh,
            layout=layout,
        )
    cache_view.kv_pages = cache.key
    out = out[:, :num_heads]
    return AttentionOutput(attention_weights=None, attention_outputs=out, cache_view=cache_view)


def _rows(metadata: Any) -> ragged.Rows:
    """Their rows: with several data shards real ones need not be the first."""
    starts = metadata.query_start_loc
    query_lens = starts[1:] - starts[:-1]
    lens = jnp.where(query_lens > 0, metadata.context_lens, 0)
    return ragged.Rows(lens, metadata.pages_tables, query_lens)


def _layout(manager: Any, cache_view: Any) -> ShardLayout:
    """The axes over which the view's pages and heads are split."""
    from eformer.common_types import MODE_PREFILL  # pyright: ignore[reportMissingImports]

    shape, axes = cache_view.metadata.get_shape_and_axes()
    spec = (*manager.resolve(axes=axes, mode=MODE_PREFILL, shape=shape), None, None, None)
    return ShardLayout(seqs=None, heads=spec[2], context=spec[0])
