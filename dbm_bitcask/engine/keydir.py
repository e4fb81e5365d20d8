"""Keydir: key -> location, as a file that every process maps: an extendible hash table.

    keydir := header-page segment-table directory pages...          in units of 4 KiB

Invariants: slots never move within a page. A page that is full is replaced by two fresh ones (or by one, if half of its slots are
deleted): they are filled first, then each entry of the directory is swung by one store, with a new version. So a miss is valid if the
entry is the same after the search as before, and no reader ever waits. Replaced pages go to a free list; directories that were outgrown
stay as they are, so that a reader that is still in one reads entries and nothing else.

Whatever a handle must learn of (a larger file, another directory, another manifest) moves the EPOCH.

Source of the idea: R. Fagin et al., Extendible Hashing, ACM TODS 4(3), 1979.
"""

from __future__ import annotations

import secrets
from array import array
from typing import TYPE_CHECKING

from . import header as at
from .errors import error
from .files import fence
from .header import BASE, MASK32, MASK64, PAGE_SIZE, PAGE_WORDS, ROW_WORDS, VERSION, Words
from .page import (
    DELETED,
    FULL,
    IN_USE,
    PAGE_CHECKSUM,
    PAGE_COUNTS,
    PAGE_MAGIC,
    UNUSED,
    Damaged,
    Probe,
    Table,
    chunk_checksum,
    divide,
    empty_page,
    page_checksum,
    page_counts,
    page_depth,
    page_slots,
    probe,
    write_page,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .files import File

__all__ = ["Keydir", "map_words"]

_FIRST_DEPTH = 9  # the directory fills a page from the start
_MAX_DEPTH = 32
_SPARE_PAGES = 4


def map_words(file: File, size: int, *, write: bool) -> Words:
    """The whole pages of a file as words."""
    return memoryview(file.map(size & -PAGE_SIZE, write=write)).cast("Q")


class Keydir:
    """The keydir as one handle maps it. Whatever changes it needs the writer lock; looking things up does not."""

    table: Table

    def __init__(self, file: File, words: Words, *, write: bool) -> None:
        """Hold a map of the file whose header has been found sound, or has just been written."""
        self.file = file
        self.words = words
        self.write = write
        self.listed: Collection[int] = ()  # the segments that exist: a slot into another one is an empty slot
        self.touched: set[int] = set()  # pages that this handle unsealed
        self.touched_chunks: set[int] = set()
        self._look_at_directory(bytearray())

    @classmethod
    def create(cls, file: File, boot: int) -> Keydir:
        """Lay out an empty keydir in an empty file, in the state DIRTY, bound to no manifest yet."""
        table, directory, first = 1, 2, 4
        pages = first + 1
        file.keep_blocks()
        file.reserve(0, (pages + _SPARE_PAGES) * PAGE_SIZE)
        identity = file.identity()
        words = map_words(file, identity.size, write=True)
        words[at.EPOCH], words[at.CURRENT], words[at.SEED] = 1, at.COUNTERS_A, secrets.randbits(64)
        words[at.DEVICE], words[at.INODE] = identity.device, identity.inode
        words[at.BOOT_LOW], words[at.BOOT_HIGH] = boot & MASK64, boot >> 64
        words[at.TABLE] = table | (directory - table) << 32
        words[at.PAGES], words[at.CAPACITY] = pages, identity.size // PAGE_SIZE
        entries = directory * PAGE_WORDS
        words[entries : entries + PAGE_WORDS] = array("Q", [first * PAGE_WORDS]) * PAGE_WORDS
        write_page(words, first, 0, empty_page())
        words[first * PAGE_WORDS + PAGE_MAGIC] = IN_USE
        words[at.UNSEALED] = 1
        words[at.STATE], words[at.ROOT], words[at.MAGIC] = at.DIRTY, directory | _FIRST_DEPTH << 32, at.MAGIC_WORD
        self = cls(file, words, write=True)
        self.touched.add(first)
        self.touched_chunks.add(0)
        return self

    # The map.

    def refresh(self) -> None:
        """Catch up with the file: it grew, or it has another directory."""
        if self.words[at.CAPACITY] * PAGE_WORDS > len(self.words):
            self.words = map_words(self.file, self.words[at.CAPACITY] * PAGE_SIZE, write=self.write)
        self._look_at_directory(self.table.checked)

    def _look_at_directory(self, known: bytearray) -> None:
        words = self.words
        root = words[at.ROOT]
        depth, start = root >> 32, (root & MASK32) * PAGE_WORDS
        directory = words[start : start + (1 << depth) + (1 << depth - 9)]
        checked = known
        if len(known) != 1 << depth:  # what was checked stays so when entries are doubled
            checked = bytearray(1 << depth)
            step = len(checked) // len(known) if known else 0
            for first in range(step):
                checked[first::step] = known
        self.table = Table(words, directory, 64 - depth, words[at.SEED], checked)

    # Counters.

    def counter(self, which: int) -> int:
        """A word of the current copy of the counters; right without the lock, too."""
        words = self.words
        while True:
            current = words[at.CURRENT]
            value: int = words[current + which]
            if fence:
                fence()
            if words[at.CURRENT] == current:
                return value

    # Slots. The caller holds the lock.

    def room(self, hashed: int) -> Probe:
        """The place of a hash, with room to insert it: a full page is split first. OSError if the disk is full; nothing changed then."""
        while True:
            place = probe(self.table, hashed)
            if self.words[place.page * PAGE_WORDS + PAGE_COUNTS] & 0xFFFF < FULL and place.free:
                return place
            self.split(place.page, hashed)

    def store(self, slot: int, hashed: int, location: int) -> None:
        """Put a location into a slot (0: delete it), and keep the counts of its page, which may be anything where bits have flipped."""
        words = self.words
        base = slot & -PAGE_WORDS
        if words[base + PAGE_CHECKSUM]:
            self.unseal(slot // PAGE_WORDS)
        before = words[slot]
        if not words[slot - 1]:
            words[base + PAGE_COUNTS] = words[base + PAGE_COUNTS] + 1 & MASK64
            words[slot - 1] = hashed
        elif not before:
            words[base + PAGE_COUNTS] = words[base + PAGE_COUNTS] - DELETED & MASK64
            words[slot - 1] = hashed
        elif not location:
            words[base + PAGE_COUNTS] = words[base + PAGE_COUNTS] + DELETED & MASK64
        words[slot] = location

    def recount(self, page: int) -> None:
        """Count the slots of a page anew: a write may have died between a slot and the counts."""
        counts = page_counts(self.words, page)
        if self.words[page * PAGE_WORDS + PAGE_COUNTS] != counts:
            self.unseal(page)
            self.words[page * PAGE_WORDS + PAGE_COUNTS] = counts

    def pages(self) -> Iterator[int]:
        """The pages that the directory names, each once, in the order of the hashes."""
        directory, shift = self.table.directory, self.table.shift
        last = 0
        for index in range(1 << 64 - shift):
            page = (directory[index] & BASE) // PAGE_WORDS
            if page != last:
                last = page
                yield page

    # Splitting a page. The caller holds the lock.

    def split(self, page: int, hashed: int, coming: int = 1) -> None:
        """Replace the full page of a hash by two, or by one without its deleted slots if that has room for so many as are coming.

        1. Double the directory if the page is as deep as it; reserve the pages. A full disk is an OSError, and nothing has changed.
        2. Fill the fresh pages. A crash leaves them unused.
        3. Note what is to be done, and enter CHANGING: from here on whoever comes next finishes.
        4. Swing the entries, free the old page, leave CHANGING.
        """
        slots = page_slots(self.words, page, min(self.listed, default=0) << 32 or 1)
        depth = page_depth(self.words, page)
        self._require_depth(page, depth, hashed)
        if len(slots) <= FULL // 2 and len(slots) + coming <= FULL:
            images: tuple[list[int], ...] = divide(slots, 0)[:1]
        else:
            images = divide(slots, 1 << 63 - depth)
            depth += 1
            if depth > 64 - self.table.shift:
                self._double()
        self._reserve(len(images))
        words = self.words
        fresh, high_water, free = self._allocate(len(images))
        words[at.UNSEALED] += len(images)
        for kid, image in zip(fresh, images, strict=True):
            write_page(words, kid, depth, image)
        words[at.SPLIT_LOW], words[at.SPLIT_HIGH], words[at.SPLIT_HASH] = fresh[0], fresh[-1], hashed
        words[at.SPLIT_PAGES], words[at.SPLIT_FREE] = high_water, free
        words[at.STATE] = at.CHANGING
        words[at.SPLIT_OLD] = page  # after the state: it must never be found in another change
        if not words[page * PAGE_WORDS + PAGE_CHECKSUM]:
            words[at.UNSEALED] -= 1
        self.touched.update(fresh)
        self._swing()
        at.enter(words, at.DIRTY)

    def _require_depth(self, page: int, depth: int, hashed: int) -> None:
        """`Damaged` unless the entries that name a page are those that its depth says: it is believed where entries are swung."""
        directory, base = self.table.directory, page * PAGE_WORDS
        entries = self._entries(depth, hashed)
        buddy = entries.start ^ len(entries)
        named = {entry & BASE for entry in directory[entries.start : entries.stop].tolist()}
        if named != {base} or (depth and directory[buddy] & BASE == base):
            raise Damaged(f"page {page} is not as deep as it says")

    def _entries(self, depth: int, hashed: int) -> range:
        """The entries of all hashes that share so many bits with this one."""
        spread = 64 - self.table.shift - depth
        if spread < 0:
            raise Damaged(f"a page says that it has depth {depth}, which is more than the directory has")
        first = hashed >> 64 - depth << spread
        return range(first, first + (1 << spread))

    def finish_split(self) -> None:
        """Leave CHANGING, from any point at which somebody may have died in it. Idempotent."""
        self.refresh()
        words = self.words
        if max(words[at.SPLIT_OLD], words[at.SPLIT_LOW], words[at.SPLIT_HIGH], words[at.SPLIT_PAGES] - 1) >= words[at.CAPACITY]:
            raise Damaged("a split is unfinished, of pages that are not there")
        if words[at.SPLIT_OLD]:
            self._swing()
        self.words[at.EPOCH] += 1
        at.enter(self.words, at.DIRTY)

    def _swing(self) -> None:
        """Step 4, as the words at SPLIT say. Idempotent."""
        words, directory = self.table.words, self.table.directory
        old = words[at.SPLIT_OLD]
        entries = self._entries(page_depth(words, old), words[at.SPLIT_HASH])
        middle = entries.start + len(entries) // 2
        for kid in {words[at.SPLIT_LOW], words[at.SPLIT_HIGH]}:
            words[kid * PAGE_WORDS + PAGE_CHECKSUM] = 0
            words[kid * PAGE_WORDS + PAGE_MAGIC] = IN_USE
        if fence:
            fence()
        for index in entries:
            entry = directory[index]
            if entry & BASE == old * PAGE_WORDS:
                self._unseal_chunk(index // PAGE_WORDS)
                kid = words[at.SPLIT_LOW if index < middle else at.SPLIT_HIGH]
                directory[index] = (entry + VERSION & MASK64 & -VERSION) | kid * PAGE_WORDS
        words[at.PAGES] = words[at.SPLIT_PAGES]
        words[old * PAGE_WORDS + PAGE_CHECKSUM] = words[at.SPLIT_FREE]
        words[old * PAGE_WORDS + PAGE_MAGIC] = UNUSED
        words[at.FREE] = old
        words[at.SPLIT_OLD] = 0

    def _allocate(self, count: int) -> tuple[list[int], int, int]:
        """Pages to use, and what PAGES and FREE will be; nothing is taken yet."""
        words = self.words
        high_water, free = words[at.PAGES], words[at.FREE]
        fresh = []
        for _ in range(count):
            page = free or high_water
            magic = words[page * PAGE_WORDS + PAGE_MAGIC] if page < words[at.CAPACITY] else IN_USE
            if magic == IN_USE or (free and magic != UNUSED) or page in fresh:
                raise Damaged(f"page {page} is not free")
            fresh.append(page)
            if free:
                free = words[free * PAGE_WORDS + PAGE_CHECKSUM]
            else:
                high_water += 1
        return fresh, high_water, free

    def _double(self) -> None:
        """Move to a directory of twice the size; the old one stays as it is."""
        depth = 65 - self.table.shift
        if depth > _MAX_DEPTH:
            raise error("the keydir cannot grow: too many keys share the beginning of their hash")
        entries, chunks = 1 << depth, 1 << depth - 9
        run = -(-(entries + chunks) // PAGE_WORDS)
        self._reserve(run)
        words, old = self.words, self.table.directory
        page = words[at.PAGES]
        start = page * PAGE_WORDS
        directory = words[start : start + entries + chunks]
        directory[0:entries:2] = directory[1:entries:2] = old[: entries // 2]
        for chunk in range(chunks):
            directory[entries + chunk] = chunk_checksum(directory, chunk) if old[entries // 2 + chunk // 2] else 0
            if not directory[entries + chunk]:
                self.touched_chunks.add(chunk)
        if fence:
            fence()
        before, words[at.STATE] = words[at.STATE], at.CHANGING
        words[at.PAGES] = page + run
        words[at.ROOT] = page | depth << 32
        words[at.EPOCH] += 1
        at.enter(words, before)
        self.refresh()

    def _reserve(self, pages: int) -> None:
        """See to it that so many pages can be written without asking the disk for space."""
        words = self.words
        capacity = words[at.CAPACITY]
        needed = words[at.PAGES] + pages
        if needed > capacity:
            larger = max(needed, capacity + capacity // 8 + _SPARE_PAGES)
            if not self.file.grows:
                raise Damaged("the keydir in memory is full: a larger one has to be made")
            self.file.reserve(capacity * PAGE_SIZE, (larger - capacity) * PAGE_SIZE)
            self.words = words = map_words(self.file, larger * PAGE_SIZE, write=True)
            before, words[at.STATE] = words[at.STATE], at.CHANGING
            words[at.CAPACITY] = larger
            words[at.EPOCH] += 1
            at.enter(words, before)
            self._look_at_directory(self.table.checked)
        elif capacity * PAGE_WORDS > len(words):
            self.refresh()

    def make_room(self, wanted: int = 0) -> None:
        """Of a keydir that nobody shares yet and that cannot grow afterwards: take twice the space that it needs, and what is wanted."""
        if not self.file.grows_shared:
            self._reserve(self.words[at.PAGES] + wanted)

    # Checksums. The caller holds the lock.

    def unseal(self, page: int) -> None:
        """Take the checksum off a page, because it is about to change."""
        words = self.words
        self.touched.add(page)
        if words[page * PAGE_WORDS + PAGE_CHECKSUM]:
            words[at.UNSEALED] += 1
            words[page * PAGE_WORDS + PAGE_CHECKSUM] = 0

    def _unseal_chunk(self, chunk: int) -> None:
        self.touched_chunks.add(chunk)
        self.table.directory[(1 << 64 - self.table.shift) + chunk] = 0

    def seal(self, limit: int) -> bool:
        """Put checksums on at most `limit` of the pages that this handle changed; True when none is left."""
        words = self.words
        for _ in range(min(limit, len(self.touched))):
            page = self.touched.pop()
            base = page * PAGE_WORDS
            if words[base + PAGE_MAGIC] == IN_USE and not words[base + PAGE_CHECKSUM]:
                words[base + PAGE_CHECKSUM] = page_checksum(words, page)
                words[at.UNSEALED] = max(0, words[at.UNSEALED] - 1)
        if self.touched:
            return False
        directory, chunks = self.table.directory, 1 << 55 - self.table.shift
        while self.touched_chunks:
            chunk = self.touched_chunks.pop()
            if chunk < chunks:
                directory[(1 << 64 - self.table.shift) + chunk] = chunk_checksum(directory, chunk)
        return True

    def touch_unsealed(self) -> None:
        """Take over the pages that others left without a checksum. O(pages)."""
        words = self.words
        pages = [page for page in self.pages() if not words[page * PAGE_WORDS + PAGE_CHECKSUM]]
        self.touched.update(pages)
        words[at.UNSEALED] = len(pages)
        directory, chunks = self.table.directory, 1 << 55 - self.table.shift
        self.touched_chunks.update(chunk for chunk in range(chunks) if not directory[(chunks << 9) + chunk])

    def rest(self, state: int) -> None:
        """Seal the header in the state RESTING or CLEAN."""
        words = self.words
        words[at.SEAL] = at.header_checksum(words)
        at.enter(words, state)

    # Segment table: one row for each segment that exists. The caller holds the lock, except for reading.

    def rows(self) -> dict[int, int]:
        """The word at which the row of each segment begins."""
        start, end = self._table_bounds()
        ids = self.words[start + at.ROW_ID : end : ROW_WORDS].tolist()
        return {segment: start + number * ROW_WORDS for number, segment in enumerate(ids) if segment in self.listed}

    def add_rows(self, segments: Collection[int]) -> None:
        """Make a row for each segment that has none: rows of segments that are gone are used again. O(rows)."""
        rows = self.rows()
        taken = set(rows.values())
        free: Iterator[int] = (row for row in range(*self._table_bounds(), ROW_WORDS) if row not in taken)
        for segment in segments:
            if segment in rows:
                continue
            row = next(free, 0)
            if not row:
                row = self._grow_table()
                free = iter(range(row + ROW_WORDS, self._table_bounds()[1], ROW_WORDS))
            words = self.words
            words[row : row + ROW_WORDS] = array("Q", bytes(8 * ROW_WORDS))
            words[row + at.ROW_ID] = segment

    def has_rows(self) -> bool:
        """Whether each segment that exists has one row, of numbers that can be."""
        start, end = self._table_bounds()
        ids = self.words[start + at.ROW_ID : end : ROW_WORDS].tolist()
        sizes = (self.words[start + which : end : ROW_WORDS].tolist() for which in (at.ROW_DEAD, at.ROW_TOMBSTONES))
        return (
            sum(1 for segment in ids if segment in self.listed) == len(self.rows()) == len(self.listed) and max(map(max, sizes)) < at.ABSURD
        )

    def _table_bounds(self) -> tuple[int, int]:
        table = self.words[at.TABLE]
        start = (table & MASK32) * PAGE_WORDS
        return start, start + (table >> 32) * PAGE_WORDS

    def _grow_table(self) -> int:
        """Move to a table of twice the size; the first free row."""
        start, end = self._table_bounds()
        run = 2 * (end - start) // PAGE_WORDS
        self._reserve(run)
        words = self.words
        page = words[at.PAGES]
        fresh = page * PAGE_WORDS
        words[fresh : fresh + (end - start)] = words[start:end]
        words[fresh + (end - start) : fresh + 2 * (end - start)] = array("Q", bytes(8 * (end - start)))
        if fence:
            fence()
        before, words[at.STATE] = words[at.STATE], at.CHANGING
        words[at.PAGES] = page + run
        words[at.TABLE] = page | run << 32
        words[at.EPOCH] += 1
        at.enter(words, before)
        return fresh + (end - start)
