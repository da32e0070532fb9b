"""The shapes that are measured, by name."""

import dataclasses
import zlib
from typing import Literal

import jax.numpy as jnp
import numpy as np

from shardpage.page_format import QUANTISED, SCALE_DTYPE

Suite = Literal["quick", "full"]
SUITES: tuple[Suite, ...] = ("quick", "full")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decode step: one query token per sequence.

    Attributes:
      name: unique; the tests and reports use it.
      num_seqs: number of sequences.
      context: tokens that one row of the block tables has room for.
      lens: context lengths: "full", "skewed" (512 tokens each, but one full), or the bounds
        between which they are drawn uniformly.
      dtype: dtype of caches, and of queries unless it is quantised.
    """

    name: str
    num_seqs: int
    context: int
    lens: Literal["full", "skewed"] | tuple[int, int] = "full"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"

    @property
    def context_lens(self) -> np.ndarray:
        """[num_seqs] int32, the same in every process."""
        if self.lens == "full":
            lens = np.full(self.num_seqs, self.context)
        elif self.lens == "skewed":
            lens = np.full(self.num_seqs, 512)
            lens[self.num_seqs // 2] = self.context
        else:
            rng = np.random.default_rng(zlib.crc32(self.name.encode()))
            lens = rng.integers(self.lens[0], self.lens[1] + 1, size=self.num_seqs)
        return lens.astype(np.int32)

    @property
    def max_blocks(self) -> int:
        """Pages per row of the block tables."""
        return -(-self.context // self.page_size)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def query_dtype(self) -> str:
        return "bfloat16" if self.dtype in QUANTISED else self.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token, and of their scales."""
        scale = SCALE_DTYPE.itemsize if self.dtype in QUANTISED else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.itemsize + scale)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one call must read."""
        return int(self.context_lens.sum(dtype=np.int64)) * self.token_bytes


# Larger than a CPU's caches, and small enough to wait for.
CPU_QUICK = (
    Shape("8 x 2048, f32", 8, 2048, dtype="float32"),
    Shape("8 x 10..900 of 2048, f32", 8, 2048, (10, 900), dtype="float32"),
    Shape("1 x 32768, f32", 1, 32768, dtype="float32"),
    Shape("8 x 2048, bf16", 8, 2048),
)
CPU_FULL = (
    *CPU_QUICK,
    Shape("1 x 32768, bf16", 1, 32768),
    Shape("64 x 1..512, f32", 64, 512, (1, 512), dtype="float32"),
    Shape("7 x 512 and 1 x 16384, f32", 8, 16384, "skewed", dtype="float32"),
    Shape("8 x 2048, f32, page 64", 8, 2048, page_size=64, dtype="float32"),
    Shape("8 x 2048, f32, 32/32 heads", 8, 2048, num_kv_heads=32, dtype="float32"),
    Shape("8 x 4096, f32, 8/1 heads, dim 256", 8, 4096, num_heads=8, num_kv_heads=1, head_dim=256,
          dtype="float32"),
    Shape("8 x 2048, f32, dim 64", 8, 2048, head_dim=64, dtype="float32"),
)  # fmt: skip

# Larger than an accelerator's caches.
QUICK = (
    Shape("64 x 4096", 64, 4096),
    Shape("1 x 131072", 1, 131072),
    Shape("64 x 1..8192", 64, 8192, (1, 8192)),
    Shape("63 x 512 and 1 x 65536", 64, 65536, "skewed"),
)
FULL = (
    *QUICK,
    Shape("16 x 8192", 16, 8192),
    Shape("256 x 1024", 256, 1024),
    Shape("64 x 4096, 64/8 heads, page 64", 64, 4096, num_heads=64, page_size=64),
    Shape("256 x 1..4096, page 64", 256, 4096, (1, 4096), page_size=64),
    Shape("64 x 4096, 32/32 heads", 64, 4096, num_kv_heads=32),
    Shape("256 x 8192, 8/1 heads, page 128", 256, 8192, num_heads=8, num_kv_heads=1, page_size=128),
    Shape("64 x 4096, dim 64", 64, 4096, head_dim=64),
    Shape("32 x 4096, dim 256", 32, 4096, head_dim=256),
    Shape("32 x 4096, f32", 32, 4096, dtype="float32"),
)
# Larger than a GPU's caches.
GPU_FULL = (
    *FULL,
    Shape("16 x 8192, 64/8 heads, page 64", 16, 8192, num_heads=64, page_size=64),
    Shape("1 x 131072, 64/8 heads, page 64", 1, 131072, num_heads=64, page_size=64),
    Shape("8 x 32768, 8/1 heads, page 64", 8, 32768, num_heads=8, num_kv_heads=1, page_size=64),
)
SHAPES = (*CPU_FULL, *GPU_FULL)


def decode_shapes(platform: str, suite: Suite) -> tuple[Shape, ...]:
    """The shapes of a decode bench on a platform ("cpu", "gpu", "tpu")."""
    if platform == "cpu":
        return CPU_QUICK if suite == "quick" else CPU_FULL
    return QUICK if suite == "quick" else {"gpu": GPU_FULL}.get(platform, FULL)


def quantised_shapes(platform: str, suite: Suite) -> tuple[Shape, ...]:
    """Those of them that are bfloat16, which caches of other dtypes are compared with."""
    return tuple(s for s in decode_shapes(platform, suite) if s.dtype == "bfloat16")


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole step: several query tokens per sequence, the last of its context.

    Attributes:
      name: unique; reports use it.
      seqs: (context length, query length) of each sequence; those of one query come first.
      dtype: dtype of queries and caches.
    """

    name: str
    seqs: tuple[tuple[int, int], ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"

    @property
    def context_lens(self) -> np.ndarray:
        """[num_seqs] int32."""
        return np.array([context for context, _ in self.seqs], np.int32)

    @property
    def query_lens(self) -> np.ndarray:
        """[num_seqs] int32."""
        return np.array([queries for _, queries in self.seqs], np.int32)

    @property
    def num_queries(self) -> int:
        """Query tokens of the step, all sequences together."""
        return int(self.query_lens.sum())

    @property
    def num_reads(self) -> int:
        """Pairs of a query token and a token that it sees."""
        return sum(queries * (2 * context - queries + 1) // 2 for context, queries in self.seqs)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, of what is seen alone."""
        return 4 * self.num_heads * self.head_dim * self.num_reads

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one call must read, once."""
        itemsize = jnp.dtype(self.dtype).itemsize
        token_bytes = 2 * self.num_kv_heads * self.head_dim * itemsize
        return int(self.context_lens.sum(dtype=np.int64)) * token_bytes


def _prompts_and_rows(num_prompts: int, num_rows: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Rows that decode, and prompts; lengths drawn from 10 to the longest."""
    lens = np.random.default_rng(0).integers(10, longest + 1, num_prompts + num_rows).tolist()
    return (*((n, 1) for n in lens[num_prompts:]), *((n, n) for n in lens[:num_prompts]))


CPU_STEPS = (
    Step("chunk of 1024 on 4096, f32", ((5120, 1024),), dtype="float32"),
    Step("16 prompts and 48 rows of 10..700, f32", _prompts_and_rows(16, 48, 700), dtype="float32"),
    Step("8 x 5 guesses on 2048, f32", ((2053, 5),) * 8, dtype="float32"),
)
CPU_STEPS_FULL = (
    *CPU_STEPS,
    *(dataclasses.replace(s, name=s.name[:-3] + "bf16", dtype="bfloat16") for s in CPU_STEPS),
)
STEPS = (
    Step("chunk of 2048 on 16384", ((18432, 2048),)),
    Step("16 prompts and 240 rows of 10..4000", _prompts_and_rows(16, 240, 4000)),
    Step("64 x 5 guesses on 4096", ((4101, 5),) * 64),
)
STEPS_FULL = (
    *STEPS,
    Step("64 x 4 guesses on 4096", ((4096, 4),) * 64),
    Step("64 x 8 guesses on 4096", ((4096, 8),) * 64),
    Step("64 x 8 guesses on 4096, 64/8 heads, page 64", ((4096, 8),) * 64, num_heads=64,
         page_size=64),
    Step("prompt of 4096 on 4096", ((8192, 4096),)),
    Step("prompt of 4096 on 4096, page 64", ((8192, 4096),), page_size=64),
    *(dataclasses.replace(s, name=f"{s.name}, f32", dtype="float32") for s in STEPS[1:]),
)  # fmt: skip


def step_shapes(platform: str, suite: Suite) -> tuple[Step, ...]:
    """The shapes of a bench of steps on a platform ("cpu", "gpu", "tpu")."""
    if platform == "cpu":
        return CPU_STEPS if suite == "quick" else CPU_STEPS_FULL
    return STEPS if suite == "quick" else STEPS_FULL


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens to write: `each` per sequence of `num_seqs`."""

    name: str
    num_seqs: int
    each: int
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    context: int = 2048
    dtype: str = "bfloat16"

    @property
    def written_bytes(self) -> int:
        """Bytes of keys and values of the new tokens."""
        shape = Shape("", self.num_seqs, self.context, num_kv_heads=self.num_kv_heads,
                      head_dim=self.head_dim, dtype=self.dtype)  # fmt: skip
        return self.num_seqs * self.each * shape.token_bytes


WRITES_QUICK = (Tokens("append to 64", 64, 1), Tokens("prefill 4 x 512", 4, 512))
WRITES_FULL = (
    *WRITES_QUICK,
    Tokens("append to 8", 8, 1),
    Tokens("append to 256", 256, 1),
    Tokens("append to 64, f32", 64, 1, dtype="float32"),
    Tokens("prefill 1 x 2048, page 64", 1, 2048, page_size=64),
)


def write_shapes(suite: Suite) -> tuple[Tokens, ...]:
    """The shapes of a write bench."""
    return WRITES_QUICK if suite == "quick" else WRITES_FULL


def sharded_shapes(platform: str, suite: Suite, num_devices: int) -> dict[str, tuple[Shape, ...]]:
    """The one-device work of a sharded bench: many sequences, and a long one.

    The full suite has small work as well, where fixed costs show.
    """
    if platform == "cpu":
        return {
            "many": (Shape("8 x 2048, f32", 8, 2048, dtype="float32"),),
            "long": (Shape("1 x 32768, f32", 1, 32768, dtype="float32"),),
        }
    many = (Shape("128 x 8192", 128, 8192), Shape("64 x 4096", 64, 4096))
    long = (Shape("1 x 131072", 1, 131072), Shape("1 x 524288", 1, 524288))
    if suite == "quick":
        many, long = many[:1], long[:1] if num_devices <= 2 else long[1:]
    return {"many": many, "long": long}
