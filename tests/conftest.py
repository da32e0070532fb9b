"""Set-up of a test session: eight simulated devices, strict dtypes, checked shapes."""

import gc
import os

import chex
import hypothesis
import jax
import jaxtyping
import pytest

# Interpreted kernels of eight devices wait for each other in XLA's thread pool; with one thread a
# core they would wait for ever on a small machine.
os.environ.setdefault("NPROC", "20")
# Before any backend starts. On a TPU host: JAX_PLATFORMS=tpu,cpu.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
chex.set_n_cpu_devices(8)
# The first example of a test compiles: no deadline. The same examples in every run.
hypothesis.settings.register_profile("session", deadline=None, derandomize=True)
hypothesis.settings.load_profile("session")
# float32 and bfloat16 never meet unasked in the library.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and dtypes named in annotations are checked at every call of what is behind the public
# functions; those check their arguments themselves, and it is their messages that are tested.
_CHECKED = ("page_format", "plan", "backends")
_hook = jaxtyping.install_import_hook(
    [f"shardpage.{name}" for name in _CHECKED], "beartype.beartype"
)

from .backends import INTERPRETED  # noqa: E402
from .cases import build_mesh  # noqa: E402
from .slow import pytest_collection_modifyitems as pytest_collection_modifyitems  # noqa: E402

# Eight devices each; every kind of split, alone and with the others.
MESHES = (
    "data=8",
    "kv=2",
    "context=8",
    "data=4,kv=2",
    "data=2,context=4",
    "kv=2,context=4",
    "data=2,kv=2,context=2",
)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """Starts JAX. What tests start then has as many devices as it asks for, not these eight."""
    jax.devices()
    words = os.environ["XLA_FLAGS"].split()
    os.environ["XLA_FLAGS"] = " ".join(word for word in words if "device_count" not in word)


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs():
    """Each holds memory maps; thousands of them run into Linux's limit, and XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _no_races(request):
    """Fails a test of an interpreted kernel in which a race was found; it is only printed."""
    call = getattr(request.node, "callspec", None)
    if call is None or call.params.get("backend") not in INTERPRETED:
        yield
        return
    capfd = request.getfixturevalue("capfd")
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.fixture(params=("Auto", "Explicit"))
def axis_type(request) -> str:
    """Both ways in which a mesh's axes can take part in sharding."""
    return request.param


@pytest.fixture(params=MESHES)
def mesh_spec(request) -> str:
    return request.param


@pytest.fixture
def mesh(mesh_spec, axis_type) -> jax.sharding.Mesh:
    """Every mesh, in both axis types. Narrow it with `parametrize("mesh_spec", ...)`."""
    return build_mesh(mesh_spec, axis_type)


@pytest.fixture
def on_a_cpu():
    """For Mosaic GPU kernels in JAX's interpreter, also where a GPU is the default.

    It runs each warpgroup in a thread and program of its own, called by the kernel's program: on a
    GPU they would wait behind it for ever. Those threads see no context manager.
    """
    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    yield
    jax.config.update("jax_default_device", None)


@pytest.fixture
def soon_in_place(monkeypatch):
    """Mosaic GPU kernels find queries in place with two tiles a row, not sixteen: small cases."""
    monkeypatch.setattr("shardpage.backends.pallas_gpu.config._TILES_IN_PLACE", 2)
