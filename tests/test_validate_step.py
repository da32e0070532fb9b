"""Host checks of a step: they refuse what compiled code answers with NaN, and pages of two."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpage import PageAllocator, PagedKVCache, make_plan, validate_step

PAGE = 4
TABLES = np.arange(16).reshape(4, 4)
LENS, NEW = np.array([16, 5, 0, 9]), np.array([3, 5, 0, 1])


def check(lens=LENS, tables=TABLES, new=NEW, **options):
    validate_step(lens, tables, new, **{"num_pages": 16, "page_size": PAGE} | options)


def edited(entry, page):
    tables = TABLES.copy()
    tables[entry] = page
    return tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lens": [17, 5, 0, 9]}, r"sequence 0: context_len 17 must be in \[0, 16\], its table's"),
        ({"lens": [16, 5, -1, 9]}, "sequence 2: context_len -1 must be in"),
        ({"max_context_len": 8}, r"sequence 0: context_len 16 must be in \[0, 8\], max_context_"),
        ({"new": [3, 6, 0, 1]}, r"sequence 1: query_len 6 must be in \[0, 5\], its context_len"),
        ({"new": [3, -1, 0, 1]}, "sequence 1: query_len -1 must be in"),
        ({"new": [3, 5, 1, 1]}, r"sequence 2: query_len 1 must be in \[0, 0\]"),
        ({"new": [3, 5, 0]}, "query_lens has 3 entries, block_tables 4 rows"),
        ({"new": [3, 5, 0, 1.5]}, "query_lens must hold integers"),
        ({"num_queries": 8}, r"sequence 3: its 1 new tokens end at row 9 of the 8 .* at least 9"),
        ({"num_queries": 14, "num_seq_shards": 2},
         "sequence 1: its 5 new tokens end at row 8 of the 7 of shard 0 of 2; .* at least 16"),
        ({"num_queries": 9, "num_seq_shards": 2}, "num_queries=9 must be divisible by num_seq_sh"),
        ({"tables": edited((0, 1), 16)}, r"sequence 0, entry 1: page id 16 must be in \[0, 16\)"),
        ({"tables": edited((3, 2), 7), "num_seq_shards": 2},
         r"sequence 3, entry 2: page id 7 must be in \[8, 16\), the pages of its shard 1 of 2"),
        ({"tables": edited((0, 3), 0)}, "sequence 0: page id 0 stands in entries 0 and 3; a page"),
        ({"tables": edited((3, 0), 1)}, r"page id 1 is of two sequences: 0, entry 1, and 3, entry "
         "0; give each its own, or pass allow_shared=True"),
        ({"tables": edited((0, 0), 5)}, "page id 5 is of two sequences: 0, entry 0, and 1, entry 1;"
         r" sequence 1 writes to it, .* \(PageAllocator.fork says which page\)"),
        ({"tables": edited((0, 0), 5), "allow_shared": True}, "sequence 1 writes to it"),
        ({"allow_shared": 1}, "allow_shared must be True or False; got 1"),
        ({"window": 0}, "window=0 must be a positive integer"),
    ],
)  # fmt: skip
def test_refuses(changes, message):
    check()
    with pytest.raises(ValueError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_queries": 9},
        {"num_queries": 16, "num_seq_shards": 2},
        {"tables": edited((0, 0), -1), "window": 9},  # before what the first query sees
        {"tables": edited((0, 2), -1), "chunk": 4, "new": [3, 5, 0, 1]},
        {"tables": edited((2, 1), 99)},  # of an empty sequence
        {"tables": edited((3, 0), 1), "allow_shared": True},
        {"tables": edited((3, 3), 0)},  # past the context
        {"new": None},
        {"lens": [0, 0, 0, 0], "new": None},
    ],
)
def test_accepts(changes):
    check(**changes)


SIZE = st.none() | st.integers(1, 9)
ANY = st.fixed_dictionaries(
    {
        "window": SIZE,
        "chunk": SIZE,
        "causal": st.booleans(),
        "max_context_len": st.sampled_from([None, None, None, 11]),
        "num_queries": st.sampled_from([12, 24, 24]),
    }
)
DEFAULTS = {"window": None, "chunk": None, "causal": True, "max_context_len": None}
MASKED = {"window": 6, "chunk": 7, "causal": False, "max_context_len": 11}
# Each is a program to compile.
FEW = st.sampled_from([DEFAULTS | {"num_queries": 12}, MASKED | {"num_queries": 24}])


@st.composite
def drawn_steps(draw, options):
    """Lengths, tables, new tokens and options; a length, and up to three entries, may be wrong."""
    num_seqs, width = 4, 3
    lens = draw(st.lists(st.integers(0, width * PAGE), min_size=num_seqs, max_size=num_seqs))
    new = [
        draw(st.integers(0, min(length, 3) if draw(st.booleans()) else length)) for length in lens
    ]
    wrong = draw(st.integers(0, 7 * num_seqs))
    if wrong < num_seqs:
        array, values = draw(st.sampled_from([(lens, (-1, 13, 2**31 - 1)), (new, (-3, 11, 13))]))
        array[wrong] = draw(st.sampled_from(values))
    pages = draw(st.permutations(range(num_seqs * width)))
    tables = np.array(pages).reshape(num_seqs, width)
    for _ in range(draw(st.integers(0, 3))):
        entry = draw(st.integers(0, num_seqs - 1)), draw(st.integers(0, width - 1))
        tables[entry] = draw(st.sampled_from([-1, num_seqs * width, *pages]))
    if draw(st.integers(0, 4)) == 0:  # twice in one row
        tables[draw(st.integers(0, num_seqs - 1)), :2] = pages[0]
    return *(np.array(x, np.int32) for x in (lens, tables, new)), draw(options)


def seen(length, new, options):
    """(position of a query, positions that it sees), query by query and key by key."""
    for query in range(length - new, length):
        keys = [
            key
            for key in range(length)
            if (key <= query or not options["causal"])
            and (options["window"] is None or key > query - options["window"])
            and (options["chunk"] is None or key // options["chunk"] == query // options["chunk"])
        ]
        yield query, keys


def refused(lens, tables, new, allow_shared=True, **options):
    try:
        check(lens, tables, new, num_pages=12, allow_shared=allow_shared, **options)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=400)
@given(drawn_steps(ANY))
def test_refuses_what_a_brute_force_search_finds(drawn):
    lens, tables, new, options = drawn
    limit = min(12, options["max_context_len"] or 12)
    possible = all(0 <= n <= length <= limit for n, length in zip(new, lens, strict=True))
    bad = not possible or new.sum() > options["num_queries"]
    uses, writes = set(), set()
    if possible:
        for seq, (length, count) in enumerate(zip(lens.tolist(), new.tolist(), strict=True)):
            for query, keys in seen(length, count, options):
                uses |= {(seq, key // PAGE) for key in keys}
                writes.add((seq, query // PAGE))
        bad |= any(not 0 <= tables[use] < 12 for use in uses)
    pairs = {(a, b) for a in uses for b in uses if a < b and tables[a] == tables[b]}
    mixed = any(a[0] == b[0] or {a, b} & writes for a, b in pairs)
    assert (refused(*drawn[:3], **options) is not None) == (bad or mixed)
    assert (refused(*drawn[:3], allow_shared=False, **options) is not None) == (bad or bool(pairs))


CACHE = PagedKVCache.abstract(12, 1, PAGE, 8, dtype=jnp.float32)


@settings(max_examples=60)
@given(drawn_steps(FEW))
def test_refuses_what_a_plan_calls_invalid(drawn):
    lens, tables, new, options = drawn
    plan = make_plan(CACHE, lens, tables, new, num_heads=1, **options)
    message = refused(lens, tables, new, **options)
    of_sharing = message and ("of two sequences" in message or "stands in entries" in message)
    invalid, seen_to_be_wrong = np.asarray(plan.invalid).any(), bool(message and not of_sharing)
    assert invalid <= seen_to_be_wrong
    if (new > 0).all() and new.sum() <= options["num_queries"]:  # each has a query to tell by
        assert invalid == seen_to_be_wrong


class TestAllocator:
    def allocator(self):
        allocator = PageAllocator(16, PAGE)
        allocator.allocate("a", 10)
        allocator.allocate("b", 6)
        allocator.fork("a", "c", 8)
        return allocator

    def test_accepts_its_own_tables(self):
        allocator = self.allocator()
        seq_ids = ["b", None, "a", "c"]
        tables = allocator.block_tables(seq_ids, max_blocks=5)
        allocator.validate_tables(seq_ids, tables)
        tables[tables < 0] = 99  # what no context reaches
        allocator.validate_tables(seq_ids, tables)
        allocator.validate_tables(seq_ids, tables, [6, 0, 10, 8], [6, 0, 2, 0])
        tables[0, 1] = 0  # past a shorter context
        allocator.validate_tables(seq_ids, tables, [4, 0, 10, 8])

    @pytest.mark.parametrize(
        ("entry", "page", "message"),
        [
            ((0, 1), 0, r"row 0, entry 1: page id 0 \(of sequence 'a'\) must be 4, which sequence "
             r"'b' has there; take tables from block_tables\(\)"),
            ((2, 0), 1, r"row 2, entry 0: page id 1 \(of sequence 'a'\) must be 0"),
            ((2, 2), 9, r"row 2, entry 2: page id 9 \(free, or none\) must be 2"),
            ((3, 1), -1, r"row 3, entry 1: page id -1 .* must be 1, which sequence 'c'"),
        ],
    )  # fmt: skip
    def test_refuses_pages_of_another(self, entry, page, message):
        allocator = self.allocator()
        tables = allocator.block_tables(["b", None, "a", "c"])
        tables[entry] = page
        with pytest.raises(ValueError, match=message):
            allocator.validate_tables(["b", None, "a", "c"], tables)

    @pytest.mark.parametrize(
        ("lens", "new", "message"),
        [
            ([7, 0], None, r"row 0: 0 new tokens of 7 must be in \[0, 6\], what sequence 'b' and"),
            ([6, 1], None, r"row 1: 0 new tokens of 1 must be in \[0, 0\], what sequence None"),
            ([6, 0], [7, 0], "row 0: 7 new tokens of 6"),
            ([6], None, "context_lens has 1 rows for 2 seq_ids"),
            ([6, 0], [1.5, 0], "query_lens must hold integers"),
        ],
    )
    def test_refuses_lengths(self, lens, new, message):
        allocator = self.allocator()
        tables = allocator.block_tables(["b", None])
        with pytest.raises(ValueError, match=message):
            allocator.validate_tables(["b", None], tables, lens, new)

    def test_refuses_writes_to_a_shared_page(self):
        allocator = self.allocator()
        tables = allocator.block_tables(["a"])
        allocator.validate_tables(["a"], tables, [10], [2])
        with pytest.raises(ValueError, match="row 0, entry 1: sequence 'a' writes to page 1, whi"):
            allocator.validate_tables(["a"], tables, [10], [3])
        allocator.free("c")
        allocator.validate_tables(["a"], tables, [10], [10])
