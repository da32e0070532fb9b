"""The oracle: paged attention in float64 NumPy, one token after the other.

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
):
    """Attends every sequence to its own cached tokens.

    Args:
      query: [num_seqs, num_heads, head_dim].
      key_cache, value_cache: a paged cache in `kv_layout`; `value_cache` is None when "fused".
        A row of it may hold several tokens.
      context_lens: [num_seqs], tokens.
      block_tables: [num_seqs, max_blocks], global page ids.
      kv_layout: "blocks_first", "heads_first" or "fused".
      scale: of the logits; None is 1/sqrt(head_dim).
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      sliding_window: only this many tokens, the last ones, are attended.
      sinks: [num_heads], one more logit per head that takes weight and adds no value.
      max_context_len: a longer context is an error of the caller.
      num_seq_shards: sequences, and with them pages, are split into this many equal parts.

    Returns:
      (out [num_seqs, num_heads, head_dim], lse [num_seqs, num_heads]) in float64. A sequence
      without tokens has zeros and -inf (its sinks, if any). An invalid one has NaN in both.
    """
    query = np.asarray(query).astype(np.float64)
    num_seqs, num_heads, head_dim = query.shape
    keys, values = _pages_of_tokens(key_cache, value_cache, kv_layout, head_dim)
    num_pages, page_size, num_kv_heads, _ = keys.shape
    scale = head_dim**-0.5 if scale is None else scale

    out = np.zeros((num_seqs, num_heads, head_dim))
    lse = np.full((num_seqs, num_heads), -np.inf)
    for seq in range(num_seqs):
        length = int(context_lens[seq])
        table = [int(page) for page in block_tables[seq]]
        first = 0 if sliding_window is None else max(0, length - sliding_window)
        seq_shard = seq // (num_seqs // num_seq_shards)
        pages_per_seq_shard = num_pages // num_seq_shards
        own_pages = range(seq_shard * pages_per_seq_shard, (seq_shard + 1) * pages_per_seq_shard)
        limit = len(table) * page_size
        if max_context_len is not None:
            limit = min(limit, max_context_len)
        if not 0 <= length <= limit or not all(
            table[position // page_size] in own_pages for position in range(first, length)
        ):
            out[seq], lse[seq] = np.nan, np.nan
            continue
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            logits = []
            for position in range(first, length):
                page, slot = table[position // page_size], position % page_size
                logit = scale * np.dot(query[seq, head], keys[page, slot, kv_head])
                logits.append(soft_cap * np.tanh(logit / soft_cap) if soft_cap else logit)
            a_sink = sinks is not None and sinks[head] != -np.inf
            every_logit = [*logits, float(sinks[head])] if a_sink else logits
            if not every_logit:
                continue
            peak = max(every_logit)
            lse[seq, head] = peak + np.log(np.sum(np.exp(np.array(every_logit) - peak)))
            for position, logit in zip(range(first, length), logits, strict=True):
                page, slot = table[position // page_size], position % page_size
                out[seq, head] += np.exp(logit - lse[seq, head]) * values[page, slot, kv_head]
    return out, lse


def _pages_of_tokens(key_cache, value_cache, kv_layout, head_dim):
    """Both caches as float64 [num_pages, page_size, num_kv_heads, head_dim]."""
    if kv_layout == "fused":
        assert value_cache is None
        key_cache, value_cache = np.asarray(key_cache)[:, 0], np.asarray(key_cache)[:, 1]
    order = {"blocks_first": (0, 2, 1, 3), "heads_first": (1, 2, 0, 3), "fused": (0, 2, 1, 3)}
    caches = (np.asarray(cache).astype(np.float64) for cache in (key_cache, value_cache))
    return tuple(
        np.transpose(cache.reshape(*cache.shape[:2], -1, head_dim), order[kv_layout])
        for cache in caches
    )
