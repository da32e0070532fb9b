"""What the kernel is going to do: the walk's steps and their page ids, in scalar memory.

Both are there from the beginning if they fit. If not, they come from HBM, each into a ring: steps
run ahead of page ids, and page ids ahead of pages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .geometry import LANES
from .sizes import IDS_AHEAD, Sizes
from .walk import Block

NUM_FIELDS = len(Block._fields)


@dataclasses.dataclass(frozen=True)
class Resident:
    """All steps and page ids in scalar memory, flat."""

    blocks: Any  # [num_cores * fields * step_blocks * num_steps]
    ids: Any
    width: int  # ids per row
    core: jax.Array | int
    num_steps: int  # of each core
    sizes: Sizes

    def begin(self) -> None:
        """Nothing to fetch."""

    def prefetch(self, step: jax.Array) -> None:
        """Nothing to fetch, nor to wait for."""

    def end(self, step: jax.Array) -> None:
        """Nothing to wait for."""

    def block(self, step: jax.Array, index: jax.Array | int) -> Block:
        of_field = self.sizes.step_blocks * self.num_steps
        first = self.core * (NUM_FIELDS * of_field) + step + index * self.num_steps
        return _block(self.blocks, first, of_field)

    def first_id(self, block: Block, step: jax.Array, index: jax.Array | int) -> jax.Array:
        """Where the page ids of a block begin."""
        return block.row * self.width + block.first_page


@dataclasses.dataclass(frozen=True)
class Paged:
    """Steps and page ids on their way from HBM.

    Each block fetches the two windows of 128 that its ids lie in, although several share them: a
    KiB per block buys a pipeline without branches. Steps past the end fetch something all the same.
    """

    steps_in_hbm: Any  # [num_cores * num_steps, 1, step_lanes]; of a step its fields in turn
    ids_in_hbm: Any  # [rows * windows + 1, 1, 128]
    steps: Any  # [agenda_steps * step_lanes]
    ids: Any  # [agenda_steps * step_blocks * 256]
    step_semaphores: Any  # [agenda_steps]
    id_semaphores: Any  # [agenda_steps]
    windows: int  # of ids per row
    core: jax.Array | int
    num_steps: int  # of each core
    sizes: Sizes

    def begin(self) -> None:
        """Starts what `prefetch` of step 0 expects to be under way."""
        pl.loop(0, 2 * IDS_AHEAD)(self._start_step)
        pl.loop(0, IDS_AHEAD)(self._start_ids)

    def prefetch(self, step: jax.Array) -> None:
        """Fetches for later steps, and waits for the ids of this one."""
        self._start_step(step + 2 * IDS_AHEAD)
        self._start_ids(step + IDS_AHEAD)
        self._wait_ids(step)

    def end(self, step: jax.Array) -> None:
        """Waits for what is under way when `step` is the next that would be fetched."""
        for ahead in range(IDS_AHEAD):
            self._wait_step(step + IDS_AHEAD + ahead)
            self._wait_ids(step + ahead)

    def block(self, step: jax.Array, index: jax.Array | int) -> Block:
        first = self._place(step) * self.sizes.step_lanes + index
        return _block(self.steps, first, self.sizes.step_blocks)

    def first_id(self, block: Block, step: jax.Array, index: jax.Array | int) -> jax.Array:
        """Where the page ids of a block begin."""
        return self._windows(step, index) + lax.rem(block.first_page, LANES)

    def _start_step(self, step: jax.Array) -> None:
        step_in_hbm = self.core * self.num_steps + jnp.minimum(step, self.num_steps - 1)
        self._copy_step(self.steps_in_hbm.at[step_in_hbm, 0], step).start()

    def _wait_step(self, step: jax.Array) -> None:
        self._copy_step(self.steps_in_hbm.at[0, 0], step).wait()

    def _copy_step(self, source: Any, step: jax.Array):
        place, lanes = self._place(step), self.sizes.step_lanes
        target = self.steps.at[pl.ds(pl.multiple_of(place * lanes, LANES), lanes)]
        return pltpu.make_async_copy(source, target, self.step_semaphores.at[place])

    def _start_ids(self, step: jax.Array) -> None:
        self._wait_step(step)

        @pl.loop(0, self.sizes.step_blocks)
        def _(index):
            block = self.block(step, index)
            window = block.row * self.windows + lax.div(block.first_page, LANES)
            for half in range(2):
                self._copy_ids(self.ids_in_hbm.at[window + half, 0], step, index, half).start()

    def _wait_ids(self, step: jax.Array) -> None:
        for index in range(self.sizes.step_blocks):
            for half in range(2):
                self._copy_ids(self.ids_in_hbm.at[0, 0], step, index, half).wait()

    def _copy_ids(self, source: Any, step: jax.Array, index: jax.Array | int, half: int):
        first = pl.multiple_of(self._windows(step, index) + half * LANES, LANES)
        target, semaphore = (
            self.ids.at[pl.ds(first, LANES)],
            self.id_semaphores.at[self._place(step)],
        )
        return pltpu.make_async_copy(source, target, semaphore)

    def _windows(self, step: jax.Array, index: jax.Array | int) -> jax.Array:
        return (self._place(step) * self.sizes.step_blocks + index) * (2 * LANES)

    def _place(self, step: jax.Array) -> jax.Array:
        return step & (self.sizes.agenda_steps - 1)


def _block(blocks: Any, first: jax.Array, stride: int) -> Block:
    return Block(*(blocks[first + field * stride] for field in range(NUM_FIELDS)))
