"""The flat walk of the XLA backend: which blocks of which sequences each step works on."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ..pages import LocalPages
from ..vma import vary_over, varying_axes

State = TypeVar("State")


class Items(NamedTuple):
    """The work items of one step: one block of pages for each lane."""

    seq: Int[Array, " lanes"]
    slot: Int[Array, " lanes"]  # where the lane's partial of this sequence is kept
    live: Bool[Array, " lanes"]  # False once the lane's share is done
    ids: Int[Array, "lanes pages"]
    valid: Bool[Array, "lanes tokens"]  # tokens of the block that are attended to


class Walk(NamedTuple):
    """A flat list of all sequences' blocks, cut into one share a lane.

    Item `i` is block `i - first[s]` of the sequence `s` with `first[s] <= i < last[s]`; lane `w`
    works on items `[cuts[w], cuts[w + 1])`.
    """

    pages: LocalPages
    first: Int[Array, " num_seqs"]
    last: Int[Array, " num_seqs"]
    cuts: Int[Array, " lanes_and_one"]

    @property
    def num_lanes(self) -> int:
        return self.cuts.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """Slots for partials: `sequence + lane` tells any two of a walk apart.

        Along the list neither sequence nor lane ever falls, so their sum rises with every new
        pair.
        """
        return self.first.shape[0] + self.num_lanes - 1

    @property
    def slot_seq(self) -> Int[Array, " num_slots"]:
        """The sequence that each slot is for; any, where no partial is kept."""
        last_lane = jnp.sum(self.cuts[1:-1] < self.last[:, None], axis=1, dtype=jnp.int32)
        last_slot = jnp.arange(self.last.shape[0], dtype=jnp.int32) + last_lane
        slot = jnp.arange(self.num_slots, dtype=jnp.int32)
        seq = jnp.sum(last_slot < slot[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(seq, self.last.shape[0] - 1)

    def seq_of(self, item: Int[Array, "..."]) -> Int[Array, "..."]:
        """The sequence of an item; `num_seqs - 1` past the end of the list."""
        seq = jnp.sum(item[..., None] >= self.last, axis=-1, dtype=jnp.int32)
        return jnp.minimum(seq, self.last.shape[0] - 1)

    def items(self, step: Int[Array, ""], pages_per_block: int, page_size: int) -> Items:
        """What the lanes work on in a step."""
        item = self.cuts[:-1] + step
        live = item < self.cuts[1:]
        seq = self.seq_of(item)
        first_page = (item - self.first[seq]) * pages_per_block
        page = first_page[:, None] + jnp.arange(pages_per_block, dtype=jnp.int32)
        ids = self.pages.ids.at[seq[:, None], page].get(mode="clip")
        token = first_page[:, None] * page_size + jnp.arange(
            pages_per_block * page_size, dtype=jnp.int32
        )
        start, stop = self.pages.start[seq, None], self.pages.stop[seq, None]
        valid = (token >= start) & (token < stop) & live[:, None]
        slot = seq + jnp.arange(self.num_lanes, dtype=jnp.int32)
        return Items(seq, jnp.where(live, slot, self.num_slots), live, ids, valid)


def make_walk(pages: LocalPages, block_tokens: int, num_lanes: int, num_splits: int) -> Walk:
    """Lists the blocks of all sequences and cuts the list into shares.

    Shares are equal, up to a block. With `num_splits > 0` a cut moves back to the nearest bound
    of the `num_splits` parts of its sequence, so that no sequence is split into more.
    """
    num_blocks = -(-pages.stop // block_tokens)
    last = jnp.cumsum(num_blocks, dtype=jnp.int32)
    first = last - num_blocks
    share = -(-last[-1] // num_lanes)
    cuts = jnp.minimum(jnp.arange(num_lanes + 1, dtype=jnp.int32) * share, last[-1])
    walk = Walk(pages, first, last, cuts)
    if num_splits:
        seq = walk.seq_of(cuts)
        part = jnp.maximum(-(-num_blocks[seq] // num_splits), 1)
        behind = jnp.where(cuts < last[-1], (cuts - first[seq]) % part, 0)
        walk = walk._replace(cuts=cuts - behind)
    return walk


def walk_blocks(
    walk: Walk,
    pages_per_block: int,
    page_size: int,
    work: Callable[[Items, State], State],
    state: State,
    *,
    peel_last: bool = False,
) -> State:
    """Runs `work` on every step of the walk: as many as the longest share has items.

    Args:
      peel_last: take the last step after the loop, even if there is nothing to do. A GPU's host
        must wait for the device to know whether a loop goes on, and can launch nothing meanwhile;
        so it waits before the last step, which then runs while the host launches what follows.
    """

    def body(step: jax.Array, state: State) -> State:
        return work(walk.items(step, pages_per_block, page_size), state)

    num_steps = jnp.max(walk.cuts[1:] - walk.cuts[:-1])
    if not peel_last:
        return lax.fori_loop(0, num_steps, body, state)
    # The counter comes out of the loop, or XLA would take most of the last step before it.
    step, state = lax.while_loop(
        lambda carry: carry[0] < num_steps - 1,
        lambda carry: (carry[0] + 1, body(*carry)),
        (vary_over(jnp.int32(0), varying_axes(num_steps)), state),
    )
    return body(step, state)
