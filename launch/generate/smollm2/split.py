"""How the weights of a model are split over a mesh: equally, over all devices."""

import dataclasses
import math

import jax
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

    def gathered_matmul(self, weight: jax.Array, x: jax.Array) -> jax.Array:
        """`weight @ x`, the weight split by outputs: each device makes some, all get all."""
        # Split first, then gather: asked for the replicated result alone, the compiler would
        # gather the weight instead.
        return self.replicated(self._constrain(weight @ x, 0))

    def summed_matmul(self, weight: jax.Array, x: jax.Array) -> jax.Array:
        """`weight @ x`, the weight split by inputs: the devices' parts are summed."""
        return self.replicated(weight @ self._constrain(x, 0))

    def _constrain(self, x: jax.Array, split_axis: int | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, split_axis))
