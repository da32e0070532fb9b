"""Quantised caches in the Hopper kernels: refused or compiled anywhere, interpreted where JAX has
an interpreter, and on a Hopper GPU every format, scale, layout and step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage import PagedKVCache, Tuning, write_kv
from shardpage.backends import default_for, pallas_gpu, xla
from shardpage.backends.pallas_gpu import config, split
from shardpage.options import Attention
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Writes
from shardpage.quantise import store

from . import backends, cases, steps, tolerance
from .cases import KV_LAYOUTS, TOKEN_LAYOUTS
from .quantised import DTYPES
from .test_pallas_gpu import COMPILED, in_interpreter, on_gpu, reads_of
from .test_pallas_gpu import attend as attend_here
from .test_quantised import DECODES, KINDS, STEPS, bits, in_turn, quantised
from .test_quantised_values import assert_nan_where, poisoned

INTERPRETED = Tuning(backend="pallas_gpu", interpret=True, chip=3)
ON_HOPPER = Tuning(backend="pallas_gpu")
# More blocks than there are in shared memory; of a prompt for two warpgroups, which one serves.
LONG = {"seqs": ((900, 1), (70, 1), (1, 1)), "num_queries": 3, "max_blocks": 57, "page_size": 16}
LONG_PROMPT = {"seqs": ((500, 80),), "num_queries": 80, "max_blocks": 32, "page_size": 16}
LAYOUTS = [*KV_LAYOUTS, *TOKEN_LAYOUTS]
kinds = pytest.mark.parametrize(("dtype", "scale"), KINDS)


def page_format(head_dim=128, page_size=16, dtype="int8", scale="token", **changes):
    sizes = (2, page_size, head_dim, head_dim, jnp.dtype(dtype))
    form = PageFormat(KVLayout.BLOCKS_FIRST, *sizes, scale=scale)
    return dataclasses.replace(form, **changes)


@pytest.mark.parametrize("scale", ["token", "head"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_everything_fits_shared_memory(head_dim, scale):
    """With blocks on their way while others are widened."""
    for group in (1, 3, 8, 32, 64, 128):
        for page_size in (8, 24, 64, 256):
            form = page_format(head_dim, page_size, scale=scale)
            for reads in (reads_of(7), reads_of(40, 9), reads_of(4096, 2)):
                got = config.configure(form, 2 * group, reads, COMPILED)
                assert got.rows <= got.consumers * 64 <= 128
                assert got.stages >= 2
                assert got.wide_stages >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80}, "head_dim=80 of int8 is no multiple of 32 up to 128"),
        ({"head_dim": 256}, "head_dim=256 of int8 is no multiple of 32 up to 128.*backend='xla'"),
        ({"head_dim": 64, "page_size": 64, "pack": 2}, "packed rows.*use packed=False"),
        ({"page_size": 20}, "use page_size=24"),
    ],
)
def test_what_it_has_not_is_refused_by_name(changes, message):
    form = page_format(**changes)
    with pytest.raises(NotImplementedError, match=message):
        config.configure(form, 8, reads_of(4), COMPILED)
    assert default_for("gpu", "NVIDIA H200", form) == "xla"


@kinds
def test_it_is_the_default(dtype, scale):
    form = page_format(dtype=dtype, scale=scale)
    assert default_for("gpu", "NVIDIA H200", form) == "pallas_gpu"


@pytest.mark.parametrize(
    ("dtype", "scale", "rows", "head_dim", "page_size", "kv_layout"),
    [
        ("int8", "token", None, 128, 16, "blocks_first"),
        ("float8_e4m3fn", "token", 1, 64, 64, "heads_first"),
        ("float8_e5m2", "head", 100, 96, 8, "fused"),
        ("int8", "head", 1, 128, 256, "interleaved"),
    ],
)
def test_lowers_for_cuda(dtype, scale, rows, head_dim, page_size, kv_layout):
    """On any machine, in all JAX versions."""
    options = {"kv_layout": kv_layout, "dtype": dtype, "scales": scale}
    cache = PagedKVCache.abstract(64, 8, page_size, head_dim, **options)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    query = jax.ShapeDtypeStruct((400, 32, head_dim), jnp.bfloat16)
    call = functools.partial(attend_here, 32, Attention(), COMPILED)
    exported = jax.export.export(jax.jit(call), platforms=["cuda"])
    assert exported(query, cache, reads_of(400, rows)).mlir_module().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("dtype", "scale", "within"),
    [("int8", "head", 2**-14), ("float8_e4m3fn", "token", 2**-18), ("float8_e5m2", "head", 0)],
)
def test_queries_are_the_sum_of_their_pieces(dtype, scale, within):
    """And what is not finite, or how large a row is, is of that row alone."""
    form = page_format(dtype=dtype, scale=scale)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 8, 128)) * 10.0 ** rng.integers(-12, 12, (3, 8, 1))
    rows[0, 1] = 0
    query = jnp.asarray(rows, jnp.bfloat16).at[0, 2, 5].set(jnp.inf).at[0, 3, 6].set(jnp.nan)
    pieces, units = jax.jit(functools.partial(split.queries, page_format=form))(query)
    assert pieces.shape == (3, 8 * split.pieces(form), 128)
    assert pieces.dtype == form.dtype
    columns = jax.vmap(lambda piece: split.products(piece.T, 8, form))(pieces)
    got = np.array(columns, np.float64).swapaxes(1, 2) * np.array(units, np.float64)[..., None]
    assert np.isnan(got[0, 2:4]).all()
    got[0, 2:4], query = 0, query.at[0, 2:4].set(0)
    largest = np.abs(np.array(query, np.float64)).max(-1, keepdims=True)
    assert (np.abs(got - np.array(query, np.float64)) <= within * largest).all()


def check(dtype, scale, kv_layout, step, tuning, changes):
    inputs = steps.make(quantised(step, dtype, scale, **changes), kv_layout)
    steps.assert_exact(inputs, *steps.run_as(inputs, tuning))


def check_write(dtype, scale, kv_layout, tuning, num_tokens=13, heads=4, head_dim=96):
    """As `xla` writes, bit for bit; every fourth token is dropped."""
    rng, num_pages = np.random.default_rng(0), 3 + num_tokens // 8
    given = (np.full(heads, 0.01, np.float32),) * 2 if scale == "head" else None
    options = {"kv_layout": kv_layout, "dtype": dtype, "scales": given}
    cache = PagedKVCache.zeros(num_pages, heads, 8, head_dim, **options)
    page, slot = np.divmod(rng.permutation(num_pages * 8)[:num_tokens], 8)
    page[::4] = num_pages
    writes = Writes(jnp.asarray(page, jnp.int32), jnp.asarray(slot, jnp.int32))
    shape = (num_tokens, heads, head_dim)
    tokens = store(cache, *(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in "kv"))
    expected = xla.write(cache, tokens, writes, None, Tuning(backend="xla"))
    got = jax.jit(pallas_gpu.write, static_argnums=4)(cache, tokens, writes, None, tuning)
    for actual, array in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(actual), bits(array))


def check_no_number(dtype, scale, which, tuning, name="decoding"):
    """A new token that is no number is seen by the queries of its sequence and KV head alone."""
    inputs = steps.make(quantised(name, dtype, scale))
    clean, _ = steps.run_as(inputs, tuning)
    sequence, position = {"decoding": (3, 8), "mixed": (0, 20)}[name]
    row, new, place = poisoned(inputs, which, np.nan, sequence, position, head=2)
    out, lse = steps.run_as(inputs, tuning)
    seen = np.zeros(lse.shape, bool)
    seen[row + place : row + new, 4:6] = True
    assert_nan_where(seen, out, lse, clean)


@in_interpreter
@pytest.mark.usefixtures("on_a_cpu")
class TestInterpreted:
    """The kernels' own code, with three CTAs, where JAX interprets it."""

    @pytest.mark.parametrize(
        ("dtype", "scale", "kv_layout", "step", "changes"),
        [
            ("int8", "token", "blocks_first", "decoding", LONG),
            ("int8", "head", "heads_first", "mixed", {}),
            ("float8_e4m3fn", "token", "blocks_first", "prompt", LONG_PROMPT),
            ("float8_e4m3fn", "token", "fused", "guesses", {"page_size": 24, "max_blocks": 4}),
            ("float8_e5m2", "head", "tokens_first", "window", {"head_dim": 96}),
            ("float8_e5m2", "token", "interleaved_words", "capped_with_sinks", {"page_size": 16}),
            ("int8", "token", "blocks_first", "mixed", {"num_heads": 16, "page_size": 32}),
        ],
    )
    def test_written_and_attended_to(self, dtype, scale, kv_layout, step, changes):
        check(dtype, scale, kv_layout, step, INTERPRETED, changes)

    @kinds
    def test_write(self, dtype, scale):
        kv_layout = in_turn(LAYOUTS, KINDS.index((dtype, scale)))
        check_write(dtype, scale, kv_layout, INTERPRETED)

    @pytest.mark.parametrize(
        ("dtype", "scale", "which"), [("int8", "head", "value"), ("int8", "token", "key")]
    )
    def test_what_is_no_number_is_seen_where_it_is_read(self, dtype, scale, which):
        check_no_number(dtype, scale, which, INTERPRETED)


@on_gpu
class TestOnHopper:
    """All kinds of caches, in all layouts, under all masks."""

    @pytest.mark.parametrize("kv_layout", LAYOUTS)
    @pytest.mark.parametrize("step", STEPS)
    @kinds
    def test_written_and_attended_to(self, dtype, scale, step, kv_layout):
        number = KINDS.index((dtype, scale)) + STEPS.index(step)
        page_size = in_turn((8, 16, 24, 32), number)
        changes = {"page_size": page_size, "max_blocks": -(-96 // page_size)}
        # Rows of words that are padded hold NaN here, which int8 has not.
        dims = (64,) if kv_layout == "interleaved_words" else (64, 96, 128)
        changes["head_dim"] = in_turn(dims, number // 2)
        check(dtype, scale, kv_layout, step, ON_HOPPER, changes)

    @pytest.mark.parametrize("changes", [LONG, LONG_PROMPT], ids=["long", "long_prompt"])
    @kinds
    def test_more_blocks_than_shared_memory_has(self, dtype, scale, changes):
        for head_dim in (32, 64, 128):
            check(dtype, scale, "fused", "prompt", ON_HOPPER, {**changes, "head_dim": head_dim})

    @pytest.mark.parametrize("step", ["guesses", "mixed", "window"])
    @pytest.mark.parametrize("num_heads", [12, 16, 32])
    @kinds
    def test_more_queries_to_a_tile(self, dtype, scale, num_heads, step):
        """Up to 32 rows, up to 64, and for two warpgroups."""
        changes = {"num_heads": num_heads, "head_dim": 128, "page_size": 16, "max_blocks": 6}
        check(dtype, scale, "blocks_first", step, ON_HOPPER, changes)

    @pytest.mark.parametrize("name", DECODES)
    @kinds
    def test_one_token_a_sequence(self, dtype, scale, name):
        case = cases.named(name).replace(dtype=dtype, scale=scale, page_size=64, max_blocks=7)
        case = case.replace(name=f"quantised_{name}", max_context_len=None)
        inputs = cases.make(case, in_turn(KV_LAYOUTS, KINDS.index((dtype, scale))))
        tolerance.assert_within_rounding(inputs, *backends.attend(inputs, "pallas_gpu"))

    @pytest.mark.parametrize("num_tokens", [13, 3000])
    @pytest.mark.parametrize("kv_layout", LAYOUTS)
    @kinds
    def test_write(self, dtype, scale, kv_layout, num_tokens):
        check_write(dtype, scale, kv_layout, COMPILED, num_tokens)

    @pytest.mark.parametrize("name", ["decoding", "mixed"])
    @pytest.mark.parametrize("which", ["key", "value"])
    @kinds
    def test_what_is_no_number_is_seen_where_it_is_read(self, dtype, scale, which, name):
        check_no_number(dtype, scale, which, ON_HOPPER, name)

    @pytest.mark.parametrize("num_layers", [None, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_write_is_in_place(self, dtype, num_layers):
        """All of the cache is aliased, and no array of its size is made beside it."""
        options = {"dtype": dtype, "kv_layout": "blocks_first", "num_layers": num_layers}
        cache = PagedKVCache.abstract(512, 8, 16, 128, **options)
        cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
        token = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)
        int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        layer = None if num_layers is None else int32()
        write = functools.partial(write_kv, backend="pallas_gpu")
        call = lambda cache, *rest, layer: write(cache, *rest, layer=layer)
        arguments = cache, token, token, int32(64), int32(64), int32(64, 32)
        compiled = jax.jit(call, donate_argnums=0).lower(*arguments, layer=layer).compile()
        memory = compiled.memory_analysis()
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert memory.alias_size_in_bytes >= held
        assert memory.temp_size_in_bytes < 1 << 20
        copies = re.findall(r"= \S+\[([\d,]+)\]\S* copy\(", compiled.as_text())
        smallest = min(x.size for x in jax.tree.leaves(cache))
        assert all(np.prod([int(n) for n in shape.split(",")]) < smallest for shape in copies)
