"""What a page of a KV cache is: the order of its axes, its sizes, its dtypes.

Whoever needs the bytes of a page, the shape of a cache array or its split asks its `PageFormat`.
"""

import dataclasses
import enum
import typing
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .arguments import shown

Axis = str | tuple[str, ...] | None
KVLayoutName = Literal["blocks_first", "heads_first", "fused"]

# Elements of a row that a TPU does not pad; rows of fewer may hold several tokens instead.
PACKED_ROW = 128


@dataclasses.dataclass(frozen=True)
class _Axes:
    pages: int
    heads: int
    ndim: int
    dims: str


class KVLayout(enum.Enum):
    """The order of a cache array's axes. The last two are always `page_size, dim`.

    They may be *packed*: `page_size / n, n * dim` with `n * dim == 128`, the same bytes in the same
    order. A TPU pads rows to 128 elements, so this halves the cache of head_dim 64.
    """

    BLOCKS_FIRST = _Axes(pages=0, heads=1, ndim=4, dims="[pages, kv_heads, page, dim]")
    HEADS_FIRST = _Axes(pages=1, heads=0, ndim=4, dims="[kv_heads, pages, page, dim]")
    FUSED = _Axes(pages=0, heads=2, ndim=5, dims="[pages, 2, kv_heads, page, dim]")

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

    @classmethod
    def of(cls, layout: KVLayout, array: Any, key_dim: int) -> "PageFormat":
        """Reads the format off a cache array, packed if its rows are wider than `key_dim`."""
        (rows, row_dim), dtype = array.shape[-2:], np.dtype(array.dtype)
        pack, num_kv_heads = row_dim // key_dim, array.shape[layout.value.heads]
        return cls(layout, num_kv_heads, rows * pack, key_dim, key_dim, dtype, pack)

    def packed(self, wanted: bool | None, on_tpu: bool) -> "PageFormat":
        """The same with as many tokens per row as fit; None packs where that pays."""
        pack, rest = divmod(PACKED_ROW, self.key_dim)
        possible = pack > 1 and rest == 0 and self.page_size % pack == 0
        if wanted and not possible:
            raise ValueError(
                f"packed=True needs a head_dim below {PACKED_ROW} that divides it, and a page_size "
                f"that is a multiple of {PACKED_ROW} // head_dim; got head_dim={self.key_dim}, "
                f"page_size={self.page_size}"
            )
        if wanted is None:  # rows that fill whole tiles of 8
            wanted = on_tpu and possible and self.page_size % (8 * pack) == 0
        return dataclasses.replace(self, pack=pack) if wanted else self

    @property
    def fused(self) -> bool:
        """Whether keys and values share one array (axis 1 tells them apart)."""
        return self.layout is KVLayout.FUSED

    @property
    def num_arrays(self) -> int:
        """Cache arrays: one of keys and one of values, or one of both."""
        return 1 if self.fused else 2

    @property
    def compute_dtype(self) -> np.dtype:
        """Of the matmul operands."""
        return self.dtype

    @property
    def page_rows(self) -> int:
        """Rows per page and KV head."""
        return self.page_size // self.pack

    @property
    def row_dim(self) -> int:
        """Elements per row."""
        return self.key_dim * self.pack

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """The axes of one page's array that come before its rows."""
        return (*((2,) if self.fused else ()), self.num_kv_heads)

    @property
    def page_shape(self) -> tuple[int, ...]:
        """One page of one cache array."""
        return (*self.heads_shape, self.page_rows, self.row_dim)

    @property
    def page_bytes(self) -> int:
        """Keys and values of one page, without padding."""
        elements = self.num_kv_heads * self.page_size * (self.key_dim + self.value_dim)
        return elements * self.dtype.itemsize

    def array_shape(self, num_pages: int) -> tuple[int, ...]:
        """The shape of (each of) the cache array(s)."""
        leading = [2] * (self.layout.value.ndim - 2)
        leading[self.layout.value.pages] = num_pages
        leading[self.layout.value.heads] = self.num_kv_heads
        return (*leading, self.page_rows, self.row_dim)

    def page_at(self, page: Any, heads: Any, rows: Any = slice(None)) -> tuple:
        """The index of (a part of) one page in a cache array."""
        match self.layout:
            case KVLayout.BLOCKS_FIRST:
                return (page, heads, rows)
            case KVLayout.HEADS_FIRST:
                return (heads, page, rows)
            case KVLayout.FUSED:
                return (page, slice(None), heads, rows)

    def to_arrays(self, key: Any, value: Any, stack: Any) -> Sequence[Any]:
        """Keys and values, one array each or, fused, as `stack([key, value])`."""
        return (stack([key, value]),) if self.fused else (key, value)
