"""One plan and one call for all that a serving step attends to."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardpage
from shardpage import ShardLayout

from . import steps
from .cases import KV_LAYOUTS, PLACEMENTS, build_mesh
from .steps import STEPS, assert_exact

SPECS = ("data=2,context=2,kv=2", "context=8", "data=8", "kv=4,data=2", "data=2,context=4")


def planned(inputs, backend="xla", mesh=None, written=False):
    """The inputs' cache, without the new tokens if they are to be `written`, and its plan."""
    cache = inputs.cache(written=not written)
    return cache, steps.planned(inputs, backend, mesh, cache)


def run(inputs, backend="xla", mesh=None, written=False, out_split=None):
    """Plans, writes the new tokens if the cache is without them, and attends."""
    cache, plan = planned(inputs, backend, mesh, written)
    if written:
        cache = shardpage.write_kv(cache, jnp.asarray(inputs.key), jnp.asarray(inputs.value), plan)
    sinks = None if inputs.sinks is None else jnp.asarray(inputs.sinks)
    options = {"soft_cap": inputs.step.soft_cap, "sinks": sinks, "out_split": out_split}
    out, lse = shardpage.attend(jnp.asarray(inputs.query), cache, plan, return_lse=True, **options)
    return np.array(out), np.array(lse)


def on(mesh, step, kv_layout="blocks_first", placement="random"):
    counts = ShardLayout.of(mesh).shards(mesh)
    return steps.make(
        step,
        kv_layout,
        num_seq_shards=counts.seqs,
        num_context_shards=counts.context,
        placement=placement,
    )


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_written_and_attended_to(step):
    inputs = steps.make(step, KV_LAYOUTS[len(step.name) % 3])
    assert_exact(inputs, *run(inputs, written=True))


@pytest.mark.parametrize(
    ("spec", "kv_layout", "head_dim"),
    [
        (None, "tokens_first", 64),
        (None, "interleaved_words", 80),
        ("data=2,context=2,kv=2", "interleaved", 80),
        ("data=2,context=2,kv=2", "interleaved_words", 64),
    ],
)
def test_pages_as_other_libraries_keep_them(spec, kv_layout, head_dim):
    """Heads, pages and sequences split; NaN in what pads a row of words."""
    step = steps.named("capped_with_sinks").replace(head_dim=head_dim, window=21)
    step = step.replace(dtype="bfloat16" if head_dim == 64 else "float32")
    mesh = None if spec is None else build_mesh(spec)
    inputs = on(mesh, step, kv_layout) if mesh else steps.make(step, kv_layout)
    assert_exact(inputs, *run(inputs, mesh=mesh, written=True))


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        *((spec, "mixed") for spec in SPECS),
        ("data=2,context=2,kv=2", "chunk_and_window"),
        ("context=8", "capped_with_sinks"),
    ],
)
def test_every_mesh_gives_the_oracles_numbers(spec, step):
    mesh = build_mesh(spec)
    inputs = on(mesh, steps.named(step))
    assert_exact(inputs, *run(inputs, mesh=mesh, written=True))


@pytest.mark.parametrize(
    ("placement", "step"),
    list(zip(PLACEMENTS, ["chunk", "window", "not_causal_in_chunks", "mixed"], strict=True)),
)
def test_pages_may_lie_on_any_context_shard(placement, step):
    mesh = build_mesh("data=2,context=4")
    inputs = on(mesh, steps.named(step), placement=placement)
    assert_exact(inputs, *run(inputs, mesh=mesh))


COLLECTIVE = re.compile(r"= (\S+) (all-reduce|reduce-scatter|all-gather|all-to-all)\(")


def elements(shape):
    """Elements of an HLO result's arrays, the largest of a tuple's."""
    arrays = re.findall(r"f32\[([\d,]*)\]", shape)
    return max((int(np.prod([int(n) for n in a.split(",") if n])) for a in arrays), default=0)


@pytest.mark.parametrize("spec", ["context=4", "data=2,context=2,kv=2"])
def test_heads_of_the_output_may_stay_split_over_context(spec):
    mesh = build_mesh(spec)
    inputs = on(mesh, steps.named("capped_with_sinks"))
    whole, split = (run(inputs, mesh=mesh, out_split=way) for way in (None, "heads"))
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert_exact(inputs, *split)


@pytest.mark.parametrize("num_blocks", [12, 48])
def test_a_split_output_is_sent_once_and_no_more_of_longer_contexts(num_blocks):
    mesh = build_mesh("context=4")
    step = steps.named("mixed").replace(max_blocks=num_blocks)
    inputs = on(mesh, step)
    cache, plan = planned(inputs, mesh=mesh)
    attend = functools.partial(shardpage.attend, out_split="heads")
    text = jax.jit(attend).lower(inputs.query, cache, plan).compile().as_text()
    sent = [(kind, elements(shape)) for shape, kind in COLLECTIVE.findall(text)]
    tokens, heads, dim = inputs.query.shape
    share = tokens * heads // 4 * (dim + 1)
    assert [kind for kind, _ in sent].count("reduce-scatter") == 1
    assert all(size <= max(share, tokens * heads) for _, size in sent), sent


def test_a_mixed_call_equals_its_parts():
    inputs = steps.make(steps.named("window"))
    out, lse = run(inputs)
    row = 0
    for seq, (_, new) in enumerate(inputs.step.seqs):
        alone = dataclasses.replace(
            inputs,
            query=inputs.query[row : row + max(new, 1)],
            context_lens=inputs.context_lens[seq : seq + 1],
            query_lens=inputs.query_lens[seq : seq + 1],
            block_tables=inputs.block_tables[seq : seq + 1],
        )
        for together, apart in zip((out, lse), run(alone), strict=True):
            np.testing.assert_allclose(together[row : row + new], apart[:new], rtol=2e-5, atol=2e-5)
        row += new


def test_lengths_trace_nothing_anew():
    inputs = steps.make(steps.named("mixed"))
    traces = []

    @jax.jit
    def attend(query, cache, lens, query_lens, tables):
        traces.append(1)
        plan = shardpage.make_plan(
            cache, lens, tables, query_lens, num_heads=8, num_queries=len(query)
        )
        return shardpage.attend(query, cache, plan)

    cache, _ = planned(inputs)
    for query_lens in (inputs.query_lens, np.minimum(inputs.context_lens, 2)):
        attend(inputs.query, cache, inputs.context_lens, query_lens, inputs.block_tables)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("lens", "query_lens", "spoilt"),
    [
        ((30, -1), (3, 1), [3]),
        ((30, 10), (3, 11), range(3, 14)),  # more queries than tokens
        ((30, 97), (3, 2), range(3, 5)),  # longer than its table
        ((30, 40), (3, 38), range(3, 40)),  # no room for all its queries
        ((30, 40), (-5, 2), ()),
    ],
)
def test_impossible_lengths_spoil_their_own_sequence_alone(lens, query_lens, spoilt):
    step = steps.named("mixed").replace(seqs=((30, 3), (40, 2)), num_queries=40, name="two")
    good = steps.make(step)
    bad = dataclasses.replace(
        good, context_lens=np.array(lens, np.int32), query_lens=np.array(query_lens, np.int32)
    )
    out, lse = run(bad)
    expected = np.zeros(40, bool)
    expected[list(spoilt)] = True
    np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), expected)
    np.testing.assert_array_equal(np.isnan(lse).any(axis=1), expected)
    if query_lens[0] == 3:
        np.testing.assert_allclose(out[:3], run(good)[0][:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "backend"),
    [("key", "xla"), ("value", "xla"), ("query", "xla"), ("value", "pallas_tpu")],
)
def test_a_nan_that_is_read_is_seen_by_those_that_read_it(what, backend):
    """In a tile of 37 queries of one row: those before it do not see it, all others do."""
    inputs = steps.make(steps.named("mixed"))
    assert inputs.step.seqs[0] == (37, 37)
    clean = run(inputs, backend)[0]
    page = inputs.block_tables[0, 20 // inputs.step.page_size]
    if what == "query":
        inputs.query[20, 0, 0] = np.nan
    else:
        array = inputs.key_cache if what == "key" else inputs.value_cache
        array[page, 0, 20 % inputs.step.page_size, 0] = np.nan
    out, lse = run(inputs, backend)
    heads = slice(0, 1) if what == "query" else slice(0, 2)
    seen = np.zeros(out.shape[:2], bool)
    seen[20 : 21 if what == "query" else 37, heads] = True
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)
    np.testing.assert_array_equal(out[~seen], clean[~seen])


@pytest.mark.parametrize("step", ["mixed", "chunk_and_window"])
@pytest.mark.parametrize("spec", [None, "data=2,context=2,kv=2"])
def test_gradients_are_those_of_finite_differences(spec, step):
    mesh = None if spec is None else build_mesh(spec)
    step = steps.named(step).replace(num_heads=4, num_kv_heads=2, head_dim=16)
    inputs = on(mesh, step) if mesh else steps.make(step)
    cache, plan = planned(inputs, mesh=mesh)
    cache = jax.tree.map(lambda x: jnp.nan_to_num(x), cache)
    weights = np.random.default_rng(1).standard_normal(inputs.query.shape, np.float32)

    @jax.jit
    def loss(query, cache):
        return jnp.sum(shardpage.attend(query, cache, plan) * weights)

    args = jnp.asarray(inputs.query), cache
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(*args)
    rng = np.random.default_rng(2)
    ways = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), args)
    at = lambda size: loss(*jax.tree.map(lambda x, way: x + size * way, args, ways))
    numeric = (float(at(1e-2)) - float(at(-1e-2))) / 2e-2
    products = jax.tree.map(lambda g, way: float(np.vdot(np.asarray(g), way)), grads, ways)
    assert sum(jax.tree.leaves(products)) == pytest.approx(numeric, rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("layer", [None, 1])
def test_gradients_go_through_a_write(layer):
    """Those of a bfloat16 cache, which CPUs write as integers, are a float32 cache's, rounded."""
    inputs, grads = steps.make(steps.named("mixed")), []
    for dtype in (jnp.float32, jnp.bfloat16):
        sizes = {"num_kv_heads": 4, "page_size": 8, "head_dim": 64, "dtype": dtype}
        layers = None if layer is None else 2
        cache = shardpage.PagedKVCache.zeros(inputs.cache().num_pages, **sizes, num_layers=layers)
        plan = steps.planned(inputs, "xla", None, cache)

        def loss(key, value, cache=cache, plan=plan):
            new = shardpage.write_kv(cache, key, value, plan, layer=layer)
            return jnp.sum(jnp.sin(shardpage.attend(inputs.query, new, plan, layer=layer)))

        grads.append(jax.jit(jax.grad(loss, argnums=(0, 1)))(inputs.key, inputs.value))
    for exact, rounded in zip(*grads, strict=True):
        size = float(jnp.abs(exact).max())
        assert size > 0.1
        np.testing.assert_allclose(rounded, exact, atol=2.0**-5 * size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_temporaries_of_many_prompts_fit_96_mb(dtype):
    """8192 queries over 64 sequences of 8192 tokens: no second array of results, no wider one."""
    num_queries, num_seqs, pages = 8192, 64, 512
    cache = shardpage.PagedKVCache.abstract(num_seqs * pages, 8, 16, 128, dtype=dtype)

    def plan_and_attend(query, cache, lens, tables):
        options = {"query_lens": lens, "num_queries": num_queries, "num_heads": 32}
        return shardpage.attend(query, cache, shardpage.make_plan(cache, lens, tables, **options))

    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    query = jax.ShapeDtypeStruct((num_queries, 32, 128), dtype)
    lowered = jax.jit(plan_and_attend).lower(query, cache, ids(num_seqs), ids(num_seqs, pages))
    temp_bytes = lowered.compile().memory_analysis().temp_size_in_bytes
    if jax.default_backend() == "gpu" and temp_bytes >= 96e6:
        pytest.xfail(f"{temp_bytes:,} B: a GPU's kernel has arrays of tiles, its xla larger steps")
    assert temp_bytes < 96e6


class TestErrors:
    def test_a_plan_is_for_its_cache(self):
        inputs = steps.make(steps.named("decoding"))
        cache, plan = planned(inputs)
        other = jax.tree.map(lambda x: x[:-1], cache)
        with pytest.raises(ValueError, match=r"the plan was made for \d+ pages of"):
            shardpage.attend(inputs.query, other, plan)
        with pytest.raises(ValueError, match=r"query has shape .* num_queries, num_heads"):
            shardpage.attend(inputs.query[:-1], cache, plan)
        with pytest.raises(ValueError, match="key has 7 tokens for a plan of num_queries=8"):
            shardpage.write_kv(cache, inputs.key[:-1], inputs.value[:-1], plan)
        with pytest.raises(ValueError, match="the plan says seq_ids: leave them out"):
            shardpage.write_kv(cache, inputs.key, inputs.value, plan, seq_ids=np.zeros(8, np.int32))
        with pytest.raises(ValueError, match="plan must be a plan of make_plan; got None"):
            shardpage.attend(inputs.query, cache, None)
        with pytest.raises(ValueError, match="plan with mesh="):
            shardpage.attend(inputs.query, cache, plan, out_split="heads")
        with pytest.raises(ValueError, match="out_split='rows' must be 'heads'"):
            shardpage.attend(inputs.query, cache, plan, out_split="rows")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_queries": None}, "pass num_queries=: rows of the query array"),
            ({"num_queries": 0}, "num_queries=0 must be a positive integer"),
            ({"num_heads": 6}, "num_heads=6 must be a multiple of num_kv_heads=4"),
            ({"query_lens": None, "num_queries": 9}, "num_queries=9 for 8 sequences of one token"),
            ({"query_lens": np.ones(3, np.int32)}, "query_lens has 3 entries, block_tables 8 rows"),
            ({"query_lens": np.ones(8)}, "query_lens must hold integers"),
            ({"window": 0}, "window=0 must be a positive integer"),
            ({"chunk": -3}, "chunk=-3 must be a positive integer"),
            ({"causal": 1}, "causal must be True or False; got 1"),
            ({"tuning": "fast"}, "tuning must be a Tuning, or None; got 'fast'"),
        ],
    )
    def test_arguments_of_a_plan(self, changes, message):
        inputs = steps.make(steps.named("decoding"))
        cache, _ = planned(inputs)
        arguments = {"query_lens": inputs.query_lens, "num_heads": 8, "num_queries": 8} | changes
        with pytest.raises(ValueError, match=message):
            shardpage.make_plan(cache, inputs.context_lens, inputs.block_tables, **arguments)

    def test_heads_that_do_not_split_over_context(self):
        mesh = build_mesh("context=4")
        step = steps.named("decoding").replace(num_heads=6, num_kv_heads=2)
        inputs = on(mesh, step)
        cache, plan = planned(inputs, mesh=mesh)
        with pytest.raises(ValueError, match=r"splits the 6 query heads .* 4 shards .* 'context'"):
            shardpage.attend(inputs.query, cache, plan, out_split="heads")


@settings(max_examples=8)  # each compiles: pages are as many as needed
@given(
    lens=st.lists(st.integers(0, 64), min_size=4, max_size=4),
    shares=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    mask=st.sampled_from([{}, {"window": 11}, {"chunk": 12, "window": 9}, {"causal": False}]),
    placement=st.sampled_from(PLACEMENTS),
    spec=st.sampled_from([None, "data=2,context=2"]),
)
def test_any_lengths_masks_and_places(lens, shares, mask, placement, spec):
    seqs = tuple((n, min(n, share * n // 6 + share)) for n, share in zip(lens, shares, strict=True))
    step = steps.Step("drawn", seqs, 160, num_heads=4, num_kv_heads=2, head_dim=8, **mask)
    mesh = None if spec is None else build_mesh(spec)
    inputs = on(mesh, step, placement=placement) if mesh else steps.make(step)
    assert_exact(inputs, *run(inputs, mesh=mesh, written=True))


@pytest.mark.parametrize(
    ("name", "kv_layout", "spec"),
    [
        ("prompt", "blocks_first", None),
        ("mixed", "blocks_first", None),
        ("capped_with_sinks", "heads_first", None),
        ("bf16", "fused", None),
        ("window", "fused", "data=2,context=2"),
    ],
)
def test_interpreted_kernels(name, kv_layout, spec):
    """Prompts, guesses and running sequences, each in the kernel for its kind; races looked for."""
    step = steps.named(name)
    if name == "prompt":
        step = step.replace(seqs=((21, 21), (0, 0)), num_queries=24, max_blocks=4)
    mesh = None if spec is None else build_mesh(spec)
    inputs = on(mesh, step, kv_layout) if mesh else steps.make(step, kv_layout)
    assert_exact(inputs, *run(inputs, "pallas_tpu", mesh, written=True))
