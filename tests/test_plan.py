"""`shardpage plan`: what it reads from compiled programs, and what it concludes."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

import meshes
from launch.plan import issue, report
from launch.plan.bound import Device, links_used, quick_bound, sent_bytes
from launch.plan.compile import compile_layer, split_for
from launch.plan.estimate import confirm_largest_batch, estimate, shrink_to_fit
from launch.plan.issue import Issue, Schedule
from launch.plan.read import read_layer
from launch.plan.workload import QUANTISED, LayerKind, Model, Workload, preset_names
from launch.schedule import worker
from shardpage import PagedKVCache

from .plans import CACHE_BYTES, MODEL, V5E, WORK, planned

pytest.importorskip("libtpu", reason="compiling for TPU slices needs libtpu: shardpage[tpu]")


class TestWorkload:
    @pytest.mark.parametrize("name", preset_names())
    def test_presets_are_whole_or_refused_with_a_reason(self, name):
        if name.startswith("deepseek"):
            with pytest.raises(ValueError, match="cannot be planned: its attention is MLA"):
                Model.preset(name)
            return
        model = Model.preset(name)
        assert model.num_heads % model.num_kv_heads == 0
        assert model.num_layers == sum(kind.count for kind in model.layers) >= 32
        assert model.source.startswith("https://")

    def test_unknown_models_say_which_are_known(self):
        with pytest.raises(
            ValueError, match=r"unknown model 'gpt-5'; known are llama-3-8b.*--heads"
        ):
            Model.preset("gpt-5")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batch": 0}, "batch must be 1 or more; got 0"),
            ({"new_tokens": 0}, "new tokens must be 1 or more; got 0"),
            ({"new_tokens": 513}, "new tokens must be among the 512 of a context; got 513"),
            ({"page_size": -1}, "page size must be 1 or more"),
            ({"dtype": "int4"}, "dtype 'int4' is none of float32, .*, int8, float8_e4m3fn, "),
            ({"query_dtype": "int8"}, "query dtype 'int8' is none of float32, bfloat16, float16$"),
            ({"kv_layout": "rows"}, "KV layout 'rows' is none of blocks_first"),
        ],
    )
    def test_refuses_senseless_sizes(self, change, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(WORK, **change)

    @pytest.mark.parametrize(
        ("window", "pages"), [(None, 32), (512, 32), (9999, 32), (16, 1), (17, 2), (100, 7)]
    )
    def test_a_window_touches_only_its_pages(self, window, pages):
        assert WORK.window_pages(LayerKind(1, window)) == pages

    @pytest.mark.parametrize(
        ("window", "pages", "seen"), [(None, 32, sum(range(313, 513))), (100, 19, 200 * 100)]
    )
    def test_a_chunk_reads_what_its_first_token_sees(self, window, pages, seen):
        work, kind = dataclasses.replace(WORK, new_tokens=200), LayerKind(1, window)
        assert work.window_pages(kind) == pages  # from token 213 on
        assert work.flops(kind) == 4 * 8 * 128 * 8 * seen


class TestCompiled:
    @pytest.mark.parametrize("spec", ["data=8", "kv=4,data=2", "data=2,context=2,kv=2"])
    def test_reads_memory_and_traffic(self, spec):
        bounds = planned(spec)
        assert bounds.memory.cache == CACHE_BYTES // 8
        assert all(layer.copied_bytes == 0 for layer in bounds.layers)
        axes = {sent.axes for layer in bounds.layers for sent in layer.collectives}
        assert axes == ({("context",)} if "context" in spec else set())
        assert bounds.memory.fits
        assert bounds.device.chip == meshes.chips()["v5e"]

    @pytest.mark.parametrize("head_dim", [64, 80])
    def test_narrow_and_odd_heads_stay_in_place(self, head_dim):
        model = dataclasses.replace(MODEL, head_dim=head_dim, layers=(LayerKind(1),))
        work = dataclasses.replace(WORK, model=model, context=4096, backend=None)
        split = split_for(work, meshes.topology(V5E, "data=4,kv=2"))
        layer = read_layer(compile_layer(work, split, model.layers[0]))
        lanes = 64 if head_dim == 64 else 128  # packed; padded
        assert layer.cache_bytes == 2 * 4096 * 2 * lanes * 2 * 2
        assert layer.copied_bytes == 0
        assert layer.temp_bytes < layer.cache_bytes / 4

    @pytest.mark.parametrize("dtype", QUANTISED)
    def test_quantised_pages_and_their_scales(self, dtype):
        work = dataclasses.replace(WORK, dtype=dtype, page_size=64)
        bounds, exact = planned("data=4,kv=2", work), planned("data=4,kv=2")
        assert work.head_bytes == 2 * (128 + 4)
        # Scales of keys and of values fill the 128 lanes of a row.
        assert bounds.memory.cache == exact.memory.cache * 132 / 256 == CACHE_BYTES * 132 / 256 / 8
        assert all(layer.copied_bytes == 0 for layer in bounds.layers)
        assert quick_bound(work, {"data": 4, "kv": 2, "context": 1}, bounds.device) <= (
            bounds.times.total
        )
        assert bounds.largest_batch > 1.9 * exact.largest_batch

    @pytest.mark.parametrize(("page_size", "lanes"), [(32, 128), (64, 128), (96, 256)])
    def test_a_tpu_pads_scales_of_four_bytes_and_of_two_alike(self, page_size, lanes):
        """Narrower scales would save nothing, since two of them do not share a lane."""
        mesh = Mesh(meshes.topology("v6e:2x2").devices.flat[:1], ("data",))
        cache = PagedKVCache.abstract(1024, 8, page_size, 128, dtype="int8", mesh=mesh)
        [scales] = cache.scales
        for dtype in (jnp.float32, jnp.bfloat16):
            given = jax.ShapeDtypeStruct(scales.shape, dtype, sharding=scales.format)
            memory = jax.jit(lambda x: x[0]).lower(given).compile().memory_analysis()
            assert memory.argument_size_in_bytes == 1024 * 8 * lanes * 4

    def test_heads_that_do_not_divide_give_to_context(self):
        bounds = planned("kv=8")
        assert (bounds.split.head_shards, bounds.split.context_shards) == (4, 2)
        assert bounds.memory.cache == CACHE_BYTES // 8
        assert {s.axes for layer in bounds.layers for s in layer.collectives} == {("kv_rest",)}

    def test_a_batch_that_does_not_divide_says_which_would(self):
        mesh = meshes.topology(V5E, "data=8")
        with pytest.raises(ValueError, match="batch of 20 does not divide over data=8; 16 or 24"):
            split_for(dataclasses.replace(WORK, batch=20), mesh)
        with pytest.raises(ValueError, match="batch of 4 does not divide over data=8; 8 would"):
            split_for(dataclasses.replace(WORK, batch=4), mesh)

    def test_simulated_devices_send_the_same_and_have_no_bounds(self):
        spec = "data=2,context=2,kv=2"
        bounds = estimate(WORK, meshes.simulate(8, spec))
        assert {s.axes for layer in bounds.layers for s in layer.collectives} == {("context",)}
        assert bounds.memory.cache == CACHE_BYTES // 8
        assert (bounds.times, bounds.tokens_per_s, bounds.memory.fits, bounds.largest_batch) == (
            None,
        ) * 4

    def test_windows_read_less_and_sinks_compile(self):
        model = dataclasses.replace(MODEL, layers=(LayerKind(2, 100), LayerKind(1)), sinks=True)
        bounds = planned("data=4", dataclasses.replace(WORK, model=model), "v5e:2x2")
        assert bounds.memory.cache == CACHE_BYTES // 4
        others = sum(x.kind.count * (x.other_bytes + x.output_bytes) for x in bounds.layers)
        assert bounds.read_bytes - others == CACHE_BYTES // 4 // 3 * (1 + 2 * 7 / 32)

    def test_two_slices_are_joined_by_nothing(self):
        bounds = planned("data=2,context=4", WORK, "v5e:2x2", num_slices=2)
        sent = [s for layer in bounds.layers for s in layer.collectives]
        assert sent
        assert not any(s.crosses_slices for s in sent)
        assert bounds.times is not None
        assert bounds.times.dcn == 0 < bounds.times.ici

    def test_two_slices_are_joined_where_the_spec_asks(self):
        bounds = planned("data=2,dcn.context=2,context=2", WORK, "v5e:2x2", num_slices=2)
        crossing = [s for x in bounds.layers for s in x.collectives if s.crosses_slices]
        assert {s.axes for s in crossing} == {("context",)}
        assert bounds.times is not None
        assert bounds.times.dcn > bounds.times.ici  # the slower network


class TestEstimate:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("all-reduce", 1500), ("all-gather", 750), ("reduce-scatter", 750),
         ("collective-permute", 1000), ("dcn-all-reduce", 1500)],
    )  # fmt: skip
    def test_least_bytes_of_a_collective(self, kind, expected):
        assert sent_bytes(meshes.Collective(kind, 1000, ("context",), 4, False, "")) == expected

    def test_links_follow_the_dimensions_of_a_group(self):
        mesh = meshes.topology("v5p:4x4x4", "data=4,context=16")
        assert links_used(mesh, ("context",)) == pytest.approx(2 / 3)
        assert links_used(mesh, ("data",)) == pytest.approx(1 / 3)
        assert links_used(meshes.topology("tpu7x:2x2x1", "data=4,context=2"), ("context",)) == 1

    def test_devices_share_their_chip(self):
        chip = meshes.chips()["tpu7x"]
        device = Device.of(meshes.topology("tpu7x:2x2x1"))
        assert device.hbm_bytes == int(chip.usable_gib * 2**30)
        assert device.hbm_rate == chip.hbm_gbps * 1e9 / 2
        core = Device.of(meshes.topology("v5p:2x2x1", megacore=False))
        assert core.hbm_rate == meshes.chips()["v5p"].hbm_gbps * 1e9 / 2

    def test_reading_the_cache_takes_its_bytes_over_the_rate(self):
        bounds = planned("data=8")
        assert bounds.times is not None
        assert bounds.times.hbm == pytest.approx(CACHE_BYTES / 8 / 819e9, rel=0.01)
        assert bounds.tokens_per_s == 8 / bounds.times.total

    def test_the_largest_batch_fits_and_the_next_does_not(self):
        mesh = meshes.topology("v5e:2x2", "data=2,context=2")
        bounds = estimate(WORK, mesh, reserved_bytes=int(14.75 * 2**30))
        largest = bounds.largest_batch
        assert largest is not None
        cache = largest * CACHE_BYTES // 8 // 4
        assert bounds.memory.limit == 2**30
        assert cache <= 2**30 < cache + 2 * CACHE_BYTES // 8 // 4 + bounds.memory.temp + 2**20
        confirmed = confirm_largest_batch(bounds)
        assert confirmed is not None
        assert 0.5 * largest < confirmed <= largest

    def test_too_much_for_one_layer_shrinks_until_it_compiles(self):
        mesh = meshes.topology("v5e:2x2", "data=4")
        large = dataclasses.replace(WORK, batch=4096, context=2**17, page_size=128)
        smaller = shrink_to_fit(large, mesh)
        assert smaller.workload.batch == 4
        assert smaller.largest_batch is not None
        assert 0 < smaller.largest_batch < 4096


# WORK has 32 pages a sequence, and 8 sequences.
SCHEDULE = Schedule({32: 3000.0}, executed_seqs=1, num_seqs=1, cores=2, clock_hz=1e9)


class TestIssue:
    def test_seconds_are_cycles_over_the_clock(self):
        assert Issue(SCHEDULE).seconds(32) == 3000 / 1e9
        assert Issue(reason="none").seconds(32) == 0

    def test_the_longer_of_issue_and_memory_counts_in_each_layer(self):
        bounds = planned("data=8")
        assert bounds.times is not None
        assert bounds.times.issue is None
        assert bounds.times.attend == bounds.times.hbm
        at = lambda hz: Issue(dataclasses.replace(SCHEDULE, clock_hz=hz))
        quick = dataclasses.replace(bounds, issue=at(1e15)).times
        assert quick is not None
        assert quick.issue is not None
        assert (quick.attend, quick.total) == (bounds.times.attend, bounds.times.total)
        assert 0 < quick.issue < quick.hbm
        slow = dataclasses.replace(bounds, issue=at(1e6)).times
        assert slow is not None
        assert slow.attend == slow.issue == pytest.approx(3 * 3000 / 1e6)
        assert slow.total == slow.attend + slow.ici + slow.dcn

    def test_the_report_says_what_it_is_made_of(self):
        bounds = dataclasses.replace(planned("data=8"), issue=Issue(SCHEDULE))
        text = report.describe(bounds, None)
        assert "issue of the kernel" in text
        assert "issue for 3000 cycles with 1 sequences of 32 pages" in text
        assert "on each of 2 cores" in text
        assert report.as_json(bounds)["issue"]["cycles"] == {32: 3000.0}
        assert report.as_json(bounds)["least_seconds"]["issue"] > 0

    def test_what_one_device_runs_does_not_depend_on_context_shards(self):
        shapes = []
        for spec in ("data=2,context=2,kv=2", "data=2,kv=2"):
            mesh = meshes.topology(V5E if "context" in spec else "v5e:2x2", spec)
            shapes.append(issue.local(WORK, split_for(WORK, mesh)))
        assert shapes[0] == shapes[1]
        assert (shapes[0].batch, shapes[0].model.num_heads, shapes[0].model.num_kv_heads) == (
            4,
            4,
            2,
        )

    def test_says_why_there_is_none(self):
        assert "backend xla" in planned("data=8").issue.reason
        assert "no TPUs" in estimate(WORK, meshes.simulate(8, "data=8")).issue.reason
        mesh = meshes.topology(V5E, "data=8")
        assert estimate(WORK, mesh, issue=False).issue == Issue(reason="not asked for")

    def test_a_compiler_that_fails_is_a_reason(self, monkeypatch):
        future = concurrent.futures.Future()
        future.set_exception(RuntimeError("no such flag\nmore"))
        monkeypatch.setattr(issue, "submit", lambda *_: future)
        work = dataclasses.replace(WORK, backend=None)
        bounds = estimate(work, meshes.topology(V5E, "data=8"))
        assert bounds.issue.reason == "the compiler gave no schedule: no such flag"

    def test_agrees_with_the_schedule_of_the_same_calls(self):
        model = Model("one", 8, 1, 128, (LayerKind(1), LayerKind(1, 1024)))
        work = Workload(model, batch=64 * 4, context=4096, page_size=64)
        bounds = estimate(work, meshes.topology("v5e:2x2", "data=4"))
        case = "64 x 4096, G8 K1, page 64"
        attend, write = (
            worker.call(worker.execute_case, "v5e:2x2", kernel, case, "off")[0].cycles
            for kernel in ("decode", "write")
        )
        found = bounds.issue.schedule
        assert found is not None
        assert found.cycles[64] == pytest.approx(attend + write, rel=0.05)
        assert found.cycles[64] / 6 < found.cycles[16] < found.cycles[64] / 1.5
        assert (found.cores, found.executed_seqs, found.num_seqs) == (1, 64, 64)
        assert bounds.times is not None
        assert bounds.times.issue is not None

    def test_quantised_caches_are_executed_and_pages_that_do_not_fit_refused(self):
        model = Model("one", 8, 1, 128, (LayerKind(1),))
        work = Workload(model, batch=16, context=1024, page_size=64, dtype="int8")
        mesh = meshes.topology("v6e:2x2", "data=4")
        bounds = estimate(work, mesh)
        assert bounds.issue.schedule is not None
        assert bounds.memory.cache == 4 * 1024 * 2 * (128 + 4)
        assert bounds.times is not None
        assert bounds.times.issue is not None
        assert bounds.memory.cache / 1.64e12 < bounds.times.hbm < bounds.times.issue
        with pytest.raises(NotImplementedError, match="tiles of 32 rows; use page_size=32"):
            estimate(dataclasses.replace(work, page_size=16), mesh)

    def test_chunks_of_prompts(self):
        """Bound by the matrix units at least, and executed; the chunk that fits is the context."""
        model = Model("one", 8, 1, 128, (LayerKind(2),))
        work = Workload(model, batch=4, context=2048, page_size=64, new_tokens=512)
        bounds = estimate(work, meshes.topology("v6e:2x2", "data=4"))
        assert bounds.times is not None
        least = 2 * 4 * 8 * 128 * sum(range(1537, 2049)) / 918e12
        assert bounds.times.mxu == pytest.approx(least)
        assert bounds.times.hbm < bounds.times.mxu
        assert 2 * least < bounds.times.issue < 10 * least
        assert bounds.times.attend == bounds.times.issue
        assert bounds.tokens_per_s == pytest.approx(4 * 512 / bounds.times.total)
        assert bounds.largest_chunk == 2048
        text = report.describe(bounds, None)
        assert "2048 tokens, 512 of them new" in text
        assert "or chunks of 2048" in text
        assert "matrix units" in text

    @pytest.mark.parametrize(("spec", "window"), [("context=2,data=4", None), ("data=8", 64)])
    def test_of_a_chunk_only_whole_contexts_are_executed(self, spec, window):
        model = dataclasses.replace(MODEL, layers=(LayerKind(1, window),))
        work = dataclasses.replace(WORK, model=model, backend=None)
        for new, known in ((1, True), (64, False)):
            bounds = planned(spec, dataclasses.replace(work, new_tokens=new))
            assert (bounds.issue.schedule is not None) == known
        assert bounds.issue.reason == "chunks of prompts are executed for whole contexts only"

    def test_of_many_tokens_some_are_executed(self):
        model = Model("one", 8, 1, 128, (LayerKind(1),))
        work = Workload(model, batch=16, context=4096, page_size=64)
        whole, part = (
            worker.call(issue.execute, work, "v5e", False, (64,), most)
            for most in (1 << 20, 1 << 14)
        )
        assert (whole.executed_seqs, part.executed_seqs) == (16, 4)
        assert part.cycles[64] == pytest.approx(whole.cycles[64], rel=0.1)

    @pytest.mark.parametrize("kv_heads", [1, 16])
    def test_both_cores_of_a_chip_work(self, kv_heads):
        model = Model("one", 16, kv_heads, 128, (LayerKind(1),))
        bounds = estimate(Workload(model, batch=8), meshes.topology("v5p:2x2x1", "data=4"))
        assert bounds.issue.schedule is not None
        assert bounds.issue.schedule.cores == 2
