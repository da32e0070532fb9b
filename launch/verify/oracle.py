"""Attention of one sequence in NumPy: what `shardpage verify` compares with.

It knows nothing of pages, blocks or meshes and shares no code with the library.
"""

from typing import Any

import ml_dtypes
import numpy as np


def largest(dtype: str) -> float:
    """The largest number that a quantised cache stores."""
    return 127.0 if dtype == "int8" else float(ml_dtypes.finfo(dtype).max)


def quantised(
    tokens: np.ndarray, dtype: str, scales: np.ndarray | None = None, scale_dtype: str = "float32"
) -> np.ndarray:
    """What a quantised cache gives back of tokens, `[..., head_dim]` in float32.

    Args:
      tokens: of any float dtype, finite.
      dtype: int8 or an fp8.
      scales: what they are multiples of, of a shape that broadcasts against theirs; None for the
        largest element of each row over the largest number that is stored.
      scale_dtype: rounds those of None to this.
    """
    exact, most = tokens.astype(np.float32), np.float32(largest(dtype))
    if scales is None:
        peak = np.abs(exact).max(axis=-1, keepdims=True) / most
        scales = np.maximum(peak, np.finfo(np.float32).tiny).astype(np.dtype(scale_dtype))
    scales = np.asarray(scales, np.float32)
    elements = np.clip(exact / scales, -most, most)
    stored = np.rint(elements) if dtype == "int8" else elements.astype(np.dtype(dtype))
    return stored.astype(np.float32) * scales


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    precision: Any = np.float64,
    weights_dtype: Any = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attends one query token to the tokens before it.

    Args:
      query: [num_heads, head_dim].
      keys: [num_tokens, num_kv_heads, head_dim].
      values: as keys.
      precision: float64 for the exact result; float32 for what honest low precision makes of it,
        softmax weights and results rounded to `weights_dtype` and that of the query.
      weights_dtype: None for that of the values.
      window: attend to the last this many tokens only.
      soft_cap: bound of the logits.
      sinks: [num_heads], logits without a value.

    Returns:
      (out [num_heads, head_dim], lse [num_heads]); zeros and -inf if there is nothing to see.
    """
    num_heads, head_dim = query.shape
    queries_per_kv_head = num_heads // keys.shape[1]
    out, lse = np.zeros((num_heads, head_dim), precision), np.full(num_heads, -np.inf, precision)
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    exact = precision == np.float64
    for head in range(num_heads):
        key, value = (x[:, head // queries_per_kv_head].astype(precision) for x in (keys, values))
        logits = key @ query[head].astype(precision) * precision(head_dim**-0.5)
        if soft_cap is not None:
            logits = precision(soft_cap) * np.tanh(logits / precision(soft_cap))
        seen = logits if sinks is None else np.append(logits, sinks[head].astype(precision))
        if not seen.size:
            continue
        peak = seen.max()
        total = np.exp(seen - peak).sum()
        weights = np.exp(logits - peak)
        if not exact:
            weights = weights.astype(weights_dtype or values.dtype).astype(precision)
        out[head] = weights @ value / total
        lse[head] = peak + np.log(total)
    return (out if exact else out.astype(query.dtype).astype(precision)), lse
