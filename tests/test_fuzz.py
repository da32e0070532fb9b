"""A fixed sample of `python -m tests.fuzz`: hostile calls are right, NaN, or refused."""

import pytest

from . import fuzz
from .backends import INTERPRETED, attend
from .cases import build_mesh

SAMPLES = [("xla", None, range(30)), ("xla", "data=2,kv=2,context=2", range(1000, 1010))]
SAMPLES += [(name, None, range(2000, 2006)) for name in INTERPRETED]
SAMPLES += [(name, "data=2,context=2", range(3000, 3004)) for name in INTERPRETED]


@pytest.mark.parametrize(
    ("backend", "mesh_spec", "seeds"), SAMPLES, ids=[f"{s[0]}-{s[1]}" for s in SAMPLES]
)
def test_drawn_calls(backend, mesh_spec, seeds):
    mesh = build_mesh(mesh_spec) if mesh_spec else None
    wrong = {seed: fuzz.check(seed, attend, backend=backend, mesh=mesh) for seed in seeds}
    assert not {seed: what for seed, what in wrong.items() if what}


def test_what_is_wrong_is_seen():
    """The judge itself: a wrong number, a NaN elsewhere, and a refusal of what is right."""

    def off_by(change):
        def attend_wrongly(*args, **where):
            out, lse = attend(*args, **where)
            change(out)
            return out, lse

        return attend_wrongly

    def refuse(*args, **where):
        raise ValueError("no")

    seed = next(s for s in range(100) if not fuzz.draw(s).impossible)
    assert fuzz.check(seed, attend) is None
    assert "out[" in fuzz.check(seed, off_by(lambda out: out.__iadd__(1.0)))
    assert "refused: no" in fuzz.check(seed, refuse)
