"""What differs between the JAX versions that have Mosaic GPU, and what every kernel here shares."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...options import Tuning

_BEFORE_REFS = jax.__version_info__ < (0, 11)
_load: Any = plgpu.load  # whose signature differs

WARPGROUP = 128  # threads, of which one program is made
WARP = 32
MMA_ROWS = 64  # rows of one wgmma
TILED_ROWS = 8  # of shared memory that a copy or a matmul can begin at
SMEM_BYTES = 227 << 10  # of one CTA
_NUM_SMS = 132  # of H100 and H200 in SXM modules


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads shared or global memory into registers in a layout."""
    if _BEFORE_REFS:
        return _load(ref, (), layout=layout, optimized=False)
    return _load(ref, layout=layout, optimized=False)


def compiler_params(*, exact_math: bool = False, reduction_bytes: int = 0) -> plgpu.CompilerParams:
    """Of every kernel; `exact_math` for a tanh that is right to float32's last digits, and bytes of
    shared memory for what is summed, or whose largest is found, across warps.

    Barriers between a thread's own reads and writes are ours to place: no kernel needs any.
    """
    return plgpu.CompilerParams(
        approx_math=not exact_math,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=reduction_bytes,
    )


def num_sms(tuning: Tuning) -> int:
    """Of the GPU that is compiled for: the number in `Tuning.chip`, or of this process's first.

    More or fewer cost time, and nothing else.
    """
    if tuning.chip is not None:
        return tuning.chip
    if jax.default_backend() != "gpu":
        return _NUM_SMS
    return getattr(jax.local_devices()[0], "core_count", _NUM_SMS)


def interpreter(tuning: Tuning) -> dict[str, Any]:
    """What `plgpu.kernel` takes besides, to run in the interpreter.

    Raises:
      NotImplementedError: where JAX has none.
    """
    if not tuning.interpret:
        return {}
    if _BEFORE_REFS:
        raise NotImplementedError(
            "interpret=True: JAX 0.10 has no interpreter of Mosaic GPU kernels, 0.11 has; run on a "
            "Hopper GPU, or use backend='xla'"
        )
    interpreted = getattr(plgpu, "InterpretGPUParams")  # noqa: B009 (JAX 0.10 has none)
    return {"interpret": interpreted() if tuning.interpret is True else tuning.interpret}


def in_place(
    body: Callable[..., None], changed: Sequence[jax.Array], inputs: Sequence[jax.Array], **how: Any
) -> list[jax.Array]:
    """Runs `body(*inputs, *changed)` on refs, and returns what `changed` then are."""
    if _BEFORE_REFS:
        params = how.pop("compiler_params")
        mesh = plgpu.Mesh(**how)
        start = lambda *refs: pl.core_map(mesh, compiler_params=params)(lambda: body(*refs))
    else:
        start = plgpu.kernel(body, out_type=(), **how)

    def run(refs: Any) -> None:
        start(*refs)

    return list(pl.run_state(run)((*inputs, *changed))[len(inputs) :])


def as_kernel(call: Callable[..., Any], tuning: Tuning) -> Callable[..., Any]:
    """`call(tuning, *arrays)` as calls that run one after the other under `jax.vmap`, and have no
    gradient. Traced with 32-bit integers, whatever `jax_enable_x64` says."""

    @jax.custom_jvp
    def without_gradient(*args: Any) -> Any:
        with jax.enable_x64(False):
            return call(tuning, *args)

    @without_gradient.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "pallas_gpu has no gradients; differentiate through backend='xla', which does"
        )

    return sequential_vmap(without_gradient)
