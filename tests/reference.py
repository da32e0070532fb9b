"""The oracle: paged attention in float64 NumPy, one query token after the other.

It shares no code with the library and no idea either: no blocks, no online softmax, no merge, no
compaction of tables. Slow on purpose; read it next to sections 2 and 3 of the README's semantics.
"""

import numpy as np


def page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    kv_layout,
    scale=None,
    soft_cap=None,
    sliding_window=None,
    sinks=None,
    max_context_len=None,
    num_seq_shards=1,
    attend_token=None,
):
    """Attends every sequence to its own cached tokens.

    Args:
      query: [num_seqs, num_heads, head_dim].
      key_cache, value_cache: a paged cache in `kv_layout`; `value_cache` is None when "fused".
        A row of it may hold several tokens.
      context_lens: [num_seqs], tokens.
      block_tables: [num_seqs, max_blocks], global page ids.
      kv_layout: "blocks_first", "heads_first" or "fused"; "tokens_first", "interleaved" or
        "interleaved_words".
      scale: of the logits; None is 1/sqrt(head_dim).
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      sliding_window: only this many tokens, the last ones, are attended.
      sinks: [num_heads], one more logit per head that takes weight and adds no value.
      max_context_len: a longer context is an error of the caller.
      num_seq_shards: sequences, and with them pages, are split into this many equal parts.
      attend_token: what takes the place of `_attend_token`, to see what rounding costs.

    Returns:
      (out [num_seqs, num_heads, head_dim], lse [num_seqs, num_heads]) in float64. A sequence
      without tokens has zeros and -inf (its sinks, if any). An invalid one has NaN in both.
    """
    num_seqs = len(query)
    return step_attention(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        [1] * num_seqs,
        kv_layout=kv_layout,
        scale=scale,
        soft_cap=soft_cap,
        window=sliding_window,
        sinks=sinks,
        max_context_len=max_context_len,
        num_seq_shards=num_seq_shards,
        attend_token=attend_token,
    )


def step_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    query_lens,
    *,
    kv_layout,
    scale=None,
    soft_cap=None,
    window=None,
    chunk=None,
    causal=True,
    sinks=None,
    max_context_len=None,
    num_seq_shards=1,
    attend_token=None,
):
    """Attends with the last tokens of every sequence to its cached tokens.

    As `page_attention`, but for:

    Args:
      query: [num_queries, num_heads, head_dim]: in equal parts, one for each shard of the
        sequences, the new tokens of its sequences one after another; what is left over is padding.
      query_lens: [num_seqs], new tokens of each sequence.
      window: a token sees this many positions, its own the last of them.
      chunk: a token sees positions of its own multiple of this only.
      causal: whether a token sees none behind its own.

    Returns:
      (out [num_queries, num_heads, head_dim], lse [num_queries, num_heads]) in float64; zeros and
      -inf in padding.
    """
    query = np.asarray(query).astype(np.float64)
    num_queries, num_heads, head_dim = query.shape
    num_seqs = len(context_lens)
    keys, values = _pages_of_tokens(key_cache, value_cache, kv_layout, head_dim)
    num_pages, page_size, _, _ = keys.shape
    seqs_per_shard = num_seqs // num_seq_shards
    out = np.zeros((num_queries, num_heads, head_dim))
    lse = np.full((num_queries, num_heads), -np.inf)
    next_query = 0
    for seq in range(num_seqs):
        if seq % seqs_per_shard == 0:
            next_query = seq // seqs_per_shard * (num_queries // num_seq_shards)
        length, new = int(context_lens[seq]), int(query_lens[seq])
        table = [int(page) for page in block_tables[seq]]
        limit = len(table) * page_size
        if max_context_len is not None:
            limit = min(limit, max_context_len)
        possible = 0 <= length <= limit and (new <= length or length == 0)
        seen = [
            [
                other
                for other in range(length if possible else 0)
                if (other <= position or not causal)
                and (window is None or other > position - window)
                and (chunk is None or other // chunk == position // chunk)
            ]
            for position in range(length - new, length)
        ]
        seq_shard = seq // seqs_per_shard
        pages_per_seq_shard = num_pages // num_seq_shards
        own_pages = range(seq_shard * pages_per_seq_shard, (seq_shard + 1) * pages_per_seq_shard)
        valid = possible and all(
            table[position // page_size] in own_pages
            for positions in seen
            for position in positions
        )
        for positions in seen:
            if valid:
                pages = [table[position // page_size] for position in positions]
                slots = [position % page_size for position in positions]
                out[next_query], lse[next_query] = (attend_token or _attend_token)(
                    query[next_query],
                    keys[pages, slots],
                    values[pages, slots],
                    head_dim**-0.5 if scale is None else scale,
                    soft_cap,
                    sinks,
                )
            else:
                out[next_query], lse[next_query] = np.nan, np.nan
            next_query += 1
    for row in range(num_queries) if sinks is not None else ():
        if np.all(lse[row] == -np.inf):  # padding: its sinks alone
            lse[row] = np.asarray(sinks, np.float64)
    return out, lse


def _attend_token(query, keys, values, scale, soft_cap, sinks):
    """One token's (out, lse) over keys and values [tokens, num_kv_heads, head_dim]."""
    num_heads, num_kv_heads = len(query), keys.shape[1]
    out, lse = np.zeros_like(query), np.full(num_heads, -np.inf)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        logits = scale * (keys[:, kv_head] @ query[head])
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        a_sink = sinks is not None and sinks[head] != -np.inf
        every_logit = np.append(logits, float(sinks[head])) if a_sink else logits
        if not len(every_logit):
            continue
        peak = np.max(every_logit)
        lse[head] = peak + np.log(np.sum(np.exp(every_logit - peak)))
        out[head] = np.exp(logits - lse[head]) @ values[:, kv_head]
    return out, lse


def _pages_of_tokens(key_cache, value_cache, kv_layout, head_dim):
    """Both caches as float64 [num_pages, page_size, num_kv_heads, head_dim]."""
    if kv_layout == "tokens_first":
        return tuple(np.asarray(cache).astype(np.float64) for cache in (key_cache, value_cache))
    if kv_layout in ("interleaved", "interleaved_words"):
        assert value_cache is None
        cache = np.asarray(key_cache).astype(np.float64)
        num_pages, page_size, *_, width = cache.shape
        # A row of 128 is a key and a value of 64, or one of them, padded.
        width = 64 if (head_dim, width) == (64, 128) else width
        rows = cache.reshape(num_pages, page_size, -1, width)[..., :head_dim]
        return rows[:, :, 0::2], rows[:, :, 1::2]
    if kv_layout == "fused":
        assert value_cache is None
        key_cache, value_cache = np.asarray(key_cache)[:, 0], np.asarray(key_cache)[:, 1]
    order = {"blocks_first": (0, 2, 1, 3), "heads_first": (1, 2, 0, 3), "fused": (0, 2, 1, 3)}
    caches = (np.asarray(cache).astype(np.float64) for cache in (key_cache, value_cache))
    return tuple(
        np.transpose(cache.reshape(*cache.shape[:2], -1, head_dim), order[kv_layout])
        for cache in caches
    )
