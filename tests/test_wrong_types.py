"""Wrong types in any public function: an error of ours that names the argument."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import meshes
import shardpage

from .test_errors import call, zeros


class Odd:
    """Nothing that any argument could be."""

    def __repr__(self):
        return "Odd()"


CACHE = shardpage.PagedKVCache.zeros(8, 2, 16, 64)


ANYTHING = (Odd(), "text", [1, 2], {}, 3, CACHE)


@pytest.mark.parametrize("value", ANYTHING, ids=repr)
class TestOfTheDevice:
    """What takes arrays."""

    @pytest.mark.parametrize(
        "name", ["query", "key_cache", "value_cache", "context_lens", "block_tables", "sinks"]
    )
    def test_arrays(self, name, value):
        with pytest.raises(
            ValueError, match=rf"{name} must be an array; got {type(value).__name__}"
        ):
            call(**{name: value})

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("attn_scale", "must be a finite number|must be 0 or between"),
            ("attn_logits_soft_cap", "must be a finite number"),
            ("mask_value", "stands in for -inf"),
            ("max_context_len", "must be a positive integer"),
            ("pages_per_compute_block", "must be a positive integer"),
            ("sliding_window", "must be a positive integer"),
            ("num_splits", "must be an integer >= 0"),
            ("megacore_mode", "must be one of"),
            ("inline_seq_dim", "must be True or False"),
            ("return_lse", "must be True or False"),
            ("interpret", "must be True, False or None"),
            ("backend", "is none of"),
            ("kv_layout", "is unknown; choose one of"),
            ("mesh", "must be a jax.sharding.Mesh"),
            ("layout", "must be a ShardLayout"),
        ],
    )
    def test_options(self, name, what, value):
        numbers = "attn_scale", "attn_logits_soft_cap", "max_context_len", "num_splits"
        if value == 3 and name in (*numbers, "pages_per_compute_block", "sliding_window"):
            pytest.skip("a good number")
        with pytest.raises(ValueError, match=f"{name}.* ({what})"):
            call(**{name: value})

    @pytest.mark.parametrize("name", ["num_pages", "num_kv_heads", "page_size", "head_dim"])
    def test_sizes_of_a_cache(self, name, value):
        if value == 3:
            value = True
        sizes = {"num_pages": 8, "num_kv_heads": 2, "page_size": 16, "head_dim": 64} | {name: value}
        with pytest.raises(ValueError, match=f"{name}=.* must be a positive integer"):
            shardpage.PagedKVCache.zeros(**sizes)

    @pytest.mark.parametrize("name", ["dtype", "kv_layout", "mesh", "layout"])
    def test_options_of_a_cache(self, name, value):
        with pytest.raises(ValueError, match=f"{name}.* (is no cache's|is unknown|must be a)"):
            shardpage.PagedKVCache.zeros(8, 2, 16, 64, **{name: value})

    @pytest.mark.parametrize(
        "name", ["cache", "key", "value", "seq_ids", "positions", "block_tables", "mesh", "layout"]
    )
    def test_writes(self, name, value):
        ids, tokens = zeros(3, dtype=jnp.int32), zeros(3, 2, 64)
        arguments = {"cache": CACHE, "key": tokens, "value": tokens, "seq_ids": ids,
                     "positions": ids, "block_tables": zeros(1, 2, dtype=jnp.int32)}  # fmt: skip
        if name == "cache" and value is CACHE:
            pytest.skip("a good cache")
        with pytest.raises(ValueError, match=f"{name} must be a"):
            shardpage.write_kv(**arguments | {name: value})

    @pytest.mark.parametrize("name", ["out_a", "lse_a", "out_b", "lse_b"])
    def test_merges(self, name, value):
        out, lse = zeros(2, 4), zeros(2)
        arguments = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | {name: value}
        with pytest.raises(ValueError, match=f"{name} must be an array"):
            shardpage.merge_partials(**arguments)

    @pytest.mark.parametrize("name", ["key", "value", "kv_layout", "head_dim"])
    def test_caches_of_ones_own(self, name, value):
        arrays = {"key": CACHE.key, "value": CACHE.value}
        arguments = arrays | {"kv_layout": "blocks_first", "head_dim": 64, name: value}
        what = "must be an array|is unknown|must be a positive integer|for head_dim=3; they must"
        with pytest.raises(ValueError, match=f"{name}.*({what})|({what})"):
            shardpage.PagedKVCache.of(**arguments)

    def test_an_axis_to_merge_over(self, value):
        with pytest.raises(
            ValueError, match=r"axis_name=.* must name one or several axes of the sh"
        ):
            shardpage.merge_across(zeros(2, 4), zeros(2), value)

    @pytest.mark.parametrize("method", [shardpage.ShardLayout.of, shardpage.ShardLayout().shards])
    def test_meshes_of_a_layout(self, method, value):
        with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh"):
            method(value)

    @pytest.mark.parametrize("name", ["out", "lse"])
    def test_merges_over_an_axis(self, name, value):
        arguments = {"out": zeros(2, 4), "lse": zeros(2)} | {name: value}
        with pytest.raises(ValueError, match=f"{name} must be an array"):
            shardpage.merge_across(**arguments, axis_name="context")

    @pytest.mark.parametrize("name", ["num_pages", "page_size", "num_seq_shards"])
    def test_host_checks(self, name, value):
        sizes = {"num_pages": 4, "page_size": 16, "num_seq_shards": 1}
        sizes[name] = 0 if value == 3 and name != "num_pages" else -1 if value == 3 else value
        with pytest.raises(ValueError, match=f"{name}=.* must be"):
            shardpage.validate_tables([3], np.zeros((1, 2), int), **sizes)
        with pytest.raises(ValueError, match=f"{name}=.* must be"):
            shardpage.validate_writes([0], [3], np.zeros((1, 2), int), **sizes)

    @pytest.mark.parametrize(
        ("name", "check"),
        [
            *((name, "tables") for name in ("context_lens", "block_tables")),
            *((name, "tables") for name in ("max_context_len", "sliding_window")),
            *((name, "writes") for name in ("seq_ids", "positions", "block_tables")),
        ],
    )
    def test_host_checks_of_arrays(self, name, check, value):
        value = {3: 2.5}.get(value, value) if isinstance(value, int) else value
        if value == [1, 2]:
            value = [[1], [2, 3]] if name == "block_tables" else [1.5]
        arguments = {"block_tables": np.zeros((1, 2), int), "num_pages": 4, "page_size": 16}
        first = "context_lens" if check == "tables" else "seq_ids"
        arguments |= {first: [0]} | ({"positions": [3]} if check == "writes" else {})
        with pytest.raises(ValueError, match=f"{name}.* must (be|hold)"):
            getattr(shardpage, f"validate_{check}")(**arguments | {name: value})

    @pytest.mark.parametrize("name", ["num_pages", "page_size", "num_seq_shards", "max_blocks"])
    def test_allocators(self, name, value):
        sizes = {"num_pages": 4, "page_size": 16, name: False if value == 3 else value}
        with pytest.raises(ValueError, match=f"{name}=.* must be a positive integer"):
            shardpage.PageAllocator(**sizes)

    @pytest.mark.parametrize("name", ["seqs", "heads", "context"])
    def test_axes(self, name, value):
        value = ("a", 1) if value == "text" else value or 1
        with pytest.raises(ValueError, match=f"{name}=.* must be an axis name"):
            shardpage.ShardLayout(**{name: value})


# What runs on the host alone: `meshes` and `PageAllocator`.

INTEGER = "{}=.* must be (a positive integer|an integer >= 0)"
NAMES = (str, int, bool, Odd)  # whatever is hashable
SPEC = "spec must be a text such as|text' has the entry 'text'"
UNKNOWN_SEQUENCE = "{} must be hashable|there is no sequence (Odd|'text|3|True)"


def allocator():
    pages = shardpage.PageAllocator(8, 16, num_seq_shards=2)
    pages.allocate("a", 20)
    return pages


def plan_heads(**changes):
    arguments = {"num_q_heads": 8, "num_kv_heads": 2, "mesh": "data=2,kv=4"} | changes
    return meshes.plan_heads(**arguments)


# What is called with anything, the error, and the types of it that are right.
CALLS = {
    "make-spec": (meshes.make, SPEC, ()),
    "make-devices": (lambda x: meshes.make("data=2", x), "devices must .*be .*JAX devices", ()),
    "make-axis_types": (lambda x: meshes.make("data=-1", axis_types=x), "axis_types must be", ()),
    "simulate-what": (meshes.simulate, "what=.* must be a pos|unknown slice 'text'", (int,)),
    "simulate-spec": (lambda x: meshes.simulate(2, x), SPEC, ()),
    "simulate-num_slices": (
        lambda x: meshes.simulate(2, "data=2", num_slices=x), INTEGER.format("num_slices"), (int,)),
    "topology-name": (meshes.topology, "name must be a slice|unknown slice 'text'", ()),
    "topology-spec": (lambda x: meshes.topology("v5e:2x2", x), SPEC, ()),
    "topology-num_slices": (
        lambda x: meshes.topology("v5e:2x2", num_slices=x), INTEGER.format("num_slices"), (int,)),
    "topology-megacore": (
        lambda x: meshes.topology("v4:2x2x1", megacore=x), "megacore must be True, F", (bool,)),
    **{
        f"plan_heads-{name}": (lambda x, name=name: plan_heads(**{name: x}), message, good)
        for name, message, good in [
            ("num_q_heads", INTEGER.format("num_q_heads"), (int,)),
            ("num_kv_heads", INTEGER.format("num_kv_heads"), (int,)),
            ("mesh", "mesh must be a mesh, or sizes|text' has the entry", (dict,)),
            ("surplus", "surplus=.* is not one of context, replicate, refuse", ()),
            ("cache_bytes", INTEGER.format("cache_bytes"), (int,)),
            ("seqs", "seqs must be the name of a mesh axis", (str,)),
            ("heads", "heads must be the name of a mesh axis", (str,)),
            ("context", "context must be the name of a mesh axis", (str,)),
        ]
    },
    "collectives-hlo": (
        lambda x: meshes.collectives(x, meshes.make("data=-1")), "hlo must be the text", (str,)),
    "collectives-mesh": (lambda x: meshes.collectives("", x), "mesh must be the jax.shard", ()),
    "MeshSpec-axes": (meshes.MeshSpec, "axes=.* must be a tuple of MeshAxis", ()),
    "MeshSpec-text": (meshes.MeshSpec.parse, "text must be axes|text' has the entry 'text'", ()),
    "MeshAxis-name": (meshes.MeshAxis, "name must be the name of a mesh axis", (str,)),
    "MeshAxis-ici": (lambda x: meshes.MeshAxis("a", x), INTEGER.format("ici"), (int,)),
    "MeshAxis-dcn": (lambda x: meshes.MeshAxis("a", 1, x), INTEGER.format("dcn"), (int,)),
    "resolve-num_devices": (
        meshes.MeshSpec.parse("a=-1").resolve, INTEGER.format("num_devices"), (int,)),
    "resolve-num_slices": (
        lambda x: meshes.MeshSpec.parse("a=-1").resolve(6, x),
        INTEGER.format("num_slices"),
        (int,),
    ),
    "over_slices": (
        meshes.MeshSpec.parse("a=-1").over_slices, INTEGER.format("num_slices"), (int,)),
    "factorings-total": (lambda x: meshes.factorings(x, 2), INTEGER.format("total"), (int,)),
    "factorings-num_axes": (lambda x: meshes.factorings(6, x), INTEGER.format("num_axes"), (int,)),
    "PodSlice-name": (meshes.PodSlice.parse, "name must be the name|unknown slice 'text'", ()),
    "PodSlice-chip": (lambda x: meshes.PodSlice(x, (2, 2)), "chip must be one of meshes.chips", ()),
    "PodSlice-shape": (
        lambda x: meshes.PodSlice(meshes.chips()["v5e"], x), "shape=.* must be a tuple of int", ()),
    "Chip-of_kind": (meshes.Chip.of_kind, "device_kind must be", (str,)),
    "PageAllocator-placement": (
        lambda x: shardpage.PageAllocator(8, 16, placement=x), "placement=.* is not one of", ()),
    "allocate-seq_id": (lambda x: allocator().allocate(x, 3), "seq_id must be hashable", NAMES),
    "allocate-num_tokens": (
        lambda x: allocator().allocate("b", x), INTEGER.format("num_tokens"), (int,)),
    "allocate-seq_shard": (
        lambda x: allocator().allocate("b", 3, x), "seq_shard=.*(must be an integer|range)", ()),
    "extend-num_tokens": (
        lambda x: allocator().extend("a", x), INTEGER.format("num_tokens"), (int,)),
    "fork-parent": (
        lambda x: allocator().fork(x, "b"), UNKNOWN_SEQUENCE.format("parent"), ()),
    "fork-child": (lambda x: allocator().fork("a", x), "child must be hashable", NAMES),
    "fork-num_tokens": (
        lambda x: allocator().fork("a", "b", x), INTEGER.format("num_tokens"), (int,)),
    "block_tables-max_blocks": (
        lambda x: allocator().block_tables(["a"], x), INTEGER.format("max_blocks"), (int,)),
    "block_tables-seq_ids": (
        lambda x: allocator().block_tables(x), "seq_ids must be a list|no sequence 1", ()),
    "context_lens": (
        lambda x: allocator().context_lens(x), "seq_ids must be a list|no sequence 1", ()),
    **{
        name: (
            lambda x, name=name: getattr(allocator(), name)(x),
            UNKNOWN_SEQUENCE.format("seq_id"),
            (),
        )
        for name in ("free", "pages", "num_tokens", "seq_shard")
    },
    "extend-seq_id": (lambda x: allocator().extend(x, 1), UNKNOWN_SEQUENCE.format("seq_id"), ()),
    "in": (lambda x: x in allocator(), "seq_id must be hashable", NAMES),
    "refcount": (lambda x: allocator().refcount(x), INTEGER.format("page"), (int,)),
    "num_free-seq_shard": (
        lambda x: allocator().num_free(x), "seq_shard=.*(must be an integer|range)", ()),
    "num_free-context_shard": (
        lambda x: allocator().num_free(None, x), "context_shard=.*(must be an int|range)", ()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{value!r:.10}")
        for name, (_, _, good) in CALLS.items()
        for value in (*ANYTHING, True)
        if type(value) not in good
    ],
)
def test_an_error_of_ours_names_the_argument(name, value):
    call, message, _ = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: meshes.topology("v5e:2x2", num_slices=2**40), "num_slices=.* must be at most 262"),
        (lambda: meshes.simulate(2**40), "what=1099511627776 must be at most 65536: CPU devices"),
        (lambda: meshes.simulate("v5e:2x2", num_slices=2**20), "what=4194304 must be at most"),
        (lambda: plan_heads(num_kv_heads=2**40), "num_kv_heads=1099511627776 must be at most"),
        (lambda: plan_heads(cache_bytes=sys.maxsize + 1), "cache_bytes=.* must be at most"),
        (lambda: plan_heads(mesh={"kv": 2.5}), r"mesh\['kv'\]=2.5 must be a positive integer"),
        (lambda: plan_heads(mesh={3: 2}), "mesh must be a mesh, or sizes .*; got 3"),
        (lambda: meshes.make("data=2147483648"), "ici=2147483648 must be at most 2147483647"),
        (lambda: meshes.MeshSpec((meshes.MeshAxis("a"),) * 2), "has an axis twice"),
        (lambda: meshes.MeshSpec((meshes.MeshAxis("a", -1, -1),)), "more than one size open"),
        (lambda: meshes.MeshSpec(()), r"axes=\(\) must be a tuple of MeshAxis, at least one"),
        (lambda: meshes.PodSlice.parse("v5e:" + "9" * 5000), "unknown slice a str"),
        (lambda: allocator().block_tables(["a"], 2**31 // 16), "max_blocks=134217728 must be at m"),
        (lambda: allocator().block_tables("ab"), r"seq_ids must be .*; got 'ab': use \['ab'\]"),
        (lambda: allocator().allocate(("b", [1]), 3), r"seq_id must be hashable.*got \('b', \[1"),
    ],
)  # fmt: skip
def test_what_would_end_the_process_or_strike_later(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_of_sequences_may_come_as_any_sequence():
    pages = allocator()
    pages.allocate(0, 3, 1)
    pages.allocate(1, 30, 1)
    for seq_ids in ([0, 1], (0, 1), range(2), np.arange(2)):
        assert pages.context_lens(seq_ids).tolist() == [3, 30]
        assert pages.block_tables(seq_ids).shape == (2, 2)
