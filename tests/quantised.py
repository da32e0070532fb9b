"""The oracle of quantised pages: NumPy and ml_dtypes, no code of the library.

An element is what is stored times a scale, of its token and KV head, or of its KV head alone.
"""

import dataclasses

import ml_dtypes
import numpy as np

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
SCALES = ("token", "head")

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
_SMALLEST_SCALE = np.float32(2.0**-126)


def dtype_of(name: str) -> np.dtype:
    """The dtype of this name."""
    return np.dtype(np.int8 if name == "int8" else getattr(ml_dtypes, name))


def rounded(elements: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 numbers to the nearest that is stored, to even between two; clipped."""
    elements = np.clip(elements, -LARGEST[dtype], LARGEST[dtype])
    return (np.rint(elements) if dtype == "int8" else elements).astype(dtype_of(dtype))


def scales_of(tokens: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 scales `[...]` of tokens `[..., dim]`: largest element over largest number, as a
    product with its reciprocal."""
    largest = np.abs(tokens.astype(np.float32)).max(axis=-1)
    return np.maximum(largest * np.float32(1 / LARGEST[dtype]), _SMALLEST_SCALE)


def calibrated(tokens: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 scales `[kv_heads]` of tokens `[..., kv_heads, dim]`, by which a few are clipped."""
    by_head = np.moveaxis(np.nan_to_num(tokens.astype(np.float32)), -2, 0)
    return scales_of(by_head.reshape(len(by_head), -1) * np.float32(0.75), dtype)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys, or values: pages of tokens as they are stored, and what they stand for."""

    stored: np.ndarray  # [pages, page, kv_heads, dim], in the dtype of the cache
    scales: np.ndarray  # [pages, page, kv_heads] or [kv_heads] float32
    exact: np.ndarray  # [pages, page, kv_heads, dim] float64, NaN where nothing must be read

    @property
    def with_folded(self) -> np.ndarray:
        """`[pages, page, kv_heads, dim + 1]`: behind each token what folds into its weight."""
        folded = self.scales if self.scales.ndim == 3 else np.ones(self.exact.shape[:3])
        return np.append(self.exact, folded[..., None], axis=-1)


def pages_of(tokens: np.ndarray, dtype: str, scales: np.ndarray | None, kept: np.ndarray) -> Pages:
    """Quantises tokens `[pages, page, kv_heads, dim]`, by scales of their KV heads or, None, of
    their own; poisons what is not kept `[pages, page]`.

    Poison is what reads as NaN, or if there is no such number, as the largest there is: of fp8 NaN
    elements, of int8 127 and -128; and scales that are NaN.
    """
    tokens, by_token = tokens.astype(np.float32), scales is None
    scales = scales_of(tokens, dtype) if scales is None else scales
    stored = rounded(tokens / scales[..., None], dtype)
    exact = stored.astype(np.float64) * scales[..., None].astype(np.float64)
    poison = np.where(np.arange(tokens.shape[-1]) % 2, 127, -128)
    poison = poison.astype(np.int8) if dtype == "int8" else np.array(np.nan, stored.dtype)
    if by_token:
        scales = np.where(kept[..., None], scales, np.float32(np.nan))
    kept = kept[..., None, None]
    return Pages(np.where(kept, stored, poison), scales, np.where(kept, exact, np.nan))


def lay_out_scales(key: np.ndarray, value: np.ndarray, pack: int = 1) -> np.ndarray:
    """Scales `[pages, page, kv_heads]` as a cache keeps them: `[pages, kv_heads, 1, 2 * page]`.

    First those of the keys; of a packed cache first those of the tokens that begin a row.
    """
    num_pages, page_size, num_kv_heads = key.shape
    order = [token for place in range(pack) for token in range(place, page_size, pack)]
    lanes = [array[:, token] for array in (key, value) for token in order]
    return np.stack(lanes, axis=-1).reshape(num_pages, num_kv_heads, 1, 2 * page_size)


def plain_token(query, keys, values, scale, soft_cap, sinks):
    """One token's (out, lse), as `reference` has it, by matmuls whose operands are bfloat16.

    What is stored is exact in bfloat16, so what is rounded is the query, and the weights times what
    folds into them, the last of a value's elements (see `with_folded`).
    """
    values, folded = values[..., :-1], values[..., -1]
    short = lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)
    num_heads, num_kv_heads = len(query), keys.shape[1]
    out, lse = np.zeros_like(query), np.full(num_heads, -np.inf)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        logits = scale * (keys[:, kv_head] @ short(query[head]))
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        sink = -np.inf if sinks is None else float(sinks[head])
        peak = np.max(np.append(logits, sink))
        if peak == -np.inf:
            continue
        weights = np.exp(logits - peak)
        total = weights.sum() + np.exp(sink - peak)
        lse[head] = peak + np.log(total)
        stored = values[:, kv_head] / folded[:, kv_head, None]
        out[head] = short(weights * folded[:, kv_head]) @ stored / total
    return out, lse
