"""What a page of a KV cache is: the order of its axes, its sizes, its dtypes.

Whoever needs the bytes of a page, the shape of a cache array or its split asks its `PageFormat`.
"""

import dataclasses
import enum
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import shown

Axis = str | tuple[str, ...] | None
KVLayoutName = Literal[
    "blocks_first", "heads_first", "fused", "tokens_first", "interleaved", "interleaved_words"
]

# Elements of a row that a TPU does not pad; rows of fewer may hold several tokens instead.
PACKED_ROW = 128

# What one scale of a quantised cache covers.
ScaleOf = Literal["none", "head", "token"]
# Stored with scales; all of them are exact in bfloat16, which matmuls take.
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
SCALE_DTYPE = np.dtype(np.float32)
SMALLEST_SCALE = float(np.finfo(SCALE_DTYPE).smallest_normal)


def updates_widen(dtype: np.dtype) -> bool:
    """Whether XLA's CPU compiler (of jaxlib 0.10) makes a wide copy of a whole array of it around
    a scatter or a dynamic_update_slice."""
    narrow = dtype.name == "bfloat16" or dtype.name.startswith("float8")
    return narrow and jax.__version_info__ < (0, 11)


@dataclasses.dataclass(frozen=True)
class _Axes:
    pages: int
    heads: int  # the one that a mesh splits
    ndim: int
    dims: str
    token_major: bool = False


class KVLayout(enum.Enum):
    """The order of a cache array's axes.

    Of the first three the last two axes are `page, dim`. They may be *packed*: `page / n, n * dim`
    with `n * dim == 128`, the same bytes in the same order. A TPU pads rows to 128 elements, so
    this halves the cache of head_dim 64.

    The other three are *token-major*, as other libraries keep pages: all heads of a token lie
    together. In the interleaved ones key and value of a head are neighbours (k0 v0 k1 v1 ...), and
    in the last of them `n` rows share 32-bit words, as a TPU keeps them anyhow.
    """

    BLOCKS_FIRST = _Axes(pages=0, heads=1, ndim=4, dims="[pages, kv_heads, page, dim]")
    HEADS_FIRST = _Axes(pages=1, heads=0, ndim=4, dims="[kv_heads, pages, page, dim]")
    FUSED = _Axes(pages=0, heads=2, ndim=5, dims="[pages, 2, kv_heads, page, dim]")
    TOKENS_FIRST = _Axes(0, 2, 4, "[pages, page, kv_heads, dim]", token_major=True)
    INTERLEAVED = _Axes(0, 2, 4, "[pages, page, 2 * kv_heads, dim]", token_major=True)
    INTERLEAVED_WORDS = _Axes(0, 2, 5, "[pages, page, 2 * kv_heads / n, n, dim]", token_major=True)

    @property
    def label(self) -> KVLayoutName:
        """The name by which callers ask for it."""
        return typing.cast(KVLayoutName, self.name.lower())

    @classmethod
    def named(cls, name: Any) -> "KVLayout":
        """The layout of this name; a ValueError if there is none."""
        names = typing.get_args(KVLayoutName)
        if name not in names:
            raise ValueError(f"kv_layout={shown(name)} is unknown; choose one of {names}")
        return cls[name.upper()]

    @property
    def token_major(self) -> bool:
        """Whether all heads of a token lie together."""
        return self.value.token_major

    @property
    def interleaved(self) -> bool:
        """Whether key and value of a head are neighbours."""
        return self in (KVLayout.INTERLEAVED, KVLayout.INTERLEAVED_WORDS)


@dataclasses.dataclass(frozen=True)
class PageFormat:
    """One page, on one device or on all of them: only `num_kv_heads` differs."""

    layout: KVLayout
    num_kv_heads: int
    page_size: int  # tokens per page
    key_dim: int  # elements of a key
    value_dim: int  # of a value; equal to key_dim in all layouts so far
    dtype: np.dtype  # as stored
    pack: int = 1  # tokens per row of a cache array
    padding: int = 0  # elements behind each key and each value that hold nothing; token-major only
    word: tuple[int, int] | None = None  # the last two axes of INTERLEAVED_WORDS
    scale: ScaleOf = "none"  # what one scale covers, of keys and of values

    @classmethod
    def of(
        cls,
        layout: KVLayout,
        array: Any,
        key_dim: int,
        padding: int = 0,
        scale: ScaleOf = "none",
    ) -> "PageFormat":
        """Reads the format off a cache array, packed if its rows are wider than `key_dim`."""
        dtype = np.dtype(array.dtype)
        if layout.token_major:
            page_size, *token = array.shape[1:]
            num_kv_heads = math.prod(token) // (key_dim + padding) // (1 + layout.interleaved)
            word = tuple(token[1:]) if layout is KVLayout.INTERLEAVED_WORDS else None
            sizes = (num_kv_heads, page_size, key_dim, key_dim)
            return cls(layout, *sizes, dtype, padding=padding, word=word, scale=scale)
        rows, row_dim = array.shape[-2:]
        pack, num_kv_heads = row_dim // key_dim, array.shape[layout.value.heads]
        sizes = (num_kv_heads, rows * pack, key_dim, key_dim)
        return cls(layout, *sizes, dtype, pack, scale=scale)

    def packed(self, wanted: bool | None, on_tpu: bool) -> "PageFormat":
        """The same with as many tokens per row as fit, or in words; None packs where that pays."""
        if self.layout is KVLayout.INTERLEAVED_WORDS:
            return self._in_words(wanted)
        pack, rest = divmod(PACKED_ROW, self.key_dim)
        possible = pack > 1 and rest == 0 and self.page_size % pack == 0
        if wanted and self.layout.token_major:
            raise ValueError(
                f"packed=True puts several tokens in a row; in {self.layout.label} pages the heads "
                "of a token lie between: use packed=None, or kv_layout='interleaved_words'"
            )
        if wanted and not possible:
            raise ValueError(
                f"packed=True needs a head_dim below {PACKED_ROW} that divides it, and a page_size "
                f"that is a multiple of {PACKED_ROW} // head_dim; got head_dim={self.key_dim}, "
                f"page_size={self.page_size}"
            )
        if wanted is None:  # rows that fill whole tiles of 8
            wanted = on_tpu and possible and self.page_size % (8 * pack) == 0
            wanted &= not self.layout.token_major
        return dataclasses.replace(self, pack=pack) if wanted else self

    def _in_words(self, shared: bool | None) -> "PageFormat":
        """Rows of a multiple of 128 elements; key and value share one where it holds just both."""
        fits = 2 * self.key_dim == PACKED_ROW
        if shared and not fits:
            raise ValueError(
                f"packed=True puts key and value of a head in one row of {PACKED_ROW} elements; "
                f"head_dim={self.key_dim} is not half of it: use packed=None"
            )
        shared = fits if shared is None else shared
        width = PACKED_ROW if shared else -(-self.key_dim // PACKED_ROW) * PACKED_ROW
        rows_per_word = 4 // self.dtype.itemsize
        if self.num_kv_heads * (1 if shared else 2) % rows_per_word:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} of {self.dtype.name} do not fill words of "
                f"{rows_per_word} heads; use a multiple of it, or packed=False"
            )
        padding = 0 if shared else width - self.key_dim
        return dataclasses.replace(self, padding=padding, word=(rows_per_word, width))

    @property
    def fused(self) -> bool:
        """Whether keys and values share one array (axis 1 tells them apart)."""
        return self.layout is KVLayout.FUSED

    @property
    def num_arrays(self) -> int:
        """Cache arrays: one of keys and one of values, or one of both."""
        return 1 if self.fused or self.layout.interleaved else 2

    @property
    def compute_dtype(self) -> np.dtype:
        """Of the matmul operands."""
        return np.dtype(jnp.bfloat16) if self.quantised else self.dtype

    @property
    def quantised(self) -> bool:
        """Whether elements are multiples of a scale."""
        return self.dtype.name in QUANTISED

    @property
    def page_rows(self) -> int:
        """Rows per page and KV head."""
        return self.page_size // self.pack

    @property
    def row_dim(self) -> int:
        """Elements per row, with what pads it."""
        return (self.key_dim + self.padding) * self.pack if self.word is None else self.word[1]

    @property
    def shares_rows(self) -> bool:
        """Whether key and value of a head are one row of a word."""
        return self.word is not None and self.row_dim != self.key_dim + self.padding

    @property
    def first_value(self) -> int:
        """Where a value begins in its row."""
        return self.key_dim if self.shares_rows else 0

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """The axes of one page's array that come before its rows."""
        return (*((2,) if self.fused else ()), self.num_kv_heads)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """One token of one array of a token-major cache; the first axis is split over a mesh."""
        width = self.key_dim + self.padding
        rows = self.num_kv_heads * (1 + self.layout.interleaved)
        return (
            (rows, width)
            if self.word is None
            else (rows * width // math.prod(self.word), *self.word)
        )

    @property
    def page_shape(self) -> tuple[int, ...]:
        """One page of one cache array."""
        if self.layout.token_major:
            return (self.page_size, *self.token_shape)
        return (*self.heads_shape, self.page_rows, self.row_dim)

    @property
    def page_bytes(self) -> int:
        """Keys and values of one page, and the scales of its tokens, without padding."""
        elements = self.num_kv_heads * self.page_size * (self.key_dim + self.value_dim)
        scales = math.prod(self.page_scales_shape) if self.scale == "token" else 0
        return elements * self.dtype.itemsize + scales * SCALE_DTYPE.itemsize

    @property
    def page_scales_shape(self) -> tuple[int, ...]:
        """Scales of one page's tokens: per KV head those of its keys, then those of its values.

        Tokens lie along the last axis, which a TPU pads to 128, alone in rows, which it does not
        pad then.
        """
        return (self.num_kv_heads, 1, 2 * self.page_size)

    def scales_shape(self, num_pages: int) -> tuple[int, ...]:
        """The shape of the array of scales: of pages, or of key and value of each KV head."""
        if self.scale == "head":
            return (self.num_kv_heads, 2)
        return (num_pages, *self.page_scales_shape)

    def scale_lane(self, slot: Any) -> Any:
        """Where the scale of a key is among those of its page's keys; a value's is as far behind.

        Like tokens in packed rows: first those that begin a row, then those that follow them.
        """
        return slot if self.pack == 1 else slot % self.pack * self.page_rows + slot // self.pack

    def scales_by_token(self, scales: Any) -> tuple[Any, Any]:
        """Scales `[..., 1, 2 * page_size]` of pages as those of keys and of values, `[..., tokens]`
        in the order of tokens."""
        by_row = scales.reshape(*scales.shape[:-2], 2, self.pack, self.page_rows)
        key, value = jnp.moveaxis(by_row.mT, -3, 0)
        return tuple(x.reshape(*x.shape[:-2], self.page_size) for x in (key, value))

    def scales_in_pages(self, key: Any, value: Any) -> Any:
        """The reverse."""
        both = jnp.stack([key, value], axis=-2)
        by_row = both.reshape(*both.shape[:-1], self.page_rows, self.pack).mT
        return by_row.reshape(*key.shape[:-1], 1, 2 * self.page_size)

    def array_shape(self, num_pages: int) -> tuple[int, ...]:
        """The shape of (each of) the cache array(s)."""
        if self.layout.token_major:
            return (num_pages, *self.page_shape)
        leading = [2] * (self.layout.value.ndim - 2)
        leading[self.layout.value.pages] = num_pages
        leading[self.layout.value.heads] = self.num_kv_heads
        return (*leading, self.page_rows, self.row_dim)

    def page_at(self, page: Any, heads: Any, rows: Any = slice(None)) -> tuple:
        """The index of (a part of) one page in a cache array that is not token-major."""
        match self.layout:
            case KVLayout.BLOCKS_FIRST:
                return (page, heads, rows)
            case KVLayout.HEADS_FIRST:
                return (heads, page, rows)
            case KVLayout.FUSED:
                return (page, slice(None), heads, rows)
            case _:
                raise AssertionError(f"heads of {self.layout} pages are not contiguous")

    def to_arrays(self, key: Any, value: Any, stack: Any) -> Sequence[Any]:
        """Keys and values, one array each or, fused, as `stack([key, value])`."""
        return (stack([key, value]),) if self.fused else (key, value)

    def join_tokens(self, key: Any, value: Any) -> Sequence[Any]:
        """Tokens `[..., kv_heads, dim]` as `[..., *token_shape]` of each token-major array."""
        if self.padding:
            pad = [(0, 0)] * (key.ndim - 1) + [(0, self.padding)]
            key, value = jnp.pad(key, pad), jnp.pad(value, pad)
        if not self.layout.interleaved:
            return (key, value)
        both = jnp.stack([key, value], axis=-2)
        return (both.reshape(*key.shape[:-2], *self.token_shape),)

    def split_tokens(self, arrays: Sequence[Any]) -> tuple[Any, Any]:
        """The reverse: keys and values `[..., kv_heads, dim]`, without padding."""
        if self.layout.interleaved:
            (both,) = arrays
            lead = both.shape[: -len(self.token_shape)]
            both = both.reshape(*lead, self.num_kv_heads, 2, self.key_dim + self.padding)
            arrays = both[..., 0, :], both[..., 1, :]
        key, value = (x[..., : self.key_dim] for x in arrays)
        return key, value
