"""The per-device backends: a folder each, which nothing else of the library looks into.

A backend works on whole caches and on intervals of local pages. It knows nothing of meshes, sinks,
windows or invalid tables, and takes what it is handed whatever that was made from. Page ids are of
one layer: `cache.in_layer` makes ids in the arrays of them. Scales of tokens are the backend's to
apply; scales of KV heads are in its queries already, and its results get them afterwards.
"""

import importlib
from typing import Any, Protocol, cast, runtime_checkable

import jax

from ..cache import PagedKVCache
from ..options import Attention, BackendName, Tuning
from ..page_format import PageFormat
from ..partial import Partial
from ..plan import Reads, Writes
from ..quantise import Stored

# Imported when first used: Pallas takes a second.
_MODULES = {"xla": ".xla", "pallas_tpu": ".pallas_tpu", "pallas_gpu": ".pallas_gpu"}
# GPUs that have the instructions of `pallas_gpu`: a word of the name that JAX gives them.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")

# Backends whose kernels can run in an interpreter, which they do everywhere but on this platform.
INTERPRETABLE = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
_KERNELS_NEED = (0, 10)  # of JAX's version


@runtime_checkable
class Backend(Protocol):
    """What the module of a backend has. What it does not have is a NotImplementedError."""

    def prepare(self, reads: Reads, num_heads: int, page_format: PageFormat, tuning: Tuning) -> Any:
        """Index arithmetic that depends on the reads alone, once per step; goes to `attend`."""
        ...

    def attend(
        self,
        query: jax.Array,
        cache: PagedKVCache,
        reads: Reads,
        work: Any,
        attention: Attention,
        tuning: Tuning,
        *,
        final: bool = False,
    ) -> Partial:
        """Attends with each query `[queries, num_heads, key_dim]` over what it reads.

        In float32, to be merged; or, where `final` says that nothing is, as `partial.finish` makes
        it, invalid queries marked.
        """
        ...

    def prepare_writes(
        self, writes: Writes, num_pages: int, page_format: PageFormat, tuning: Tuning
    ) -> Any:
        """Index arithmetic that depends on the writes alone, once per step; goes to `write`."""
        ...

    def write(
        self,
        cache: PagedKVCache,
        tokens: Stored,
        writes: Writes,
        work: Any,
        tuning: Tuning,
    ) -> PagedKVCache:
        """Puts tokens, and the scales of each, into their slots."""
        ...


def default_for(platform: str, device_kind: str, page_format: PageFormat) -> BackendName:
    """The backend that such devices ("cpu", "gpu", "tpu"; what JAX calls them) get for such pages
    when none is named."""
    if jax.__version_info__ < _KERNELS_NEED:
        return "xla"
    if platform == "tpu":
        if not page_format.layout.token_major:
            return "pallas_tpu"
        module = importlib.import_module(_MODULES["pallas_tpu"], __name__)
        return "pallas_tpu" if module.has(page_format) else "xla"
    if platform == "gpu" and any(name in device_kind.split() for name in _HOPPER):
        try:
            module = importlib.import_module(_MODULES["pallas_gpu"], __name__)
        except ImportError:  # JAX 0.10 has no Mosaic GPU without absl-py, which it does not bring
            return "xla"
        return "pallas_gpu" if module.has(page_format) else "xla"
    return "xla"


def check_jax(backend: BackendName) -> None:
    """Refuses kernels that the installed JAX cannot compile."""
    if backend != "xla" and jax.__version_info__ < _KERNELS_NEED:
        raise NotImplementedError(
            f"backend={backend!r} needs JAX {'.'.join(map(str, _KERNELS_NEED))} or later, this is "
            f"{jax.__version__}; use backend='xla', or None"
        )


def load(tuning: Tuning) -> Backend:
    """The backend that a call was resolved to."""
    assert tuning.backend is not None
    return cast(Backend, importlib.import_module(_MODULES[tuning.backend], __name__))
