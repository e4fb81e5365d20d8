"""Check: walks every record, hint, slot and counter of a database, changes nothing, and returns what it found.

The writer lock is held meanwhile, so that log and index are of one moment. A keydir that is not trusted (after a restart of the machine,
or in a copy) is no problem: it is disposable, and is not looked at. Memory: nothing grows with the keys.
"""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from . import contents, names, recovery, segment, write
from . import header as at
from .errors import CorruptionError
from .header import MASK32, PAGE_SIZE, PAGE_WORDS
from .keydir import Keydir, map_words
from .log import Gone, Log, read_manifest, under_lock_of
from .page import (
    IN_USE,
    PAGE_COUNTS,
    PAGE_MAGIC,
    Damaged,
    check_entry,
    key_hash,
    page_counts,
    page_depth,
    page_slots,
    probe,
)
from .record import TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .hint import Hint
    from .manifest import Entry

__all__ = ["Problem", "check"]

_MOST = 10  # problems of one kind that are told of the index


class Problem(NamedTuple):
    """Something that is not as it should be: in which file, at which offset (None: the file as a whole), and what."""

    file: str
    offset: int | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.offset is None else f"{self.file} at offset {self.offset}"
        return f"{where}: {self.message}"


def check(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], files: str = "auto") -> list[Problem]:
    """Verify the database at `path`: an empty list if all is well. O(bytes).

    `files` is that of `dbm_bitcask.open`. Raises `error` if there is no database, or none that can be looked at.
    """
    return under_lock_of(os.fsdecode(path), files, lambda log: list(_check(log)))


def _check(log: Log) -> Iterator[Problem]:
    try:
        log.adopt(read_manifest(log.directory))
    except FileNotFoundError as missing:
        if missing.filename == log.directory.name:
            raise
        yield Problem(str(missing.filename), None, "the manifest lists this segment, and it is not there")
        return
    except CorruptionError as bad:
        yield Problem(bad.path, bad.offset, bad.reason)
        return
    yield from _check_names(log)
    keydir = _trusted_keydir(log)
    if keydir is None:
        yield from _check_seal(log)
    tallies: dict[int, _Tally] = {}
    index: _Index | None = None
    if keydir is not None and _is_finished(log, keydir):
        problem = _check_pages(log, keydir)
        if problem is None:
            index = _Index(log, keydir)
        else:
            yield problem
    for entry in log.manifest.segments:
        tallies[entry.id] = _Tally()
        yield from _check_segment(log, entry, keydir, index, tallies[entry.id])
    if index is not None:
        yield from _check_index(log, index, tallies)


def _check_names(log: Log) -> Iterator[Problem]:
    for name in log.directory.list():
        number = names.parse_segment(name)
        if number is not None and number > log.manifest.next_id and segment.has_records(log.directory, number):
            yield Problem(log.directory.where(name), None, "its id is above the manifest's next one: it belongs to another database")


def _check_seal(log: Log) -> Iterator[Problem]:
    """Whether a keydir of this very place is untrusted only because its header does not verify."""
    try:
        file = log.directory.open(names.KEYDIR)
    except FileNotFoundError:
        return
    if file.opened.size < PAGE_SIZE:
        return
    words = map_words(file, file.opened.size, write=False)
    sealed = words[at.STATE] in (at.CLEAN, at.RESTING) and words[at.MANIFEST] == log.manifest.checksum
    if sealed and words[at.INODE] == file.opened.inode and words[at.SEAL] != at.header_checksum(words):
        yield Problem(log.directory.where(names.KEYDIR), 0, "the header does not verify; it will be rebuilt")


def _trusted_keydir(log: Log) -> Keydir | None:
    try:
        return log.keydir if recovery.take_keydir(log) else None
    except CorruptionError:
        return None


class _Tally:
    """Bytes of one segment by what they are."""

    def __init__(self) -> None:
        self.live = 0
        self.tombstones = 0
        self.length = 0


def _check_segment(log: Log, entry: Entry, keydir: Keydir | None, index: _Index | None, tally: _Tally) -> Iterator[Problem]:
    path = log.directory.where(names.segment_name(entry.id))
    try:
        file = log.active if entry == log.manifest.active else segment.open_segment(log.directory, entry)
    except FileNotFoundError:
        yield Problem(path, None, "the manifest lists this segment, and it is not there")
        return
    except CorruptionError as bad:
        yield Problem(bad.path, bad.offset, bad.reason)
        return
    size = segment.readable_size(file)
    end = entry.length or _end_of_active(log, entry, keydir, size) or contents.torn_tail_at(segment.map_segment(file, size), entry, size)
    tally.length = end - segment.FIRST_RECORD
    reading = contents.Reading(segment.map_segment(file, end), entry, end)
    hinted = contents.read_keys(log.directory, entry) if entry.length else None
    is_hint_right = True
    for key in reading.keys():  # noqa: SIM118  (a method of that name, not a mapping)
        if hinted is not None:
            is_hint_right = is_hint_right and next(hinted, None) == key
        if index is not None:
            index.compare(entry.id, key, tally)
    for damage in reading.damage:
        yield Problem(path, damage.offset, f"{damage.end - damage.offset} bytes are no record that verifies")
    if entry.length and log.directory.identity_of(names.hint_name(entry.id)) is not None:
        path = log.directory.where(names.hint_name(entry.id))
        if hinted is None:
            yield Problem(path, None, "the hint does not verify; it is not used, and can be deleted")
        elif not reading.damage and not (is_hint_right and next(hinted, None) is None):
            yield Problem(path, None, "the hint does not list the keys of its segment; delete it")


def _end_of_active(log: Log, entry: Entry, keydir: Keydir | None, size: int) -> int:
    """The tail if the keydir knows it. What is behind it is an unfinished write, for the next writer to finish."""
    if keydir is None:
        return 0
    tail = log.whole_tail()
    return min(size, tail & MASK32) if tail >> 32 == entry.id else size


class _Index:
    """The keydir beside the log, record by record in its order. Keys without a slot are kept in another keydir, outside of memory."""

    def __init__(self, log: Log, keydir: Keydir) -> None:
        self.log = log
        self.keydir = keydir
        self.path = log.directory.where(names.KEYDIR)
        self.count = 0  # records that a slot points at
        self.stale: list[int] = []  # locations that a slot points at, behind which there is a newer record of the key
        self.without_slot = Keydir.create(log.directory.temporary_file(), 0)  # keys with a record and no slot: a tombstone is still to come

    def compare(self, number: int, key: Hint, tally: _Tally) -> None:
        location = number << 32 | key.offset
        hashed = key_hash(key.key, self.keydir.table.seed)
        slots = [self.keydir.words[slot] for slot in probe(self.keydir.table, hashed).found]
        slots = [slot for slot in slots if slot >> 32 in self.log.entries]
        if key.flags & TOMBSTONE:
            tally.tombstones += key.size
            self._note(hashed, 0)
        elif location in slots:
            tally.live += key.size
            self.count += 1
        elif max(slots, default=0) < location:
            self._note(hashed, location)
        if len(self.stale) < _MOST:
            older = (slot for slot in slots if slot < location and slot not in self.stale)
            self.stale += [slot for slot in older if write.length_if_same(self.log, slot, key.key)]

    def _note(self, hashed: int, location: int) -> None:
        found = probe(self.without_slot.table, hashed).found
        if found or location:
            self.without_slot.store(found[0] if found else self.without_slot.room(hashed).free, hashed, location)

    def slots(self) -> Iterator[tuple[int, int]]:
        """(hash, location) of each slot that points into a segment that exists."""
        for page in self.keydir.pages():
            yield from (slot for slot in page_slots(self.keydir.words, page) if slot[1] >> 32 in self.log.entries)

    def missing(self) -> Iterator[int]:
        """The newest records of keys without a slot."""
        for page in self.without_slot.pages():
            yield from (location for _, location in page_slots(self.without_slot.words, page))

    def is_of_its_key(self, hashed: int, location: int) -> bool:
        """Whether a slot points at a record of a key with its hash."""
        try:
            return key_hash(self.log.read(location).key, self.keydir.table.seed) == hashed
        except (CorruptionError, Gone):
            return False


def _is_finished(log: Log, keydir: Keydir) -> bool:
    """Whether no write is unfinished: the next writer finishes it, and then there is something to compare."""
    words = keydir.words
    return bool(words[words[at.CURRENT] + at.TAIL] & MASK32 == log.active.size() and words[at.STATE] != at.CHANGING)


def _check_pages(log: Log, keydir: Keydir) -> Problem | None:
    try:
        for index in range(1 << 64 - keydir.table.shift):
            check_entry(keydir.table, index)
    except Damaged as bad:
        return Problem(log.directory.where(names.KEYDIR), None, f"{bad}; it will be rebuilt")
    return None


def _check_index(log: Log, index: _Index, tallies: dict[int, _Tally]) -> Iterator[Problem]:
    for page in index.keydir.pages():
        yield from _check_page(index, page)
    wrong = list(_check_slots(index))
    yield from wrong or _check_counters(log, index, tallies)


def _check_page(index: _Index, page: int) -> Iterator[Problem]:
    words, path, offset = index.keydir.words, index.path, page * PAGE_SIZE
    if words[page * PAGE_WORDS + PAGE_MAGIC] != IN_USE:
        yield Problem(path, offset, "the directory names a page that is not in use")
    if words[page * PAGE_WORDS + PAGE_COUNTS] != page_counts(words, page):
        yield Problem(path, offset, "the counts of a page are not those of its slots")
    depth = page_depth(words, page)
    if depth > 64 - index.keydir.table.shift:
        yield Problem(path, offset, "a page is deeper than the directory")
    elif len({hashed >> 64 - depth for hashed, location in page_slots(words, page) if location >> 32 in index.log.entries}) > 1:
        yield Problem(path, offset, "a page holds slots that belong to another")


def _check_slots(index: _Index) -> Iterator[Problem]:
    """The first of each kind: where one slot is wrong, many may be."""
    for location in index.stale[:_MOST]:
        yield Problem(index.path, None, f"a slot points at {_place(location)}, which is not the newest record of a key")
    for location in islice(index.missing(), _MOST):
        yield Problem(index.path, None, f"no slot points at {_place(location)}, the newest record of its key")
    slots = sum(1 for _ in index.slots())
    if slots != index.count:
        yield Problem(index.path, None, f"it has {slots} slots, and the log {index.count} records that they point at")
        wrong = (location for hashed, location in index.slots() if not index.is_of_its_key(hashed, location))
        for location in islice(wrong, _MOST):
            yield Problem(index.path, None, f"a slot points at {_place(location)}, which is no record of its key")


def _place(location: int) -> str:
    return f"{names.segment_name(location >> 32)} offset {location & MASK32}"


def _check_counters(log: Log, index: _Index, tallies: dict[int, _Tally]) -> Iterator[Problem]:
    keydir, path = index.keydir, index.path
    words, rows = keydir.words, keydir.rows()
    if keydir.counter(at.COUNT) != index.count:
        yield Problem(path, None, f"it counts {keydir.counter(at.COUNT)} keys, and the log has {index.count}")
    for number, tally in tallies.items():
        row = rows.get(number)
        if row is None:
            yield Problem(path, None, f"segment {number} has no row")
            continue
        active = number == log.manifest.active.id
        tombstones = keydir.counter(at.TOMBSTONES) if active else words[row + at.ROW_TOMBSTONES]
        dead = tally.length - tally.live - tally.tombstones
        if (words[row + at.ROW_DEAD], tombstones) != (dead, tally.tombstones):
            have = f"{words[row + at.ROW_DEAD]} dead bytes and {tombstones} of tombstones"
            yield Problem(path, None, f"segment {number} counts {have}, and the log has {dead} and {tally.tombstones}")
    if words[at.STATE] in (at.CLEAN, at.RESTING) and words[at.SEAL] != at.header_checksum(words):
        yield Problem(path, 0, "the header does not verify")
