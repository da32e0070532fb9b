"""Checks of values, on the host: what compiled code can only answer with NaN or a dropped token."""

from typing import Any

import numpy as np
from jaxtyping import Int

from .arguments import integer, shown
from .array_checks import rank


def validate_tables(
    context_lens: Int[np.ndarray, " num_seqs"] | Any,
    block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
    *,
    num_pages: int,
    page_size: int,
    num_seq_shards: int = 1,
    max_context_len: int | None = None,
    sliding_window: int | None = None,
) -> None:
    """Checks on the host what compiled code can only answer with NaN.

    Args:
      context_lens: tokens per sequence, `[num_seqs]`, integers.
      block_tables: global page ids, `[num_seqs, max_blocks]`, integers. Only the entries that
        `page_attention` would look up with the same options are checked.
      num_pages: pages of the whole cache, over all devices.
      page_size: tokens per page.
      num_seq_shards: shards of the mesh axis that splits sequences; sequence and pages must
        belong to the same one.
      max_context_len, sliding_window: as passed to `page_attention`.

    Raises:
      ValueError: naming the sequence, the entry, its value and the rule that it breaks.
    """
    lens = _integers("context_lens", context_lens, "[num_seqs]")
    tables = _integers("block_tables", block_tables, "[num_seqs, max_blocks]")
    for name, value in {
        "max_context_len": max_context_len,
        "sliding_window": sliding_window,
    }.items():
        if value is not None:
            integer(name, value, "tokens, or None")
    num_seqs, max_blocks = tables.shape
    if lens.shape != (num_seqs,):
        raise ValueError(f"context_lens has {lens.shape[0]} entries, block_tables {num_seqs} rows")
    integer("page_size", page_size)
    _divisible(num_seq_shards, num_seqs=num_seqs, num_pages=num_pages)
    capacity, pages_per_shard = max_blocks * page_size, num_pages // num_seq_shards
    limit = min(capacity, max_context_len or capacity)
    bound = "max_context_len" if limit < capacity else "its table's capacity"
    for seq, length in enumerate(lens.tolist()):
        if not 0 <= length <= limit:
            raise ValueError(
                f"sequence {seq}: context_len {length} must be in [0, {limit}], {bound} "
                f"({max_blocks} blocks of {page_size} tokens)"
            )
        shard = seq // (num_seqs // num_seq_shards)
        first = shard * pages_per_shard
        first_block = max(length - (sliding_window or length), 0) // page_size
        used = tables[seq, first_block : -(-length // page_size)]
        bad = np.flatnonzero((used < first) | (used >= first + pages_per_shard))
        if bad.size:
            entry = first_block + int(bad[0])
            raise ValueError(
                f"sequence {seq}, entry {entry}: page id {int(tables[seq, entry])} must be in "
                f"[{first}, {first + pages_per_shard}), the pages of its shard {shard} of "
                f"{num_seq_shards}; {num_pages=}"
            )


def validate_writes(
    seq_ids: Int[np.ndarray, " num_tokens"] | Any,
    positions: Int[np.ndarray, " num_tokens"] | Any,
    block_tables: Int[np.ndarray, "num_seqs max_blocks"] | Any,
    *,
    num_pages: int,
    page_size: int,
    num_seq_shards: int = 1,
) -> None:
    """Finds on the host the tokens that `write_kv` would drop, other than those with -1.

    Args:
      seq_ids, positions: `[num_tokens]` integers, as passed to `write_kv`; -1 is skipped.
      block_tables: `[num_seqs, max_blocks]` integers, global page ids.
      num_pages: pages of the whole cache, over all devices.
      page_size: tokens per page.
      num_seq_shards: shards of the mesh axis that splits sequences.

    Raises:
      ValueError: naming the token, its sequence and position, and the rule that it breaks.
    """
    seq_ids = _integers("seq_ids", seq_ids, "[num_tokens]")
    positions = _integers("positions", positions, "[num_tokens]")
    tables = _integers("block_tables", block_tables, "[num_seqs, max_blocks]")
    (num_tokens,), (num_seqs, max_blocks) = seq_ids.shape, tables.shape
    if len(positions) != num_tokens:
        raise ValueError(f"positions has {len(positions)} entries, seq_ids {num_tokens}")
    integer("page_size", page_size)
    _divisible(num_seq_shards, num_seqs=num_seqs, num_pages=num_pages, num_tokens=num_tokens)
    pages_per_shard = num_pages // num_seq_shards
    for token, (seq, position) in enumerate(zip(seq_ids.tolist(), positions.tolist(), strict=True)):
        if seq == -1:
            continue
        where = f"token {token} (sequence {seq}, position {position})"
        if not 0 <= seq < num_seqs:
            raise ValueError(f"{where}: seq_ids must be -1 or in [0, {num_seqs})")
        if not 0 <= position < max_blocks * page_size:
            raise ValueError(
                f"{where}: the table holds positions in [0, {max_blocks * page_size}), "
                f"{max_blocks} blocks of {page_size} tokens"
            )
        shard = seq // (num_seqs // num_seq_shards)
        part = token // (num_tokens // num_seq_shards)
        if shard != part:
            raise ValueError(
                f"{where}: the token lies in part {part} of {num_seq_shards}, its sequence in "
                f"{shard}; tokens are split over devices like sequences: move it there"
            )
        page, first = int(tables[seq, position // page_size]), shard * pages_per_shard
        if not first <= page < first + pages_per_shard:
            raise ValueError(
                f"{where}: page id {page} must be in [{first}, {first + pages_per_shard}), the "
                f"pages of shard {shard} of {num_seq_shards}; {num_pages=}"
            )


def _integers(name: str, values: Any, dims: str) -> np.ndarray:
    """The values, of an array or of lists, as an array of integers with these axes."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} must be {dims}; got {shown(values)}: {error}") from None
    rank(name, array, dims)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers; got {array.dtype}")
    return array


def _divisible(num_seq_shards: int, **counts: int) -> None:
    """Checks that each of these splits evenly over the shards."""
    integer("num_seq_shards", num_seq_shards)
    for name, count in counts.items():
        if integer(name, count, least=0) % num_seq_shards:
            raise ValueError(f"{name}={count} must be divisible by {num_seq_shards=}")
