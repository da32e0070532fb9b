"""What JAX's transformations make of a kernel."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import sequential_vmap


def as_kernel(call: Callable[..., Any]) -> Callable[..., Any]:
    """Calls that run one after the other under `jax.vmap`, and have no gradient.

    Traced with 32-bit integers, which is what kernels have, whatever `jax_enable_x64` says.
    """

    @jax.custom_jvp
    def without_gradient(*args: Any) -> Any:
        with jax.enable_x64(False):
            return call(*args)

    @without_gradient.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "pallas_tpu has no gradients; differentiate through backend='xla', which does"
        )

    return sequential_vmap(without_gradient)
