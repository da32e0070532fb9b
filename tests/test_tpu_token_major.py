"""Token-major pages in the TPU kernels, interpreted: read as they lie, as other libraries do."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.schedule import worker
from shardpage import PagedKVCache, Tuning
from shardpage.backends import default_for, pallas_tpu, xla
from shardpage.backends.pallas_tpu.chip import MIB, UNKNOWN_CHIP, Chip
from shardpage.backends.pallas_tpu.config import Cores, check_format, choose_cores
from shardpage.backends.pallas_tpu.geometry import Geometry
from shardpage.backends.pallas_tpu.sizes import heads_per_pass
from shardpage.page_format import KVLayout, PageFormat
from shardpage.plan import Writes
from shardpage.quantise import Stored

from . import steps, tolerance
from .backends import LOOK_FOR_RACES
from .cases import Case, build_mesh, make
from .steps import assert_exact
from .test_pallas_tpu import attend_as
from .test_step import on, run

FLOAT32, BFLOAT16, FLOAT16 = map(np.dtype, (np.float32, jnp.bfloat16, np.float16))
V4 = Chip("v4", 2, 16 * MIB, MIB, 614e3)


def made(name, kv_layout, **changes) -> steps.StepInputs:
    """A step of two queries per KV head; what nobody reads, and what pads rows, is NaN."""
    if "num_kv_heads" in changes:
        changes["num_heads"] = 2 * changes["num_kv_heads"]
    changes = {"page_size": 16, "max_blocks": 6} | changes
    return steps.make(steps.named(name).replace(**changes), kv_layout)


def written_and_run(inputs, **tuning):
    return steps.run_as(inputs, Tuning("pallas_tpu", interpret=LOOK_FOR_RACES, **tuning))


# Rows in a word and words of a row: one and several. Eight words per token lie at a pitch of nine.
@pytest.mark.parametrize(
    ("kv_layout", "name", "changes"),
    [
        ("interleaved_words", "mixed", {"num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}),
        ("interleaved_words", "window", {"num_kv_heads": 1, "head_dim": 128, "dtype": "bfloat16"}),
        ("interleaved_words", "chunk", {"num_kv_heads": 4, "head_dim": 256}),
        ("interleaved_words", "capped_with_sinks", {"num_kv_heads": 3, "head_dim": 80}),
        ("interleaved_words", "guesses", {"num_kv_heads": 4, "head_dim": 64, "dtype": "bfloat16"}),
        ("interleaved_words", "not_causal", {"num_kv_heads": 3, "head_dim": 64}),
        ("interleaved", "mixed", {"num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}),
        (
            "interleaved",
            "window_of_one",
            {"num_kv_heads": 2, "head_dim": 128, "max_blocks": 12},
        ),
        ("tokens_first", "chunk_and_window", {"num_kv_heads": 8, "head_dim": 128}),
        ("tokens_first", "bf16", {"num_kv_heads": 2, "head_dim": 128}),
    ],
)
def test_written_and_attended_to(kv_layout, name, changes):
    inputs = made(name, kv_layout, **changes)
    assert_exact(inputs, *written_and_run(inputs))


@pytest.mark.parametrize(
    ("kv_layout", "changes"),
    [
        ("interleaved_words", {"dtype": "float8_e5m2", "scale": "token", "head_dim": 64}),
        ("interleaved_words", {"dtype": "int8", "scale": "head", "head_dim": 80}),
        ("tokens_first", {"dtype": "int8", "scale": "token", "num_kv_heads": 4}),
    ],
)
def test_quantised(kv_layout, changes):
    inputs = made("mixed", kv_layout, **({"head_dim": 128} | changes))
    assert_exact(inputs, *written_and_run(inputs))


@pytest.mark.parametrize(
    "tuning",
    [
        {"chip": V4, "cores": "batch"},
        {"chip": dataclasses.replace(V4, cores=1), "pages_per_block": 2},
    ],
)
def test_cores_and_splits(tuning):
    shape = {"num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    inputs = made("decoding", "interleaved_words", **shape)
    assert_exact(inputs, *written_and_run(inputs, **tuning))


def test_large_blocks_are_worked_on_some_heads_after_the_others():
    """Blocks of 4 MiB in passes; a pass loads its heads' rows from where they lie."""
    case = Case("large", num_seqs=3, lens=(67, 0, 128), num_heads=64, num_kv_heads=64,
                head_dim=128, page_size=64, max_blocks=2)  # fmt: skip
    inputs = make(case, "interleaved_words")
    form = PageFormat(KVLayout.INTERLEAVED_WORDS, 64, 64, 128, 128, FLOAT32, word=(1, 128))
    assert heads_per_pass(Geometry(form, 1), 1) == 16
    chip = dataclasses.replace(UNKNOWN_CHIP, vmem_bytes=64 * MIB)
    out, lse = attend_as(inputs, Tuning(backend="pallas_tpu", chip=chip))
    tolerance.assert_within_rounding(inputs, out, lse)


def test_on_a_mesh():
    """Heads, pages and sequences split: what a shard has of a token is fewer words."""
    mesh = build_mesh("data=2,context=2,kv=2")
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    inputs = on(mesh, steps.named("capped_with_sinks").replace(**shape), "interleaved_words")
    assert_exact(inputs, *run(inputs, "pallas_tpu", mesh, written=True))


@pytest.mark.parametrize("order", ["random", "prompt"])
@pytest.mark.parametrize(
    ("kv_layout", "dtype", "num_kv_heads", "head_dim"),
    [
        ("interleaved_words", "bfloat16", 2, 128),
        ("interleaved_words", "bfloat16", 2, 64),
        ("interleaved_words", "float32", 1, 80),
        ("interleaved_words", "int8", 2, 256),
        ("interleaved", "float8_e5m2", 2, 128),
        ("tokens_first", "float32", 8, 128),
    ],
)
def test_write_puts_what_xla_puts(kv_layout, dtype, num_kv_heads, head_dim, order):
    """Of each layer; dropped tokens leave no trace."""
    num_pages, page_size, num_tokens = 5, 8, 37
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(30 * rng.standard_normal(shape, np.float32)).astype(dtype)
    sizes = (num_pages, num_kv_heads, page_size, head_dim)
    cache = PagedKVCache.abstract(*sizes, dtype=dtype, kv_layout=kv_layout, num_layers=2)
    cache = jax.tree.map(lambda x: draw(*x.shape).astype(x.dtype), cache)
    place = np.arange(3, 3 + num_tokens)
    if order == "random":
        place = rng.choice(num_pages * page_size, num_tokens, replace=False)
    page, slot = np.divmod(place.astype(np.int32), page_size)
    page = np.where(rng.random(num_tokens) < 0.4, num_pages, page)
    key, value = draw(2, num_tokens, num_kv_heads, head_dim)
    scales = jnp.ones((num_tokens, num_kv_heads, 2)) if cache.scale == "token" else None
    writes = Writes(jnp.asarray(page, jnp.int32), jnp.asarray(slot))
    for layer in (0, 1):
        one, tuning = cache.of_layer(jnp.int32(layer)), Tuning(interpret=LOOK_FOR_RACES)
        work = pallas_tpu.prepare_writes(writes, num_pages, cache.format, tuning)
        tokens = Stored(key, value, scales)
        wanted = xla.write(one, tokens, writes, None, Tuning())
        write = jax.jit(lambda *arrays: pallas_tpu.write(*arrays, tuning))  # noqa: B023
        actual = write(one, tokens, writes, work)
        flat = lambda cache: [x.reshape(-1) for x in jax.tree.leaves((cache.arrays, cache.scales))]
        chex.assert_trees_all_equal(flat(actual), flat(wanted))


@pytest.mark.parametrize("what", ["key", "value"])
def test_a_nan_of_a_head_is_seen_by_its_queries(what):
    """Not by those of the head whose rows lie in the same words, nor by another sequence."""
    inputs = made("decoding", "tokens_first", num_kv_heads=2, head_dim=128, dtype="bfloat16")
    clean = run(inputs, "pallas_tpu")[0]
    seq = int(np.argmax(inputs.context_lens > 3))
    array = inputs.key_cache if what == "key" else inputs.value_cache
    array[inputs.block_tables[seq, 0], 2, 1, 5] = np.nan
    out, lse = run(inputs, "pallas_tpu")
    seen = np.zeros(out.shape[:2], bool)
    seen[seq, 2:] = True
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)
    np.testing.assert_array_equal(out[~seen], clean[~seen])


FORMS = {
    "rows_of_80": (
        PageFormat(KVLayout.INTERLEAVED, 4, 16, 80, 80, BFLOAT16),
        "rows of 80",
    ),
    "rows_of_256": (PageFormat(KVLayout.TOKENS_FIRST, 8, 16, 256, 256, BFLOAT16), "rows of 128 as"),
    "six_rows": (PageFormat(KVLayout.INTERLEAVED, 3, 16, 128, 128, BFLOAT16), "rows=6 per token"),
    "one_row": (PageFormat(KVLayout.TOKENS_FIRST, 1, 16, 128, 128, BFLOAT16), "rows=1 per token"),
    "page_of_one": (
        PageFormat(KVLayout.INTERLEAVED_WORDS, 1, 1, 128, 128, BFLOAT16, word=(2, 128)),
        "page_size=1, 1 per cache row, does not fill tiles of 8 rows; use page_size=8",
    ),
    "words_of_16": (
        PageFormat(KVLayout.INTERLEAVED_WORDS, 1, 16, 128, 128, BFLOAT16, word=(1, 128)),
        "words of 1 rows of bfloat16 are not of 32 bits; use words of 2 rows",
    ),
    "float16": (
        PageFormat(KVLayout.INTERLEAVED_WORDS, 1, 16, 128, 128, FLOAT16, word=(2, 128)),
        "no matmul for caches of float16",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_read_as_it_lies_is_refused(name):
    """With what would be; a caller who names no backend gets one that has it."""
    form, message = FORMS[name]
    with pytest.raises(NotImplementedError, match=f"{message}.*backend='xla'"):
        check_format(form)
    assert default_for("tpu", "TPU v6e", form) == "xla"


def test_heads_are_not_split_over_cores():
    """A core that copies half of a token's heads gains nothing: they are one piece."""
    form = PageFormat(KVLayout.INTERLEAVED_WORDS, 4, 16, 128, 128, BFLOAT16, word=(2, 128))
    assert choose_cores(form, V4, Tuning()) == Cores(2, by_heads=False)
    with pytest.raises(NotImplementedError, match="use 'batch'"):
        choose_cores(form, V4, Tuning(cores="kv_head"))


class TestExecuted:
    """Compiled, and executed on a modelled core; needs libtpu, no TPU."""

    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")

    @pytest.mark.parametrize(("topology", "most"), [("v6e:2x2", 0.55), ("tpu7x:2x2x1", 0.99)])
    def test_decode_copies_no_more_and_stays_within_its_limit(self, topology, most):
        """Issue over HBM's time; loads that conflict over banks would make it 0.94 and 1.67."""
        case = "64 x 4096, G4 K8, page 64"
        (ours,), (theirs,) = (
            worker.call(worker.execute_case, topology, kernel, case, "off")
            for kernel in ("decode", "decode, token-major")
        )
        assert (theirs.copies, theirs.copied_bytes) == (ours.copies, ours.copied_bytes)
        assert theirs.guessed == 0
        assert theirs.ratio < most

    def test_a_prompt_is_written_by_tokens(self):
        """A copy each, in few cycles, and nothing is read first."""
        arguments = ("step write, token-major", "1024 of 8192, G4 K8, page 64", "off")
        (row,) = worker.call(worker.execute_case, "v6e:2x2", *arguments)
        assert row.copies == 1024
        assert row.copied_bytes == 1024 * 2 * 8 * 128 * 2
        assert row.cycles / 1024 < 17
