"""The grid of shapes that must compile: what it has, keeps and says, without compiling."""

import collections
import json

import pytest
from typer.testing import CliRunner

from launch.__main__ import app
from launch.schedule import grid


class TestGrid:
    def test_has_every_chip_alike_and_every_value_of_every_axis(self):
        cases = grid.grid(500)
        assert len(set(cases)) == 500
        assert {n for n in collections.Counter(c.topology for c in cases).values()} == {100}
        for axis, values in grid._AXES.items():
            assert {getattr(case, axis) for case in cases} - {None} == set(values) - {None}, axis
        assert collections.Counter(case.op for case in cases)["step"] > 50

    def test_keeps_what_it_has_when_it_is_stopped(self, tmp_path, monkeypatch):
        path, asked = tmp_path / "grid.json", []

        def result(case, before):
            asked.append(before)
            if len(asked) == 8:
                raise KeyboardInterrupt
            return grid.Result(grid.COMPILED, program=case.name)

        monkeypatch.setattr(grid, "_result", result)
        with pytest.raises(KeyboardInterrupt):
            grid.run(20, path, lambda _: None)
        assert len(json.loads(path.read_text())["results"]) == 6  # written with every fifth
        del asked[:]
        refused = grid.Result(grid.REFUSED, "ValueError: 12 of 34")
        monkeypatch.setattr(grid, "_result", lambda _, before: before or refused)
        found = grid.run(20, path, lambda _: None)
        assert json.loads(path.read_text()) == json.loads(json.dumps(found))
        assert collections.Counter(outcome for outcome, *_ in found["results"].values()) == {
            grid.COMPILED: 6, grid.REFUSED: 14,
        }  # fmt: skip
        assert "refused 14 of 20: ValueError: ## of ##" in grid.table(found)

    def test_starts_anew_for_another_compiler(self, tmp_path, monkeypatch):
        path = tmp_path / "grid.json"
        broken = grid.Result(grid.FAILED, "broken")
        monkeypatch.setattr(grid, "_result", lambda _, before: before or broken)
        found = grid.run(5, path, lambda _: None)
        assert "FAILED topology=v4" in grid.table(found)
        path.write_text(json.dumps(found | {"compiler": {"jax": "0.4.1", "libtpu": "0.0.1"}}))
        compiled = grid.Result(grid.COMPILED)
        monkeypatch.setattr(grid, "_result", lambda _, before: before or compiled)
        found = grid.run(5, path, lambda _: None)
        assert {outcome for outcome, *_ in found["results"].values()} == {grid.COMPILED}

    @pytest.mark.parametrize(
        ("outcome", "exit_code"), [(grid.COMPILED, 0), (grid.REFUSED, 0), (grid.FAILED, 1)]
    )
    def test_a_failure_of_the_compiler_is_exit_code_1(self, outcome, exit_code, monkeypatch):
        monkeypatch.setattr(grid, "_result", lambda case, before: grid.Result(outcome, "why"))
        done = CliRunner().invoke(app, ["schedule", "--grid"])
        assert done.exit_code == exit_code, done.output
