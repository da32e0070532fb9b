"""Caches on TPU meshes, compiled ahead of time: written in place, read without a copy."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import meshes
from shardpage import PagedKVCache, page_attention, write_kv

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'jax[tpu]'")


@pytest.fixture(scope="module")
def mesh():
    return meshes.topology("v6e:2x2", "data=2,kv=2")


def arguments(mesh, head_dim, num_seqs=8):
    def array(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {
        "query": array((num_seqs, 32, head_dim), jnp.bfloat16, "data", "kv"),
        "token": array((num_seqs, 8, head_dim), jnp.bfloat16, "data", "kv"),
        "ids": array((num_seqs,), jnp.int32, "data"),
        "tables": array((num_seqs, 64), jnp.int32, "data"),
    }


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_neither_attention_nor_writes_copy_a_cache(mesh, head_dim):
    cache = PagedKVCache.abstract(1024, 8, 32, head_dim, mesh=mesh)
    a = arguments(mesh, head_dim)
    bytes_per_device = 2 * 1024 * 8 * 32 * (128 if head_dim == 80 else head_dim) * 2 // 4

    attend = functools.partial(page_attention, mesh=mesh, kv_layout=cache.kv_layout)
    compiled = jax.jit(attend).lower(a["query"], cache.key, cache.value, a["ids"], a["tables"])
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < bytes_per_device / 20

    write = jax.jit(
        functools.partial(write_kv, mesh=mesh), donate_argnums=0, out_shardings=cache.array_formats
    )
    compiled = write.lower(cache, a["token"], a["token"], a["ids"], a["ids"], a["tables"])
    memory = compiled.compile().memory_analysis()
    assert memory.alias_size_in_bytes == bytes_per_device
    assert memory.temp_size_in_bytes < bytes_per_device / 20


def test_narrow_heads_are_packed_and_fused_by_default(mesh):
    cache = PagedKVCache.abstract(1024, 8, 32, 64, mesh=mesh)
    assert cache.kv_layout == "fused"
    assert cache.key.shape == (1024, 2, 8, 16, 128)
    assert PagedKVCache.abstract(1024, 8, 8, 64, mesh=mesh).key.shape == (1024, 2, 8, 8, 64)
