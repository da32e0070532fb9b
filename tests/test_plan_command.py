"""`shardpage plan`: the search for a mesh, the command, and plans of whole pods."""

import dataclasses
import functools
import json

import pytest
from typer.testing import CliRunner

import meshes
from launch.__main__ import app
from launch.plan import growth
from launch.plan.bound import Device, quick_bound
from launch.plan.estimate import Pod, estimate
from launch.plan.report import why
from launch.plan.search import Candidate, legal, ranked, search
from launch.plan.workload import Model, Workload

from .plans import CACHE_BYTES, V5E, WORK, planned

pytest.importorskip("libtpu", reason="compiling for TPU slices needs libtpu: shardpage[tpu]")


def invoke(*arguments: str):
    small = "--layers 3 --heads 8 --kv-heads 4 --batch 8 --context 512 --page-size 16 --backend xla"
    return CliRunner().invoke(app, ["plan", *small.split(), *arguments])


@functools.cache
def searched(work: Workload, most: int | None = None) -> list[Candidate]:
    return search(work, Pod(V5E), most=most)


class TestSearch:
    def test_legal_meshes_are_all_that_divide(self):
        found = [tuple(sizes.values()) for _, sizes in legal(WORK, 8)]
        assert found == [s for s in meshes.factorings(8, 3) if 8 % s[0] == 0 and 4 % s[2] == 0]
        assert all(sizes["data"] % 2 == 0 for _, sizes in legal(WORK, 8, num_slices=2))

    def test_stops_when_no_other_can_win_and_is_right(self):
        work = dataclasses.replace(WORK, batch=2)  # context has to split
        candidates = searched(work)
        compiled = [c for c in candidates if c.bounds]
        assert 0 < len(compiled) < len(candidates)
        device = Device.of(meshes.topology(V5E))
        for spec, sizes in legal(work, 8):
            times = planned(spec, work).times
            assert times is not None
            assert quick_bound(work, sizes, device) <= times.total
            assert candidates[0].least_s <= 1.02 * times.total

    def test_prefers_no_collectives_and_says_so(self):
        candidates = searched(WORK)
        assert candidates[0].spec == "data=2,kv=4"
        assert "no collective at all" in why(candidates)
        assert [c.spec for c in ranked(candidates)] == [c.spec for c in candidates]

    def test_compiles_no_more_than_asked(self):
        assert sum(c.bounds is not None for c in searched(WORK, most=1)) == 1

    def test_a_mesh_that_cannot_be_compiled_does_not_end_the_search(self, monkeypatch):
        def refuse_heads(work, mesh, **_):
            if "kv" in mesh.axis_names:
                raise NotImplementedError("not with heads split")
            return planned("data=8")

        monkeypatch.setattr("launch.plan.search.estimate", refuse_heads)
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
        with pytest.raises(ValueError, match="no mesh of data, context and kv splits 7 sequences"):
            search(dataclasses.replace(WORK, batch=7), Pod("v5e:2x2", num_slices=2))


class TestCommand:
    def test_reports_one_mesh_and_a_better_one(self, tmp_path):
        path, picture = tmp_path / "plan.json", tmp_path / "plan.png"
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        result = invoke("--topology", V5E, "--mesh", "data=2,context=4", "--json", str(path),
                        "--plot", str(picture), "--reserve-gib", "15.73")  # fmt: skip
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


class TestPod:
    @pytest.mark.parametrize("series", growth.SERIES)
    def test_cost_stays_flat(self, series):
        """From 8 chips to 6144, in bytes and collectives; `--growth` shows compile times."""
        rows = growth.measure((8, 64, 512, 6144), (series,))
        first, *rest = rows
        if series == "same work":
            assert [row.sent_bytes for row in rows] == [0] * 4
            assert all(a.cache_bytes > b.cache_bytes for a, b in zip(rows, rest, strict=False))
            assert all(row.temp_bytes <= first.temp_bytes for row in rest)
        else:
            assert {row.cache_bytes for row in rows} == {first.cache_bytes}
            # A longer context has a longer table, 4 bytes per page and sequence, and a walk of
            # as many bytes, which is there twice where scalar memory does not hold it.
            tables = [4 * 4 * row.context // 64 for row in rows]
            for row, table in zip(rows, tables, strict=True):
                assert row.temp_bytes <= 1.05 * first.temp_bytes + 5 * table
            assert {row.num_collectives for row in rows} == {first.num_collectives}
            # What a ring sends tends to twice the bytes of the merge as the group grows.
            assert all(row.sent_bytes <= 2 * first.sent_bytes for row in rest)
        if series == "more sequences":
            assert {row.sent_bytes for row in rows} == {first.sent_bytes}
            assert {row.temp_bytes for row in rows} == {first.temp_bytes}

    def test_the_example_of_the_readme(self):
        work = Workload(Model.preset("llama-3-70b"))
        bounds = estimate(work, meshes.topology("v5p:8x8x8", "data=8,context=8,kv=8"))
        assert bounds.memory.fits
        assert bounds.memory.cache == 80 * 256 * 8192 * 8 * 128 * 2 * 2 // 512
        assert {s.axes for x in bounds.layers for s in x.collectives} == {("context",)}

    def test_two_slices_of_a_pod(self):
        mesh = meshes.topology("v5p:4x4x4", "data=8,context=4,kv=4", num_slices=2)
        bounds = estimate(dataclasses.replace(WORK, batch=64), mesh)
        assert not any(s.crosses_slices for x in bounds.layers for s in x.collectives)
