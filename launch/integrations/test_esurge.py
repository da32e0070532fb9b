"""EasyDeL's engine eSurge on `register()`: SmolLM2-135M says what transformers says.

Engine, scheduler, model and sampler are EasyDeL's. Opt-in, in an environment of its own: see the
README beside this file.
"""

# pyright: reportMissingImports=false

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# EasyDeL mends these models of transformers as it is imported. Without torch they are stand-ins
# that raise whatever one asks of them; it passes over those that cannot be imported at all.
for name in ("glm4v_moe", "phimoe", "qwen3_next", "qwen3_5_moe"):
    sys.modules[f"transformers.models.{name}"] = None  # pyright: ignore[reportArgumentType]

easydel = pytest.importorskip("easydel")

from easydel.caching.ragged_page import cache as their_cache  # noqa: E402
from easydel.inference.esurge import eSurge  # noqa: E402
from easydel.inference.sampling_params import SamplingParams  # noqa: E402
from easydel.operations import OperationRegistry  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from launch.generate.smollm2 import GGUFFile, Weights, find_weights  # noqa: E402
from shardpage.adapters import easydel as on_shardpage  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
ORACLE = json.loads((ROOT / "tests/data/smollm2_public.json").read_text(encoding="utf-8"))
NAME = "ragged_page_attention_v3"
AXES = ("dp", "fsdp", "ep", "tp", "sp")  # as EasyDeL's meshes have them
STEP_TOKENS = 64  # the long prompt takes some 25 steps, in which the others are decoded


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    return GGUFFile(find_weights())


@pytest.fixture(scope="module")
def tokenizer(file, tmp_path_factory) -> str:
    """The vocabulary in a folder: EasyDeL's workers are processes, and read it from there."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    fast = file.tokenizer()._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Registers ours for a test, and lists the shapes of the queries that it is traced with."""
    shapes, forward = [], on_shardpage.forward

    def counted(self, query, *arguments, **options):
        shapes.append(query.shape)
        return forward(self, query, *arguments, **options)

    monkeypatch.setattr(on_shardpage, "forward", counted)
    theirs = OperationRegistry.get(NAME)
    on_shardpage.register()
    yield shapes
    OperationRegistry.register(theirs)


def by_name(weights: Weights) -> dict[str, Any]:
    """The weights as EasyDeL's Llama names them; its matrices are `[in, out]`."""
    layers = weights.layers
    named = {
        "model.embed_tokens": weights.embedding,
        "model.norm": weights.final_norm,
        "lm_head": weights.embedding.T,  # tied
    }
    for index, (qkv, gate_up) in enumerate(zip(layers.qkv, layers.gate_up, strict=True)):
        hidden = qkv.shape[1]
        query, key, value = np.split(qkv, [hidden, (hidden + len(qkv)) // 2])
        gate, up = gate_up
        named |= {
            f"model.layers.{index}.{name}": weight
            for name, weight in {
                "input_layernorm": layers.attn_norm[index],
                "self_attn.q_proj": query.T,
                "self_attn.k_proj": key.T,
                "self_attn.v_proj": value.T,
                "self_attn.o_proj": layers.attn_out[index].T,
                "post_attention_layernorm": layers.ffn_norm[index],
                "mlp.gate_proj": gate.T,
                "mlp.up_proj": up.T,
                "mlp.down_proj": layers.down[index].T,
            }.items()
        }
    return named


def model_of(file: GGUFFile, dims: tuple[int, ...]):
    """EasyDeL's own Llama with the weights of the file, in float32, sharded as it shards it."""
    sizes, named = file.config(), by_name(file.weights())
    config = easydel.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.max_context_len,
        rms_norm_eps=sizes.norm_eps,
        rope_theta=sizes.rope_theta,
        tie_word_embeddings=True,
        sharding_axis_dims=dims,
        attn_mechanism=NAME,
        attn_dtype=jnp.float32,
        kvdtype=jnp.float32,
    )
    # A mesh that it makes itself has to have all devices.
    devices = np.array(jax.devices()[: np.prod(dims)]).reshape(dims)
    config.set_model_mesh(jax.sharding.Mesh(devices, AXES))
    model = easydel.LlamaForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )

    def read(path, leaf):
        weight = named.pop(".".join(str(key.key) for key in path[:-2]))  # less "kernel", "value"
        assert weight.shape == leaf.shape, path
        return jnp.asarray(weight)

    state = jax.tree_util.tree_map_with_path(read, model.graphstate)
    assert not named
    return model.merge_module(model.graphdef, state, model.graphother).shard_model()


@pytest.mark.parametrize("dims", [(2, 1, 1, 3, 1), (2, 1, 1, 1, 4)], ids=["dp2_tp3", "dp2_sp4"])
def test_the_engine_says_what_transformers_says(file, tokenizer, calls, monkeypatch, dims):
    # Simulated devices do not say how much memory they have, and EasyDeL takes 4 GiB of each. It
    # keeps a sequence on one data shard; one whose pages do not fit there waits for ever.
    monkeypatch.setattr(their_cache, "per_device_hbm_budget_bytes", lambda *_, **__: 128 << 20)
    engine = eSurge(
        model=model_of(file, dims),
        tokenizer=tokenizer,
        max_model_len=2048,
        max_num_seqs=len(ORACLE),
        max_num_batched_tokens=STEP_TOKENS,
        min_input_pad=STEP_TOKENS,  # one program to compile: all steps have the same size
        page_size=32,
    )
    steps, schedule = [], engine.scheduler.schedule

    def noted():
        step = schedule()
        steps.append(dict(step.num_scheduled_tokens))
        return step

    monkeypatch.setattr(engine.scheduler, "schedule", noted)
    try:
        answers = engine.generate(
            [oracle["prompt"] for oracle in ORACLE.values()],
            SamplingParams(max_tokens=48, temperature=0.0),
            request_id=list(ORACLE),
            use_tqdm=False,
        )
    finally:
        engine.terminate()
    said = {answer.request_id: list(answer.outputs[0].token_ids) for answer in answers}
    assert said == {name: oracle["greedy_ids"] for name, oracle in ORACLE.items()}
    assert len(calls) >= file.config().num_layers  # ours, in all layers
    mixed = [step for step in steps if step.get("inventory", 0) > 1 and 1 in step.values()]
    assert len(mixed) > 10  # a prompt and decoding, in one batch
