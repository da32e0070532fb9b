"""`shardpage schedule`: the executor on programs written by hand; what it finds of our kernels."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from launch.jobs import schedule
from launch.plan.workload import Model, Workload
from launch.schedule import bundles, grid, hlo, phases, report, step, timing, units, worker
from launch.schedule.cases import CASES
from launch.schedule.core import Core
from launch.schedule.execute import Executed
from launch.schedule.machine import Machine
from launch.schedule.operands import kernel_calls
from launch.schedule.program import Program

from . import executed

app = typer.Typer()
app.command()(schedule.schedule)
DUMPS = pathlib.Path(__file__).parent / "data" / "bundles"
V6E = Core.of("TPU v6 lite")
CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# The regression test of the kernels' speed: most issue cycles over HBM cycles of a whole call,
# waits for results included, by chip; one core of v4 and v5p with its half of the bandwidth.
LIMITS = {
    "64 x 4096, G8 K1, page 16": (0.60, 0.64, 0.87, 0.97, 1.81),
    "64 x 4096, G8 K1, page 16, runs of 4": (0.46, 0.42, 0.59, 0.70, 1.34),
    "64 x 4096, G8 K1, page 64": (0.50, 0.36, 0.51, 0.63, 1.14),
    "64 x 4096, G4 K8, page 64": (0.39, 0.24, 0.34, 0.43, 0.76),
    "64 x 4096, G1 K32, page 32": (0.46, 0.30, 0.43, 0.84, 1.38),
    "64 x 4096, G8 K1, page 32, dim 64": (0.88, 0.81, 1.11, 1.44, 2.73),
    "256 x 256, G8 K1, page 16": (0.75, 0.76, 1.04, 1.37, 2.73),
    "256 x 256, G8 K1, page 16, runs of 4": (0.64, 0.56, 0.78, 1.14, 2.37),
    "256 x 256, G4 K8, page 16": (0.37, 0.27, 0.39, 0.47, 0.85),
    "64 x 1..4096, G8 K1, page 16": (0.70, 0.75, 1.01, 1.13, 2.14),
}
# Executed for all chips; the others for one.
ON_ALL_CHIPS = (
    "64 x 4096, G8 K1, page 16",
    "64 x 4096, G8 K1, page 16, runs of 4",
    "256 x 256, G4 K8, page 16",
)


def run(text, operands=(), core=V6E):
    """Runs a program written by hand; the machine and what it did."""
    machine = Machine(Program(bundles.parse(text), core), operands)
    return machine, machine.run()


def program(*lines):
    """A dump of a bundle a line."""
    return "\n".join(f" {hex(i) if i else 0} : {{ {line} }}" for i, line in enumerate(lines))


@pytest.fixture(scope="module")
def copies():
    """The saved program: a loop that starts a copy a pass, and a wait for three."""
    text = bundles.dumps(DUMPS)["copies.1"].read_text()
    return run(text, [np.array([3, 9], np.int32), None])


class TestBundles:
    def test_instructions_their_arguments_and_where_they_come_from(self):
        parsed = bundles.parse(bundles.dumps(DUMPS)["copies.1"].read_text())
        assert [bundle.address for bundle in parsed] == list(range(16))
        assert [bundle.address for bundle in parsed if not bundle.ops] == [2, 8, 10]
        copy, compare = parsed[6].ops  # of two lines of text
        assert (copy.name, copy.place) == ("dma.hbm_to_vmem", ("kernel.py", 5))
        assert copy.named["size_in_granules"] == "128"
        assert (compare.register, compare.place) == ("p0", None)
        assert len(parsed[0].ops) == 3  # a comment holds what bundles are cut at

    def test_another_format_is_an_error(self):
        with pytest.raises(ValueError, match="no bundle found"):
            bundles.parse("bundle 17: nop")


class TestProgram:
    def test_a_bundle_reads_before_it_writes(self):
        machine, _ = run(program(
            "%s1_s1 = smov 5  ;;  %s2_s2 = smov 7",
            "%s3_s1 = smov %s2_s2  ;;  %s4_s2 = smov %s1_s1"
            "  ;;  %5 = sst [smem:[#allocation1]] %s1_s1",
        ))  # fmt: skip
        assert (machine.namespace["s1"], machine.namespace["s2"]) == (7, 5)
        assert list(machine.memory.values()) == [5]

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("sadd.s32 2147483647, %s0_s0", -(2**31) + 2),
            ("ssub.s32 0, %s0_s0", -3),
            ("sshll.u32 %s0_s0, 31", -(2**31)),
            ("sshllo.u32 %s0_s0, 4", 63),
            ("sshrl.u32 4294967295, 28", 15),
            ("sshra.s32 4294967288, 1", -4),
            ("smul.u32 65536, 65537", 65536),
            ("smulhi.u32 2863311531, 300", 200),
            ("smin.u32 4294967295, %s0_s0", 3),
            ("smin.s32 4294967295, %s0_s0", -1),
            ("sand.u32 4294967294, %s0_s0", 2),
            ("scalar_select %p9_p9, 1, 4", 4),
            ("smov (%p9_p9), 8", 3),
            ("smov (!%p9_p9), 8", 8),
            ("smov (%p9_p9, %s0_s0), 8", 3),
            ("scalar_select %p9_p9, nan, -1.5", -0x40400000),
            ("sclz.u32 %s0_s0", 30),
        ],
    )
    def test_scalar_instructions(self, text, value):
        register = "s0" if text.startswith("smov (") else "s1"
        before = "%s0_s0 = smov 3  ;;  %p9_p9 = scmp.ne.s32.totalorder 3, 3"
        machine, _ = run(program(before, f"%x1_{register} = {text}"))
        assert machine.namespace[register] == value

    @pytest.mark.parametrize(
        ("text", "value"),
        [("scmp.lt.s32.totalorder", True), ("scmp.lt.u32.totalorder", False)],
    )
    def test_comparisons_of_signed_and_unsigned(self, text, value):
        machine, _ = run(program(f"%p1_p1 = {text} 4294967295, 1"))
        assert machine.namespace["p1"] is value

    @pytest.mark.parametrize(("kind", "slots"), [("TPU v4", 1), ("TPU v6 lite", 4), ("TPU7x", 6)])
    def test_bundles_issue_after_a_branch_as_the_chip_has_it(self, kind, slots):
        bundles_after = [f"%s{i}_s{i} = smov {i}" for i in range(1, 11)]
        text = program("%0 = sbr.rel target bundleno = 10 (0xa), region = 1", *bundles_after)
        machine, made = run(text, core=Core.of(kind))
        assert made.cycles == 1 + slots + 1
        values = [machine.namespace[f"s{i}"] for i in range(1, 11)]
        assert values == [*range(1, slots + 1), *[0] * (9 - slots), 10]

    def test_unknown_instructions_are_errors(self):
        with pytest.raises(
            ValueError, match=r"cannot execute sfoo.* \(bundle 0x0 of TPU v6 lite\)"
        ):
            run(program("%s1_s1 = sfoo.s32 1, 2"))

    def test_scalars_from_vectors_and_unwritten_memory_are_counted(self):
        machine, made = run(program("%s1_s1 = vpop.sfrf %0", "%s2_s2 = sld [smem:[#allocation1]]"))
        assert machine.program.unknown == {"vpop.sfrf": 1}
        assert made.guessed == 1

    @pytest.mark.parametrize(("wanted", "guessed"), [(0, 0), (1, 1)])
    def test_what_is_loaded_instead_of_nothing_does_not_count(self, wanted, guessed):
        """The compiler's way to load under a predicate: from another place if it is false."""
        _, made = run(
            program(
                f"%p1_p1 = scmp.eq.s32.totalorder {wanted}, 1",
                "%s1_s1 = scalar_select %p1_p1, [#allocation1], [#allocation2]",
                "%s2_s2 = sld [smem:%s1_s1]",
                "%s3_s3 = sld [smem:[#allocation1]]",
            )
        )
        assert made.guessed == guessed + 1


class TestMachine:
    def test_cycles_visits_and_copies(self, copies):
        _, made = copies
        assert made.cycles == 4 + 3 * 8 + 4
        assert made.visits == [1] * 4 + [3] * 8 + [1] * 4
        assert timing.copies(made.events) == (3, 3 * 4096)
        assert [e.time for e in made.events if e.kind == "copy"] == [7, 15, 23]
        assert made.guessed == 0

    def test_addresses_and_stores(self, copies):
        machine, made = copies
        assert [e.place for e in made.events if e.kind == "copy"] == [(1, 0), (1, 128), (1, 256)]
        assert 384 in machine.memory.values()

    def test_waits_follow_from_latency_and_bandwidth(self, copies):
        _, made = copies
        assert timing.replay(made, timing.ISSUE, V6E).cycles == made.cycles
        us, takes = V6E.clock_hz * 1e-6, 4096 / V6E.bytes_per_s * V6E.clock_hz
        waited = 23 + us + takes - 30  # the last starts in cycle 23; the wait is in cycle 30
        one = timing.replay(made, timing.ONE_US, V6E)
        assert one.cycles == pytest.approx(made.cycles + waited)
        assert one.waits == {13: pytest.approx(waited)}
        slow = timing.Memory("", latency_us=1, copy_ns=1000)
        assert timing.replay(made, slow, V6E).cycles == pytest.approx(made.cycles + 7 + 4 * us - 30)

    def test_a_wait_that_never_ends_is_an_error(self):
        _, made = run(program("%1 = dma.done.wait [#allocation1], 5"))
        with pytest.raises(RuntimeError, match="waits for ever, for 0 of 5"):
            timing.replay(made, timing.ISSUE, V6E)

    def test_a_program_that_never_ends_is_an_error(self, monkeypatch):
        monkeypatch.setattr("launch.schedule.machine._MOST_CYCLES", 1000)
        with pytest.raises(RuntimeError, match="more than 1000 cycles"):
            run(
                program(
                    "%0 = sbr.rel target bundleno = 0 (0x0), region = 1", *["%s1_s1 = smov 1"] * 5
                )
            )


class TestPhases:
    def test_cycles_belong_to_the_functions_that_source_lines_are_in(self, tmp_path):
        file = tmp_path / "kernel.py"  # lines 4, 5, 8 and 11
        file.write_text(
            "\n\n\ndef loop():\n    def fetch(): ...\n\n\n    load = 1\n\n\ndef wait(): ...\n"
        )
        text = bundles.dumps(DUMPS)["copies.1"].read_text().replace("kernel.py", str(file))
        machine, made = run(text, [np.array([3, 9], np.int32), None])
        found = phases.breakdown(machine.program, made, timing.replay(made, timing.ONE_US, V6E))
        assert sum(phase.cycles for phase in found) == pytest.approx(made.cycles)
        by_name = {(phase.loop, phase.function): phase for phase in found}
        few = phases.longest(found, 0.2)
        assert few[-1].function == "others"
        assert sum(phase.cycles for phase in few) == pytest.approx(made.cycles)
        in_loop = by_name["kernel.loop:4", "loop.fetch"]
        # Three bundles of its own, the branch and an empty one before the load are the load's.
        assert in_loop.cycles == 3 * 3
        use = by_name["kernel.loop:4", "kernel.loop"]
        assert (use.cycles, use.empty) == (3 * 5, 3 * 2)
        assert by_name["", "kernel.wait"].waits > 1000


class TestOperands:
    def calls(self, function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        leaves = jax.tree.leaves(arguments)
        return kernel_calls(
            traced.jaxpr, [x if isinstance(x, np.ndarray) else None for x in leaves]
        )

    def kernel(self, *operands):
        return executed.pl.pallas_call(
            lambda *refs: None, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), name="k"
        )(*operands)

    def test_what_follows_from_integers_is_known(self):
        floats = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        lens = np.array([5, 9], np.int32)

        def function(lens, x):
            return self.kernel(jnp.cumsum(lens) + 1, x, (x[0, :2] > 0).astype(jnp.int32))

        (call,) = self.calls(function, lens, floats)
        assert call.name == "k"
        assert np.asarray(call.operands[0]).tolist() == [6, 15]
        assert call.operands[1:] == (None, None)

    def test_loops_give_their_first_pass_and_branches_the_one_taken(self):
        def function(lens):
            def layer(carry, number):
                self.kernel(carry * 10 + number)
                return carry + 1, number

            carry, _ = jax.lax.scan(lambda c, x: (c + x, c), lens, jnp.arange(4, dtype=jnp.int32))
            carry, _ = jax.lax.scan(layer, carry, jnp.arange(3, 9, dtype=jnp.int32))
            small, large = (lambda c, n=n: self.kernel(c * 0 + n) for n in (1, 2))
            jax.lax.cond(lens[0] > 4, large, small, lens)
            here, there = (lambda c, n=n: self.kernel(c * 0 + n) for n in (7, 8))
            return jax.lax.platform_dependent(lens, tpu=here, default=there)

        found = self.calls(function, np.array([5, 9], np.int32))
        firsts = [np.asarray(call.operands[0]).tolist() for call in found]
        assert firsts == [[113, 153], [2, 2], [7, 7]]


HLO = """\
HloModule jit_step

%body (p: (s32[], f32[8], s32[4])) -> (s32[], f32[8], s32[4]) {
  %p = (s32[], f32[8], s32[4]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %table = s32[4] get-tuple-element(%p), index=2
  %plan = s32[4] fusion(%table, %n), kind=kLoop, metadata={op_name="jit(step)/step_attend/plan/add"}
  %y = f32[8] fusion(%x, %plan), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"77"}
  %next = s32[] add(%n, %n)
  ROOT %t = (s32[], f32[8], s32[4]) tuple(%next, %y, %table)
}

ENTRY %main (a: s32[4]) -> f32[8] {
  %w = (s32[], f32[8], s32[4]) while(%i), body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_what_is_equal_in_all_layers_follows_from_what_the_loop_keeps():
    found = hlo.computations(HLO)
    assert hlo.loop(found["ENTRY"][0]) == ("body", 8)
    body = found["body"]
    assert hlo.varying(body) == {"x", "y", "t"}
    assert [i.name for i in body if i.takes_time] == ["plan", "y", "next"]
    by_name = {i.name: i for i in body}
    assert by_name["y"].estimated_cycles == 77
    assert by_name["plan"].op_name.endswith("step_attend/plan/add")


class TestUnits:
    @pytest.mark.parametrize(
        ("name", "unit"),
        [
            ("vmatmul.bf16.vlgmr.msra.gmra.mxu0", "matrix"),
            ("vpop.f32.mrf.mxu1", "matrix"),
            ("vpow2.f32", "exponential"),
            ("vpop.eup", "exponential"),
            ("vmax.xlane.f32.xlu1", "lanes"),
            ("vrot.slane", "lanes"),
            ("vld", "loads"),
            ("vst", "stores"),
            ("vstv", "vectors"),
            ("vadd.f32", "vectors"),
            ("dma.hbm_to_vmem", "copies"),
            ("sadd.s32", "scalars"),
        ],
    )
    def test_of_instructions(self, name, unit):
        assert units.unit_of(name) == unit

    def test_shares_are_of_the_slots_that_any_bundle_fills(self):
        op = lambda name: bundles.Op(name, None, "", {}, None, "")
        program = [("vld", "vld", "sadd.s32"), ("vld", "vadd.f32"), ()]
        parsed = [bundles.Bundle(i, tuple(map(op, ops))) for i, ops in enumerate(program)]
        found = units.shares(parsed, [1, 2, 1])
        assert found["loads"] == (2 + 2) / (2 * 4)
        assert (found["vectors"], found["scalars"], found["stores"]) == (0.5, 0.25, 0.0)


ROW = Executed(
    topology="v6e:2x2",
    device_kind="TPU v6 lite",
    case=CASES[0].name,
    kernel="decode",
    cores=1,
    clock_hz=1.75e9,
    cycles=300_000,
    empty=150_000,
    hbm_cycles=140_000.0,
    copies=16_384,
    copied_bytes=134_217_728,
    num_bytes=134_217_728,
    us={memory.name: 171.4 for memory in timing.MEMORIES},
    wait_us={memory.name: 0.0 for memory in timing.MEMORIES},
    phases=[{"loop": "", "function": "f", "cycles": 300_000, "empty": 150_000, "waits": 0}],
    guessed=0,
    unknown={},
)


class TestReport:
    def test_table(self):
        text = report.table([ROW])
        assert "TPU v6 lite (v6e:2x2)" in text
        assert "2.14" in text
        assert "16384 x 8" in text
        assert "taken as 0" not in text
        assert "taken as 0" in report.table([dataclasses.replace(ROW, guessed=2)])
        assert "100.0%" in report.phases(ROW)

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
        report.draw([ROW], tmp_path / "schedule.png")
        assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "G9"], "--case 'G9' is none of"),
        (["--kernel", "flash"], "--kernel 'flash' is none of"),
        (["--step", "gpt-5"], "unknown model 'gpt-5'"),
    ],
)
def test_what_is_unknown_is_refused_before_compiling(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:f", "no file 'nowhere.py'"),
        (f"{executed.__file__}:nothing", "no function 'nothing'"),
    ],
)
def test_subjects_that_are_not_there_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        worker.load(spec)


def test_stale_reads_are_found():
    load = "0x1 : { %s5_s1 = sld [smem:%s1_s0] }"
    lines = ["0x0 : { %s4_s1 = smov 1 }", load, "0x2 : { %s6_s2 = sadd.s32 %s4_s1, 1 }"]
    assert executed.stale_reads("\n".join(lines)) == lines[2:]
    lines[2] = lines[2].replace("%s4_s1", "%s5_s1")
    assert executed.stale_reads("\n".join(lines)) == []


class TestCompiled:
    """Needs libtpu, no TPU."""

    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: shardpage[tpu]")

    @pytest.mark.parametrize("topology", CHIPS)
    def test_the_kernel_fetches_each_page_of_each_sequence_once(self, topology):
        fetched, needed = worker.call(executed.pages_fetched, topology)
        assert fetched == needed

    @pytest.mark.parametrize("kernel", ["decode", "write", "jax paged_attention"])
    @pytest.mark.parametrize("topology", CHIPS)
    def test_no_program_reads_a_register_while_a_load_to_it_is_under_way(self, topology, kernel):
        assert worker.call(executed.stale_reads_of, topology, kernel) == []

    @pytest.mark.parametrize("topology", CHIPS)
    def test_whole_calls_stay_within_their_limits(self, topology):
        slow = {}
        for case, limits in LIMITS.items():
            if topology != "v6e:2x2" and case not in ON_ALL_CHIPS:
                continue
            (row,) = worker.call(worker.execute_case, topology, "decode", case, "off")
            assert row.guessed == 0
            assert row.copied_bytes >= row.num_bytes
            assert sum(p["cycles"] for p in row.phases) == pytest.approx(row.cycles)
            if round(row.ratio, 2) > limits[CHIPS.index(topology)]:
                slow[case] = row.ratio
        assert not slow

    def test_pages_in_runs_come_in_fewer_copies(self):
        copies, sizes = {}, set()
        for case in ("64 x 4096, G8 K1, page 16", "64 x 4096, G8 K1, page 16, runs of 4"):
            (row,) = worker.call(worker.execute_case, "v6e:2x2", "decode", case, "off")
            copies[case] = row.copies
            sizes.add(row.copied_bytes)
        alone, in_runs = copies.values()
        assert len(sizes) == 1
        assert alone > 64 * 256
        assert in_runs < 0.3 * alone  # before the loop pages come alone

    @pytest.mark.parametrize(
        ("topology", "cores"), [("v4:2x2x1", "batch"), ("v5p:2x2x1", "kv_head")]
    )
    def test_two_cores_take_half_of_one(self, topology, cores):
        case = "64 x 4096, G4 K8, page 64"
        one, two = (
            worker.call(worker.execute_case, topology, "decode", case, which)[0]
            for which in ("off", cores)
        )
        assert (one.cores, two.cores) == (1, 2)
        assert two.cycles < 0.62 * one.cycles
        assert two.hbm_cycles == one.hbm_cycles / 2

    @pytest.mark.parametrize(("heads", "most"), [("G8 K1", 6), ("G4 K8", 17)])
    def test_a_prompt_is_written_by_tiles(self, heads, most):
        """Of 16 tokens: each is read and written once, in few cycles a token."""
        case = f"1024 of 8192, {heads}, page 64"
        (row,) = worker.call(worker.execute_case, "v6e:2x2", "step write", case, "off")
        assert row.copies == 2 * 1024 // 16
        assert row.num_bytes == row.copied_bytes
        assert row.cycles / 1024 < most

    def test_a_kernel_of_a_user(self, tmp_path):
        out = tmp_path / "calls.json"
        arguments = ["--subject", f"{executed.__file__}:subject", "--topology", "v6e:2x2"]
        result = CliRunner().invoke(app, [*arguments, "--phases", "--json", str(out)])
        assert result.exit_code == 0, result.output
        (call,) = json.loads(out.read_text())["calls"]
        assert (call["case"], call["copies"]) == (
            "subject",
            7 + 1,
        )  # and the count's, or the result
        assert call["copied_bytes"] >= 7 * 2**19
        assert call["us"]["2 us"] - call["us"]["1 us"] == pytest.approx(7, abs=1.1)
        assert "copy_kernel.add" in result.output

    def test_a_decode_step(self):
        work = Workload(Model("one", 8, 1, 128, Model.preset("llama-3-8b").layers), 8, 512, 16)
        found = worker.call(step.analyze, "v6e:2x2", None, work)
        assert {name for name, _, _ in found.kernels} == {"shardpage_decode", "shardpage_write"}
        ours = [op for op in found.ops if op.in_layers and op.maker.startswith(("write", "attend"))]
        # New tokens are laid out as words, and queries as rows.
        assert {op.maker for op in ours} <= {"write: write", "attend: attend"}
        assert len(ours) <= 2
        assert sum(op.cycles for op in ours) < 100
        assert not found.collectives
        assert "attention's, in a layer" in step.table(found)

    def test_a_decode_step_whose_context_is_split(self):
        work = Workload(Model.preset("llama-3-8b"), 64, 4096, 16)
        found = worker.call(step.analyze, "v6e:2x2", "context=4", work)
        ours = [op for op in found.ops if op.in_layers and op.maker.startswith(("write", "attend"))]
        assert sum(op.times for op in ours) + len(found.collectives) <= 25
        assert not any(op.is_equal for op in ours)

    @pytest.mark.parametrize("case", grid.grid(20), ids=range(20))
    def test_defaults_compile(self, case):
        result = worker.call(grid.compile_case, case, dumping=False)
        assert result.outcome in (grid.COMPILED, grid.REFUSED), result.why
