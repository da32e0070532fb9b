"""How exact is exact enough: a multiple of the rounding that honest low precision code makes.

No number is picked by hand. The plain computation below does what anyone would write in XLA for
the same dtypes (gather all pages, one softmax); how far it lands from the float64 oracle is the
rounding that the dtype imposes, and results under test may be off by twice that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import quantised, reference
from .cases import Case, Inputs, make

MULTIPLE = 2.0
FLOOR = 1e-6  # rounding of a float32 of size one, where the plain computation happens to be exact


def exact(inputs: Inputs, attend_token=None) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's (out, lse); of quantised caches, of what their pages stand for."""
    (query, *caches, lens, tables), kv_layout = inputs.arrays, inputs.kv_layout
    if inputs.pages:
        key, value = inputs.pages
        caches = key.exact, value.with_folded if attend_token else value.exact
        kv_layout = "tokens_first"
    return reference.page_attention(
        query,
        *caches,
        lens,
        tables,
        kv_layout=kv_layout,
        sinks=inputs.sinks,
        num_seq_shards=inputs.num_seq_shards,
        attend_token=attend_token,
        **inputs.case.reference_options,
    )


def plain(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The plain computation's (out, lse): matmuls in the caches' dtype, softmax in float32; of
    quantised caches, the oracle with operands rounded to bfloat16.

    For valid sequences in the "blocks_first" layout.
    """
    if inputs.pages:
        out, lse = exact(inputs, quantised.plain_token)
        return out.astype(inputs.query.dtype), lse
    assert inputs.kv_layout == "blocks_first"
    case = inputs.case
    out, lse = _plain(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.context_lens,
        np.clip(inputs.block_tables, 0, inputs.num_pages - 1),
        inputs.sinks,
        scale=case.attn_scale or case.head_dim**-0.5,
        soft_cap=case.attn_logits_soft_cap,
        window=case.sliding_window,
    )
    return np.asarray(out), np.asarray(lse)


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "window"))
def _plain(query, keys, values, context_lens, tables, sinks, *, scale, soft_cap, window):
    num_seqs, num_heads, head_dim = query.shape
    _, num_kv_heads, page_size, _ = keys.shape
    # [num_seqs, num_kv_heads, max_blocks * page_size, head_dim]
    keys, values = (
        jnp.moveaxis(jnp.nan_to_num(cache)[tables], 1, 2).reshape(
            num_seqs, num_kv_heads, -1, head_dim
        )
        for cache in (keys, values)
    )
    grouped = query.astype(keys.dtype).reshape(num_seqs, num_kv_heads, -1, head_dim)
    exactly = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    logits = jnp.einsum("skqd,sktd->skqt", grouped, keys, **exactly) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    positions = jnp.arange(tables.shape[1] * page_size, dtype=jnp.int32)
    seen = positions < context_lens[:, None]
    if window is not None:
        seen &= positions >= context_lens[:, None] - window
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.reshape(num_kv_heads, -1))
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = jnp.einsum("skqt,sktd->skqd", weights.astype(values.dtype), values, **exactly)
    out = out.reshape(query.shape).astype(query.dtype)
    return out, lse.reshape(num_seqs, num_heads)


@functools.cache
def _expected(case: Case, seed: int):
    """Exact and plain results; they do not depend on layout or shards (see `cases.make`)."""
    inputs = make(case, seed=seed)
    return exact(inputs), plain(inputs)


def assert_within_rounding(inputs: Inputs, out, lse=None):
    """Fails where (out, lse) is further from the oracle than honest rounding goes.

    NaN and -inf must be exactly where the oracle has them. For inputs as `cases.make` made them.
    """
    (exact_out, exact_lse), (plain_out, plain_lse) = _expected(inputs.case, inputs.seed)
    assert out.dtype == inputs.query.dtype, f"{out.dtype=}, the query's is {inputs.query.dtype}"
    assert_close("out", out, exact_out, plain_out)
    if lse is not None:
        assert lse.dtype == np.float32, f"{lse.dtype=}"
        assert_close("lse", lse, exact_lse, plain_lse)


def assert_close(what: str, actual, exact: np.ndarray, plain: np.ndarray | None = None):
    """Compares with the oracle; the budget is what `plain` loses where the oracle is finite."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == exact.shape, f"{what}: {actual.shape=}, {exact.shape=}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(
        np.where(finite, 0.0, actual), np.where(finite, 0.0, exact), err_msg=f"{what}: NaN, inf"
    )
    if not finite.any():
        return
    size = max(1.0, float(np.abs(exact[finite]).max()))
    rounding = 0.0
    if plain is not None:
        rounding = float(np.abs(plain.astype(np.float64)[finite] - exact[finite]).max())
    budget = MULTIPLE * rounding + FLOOR * size
    error = np.zeros(exact.shape)
    error[finite] = np.nan_to_num(np.abs(actual[finite] - exact[finite]), nan=np.inf)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= budget, (
        f"{what}: off by {error.max():.3g} at {[int(i) for i in worst]} "
        f"({actual[worst]:.6g}, exactly {exact[worst]:.6g}); {budget=:.3g}"
    )
