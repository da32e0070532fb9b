"""MaxText's model with `attention=vllm_rpa` on our call: the greedy tokens of its own MaxEngine.

Opt-in, in an environment of its own: see the README beside this file.
"""

# pyright: reportMissingImports=false

import dataclasses
import functools
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText without JetStream and Google's clients
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

pytest.importorskip("maxtext")

from flax import nnx  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from maxtext.common.common_types import MODEL_MODE_AUTOREGRESSIVE  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.inference.maxengine import maxengine  # noqa: E402
from maxtext.utils import globals as places  # noqa: E402
from maxtext.utils import model_creation_utils  # noqa: E402

from shardpage import ShardLayout  # noqa: E402
from shardpage.adapters.tpu_inference import sharded_ragged_paged_attention  # noqa: E402

LAYERS, KV_HEADS, HEAD_DIM, VOCAB = 2, 2, 128, 256
PROMPTS = tuple(np.random.default_rng(0).integers(0, VOCAB, length) for length in (11, 5, 20))
NUM_TOKENS = 16  # that follow each prompt
BUCKET, PAGE, NUM_PAGES, PAGES_PER_SEQ = 24, 8, 24, 5  # a step's tokens; the cache
CALLED = "tpu_inference.layers.common.attention_interface"  # the module that MaxText imports
MODEL = {
    "decoder_block": "llama2",
    "base_num_decoder_layers": LAYERS,
    "base_emb_dim": 64,
    "base_mlp_dim": 128,
    "base_num_query_heads": 4,
    "base_num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "scan_layers": False,  # as MaxText's vllm.yml has it
    "max_prefill_predict_length": 32,
    "max_target_length": 64,
    "per_device_batch_size": len(PROMPTS),  # MaxEngine's slots
    "decode_sampling_strategy": "greedy",
}

# MaxText's stand-in for JetStream's class, which MaxEngine returns from functions that it jits,
# lacks what the real one has: it is no pytree.
jax.tree_util.register_dataclass(
    maxengine.engine_api.ResultTokens,
    data_fields=["data", "log_prob"],
    meta_fields=["tokens_idx", "valid_idx", "length_idx", "samples_per_slot"],
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metadata:
    """What MaxText's attention reads of tpu-inference's AttentionMetadata."""

    seq_lens: jax.Array
    block_tables: jax.Array
    query_start_loc: jax.Array
    request_distribution: jax.Array


@dataclasses.dataclass
class Case:
    """A mesh, and what its axes split."""

    file: str  # the mesh's axes and MaxText's rules for them, of its own configurations
    sizes: dict[str, int]
    layout: ShardLayout | None  # None: the axes that tpu-inference names

    @property
    def num_devices(self) -> int:
        return int(np.prod(list(self.sizes.values()), dtype=int))

    def config(self, **changes):
        return pyconfig.initialize(
            ["", os.path.join(places.MAXTEXT_CONFIGS_DIR, self.file)],
            run_name="shardpage",
            enable_checkpointing=False,
            skip_jax_distributed_system=True,
            hardware="cpu",
            log_config=False,
            # Else it counts the batch of all simulated devices, not of the mesh's.
            internal_compile=True,
            internal_compile_num_devices=self.num_devices,
            **MODEL | changes,
        )

    def mesh(self, config) -> Mesh:
        shape = [self.sizes.get(name, 1) for name in config.mesh_axes]
        return Mesh(np.array(jax.devices()[: self.num_devices]).reshape(shape), config.mesh_axes)


ONE = Case("base.yml", {}, None)
CONTEXT_TENSOR = Case(
    "base.yml",
    {"context": 2, "tensor": 2},
    ShardLayout(seqs=None, heads="tensor", context="context"),
)
# The mesh that a vLLM server gives MaxText; `dcp` is its decode context parallelism.
DCP_MODEL = Case(
    "inference/vllm.yml",
    {"dcp": 2, "model": 2},
    ShardLayout(seqs=None, heads=("model", "expert"), context="dcp"),
)


@pytest.fixture(scope="module")
def maxengine_run():
    """Random weights, and the tokens that MaxEngine decodes with its own attention and cache."""
    engine = maxengine.MaxEngine(ONE.config(attention="dot_product"), devices=jax.devices()[:1])
    params = engine.load_params(rng=jax.random.key(0))
    # Untrained attention is a mean that hardly moves the logits. Larger weights make it choose, so
    # that a scale that is 2 % off already gives other tokens.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if "self_attention" in jax.tree_util.keystr(path) else x, params
    )
    state, columns = engine.init_decode_state(), []
    for slot, prompt in enumerate(PROMPTS):
        padded = jnp.zeros(engine.max_prefill_length, jnp.int32).at[: len(prompt)].set(prompt)
        prefix, _ = engine.prefill(params=params, padded_tokens=padded, true_length=len(prompt))
        state = engine.insert(prefix, state, slot)
    for _ in range(NUM_TOKENS):
        columns.append(np.asarray(state["tokens"][:, 0]))
        state, _ = engine.generate(params, state)
    return params, np.stack(columns, axis=1)


def decoded(case: Case, params) -> np.ndarray:
    """Greedy tokens of MaxText's unchanged model, driven as a server of tpu-inference drives it."""
    config = case.config(attention="vllm_rpa")
    mesh = case.mesh(config)
    with mesh, logical_axis_rules(config.logical_axis_rules):
        model = model_creation_utils.from_pretrained(
            config, mesh=mesh, model_mode=MODEL_MODE_AUTOREGRESSIVE
        )
        graph, own, rest = nnx.split(model, nnx.Param, ...)
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, own))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(caches, params, tokens, positions, metadata):
        model = nnx.merge(graph, params, rest, copy=True)
        hidden, caches = model(
            decoder_input_tokens=tokens[:, None],
            decoder_positions=positions[:, None],
            kv_caches=list(caches),
            attention_metadata=metadata,
            model_mode=MODEL_MODE_AUTOREGRESSIVE,
        )
        head = model.decoder.apply_output_head
        logits = head(model.token_embedder, hidden, True, MODEL_MODE_AUTOREGRESSIVE)
        return caches, jnp.argmax(logits[:, 0], axis=-1)

    # tpu-inference's layout. Each slot is NaN until a token is written there.
    layout = case.layout or ShardLayout(None, None, None)
    spec = PartitionSpec(layout.context, None, layout.heads, None, None)
    pages = np.full((NUM_PAGES, PAGE, 2 * KV_HEADS, 1, HEAD_DIM), np.nan, np.float32)
    caches = [jax.device_put(pages, NamedSharding(mesh, spec)) for _ in range(LAYERS)]
    seqs = [list(prompt) for prompt in PROMPTS]
    ends = [len(prompt) + NUM_TOKENS for prompt in PROMPTS]
    # Pages in an order by which each sequence has some on both context shards. The last row is no
    # sequence: what it says must not matter.
    tables = np.random.default_rng(0).permutation(NUM_PAGES)[: 4 * PAGES_PER_SEQ]
    lens = np.array([0, 0, 0, 99], np.int32)
    with mesh, logical_axis_rules(config.logical_axis_rules):
        while any(len(seq) < end for seq, end in zip(seqs, ends, strict=True)):
            # Of each sequence what is not in the cache yet, while the bucket has room: at first
            # prompts, then the rest of one beside sequences that decode, then those that decode.
            tokens, positions = np.zeros((2, BUCKET), np.int32)
            starts = np.zeros(5, np.int32)
            for i, seq in enumerate(seqs):
                at, room = starts[i], BUCKET - starts[i]
                new = seq[lens[i] :][:room] if len(seq) < ends[i] else []
                tokens[at : at + len(new)] = new
                positions[at : at + len(new)] = lens[i] + np.arange(len(new))
                starts[i + 1] = at + len(new)
                lens[i] += len(new)
            three = np.array([0, 0, len(seqs)], np.int32)
            metadata = Metadata(*map(jnp.asarray, (lens, tables, starts, three)))
            caches, likeliest = step(caches, params, tokens, positions, metadata)
            for i, seq in enumerate(seqs):
                if len(seq) < ends[i] and lens[i] == len(seq):
                    seq.append(int(likeliest[starts[i + 1] - 1]))
    return np.array([seq[-NUM_TOKENS:] for seq in seqs])


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function in the place of tpu-inference's; MaxText imports it when it is traced."""

    def put(call):
        names = CALLED.split(".")
        for i in range(1, len(names) + 1):
            name = ".".join(names[:i])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[CALLED].sharded_ragged_paged_attention = call  # pyright: ignore

    return put


@pytest.mark.parametrize(
    "case",
    [ONE, CONTEXT_TENSOR, DCP_MODEL],
    ids=["one_device", "context2_tensor2", "dcp2_model2"],
)
def test_tokens_are_maxengines(case, maxengine_run, stand_in):
    params, tokens = maxengine_run
    meshes = []

    def call(mesh, *args, **options):
        meshes.append(mesh)
        return sharded_ragged_paged_attention(mesh, *args, layout=case.layout, **options)

    stand_in(call)
    np.testing.assert_array_equal(decoded(case, params), tokens)
    assert len(meshes) == LAYERS  # one trace serves prompts, mixed steps and decoding
    assert all(mesh.size == case.num_devices for mesh in meshes)


def test_a_wrong_scale_gives_other_tokens(maxengine_run, stand_in):
    """Else equal tokens would say nothing about attention."""
    params, tokens = maxengine_run

    def call(*args, **options):
        args = [*args[:10], 1.1 * args[10], *args[11:]]  # sm_scale is the eleventh
        return sharded_ragged_paged_attention(*args, **options)

    stand_in(call)
    assert (decoded(ONE, params) != tokens).any()
