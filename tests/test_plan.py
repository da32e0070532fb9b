"""`shardpage plan`: what it reads from compiled programs, and what it concludes."""

import concurrent.futures
import dataclasses
import functools
import json

import pytest
from typer.testing import CliRunner

import meshes
from launch.__main__ import app
from launch.plan import growth, issue, report
from launch.plan.compiled import compile_layer, split_for
from launch.plan.estimate import (
    Device,
    Plan,
    confirm_largest_batch,
    links_used,
    make_plan,
    quick_bound,
    sent_bytes,
    shrink_to_fit,
)
from launch.plan.search import Candidate, legal, ranked, search, why
from launch.plan.workload import LayerKind, Model, Workload, preset_names
from launch.schedule.measure import measure

pytest.importorskip("libtpu", reason="compiling for TPU slices needs libtpu: shardpage[tpu]")

MODEL = Model("small", num_heads=8, num_kv_heads=4, head_dim=128, layers=(LayerKind(3),))
WORK = Workload(MODEL, batch=8, context=512, page_size=16, backend="xla")
CACHE_BYTES = 3 * 8 * 512 * 4 * 128 * 2 * 2  # layers, sequences, tokens, heads, dim, K and V, bf16
V5E = "v5e:2x4"


@functools.cache
def planned(spec: str, work: Workload = WORK, name: str = V5E, num_slices: int = 1) -> Plan:
    return make_plan(work, meshes.topology(name, spec, num_slices=num_slices))


def invoke(*arguments: str):
    small = "--layers 3 --heads 8 --kv-heads 4 --batch 8 --context 512 --page-size 16 --backend xla"
    return CliRunner().invoke(app, ["plan", *small.split(), *arguments])


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
            ({"page_size": -1}, "page size must be 1 or more"),
            ({"dtype": "int8"}, "dtype 'int8' is none of float32, bfloat16, float16"),
            ({"kv_layout": "rows"}, "KV layout 'rows' is none of blocks_first"),
        ],
    )
    def test_refuses_senseless_sizes(self, change, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(WORK, **change).checked()

    @pytest.mark.parametrize(
        ("window", "blocks"), [(None, 32), (512, 32), (9999, 32), (16, 1), (17, 2), (100, 7)]
    )
    def test_a_window_touches_only_its_pages(self, window, blocks):
        assert WORK.window_blocks(LayerKind(1, window)) == blocks


class TestCompiled:
    @pytest.mark.parametrize("spec", ["data=8", "kv=4,data=2", "data=2,context=2,kv=2"])
    def test_reads_memory_and_traffic(self, spec):
        plan = planned(spec)
        assert plan.memory.cache == CACHE_BYTES // 8
        assert all(layer.copied_bytes == 0 for layer in plan.layers)
        axes = {sent.axes for layer in plan.layers for sent in layer.collectives}
        assert axes == ({("context",)} if "context" in spec else set())
        assert plan.memory.fits
        assert plan.device.chip == meshes.chips()["v5e"]

    @pytest.mark.parametrize("head_dim", [64, 80])
    def test_narrow_and_odd_heads_stay_in_place(self, head_dim):
        model = dataclasses.replace(MODEL, head_dim=head_dim, layers=(LayerKind(1),))
        work = dataclasses.replace(WORK, model=model, context=4096, backend=None)
        layer = compile_layer(
            work, split_for(work, meshes.topology(V5E, "data=4,kv=2")), model.layers[0]
        )
        lanes = 64 if head_dim == 64 else 128  # packed; padded
        assert layer.cache_bytes == 2 * 4096 * 2 * lanes * 2 * 2
        assert layer.copied_bytes == 0
        assert layer.temp_bytes < layer.cache_bytes / 4

    def test_heads_that_do_not_divide_give_to_context(self):
        plan = planned("kv=8")
        assert (plan.split.head_shards, plan.split.context_shards) == (4, 2)
        assert plan.memory.cache == CACHE_BYTES // 8
        assert {s.axes for layer in plan.layers for s in layer.collectives} == {("kv_rest",)}

    def test_a_batch_that_does_not_divide_says_which_would(self):
        mesh = meshes.topology(V5E, "data=8")
        with pytest.raises(ValueError, match="batch of 20 does not divide over data=8; 16 or 24"):
            split_for(dataclasses.replace(WORK, batch=20), mesh)
        with pytest.raises(ValueError, match="batch of 4 does not divide over data=8; 8 would"):
            split_for(dataclasses.replace(WORK, batch=4), mesh)

    def test_simulated_devices_send_the_same_and_have_no_bounds(self):
        spec = "data=2,context=2,kv=2"
        plan = make_plan(WORK, meshes.simulate(8, spec))
        assert {s.axes for layer in plan.layers for s in layer.collectives} == {("context",)}
        assert plan.memory.cache == CACHE_BYTES // 8
        assert (plan.times, plan.tokens_per_s, plan.memory.fits, plan.largest_batch) == (None,) * 4

    def test_windows_read_less_and_sinks_compile(self):
        model = dataclasses.replace(MODEL, layers=(LayerKind(2, 100), LayerKind(1)), sinks=True)
        plan = planned("data=4", dataclasses.replace(WORK, model=model), "v5e:2x2")
        assert plan.memory.cache == CACHE_BYTES // 4
        others = sum(x.kind.count * (x.other_bytes + x.output_bytes) for x in plan.layers)
        assert plan.read_bytes - others == CACHE_BYTES // 4 // 3 * (1 + 2 * 7 / 32)

    def test_two_slices_are_joined_by_nothing(self):
        plan = planned("data=2,context=4", WORK, "v5e:2x2", num_slices=2)
        sent = [s for layer in plan.layers for s in layer.collectives]
        assert sent
        assert not any(s.crosses_slices for s in sent)
        assert plan.times is not None
        assert plan.times.dcn == 0 < plan.times.ici

    def test_two_slices_are_joined_where_the_spec_asks(self):
        plan = planned("data=2,dcn.context=2,context=2", WORK, "v5e:2x2", num_slices=2)
        crossing = [s for x in plan.layers for s in x.collectives if s.crosses_slices]
        assert {s.axes for s in crossing} == {("context",)}
        assert plan.times is not None
        assert plan.times.dcn > plan.times.ici  # the slower network


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
        plan = planned("data=8")
        assert plan.times is not None
        assert plan.times.hbm == pytest.approx(CACHE_BYTES / 8 / 819e9, rel=0.01)
        assert plan.tokens_per_s == 8 / plan.times.total

    @pytest.mark.slow
    def test_the_largest_batch_fits_and_the_next_does_not(self):
        mesh = meshes.topology("v5e:2x2", "data=2,context=2")
        plan = make_plan(WORK, mesh, reserved_bytes=int(14.75 * 2**30))
        largest = plan.largest_batch
        assert largest is not None
        cache = largest * CACHE_BYTES // 8 // 4
        assert plan.memory.limit == 2**30
        assert cache <= 2**30 < cache + 2 * CACHE_BYTES // 8 // 4 + plan.memory.temp + 2**20
        confirmed = confirm_largest_batch(plan)
        assert confirmed is not None
        assert 0.5 * largest < confirmed <= largest

    @pytest.mark.slow
    def test_too_much_for_one_layer_shrinks_until_it_compiles(self):
        mesh = meshes.topology("v5e:2x2", "data=4")
        large = dataclasses.replace(WORK, batch=4096, context=2**17, page_size=128)
        smaller = shrink_to_fit(large, mesh)
        assert smaller.workload.batch == 4
        assert smaller.largest_batch is not None
        assert 0 < smaller.largest_batch < 4096


SCHEDULE = issue.Issue(
    block_cycles=400,
    block_pages=4,
    sequence_cycles=1000,
    call_cycles=50,
    cores=2,
    walks=2,
    clock_hz=1e9,
)


class TestIssue:
    def test_a_sequence_costs_its_loop_and_the_blocks_after_the_first(self):
        assert SCHEDULE.cycles(8, 32) == 50 + 8 * (1000 + 7 * 400) / 2
        assert SCHEDULE.cycles(8, 2) == 50 + 8 * 1000 / 2
        assert SCHEDULE.seconds(8, 2) == SCHEDULE.cycles(8, 2) / 1e9

    def test_the_longer_of_issue_and_memory_counts_in_each_layer(self):
        plan = planned("data=8")
        assert plan.times is not None
        assert plan.times.issue is None
        assert plan.times.attend == plan.times.hbm
        quick = dataclasses.replace(plan, issue=dataclasses.replace(SCHEDULE, clock_hz=1e15)).times
        assert quick is not None
        assert quick.issue is not None
        assert (quick.attend, quick.total) == (plan.times.attend, plan.times.total)
        assert 0 < quick.issue < quick.hbm
        slow = dataclasses.replace(plan, issue=dataclasses.replace(SCHEDULE, clock_hz=1e6)).times
        assert slow is not None
        assert slow.attend == slow.issue == pytest.approx(3 * SCHEDULE.cycles(1, 32) / 1e6)
        assert slow.total == slow.attend + slow.ici + slow.dcn

    def test_the_report_says_what_it_is_made_of(self):
        plan = dataclasses.replace(planned("data=8"), issue=SCHEDULE)
        text = report.describe(plan, None)
        assert "issue of the kernel" in text
        assert "400 cycles a block of 4 pages" in text
        assert "2 cores share the blocks" in text
        assert report.as_json(plan)["issue"]["block_cycles"] == 400
        assert report.as_json(plan)["least_seconds"]["issue"] > 0

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
        assert "backend xla" in str(planned("data=8").issue)
        assert "no TPUs" in str(make_plan(WORK, meshes.simulate(8, "data=8")).issue)
        mesh = meshes.topology(V5E, "data=8")
        assert make_plan(WORK, mesh, issue=False).issue == "not asked for"

    def test_a_compiler_that_fails_is_a_reason(self, monkeypatch):
        future = concurrent.futures.Future()
        future.set_exception(RuntimeError("no such flag\nmore"))
        monkeypatch.setattr(issue, "start", lambda *_: future)
        monkeypatch.setattr(issue, "why_not", lambda *_: None)
        plan = make_plan(WORK, meshes.topology(V5E, "data=8"))
        assert plan.issue == "the compiler gave no schedule: no such flag"

    @pytest.mark.slow
    def test_agrees_with_the_schedule_of_the_same_shapes(self):
        model = Model("one", 8, 1, 128, (LayerKind(1),))
        work = Workload(model, batch=64 * 4, context=4096, page_size=64)
        plan = make_plan(work, meshes.topology("v5e:2x2", "data=4"))
        (row,) = measure("v5e:2x2", ["G8 K1 page 64"], ["fused"])
        assert isinstance(plan.issue, issue.Issue)
        assert plan.issue.block_cycles == pytest.approx(row.issue_cycles, rel=0.05)
        assert plan.issue.block_pages == row.block_pages
        assert (plan.issue.cores, plan.issue.walks) == (1, 1)
        assert plan.times is not None
        assert plan.times.issue is not None
        assert plan.times.issue < plan.times.hbm

    @pytest.mark.slow
    @pytest.mark.parametrize(("kv_heads", "walks"), [(1, 2), (16, 1)])
    def test_both_cores_of_a_chip_share_blocks_or_heads(self, kv_heads, walks):
        model = Model("one", 16, kv_heads, 128, (LayerKind(1),))
        plan = make_plan(Workload(model, batch=8), meshes.topology("v5p:2x2x1", "data=4"))
        assert isinstance(plan.issue, issue.Issue)
        assert (plan.issue.cores, plan.issue.walks) == (2, walks)


@functools.cache
def searched(work: Workload, most: int | None = None) -> list[Candidate]:
    make_mesh = functools.partial(meshes.topology, V5E)
    return search(work, make_mesh, 8, 1, Device.of(make_mesh("data=8")), most=most)


class TestSearch:
    def test_legal_meshes_are_all_that_divide(self):
        found = [tuple(sizes.values()) for _, sizes in legal(WORK, 8)]
        assert found == [s for s in meshes.factorings(8, 3) if 8 % s[0] == 0 and 4 % s[2] == 0]
        assert all(sizes["data"] % 2 == 0 for _, sizes in legal(WORK, 8, num_slices=2))

    @pytest.mark.slow
    def test_stops_when_no_other_can_win_and_is_right(self):
        work = dataclasses.replace(WORK, batch=2)  # context has to split
        candidates = searched(work)
        compiled = [c for c in candidates if c.plan]
        assert 0 < len(compiled) < len(candidates)
        device = Device.of(meshes.topology(V5E))
        for spec, sizes in legal(work, 8):
            times = planned(spec, work).times
            assert times is not None
            assert quick_bound(work, sizes, device) <= times.total
            assert candidates[0].bound_s <= 1.02 * times.total

    def test_prefers_no_collectives_and_says_so(self):
        candidates = searched(WORK)
        assert candidates[0].spec == "data=2,kv=4"
        assert "no collective at all" in why(candidates[0], candidates)
        assert [c.spec for c in ranked(candidates)] == [c.spec for c in candidates]

    def test_compiles_no_more_than_asked(self):
        assert sum(c.plan is not None for c in searched(WORK, most=1)) == 1

    def test_a_mesh_that_cannot_be_compiled_does_not_end_the_search(self, monkeypatch):
        def refuse_heads(work, mesh, **_):
            if "kv" in mesh.axis_names:
                raise NotImplementedError("not with heads split")
            return planned("data=8")

        monkeypatch.setattr("launch.plan.search.make_plan", refuse_heads)
        candidates = searched.__wrapped__(WORK)
        assert candidates[0].spec == "data=8"
        assert {c.refused for c in candidates if "kv" in c.spec} == {None, "not with heads split"}

    def test_says_when_nothing_fits_anywhere(self):
        result = invoke("--topology", "v5e:2x2", "--context", str(2**20), "--batch", "512",
                        "--page-size", "128", "--most", "1")  # fmt: skip
        assert result.exit_code == 1
        assert "error: no mesh works; " in result.output
        assert "it holds at most" in result.output

    def test_no_legal_mesh_is_an_error(self):
        make_mesh = functools.partial(meshes.topology, V5E)
        device = Device.of(make_mesh("data=8"))
        with pytest.raises(ValueError, match="no mesh of data, context and kv splits 7 sequences"):
            search(dataclasses.replace(WORK, batch=7), make_mesh, 8, 2, device)


class TestCommand:
    def test_reports_one_mesh_and_a_better_one(self, tmp_path):
        path, picture = tmp_path / "plan.json", tmp_path / "plan.png"
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        result = invoke("--topology", V5E, "--mesh", "data=2,context=4", "--json", str(path),
                        "--png", str(picture), "--reserve-gib", "15.73")  # fmt: skip
        assert result.exit_code == 0, result.output
        for line in ("8 x TPU v5 lite as data=2,context=4", "fits; at most", "(compiled)",
                     "all-reduce over context", "tokens/s",
                     "No bound by the kernel's issue cycles: backend xla",
                     "A better mesh: data=2,kv=4",
                     "weights, other layers and latencies are not counted"):  # fmt: skip
            assert line in result.output
        found = json.loads(path.read_text())
        assert found["mesh"] == {"data": 2, "context": 4}
        assert found["memory_bytes_per_device"]["cache"] == CACHE_BYTES // 8
        assert found["fits"] is True
        assert {tuple(row["axes"]) for row in found["collectives"]} == {("context",)}
        assert found["least_seconds"]["step"] > found["least_seconds"]["hbm"] > 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_searches_without_a_mesh(self, tmp_path):
        path = tmp_path / "plan.json"
        result = invoke("--topology", V5E, "--json", str(path))
        assert result.exit_code == 0, result.output
        assert "data=2,kv=4 wins" in result.output
        ranking = json.loads(path.read_text())["ranking"]
        assert ranking[0]["mesh"] == "data=2,kv=4"
        assert len(ranking) == len(list(legal(WORK, 8)))

    def test_plans_simulated_devices(self):
        result = invoke("--simulate", "8", "--mesh", "data=2,context=4")
        assert result.exit_code == 0, result.output
        assert "the rates of a cpu device are not known here" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--topology", "v9:2x2", "--mesh", "data=4"], "unknown slice 'v9:2x2'"),
            (["--topology", V5E, "--mesh", "data=3"], "there are 8 devices, and mesh 'data=3'"),
            (["--topology", V5E, "--mesh", "data=8", "--batch", "4"], "batch of 4 does not divide"),
            (["--topology", V5E, "--model", "deepseek-v3"], "its attention is MLA"),
            (["--topology", V5E, "--kv-heads", "3", "--mesh", "data=8"], "num_q_heads=8 must be"),
            (["--topology", V5E, "--simulate", "8"], "not both"),
            (["--simulate", "8", "--search"], "a search needs the rates of the devices"),
        ],
    )
    def test_bad_input_is_one_clear_line(self, arguments, message):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert result.output.splitlines()[-1].startswith("error: ")

    def test_without_libtpu_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = invoke("--topology", V5E, "--mesh", "data=8")
        assert result.exit_code == 2
        assert "pip install 'shardpage[tpu]'" in result.output

    def test_too_little_memory_says_what_would_fit(self):
        result = invoke(
            "--topology", V5E, "--mesh", "data=8", "--reserve-gib", "15.7499", "--no-confirm"
        )
        assert result.exit_code == 1
        assert "DOES NOT FIT" in result.output
        assert "error: 8 sequences of 512 tokens do not fit mesh data=8" in result.output

    def test_one_layer_too_large_says_what_would_fit(self):
        result = invoke("--topology", V5E, "--mesh", "data=8", "--context", str(2**20), "--batch",
                        "512", "--page-size", "128")  # fmt: skip
        assert result.exit_code == 1
        assert "error: too little HBM even for one layer" in result.output
        assert "sequences of 1048576 tokens" in result.output


@pytest.mark.slow
class TestPod:
    @pytest.mark.parametrize("series", growth.SERIES)
    def test_cost_stays_flat(self, series):
        """From 8 chips to 6144."""
        rows = growth.measure((8, 64, 512, 6144), (series,))
        first, *rest = rows
        if series == "same work":
            assert [row.sent_bytes for row in rows] == [0] * 4
            assert all(a.cache_bytes > b.cache_bytes for a, b in zip(rows, rest, strict=False))
            assert all(row.temp_bytes <= first.temp_bytes for row in rest)
        else:
            assert {row.cache_bytes for row in rows} == {first.cache_bytes}
            # A longer context has a longer block table: 4 bytes a page and sequence.
            tables = [4 * 4 * row.context // 64 for row in rows]
            for row, table in zip(rows, tables, strict=True):
                assert row.temp_bytes <= 1.05 * first.temp_bytes + 3 * table
            assert {row.num_collectives for row in rows} == {first.num_collectives}
            # What a ring sends tends to twice the bytes of the merge as the group grows.
            assert all(row.sent_bytes <= 2 * first.sent_bytes for row in rest)
        if series != "longer context":  # there the block table grows with the chips
            assert rows[-1].compile_s < 4 * first.compile_s + 5
        if series == "more sequences":
            assert {row.sent_bytes for row in rows} == {first.sent_bytes}
            assert {row.temp_bytes for row in rows} == {first.temp_bytes}

    def test_the_example_of_the_readme(self):
        work = Workload(Model.preset("llama-3-70b"))
        plan = make_plan(work, meshes.topology("v5p:8x8x8", "data=8,context=8,kv=8"))
        assert plan.memory.fits
        assert plan.memory.cache == 80 * 256 * 8192 * 8 * 128 * 2 * 2 // 512
        assert {s.axes for x in plan.layers for s in x.collectives} == {("context",)}

    def test_two_slices_of_a_pod(self):
        mesh = meshes.topology("v5p:4x4x4", "data=8,context=4,kv=4", num_slices=2)
        plan = make_plan(dataclasses.replace(WORK, batch=64), mesh)
        assert not any(s.crosses_slices for x in plan.layers for s in x.collectives)
