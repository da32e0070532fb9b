"""The free pages of one shard of a cache, handed out in runs: host side, see `PageAllocator`."""

import heapq


class PagePool:
    """Free pages of one page shard, in *places*: as many pages, one after another, as a run has."""

    def __init__(self, first: int, count: int, run: int):
        self.pages = range(first, first + count)
        self._run, self._num_free = run, count
        # Places from here on were never used, so those that became free again are all below.
        self._untouched = 0
        self._whole: list[int] = []  # heap of places below that are wholly free
        self._partly: dict[int, int] = {}  # free pages of other places that have some, as bits
        self._lowest: list[int] = []  # heap of these places, and of some that are so no more
        self._listed: set[int] = set()  # what the heap holds

    def __len__(self) -> int:
        """How many pages are free."""
        return self._num_free

    def take(self, after: int | None) -> int:
        """The page that goes on with a run, after a sequence's last page; or that begins one."""
        place, bit = self._following(after) or self._first_free()
        self._put(place, self._free_of(place) & ~(1 << bit))
        self._num_free -= 1
        return self.pages[place * self._run + bit]

    def give(self, page: int) -> None:
        """Takes a page back."""
        place, bit = divmod(page - self.pages.start, self._run)
        self._put(place, self._partly.get(place, 0) | 1 << bit)
        self._num_free += 1

    def _following(self, page: int | None) -> tuple[int, int] | None:
        """Place and bit of the page after another, if it is of the same run and free."""
        if page is None:
            return None
        place, bit = divmod(page + 1 - self.pages.start, self._run)
        return (place, bit) if bit and self._partly.get(place, 0) >> bit & 1 else None

    def _first_free(self) -> tuple[int, int]:
        place = self._lowest_place()
        free = self._free_of(place)
        return place, (free & -free).bit_length() - 1

    def _lowest_place(self) -> int:
        """The lowest place that is wholly free, or else the lowest that has a free page."""
        if self._whole:
            return heapq.heappop(self._whole)
        if self._untouched * self._run < len(self.pages):
            self._untouched += 1
            return self._untouched - 1
        while self._lowest[0] not in self._partly:
            self._listed.remove(heapq.heappop(self._lowest))
        return self._lowest[0]

    def _put(self, place: int, free: int) -> None:
        """Remembers which pages of a place are free."""
        self._partly.pop(place, None)
        if free == self._all_of(place):
            heapq.heappush(self._whole, place)
        elif free:
            self._partly[place] = free
            if place not in self._listed:
                self._listed.add(place)
                heapq.heappush(self._lowest, place)

    def _free_of(self, place: int) -> int:
        """The free pages of a place that has some, as bits."""
        return self._partly.get(place) or self._all_of(place)

    def _all_of(self, place: int) -> int:
        return (1 << min(self._run, len(self.pages) - place * self._run)) - 1
