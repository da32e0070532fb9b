"""The scales that a quantised cache is given: which they are, and that they are right."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .arguments import array, shown
from .page_format import QUANTISED, SCALE_DTYPE, SMALLEST_SCALE, PageFormat, ScaleOf


def option(scales: Any, dtype: np.dtype) -> ScaleOf:
    """What one scale of a new cache covers, from the option that says so."""
    if dtype.name not in QUANTISED:
        if scales is not None:
            raise ValueError(
                f"scales={shown(scales)} of a cache of {dtype.name}, which has none; leave them "
                f"out, or choose dtype of {QUANTISED}"
            )
        return "none"
    if scales is None or (isinstance(scales, str) and scales == "token"):
        return "token"
    if isinstance(scales, str) and scales == "head":
        return "head"
    raise ValueError(f"scales={shown(scales)} must be 'token', 'head' or, of zeros, a pair")


def of_heads(pair: Any, num_kv_heads: int, num_layers: int | None) -> jax.Array:
    """`[kv_heads, 2]` of a pair of arrays `[kv_heads]`; of several layers `[layers, ...]`."""
    wanted = (num_kv_heads,) if num_layers is None else (num_layers, num_kv_heads)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"scales={shown(pair)} must be a pair of arrays {wanted}: of keys and of values"
        )
    scales = [x if isinstance(x, jax.Array) else np.asarray(x) for x in pair]
    for name, x in zip(("key", "value"), scales, strict=True):
        if x.shape != wanted or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} scales are {x.dtype}{list(x.shape)}; this cache takes one of each KV "
                f"head, floating point: {wanted}"
            )
        if not isinstance(x, Tracer):
            held = np.asarray(x).astype(SCALE_DTYPE)
            if not (np.isfinite(held) & (held >= SMALLEST_SCALE)).all():
                raise ValueError(
                    f"{name} scales must be at least {SMALLEST_SCALE:.3g}, float32's smallest, "
                    f"and finite; got {shown(x)}"
                )
    return jnp.stack([jnp.asarray(x, SCALE_DTYPE) for x in scales], axis=-1)


def arrays(
    scales: Any, page_format: PageFormat, num_pages: int, num_layers: int | None
) -> tuple[Any, ...]:
    """The scales of a cache of a caller's arrays, which has this format but for them."""
    dtype = page_format.dtype
    if not page_format.quantised:
        if scales is not None and not (isinstance(scales, tuple) and not scales):
            raise ValueError(f"scales of a cache of {dtype.name}, which has none; leave them out")
        return ()
    layers = () if num_layers is None else (num_layers,)
    by_token, by_head = (
        (*layers, *dataclasses.replace(page_format, scale=scale).scales_shape(num_pages))
        for scale in ("token", "head")
    )
    if scales is None:
        raise ValueError(
            f"a cache of {dtype.name} has scales; pass scales=, an array {by_token} of each "
            "token's, or a pair of arrays of each KV head's"
        )
    if isinstance(scales, tuple | list) and len(scales) == 2:
        return (of_heads(scales, page_format.num_kv_heads, num_layers),)
    scales = scales[0] if isinstance(scales, tuple) and len(scales) == 1 else scales
    array("scales", scales)
    if scales.dtype != SCALE_DTYPE or scales.shape not in (by_token, by_head):
        raise ValueError(
            f"scales are {scales.dtype}{list(scales.shape)}; this cache takes float32 {by_token}, "
            f"of each token, or {by_head}, of each KV head"
        )
    return (scales,)
