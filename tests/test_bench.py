"""The benches never time a wrong answer, lose no measurement and take no noise for a change."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from launch.__main__ import app
from launch.bench import (
    compare,
    decode,
    draw,
    flashinfer,
    inputs,
    peers,
    quantised,
    shapes,
    sharded,
    step_inputs,
    step_peers,
    steps,
    timing,
    write,
)
from launch.bench.report import COPY, OURS, PLANNED, UNQUANTISED, Row, table
from launch.bench.shapes import Shape, Step, Tokens
from launch.bench.timing import Timing

SMALL = Shape("small", 8, 64, (1, 64), num_heads=8, num_kv_heads=8, head_dim=32, dtype="float32")
STEP = Step("mixed", ((40, 1), (7, 0), (33, 33), (50, 5)), 8, 4, 128, 8, dtype="float32")
TOKENS = Tokens("few", 3, 2, num_kv_heads=2, head_dim=32, context=64, dtype="float32")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Two rounds, both of which count."""
    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(steps, "ROUNDS", 2)


@pytest.fixture
def small(monkeypatch):
    """Lets the command measure small shapes only."""
    monkeypatch.setattr(timing, "copy_roof", lambda platform: (10.0, "made up"))
    monkeypatch.setattr(shapes, "decode_shapes", lambda platform, suite: (SMALL,))
    narrow = dataclasses.replace(SMALL, name="narrow", dtype="bfloat16")
    monkeypatch.setattr(shapes, "quantised_shapes", lambda platform, suite: (narrow,))
    monkeypatch.setattr(shapes, "step_shapes", lambda platform, suite: (STEP,))
    monkeypatch.setattr(shapes, "write_shapes", lambda suite: (TOKENS,))
    long = dataclasses.replace(SMALL, name="long", num_seqs=1)
    work = {"many": (SMALL,), "long": (long,)}
    monkeypatch.setattr(shapes, "sharded_shapes", lambda platform, suite, num_devices: work)


def run(*words: str):
    return CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "200"})


def test_one_shape_of_a_suite(tmp_path):
    path = tmp_path / "rows.json"
    done = run("steps", "--shape", "8 x 5 guesses on 2048, f32", "--json", str(path))
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert {row["shape"] for row in report["rows"]} == {"8 x 5 guesses on 2048, f32"}
    assert report["command"].endswith('--shape "8 x 5 guesses on 2048, f32"')
    assert {OURS, PLANNED} <= {row["name"] for row in report["rows"] if "timing" in row}
    unknown = run("write", "--shape", "of another suite")
    assert unknown.exit_code == 2
    assert "'of another suite' is none of 'append to 64'" in unknown.output


def test_a_shape_for_the_compiler(monkeypatch):
    asked = {}
    monkeypatch.setattr("launch.jobs.schedule.schedule", lambda **given: asked.update(given))
    done = run("decode", "--topology", "v6e:2x2", "--shape", "64 x 4096")
    assert done.exit_code == 0, done.output
    assert (asked["topology"], asked["case"]) == (["v6e:2x2"], ["64 x 4096"])


class TestShapes:
    def test_bytes_are_those_of_the_tokens(self):
        shape = Shape("two", 2, 48, "full", num_kv_heads=3, head_dim=8)
        assert shape.kv_bytes == 2 * 48 * 2 * 3 * 8 * 2
        assert shape.max_blocks == 3

    def test_lengths(self):
        skewed = Shape("skewed", 64, 65536, "skewed")
        assert sorted(skewed.context_lens)[-2:] == [512, 65536]
        ragged = Shape("ragged", 64, 8192, (1, 8192)).context_lens
        assert len(set(ragged)) > 50
        assert 1 <= ragged.min() < ragged.max() <= 8192

    def test_names_are_unique(self):
        names = [shape.name for shape in shapes.SHAPES]
        assert len(names) == len(set(names))

    def test_accelerators_get_more_than_their_caches_hold(self):
        assert all(shape.kv_bytes > 200e6 for shape in shapes.FULL)


class TestInputs:
    @pytest.mark.parametrize(("num_seq_shards", "num_context_shards"), [(1, 1), (2, 1), (2, 4)])
    def test_each_needed_page_is_the_shards_own_and_used_once(
        self, num_seq_shards, num_context_shards
    ):
        tables, num_pages = inputs._tables(SMALL, 2, num_seq_shards, num_context_shards)
        pool_pages = num_pages // (num_seq_shards * num_context_shards)
        for table_ in tables:
            used = []
            for seq, length in enumerate(SMALL.context_lens):
                seq_shard = seq // (SMALL.num_seqs // num_seq_shards)
                for block in range(-(-length // SMALL.page_size)):
                    pool = seq_shard * num_context_shards + block % num_context_shards
                    assert table_[seq, block] // pool_pages == pool
                    used.append(table_[seq, block])
            assert len(used) == len(set(used))
        assert not np.array_equal(*tables)

    def test_errors_are_seen(self):
        given = inputs.make(SMALL, 1)
        attend, _ = peers.gather(SMALL, "cpu")
        out = attend(given.queries[0], given.key, given.value, given.lens, given.tables[0])
        expected = inputs.expected(given)
        assert expected.error_of(out) <= expected.limit
        assert expected.error_of(out.at[-1, 0, 0].add(1e-3)) > expected.limit
        assert expected.error_of(out.at[0].set(jnp.nan)) == np.inf


class TestTiming:
    def test_what_surrounds_queued_calls_is_left_out(self, monkeypatch):
        now = [0.0]

        def takes(seconds):
            now[0] += seconds

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(timing.jax, "block_until_ready", lambda _: takes(100))
        call = {"call": lambda: takes(6)}
        assert timing.in_turn(call, repeats=2)["call"].median_us == 53e6
        assert timing.in_turn(call, repeats=2, queued=4)["call"].median_us == 3e6


class TestDecode:
    def test_every_implementation_has_a_row(self):
        rows = {row.name: row for row in decode.measure(SMALL, "cpu", 10.0)}
        assert list(rows) == [*peers.IMPLEMENTATIONS, *flashinfer.DECODE]
        assert rows["flashinfer"].why == "needs a GPU"
        for name in (OURS, "gather"):
            assert rows[name].timing.rounds == 2
            assert rows[name].gbps > 0
        assert "no kernel for CPUs" in rows["jax paged_attention"].why

    def test_on_an_accelerator_a_copy_of_as_many_bytes_is_the_roof(self):
        shape = dataclasses.replace(SMALL, dtype="bfloat16")
        rows = {row.name: row for row in decode.measure(shape, "gpu", 10.0)}
        assert rows[COPY].roof_gbps == rows[OURS].roof_gbps == rows[COPY].gbps
        assert rows["flashinfer"].why.startswith("pip install flashinfer-python")
        assert rows["shardpage xla"].timing

    def test_a_wrong_answer_is_not_timed(self, monkeypatch):
        def wrong(shape, platform):
            attend, kv_layout = peers.gather(shape, platform)
            return (lambda *arrays: attend(*arrays) * 1.01), kv_layout

        def broken(shape, platform):
            raise ZeroDivisionError("no such luck")

        more = {**peers.IMPLEMENTATIONS, "wrong": wrong, "broken": broken}
        monkeypatch.setattr(peers, "IMPLEMENTATIONS", more)
        rows = {row.name: row for row in decode.measure(SMALL, "cpu", 10.0)}
        assert rows["wrong"].timing is None
        assert rows["wrong"].why.startswith("wrong: error")
        assert rows["broken"].why == "failed: no such luck"

    def test_calls_of_one_program_have_tables_of_their_own(self):
        given = inputs.make(SMALL, 3)
        attend, _ = peers.shardpage(SMALL, "cpu")
        outs = jax.jit(decode.in_one_program(attend))(*given.calls())
        for repeat in range(3):
            expected = inputs.expected(given, repeat)
            assert expected.error_of(outs[repeat]) <= expected.limit
        assert expected.error_of(outs[0]) > expected.limit


class TestQuantised:
    SHAPE = dataclasses.replace(SMALL, dtype="bfloat16")

    def test_each_cache_counts_the_bytes_that_it_stores(self):
        found = {row.name: row for row in quantised.measure(self.SHAPE, "cpu", 10.0)}
        assert list(found) == [UNQUANTISED, *quantised.DTYPES]
        tokens = int(self.SHAPE.context_lens.sum())
        assert found[UNQUANTISED].useful_bytes == tokens * 2 * 8 * 32 * 2
        for dtype in quantised.DTYPES:
            assert found[dtype].useful_bytes == tokens * 2 * 8 * (32 + 4)
        assert table([*found.values()])[1][-2] == "1.00 x"

    def test_a_cache_without_its_scales_is_seen(self, monkeypatch):
        half = lambda cache: cache.replace(cache.arrays, [x / 2 for x in cache.scales])
        attend = quantised._attend
        wrong = lambda query, cache, *others: attend(query, half(cache), *others)
        monkeypatch.setattr(quantised, "_attend", wrong)
        with pytest.raises(RuntimeError, match=r"small, int8: error .*, rounding allows"):
            list(quantised.measure(self.SHAPE, "cpu", 10.0))


class TestWrite:
    def test_both_ways_are_right_and_timed(self):
        rows = {row.name: row for row in write.measure(TOKENS, 10.0)}
        assert set(rows) == {OURS, "scatter"}
        assert all(row.timing for row in rows.values())

    def test_lost_tokens_are_seen(self, monkeypatch):
        monkeypatch.setitem(write.IMPLEMENTATIONS, "scatter", lambda cache, *tokens: cache)
        rows = {row.name: row for row in write.measure(TOKENS, 10.0)}
        assert rows["scatter"].why.startswith("wrong")
        assert rows[OURS].timing


class TestSharded:
    def test_splits_of_eight(self):
        names = [split.name for split in sharded.splits(8, "full")]
        assert names[:3] == ["data=8", "kv=8", "context=8"]
        assert "data=2,kv=2,context=2" in names
        assert all(split.num_devices == 8 for split in sharded.splits(8, "full"))
        assert len(sharded.splits(8, "quick")) == len(sharded.splits(2, "full")) == 3

    @pytest.mark.parametrize("split", sharded.splits(4, "full")[3::2], ids=lambda split: split.name)
    def test_a_split_is_as_exact_as_one_device(self, split):
        alone, same, grown = sharded.measure(split, SMALL, 1, 10.0)
        assert (alone.why, same.why, grown.why) == ("", "", "")
        assert alone.efficiency is None
        speed_up = alone.timing.median_us / same.timing.median_us
        assert same.efficiency == pytest.approx(speed_up / 4, abs=1e-3)
        assert grown.useful_bytes > same.useful_bytes


class TestCompare:
    ROW = Row("decode", "a", "shardpage", Timing(100.0, 95.0, 105.0, 9), 10**6)

    def verdict(self, median, low, high):
        new = dataclasses.replace(self.ROW, timing=Timing(median, low, high, 9))
        [change] = compare.changes([self.ROW], [new])
        return change.verdict

    def test_noise_is_no_change(self):
        assert self.verdict(120.0, 104.0, 130.0) == "same"  # the quartiles overlap
        assert self.verdict(90.0, 85.0, 96.0) == "same"
        tight = dataclasses.replace(self.ROW, timing=Timing(100.0, 99.9, 100.1, 9))
        near = dataclasses.replace(self.ROW, timing=Timing(103.0, 102.9, 103.1, 9))
        assert compare.changes([tight], [near])[0].verdict == "same"  # no more than two runs differ

    def test_what_is_beyond_noise(self):
        assert self.verdict(130.0, 120.0, 140.0) == "slower"
        assert self.verdict(80.0, 75.0, 85.0) == "faster"

    def test_rows_of_one_report_only(self):
        other = dataclasses.replace(self.ROW, shape="b")
        verdicts = [change.verdict for change in compare.changes([self.ROW], [other])]
        assert verdicts == ["new", "gone"]


def test_rows_survive_json():
    row = dataclasses.replace(TestCompare.ROW, efficiency=0.5, roof_gbps=20.0)
    kept = json.loads(json.dumps(row.to_json()))
    assert kept["share_of_roof"] == 0.5
    assert Row.from_json(kept) == row
    assert table([row])[1][-1] == "efficiency 0.50"


@pytest.mark.usefixtures("small")
class TestSteps:
    def test_what_is_seen_is_counted(self):
        seen = [context - queries + i + 1 for context, queries in STEP.seqs for i in range(queries)]
        assert STEP.num_reads == sum(seen)
        assert STEP.flops == 4 * 8 * 128 * sum(seen)
        assert STEP.kv_bytes == 130 * 2 * 4 * 128 * 4
        names = [step.name for step in (*shapes.CPU_STEPS_FULL, *shapes.STEPS_FULL)]
        assert len(names) == len(set(names))

    def test_right_answers_are_timed_and_wrong_ones_reported(self, monkeypatch):
        def off_in_one(given, platform):
            call, arrays = step_peers.gather(given, platform)
            return (lambda *arrays: call(*arrays).at[-1, -1, -1].add(1e-3)), arrays

        built = {name: step_peers.IMPLEMENTATIONS[name] for name in (OURS, "matmuls")}
        others = {"gather": step_peers.gather, "shardpage xla": step_peers.portable}
        built |= others | {"off": off_in_one}
        monkeypatch.setattr(step_peers, "IMPLEMENTATIONS", built)
        rows = {row.name: row for row in steps.measure(STEP, "cpu", 10.0)}
        assert list(rows) == list(built)
        assert [n for n, row in rows.items() if row.timing] == [OURS, "matmuls", "gather"]
        assert rows["off"].why.startswith("wrong: error 1.0e-03")
        assert rows[OURS].gflops > 0
        assert rows[OURS].timing.processor_us > 0
        assert Row.from_json(rows[OURS].to_json()) == rows[OURS]

    @pytest.mark.parametrize("name", [OURS, PLANNED, "gather"])
    def test_a_program_does_its_work_as_often_as_it_says(self, name):
        given = step_inputs.make(STEP)
        call, arrays = step_peers.IMPLEMENTATIONS[name](given, "gpu")
        once, thrice = (steps.program(call, arrays, given, count)[0] for count in (1, 3))
        flops = [program.func.cost_analysis()["flops"] for program in (once, thrice)]
        assert flops[1] > 2.99 * flops[0]  # XLA made none of them one
        errors = [given.error_of(out) for out in thrice()]
        assert len(errors) == 3
        assert all(error <= limit for error, limit in errors)


@pytest.mark.usefixtures("small")
class TestCommand:
    def test_all_of_it(self, tmp_path):
        kept, picture = tmp_path / "new.json", tmp_path / "new.png"
        result = run("all", "--simulate", "8", "--json", str(kept), "--plot", str(picture))
        assert result.exit_code == 0, result.output
        report = json.loads(kept.read_text())
        benches = ("decode", "quantised", "write", "steps", "sharded")
        assert {row["bench"] for row in report["rows"]} == {*benches}
        assert report["command"] == "shardpage bench all --suite quick --simulate 8"
        for bench in benches:
            drawn = tmp_path / f"new_{bench}.png"
            assert drawn.read_bytes().startswith(b"\x89PNG")
        again = run("decode", "--simulate", "8", "--compare", str(kept))
        assert again.exit_code == 0, again.output
        assert "verdict" in again.output
        assert "gone" in again.output

    def test_what_was_measured_survives_a_failure(self, tmp_path, monkeypatch):
        kept = tmp_path / "kept.json"
        second = dataclasses.replace(SMALL, name="second", head_dim=0)
        monkeypatch.setattr(shapes, "decode_shapes", lambda platform, suite: (SMALL, second))
        assert run("decode", "--json", str(kept)).exit_code != 0
        names = {row["shape"] for row in json.loads(kept.read_text())["rows"]}
        assert names == {"small"}

    def test_a_report_that_is_none(self, tmp_path):
        bad = tmp_path / "bad.json"
        bad.write_text("{}")
        result = run("decode", "--compare", str(bad))
        assert result.exit_code == 2
        assert "KeyError('rows')" in result.output


def test_drawing_nothing_is_nothing(tmp_path):
    assert draw.draw([Row("decode", "a", "gather", why="too large")], "", tmp_path / "x.png") == []
