"""Quantised caches against an oracle that quantises by its own code: every kind of cache, mask,
mesh and way of computing it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, Tuning, attend, make_plan, write_kv
from shardpage.backends.pallas_tpu.chip import UNKNOWN_CHIP

from . import backends, cases, steps, tolerance
from .cases import KV_LAYOUTS, PLACEMENTS, TOKEN_LAYOUTS, build_mesh
from .quantised import DTYPES, SCALES
from .test_layers import layered
from .test_step import on, run

KINDS = [(dtype, scale) for dtype in DTYPES for scale in SCALES]
ARRANGED = [(kv_layout, False) for kv_layout in (*KV_LAYOUTS, *TOKEN_LAYOUTS)]
ARRANGED += [(kv_layout, True) for kv_layout in KV_LAYOUTS]  # packed
STEPS = (
    "mixed",
    "prompt",
    "guesses",
    "decoding",
    "window",
    "chunk_and_window",
    "capped_with_sinks",
    "not_causal_in_chunks",
    "one_token_over_a_page",
)
kinds = pytest.mark.parametrize(("dtype", "scale"), KINDS)


def in_turn(values, *numbers):
    """One of the values; so that each number meets all of them."""
    return values[sum(numbers) % len(values)]


def quantised(name, dtype, scale, **changes):
    return steps.named(name).replace(dtype=dtype, scale=scale, **changes)


def bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize(
    ("dtype", "scale", "kv_layout", "packed", "step"),
    [
        pytest.param(
            *kind, *arranged, in_turn(STEPS, i, j), id="-".join(map(str, (*kind, *arranged)))
        )
        for i, kind in enumerate(KINDS)
        for j, arranged in enumerate(ARRANGED)
        if (i + i // 2 + j) % 2 == 0
    ],
)
def test_written_and_attended_to(dtype, scale, kv_layout, packed, step):
    """Each dtype, and each scale, meets each layout; and each step: prompts, masks, caps, sinks."""
    inputs = steps.make(quantised(step, dtype, scale), kv_layout, packed=packed)
    assert inputs.cache().format.pack == (2 if packed else 1)
    steps.assert_exact(inputs, *run(inputs, written=True))


@pytest.mark.parametrize(
    ("dtype", "scale", "kv_layout", "packed", "spec"),
    [
        ("int8", "token", "fused", False, None),
        ("float8_e4m3fn", "head", "blocks_first", False, None),
        ("float8_e5m2", "token", "fused", True, None),
        ("int8", "token", "fused", False, "data=2,context=2"),
    ],
)
def test_interpreted_kernels(dtype, scale, kv_layout, packed, spec):
    """A prompt and a running sequence, each in the kernel for its kind, and written by another."""
    sizes = {"page_size": 64 if packed else 32, "max_blocks": 2}
    seqs = ((40, 21), (33, 1)) * (2 if spec else 1)
    step = quantised("prompt", dtype, scale, seqs=seqs, num_queries=24, **sizes)
    mesh = None if spec is None else build_mesh(spec)
    inputs = on(mesh, step, kv_layout) if mesh else steps.make(step, kv_layout, packed=packed)
    steps.assert_exact(inputs, *run(inputs, "pallas_tpu", mesh, written=True))


@kinds
def test_what_is_written_is_what_the_oracle_stores_bit_by_bit(dtype, scale):
    """Where tokens were written; all else stays what it was."""
    kv_layout = in_turn(KV_LAYOUTS, KINDS.index((dtype, scale)))
    inputs = steps.make(quantised("mixed", dtype, scale), kv_layout, packed=scale == "token")
    cache = inputs.cache(written=False)
    plan = steps.planned(inputs, "xla", None, cache)
    written = write_kv(cache, jnp.asarray(inputs.key), jnp.asarray(inputs.value), plan)
    for actual, expected in zip(
        jax.tree.leaves(written), jax.tree.leaves(inputs.cache()), strict=True
    ):
        np.testing.assert_array_equal(bits(actual), bits(expected))


DECODES = ("page64", "soft_cap", "window", "sinks", "three_splits", "everything", "attn_scale")


@backends.backends
@pytest.mark.parametrize(
    ("dtype", "scale", "name"),
    [
        (*kind, name)
        for i, kind in enumerate(KINDS)
        for name in (DECODES[0], in_turn(DECODES[1:], i))
    ],
)
def test_one_token_a_sequence(backend, dtype, scale, name):
    """What each backend that has such a cache must do with `page_attention`'s options."""
    case = cases.named(name).replace(dtype=dtype, scale=scale, page_size=64, max_blocks=3)
    case = case.replace(name=f"quantised_{name}", max_context_len=None)
    inputs = cases.make(case, in_turn(KV_LAYOUTS, KINDS.index((dtype, scale))))
    tolerance.assert_within_rounding(inputs, *backends.attend(inputs, backend))


V6E, V4 = {"integers": True}, {"widens": True}


@pytest.mark.parametrize(
    ("dtype", "scale", "able", "packed"),
    [
        ("int8", "token", V6E, False),
        ("int8", "head", V6E, True),
        ("float8_e4m3fn", "token", V4, True),
        ("float8_e5m2", "head", V4, False),
    ],
)
def test_chips_that_multiply_other_dtypes(dtype, scale, able, packed):
    """Decoding rows, guesses and a prompt; elsewhere int8 stands beside bfloat16, as on TPU7x."""
    sizes = {"page_size": 64 if packed else 32, "max_blocks": 6}
    seqs = ((161, 1), (33, 1), (96, 4), (40, 21))
    step = quantised("prompt", dtype, scale, seqs=seqs, num_queries=27, **sizes)
    chip = dataclasses.replace(UNKNOWN_CHIP, **able)
    inputs = steps.make(step, "fused", packed=packed)
    tuning = Tuning(backend="pallas_tpu", chip=chip, interpret=True)
    steps.assert_exact(inputs, *steps.run_as(inputs, tuning))


@kinds
def test_shapes_are_told_to_broadcast(dtype, scale):
    """Where ranks are not promoted silently, as in the tests of jax and of tpu-inference."""
    inputs = steps.make(quantised("guesses", dtype, scale))
    with jax.numpy_rank_promotion("raise"):
        steps.assert_exact(inputs, *run(inputs, written=True))


@pytest.mark.parametrize("query_dtype", ["bfloat16", "float16"])
def test_output_has_the_dtype_of_the_query(query_dtype):
    case = cases.named("plain").replace(dtype="int8", scale="token", query_dtype=query_dtype)
    inputs = cases.make(case)
    tolerance.assert_within_rounding(inputs, *backends.attend(inputs))


SPECS = ("data=8", "kv=4,data=2", "context=8", "data=2,context=4", "data=2,context=2,kv=2")


@pytest.mark.parametrize(
    ("dtype", "scale", "spec", "kv_layout"),
    [
        (*kind, in_turn(SPECS, number), in_turn((*KV_LAYOUTS, *TOKEN_LAYOUTS), number))
        for number, kind in enumerate([*KINDS, *KINDS[::-1]])
    ],
)
def test_every_mesh_gives_the_oracles_numbers(dtype, scale, spec, kv_layout):
    mesh = build_mesh(spec)
    step = quantised("capped_with_sinks", dtype, scale, window=30)
    if kv_layout == "interleaved_words":  # heads fill words on each shard
        step = step.replace(num_heads=16, num_kv_heads=16)
    inputs = on(mesh, step, kv_layout, in_turn(PLACEMENTS, len(spec)))
    steps.assert_exact(inputs, *run(inputs, mesh=mesh, written=True))


@pytest.mark.parametrize("scale", SCALES)
def test_heads_of_the_output_may_stay_split_over_context(scale):
    mesh = build_mesh("data=2,context=2,kv=2")
    inputs = on(mesh, quantised("mixed", "int8", scale))
    steps.assert_exact(inputs, *run(inputs, mesh=mesh, out_split="heads"))


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@kinds
def test_layers_of_a_scan_are_caches_of_their_own(dtype, scale, axis_type):
    """Of one device, or split in every way; each layer has other scales of KV heads."""
    mesh = build_mesh("data=2,context=2,kv=2", axis_type) if axis_type == "Explicit" else None
    kv_layout = in_turn(KV_LAYOUTS, KINDS.index((dtype, scale)))
    step = quantised("mixed", dtype, scale)
    inputs = on(mesh, step, kv_layout) if mesh else steps.make(step, kv_layout)
    num_layers, rng = 3, np.random.default_rng(0)
    by_layer = rng.uniform(0.01, 0.02, (2, num_layers, step.num_kv_heads)).astype(np.float32)
    num_pages, options = (
        inputs.cache().num_pages,
        {"dtype": dtype, "kv_layout": kv_layout, "mesh": mesh},
    )

    def empty(head_scales, **more):
        scales = tuple(head_scales) if scale == "head" else None
        sizes = num_pages, step.num_kv_heads, step.page_size, step.head_dim
        return PagedKVCache.zeros(*sizes, **options, **more, scales=scales)

    heads = (step.num_heads, step.num_kv_heads, step.num_kv_heads)
    shape = (num_layers, inputs.num_queries)
    tokens = [rng.standard_normal((*shape, n, step.head_dim), np.float32) for n in heads]
    model = functools.partial(steps.planned, inputs, "xla", mesh)
    cache, out = layered(model, empty(by_layer, num_layers=num_layers), *tokens)
    for number in range(num_layers):
        one = empty(by_layer[:, number])
        plan = model(one)
        query, key, value = (x[number] for x in tokens)
        one = write_kv(one, key, value, plan)
        np.testing.assert_array_equal(np.asarray(attend(query, one, plan)), np.asarray(out[number]))
        if scale == "token":
            np.testing.assert_array_equal(bits(cache.scales[0])[number], bits(one.scales[0]))


@pytest.mark.parametrize("number", [-1, 2, 2**31 - 1])
@pytest.mark.parametrize("scale", SCALES)
def test_a_traced_layer_that_there_is_not(scale, number):
    """NaN, and nothing is written: neither elements nor scales."""
    inputs = steps.make(quantised("one_token", "int8", scale), "fused")
    scales = (np.full((2, 4), 0.01, np.float32),) * 2 if scale == "head" else None
    cache = PagedKVCache.zeros(
        inputs.cache().num_pages,
        4,
        8,
        64,
        dtype="int8",
        kv_layout="fused",
        num_layers=2,
        scales=scales,
    )
    before = jax.tree.map(bits, cache)
    plan, number = steps.planned(inputs, "xla", None, cache), jnp.int32(number)
    query, key, value = map(jnp.asarray, (inputs.query, inputs.key, inputs.value))
    assert np.isnan(np.asarray(attend(query, cache, plan, layer=number))).all()
    written = write_kv(cache, key, value, plan, layer=number)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(bits, written), before)


@pytest.mark.parametrize(("spec", "num_splits"), [(None, 5), (None, 1), ("context=4", 2)])
@pytest.mark.parametrize("scale", SCALES)
def test_splits_change_rounding_alone(scale, spec, num_splits):
    mesh = None if spec is None else build_mesh(spec)
    step = quantised("decoding", "float8_e4m3fn", scale, max_blocks=24, seqs=((190, 1), (3, 1)))
    step = step.replace(num_queries=2)
    inputs = on(mesh, step) if mesh else steps.make(step)
    cache = inputs.cache()
    lists = map(jnp.asarray, (inputs.context_lens, inputs.block_tables))
    tuning = Tuning(backend="xla", num_splits=num_splits, pages_per_block=3)
    plan = make_plan(cache, *lists, num_heads=step.num_heads, mesh=mesh, tuning=tuning)
    out, lse = attend(jnp.asarray(inputs.query), cache, plan, return_lse=True)
    steps.assert_exact(inputs, np.asarray(out), np.asarray(lse))
