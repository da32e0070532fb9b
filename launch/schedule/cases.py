"""What `shardpage schedule` compiles: this library's kernel and JAX's own, in the same shapes."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardpage import page_attention
from shardpage.backends.pallas_tpu.config import configure
from shardpage.backends.pallas_tpu.sizes import Sizes
from shardpage.options import Tuning
from shardpage.page_format import PACKED_ROW, KVLayout, PageFormat

Kernel = Literal["fused", "separate", "stock"]
KERNELS: tuple[Kernel, ...] = ("fused", "separate", "stock")
# Pages of a block of JAX's kernel.
_STOCK_BLOCK_PAGES = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of one device, bfloat16.

    Attributes:
      name: as in the table.
      queries: query heads that share a KV head.
      num_kv_heads: local KV heads.
      page_size: tokens per page.
      head_dim: elements of a key.
      num_seqs: sequences.
      context: tokens of each.
      limit: most issue cycles over HBM cycles of the block loop that the better layout should
        take, on the chips before TPU7x and on TPU7x; None where there is no target.
    """

    name: str
    queries: int
    num_kv_heads: int
    page_size: int
    head_dim: int = 128
    num_seqs: int = 64
    context: int = 4096
    limit: tuple[float, float] | None = None

    @property
    def pack(self) -> int:
        """Tokens in a cache row."""
        return max(1, PACKED_ROW // self.head_dim)

    @property
    def max_pages(self) -> int:
        return self.context // self.page_size

    def page_format(self, kernel: Kernel) -> PageFormat:
        layouts = {"fused": KVLayout.FUSED, "stock": KVLayout.HEADS_FIRST}
        return PageFormat(
            layout=layouts.get(kernel, KVLayout.BLOCKS_FIRST),
            num_kv_heads=self.num_kv_heads,
            page_size=self.page_size,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=np.dtype(jnp.bfloat16),
            pack=1 if kernel == "stock" else self.pack,
        )


CASES = (
    Case("G8 K1 page 16", 8, 1, 16, limit=(0.85, 1.4)),
    Case("G8 K1 page 64", 8, 1, 64, limit=(0.40, 0.75)),
    Case("G8 K1 page 128", 8, 1, 128, limit=(0.40, 0.75)),
    Case("G4 K8 page 16", 4, 8, 16, limit=(0.70, 1.1)),
    Case("G4 K8 page 64", 4, 8, 64, limit=(0.30, 0.60)),
    Case("G1 K32 page 32", 1, 32, 32, limit=(0.60, 0.95)),
    Case("G8 K1 page 32 dim 64", 8, 1, 32, head_dim=64, limit=(1.2, 2.0)),
    Case("256 x 256 tokens, G8 K1 page 16", 8, 1, 16, num_seqs=256, context=256),
    Case("256 x 256 tokens, G4 K8 page 16", 4, 8, 16, num_seqs=256, context=256),
)


def limit(case: Case, kernel: Kernel, *, newest: bool) -> float | None:
    """The most that issue over HBM cycles should be; two arrays make twice the DMAs of a page."""
    if case.limit is None or kernel == "stock":
        return None
    small_pages = kernel == "separate" and case.page_size <= 32
    return round(case.limit[newest] * (1.4 if small_pages else 1.0), 2)


@dataclasses.dataclass(frozen=True)
class Program:
    """A case for one of the kernels.

    Attributes:
      block_pages: pages of one block.
      copies: DMAs per page.
      copy_bytes: bytes of each.
      ring_blocks: blocks that the kernel has room for; all but one are on their way.
      heads_a_block: KV heads that a block holds.
    """

    case: Case
    kernel: Kernel
    block_pages: int
    copies: int
    copy_bytes: int
    ring_blocks: int
    heads_a_block: int

    @property
    def block_bytes(self) -> int:
        """Keys and values of a block, as in HBM."""
        tokens = self.block_pages * self.case.page_size
        return tokens * self.heads_a_block * self.case.head_dim * 2 * 2


def program(case: Case, kernel: Kernel) -> Program:
    """The sizes that a kernel runs a case with; for the chip that is being compiled for."""
    token_bytes = case.page_size * case.head_dim * 2
    if kernel == "stock":
        pages = min(_STOCK_BLOCK_PAGES, case.max_pages)
        return Program(case, kernel, pages, 2, token_bytes, 2, heads_a_block=1)
    sizes = _sizes(case, kernel)
    copies = 1 if kernel == "fused" else 2
    page_bytes = 2 * token_bytes * case.num_kv_heads
    heads = case.num_kv_heads
    return Program(
        case, kernel, sizes.block_pages, copies, page_bytes // copies, sizes.ring_blocks, heads
    )


def _sizes(case: Case, kernel: Kernel) -> Sizes:
    page_format, num_heads = case.page_format(kernel), case.queries * case.num_kv_heads
    tuning = Tuning(cores="off")
    return configure(page_format, num_heads, case.num_seqs, case.max_pages, tuning).sizes


def lower(case: Case, kernel: Kernel, mesh: Mesh) -> Any:
    """Lowers a case for the device of `mesh`.

    Raises:
      ValueError: if JAX's kernel does not have the shape.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    num_heads = case.queries * case.num_kv_heads
    query = array((case.num_seqs, num_heads, case.head_dim), jnp.bfloat16)
    lens = array((case.num_seqs,), jnp.int32)
    tables = array((case.num_seqs, case.max_pages), jnp.int32)
    page_format = case.page_format(kernel)
    cache = array(page_format.array_shape(case.num_seqs * case.max_pages), jnp.bfloat16)
    if kernel == "stock":
        return jax.jit(_stock_attention(case)).lower(query, cache, cache, lens, tables)

    def attend(query, caches, lens, tables):
        key_cache, value_cache = (*caches, None)[:2]
        return page_attention(
            query, key_cache, value_cache, lens, tables, kv_layout=page_format.layout.label,
            megacore_mode="off", mesh=mesh,
        )  # fmt: skip

    return jax.jit(attend).lower(query, (cache,) * page_format.num_arrays, lens, tables)


def _stock_attention(case: Case):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    if case.head_dim % PACKED_ROW:
        raise ValueError(f"JAX's kernel has no head_dim {case.head_dim}")
    pages = min(_STOCK_BLOCK_PAGES, case.max_pages)
    return lambda query, keys, values, lens, tables: paged_attention(
        query, keys, values, lens, tables, pages_per_compute_block=pages
    )
