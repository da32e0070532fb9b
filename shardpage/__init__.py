"""shardpage: paged attention for whole TPU pods, in Python on JAX."""

from .adapters.ejkernel import page_attention as page_attention
from .allocator import OutOfPages as OutOfPages
from .allocator import PageAllocator as PageAllocator
from .attention import attend as attend
from .cache import PagedKVCache as PagedKVCache
from .descriptor import page_ranges as page_ranges
from .options import Tuning as Tuning
from .partial import merge_across as merge_across
from .partial import merge_partials as merge_partials
from .plan import Plan as Plan
from .shard_layout import ShardLayout as ShardLayout
from .step import make_plan as make_plan
from .table_checks import validate_step as validate_step
from .table_checks import validate_tables as validate_tables
from .table_checks import validate_writes as validate_writes
from .transfer import QuantisedPages as QuantisedPages
from .transfer import read_pages as read_pages
from .transfer import write_pages as write_pages
from .write import write_kv as write_kv


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: a source tree on the path has none
        from importlib import metadata

        return metadata.version("shardpage")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
