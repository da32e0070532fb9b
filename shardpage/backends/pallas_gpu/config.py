"""The static configuration of a kernel, from shapes and options; refuses what it has not."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ...options import Tuning
from ...page_format import PageFormat
from ...plan import Reads
from . import split
from .mosaic import MMA_ROWS, SMEM_BYTES, TILED_ROWS, WARPGROUP, num_sms

_DTYPES = ("bfloat16", "float16")
_FLOAT32 = np.dtype(np.float32)
_FLOAT16 = np.dtype(np.float16)  # or any of 16 bits
_MAX_DIM = 256
# Of quantised caches: with a warpgroup or two more, a thread has too few registers for longer rows.
_MAX_QUANTISED_DIM = 128
_ROW_BYTES = 32  # the least swizzle, which divides the bytes of a key and of a value
_MAX_GROUP = 2 * MMA_ROWS
_FEW_ROWS = 32  # of queries, in registers beside those of their pieces
_COPY_BYTES = 128  # what a copy into plain shared memory is aligned to
_SCALE_BYTES = 4
_MERGE_ELEMENTS = 4 * WARPGROUP  # of a large unit, that one CTA merges
_TILES_IN_PLACE = 16  # of a row on average; with 4 a step was slower by 4 %, with 64 faster by 1
_ALIGNED_BYTES = 1 << 10  # of arrays in shared memory, and room for barriers
# Bytes of keys and values on their way to one SM that keep the memory busy; more gain nothing.
_IN_FLIGHT_BYTES = 128 << 10
# Least of a quantised cache, whose blocks need room twice: as they arrive, and widened.
_LEAST_IN_FLIGHT_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything static about a kernel.

    A *tile* is some queries of one row, and a *unit* a tile and a KV head: `group` query heads of
    each of `tile_queries` queries are the rows of its matmuls, head by head.
    """

    format: PageFormat
    group: int  # query heads per KV head
    num_queries: int
    tile_queries: int
    num_tiles: int
    fold: int  # units whose queries share the rows of one copy
    block_tokens: int  # keys and values of one step
    stages: int  # blocks in shared memory, as they arrive
    wide_stages: int  # blocks of a quantised cache that are widened
    query_slots: int  # tiles of queries in shared memory
    store_chunk: int  # columns of a result that are staged, and leave, at a time
    num_splits: int
    num_ctas: int
    in_place: bool  # whether the kernel finds queries where the caller has them: `window.py`
    out_dtype: np.dtype = _FLOAT32  # of the results of whole units

    @property
    def rows(self) -> int:
        """Rows of a unit that are a query's."""
        return self.tile_queries * self.group

    @property
    def consumers(self) -> int:
        """Warpgroups that compute, of one wgmma's rows each."""
        return -(-self.rows // MMA_ROWS)

    @property
    def warpgroups(self) -> int:
        """One that fetches, those that compute, and those that widen."""
        return self.consumers + 1 + self.wideners

    @property
    def tokens_first(self) -> bool:
        """Whether tokens are the rows of matmuls: `tokens_first.py`.

        Of a quantised cache: those of 16 bits are as fast either way (an H200: 272 us for 276, 296
        for 298). With 64 queries registers do not suffice: 517 us for 355.
        """
        return self.format.quantised and self.query_rows <= _FEW_ROWS

    @property
    def pieces(self) -> int:
        """Into which queries are split, to be multiplied with keys as they are stored."""
        return split.pieces(self.format) if self.tokens_first else 1

    @property
    def widened(self) -> tuple[int, ...]:
        """Which blocks of a quantised cache are: keys (0), values (1)."""
        if not self.format.quantised:
            return ()
        return (1,) if self.tokens_first else (0, 1)

    @property
    def wideners(self) -> int:
        """Warpgroups that do so: where two attend, matmuls bind, and there is room for one."""
        return 0 if not self.widened else 2 if self.consumers == 1 else 1

    def wide_dim(self, which: int) -> int:
        """Elements of a row that is widened: values may become the rows of a matmul."""
        if self.tokens_first:
            return _round_up(self.format.value_dim, MMA_ROWS)
        return (self.format.key_dim, self.format.value_dim)[which]

    @property
    def scales_with(self) -> int:
        """With which blocks scales arrive: the first that are widened."""
        return min(self.widened, default=0)

    @property
    def scale_copies(self) -> int:
        """Copies of scales beside one of keys: of a whole page, of keys and of values, or none."""
        if self.format.scale != "token":
            return 0
        return 1 if self.piece_tokens == self.format.page_size else 2

    @property
    def query_rows(self) -> int:
        """Of a unit's queries, or of what is folded: as many as copies and matmuls take."""
        return max(TILED_ROWS, _round_up(self.rows, TILED_ROWS))

    @property
    def copy_rows(self) -> int:
        """Rows of one copy of queries."""
        return self.pieces * self.query_rows

    @property
    def query_copies(self) -> int:
        """Copies that bring the queries of one unit."""
        return self.group if self.in_place else 1

    @property
    def out_rows(self) -> int:
        """Rows of a unit in the results: whole vectors of a warpgroup."""
        if self.tokens_first:
            return self.query_rows
        rows = self.rows if self.consumers == 1 else self.consumers * MMA_ROWS
        return _round_up(rows, WARPGROUP // math.gcd(self.format.value_dim, WARPGROUP))

    @property
    def out_dim(self) -> int:
        """Elements of a row of the results."""
        return self.wide_dim(1)

    @property
    def narrow(self) -> bool:
        """Whether whole units leave in fewer bits than the parts of cut ones."""
        return self.out_dtype.itemsize < 4

    @property
    def out_in_place(self) -> bool:
        """Whether results leave for where the caller wants them."""
        return self.in_place and self.narrow

    @property
    def part_chunk(self) -> int:
        """Columns of a part that leave at a time: as many bytes as of a whole unit."""
        return self.store_chunk // 2 if self.narrow else self.store_chunk

    @property
    def merge_width(self) -> int:
        """Elements of a unit that one CTA merges: one a thread, or four where there are many."""
        return WARPGROUP if self.consumers == 1 else _MERGE_ELEMENTS

    @property
    def num_units(self) -> int:
        return self.num_tiles * self.format.num_kv_heads

    @property
    def piece_tokens(self) -> int:
        """Tokens of one copy: of one page, and of one block."""
        return math.gcd(self.format.page_size, self.block_tokens)


def configure(
    page_format: PageFormat,
    num_heads: int,
    reads: Reads,
    tuning: Tuning,
    final_dtype: np.dtype | None = None,
) -> Config:
    """The kernel for queries of `num_heads` heads that read so many rows.

    Args:
      final_dtype: what results are to be in the end if nothing is merged with them. Tiles of 16-bit
        caches leave in it if it has 16 bits, which is half of what XLA then puts in order.

    Raises:
      NotImplementedError: for shapes and options that the kernel does not have.
    """
    refuse(page_format, tuning)
    group = num_heads // page_format.num_kv_heads
    if group > _MAX_GROUP:
        raise NotImplementedError(
            f"{group} query heads per KV head are more than the {_MAX_GROUP} rows of two Hopper "
            "matmuls; use backend='xla'"
        )
    num_queries, num_rows = reads.start.shape[0], reads.ids.shape[0]
    tile_queries, num_tiles, fold, in_place = 1, num_queries, 1, False
    if reads.row is None:
        fold = _fold(page_format, group, num_queries)
    else:
        tile_queries = _tile_queries(num_queries, num_rows, group)
        in_place = _in_place(page_format, group, num_queries, num_rows, tile_queries)
        num_tiles = _most_tiles(num_queries, num_rows, tile_queries, in_place)
    config = Config(
        page_format, group, num_queries, tile_queries, num_tiles, fold, 0, 0, 0, 0, 0,
        tuning.num_splits, num_sms(tuning), in_place,
    )  # fmt: skip
    tiled = reads.row is not None and not page_format.quantised
    if tiled and final_dtype is not None and final_dtype.itemsize == 2:
        config = dataclasses.replace(config, out_dtype=final_dtype)
    return _fit(config, tuning)


def refuse(page_format: PageFormat, tuning: Tuning) -> None:
    """Refuses caches and options that the kernels do not have."""
    if page_format.compute_dtype.name not in _DTYPES:
        raise NotImplementedError(
            f"a Hopper GPU has no matmul for caches of {page_format.dtype.name}; use bfloat16 or "
            "float16, or backend='xla'"
        )
    multiple = _ROW_BYTES // page_format.dtype.itemsize
    most = _MAX_QUANTISED_DIM if page_format.quantised else _MAX_DIM
    for name in ("key_dim", "value_dim"):
        dim = getattr(page_format, name)
        if dim % multiple or dim > most:
            raise NotImplementedError(
                f"head_dim={dim} of {page_format.dtype.name} is no multiple of {multiple} up to "
                f"{most}, which the kernels' copies and matmuls need; use backend='xla'"
            )
    if page_format.scale == "token" and page_format.pack > 1:
        raise NotImplementedError(
            "scales of tokens in packed rows do not lie in the order of tokens, in which the "
            "kernels take them; use packed=False, or backend='xla'"
        )
    if page_format.page_size % TILED_ROWS:
        raise NotImplementedError(
            f"page_size={page_format.page_size} does not fill tiles of {TILED_ROWS} tokens, which "
            f"the kernels copy; use page_size={_round_up(page_format.page_size, TILED_ROWS)}, or "
            "backend='xla'"
        )
    if tuning.cores not in (None, "auto", "off"):
        raise NotImplementedError(
            f"cores={tuning.cores!r} splits a kernel over two TPU cores; use "
            "backend='pallas_tpu', or None"
        )


def has(page_format: PageFormat) -> bool:
    """Whether the kernels can work on such caches."""
    try:
        refuse(page_format, Tuning())
    except NotImplementedError:
        return False
    return True


def swizzle_bytes(dim: int, dtype: np.dtype) -> int:
    """The widest swizzle of shared memory that divides a row."""
    return next(width for width in (128, 64, _ROW_BYTES) if dim * dtype.itemsize % width == 0)


def _tile_queries(num_queries: int, num_rows: int, group: int) -> int:
    """As many as a row has on average: what a tile has room for besides is computed for nothing."""
    average = -(-num_queries // max(num_rows, 1))
    wanted = 1 << (average - 1).bit_length()
    most = 2 * MMA_ROWS if average * group > MMA_ROWS else MMA_ROWS
    return min(wanted, most // group)


def _in_place(
    page_format: PageFormat, group: int, num_queries: int, num_rows: int, tile_queries: int
) -> bool:
    """Whether tiles are windows of the queries as they lie, which XLA else gathers.

    A window begins at a multiple of 8 queries, so a row may have a tile more than else, and results
    of one that is not whole leave query by query: not where rows have few tiles. Rows of two whole
    matmuls, and what the merge takes at a time, need no remainder.
    """
    dim, merged = page_format.value_dim, _MERGE_ELEMENTS
    return (
        tile_queries * group == 2 * MMA_ROWS
        and num_queries >= _TILES_IN_PLACE * tile_queries * max(num_rows, 1)
        and tile_queries % TILED_ROWS == num_queries % TILED_ROWS == 0
        and merged % dim == 0 == page_format.num_kv_heads * group * dim % merged
        and dim * _FLOAT16.itemsize % _COPY_BYTES == 0
        and not page_format.quantised
    )


def _most_tiles(num_queries: int, num_rows: int, tile_queries: int, in_place: bool) -> int:
    """Of any queries of so many rows, and of what is behind the last of them."""
    runs = min(num_rows + 1, num_queries)
    before = TILED_ROWS - 1 if in_place else 0  # that are in a row's first window
    spare = runs * (tile_queries - 1 + before)
    return min((num_queries + spare) // tile_queries, num_queries)


def _fold(page_format: PageFormat, group: int, num_queries: int) -> int:
    """Units whose rows lie side by side in the query array and fill what one copy brings.

    Shared memory is copied from and to whole tiles of 8 rows, so fewer queries of a unit come with
    those of its neighbours. Elsewhere they would be padded, which is a kernel of its own.
    """
    fold = max(1, TILED_ROWS // group)
    fits = fold * group == TILED_ROWS and num_queries * page_format.num_kv_heads % fold == 0
    aligned = group * page_format.value_dim * 4 % _COPY_BYTES == 0
    return fold if fits and aligned and not page_format.quantised else 1


def _fit(config: Config, tuning: Tuning) -> Config:
    """Chooses what shared memory has room for: blocks as large, and as many, as pay."""
    dim = config.format.key_dim
    block_tokens = _block_tokens(config, tuning)
    for sizes in _sizes(config, block_tokens):
        sized = dataclasses.replace(config, block_tokens=block_tokens, **sizes)
        if _smem_bytes(sized) <= SMEM_BYTES:
            return sized
    raise NotImplementedError(
        f"tiles of {config.rows} rows and blocks of {block_tokens} tokens of head_dim={dim} do not "
        f"fit the {SMEM_BYTES} bytes of shared memory; use backend='xla'"
    )


def _sizes(config: Config, block_tokens: int) -> Iterator[dict[str, int]]:
    """What shared memory may be divided into; the best first."""
    page_format = config.format
    elements = block_tokens * (page_format.key_dim + page_format.value_dim)
    most, least = (
        max(2, in_flight // (elements * page_format.dtype.itemsize))
        for in_flight in (_IN_FLIGHT_BYTES, _LEAST_IN_FLIGHT_BYTES)
    )
    wanted = [(most, 0)]
    if page_format.quantised:
        wanted = [(stages, wide) for wide in (2, 1) for stages in range(most, least - 1, -1)]
        wanted.append((2, 1))
    for stages, wide_stages in wanted:
        for query_slots in (2, 1):
            for store_chunk in _store_chunks(config):
                yield {
                    "stages": stages, "wide_stages": wide_stages, "query_slots": query_slots,
                    "store_chunk": store_chunk,
                }  # fmt: skip


def _block_tokens(config: Config, tuning: Tuning) -> int:
    """The most whose logits and weights fit a warpgroup's registers beside its sums, or as asked.

    More at a time have fewer fixed costs: with head_dim 64 an H100 read 256 at 94 % of a copy's
    speed, 128 at 86, and of int8 an H200 needed 139 us instead of 149.
    """
    dim = config.format.value_dim
    most = 64 if dim > 128 else 128 if dim > 64 or config.consumers > 1 else 256
    if config.format.quantised:  # twice in shared memory, and fewer registers
        few = config.tokens_first and config.copy_rows <= _FEW_ROWS
        most = min(most, 256 if few else 128 if config.consumers == 1 else 64)
    if tuning.pages_per_block is None:
        return most
    asked = tuning.pages_per_block * config.format.page_size
    return min(most, max(64, 1 << (asked.bit_length() - 1)))


def _store_chunks(config: Config) -> list[int]:
    """Columns that may leave at a time; widest first."""
    dim = config.out_dim
    if config.tokens_first:  # columns are rows of the last matmul
        widths = [*range(dim, 0, -MMA_ROWS)]
    else:
        columns = swizzle_bytes(dim, _FLOAT16) // 2
        widths = [*range(dim, 0, -columns)]
        if not config.out_in_place:  # where a copy may begin at any row
            widths += [32]
    return [chunk for chunk in widths if dim % chunk == 0]


def query_smem_rows(config: Config) -> int:
    """Rows of queries in shared memory: a matmul reads 64 from wherever a tile begins."""
    rows = config.query_slots * config.copy_rows
    if config.tokens_first:
        return rows
    return rows + _round_up(max(0, config.consumers * MMA_ROWS - config.query_rows), TILED_ROWS)


def scale_lanes(config: Config) -> tuple[int, int]:
    """Where in shared memory the scales of a piece's values begin, and how many lanes it has."""
    aligned = _COPY_BYTES // _SCALE_BYTES
    piece = config.piece_tokens
    values = piece if config.scale_copies == 1 else _round_up(piece, aligned)
    return values, _round_up(values + piece, aligned)


def unit_lanes(config: Config) -> int:
    """Lanes in shared memory of the units of a copy of queries."""
    return _round_up(config.query_rows, _COPY_BYTES // _SCALE_BYTES)


def reduction_bytes(config: Config) -> int:
    """Of shared memory, for the peaks of queries over the tokens of all four warps, of which each
    thread has those of two queries in eight."""
    return _SCALE_BYTES * WARPGROUP * config.query_rows // 4 if config.tokens_first else 0


def _smem_bytes(config: Config) -> int:
    """Of the arrays of `scratch.py`."""
    page_format, rows = config.format, config.consumers * MMA_ROWS
    wide, stored = page_format.compute_dtype.itemsize, page_format.dtype.itemsize
    rings = [(config.stages, dim * stored) for dim in (page_format.key_dim, page_format.value_dim)]
    rings += [(config.wide_stages, config.wide_dim(which) * wide) for which in config.widened]
    sizes = [stages * config.block_tokens * row for stages, row in rings]
    is_split = config.pieces > 1
    sizes += [query_smem_rows(config) * page_format.key_dim * (stored if is_split else wide)]
    floats = []
    if is_split:
        floats += [config.query_slots * unit_lanes(config)]
    if config.tokens_first:
        rows = config.query_rows
        sizes += [rows * config.block_tokens * wide, reduction_bytes(config)]
    floats += [rows * config.part_chunk, rows]
    if config.narrow:
        sizes += [rows * config.store_chunk * config.out_dtype.itemsize]
    if config.scale_copies:
        pieces = config.stages * config.block_tokens // config.piece_tokens
        floats += [pieces * scale_lanes(config)[1], *[config.wide_stages * config.block_tokens] * 2]
    sizes += [4 * count for count in floats]
    return _ALIGNED_BYTES + sum(_round_up(size, _ALIGNED_BYTES) for size in sizes)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
