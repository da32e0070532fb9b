"""PageAllocator: what it hands out, what it refuses, and that no page is lost or owned twice."""

import collections
import copy
import itertools
import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from shardpage.allocator import CopyPage, OutOfPages, PageAllocator


class TestOnePool:
    def test_allocates_enough_pages_lowest_first(self):
        allocator = PageAllocator(10, 64)
        assert allocator.allocate("a", 129) == [0, 1, 2]
        assert allocator.allocate("b", 16) == [3]
        assert allocator.allocate("c", 0) == []
        assert allocator.num_tokens("a") == 129
        assert allocator.num_free() == 6
        assert allocator.seq_ids == ["a", "b", "c"]
        assert "a" in allocator
        assert "z" not in allocator

    def test_extends_only_past_the_room_in_the_last_page(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("a", 30)
        assert allocator.extend("a", 2) == []
        assert allocator.extend("a", 1) == [2]
        assert allocator.extend("a", 31) == [3]
        assert allocator.pages("a") == [0, 1, 2, 3]
        assert allocator.num_tokens("a") == 64

    def test_reuses_freed_pages_lowest_first(self):
        allocator = PageAllocator(10, 64)
        for name in "abcd":
            allocator.allocate(name, 128)
        allocator.free("c")
        allocator.free("a")
        assert allocator.num_free() == 6
        assert allocator.allocate("e", 5 * 64) == [0, 1, 4, 5, 8]

    def test_sequences_that_grow_in_turn_have_runs_of_64_tokens(self):
        allocator = PageAllocator(24, 16)
        for name in "ab" * 6:
            if name not in allocator:
                allocator.allocate(name, 0)
            allocator.extend(name, 16)
        assert allocator.pages("a") == [0, 1, 2, 3, 8, 9]
        assert allocator.pages("b") == [4, 5, 6, 7, 12, 13]
        allocator.free("a")
        assert allocator.allocate("c", 5 * 16) == [0, 1, 2, 3, 8]

    def test_where_no_run_is_free_the_lowest_page_goes(self):
        allocator = PageAllocator(10, 16)
        for name in "abc":  # the third has a place of two pages
            allocator.allocate(name, 16)
        assert [allocator.pages(name) for name in "abc"] == [[0], [4], [8]]
        assert allocator.allocate("d", 3 * 16) == [1, 2, 3]
        assert allocator.extend("a", 16) == [5]
        assert allocator.extend("c", 16) == [9]
        assert allocator.extend("b", 2 * 16) == [6, 7]
        assert allocator.num_free() == 0

    @pytest.mark.parametrize(
        ("num_pages", "fill", "in_runs"),
        [(16384, 0.83, 1.0), (14894, 0.91, 0.72), (13000, 0.96, 0.0)],
    )
    def test_steps_of_a_kernel_are_in_runs_while_the_pool_has_room(self, num_pages, fill, in_runs):
        """64 sequences of up to 8192 tokens that come, grow by a page a turn, and go.

        A step is 8 blocks of 512 tokens; where the pool is full, newcomers wait and runs break.
        """
        rng, allocator = random.Random(0), PageAllocator(num_pages, 16)
        wanted: dict[int, int] = {}
        whole, fills, names = [], [], itertools.count()
        for turn in range(3000):
            for _ in range(64 - len(wanted)):
                prompt = rng.randint(1, 4096)
                total = prompt + rng.randint(1, 4096)
                if allocator.num_free() * 16 >= total:
                    wanted[name := next(names)] = total
                    allocator.allocate(name, prompt)
            for name, total in list(wanted.items()):
                more = min(16, total - allocator.num_tokens(name))
                if not more or not allocator.num_free():
                    allocator.free(name)
                    del wanted[name]
                else:
                    allocator.extend(name, more)
            if turn > 500 and turn % 50 == 0:
                pages = [allocator.pages(name) for name in wanted]
                blocks = [p[i : i + 32] for p in pages for i in range(0, len(p), 32)]
                runs = [all(b[j + 3] == b[j] + 3 for j in range(0, len(b) - 3, 4)) for b in blocks]
                whole += [all(runs[i : i + 8]) for i in range(0, len(runs), 8)]
                fills.append(1 - allocator.num_free() / num_pages)
        assert np.mean(fills) == pytest.approx(fill, abs=0.01)
        assert np.mean(whole) == pytest.approx(in_runs, abs=0.01)

    def test_shows_its_state(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("a", 33)
        assert repr(allocator) == "PageAllocator(1 sequences, 7 of 10 pages of 16 tokens free)"

    def test_all_pages_can_be_taken(self):
        allocator = PageAllocator(4, 8)
        assert allocator.allocate("a", 32) == [0, 1, 2, 3]
        assert allocator.num_free() == 0
        assert allocator.extend("a", 0) == []

    def test_returned_lists_are_copies(self):
        allocator = PageAllocator(4, 8)
        allocator.allocate("a", 8).append(99)
        allocator.pages("a").append(99)
        assert allocator.pages("a") == [0]


class TestBlockTables:
    def test_pads_with_minus_one(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("a", 33)
        allocator.allocate("b", 16)
        tables = allocator.block_tables(["b", None, "a"], max_blocks=4)
        assert tables.dtype == np.int32
        np.testing.assert_array_equal(tables, [[4, -1, -1, -1], [-1] * 4, [0, 1, 2, -1]])

    def test_width_is_the_longest_sequence_or_the_allocators(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("a", 33)
        assert allocator.block_tables(["a", None]).shape == (2, 3)
        assert allocator.block_tables([None]).shape == (1, 1)
        assert PageAllocator(10, 16, max_blocks=7).block_tables([None]).shape == (1, 7)

    def test_context_lens_match_the_rows(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("a", 33)
        lens = allocator.context_lens([None, "a"])
        assert lens.dtype == np.int32
        assert lens.tolist() == [0, 33]


class TestFork:
    def test_shares_full_pages_and_names_the_tail_to_copy(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("parent", 40)
        assert allocator.fork("parent", "child") == CopyPage(source=2, target=4)
        assert allocator.pages("child") == [0, 1, 4]
        assert allocator.num_tokens("child") == 40
        assert [allocator.refcount(page) for page in range(5)] == [2, 2, 1, 0, 1]

    def test_full_pages_need_no_copy(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("parent", 32)
        assert allocator.fork("parent", "child") is None
        assert allocator.extend("child", 1) == [2]
        assert allocator.extend("parent", 1) == [4]

    def test_an_empty_sequence_can_be_forked(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("parent", 0)
        assert allocator.fork("parent", "child") is None
        assert allocator.pages("child") == []

    def test_a_prefix_shares_what_is_full_of_it(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("parent", 64)
        assert allocator.fork("parent", "child", num_tokens=20) == CopyPage(source=1, target=4)
        assert allocator.pages("child") == [0, 4]
        assert allocator.num_tokens("child") == 20

    def test_shared_pages_live_as_long_as_their_last_owner(self):
        allocator = PageAllocator(10, 16)
        allocator.allocate("parent", 40)
        allocator.fork("parent", "child")
        allocator.fork("child", "grandchild")
        allocator.free("parent")
        assert allocator.num_free() == 10 - 4
        allocator.free("grandchild")
        assert allocator.pages("child") == [0, 1, 4]
        allocator.free("child")
        assert allocator.num_free() == 10

    def test_without_a_page_for_the_tail_nothing_changes(self):
        allocator = PageAllocator(3, 16)
        allocator.allocate("parent", 40)
        with pytest.raises(OutOfPages, match="'child' needs 1 more pages, and 0 of the 3"):
            allocator.fork("parent", "child")
        assert "child" not in allocator
        assert allocator.refcount(0) == 1


class TestShards:
    """Page p is on page shard p // pages_per_shard; shards are (seqs, context), row-major."""

    def test_a_sequence_stays_on_its_seqs_shard(self):
        allocator = PageAllocator(40, 16, num_seq_shards=2)
        assert allocator.allocate("a", 32, seq_shard=1) == [20, 21]
        assert allocator.allocate("b", 16, seq_shard=0) == [0]
        assert allocator.extend("a", 16) == [22]
        assert allocator.fork("a", "c") is None
        assert allocator.seq_shard("a") == allocator.seq_shard("c") == 1
        assert allocator.num_free(seq_shard=0) == 19
        assert allocator.num_free(seq_shard=1) == 17

    def test_round_robin_takes_context_shards_in_turn(self):
        allocator = PageAllocator(80, 16, num_seq_shards=2, num_context_shards=4)
        assert allocator.allocate("a", 5 * 16, seq_shard=1) == [40, 50, 60, 70, 41]
        assert allocator.extend("a", 16) == [51]
        assert allocator.num_free(1, 0) == 8
        assert allocator.num_free(context_shard=3) == 19

    def test_round_robin_starts_on_the_shard_with_most_free_pages(self):
        allocator = PageAllocator(40, 16, num_context_shards=4)
        firsts = [allocator.allocate(name, 16)[0] for name in "abcde"]
        assert firsts == [0, 10, 20, 30, 4]

    def test_contiguous_fills_ranges(self):
        allocator = PageAllocator(
            40, 16, num_context_shards=4, placement="contiguous", max_blocks=7
        )
        assert allocator.allocate("a", 7 * 16) == [0, 1, 10, 11, 20, 21, 30]

    @pytest.mark.parametrize("placement", ["round_robin", "contiguous"])
    def test_a_full_context_shard_is_passed_over(self, placement):
        allocator = PageAllocator(8, 16, num_context_shards=2, placement=placement, max_blocks=8)
        pages = allocator.allocate("a", 5 * 16)
        pages += allocator.allocate("b", 3 * 16)
        assert sorted(pages) == list(range(8))

    def test_runs_out_when_the_whole_seqs_shard_has(self):
        allocator = PageAllocator(16, 16, num_seq_shards=2, num_context_shards=2)
        allocator.allocate("a", 6 * 16, seq_shard=1)
        with pytest.raises(OutOfPages) as error:
            allocator.allocate("b", 3 * 16, seq_shard=1)
        assert str(error.value) == (
            "sequence 'b' needs 3 more pages, and 2 of the 8 pages of seqs shard 1 are free; "
            "free other sequences of that shard, allocate in another seq_shard, or make the "
            "cache with more pages"
        )
        assert (error.value.asked, error.value.free, error.value.seq_shard) == (3, 2, 1)
        assert "b" not in allocator
        assert allocator.num_free() == 10
        allocator.allocate("b", 3 * 16, seq_shard=0)


class TestErrors:
    @pytest.fixture
    def allocator(self):
        allocator = PageAllocator(8, 16, max_blocks=4)
        allocator.allocate("a", 40)
        return allocator

    def test_unknown_sequence(self, allocator):
        for call in (
            allocator.pages,
            allocator.free,
            allocator.num_tokens,
            allocator.seq_shard,
            lambda name: allocator.extend(name, 1),
            lambda name: allocator.fork(name, "c"),
            lambda name: allocator.block_tables([name]),
            lambda name: allocator.context_lens([name]),
        ):
            with pytest.raises(ValueError, match="no sequence 'b': never allocated, or freed"):
                call("b")

    def test_double_free(self, allocator):
        allocator.free("a")
        with pytest.raises(ValueError, match=r"no sequence 'a': .*; there are none at all"):
            allocator.free("a")

    def test_names_a_few_of_the_sequences(self, allocator):
        for name in range(6):
            allocator.allocate(name, 0)
        with pytest.raises(ValueError, match=r"there are 7: 'a', 0, 1, 2, 3, \.\.\.$"):
            allocator.free("b")

    def test_name_in_use(self, allocator):
        with pytest.raises(ValueError, match="'a' exists already; extend it, or free it"):
            allocator.allocate("a", 1)
        with pytest.raises(ValueError, match="'a' exists already"):
            allocator.fork("a", "a")
        with pytest.raises(ValueError, match="None cannot name a sequence"):
            allocator.allocate(None, 1)

    def test_negative_counts(self, allocator):
        for call in (
            lambda: allocator.allocate("b", -1),
            lambda: allocator.extend("a", -1),
            lambda: allocator.fork("a", "b", num_tokens=-1),
        ):
            with pytest.raises(ValueError, match="num_tokens=-1 must be an integer >= 0"):
                call()

    def test_longer_than_a_table(self, allocator):
        with pytest.raises(ValueError, match="'a' would have 65 tokens, and max_blocks=4 pages"):
            allocator.extend("a", 25)
        assert allocator.num_tokens("a") == 40
        with pytest.raises(ValueError, match="max_blocks=4 pages of 16 hold 64; end it there"):
            allocator.allocate("b", 65)
        with pytest.raises(ValueError, match=r"'a' has 3 pages, which do not fit .*max_blocks=3$"):
            allocator.block_tables(["a"], max_blocks=2)
        with pytest.raises(ValueError, match="max_blocks=0 must be a positive integer"):
            allocator.block_tables(["a"], max_blocks=0)

    def test_fork_of_more_than_there_is(self, allocator):
        with pytest.raises(ValueError, match="first num_tokens=41 of sequence 'a', which has 40"):
            allocator.fork("a", "b", num_tokens=41)

    def test_shards_out_of_range(self, allocator):
        with pytest.raises(ValueError, match="seq_shard=1 is out of range: there are 1, 0 to 0"):
            allocator.allocate("b", 1, seq_shard=1)
        with pytest.raises(ValueError, match="seq_shard=-1 must be an integer >= 0"):
            allocator.num_free(seq_shard=-1)
        with pytest.raises(ValueError, match="context_shard=2 is out of range"):
            allocator.num_free(context_shard=2)
        with pytest.raises(ValueError, match="page=8 is out of range: there are 8, 0 to 7"):
            allocator.refcount(8)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_pages": 0}, "num_pages=0 must be a positive integer"),
            ({"page_size": 0}, "page_size=0 must be a positive integer"),
            ({"num_seq_shards": 0}, "num_seq_shards=0 must be a positive integer"),
            ({"num_context_shards": -2}, "num_context_shards=-2 must be a positive integer"),
            ({"max_blocks": 0}, "max_blocks=0 must be a positive integer"),
            ({"placement": "random"}, "placement='random' is not one of round_robin, contiguous"),
            (
                {"placement": "contiguous", "num_context_shards": 2},
                "say max_blocks, or use placement='round_robin'",
            ),
            (
                {"num_seq_shards": 3, "num_context_shards": 2},
                r"num_pages=8 must be divisible by the 6 page shards .*; use 12$",
            ),
        ],
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PageAllocator(**{"num_pages": 8, "page_size": 16, **arguments})


PAGE_SIZE = 4


class Ownership(RuleBasedStateMachine):
    """Any order of calls, against a model that knows tokens and owners but not placement.

    A twin gets the same calls, to see that pages depend on nothing else.
    """

    sequences = Bundle("sequences")

    @staticmethod
    def make() -> PageAllocator:
        return PageAllocator(24, PAGE_SIZE, num_seq_shards=2, num_context_shards=3, max_blocks=8)

    def __init__(self):
        super().__init__()
        self.allocator, self.twin = self.make(), self.make()
        self.tokens: dict[int, int] = {}
        self.counter = 0

    def call(self, method, *arguments):
        """Calls both; if that raises, checks that nothing has changed. Says whether it worked."""
        before = copy.deepcopy(vars(self.twin))
        try:
            result = getattr(self.allocator, method)(*arguments)
        except (OutOfPages, ValueError) as error:
            with pytest.raises(type(error)):
                getattr(self.twin, method)(*arguments)
            assert snapshot(vars(self.twin)) == snapshot(before)
            return error
        assert result == getattr(self.twin, method)(*arguments)
        return result

    @rule(target=sequences, num_tokens=st.integers(0, 40), seq_shard=st.integers(0, 1))
    def allocate(self, num_tokens, seq_shard):
        self.counter += 1
        free = self.allocator.num_free(seq_shard)
        result = self.call("allocate", self.counter, num_tokens, seq_shard)
        asked = blocks(num_tokens)
        if asked > 8:
            assert type(result) is ValueError
        elif asked > free:
            assert isinstance(result, OutOfPages)
            assert (result.asked, result.free) == (asked, free)
        else:
            assert len(result) == asked
            self.tokens[self.counter] = num_tokens
        return self.counter

    @rule(seq_id=sequences, num_tokens=st.integers(0, 12))
    def extend(self, seq_id, num_tokens):
        result = self.call("extend", seq_id, num_tokens)
        if not isinstance(result, Exception):
            self.tokens[seq_id] += num_tokens

    @rule(target=sequences, parent=sequences, num_tokens=st.none() | st.integers(0, 20))
    def fork(self, parent, num_tokens):
        self.counter += 1
        result = self.call("fork", parent, self.counter, num_tokens)
        if not isinstance(result, Exception):
            held = self.tokens[parent] if num_tokens is None else num_tokens
            assert (result is not None) == (held % PAGE_SIZE != 0)
            self.tokens[self.counter] = held
        return self.counter

    @rule(seq_id=consumes(sequences))
    def free(self, seq_id):
        result = self.call("free", seq_id)
        assert isinstance(result, ValueError) == (seq_id not in self.tokens)
        self.tokens.pop(seq_id, None)

    @invariant()
    def no_page_is_lost_or_owned_twice(self):
        allocator = self.allocator
        owners = collections.Counter()
        for seq_id, num_tokens in self.tokens.items():
            pages = allocator.pages(seq_id)
            assert allocator.num_tokens(seq_id) == num_tokens
            assert len(pages) == len(set(pages)) == blocks(num_tokens)
            assert {page // 12 for page in pages} <= {allocator.seq_shard(seq_id)}
            owners.update(pages)
        assert set(allocator.seq_ids) == set(self.tokens)
        assert [allocator.refcount(page) for page in range(24)] == [owners[p] for p in range(24)]
        for shard in range(6):
            used = sum(page // 4 == shard for page in owners)
            assert allocator.num_free(*divmod(shard, 3)) == 4 - used

    @invariant()
    def a_page_with_room_has_one_owner(self):
        for seq_id, num_tokens in self.tokens.items():
            if num_tokens % PAGE_SIZE:
                assert self.allocator.refcount(self.allocator.pages(seq_id)[-1]) == 1


def blocks(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def snapshot(state: dict) -> dict:
    """Comparable state: pools by what they hold."""
    return {
        **state,
        "_pools": [vars(pool) for pool in state["_pools"]],
        "_sequences": {name: vars(seq) for name, seq in state["_sequences"].items()},
    }


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
