"""The implementations that are measured: this library, and what a user would pick instead.

Each entry makes a function `(query, key, value, lens, tables) -> out` and names the layout of the
caches that it takes. One that cannot run here raises `Unavailable` with the reason.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardpage import page_attention

from .report import OURS
from .shapes import Shape

Attend = Callable[..., Any]
Build = Callable[[Shape, str], tuple[Attend, str]]


class Unavailable(Exception):
    """The implementation does not run here; the message says why."""


def shardpage(shape: Shape, platform: str) -> tuple[Attend, str]:
    """This library, with its defaults."""
    return functools.partial(page_attention, kv_layout="blocks_first"), "blocks_first"


def portable(shape: Shape, platform: str) -> tuple[Attend, str]:
    """This library's XLA backend, which GPUs older or newer than Hopper get."""
    if platform != "gpu":
        raise Unavailable("is the default of CPUs, and no choice for TPUs")
    attend = functools.partial(page_attention, kv_layout="blocks_first", backend="xla")
    return attend, "blocks_first"


def gather(shape: Shape, platform: str) -> tuple[Attend, str]:
    """Plain XLA: gathers every page of the tables, then one softmax over all tokens."""
    limit = {"cpu": 8 << 30}.get(platform, 40 << 30)
    gathered = shape.num_seqs * shape.context * shape.token_bytes
    if gathered > limit:
        raise Unavailable(f"would gather {gathered >> 30} GiB")

    def attend(query, key, value, lens, tables):
        num_seqs, _, head_dim = query.shape
        keys, values = (  # [seqs, kv_heads, tokens, dim]
            cache[tables].swapaxes(1, 2).reshape(num_seqs, cache.shape[1], -1, head_dim)
            for cache in (key, value)
        )
        grouped = query.reshape(num_seqs, keys.shape[1], -1, head_dim)
        # Without it a GPU multiplies float32 as TF32, with 10 bits, and misses the oracle.
        precision = "highest" if query.dtype == jnp.float32 else None
        einsum = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=jnp.float32
        )
        logits = einsum("skgd,sktd->skgt", grouped, keys) * head_dim**-0.5
        seen = jnp.arange(keys.shape[2]) < lens[:, None]
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        out = einsum("skgt,sktd->skgd", weights, values)
        return out.reshape(query.shape).astype(query.dtype)

    return attend, "blocks_first"


def stock(shape: Shape, platform: str) -> tuple[Attend, str]:
    """JAX's own `paged_attention`: Triton on GPUs, Mosaic on TPUs."""
    if platform == "cpu":
        raise Unavailable("JAX has no kernel for CPUs; for TPUs see `shardpage schedule`")
    if shape.dtype != "bfloat16":
        raise Unavailable("rounds float32 to bfloat16")
    module = importlib.import_module(
        "jax.experimental.pallas.ops.gpu.paged_attention"
        if platform == "gpu"
        else "jax.experimental.pallas.ops.tpu.paged_attention"
    )
    scale = shape.head_dim**-0.5
    options: dict[str, Any] = {"pages_per_compute_block": max(1, 128 // shape.page_size)}
    if platform == "gpu":
        options["k_splits"] = 16
        if shape.max_blocks % (16 * options["pages_per_compute_block"]):
            options["k_splits"] = 1

    def attend(query, key, value, lens, tables):
        scaled = (query * scale).astype(query.dtype)
        if platform == "gpu":
            return module.paged_attention(scaled, key, value, tables, lens, **options)
        return module.paged_attention(scaled, key, value, lens, tables, **options)

    return attend, "heads_first"


def seed(shape: Shape, platform: str) -> tuple[Attend, str]:
    """ejkernel's XLA `page_attention`, whose API this library keeps; needs jax 0.10."""
    if platform != "cpu":
        raise Unavailable("measured on CPUs only")
    try:
        module = importlib.import_module("ejkernel.kernels._xla.page_attention._interface")
    except ImportError as error:
        raise Unavailable(f"pip install 'jax==0.10.2' ejkernel==0.0.80.3 ({error})") from error
    return module.page_attention, "blocks_first"


IMPLEMENTATIONS: dict[str, Build] = {
    OURS: shardpage,
    "shardpage xla": portable,
    "gather": gather,
    "jax paged_attention": stock,
    "ejkernel": seed,
}
