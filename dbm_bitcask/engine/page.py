"""Page: 254 slots of the keydir, and how one is searched. No locks here: a search is right beside any writer.

    page      := magic:u64 counts:u64 depth:u64 checksum:u64 slot{254}    counts = used | deleted << 16
    slot      := hash:u64 location:u64                                    location = segment << 32 | offset
    directory := entry:u64{2^depth} checksum:u64{2^depth / 512}           entry = page << 9 | version << 41

The top bits of a key's hash choose the entry, the low bits the first slot to look at; from there the page is probed linearly, around its
end. A slot with hash 0 is empty and ends the search; one with location 0 is deleted. The four words of a page's head stand where two
slots would: neither is ever 0, and neither matches a hash but by a chance of 2^-64 that the record then refutes. So the search in
`lookup` needs no case for them.

A page, and each 512 entries of the directory, carry a checksum while nobody changes them (0 while somebody does). It is there for bits
that flip at rest, because a miss does not prove itself; it is checked when a process first comes there.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from .files import fence
from .header import BASE, MASK32, PAGE_WORDS, Words

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE_MAGIC, PAGE_COUNTS, PAGE_DEPTH, PAGE_CHECKSUM = range(4)
FIRST_SLOT = 4
SLOT_MASK = PAGE_WORDS - 2  # even word offsets within a page
SLOTS = (PAGE_WORDS - FIRST_SLOT) // 2
FULL = SLOTS * 3 // 4
DELETED = 1 << 16

IN_USE = int.from_bytes(b"page\1\0\0\0", "little")
UNUSED = int.from_bytes(b"free\1\0\0\0", "little")  # on the free list; the word of the checksum names the next one
_DEPTH_FLAG = 1 << 63  # keeps the word of the depth from ever being 0


class Damaged(Exception):
    """A page or a part of the directory does not verify: the keydir is to be rebuilt. Or, if the EPOCH moved, the map is too old."""


def key_hash(key: bytes, seed: int) -> int:
    """The hash of a key, never 0: that marks an empty slot."""
    return xxh3_64_intdigest(key, seed) or 1


class Table(NamedTuple):
    """What a look-up needs, as of one epoch: replaced as a whole, so that readers without a lock see parts that fit."""

    words: Words
    directory: Words
    shift: int
    seed: int
    checked: bytearray  # an item for each entry: whether this process has been there


class Probe(NamedTuple):
    """What the page of a hash holds of it. Slots are named by the word that holds their location."""

    found: list[int]  # slots with this hash that are not deleted
    free: int  # the slot to put a new one: a deleted one, else the first empty one; 0 if the page has none
    page: int


def locations(table: Table, key: bytes) -> list[int]:
    """What the slots of a key's hash say. Without the lock, compare the epoch afterwards."""
    hashed = key_hash(key, table.seed)
    words, directory, index = table.words, table.directory, hashed >> table.shift
    while True:
        entry = directory[index]
        found = [words[slot] for slot in probe(table, hashed).found]
        if fence:
            fence()
        if directory[index] == entry:  # else the page may hold something else by now
            return found


def probe(table: Table, hashed: int) -> Probe:
    """Search the page of a hash. Without the lock, compare the epoch afterwards before believing that nothing was found."""
    words, directory, shift, _, checked = table
    index = hashed >> shift
    while True:
        entry = directory[index]
        if not checked[index]:
            check_entry(table, index)
        try:
            result = _probe_page(words, (entry & BASE) // PAGE_WORDS, hashed)
        except IndexError:
            raise Damaged(f"directory entry {index} names a page that is not there") from None
        if fence:
            fence()
        if directory[index] == entry:
            return result


def _probe_page(words: Words, page: int, hashed: int) -> Probe:
    base = page * PAGE_WORDS
    found: list[int] = []
    free = 0
    place = start = hashed & SLOT_MASK
    while word := words[base + place]:
        if place >= FIRST_SLOT:
            slot = base + place + 1
            if not words[slot]:
                free = free or slot
            elif word == hashed:
                found.append(slot)
        place = (place + 2) & SLOT_MASK
        if place == start:
            return Probe(found, free, page)
    return Probe(found, free or base + place + 1, page)


def check_entry(table: Table, index: int) -> None:
    """Verify an entry of the directory and its page, for bits that flipped since they were sealed; `Damaged` if they did."""
    words, directory, shift, _, checked = table
    chunk = index // PAGE_WORDS
    chunk_seal = (1 << 64 - shift) + chunk
    while True:
        entry, chunk_sum = directory[index], directory[chunk_seal]
        page = (entry & BASE) // PAGE_WORDS
        page_seal = page * PAGE_WORDS + PAGE_CHECKSUM
        if not page or page_seal >= len(words):
            raise Damaged(f"directory entry {index} names page {page}, which is not there")
        page_sum = words[page_seal]
        if (
            words[page * PAGE_WORDS] == IN_USE
            and chunk_sum in (0, chunk_checksum(directory, chunk))
            and page_sum in (0, page_checksum(words, page))
        ):
            checked[index] = 1
            return
        if (entry, chunk_sum, page_sum) == (directory[index], directory[chunk_seal], words[page_seal]):
            raise Damaged(f"page {page} or the directory at entry {index} does not verify")


def page_checksum(words: Words, page: int) -> int:
    """The checksum of a page as it is now. Never 0."""
    base = page * PAGE_WORDS
    head = words[base + PAGE_MAGIC] ^ words[base + PAGE_COUNTS] ^ words[base + PAGE_DEPTH] ^ page
    return xxh3_64_intdigest(words[base + FIRST_SLOT : base + PAGE_WORDS], head) or 1


def chunk_checksum(directory: Words, chunk: int) -> int:
    """The checksum of 512 entries of the directory as they are now. Never 0."""
    return xxh3_64_intdigest(directory[chunk * PAGE_WORDS : (chunk + 1) * PAGE_WORDS], chunk) or 1


def empty_page() -> list[int]:
    """The words of a page without slots, as `write_page` takes them. The depth is still to come."""
    image = [0] * PAGE_WORDS
    image[PAGE_MAGIC] = image[PAGE_DEPTH] = IN_USE
    return image


def write_page(words: Words, page: int, depth: int, image: list[int]) -> None:
    """Write a fresh page that nobody is directed to yet. It stays UNUSED, and linked in the free list, until it is taken from there."""
    image[PAGE_DEPTH] = depth | _DEPTH_FLAG
    image[PAGE_MAGIC], image[PAGE_CHECKSUM] = UNUSED, words[page * PAGE_WORDS + PAGE_CHECKSUM]
    words[page * PAGE_WORDS : (page + 1) * PAGE_WORDS] = array("Q", image)


def divide(slots: Iterable[tuple[int, int]], bit: int) -> tuple[list[int], list[int]]:
    """The slots placed in two pages, by one bit of the hash (with bit 0: all in the first)."""
    low, high = empty_page(), empty_page()
    for hashed, location in slots:
        image = high if hashed & bit else low
        place = hashed & SLOT_MASK
        while image[place]:
            place = place + 2 & SLOT_MASK
        image[place] = hashed
        image[place + 1] = location
        image[PAGE_COUNTS] += 1
    return low, high


def page_depth(words: Words, page: int) -> int:
    """How many bits of the hash all keys of the page share."""
    return words[page * PAGE_WORDS + PAGE_DEPTH] & MASK32


def page_slots(words: Words, page: int, floor: int = 1) -> list[tuple[int, int]]:
    """The slots of a page with a location of at least `floor`, as (hash, location): not the deleted, nor those from before a `clear`."""
    base = page * PAGE_WORDS
    numbers = words[base + FIRST_SLOT : base + PAGE_WORDS].tolist()
    return [slot for slot in zip(numbers[::2], numbers[1::2], strict=True) if slot[1] >= floor and slot[0]]


def page_counts(words: Words, page: int) -> int:
    """The word of counts as the slots say it."""
    base = page * PAGE_WORDS
    numbers = words[base + FIRST_SLOT : base + PAGE_WORDS].tolist()
    used = SLOTS - numbers[::2].count(0)
    deleted = sum(1 for hashed, location in zip(numbers[::2], numbers[1::2], strict=True) if hashed and not location)
    return used + deleted * DELETED
