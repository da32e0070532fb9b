"""Other libraries' calls, one device: their case matrices, against the oracle, cache as it lies."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpage.adapters import ejkernel, jax_pallas, sglang_jax, tpu_inference

from . import cases, reference
from .peers_batch import assert_attends, assert_written, batch
from .steps import Step

# A prompt, decoding, guesses, nothing to do; a token to spare. Few: compiling takes the time.
SMALL = Step("small", ((3, 3), (21, 1), (30, 3), (9, 0)), 8, None, num_heads=4, num_kv_heads=2)
SMALL = SMALL.replace(head_dim=128, max_blocks=4)
DECODING = SMALL.replace(name="decoding", seqs=((13, 1), (32, 1), (1, 1)), num_queries=3)
PROMPTS = SMALL.replace(name="prompts", seqs=((16, 16), (3, 3)), num_queries=19)


def small(**changes) -> Step:
    return SMALL.replace(**changes)


class TestJax:
    """jax.experimental.pallas.ops.tpu: no write, a scale of 1 unless told otherwise."""

    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (SMALL, {"sm_scale": 0.1}),
            (SMALL, {}),
            (DECODING, {"sm_scale": 0.1, "num_kv_pages_per_block": 2, "num_queries_per_block": 1}),
            (
                PROMPTS,
                {"sm_scale": 0.1, "k_scale": 0.5, "v_scale": 3.0, "vmem_limit_bytes": 1 << 20},
            ),
            (small(window=7), {"sm_scale": 0.1, "soft_cap": 1.5, "sliding_window": 7}),
            (small(dtype="bfloat16", num_heads=6), {"sm_scale": 0.1, "mask_value": None}),
            (small(head_dim=80, num_kv_heads=4), {"sm_scale": 0.1}),
        ],
        ids=["mixed", "scale_of_1", "decoding", "scales", "window", "bf16", "dim80"],
    )
    def test_ragged(self, step, options):
        made = batch(step)
        (pages,) = made.cache("interleaved", written=True)
        num_seqs = jnp.array([made.num_seqs], jnp.int32)
        lists = (*map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens)), num_seqs)
        with jax.numpy_rank_promotion("raise"):  # as jax's own tests have it
            out = jax_pallas.ragged_paged_attention(made.tokens[0], pages, *lists, **options)
        scale = options.get("sm_scale", 1.0) * options.get("k_scale", 1.0)
        how = {"scale": scale, "soft_cap": options.get("soft_cap")}
        assert_attends(made, out, v_scale=options.get("v_scale", 1.0), **how)
        assert not pages.is_deleted()

    @pytest.mark.parametrize(
        ("changes", "options"),
        [
            ({"num_heads": 4, "num_kv_heads": 1, "head_dim": 128}, {}),
            ({"lens": (40, 0, 17, 64)}, {"attn_logits_soft_cap": 2.0, "inline_seq_dim": False}),
            ({"dtype": "bfloat16", "page_size": 8}, {"mask_value": -1e38}),
        ],
    )
    def test_decoding(self, changes, options):
        made = cases.make(cases.Case("jax", num_seqs=4).replace(**changes), "heads_first")
        arrays = made.query, made.key_cache, made.value_cache, made.context_lens, made.block_tables
        out = jax_pallas.paged_attention(
            *map(jnp.asarray, arrays), pages_per_compute_block=2, **options
        )
        exact, _ = reference.page_attention(
            *made.arrays,
            kv_layout="heads_first",
            scale=1.0,
            soft_cap=options.get("attn_logits_soft_cap"),
        )
        assert out.dtype == made.query.dtype
        bound = 2e-2 if made.case.dtype == "bfloat16" else 2e-6
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=bound * 4)

    def test_refuses(self):
        made = batch(DECODING)
        (pages,) = made.cache("interleaved", written=True)
        lists = (*map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens)), jnp.array([3]))
        call = functools.partial(jax_pallas.ragged_paged_attention, made.tokens[0], pages, *lists)
        with pytest.raises(ValueError, match="sliding_window=0 must be a positive"):
            call(sliding_window=0)
        with pytest.raises(ValueError, match="num_kv_pages_per_block=-1 must be"):
            call(num_kv_pages_per_block=-1)
        with pytest.raises(ValueError, match="num_queries_per_block=0 must be"):
            call(num_queries_per_block=0)
        with pytest.raises(ValueError, match=r"kv_lens has shape \(5,\), cu_q_lens \(4,\)"):
            jax_pallas.ragged_paged_attention(
                made.tokens[0], pages, lists[0], lists[1], lists[2][:4], lists[3]
            )

        made = cases.make(cases.named("plain"), "heads_first")
        lists = (made.context_lens, made.block_tables)
        quantized = types.SimpleNamespace(weight=made.key_cache, scales=made.key_cache)
        with pytest.raises(NotImplementedError, match="k_pages='SimpleNamespace': quantised pages"):
            jax_pallas.paged_attention.__wrapped__(
                made.query, quantized, made.value_cache, *lists, pages_per_compute_block=1
            )
        with pytest.raises(NotImplementedError, match="megacore_mode='batch' splits a kernel"):
            jax_pallas.paged_attention(
                made.query, made.key_cache, made.value_cache, *lists,
                pages_per_compute_block=1, megacore_mode="batch",
            )  # fmt: skip

    def test_signatures_are_those_of_the_jax_here(self):
        theirs = pytest.importorskip("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
        decode = pytest.importorskip("jax.experimental.pallas.ops.tpu.paged_attention")
        for their, our in (
            (theirs.ragged_paged_attention, jax_pallas.ragged_paged_attention),
            (decode.paged_attention, jax_pallas.paged_attention),
        ):
            shape = lambda call: [
                (p.name, p.kind, p.default if p.name != "mask_value" else 0)
                for p in inspect.signature(call).parameters.values()
                if p.name != "backend"  # ours
            ]
            assert shape(our) == shape(their)


class TestTpuInference:
    """v3: writes first, returns the cache, in place; and its variant for head_dim 64."""

    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (SMALL, {"sm_scale": 0.1}),
            (SMALL, {}),
            (small(head_dim=64, dtype="bfloat16"), {"sm_scale": 0.1}),  # padded
            (small(head_dim=80, num_kv_heads=1, dtype="bfloat16"), {"sm_scale": 0.1}),
            (small(head_dim=192, dtype="bfloat16"), {"sm_scale": 0.1, "out_dtype": jnp.float32}),
            (small(window=7), {"sm_scale": 0.1, "sliding_window": 7, "soft_cap": 1.5}),
            (small(causal=False), {"sm_scale": 0.1, "use_causal_mask": False}),
            (small(dtype="float16"), {"sm_scale": 0.1, "k_scale": 0.5, "v_scale": 3.0}),
            (DECODING, {"sm_scale": 0.1, "d_block_sizes": (8, 16, 8, 16), "q_scale": 2.0}),
            (PROMPTS, {"sm_scale": 0.1, "chunk_prefill_size": 8, "mask_value": -1e30}),
        ],
        ids=[
            *("mixed", "scale_of_1", "dim64", "one_head", "dim192", "window", "bidirectional"),
            *("scales", "decoding", "prompts"),
        ],
    )
    def test_v3(self, step, options):
        made = batch(step)
        (cache,) = made.cache("", shared=False)
        out, new = tpu_inference.ragged_paged_attention(*made.tokens, cache, *made.lists, **options)
        dtype = options.get("out_dtype", "float32" if step.dtype == "float32" else "bfloat16")
        scale = options.get("sm_scale", 1.0) * options.get("k_scale", 1.0)
        how = {"scale": scale, "soft_cap": options.get("soft_cap")}
        assert_attends(made, out, dtype=dtype, v_scale=options.get("v_scale", 1.0), **how)
        assert_written(made, new, shared=False)
        assert cache.is_deleted()
        assert new.shape == cache.shape

    def test_a_layer_that_shares_another_ones_cache(self):
        made = batch(SMALL)
        (cache,) = made.cache("", shared=False, written=True)
        queries, keys, values = made.tokens
        out, new = tpu_inference.ragged_paged_attention(
            queries, keys * np.nan, values, cache, *made.lists, update_kv_cache=False, sm_scale=0.1
        )
        assert_attends(made, out, scale=0.1)
        assert_written(made, new, shared=False)

    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (small(head_dim=64), {}),
            (small(head_dim=64, sinks=True, dtype="bfloat16"), {"sm_scale": 0.1}),
            (
                small(head_dim=64, sinks=True, dtype="bfloat16", num_kv_heads=1, window=7),
                {"sm_scale": 0.1, "sliding_window": 7, "soft_cap": 1.5},
            ),
            (
                small(head_dim=64, num_kv_heads=3, num_heads=6, dtype="bfloat16"),
                {"sm_scale": 0.1, "k_scale": 0.5, "v_scale": 3.0, "num_kv_pages_per_block": 2},
            ),
        ],
        ids=["scale_of_1", "sinks", "one_head", "three_heads"],
    )
    def test_hd64(self, step, options):
        made = batch(step)
        (cache,) = made.cache("", shared=True)
        out, new = tpu_inference.ragged_paged_attention_hd64(
            *made.tokens, cache, *made.lists, made.sinks, **options
        )
        scale = options.get("sm_scale", 1.0) * options.get("k_scale", 1.0)
        how = {"scale": scale, "soft_cap": options.get("soft_cap")}
        assert_attends(made, out, v_scale=options.get("v_scale", 1.0), **how)
        assert_written(made, new, shared=True)
        assert cache.is_deleted()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_cache_stays_where_it_is(self, dtype):
        shapes = [(9, 16, 128), (9, 8, 128), (9, 8, 128), (4096, 16, 8, 2, 128)]
        if dtype == "float32":
            shapes[3] = (4096, 16, 16, 1, 128)
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        lists = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, 4 * 8, 5, 3)]
        call = tpu_inference.ragged_paged_attention.lower(*arrays, *lists)
        memory = call.compile().memory_analysis()
        cache_bytes = arrays[3].size * arrays[3].dtype.itemsize
        assert memory.alias_size_in_bytes == cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 20

    def test_one_bad_table_spoils_its_own_sequence(self):
        made = batch(SMALL)
        made.tables[1, 0] = 10_000
        (cache,) = made.cache("", shared=False)
        out, _ = tpu_inference.ragged_paged_attention(*made.tokens, cache, *made.lists)
        np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), np.arange(8) == 3)

    def test_refuses(self):
        made = batch(DECODING)
        (cache,) = made.cache("", shared=False)
        call = functools.partial(
            tpu_inference.ragged_paged_attention, *made.tokens, cache, *made.lists
        )
        with pytest.raises(NotImplementedError, match="debug_mode=True: it prints"):
            call(debug_mode=True)
        with pytest.raises(ValueError, match="skip_kv_mask=True is for use_causal_mask=False"):
            call(skip_kv_mask=True)
        with pytest.raises(ValueError, match="sm_scale=inf must be a finite number"):
            call(sm_scale=float("inf"))
        with pytest.raises(ValueError, match="m_block_sizes=0 must be a positive"):
            call(m_block_sizes=(8, 0, 8, 8))
        lists = made.lists
        with pytest.raises(ValueError, match=r"distribution has shape \(1,\); pass \(3,\)"):
            tpu_inference.ragged_paged_attention(*made.tokens, cache, *lists[:3], lists[3][:1])
        with pytest.raises(ValueError, match=r"page_indices has shape \(19,\) for 5 sequences"):
            tpu_inference.ragged_paged_attention(
                *made.tokens, cache, lists[0], lists[1][:-1], *lists[2:]
            )
        with pytest.raises(ValueError, match=r"2 KV heads of head_dim=128, over 1 shards, take"):
            tpu_inference.ragged_paged_attention(*made.tokens, cache[:, :, :2], *lists)
        with pytest.raises(ValueError, match=r"pass \[pages, page_size, rows / n, n, 128\]"):
            tpu_inference.ragged_paged_attention(*made.tokens, cache[..., 0, :], *lists)


class TestSglangJax:
    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (SMALL, {"sm_scale": 0.1}),
            (small(dtype="bfloat16", page_size=1, max_blocks=32), {"sm_scale": 0.1}),
            (small(head_dim=64, window=7), {"sm_scale": 0.1, "sliding_window": 7, "soft_cap": 1.5}),
            (small(causal=False), {"sm_scale": 0.1, "causal": 0}),
            (small(sinks=True), {"sm_scale": 0.1, "out_dtype": jnp.float32}),
            (small(sinks=True, num_heads=1, num_kv_heads=1), {"sm_scale": 0.1}),
            (small(sinks=True, num_kv_heads=1, dtype="bfloat16"), {"sm_scale": 0.1}),
            (
                small(num_kv_heads=4, head_dim=256, window=7, dtype="bfloat16"),
                {"sm_scale": 0.1, "sliding_window": 7, "soft_cap": 1.5},
            ),
        ],
        ids=[
            *("mixed", "pages_of_one_token", "window", "bidirectional", "sinks", "one_head"),
            *("one_kv_head", "all_kv_heads_dim256"),
        ],
    )
    def test_matches_the_oracle(self, step, options):
        made = batch(step)
        (cache,) = made.cache("", shared=False)
        out, new = self.call(made, cache, made.sinks, **options)
        dtype = options.get("out_dtype", "float32" if step.dtype == "float32" else "bfloat16")
        how = {"scale": options["sm_scale"], "soft_cap": options.get("soft_cap")}
        assert_attends(made, out, dtype=dtype, **how)
        assert_written(made, new, shared=False)
        assert cache.is_deleted()

    @staticmethod
    def call(made, cache, sinks=None, **options):
        """Rows of the table concatenated, each only as long as its sequence."""
        size = made.inputs.step.page_size
        pages = [-(-int(n) // size) for n in made.inputs.context_lens]
        flat = [made.tables[i, :n] for i, n in enumerate(pages)]
        starts = np.cumsum([0, *pages]).astype(np.int32) * size
        spare = np.full(len(made.cu_q_lens) - len(starts), -7, np.int32)
        kv_lens, _, cu_q_lens, distribution = made.lists
        arrays = (np.concatenate([*flat, spare]), np.concatenate([starts, spare]))
        page_indices, cu_kv_lens = map(jnp.asarray, arrays)
        lists = (kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution)
        return sglang_jax.ragged_paged_attention(
            *made.tokens, cache, *lists, None, sinks, **options
        )

    def test_logits_grow_with_the_position(self):
        made = batch(SMALL)
        (cache,) = made.cache("", shared=False)
        out, _ = self.call(made, cache, sm_scale=0.1, soft_cap=2.0, xai_temperature_len=10.0)
        positions = np.array([0, 1, 2, 20, 27, 28, 29, -1])
        grown = np.where(positions > 10, np.log2(np.maximum(positions, 1)) / np.log2(10.0), 1.0)
        query = made.inputs.query.astype(np.float64) * grown[:, None, None]
        assert_attends(made, out, query=query, scale=0.1, soft_cap=2.0)

    def test_one_sink_for_all_heads(self):
        made = batch(small(sinks=True))
        made.inputs.sinks[:] = 0.7
        (cache,) = made.cache("", shared=False)
        out, _ = self.call(made, cache, 0.7, sm_scale=0.1)
        assert_attends(made, out, scale=0.1)

    def test_refuses(self):
        made = batch(DECODING)
        (cache,) = made.cache("", shared=False)
        lists = made.lists
        mask = jnp.ones(8, jnp.int32)
        with pytest.raises(NotImplementedError, match="custom_mask: a token here sees an interval"):
            sglang_jax.ragged_paged_attention(
                *made.tokens, cache, *lists[:3], lists[2], lists[3], mask, causal=0
            )
        with pytest.raises(ValueError, match=r"xai_temperature_len=1\.0 must be above 1"):
            self.call(made, cache, xai_temperature_len=1.0)


class TestEjkernel:
    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (small(sinks=True), {}),
            (small(dtype="bfloat16", window=7), {"softmax_scale": 0.3, "sliding_window": 7}),
            (DECODING, {"logits_soft_cap": 1.5, "platform": "xla", "optimized": True}),
            (
                small(num_kv_heads=4, head_dim=8),
                {"logits_soft_cap": 1e4, "sliding_window": 1000, "mask_value": -1e10},
            ),
        ],
        ids=["sinks", "window", "decoding", "cap_and_window_beyond_all"],
    )
    def test_v2(self, step, options):
        made = batch(step)
        (pages,) = made.cache("interleaved", written=True)
        lists = map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens))
        out = ejkernel.ragged_page_attention_v2(
            made.tokens[0], pages, *lists, jnp.array([made.num_seqs]), made.sinks, **options
        )
        how = {"scale": options.get("softmax_scale"), "soft_cap": options.get("logits_soft_cap")}
        assert_attends(made, out, **how)

    @pytest.mark.parametrize(
        ("step", "shared", "options"),
        [
            (small(sinks=True), False, {}),
            (small(dtype="bfloat16", head_dim=64), True, {"softmax_scale": 0.1}),
            (small(dtype="bfloat16", head_dim=64), False, {"softmax_scale": 0.1, "v_scale": 0.5}),
            (small(window=7), False, {"softmax_scale": 0.1, "sliding_window": 7, "k_scale": 2.0}),
            (
                small(dtype="float16", head_dim=64, window=7),
                False,
                {"softmax_scale": 0.1, "sliding_window": 7, "logits_soft_cap": 1.5},
            ),
            (small(head_dim=64, sinks=True, window=7), True, {"sliding_window": 7}),
            (small(dtype="bfloat16", head_dim=80, num_kv_heads=4), False, {"softmax_scale": 0.1}),
        ],
        ids=[
            *("sinks", "shared_rows", "padded_rows", "window", "float16", "shared_with_sinks"),
            "dim80",
        ],
    )
    def test_v3(self, step, shared, options):
        made = batch(step)
        (cache,) = made.cache("", shared=shared)
        out, new = ejkernel.ragged_page_attention_v3(
            *made.tokens, cache, *made.lists, made.sinks, **options
        )
        scale = options.get("softmax_scale", 1.0) * options.get("k_scale", 1.0)
        how = {"scale": scale, "soft_cap": options.get("logits_soft_cap")}
        assert_attends(made, out, v_scale=options.get("v_scale", 1.0), **how)
        assert_written(made, new, shared=shared)
        assert cache.is_deleted()

    @pytest.mark.parametrize(
        ("step", "options"),
        [
            (small(sinks=True), {"sliding_window": 0, "logits_soft_cap": 0.0}),
            (small(dtype="bfloat16", window=7), {"softmax_scale": 0.3, "sliding_window": 7}),
            (small(causal=False), {"causal": False, "logits_soft_cap": 1.5}),
            (
                small(sinks=True, head_dim=32, window=8, dtype="bfloat16"),
                {"sliding_window": 8, "logits_soft_cap": 10.0, "seq_threshold_3d": 8},
            ),
        ],
        ids=["sinks", "window", "bidirectional", "all_options"],
    )
    def test_unified(self, step, options):
        made = batch(step)
        arrays = made.cache("tokens_first", written=True)
        real = made.num_seqs  # there is no word for padding
        lists = (made.kv_lens[:real], made.tables[:real], made.cu_q_lens[: real + 1])
        out = ejkernel.unified_attention(
            made.tokens[0], *arrays, *map(jnp.asarray, lists), None, None, made.sinks, **options
        )
        how = {"scale": options.get("softmax_scale")}
        assert_attends(made, out, soft_cap=options.get("logits_soft_cap"), **how)

    def test_refuses(self):
        made = batch(DECODING)
        arrays = made.cache("tokens_first", written=True)
        lists = map(jnp.asarray, (made.kv_lens, made.tables, made.cu_q_lens))
        call = functools.partial(ejkernel.unified_attention, made.tokens[0], *arrays, *lists)
        slopes = jnp.ones(4)
        with pytest.raises(NotImplementedError, match="alibi_slopes adds to each logit"):
            call(slopes)
        with pytest.raises(NotImplementedError, match="qq_bias adds to each logit"):
            call(None, slopes)
        with pytest.raises(NotImplementedError, match="platform='triton' is a kernel of ejkernel"):
            call(platform="triton")
        with pytest.raises(ValueError, match="mesh, in_specs and out_specs go together"):
            call(in_specs=())

    def test_page_attention_takes_what_a_registry_passes_on(self):
        made = cases.make(cases.named("plain"), "blocks_first")
        arrays = made.query, made.key_cache, made.value_cache, made.context_lens, made.block_tables
        call = functools.partial(ejkernel.page_attention, *map(jnp.asarray, arrays))
        left = {"cfg": {"block_m": 64}, "num_warps": 4, "num_stages": 2}
        for platform in (None, "auto", "xla"):
            out = call(**left, platform=platform)
            np.testing.assert_array_equal(np.asarray(out), np.asarray(call()))
        with pytest.raises(NotImplementedError, match="platform='triton' is a kernel of ejkernel"):
            call(platform="triton")
        with pytest.raises(ValueError, match="platform='xla' and backend='xla' both name a back"):
            call(platform="xla", backend="xla")
