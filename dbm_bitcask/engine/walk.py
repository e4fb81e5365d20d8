"""Walk: the keys of the database in the order of the log.

A walk covers the log up to the tail T at its start, and asks the keydir about each record that it meets, at location L:

    the slot of its key is at L          yield it
    there is no slot                     skip it: the key is deleted
    the slot is before T                 skip it: the walk comes there, or was there
    the slot is at T or beyond           overwritten, or moved by a merge, since: yield the key once, and remember that

A record that has expired is skipped, too, if the slot is its own, and so is one beyond T.

So every key that is present all the time is met exactly once, and the walk ends, whatever happens meanwhile. The segments are mapped
until they have been walked, so that a merge does not take them away. Memory: only keys that moved beyond T are remembered.

Where a record was lost whose key is not known, what stands before it may be older than that: the walk begins behind it, and ends with the
error, as it does where a record is damaged whose key the slot knows.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from . import contents, record, segment
from . import header as at
from .errors import error
from .expiry import has_passed, is_expired
from .header import BASE, MASK32
from .hint import decode
from .log import Gone
from .page import Damaged, locations
from .record import BATCH, CHECKSUM_SIZE, EXPIRES, EXTENDED, HEADER, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import File
    from .log import Log
    from .manifest import Entry

__all__ = ["walk"]

_EXPIRY = struct.Struct("<Q")
_SKIPPED = contents.OVERHEAD | TOMBSTONE
_FILES = 64  # that a walk keeps open where they cannot be mapped
_BLOCK = 2**16  # bytes that are read first where they cannot be mapped: whoever wants one key needs no more


def walk(log: Log, start: int = 0, *, hold: bool = True) -> Iterator[tuple[bytes, int]]:
    """Every present key with a location of its record, from location `start` on. O(bytes of hints, or of records without one).

    Without `hold`, for those who want the first keys only, a segment is opened when its turn comes, and the walk ends if it is gone.
    Where records are damaged, every key that is sure is yielded first; then `CorruptionError` tells of the others.
    """
    log.look_beside()
    tail, segments = _hold(log, start, hold=hold)
    moved: set[bytes] = set()
    damage = log.keydir.words[at.DAMAGED]
    start = max(start, damage)
    segments = [held for held in reversed(segments) if held.entry.id >= start >> 32]
    while segments:
        held = segments.pop()
        epoch = log.epoch
        try:
            held.open()
        except Gone as gone:
            log.require_change(epoch, gone)
            if hold:
                reason = "was merged away while more segments were iterated than there may be open files; begin again"
                raise error(f"{gone} {reason}") from None
            return
        first = start & MASK32 if start >> 32 == held.entry.id else segment.FIRST_RECORD
        yield from _walk_segment(log, held, first, tail, moved)
        damage = damage or (held.entry.id << 32 | held.damage[0] if held.damage else 0)
    if damage:
        raise log.corrupt(damage, "keys were lost here; all that are sure have been listed; run `repair`")


def _hold(log: Log, start: int, *, hold: bool) -> tuple[int, list[Held]]:
    """The tail, and the segments from `start` up to it, all of one moment."""
    while True:
        if not log.is_current():
            log.follow()
        epoch, (entries, growing, active) = log.epoch, log.held
        _, tail = log.published()
        try:
            held = [
                _hold_active(log, entry, active, tail) if entry is growing else Held(log, entry, entry.length)
                for entry in entries.values()
                if start >> 32 <= entry.id <= tail >> 32
            ]
            for number, segment_held in enumerate(held if hold else ()):
                if log.can_map or number < _FILES:
                    segment_held.open(one_of_many=number >= log.maps)
        except Gone as gone:
            log.require_change(epoch, gone)
            continue
        if log.keydir.words[at.EPOCH] == epoch == log.epoch:
            return tail, held


def _hold_active(log: Log, entry: Entry, file: File, tail: int) -> Held:
    held = Held(log, entry, tail & MASK32 if entry.id == tail >> 32 else segment.FIRST_RECORD)
    held.keep(file)
    return held


def _walk_segment(log: Log, held: Held, first: int, tail: int, moved: set[bytes]) -> Iterator[tuple[bytes, int]]:
    """The inner loop: one turn a record. Written out in one function for `keys()`; `python -m compat.peers` times it."""
    base = held.entry.id << 32
    xxh3 = xxh3_64_intdigest
    epoch, (words, directory, shift, seed, checked) = log.epoch, log.keydir.table
    listed = held.entry.id in log.entries
    for offset, _, flags, key, expiry in held.keys(first):
        if flags & _SKIPPED:
            continue
        if words[at.EPOCH] != epoch:
            log.follow()
            epoch, (words, directory, shift, seed, checked) = log.epoch, log.keydir.table
            listed = held.entry.id in log.entries
        location = base | offset
        hashed = xxh3(key, seed)
        index = hashed >> shift
        page = directory[index] & BASE
        place = hashed & 0x1FE
        if checked[index] and listed:
            try:
                while (word := words[page + place]) and word != hashed:
                    place = (place + 2) & 0x1FE
                    if place == hashed & 0x1FE:
                        break
                if word == hashed and words[page + place + 1] == location:
                    if not flags & EXPIRES or not has_passed(expiry):
                        yield key, location
                    continue
            except IndexError:  # the keydir has grown since
                pass
        due = _due(log, key, location, tail, moved)
        if due and not (due == location and flags & EXPIRES and has_passed(expiry)):
            yield key, due


def _due(log: Log, key: bytes, location: int, tail: int, moved: set[bytes]) -> int:
    """The whole of the rule, where the first slot of the hash is not the record's own: the location to yield, or 0."""
    while True:
        slots = _slots(log, key)
        if location in slots:
            return location
        if key in moved:
            return 0
        epoch = log.epoch
        try:
            for slot in slots:
                if slot >= tail and (found := log.peek(slot)).key == key:
                    if found.flags & EXPIRES and is_expired(log.read(slot)):
                        return 0
                    moved.add(key)
                    return slot
        except Gone as gone:
            log.require_change(epoch, gone)
            continue
        return 0


def _slots(log: Log, key: bytes) -> list[int]:
    """The locations in the slots of a key's hash."""
    while True:
        epoch, table = log.epoch, log.keydir.table
        try:
            slots = locations(table, key)
        except Damaged:
            if table.words[at.EPOCH] == epoch:
                log.recover(damaged=True)
            else:
                log.follow()
            continue
        if table.words[at.EPOCH] == epoch == log.epoch:
            return [location for location in slots if location >> 32 in log.entries]
        log.follow()


class Held:
    """A segment that a walk keeps mapped, up to the end that it had when the walk began."""

    def __init__(self, log: Log, entry: Entry, end: int) -> None:
        self.entry = entry
        self.end = end
        self.file: File | None = None  # of those that cannot be mapped
        self.buffer: Buffer | None = None
        self.damage: list[int] = []  # offsets
        self._directory = log.directory

    def open(self, *, one_of_many: bool = False) -> None:
        """Map the segment, or keep its file open; `Gone` if it is not there."""
        if self.buffer is not None or self.file is not None:
            return
        try:
            file = segment.open_segment(self._directory, self.entry)
        except FileNotFoundError as missing:
            raise Gone(str(missing.filename)) from missing
        self.keep(file, one_of_many=one_of_many)

    def keep(self, file: File, *, one_of_many: bool = False) -> None:
        """Hold on to the bytes of the segment, whose file this is."""
        if not self._directory.can_map:
            self.file = file
        else:
            self.buffer = segment.map_one_of_many(file, self.end) if one_of_many else segment.map_segment(file, self.end)

    def keys(self, first: int) -> Iterator[tuple[int, int, int, bytes, int]]:
        """What a hint has, of each record from `first` on, from the hint or verified; what does not verify is noted as damage."""
        hint = contents.mapped_hint(self._directory, self.entry) if first == segment.FIRST_RECORD else None
        return self._raw_keys(first) if hint is None else decode(hint)

    def _first_keys(self, offset: int) -> Iterator[tuple[int, int, int, bytes, int]]:
        """Those of the first records, without reading more than a block; nothing of what is not as usual."""
        assert self.file is not None
        block, place = self.file.read(min(_BLOCK, self.end - offset), offset), 0
        with suppress(record.BadRecord):
            while head := record.decode_head(block, place):
                if head.flags & BATCH:
                    place += HEADER.size
                    continue
                found = record.decode(block, place, self.entry.salt ^ offset + place)
                if found is None:
                    break
                yield offset + place, found.end - place, found.flags, found.key, found.expiry
                place = found.end

    def _raw_keys(self, offset: int) -> Iterator[tuple[int, int, int, bytes, int]]:
        if self.file is not None:
            for key in self._first_keys(offset):
                yield key
                offset = key[0] + key[1]  # from where it ends, the rest is read
        unpack, size, xxh3 = HEADER.unpack_from, HEADER.size, xxh3_64_intdigest
        buffer = segment.map_segment(self.file, self.end) if self.file is not None else self.buffer
        assert buffer is not None
        data, salt, end = memoryview(buffer), self.entry.salt, self.end
        last = end - size
        while offset < end:
            checksum, length, key_end, _, flags, _ = unpack(data, offset) if offset <= last else (0, 0, 0, 0, 0, 0)
            body = offset + CHECKSUM_SIZE
            after = body + length
            if flags & BATCH and key_end == size - CHECKSUM_SIZE:
                offset += size  # what it holds is verified record by record; and the walk may end within it
                continue
            # Every record, for the length of a damaged one may lead past a good one to another good one.
            if after > end or length < size - CHECKSUM_SIZE or xxh3(data[body:after], salt ^ offset) != checksum:
                self.damage.append(offset)
                offset = segment.next_valid(data, salt, offset + record.ALIGNMENT, end) or end
                continue
            start = offset + size
            if flags & EXTENDED:
                (expiry,) = _EXPIRY.unpack_from(data, start)
                yield offset, after - offset, flags, bytes(data[start + _EXPIRY.size : body + key_end]), expiry
            else:
                yield offset, after - offset, flags, bytes(data[start : body + key_end]), 0
            offset = after
