"""SmolLM2 in plain JAX: one step over a mesh for prompts and answers, attention by `shardpage`.

A layer reads its weights once, each device its part (`WeightSplit`), and costs four small
collectives: QKV and attention heads are gathered, and two matmuls summed. What the attention
splits over which axis is its own affair: see `shardpage.ShardLayout`.

Activations are columns, `[hidden, tokens]`, and matmuls `weight @ x`: XLA's CPU compilers of all
supported versions read the weights of a few tokens at the speed of memory that way.

The layers are one loop, so the program is compiled in seconds instead of half a minute; only its
matmuls exist for each layer. The loop carries one cache of all layers, in place; who reads and
writes what is planned once, before it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from shardpage import PagedKVCache, ShardLayout, attend, make_plan, write_kv

from .split import WeightSplit


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, as its file gives them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    max_context_len: int


class Layers(NamedTuple):
    """The weights of all layers; matrices are `[out, in]`, an array for each layer."""

    attn_norm: Float[Array, "layers hidden"]
    qkv: Sequence[Float[Array, "qkv_heads*dim hidden"]]  # query heads, then key heads, value heads
    attn_out: Sequence[Float[Array, "hidden heads*dim"]]
    ffn_norm: Float[Array, "layers hidden"]
    gate_up: Sequence[Float[Array, "2 ffn hidden"]]
    down: Sequence[Float[Array, "hidden ffn"]]


class Weights(NamedTuple):
    """All weights. The embedding makes the logits as well (tied)."""

    embedding: Float[Array, "vocab hidden"]
    layers: Layers
    final_norm: Float[Array, " hidden"]


# Which axis of each weight is split over the mesh.
SPLIT_AXES = Weights(
    embedding=0,
    layers=Layers(attn_norm=None, qkv=0, attn_out=1, ffn_norm=None, gate_up=1, down=1),
    final_norm=None,
)


class StepResult(NamedTuple):
    """What a step gives for each of its rows: the next token, and what it was drawn from."""

    tokens: Int[Array, " rows"]
    logits: Float[Array, "rows vocab"]
    cache: PagedKVCache


class Sampling(NamedTuple):
    """How to choose the next token of each row; what else is in the batch makes no difference."""

    temperatures: Float[Array, " rows"]  # 0 takes the likeliest token
    seeds: Int[Array, " rows"]


class Batch(NamedTuple):
    """The new tokens of one step: chunks of prompts, and the newest token of running sequences.

    Rows are sequences, split over `data`. Each data shard has an equal part of the tokens, which
    its rows fill one after another, from the left.
    """

    tokens: Int[Array, " num_tokens"]
    query_lens: Int[Array, " rows"]  # new tokens of each row; 0 of one that takes no part
    context_lens: Int[Array, " rows"]  # tokens of each row, the new ones included
    tables: Int[Array, "rows max_blocks"]
    sampling: Sampling

    @classmethod
    def empty(cls, num_tokens: int, num_rows: int, max_blocks: int) -> "Batch":
        """A batch in which nothing is written and nothing attended to, on the host."""
        rows = lambda dtype: np.zeros(num_rows, dtype)
        tables = np.full((num_rows, max_blocks), -1, np.int32)
        sampling = Sampling(rows(np.float32), rows(np.int32))
        tokens = np.zeros(num_tokens, np.int32)
        return cls(tokens, rows(np.int32), rows(np.int32), tables, sampling)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's step on one mesh. Static: hashable, holds no arrays."""

    config: Config
    mesh: Mesh

    @property
    def layout(self) -> ShardLayout:
        """Which mesh axis splits what in the attention."""
        return ShardLayout.of(self.mesh)

    @property
    def split(self) -> WeightSplit:
        """How the weights are split."""
        return WeightSplit(self.mesh)

    def empty_cache(self, num_pages: int, page_size: int, dtype, scales=None) -> PagedKVCache:
        """An empty cache of `num_pages` pages per layer, in its sharding.

        `dtype` and `scales` are those of `PagedKVCache.zeros`.
        """
        config = self.config
        return PagedKVCache.zeros(
            num_pages,
            config.num_kv_heads,
            page_size,
            config.head_dim,
            dtype=dtype,
            scales=scales,
            num_layers=config.num_layers,
            mesh=self.mesh,
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def step(self, weights: Weights, cache: PagedKVCache, batch: Batch) -> StepResult:
        """Puts the new tokens into the cache; the result follows each row's last one."""
        config, split = self.config, self.split
        batch = jax.tree.map(split.replicated, batch)  # from the host, whole on every device
        plan = make_plan(
            cache,
            batch.context_lens,
            batch.tables,
            batch.query_lens,
            num_heads=config.num_heads,
            num_queries=len(batch.tokens),
            mesh=self.mesh,
        )
        angles = rotary_angles(split.replicated(plan.positions), config)

        layers = weights.layers

        def run_layer(number: jax.Array, carry: tuple[jax.Array, PagedKVCache]):
            x, cache = carry
            query, key, value = self._qkv(layers, number, x, angles)
            cache = write_kv(cache, key, value, plan, layer=number)
            out = split.replicated(attend(query, cache, plan, layer=number))
            x = x + split.summed_matmul(layers.attn_out, number, out.reshape(len(out), -1).T)
            normed = rms_norm(x, layers.ffn_norm[number], config)
            gate, up = split.split_matmul(layers.gate_up, number, normed)
            x = x + split.summed_matmul(layers.down, number, jax.nn.silu(gate) * up)
            return x, cache

        x = split.replicated(weights.embedding[batch.tokens].T)
        x, cache = jax.lax.fori_loop(0, config.num_layers, run_layer, (x, cache))
        x = rms_norm(x[:, self._last_tokens(batch)], weights.final_norm, config)
        logits = split.gathered_matmul([weights.embedding], 0, x).T.astype(jnp.float32)
        return StepResult(self._next_tokens(logits, batch), logits, cache)

    def _qkv(self, layers: Layers, number: jax.Array, x: jax.Array, angles) -> list[jax.Array]:
        """Queries, keys and values of a layer, each `[tokens, heads, head_dim]`."""
        config = self.config
        normed = rms_norm(x, layers.attn_norm[number], config)
        qkv = self.split.gathered_matmul(layers.qkv, number, normed)
        qkv = qkv.T.reshape(x.shape[1], -1, config.head_dim)
        ends = [config.num_heads, config.num_heads + config.num_kv_heads]
        query, key, value = jnp.split(qkv, ends, axis=1)
        return [rotate(query, angles), rotate(key, angles), value]

    def _last_tokens(self, batch: Batch) -> jax.Array:
        """Where each row's last token is; any token's place for a row without."""
        num_shards = self.layout.shards(self.mesh).seqs
        ends = jnp.cumsum(batch.query_lens.reshape(num_shards, -1), axis=1)
        first = jnp.arange(num_shards) * (len(batch.tokens) // num_shards)
        return jnp.maximum(first[:, None] + ends - 1, 0).ravel()

    def _next_tokens(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Each row's next token. Every device chooses all: cheaper than telling the others."""
        sampled = jnp.any(batch.sampling.temperatures > 0)
        arrays = (logits, batch.sampling, batch.context_lens - 1)
        tokens = jax.lax.cond(sampled, sample, likeliest, *arrays)
        return self.split.replicated(tokens)


def rms_norm(x: jax.Array, weight: jax.Array, config: Config) -> jax.Array:
    """Root mean square normalisation of `[hidden, tokens]`, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=0, keepdims=True) + config.norm_eps)
    return wide.astype(x.dtype) * weight[:, None]


def rotary_angles(positions: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[tokens, 1, head_dim / 2]` of the rotary position embedding."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[:, None].astype(jnp.float32) * config.rope_theta**-exponents
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + head_dim / 2) of each head of `[tokens, heads, head_dim]`."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def likeliest(logits: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    """The token with the largest logit, for each row."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: jax.Array, sampling: Sampling, positions: jax.Array) -> jax.Array:
    """Draws each row's token at its temperature; the likeliest where that is 0."""

    def draw(logits, temperature, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1.0))

    drawn = jax.vmap(draw)(logits, sampling.temperatures, sampling.seeds, positions)
    greedy = likeliest(logits, sampling, positions)
    return jnp.where(sampling.temperatures > 0, drawn.astype(jnp.int32), greedy)
