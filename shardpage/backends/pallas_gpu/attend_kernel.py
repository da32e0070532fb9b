"""The kernel's body: one warpgroup fetches pages, one or two others attend.

    fetch     K0 V0 K1 V1 | K2 V2 ...           into a ring of blocks, one copy per page and head
    attend          S0 P0 O0 | S1 P1 O1 ...     products, softmax, weighted values

Queries are the rows of the products (`queries_first.py`), or tokens are (`tokens_first.py`). Of a
quantised cache one or two warpgroups widen blocks in between (`widen.py`).

Each CTA walks over its share of all units (`share.py`). Whole units are finished here; the parts of
cut ones leave as partial softmaxes, which `merge_kernel.py` merges.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .config import Config, scale_lanes
from .mosaic import MMA_ROWS, WARPGROUP
from .pages import Pages, rows_at
from .queries_first import QueriesFirst
from .scratch import Scratch
from .share import Segment, Share, for_each_segment, last_cta, share_of
from .softmax import Logits
from .tiles import Tiles
from .tokens_first import TokensFirst
from .widen import Widener
from .window import Window


class Registers(NamedTuple):
    """A thread's, at most 255.

    Together no more than a CTA begins with, of 65536 the same multiple of 8 for each of its
    threads: else one warpgroup waits for ever for what none gives up.
    """

    fetch: int
    attend: int
    widen: int = 0


# By how many warpgroups attend, and how many widen.
REGISTERS = {
    (1, 0): Registers(128, 240),
    (2, 0): Registers(40, 232),
    (1, 2): Registers(64, 240, 96),
    (2, 1): Registers(40, 200, 72),
}


class Inputs(NamedTuple):
    query: Any  # [copies, copy_rows, key_dim], or in place [queries, heads, key_dim]
    query_units: Any  # [copies, query_rows], of queries that are split, or None
    arrays: tuple[Any, ...]  # of the cache
    scales: tuple[Any, ...]  # of its tokens, [pages, kv_heads, 1, 2 * page_size]
    ids: Any  # [rows, pages]
    tiles: Tiles


class Outputs(NamedTuple):
    out: Any  # [units, out_rows, out_dim], or in place [queries, heads, value_dim]
    lse: Any  # [units, 128], in base 2
    part_out: Any  # [2 * ctas, out_rows, out_dim]: where a share begins, and where it ends
    part_lse: Any  # [2 * ctas, 128]
    cut: Any  # [ctas, 2]: the unit that a share ends inside of, or -1, and the CTA that ends it


def outputs(config: Config) -> Outputs:
    """Shapes and dtypes of the results."""
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    unit = (config.out_rows, config.out_dim)
    out = config.num_units, *unit
    if config.out_in_place:
        num_heads = config.format.num_kv_heads * config.group
        out = config.num_queries, num_heads, config.format.value_dim
    return Outputs(
        jax.ShapeDtypeStruct(out, config.out_dtype),
        float32(config.num_units, WARPGROUP),
        float32(2 * config.num_ctas, *unit),
        float32(2 * config.num_ctas, WARPGROUP),
        jax.ShapeDtypeStruct((config.num_ctas, 2), jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What both kinds of warpgroup see."""

    config: Config
    logits: Logits
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch

    def run(self) -> None:
        config, tiles = self.config, self.inputs.tiles
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        share = share_of(config, tiles.start, tiles.stop, cta)
        registers = REGISTERS[config.consumers, config.wideners]

        @pl.when(warpgroup == config.consumers)
        def _():
            plgpu.set_max_registers(registers.fetch, action="decrease")
            steps, segments = self.for_each_segment(share, self.fetch)
            for ring in self.scratch.arriving:
                self.drain(ring.free, config.stages, steps)
            self.drain(self.scratch.query_free, config.query_slots, segments)

        @pl.when(warpgroup < config.consumers)
        def _():
            plgpu.set_max_registers(registers.attend, action="increase")
            self.outputs.cut[cta, 0] = -1
            self.no_part(share, cta, warpgroup)
            self.for_each_segment(
                share, lambda segment: self.attend(segment, share, cta, warpgroup)
            )
            plgpu.wait_smem_to_gmem(0)

        if not config.wideners:
            return

        @pl.when(warpgroup > config.consumers)
        def _():
            plgpu.set_max_registers(registers.widen, action="decrease")
            number = warpgroup - config.consumers - 1
            widener = Widener(config, tiles, self.scratch, number)
            steps, _ = self.for_each_segment(share, widener.segment)
            widener.drain(steps, self.drain)

    def for_each_segment(self, share: Share, body: Any) -> tuple[jax.Array, jax.Array]:
        tiles = self.inputs.tiles
        return for_each_segment(self.config, tiles.start, tiles.stop, share, body)

    def drain(self, barrier: Any, count: int, used: jax.Array) -> None:
        """Waits for the last completions, so that every one is waited for once."""
        for i in range(count):
            pl.when(i < used)(lambda i=i: plgpu.barrier_wait(barrier.at[i]))

    # Fetching

    def fetch(self, segment: Segment) -> None:
        """Brings a unit's queries, and its keys and values block by block."""
        config, inputs, scratch = self.config, self.inputs, self.scratch
        slot = lax.rem(segment.number, jnp.int32(config.query_slots))

        @pl.when(segment.number >= config.query_slots)
        def _():
            plgpu.barrier_wait(scratch.query_free.at[slot])

        self.fetch_queries(segment.unit, slot)
        pages = Pages.of(config, inputs.ids, inputs.tiles, segment)

        def fetch_block(i, ids):
            following = pages.ids_of(i + 1)  # on their way while copies are started
            self.fetch_block(segment, i, pages, ids)
            return following

        lax.fori_loop(0, segment.length, fetch_block, pages.ids_of(0))

    def fetch_queries(self, unit: jax.Array, slot: jax.Array) -> None:
        config, inputs, scratch = self.config, self.inputs, self.scratch
        first, full = slot * config.copy_rows, scratch.query_full.at[slot]
        if config.in_place:
            self.window(unit).fetch(inputs.query, scratch.query, first, full)
            return
        copy = lax.div(unit, jnp.int32(config.fold))
        rows = scratch.query.at[pl.ds(first, config.copy_rows)]
        plgpu.copy_gmem_to_smem(inputs.query.at[copy], rows, full)
        if inputs.query_units is not None:
            units = scratch.query_units.at[slot, pl.ds(0, config.query_rows)]
            plgpu.copy_gmem_to_smem(inputs.query_units.at[copy], units, full)

    def window(self, unit: jax.Array) -> Window:
        """Where a unit's queries and results lie."""
        windows = self.inputs.tiles.windows
        assert windows is not None
        return Window.of(self.config, windows, unit)

    def fetch_block(
        self, segment: Segment, i: jax.Array, pages: Pages, ids: tuple[jax.Array, ...]
    ) -> None:
        config, piece = self.config, self.config.piece_tokens
        per_page = jnp.int32(config.format.page_size // piece)
        slot = lax.rem(segment.step + i, jnp.int32(config.stages))

        for which, ring in enumerate(self.scratch.arriving):

            @pl.when(segment.step + i >= config.stages)
            def _(free=ring.free):
                plgpu.barrier_wait(free.at[slot])

            full = ring.full.at[slot]
            for j, (page, number) in enumerate(zip(ids, pages.pieces_of(i), strict=True)):
                source = self.piece(which, page, segment.head, lax.rem(number, per_page))
                part = ring.blocks.at[slot, pl.ds(j * piece, piece)]
                plgpu.copy_gmem_to_smem(source, part, full)
                if config.scale_copies and which == config.scales_with:
                    offset = lax.rem(number, per_page) * piece
                    self.fetch_scales(page, segment.head, offset, (slot, j), full)

    def fetch_scales(
        self, page: jax.Array, head: jax.Array, offset: jax.Array, at: tuple[Any, int], full: Any
    ) -> None:
        """Brings the scales of a piece, of keys and of values."""
        config, scales = self.config, self.scratch.scales
        assert scales is not None
        source = self.inputs.scales[0].at[page, head, 0]
        if config.scale_copies == 1:  # of a whole page: side by side
            target = scales.arriving.at[*at, pl.ds(0, 2 * config.piece_tokens)]
            plgpu.copy_gmem_to_smem(source, target, full)
            return
        for lane, first in ((0, 0), (scale_lanes(config)[0], config.format.page_size)):
            part = source.at[pl.ds(first + offset, config.piece_tokens)]
            target = scales.arriving.at[*at, pl.ds(lane, config.piece_tokens)]
            plgpu.copy_gmem_to_smem(part, target, full)

    def piece(self, which: int, page: jax.Array, head: jax.Array, number: jax.Array) -> Any:
        """Keys (0) or values (1) of one piece of a page."""
        page_format, piece = self.config.format, self.config.piece_tokens
        whole = piece == page_format.page_size
        tokens = slice(None) if whole else pl.ds(number * piece, piece)
        return rows_at(page_format, self.inputs.arrays, which, page, head, tokens)

    # Attending

    def attend(self, segment: Segment, share: Share, cta: jax.Array, warpgroup: jax.Array) -> None:
        """Attends with a unit's queries to the blocks of a segment, and stores the result."""
        config, scratch, outputs = self.config, self.scratch, self.outputs
        blocks = self.way.of(config, self.logits, self.inputs.tiles, scratch, segment, warpgroup)
        window, whole = None, segment.whole
        if config.out_in_place:
            window = self.window(segment.unit)
            whole &= window.whole
        plgpu.barrier_wait(scratch.query_full.at[blocks.query_slot])
        result = blocks.attend()
        plgpu.barrier_arrive(scratch.query_free.at[blocks.query_slot])

        @pl.when(whole)
        def _():
            lse = outputs.lse.at[segment.unit]
            if window:
                blocks.store(result, outputs.out, lse, window)
            else:
                blocks.store(result, outputs.out.at[segment.unit], lse)

        # Most are whole: 16 prompts beside 240 rows took 2.5 % more with a branch around each copy.
        if window:

            @pl.when(segment.whole & jnp.logical_not(whole))
            def _():
                lse = outputs.lse.at[segment.unit]
                blocks.store(result, outputs.out, lse, window, whole=False)

        @pl.when(jnp.logical_not(segment.whole))
        def _():
            part = 2 * cta + segment.begins.astype(jnp.int32)
            blocks.store(result, outputs.part_out.at[part], outputs.part_lse.at[part])

        @pl.when(segment.begins & (segment.length < segment.num_blocks))
        def _():
            outputs.cut[cta, 0] = segment.unit
            outputs.cut[cta, 1] = last_cta(config, share, segment)

    @property
    def way(self) -> type[QueriesFirst] | type[TokensFirst]:
        """How blocks are attended to."""
        return TokensFirst if self.config.tokens_first else QueriesFirst

    def no_part(self, share: Share, cta: jax.Array, warpgroup: jax.Array) -> None:
        """Says of an empty share that it has no part of a unit that is cut around it."""
        if not self.config.num_splits:
            return

        @pl.when(share.length == 0)
        def _():
            staged, own = self.scratch.lse, 0
            if not self.config.tokens_first:
                staged, own = staged.at[warpgroup], warpgroup * MMA_ROWS
            nothing = jnp.full(staged.shape, -jnp.inf, jnp.float32)
            staged[...] = plgpu.layout_cast(nothing, self.way.lse_layout)
            plgpu.commit_smem()
            target = self.outputs.part_lse.at[2 * cta, pl.ds(own, staged.shape[0])]
            plgpu.copy_smem_to_gmem(staged, target)
