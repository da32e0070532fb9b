"""Defects seen in the implementations that came before this one, one test each."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardpage

from . import tolerance
from .backends import attend, backends
from .cases import Case, build_mesh, make


@backends
def test_1_no_context_gives_zeros_not_the_mean_of_what_is_there(backend):
    inputs = make(Case("defect", num_seqs=2, lens=(0, 64)), poison=False)
    inputs.block_tables[0] = [1, 2, 3, 4]
    out, lse = attend(inputs, backend)
    assert not out[0].any()
    assert (lse[0] == -np.inf).all()
    assert out[1].any()


@backends
def test_2_padding_and_page_tails_are_not_read(backend):
    """-1 in the table is not the last page; NaN there and in page tails stays where it is."""
    inputs = make(Case("defect", num_seqs=2, lens=(33, 16)))
    inputs.block_tables[0, 3] = inputs.block_tables[1, 1:] = -1
    inputs.key_cache, inputs.value_cache = (
        np.concatenate([cache, np.full_like(cache[:1], np.nan)])
        for cache in (inputs.key_cache, inputs.value_cache)
    )
    assert np.isnan(inputs.value_cache[inputs.block_tables[0, 2], :, 1:]).all()
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


@backends
@pytest.mark.parametrize(
    ("seq", "length", "page", "message"),
    [
        (0, 64, 12, r"sequence 0, entry 1: page id 12 must be in \[0, 12\)"),
        (1, 64, -1, r"sequence 1, entry 1: page id -1 must be in \[0, 12\)"),
        (1, 65, 3, r"sequence 1: context_len 65 must be in \[0, 64\], its table's capacity"),
    ],
)
def test_3_bad_pages_and_lengths_are_not_accepted(backend, seq, length, page, message):
    """NaN on the device, for the sequence that is wrong; an error on the host."""
    inputs = make(Case("defect", num_seqs=2, lens=(64, 64)), poison=False)
    inputs.context_lens, inputs.num_pages = inputs.context_lens.copy(), 12
    inputs.key_cache = np.resize(inputs.key_cache, (12, *inputs.key_cache.shape[1:]))
    inputs.value_cache = np.resize(inputs.value_cache, inputs.key_cache.shape)
    inputs.context_lens[seq], inputs.block_tables[seq, 1] = length, page
    out, lse = attend(inputs, backend)
    assert np.isnan(out[seq]).all()
    assert np.isnan(lse[seq]).all()
    assert np.isfinite(out[1 - seq]).all()
    with pytest.raises(ValueError, match=message):
        shardpage.validate_tables(
            inputs.context_lens, inputs.block_tables, num_pages=12, page_size=16
        )


@backends
@pytest.mark.parametrize("attn_scale", [None, 0.125])
def test_4_the_output_has_the_querys_dtype_whatever_the_scale(backend, attn_scale):
    inputs = make(Case("defect", dtype="bfloat16", num_seqs=2))
    out, _ = attend(inputs, backend, attn_scale=attn_scale)
    chex.assert_type(out, jnp.bfloat16)


@backends
def test_5_an_ambiguous_cache_is_not_guessed_at(backend):
    """8 KV heads and 4 pages under 32 query heads: legal either way, and one of them is wrong."""
    inputs = make(
        Case("defect", num_seqs=1, num_heads=32, num_kv_heads=8, lens=(25,)), "heads_first"
    )
    assert inputs.key_cache.shape[:2] == (8, 4)
    with pytest.raises(ValueError, match=r"legal both as blocks_first .* and as heads_first"):
        attend(inputs, backend, kv_layout=None)
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend))


def test_5_nor_does_the_guess_depend_on_a_shards_shape():
    """8 KV heads and 12 pages under 8 query heads: heads_first. A shard has 2, 12 and 2."""
    inputs = make(
        Case("defect", num_seqs=4, num_heads=8, num_kv_heads=8, lens=(33, 64, 16, 40)),
        "heads_first",
    )
    assert inputs.num_pages == 13
    mesh = build_mesh("kv=4")
    out, lse = attend(inputs, kv_layout=None, mesh=mesh)
    tolerance.assert_within_rounding(inputs, out, lse)


@pytest.mark.parametrize("kv_layout", ["blocks_first", "heads_first"])
def test_6_sequences_and_pages_split_together_take_global_page_ids(kv_layout):
    inputs = make(Case("defect"), kv_layout, num_seq_shards=4)
    assert inputs.block_tables[-1].max() > inputs.num_pages // 2
    out, lse = attend(inputs, mesh=build_mesh("data=4"))
    tolerance.assert_within_rounding(inputs, out, lse)


@backends
def test_7_documented_options_work(backend):
    """They raised there, or were without effect. One by one they are among the cases."""
    inputs = make(
        Case(
            "defect_7",
            num_seqs=4,
            attn_logits_soft_cap=3.0,
            max_context_len=60,
            num_splits=4,
            pages_per_compute_block=1,
            sliding_window=50,
        )
    )
    options = {"mask_value": -2e38, "inline_seq_dim": backend != "xla"}
    tolerance.assert_within_rounding(inputs, *attend(inputs, backend, **options))


def test_7_the_signature_is_the_one_that_is_documented_there():
    parameters = list(inspect.signature(shardpage.page_attention).parameters.values())
    assert [parameter.name for parameter in parameters[:14]] == [
        "query",
        "key_cache",
        "value_cache",
        "context_lens",
        "block_tables",
        "attn_scale",
        "max_context_len",
        "num_splits",
        "mask_value",
        "attn_logits_soft_cap",
        "pages_per_compute_block",
        "megacore_mode",
        "inline_seq_dim",
        "sliding_window",
    ]
    assert [parameter.default for parameter in parameters[5:14]] == [
        None, None, 0, -2.381976426469702e38, None, None, None, True, None
    ]  # fmt: skip
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters[8:])


def test_8_memory_does_not_grow_with_the_tables_width():
    """A table of 64 x 4096 pages: the old way gathers 4 GB of keys for it."""

    def temp_bytes(max_blocks: int) -> int:
        cache = jax.ShapeDtypeStruct((4096, 8, 16, 128), jnp.float32)
        attention = jax.jit(
            lambda *arrays: shardpage.page_attention(
                *arrays, kv_layout="blocks_first", backend="xla"
            )
        )
        compiled = attention.lower(
            jax.ShapeDtypeStruct((64, 32, 128), jnp.float32),
            cache,
            cache,
            jax.ShapeDtypeStruct((64,), jnp.int32),
            jax.ShapeDtypeStruct((64, max_blocks), jnp.int32),
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temp_bytes(512), temp_bytes(4096)
    table_bytes = 4 * 64 * 4096
    assert many - few < 16 * table_bytes
