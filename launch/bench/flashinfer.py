"""FlashInfer, CUDA kernels for PyTorch, on the arrays of this process: DLPack shares them.

It plans a step on the host, which is not timed; this library's plan is part of its calls.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .inputs import Inputs
from .peers import Unavailable
from .step_inputs import StepInputs

_WORKSPACE_BYTES = 256 << 20


class Outputs:
    """What calls will have computed when PyTorch's stream is done; an array of the last of them."""

    def __init__(self, torch: Any, tensors: list[Any]):
        self._torch, self._tensors = torch, tensors

    def __getitem__(self, number: int) -> jax.Array:
        return jnp.from_dlpack(self.block_until_ready()._tensors[number])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[-1], dtype)

    def block_until_ready(self) -> "Outputs":
        self._torch.cuda.synchronize()
        return self


def decode(
    given: Inputs, platform: str, *, tensor_cores: bool
) -> tuple[Callable[[], Outputs], int]:
    """Its decode wrapper; without tensor cores its kernels for few query heads per KV head."""
    torch, library = _modules(platform, given.shape.dtype)
    wrapper = functools.partial(
        library.BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=tensor_cores, backend="fa2"
    )
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    runs = []
    for query, tables in zip(given.queries, given.tables, strict=True):
        planned = wrapper(workspace, "HND")
        pages = _pages(torch, given.shape.context_lens, np.asarray(tables), given.shape.page_size)
        planned.plan(*pages, *_sizes(given.shape), **_dtypes(torch))
        runs.append(functools.partial(planned.run, torch.from_dlpack(query)))
    cache = tuple(map(torch.from_dlpack, (given.key, given.value)))
    return lambda: Outputs(torch, [run(cache) for run in runs]), _WORKSPACE_BYTES


def step(
    given: StepInputs, platform: str, *, backend: str
) -> tuple[Callable[..., Outputs], tuple[()]]:
    """Its wrapper for several queries per sequence."""
    torch, library = _modules(platform, given.shape.dtype)
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    planned = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
    shape, tables = given.shape, np.asarray(given.lengths[1])
    pages = _pages(torch, shape.context_lens, tables, shape.page_size)
    bounds = torch.from_dlpack(given.bounds)
    planned.plan(bounds, *pages, *_sizes(shape), causal=True, **_dtypes(torch))
    query, *cache = map(torch.from_dlpack, (given.query, given.key, given.value))
    return lambda: Outputs(torch, [planned.run(query, tuple(cache))]), ()


def _modules(platform: str, dtype: str) -> tuple[Any, Any]:
    if platform != "gpu":
        raise Unavailable("needs a GPU")
    if dtype != "bfloat16":
        raise Unavailable("measured in bfloat16 only")
    try:
        return importlib.import_module("torch"), importlib.import_module("flashinfer")
    except ImportError as error:
        raise Unavailable(f"pip install flashinfer-python ({error})") from error


def _pages(torch: Any, lens: np.ndarray, tables: np.ndarray, page_size: int) -> list[Any]:
    """Pages of all sequences: where each one's begin, their ids, tokens in each one's last."""
    counts = -(-lens // page_size)
    ids = tables[np.arange(tables.shape[1]) < counts[:, None]]
    arrays = np.concatenate([[0], np.cumsum(counts)]), ids, lens - (counts - 1) * page_size
    return [torch.tensor(x.astype(np.int32), device="cuda") for x in arrays]


def _sizes(shape: Any) -> tuple[int, ...]:
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size


def _dtypes(torch: Any) -> dict[str, Any]:
    return {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


DECODE = {
    "flashinfer": functools.partial(decode, tensor_cores=True),
    "flashinfer cuda cores": functools.partial(decode, tensor_cores=False),
}
