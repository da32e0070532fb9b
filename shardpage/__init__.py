"""shardpage: paged attention for whole TPU pods, in Python on JAX."""

from .allocator import OutOfPages as OutOfPages
from .allocator import PageAllocator as PageAllocator
from .attention import page_attention as page_attention
from .cache import PagedKVCache as PagedKVCache
from .cache import write_kv as write_kv
from .host_checks import validate_tables as validate_tables
from .host_checks import validate_writes as validate_writes
from .layout import ShardLayout as ShardLayout
from .partial import merge_across as merge_across
from .partial import merge_partials as merge_partials


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: a source tree on the path has none
        from importlib import metadata

        return metadata.version("shardpage")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
