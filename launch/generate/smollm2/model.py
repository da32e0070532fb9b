"""SmolLM2 in plain JAX: a prefill and a decode step over a mesh, attention by `shardpage`.

A layer reads its weights once, each device its part (`WeightSplit`), and costs four small
collectives: QKV and attention heads are gathered, and two matmuls summed. What the attention
splits over which axis is its own affair: see `shardpage.ShardLayout`.

Activations are columns, `[hidden, tokens]`, and matmuls `weight @ x`: XLA's CPU compilers of all
supported versions read the weights of a few tokens at the speed of memory that way, but not in
`x @ weight.T`.

The layers are one loop over stacked weights, so the program is compiled in a second instead of
half a minute. All layers share one paged cache, which the loop updates in place: a page of the
allocator is a page of every layer, and `layer_tables` says where.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from shardpage import PagedKVCache, ShardLayout, merge_partials, page_attention, write_kv

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
    """The weights of all layers; matrices are `[out, in]`."""

    attn_norm: Float[Array, "layers hidden"]
    qkv: Float[Array, "layers qkv_heads*dim hidden"]  # query heads, then key heads, value heads
    attn_out: Float[Array, "layers hidden heads*dim"]
    ffn_norm: Float[Array, "layers hidden"]
    gate_up: Float[Array, "layers 2 ffn hidden"]
    down: Float[Array, "layers hidden ffn"]


class Weights(NamedTuple):
    """All weights. The embedding makes the logits as well (tied)."""

    embedding: Float[Array, "vocab hidden"]
    layers: Layers
    final_norm: Float[Array, " hidden"]


# Which axis of each weight is split over the mesh.
SPLIT_AXES = Weights(
    embedding=0,
    layers=Layers(attn_norm=None, qkv=1, attn_out=2, ffn_norm=None, gate_up=2, down=2),
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


class PrefillChunks(NamedTuple):
    """Consecutive prompt tokens of some sequences, at most one of each `data` shard.

    Chunks start at a page boundary; all have the same static length, a multiple of the page size.
    """

    tokens: Int[Array, "chunks chunk_len"]
    shards: Int[Array, " chunks"]  # the data shard of each; one past the last is an empty chunk
    starts: Int[Array, " chunks"]  # position of each first token
    lens: Int[Array, " chunks"]  # how many of the tokens are real
    sampling: Sampling
    tables: Int[Array, "data_shards max_blocks"]  # block table of the sequence on each shard

    def emptied(self) -> "PrefillChunks":
        """A batch of this shape in which nothing is written and nothing attended to."""
        nowhere = np.full_like(self.shards, self.tables.shape[0])
        return self._replace(shards=nowhere, lens=np.zeros_like(self.lens))


class DecodeRows(NamedTuple):
    """The newest token of each running sequence; the rows are split over `data`."""

    tokens: Int[Array, " rows"]
    positions: Int[Array, " rows"]  # -1: no sequence in this row
    sampling: Sampling
    tables: Int[Array, "rows max_blocks"]

    def emptied(self) -> "DecodeRows":
        """A batch of this shape in which nothing is written and nothing attended to."""
        return self._replace(positions=np.full_like(self.positions, -1))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's steps on one mesh. Static: hashable, holds no arrays."""

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

    def empty_cache(self, num_pages: int, page_size: int, dtype) -> PagedKVCache:
        """An empty cache of `num_pages` pages per layer, in its sharding."""
        config = self.config
        return PagedKVCache.zeros(
            config.num_layers * num_pages,
            config.num_kv_heads,
            page_size,
            config.head_dim,
            dtype=dtype,
            mesh=self.mesh,
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def prefill(self, weights: Weights, cache: PagedKVCache, chunks: PrefillChunks) -> StepResult:
        """Writes chunks of prompts into the caches; the result follows each chunk's last token."""
        num_chunks, chunk_len = chunks.tokens.shape
        positions = chunks.starts[:, None] + jnp.arange(chunk_len, dtype=jnp.int32)
        attend = functools.partial(self._attend_chunks, chunks)
        x, cache = self._layers(
            weights, cache, chunks.tokens.ravel(), positions.ravel(), chunks.tables, attend
        )
        last = jnp.maximum(chunks.lens - 1, 0)
        x = x.reshape(-1, num_chunks, chunk_len)[:, jnp.arange(num_chunks), last]
        return self._next(weights, cache, x, chunks.sampling, chunks.starts + last)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def decode(self, weights: Weights, cache: PagedKVCache, rows: DecodeRows) -> StepResult:
        """Appends one token a sequence and gives the next ones."""
        attend = functools.partial(self._attend_rows, rows)
        x, cache = self._layers(weights, cache, rows.tokens, rows.positions, rows.tables, attend)
        return self._next(weights, cache, x, rows.sampling, rows.positions)

    def _layers(self, weights: Weights, cache: PagedKVCache, tokens, positions, tables, attend):
        """Runs all layers over a flat batch of tokens.

        Returns:
          `[hidden, tokens]`, and the cache with the tokens' keys and values in it.
        """
        config, split = self.config, self.split
        num_tokens = tokens.shape[0]
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ends = [sum(heads[:1]), sum(heads[:2])]
        angles = rotary_angles(positions, config)

        def run_layer(carry, layer_and_index: tuple[Layers, jax.Array]):
            x, cache = carry
            layer, index = layer_and_index
            qkv = split.gathered_matmul(layer.qkv, rms_norm(x, layer.attn_norm, config))
            qkv = qkv.T.reshape(num_tokens, sum(heads), config.head_dim)
            query, key, value = jnp.split(qkv, ends, axis=1)
            query, key = rotate(query, angles), rotate(key, angles)
            out, cache = attend(query, key, value, cache, self._layer_tables(tables, index, cache))
            out = split.replicated(out).reshape(num_tokens, -1)
            x = x + split.summed_matmul(layer.attn_out, out.T)
            normed = rms_norm(x, layer.ffn_norm, config)
            gate, up = jnp.einsum("gfh,ht->gft", layer.gate_up, normed)
            x = x + split.summed_matmul(layer.down, jax.nn.silu(gate) * up)
            return (x, cache), None

        x = split.replicated(weights.embedding[tokens].T)
        indices = jnp.arange(config.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(run_layer, (x, cache), (weights.layers, indices))
        return x, cache

    def _layer_tables(self, tables, layer: jax.Array, cache: PagedKVCache) -> jax.Array:
        """Block tables of one layer: each page shard of the cache holds its layers in turn.

        Page `p` of the allocator is local page `p % n` of page shard `p // n`; in layer `l`
        it is local page `l * n + p % n` of the same shard. Empty entries stay negative.
        """
        pages_per_shard = cache.num_pages // self.layout.shards(self.mesh).pages
        layer_pages = pages_per_shard // self.config.num_layers
        shard, local = tables // layer_pages, tables % layer_pages
        return shard * pages_per_shard + layer * layer_pages + local

    def _next(self, weights: Weights, cache, x, sampling: Sampling, positions) -> StepResult:
        """Logits and next tokens from the last hidden state of each row."""
        x = rms_norm(x, weights.final_norm, self.config)
        logits = self.split.gathered_matmul(weights.embedding, x).T.astype(jnp.float32)
        # Every device chooses every row's token: cheaper than telling the others.
        sampling, positions = jax.tree.map(self.split.replicated, (sampling, positions))
        sampled = jnp.any(sampling.temperatures > 0)
        tokens = jax.lax.cond(sampled, sample, likeliest, logits, sampling, positions)
        tokens = self.split.replicated(tokens)
        return StepResult(tokens, logits, cache)

    def _attend_rows(self, rows: DecodeRows, query, key, value, cache: PagedKVCache, tables):
        """Decode: row `i` is one token of sequence `i`, which attends to all before and itself."""
        row_ids = jnp.arange(rows.positions.shape[0], dtype=jnp.int32)
        seq_ids = jnp.where(rows.positions >= 0, row_ids, -1)
        cache = write_kv(cache, key, value, seq_ids, rows.positions, tables, mesh=self.mesh)
        return self._page_attention(query, cache, rows.positions + 1, tables), cache

    def _attend_chunks(self, chunks: PrefillChunks, query, key, value, cache: PagedKVCache, tables):
        """Prefill: the tokens before the chunk, and the chunk's own, as two partial softmaxes.

        All tokens of a chunk see the same earlier pages, so they go there as one sequence with
        `chunk_len` times as many query heads. Inside the chunk each token is a sequence of its
        own that ends with itself, over the chunk's columns of the block table.
        """
        num_shards, max_blocks = tables.shape
        chunk_len = chunks.tokens.shape[1]
        page_size = cache.format.page_size

        def to_shards(x: jax.Array) -> jax.Array:
            """`[chunks, ...]` to `[data_shards, ...]`, zeros where there is no chunk."""
            return (
                jnp.zeros((num_shards, *x.shape[1:]), x.dtype).at[chunks.shards].set(x, mode="drop")
            )

        def tokens_to_shards(x: jax.Array) -> jax.Array:
            """`[chunks * chunk_len, ...]` to `[data_shards * chunk_len, ...]`."""
            x = to_shards(x.reshape(-1, chunk_len, *x.shape[1:]))
            return x.reshape(num_shards * chunk_len, *x.shape[2:])

        starts, lens = to_shards(chunks.starts), to_shards(chunks.lens)
        offsets = jnp.arange(chunk_len, dtype=jnp.int32)
        is_real = offsets < lens[:, None]
        shard_ids = jnp.arange(num_shards, dtype=jnp.int32)[:, None]
        cache = write_kv(
            cache,
            tokens_to_shards(key),
            tokens_to_shards(value),
            jnp.where(is_real, shard_ids, -1).ravel(),
            (starts[:, None] + offsets).ravel(),
            tables,
            mesh=self.mesh,
        )

        query = tokens_to_shards(query)
        before = self._page_attention(
            fold_queries(query, num_shards, self.config), cache, starts, tables, lse=True
        )
        columns = starts[:, None] // page_size + jnp.arange(chunk_len // page_size)
        own_pages = jnp.take_along_axis(tables, jnp.minimum(columns, max_blocks - 1), axis=1)
        inside = self._page_attention(
            query,
            cache,
            jnp.where(is_real, offsets + 1, 0).ravel(),
            jnp.repeat(own_pages, chunk_len, axis=0),
            lse=True,
        )
        before = [unfold_queries(x, chunk_len, self.config) for x in before]
        out, _ = merge_partials(*before, *inside)
        out = out.reshape(num_shards, chunk_len, *out.shape[1:])
        return out.at[chunks.shards].get(mode="clip").reshape(-1, *out.shape[2:]), cache

    def _page_attention(self, query, cache: PagedKVCache, context_lens, tables, lse=False):
        return page_attention(
            query,
            cache.key,
            cache.value,
            context_lens,
            tables,
            kv_layout=cache.kv_layout,
            mesh=self.mesh,
            return_lse=lse,
        )


def fold_queries(query: jax.Array, num_seqs: int, config: Config) -> jax.Array:
    """`[seqs * tokens, heads, dim]` to `[seqs, kv_heads * queries * tokens, dim]`.

    The tokens become more query heads of the KV head that they read.
    """
    split = query.reshape(num_seqs, -1, config.num_kv_heads, *_queries_and_dim(config))
    return split.transpose(0, 2, 3, 1, 4).reshape(num_seqs, -1, config.head_dim)


def unfold_queries(folded: jax.Array, num_tokens: int, config: Config) -> jax.Array:
    """Undoes `fold_queries`, for outputs `[seqs, heads, dim]` and for lse `[seqs, heads]`."""
    queries, _ = _queries_and_dim(config)
    tail = folded.shape[2:]
    split = folded.reshape(folded.shape[0], config.num_kv_heads, queries, num_tokens, *tail)
    return jnp.moveaxis(split, 3, 1).reshape(-1, config.num_heads, *tail)


def _queries_and_dim(config: Config) -> tuple[int, int]:
    return config.num_heads // config.num_kv_heads, config.head_dim


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
