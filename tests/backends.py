"""The backends under test, and one way to call them all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import shardpage
from shardpage.attention import attend_once
from shardpage.options import Attention, Mask, Tuning
from shardpage.shard_layout import Split

from .cases import KV_LAYOUTS, TOKEN_LAYOUTS, Case, Inputs, cache_options

# Every suite runs on each of these. What runs in an interpreter is slow: see `slow.py`.
BACKENDS = ("xla", "pallas_tpu")
INTERPRETED = ("pallas_tpu",)

# Copies are simulated with their semaphores: data arrives when it is waited for, unwritten memory
# is NaN, races are looked for. Each copy counts as one of as many threads as a vector clock has
# entries; by default that is one per device, and hardly a race is seen.
LOOK_FOR_RACES = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", vector_clock_size=24
)

# Cases that run in every layout, not in one only.
IN_ALL_LAYOUTS = ("plain", "bf16", "page1", "window", "one_long_sequence", "everything")

# What is shown of token-major pages, by case.
_TOKEN_MAJOR = {"bf16": "tokens_first", "everything": "interleaved", "page1": "interleaved_words"}

backends = pytest.mark.parametrize("backend", BACKENDS)

# Tests of what the kernels say themselves; before, they say which JAX they need.
needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the Pallas kernels need JAX 0.10"
)


def refusal(backend: str, inputs: Inputs) -> str | None:
    """Why a backend does not have what is asked for; None if it must have it."""
    if backend == "pallas_tpu":
        if inputs.case.dtype == "float16":
            return "float16 has no TPU matmul"
        if inputs.case.scale != "none" or inputs.kv_layout in TOKEN_LAYOUTS:
            return _refused_by_kernels(inputs)
        if inputs.key_cache.shape[-2] % 8:
            return "pages are not whole TPU tiles"
    return None


def _refused_by_kernels(inputs: Inputs) -> str | None:
    """What the TPU kernels themselves say of these pages."""
    from shardpage.backends.pallas_tpu.config import check_format  # imports Pallas

    try:
        check_format(cache_of(inputs).format)
    except NotImplementedError as error:
        return str(error)
    return None


def cache_of(inputs: Inputs) -> shardpage.PagedKVCache:
    """The caches and the scales of a case as one."""
    arrays = (inputs.key_cache, inputs.value_cache)
    arrays = [None if x is None else jnp.asarray(x) for x in arrays]
    options = cache_options(inputs.kv_layout, inputs.case.head_dim)
    scales = jax.tree.map(jnp.asarray, inputs.scales)
    return shardpage.PagedKVCache.of(*arrays, **options, scales=scales)


def oracle_matrix(cases: tuple[Case, ...]) -> list:
    """(backend, case, kv_layout). Compiling takes the time, so each case has one layout, in turn;
    those of `IN_ALL_LAYOUTS` have all, where nothing is interpreted. Token-major ones, which only
    differ in how pages are fetched, have a few."""
    turns = [
        (case, kv_layout, number % len(KV_LAYOUTS) == turn)
        for number, case in enumerate(cases)
        for turn, kv_layout in enumerate(KV_LAYOUTS)
    ]
    turns += [(case, _TOKEN_MAJOR[case.name], True) for case in cases if case.name in _TOKEN_MAJOR]
    return [
        pytest.param(backend, case, kv_layout, id=f"{backend}-{case.name}-{kv_layout}")
        for backend in BACKENDS
        for case, kv_layout, its_turn in turns
        if its_turn or (backend not in INTERPRETED and case.name in IN_ALL_LAYOUTS)
    ]


def interpret(backend: str):
    """What a call of a backend takes as `interpret`."""
    return LOOK_FOR_RACES if backend in INTERPRETED else None


def attend_as(inputs: Inputs, tuning: Tuning, mesh=None):
    """As `attend`, with what `page_attention` has no argument for: a platform, a chip."""
    case = inputs.case
    cache = cache_of(inputs)
    mask = Mask(case.sliding_window, max_context_len=case.max_context_len)
    attention = Attention(case.attn_scale, case.attn_logits_soft_cap)
    tuning = dataclasses.replace(
        tuning,
        num_splits=case.num_splits,
        pages_per_block=case.pages_per_compute_block,
        interpret=tuning.interpret or interpret(tuning.backend or "xla"),
    )
    arrays = inputs.query, cache, inputs.context_lens, inputs.block_tables, inputs.sinks
    out, lse = attend_once(*arrays, mask, attention, tuning, Split.of(mesh, None))
    return np.array(out), np.array(lse)


def attend(inputs: Inputs, backend: str = "xla", **changes):
    """`page_attention` on the arrays and options of a case; returns NumPy (out, lse).

    Skips what the backend refuses, having seen it refuse. `changes` are arguments that differ
    from the case's.
    """
    arguments = {
        "query": inputs.query,
        "key_cache": inputs.key_cache,
        "value_cache": inputs.value_cache,
        "context_lens": inputs.context_lens,
        "block_tables": inputs.block_tables,
        "sinks": inputs.sinks,
        "kv_layout": inputs.kv_layout,
        "scales": inputs.scales,
        "backend": backend,
        "interpret": interpret(backend),
        **inputs.case.options,
        **changes,
    }
    arguments = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    if reason := refusal(backend, inputs):
        with pytest.raises(NotImplementedError):
            shardpage.page_attention(**arguments)
        pytest.skip(f"{backend}: {reason}")
    out, lse = shardpage.page_attention(**arguments, return_lse=True)
    return np.array(out), np.array(lse)  # copies: tests change them
