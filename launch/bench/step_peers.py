"""What attends for a whole step: this library, and what a user would pick instead.

Each entry makes a call `() -> out` from the arrays of a step, or raises `Unavailable`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardpage import PagedKVCache, Tuning, attend, make_plan

from . import flashinfer
from .peers import Unavailable
from .report import OURS, PLANNED
from .step_inputs import StepInputs

Build = Callable[[StepInputs, str], tuple[Callable[..., Any], tuple[Any, ...]]]
MATMULS = "matmuls"
_MATMUL_KEYS = 256  # of one piece of the roof's matmuls: logits then stay in a CPU's caches
_GATHER_BYTES = {"cpu": 2 << 30}
_GATHER_BYTES_ELSEWHERE = 20 << 30


def shardpage(given: StepInputs, platform: str, backend: str | None = None):
    """This library: a plan and its attention in one program."""
    plan_of, attend_by = _plan_and_attend(given, backend)

    def call(query, key, value, *lengths):
        return attend_by(query, key, value, plan_of(key, value, *lengths))

    return jax.jit(call), (given.query, given.key, given.value, *given.lengths)


def planned(given: StepInputs, platform: str):
    """Its attention alone, with the step's plan made before, as each layer of a model calls it."""
    plan_of, attend_by = _plan_and_attend(given)
    plan = jax.jit(plan_of)(given.key, given.value, *given.lengths)
    return jax.jit(attend_by), (given.query, given.key, given.value, plan)


def _plan_and_attend(given: StepInputs, backend: str | None = None):
    shape = given.shape
    cache_of = functools.partial(PagedKVCache.of, kv_layout="blocks_first", head_dim=shape.head_dim)
    sizes = {"num_heads": shape.num_heads, "num_queries": shape.num_queries}
    tuning = Tuning(backend=backend)

    def plan_of(key, value, *lengths):
        return make_plan(cache_of(key, value), *lengths, tuning=tuning, **sizes)

    def attend_by(query, key, value, plan):
        return attend(query, cache_of(key, value), plan)

    return plan_of, attend_by


def portable(given: StepInputs, platform: str):
    """This library's XLA backend where it is not the default."""
    if platform != "gpu":
        raise Unavailable("is the default of CPUs, and no choice for TPUs")
    return shardpage(given, platform, backend="xla")


def matmuls(given: StepInputs, platform: str):
    """No attention but a roof: XLA's matmuls of as many FLOPs as the step needs, in one shape."""
    shape = given.shape
    num_tokens = -(-shape.num_reads // shape.num_queries // _MATMUL_KEYS) * _MATMUL_KEYS
    rows = shape.num_reads // num_tokens * (shape.num_heads // shape.num_kv_heads)
    draw = lambda seed, count: jax.random.normal(
        jax.random.key(seed), (shape.num_kv_heads, count, shape.head_dim), shape.dtype
    )
    product = functools.partial(
        jnp.einsum, precision=_precision(shape.dtype), preferred_element_type=jnp.float32
    )

    def call(queries, keys):
        def add(number, total):
            piece = lax.dynamic_slice_in_dim(keys, number * _MATMUL_KEYS, _MATMUL_KEYS, 1)
            logits = product("kmd,ktd->kmt", queries, piece).astype(keys.dtype)
            return total + product("kmt,ktd->kmd", logits, piece)

        zeros = jnp.zeros(queries.shape, jnp.float32)
        return lax.fori_loop(0, num_tokens // _MATMUL_KEYS, add, zeros)

    return jax.jit(call), (draw(0, rows), draw(1, num_tokens))


def gather(given: StepInputs, platform: str):
    """Plain XLA: sequences padded to the most queries, all pages of the tables, one softmax."""
    shape = given.shape
    num_seqs, most = len(shape.seqs), int(shape.query_lens.max())
    width = given.lengths[1].shape[1] * shape.page_size
    needed = 4 * num_seqs * shape.num_heads * most * width
    if needed > _GATHER_BYTES.get(platform, _GATHER_BYTES_ELSEWHERE):
        raise Unavailable(f"would need {needed >> 30} GiB for logits")

    def call(query, key, value, lens, tables, query_lens):
        number = jnp.arange(most)
        starts = jnp.cumsum(query_lens) - query_lens
        padded = query.at[starts[:, None] + number].get(mode="clip")
        keys, values = (
            cache[tables].swapaxes(1, 2).reshape(num_seqs, shape.num_kv_heads, width, -1)
            for cache in (key, value)
        )
        grouped = padded.reshape(*padded.shape[:2], shape.num_kv_heads, -1, shape.head_dim)
        product = functools.partial(
            jnp.einsum, precision=_precision(shape.dtype), preferred_element_type=jnp.float32
        )
        logits = product("sqkgd,sktd->skgqt", grouped, keys) * shape.head_dim**-0.5
        position = (lens - query_lens)[:, None] + number
        seen = jnp.arange(width) <= position[..., None]
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        out = product("skgqt,sktd->sqkgd", weights, values).reshape(padded.shape)
        row = jnp.repeat(jnp.arange(num_seqs), query_lens, total_repeat_length=len(query))
        return out[row, jnp.arange(len(query)) - starts[row]].astype(query.dtype)

    return jax.jit(call), (given.query, given.key, given.value, *given.lengths)


def reference(given: StepInputs, platform: str):
    """JAX's `ref_ragged_paged_attention`, op by op: it reads lengths on the host."""
    if platform != "cpu":
        raise Unavailable("op by op, with a program for each length: measured on CPUs only")
    name = "jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"cannot be imported here ({error})") from error
    call = functools.partial(module.ref_ragged_paged_attention, sm_scale=given.shape.head_dim**-0.5)
    lens, tables, _ = given.lengths
    return call, (given.query, given.token_major(), lens, tables, given.bounds, given.num_seqs)


def seed_v2(given: StepInputs, platform: str):
    """ejkernel's `ragged_page_attention_v2`."""
    attend = _ejkernel("ragged_page_attention_v2")
    options = {"softmax_scale": given.shape.head_dim**-0.5, "compute_dtype": given.query.dtype}
    lens, tables, _ = given.lengths
    inputs = (given.query, given.token_major(), lens, tables, given.bounds, given.num_seqs)
    return jax.jit(functools.partial(attend, **options)), inputs


def seed_v3(given: StepInputs, platform: str):
    """ejkernel's `ragged_page_attention_v3`, which writes the new tokens in the same call."""
    attend, shape = _ejkernel("ragged_page_attention_v3"), given.shape
    if shape.dtype != "float32" or shape.head_dim % 128:
        raise Unavailable("packs such elements in pages of another form")
    num_decoding = int((shape.query_lens == 1).sum())
    distribution = jnp.array([num_decoding, num_decoding, len(shape.seqs)], jnp.int32)

    def call(query, key, value, pages, lens, tables, bounds):
        scale = shape.head_dim**-0.5
        arrays = (query, key, value, pages, lens, tables.ravel(), bounds, distribution)
        return attend(*arrays, softmax_scale=scale)[0]

    lens, tables, _ = given.lengths
    pages = given.token_major()[:, :, :, None]
    return jax.jit(call), (given.query, *given.new_tokens(), pages, lens, tables, given.bounds)


def _ejkernel(name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(f"ejkernel.kernels._xla.{name}._interface")
    except ImportError as error:
        raise Unavailable(f"pip install 'jax==0.10.2' ejkernel==0.0.80.3 ({error})") from error
    return getattr(module, name)


def _precision(dtype: str) -> str | None:
    """Without it a GPU multiplies float32 as TF32, with 10 bits, and misses the oracle."""
    return "highest" if dtype == "float32" else None


IMPLEMENTATIONS: dict[str, Build] = {
    OURS: shardpage,
    PLANNED: planned,
    "shardpage xla": portable,
    MATMULS: matmuls,
    "gather": gather,
    "flashinfer": functools.partial(flashinfer.step, backend="fa3"),
    "flashinfer fa2": functools.partial(flashinfer.step, backend="fa2"),
    "jax reference": reference,
    "ejkernel v2": seed_v2,
    "ejkernel v3": seed_v3,
}
