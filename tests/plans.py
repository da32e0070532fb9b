"""A small model and its bounds, for the tests of `shardpage plan`."""

import functools

import meshes
from launch.plan.bound import Bounds
from launch.plan.estimate import estimate
from launch.plan.workload import LayerKind, Model, Workload

MODEL = Model("small", num_heads=8, num_kv_heads=4, head_dim=128, layers=(LayerKind(3),))
WORK = Workload(MODEL, batch=8, context=512, page_size=16, backend="xla")
CACHE_BYTES = 3 * 8 * 512 * 4 * 128 * 2 * 2  # layers, sequences, tokens, heads, dim, K and V, bf16
V5E = "v5e:2x4"


@functools.cache
def planned(spec: str, work: Workload = WORK, name: str = V5E, num_slices: int = 1) -> Bounds:
    return estimate(work, meshes.topology(name, spec, num_slices=num_slices))
