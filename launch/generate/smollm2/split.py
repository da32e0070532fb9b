"""How the weights of a model are split over a mesh: equally, over all devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class WeightSplit:
    """Splits matrices over all axes of a mesh, and says what each matmul costs in traffic.

    What the axes mean to the attention (sequences, KV heads, context) does not matter here: a
    matrix is cut into as many equal parts as there are devices, so each reads its share once a
    step. Activations between matmuls are replicated; those of a decode step are a few kilobytes.
    """

    mesh: Mesh

    def axes(self, size: int) -> tuple[str, ...]:
        """The mesh axes over which a dimension of this size is split: all, if they divide it."""
        chosen, parts = [], 1
        for name, axis_size in self.mesh.shape.items():
            if size % (parts * axis_size) == 0:
                chosen.append(name)
                parts *= axis_size
        return tuple(chosen)

    def parts(self, size: int) -> int:
        """Into how many parts a dimension of this size is split."""
        return math.prod(self.mesh.shape[name] for name in self.axes(size))

    def sharding(self, shape: tuple[int, ...], split_axis: int | None) -> NamedSharding:
        """The sharding of an array that is split along one axis, or replicated (None)."""
        spec: list[tuple[str, ...] | None] = [None] * len(shape)
        if split_axis is not None:
            spec[split_axis] = self.axes(shape[split_axis])
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def replicated(self, x: jax.Array) -> jax.Array:
        """Tells the compiler that every device has all of `x`."""
        return self._constrain(x, None)

    def gathered_matmul(
        self, weights: Sequence[jax.Array], number: jax.Array | int, x: jax.Array
    ) -> jax.Array:
        """`weights[number] @ x`, weights split by outputs: each device makes some, all get all."""
        return self.replicated(self.split_matmul(weights, number, x))

    def split_matmul(
        self, weights: Sequence[jax.Array], number: jax.Array | int, x: jax.Array
    ) -> jax.Array:
        """`weights[number] @ x`, weights and result split by outputs."""
        out = (None,) * (weights[0].ndim - 2) + (self.axes(weights[0].shape[-2]),)
        return self._mapped(_chosen_matmul, (out, None, None), out)(tuple(weights), number, x)

    def summed_matmul(
        self, weights: Sequence[jax.Array], number: jax.Array | int, x: jax.Array
    ) -> jax.Array:
        """`weights[number] @ x`, weights and `x` split by inputs: the devices' parts are summed."""
        axes = self.axes(x.shape[0])
        summed = lambda *args: jax.lax.psum(_chosen_matmul(*args), axes)
        return self._mapped(summed, ((None, axes), None, (axes,)), ())(tuple(weights), number, x)

    def _mapped(self, function: Callable[..., jax.Array], inputs: tuple, out: tuple):
        """A function of each device's part of weights, a number and an `x`."""
        weight, _, x = (PartitionSpec(*(spec or ())) for spec in inputs)
        specs = {"in_specs": (weight, PartitionSpec(), x), "out_specs": PartitionSpec(*out)}
        return jax.shard_map(function, mesh=self.mesh, **specs)

    def _constrain(self, x: jax.Array, split_axis: int | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, split_axis))


def _chosen_matmul(
    weights: tuple[jax.Array, ...], number: jax.Array | int, x: jax.Array
) -> jax.Array:
    """`weights[number] @ x`; a weight may have axes before those of outputs and inputs.

    A branch for each weight reads it where it is. Of weights in one array XLA's CPU compiler would
    copy the chosen one before it multiplies, which took half of the time of a step of one token.
    """
    product = functools.partial(jnp.einsum, "...oi,it->...ot")
    return jax.lax.switch(number, [functools.partial(product, weight) for weight in weights], x)
