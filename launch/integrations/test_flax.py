"""A plain flax.nnx decode loop over a mesh, and an orbax checkpoint of its cache.

Opt-in, in MaxText's environment, which has both: see the README beside this file.
"""

# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

nnx = pytest.importorskip("flax.nnx")
ocp = pytest.importorskip("orbax.checkpoint")

import meshes  # noqa: E402
from shardpage import PagedKVCache, attend, make_plan, write_kv  # noqa: E402

SEQS, HEADS, KV_HEADS, DIM, PAGE, STEPS = 4, 4, 2, 16, 8, 20
TABLES = np.arange(SEQS * 3, dtype=np.int32).reshape(SEQS, 3)[:, ::-1].copy()


def normed(x):
    return x / (x * x).mean(-1, keepdims=True) ** 0.5


class Pages(nnx.Variable):
    """The state that a decode step changes."""


class Decoder(nnx.Module):
    """One attention layer that eats its own output."""

    def __init__(self, cache, mesh, rngs):
        linear = lambda heads: nnx.Linear(HEADS * DIM, heads * DIM, use_bias=False, rngs=rngs)
        self.query, self.key, self.value = map(linear, (HEADS, KV_HEADS, KV_HEADS))
        self.pages, self.mesh = Pages(cache), mesh

    def split(self, x):
        return (f(x).reshape(len(x), -1, DIM) for f in (self.query, self.key, self.value))

    def __call__(self, x, lens):
        query, key, value = self.split(x)
        plan = make_plan(self.pages.get_value(), lens, TABLES, num_heads=HEADS, mesh=self.mesh)
        self.pages.set_value(write_kv(self.pages.get_value(), key, value, plan))
        out = jnp.asarray(attend(query, self.pages.get_value(), plan))
        return normed(x + out.reshape(x.shape))


def cache_on(mesh, make=PagedKVCache.zeros):
    sizes = TABLES.size, KV_HEADS, PAGE, DIM
    return make(*sizes, dtype="float32", kv_layout="blocks_first", packed=False, mesh=mesh)


def decode(model, x, steps):
    step = nnx.jit(lambda model, x, lens: model(x, lens))
    for length in steps:
        x = step(model, x, jnp.full(SEQS, length, jnp.int32))
    return x


def reference(model, x):
    """The same without a cache: all tokens, all keys, in float64."""
    as_64 = lambda rows: np.asarray(rows, np.float64)
    keys, values = [], []
    for _ in range(STEPS):
        query, key, value = map(as_64, model.split(jnp.asarray(x, jnp.float32)))
        keys.append(key.repeat(HEADS // KV_HEADS, 1))
        values.append(value.repeat(HEADS // KV_HEADS, 1))
        logits = np.einsum("shd,tshd->tsh", query, np.stack(keys)) / DIM**0.5
        weights = np.exp(logits - logits.max(0))
        out = np.einsum("tsh,tshd->shd", weights / weights.sum(0), np.stack(values))
        x = normed(x + out.reshape(x.shape))
    return x


@pytest.fixture
def start():
    return np.random.default_rng(0).standard_normal((SEQS, HEADS * DIM)).astype(np.float32)


@pytest.mark.parametrize("spec", ["data=4", "data=2,kv=2", "context=2,kv=2"])
def test_a_plain_nnx_loop_decodes(spec, start):
    mesh = meshes.make(spec)
    model = Decoder(cache_on(mesh), mesh, nnx.Rngs(0))
    got = decode(model, jnp.asarray(start), range(1, STEPS + 1))
    np.testing.assert_allclose(got, reference(model, start), atol=1e-4)


@pytest.mark.parametrize("what", ["tree", "tree with a target", "cache with a target"])
def test_a_cache_goes_to_another_mesh_through_orbax(what, start, tmp_path):
    one, other = meshes.make("data=2,kv=2"), meshes.make("context=2,kv=2")
    model = Decoder(cache_on(one), one, nnx.Rngs(0))
    x = decode(model, jnp.asarray(start), range(1, 8))
    cache, target = model.pages.get_value(), cache_on(other, PagedKVCache.abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = cache if what.startswith("cache") else cache.to_tree()
        checkpointer.save(tmp_path / "cache", saved)
        checkpointer.wait_until_finished()
        if what == "tree":
            restored = PagedKVCache.from_tree(checkpointer.restore(tmp_path / "cache"))
            restored = jax.device_put(restored, jax.tree.map(lambda x: x.sharding, target))
        elif what == "tree with a target":
            tree = checkpointer.restore(tmp_path / "cache", target.to_tree())
            restored = PagedKVCache.from_tree(tree)
        else:
            restored = checkpointer.restore(tmp_path / "cache", target)
    assert restored.format == cache.format
    assert restored.key.sharding.is_equivalent_to(target.key.sharding, restored.key.ndim)
    moved = Decoder(restored, other, nnx.Rngs(0))
    expected = decode(model, x, range(8, STEPS + 1))
    got = decode(moved, jax.device_put(np.asarray(x)), range(8, STEPS + 1))
    np.testing.assert_allclose(got, expected, atol=1e-5)
