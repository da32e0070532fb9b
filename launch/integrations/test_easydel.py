"""EasyDeL's operation with `register()`: its registry, cache view and metadata, on its meshes.

Opt-in, in an environment of its own: see the README beside this file.
"""

# pyright: reportMissingImports=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

easydel = pytest.importorskip("easydel")

from easydel.caching import RaggedPagesCacheView, RaggedPagesMetadata  # noqa: E402
from easydel.caching.ragged_page.cache import RaggedPagesCacheConfig  # noqa: E402
from easydel.operations import OperationMetadata, OperationRegistry  # noqa: E402
from eformer.common_types import MODE_PREFILL  # noqa: E402
from eformer.escale import PartitionAxis, PartitionManager  # noqa: E402

from shardpage.adapters.easydel import register  # noqa: E402
from tests.peers_batch import Batch, assert_attends, assert_written, batch, laid_out  # noqa: E402
from tests.steps import Step  # noqa: E402

# Heads as SmolLM2-135M's; a prompt, decoding, guesses, a row that waits.
STEP = Step("easydel", ((3, 3), (21, 1), (30, 3), (9, 0)), 8, num_heads=9, num_kv_heads=3)
STEP = STEP.replace(max_blocks=4)
NAME = "ragged_page_attention_v3"


@pytest.fixture(autouse=True)
def _registered():
    theirs = OperationRegistry.get(NAME)
    register()
    yield
    OperationRegistry.register(theirs)


def view_of(made: Batch, dims: dict[str, int], manager: PartitionManager, mesh):
    """Their view of a cache that lacks the new tokens, sharded as they shard it."""
    step, kept = made.inputs.step, made.inputs
    (pages,) = laid_out(kept.key_cache_before, kept.value_cache_before, step.head_dim == 64,
                        shards=dims["tp"])  # fmt: skip
    config = RaggedPagesCacheConfig(
        num_hidden_layers=1,
        max_model_length=step.max_blocks * step.page_size,
        num_kv_heads=step.num_kv_heads,
        k_headdim=step.head_dim,
        v_headdim=step.head_dim,
        data_parallel_size=dims["dp"],
        kv_head_shards=dims["tp"],
        page_size=step.page_size,
        num_pages=len(pages),
        max_num_pages_per_req=step.max_blocks,
        version="v3",
        _kvdtype_str={"float32": "fp32", "bfloat16": "bf16"}[step.dtype],
    )
    shape, axes = config.get_shape_and_axes()
    assert shape == pages.shape
    spec = manager.resolve(axes=axes, mode=MODE_PREFILL, shape=shape)
    pages = jax.device_put(pages, jax.sharding.NamedSharding(mesh, spec))
    return RaggedPagesCacheView(metadata=config, layer_index=0, kv_pages=pages,
                                partition_manager=manager)  # fmt: skip


@pytest.mark.parametrize(
    ("dims", "changes"),
    [
        ({"dp": 2, "tp": 3, "sp": 1}, {}),
        ({"dp": 2, "tp": 1, "sp": 4}, {"dtype": "bfloat16"}),
        ({"dp": 2, "tp": 3, "sp": 1}, {"window": 7, "head_dim": 128, "sinks": True}),
        ({"dp": 1, "tp": 3, "sp": 1}, {"soft_cap": 1.5, "head_dim": 80}),
    ],
    ids=["dp2_tp3", "dp2_sp4", "window_and_sinks", "soft_cap"],
)
def test_the_operation_is_exact(dims, changes):
    step = STEP.replace(**changes)
    made = batch(step, num_context_shards=dims["dp"])
    shape = (dims["dp"], 1, 1, dims["tp"], dims["sp"])
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("dp", "fsdp", "ep", "tp", "sp"))  # as EasyDeL's have it
    axis = PartitionAxis()
    manager = PartitionManager(axis)
    how = OperationMetadata(
        runtime_dtype=jnp.float32,
        platform=None,
        partition_axis=axis,
        partition_manager=manager,
        _stored_mesh=mesh,
    )
    view, inputs = view_of(made, dims, manager, mesh), made.inputs
    starts = np.cumsum([0, *inputs.query_lens]).astype(np.int32)
    real = np.int32((inputs.query_lens > 0).sum())
    metadata = RaggedPagesMetadata(
        pages_tables=jnp.asarray(inputs.block_tables),
        context_lens=jnp.asarray(np.where(inputs.query_lens > 0, inputs.context_lens, 0)),
        query_start_loc=jnp.asarray(starts),
        num_seqs=jnp.array([real], jnp.int32),
        request_distribution=jnp.array([0, 0, real], jnp.int32),
        page_size=step.page_size,
    )

    @jax.jit
    def run(view, metadata, query, key, value, sinks):
        done = OperationRegistry.create(NAME, how)(
            query=query, key=key, value=value, cache_view=view, cache_metadata=metadata,
            softmax_scale=0.1, sliding_window=step.window, logits_soft_cap=step.soft_cap,
            softmax_aux=sinks,
        )  # fmt: skip
        return done.attention_outputs, done.cache_view

    with mesh:
        out, new = run(view, metadata, *made.tokens, made.sinks)
    assert_attends(made, out, scale=0.1, soft_cap=step.soft_cap)
    assert_written(made, new.kv_pages, step.head_dim == 64, shards=dims["tp"])
    assert new.kv_pages.sharding.is_equivalent_to(view.kv_pages.sharding, 5)
