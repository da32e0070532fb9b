"""What JAX's transformations make of a kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import sequential_vmap

from ...options import Tuning


def as_kernel(call: Callable[..., Any], tuning: Tuning) -> Callable[..., Any]:
    """`call(tuning, *arrays)` as calls that run one after the other under `jax.vmap`, and have no
    gradient; interpreted by whatever is not a TPU, where `tuning` leaves that open.

    Traced with 32-bit integers, which is what kernels have, whatever `jax_enable_x64` says.
    """
    here = functools.partial(call, tuning)
    if tuning.interpret is None:
        compiled, interpreted = (
            functools.partial(call, dataclasses.replace(tuning, interpret=interpret))
            for interpret in (False, True)
        )
        here = functools.partial(lax.platform_dependent, tpu=compiled, default=interpreted)

    @jax.custom_jvp
    def without_gradient(*args: Any) -> Any:
        with jax.enable_x64(False):
            return here(*args)

    @without_gradient.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "pallas_tpu has no gradients; differentiate through backend='xla', which does"
        )

    return sequential_vmap(without_gradient)
