"""Walk: the keys of the database in the order of the log.

A walk covers the log up to the tail T at its start, and asks the keydir about each record that it meets, at location L:

    the slot of its key is at L          yield it
    there is no slot                     skip it: the key is deleted
    the slot is before T                 skip it: the walk comes there, or was there
    the slot is at T or beyond           overwritten, or moved by a merge, since: yield the key once, and remember that

So every key that is present all the time is met exactly once, and the walk ends, whatever happens meanwhile. The segments stay open
until they have been walked, so that a merge does not take them away; of more segments than a fourth of the descriptors that the process
may have, the last ones are opened when their turn comes, and it is an `error` if one is gone by then. Memory: only keys that moved beyond
T are remembered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from . import contents, record, segment
from . import header as at
from .errors import error
from .header import BASE, MASK32
from .log import Gone
from .page import Damaged, key_hash, probe
from .record import BATCH, CHECKSUM_SIZE, EXTENDED, HEADER, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import File
    from .log import Log
    from .manifest import Entry

__all__ = ["walk"]

_SKIPPED = contents.OVERHEAD | TOMBSTONE


def walk(log: Log, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Every present key with a location of its record, from location `start` on. O(bytes of hints, or of records without one).

    Where records are damaged, every key that can be read is yielded first; then `CorruptionError` tells of the others.
    """
    log.look_beside()
    tail, segments = _hold(log, start)
    moved: set[bytes] = set()
    damage = log.keydir.words[at.DAMAGED]
    segments.reverse()
    while segments:
        held = segments.pop()
        first = start & MASK32 if start >> 32 == held.entry.id else segment.FIRST_RECORD
        yield from _walk_segment(log, held, first, tail, moved)
        damage = damage or (held.entry.id << 32 | held.damage[0] if held.damage else 0)
    if damage:
        raise log.corrupt(damage, "keys were lost here; all others have been listed; run `repair`")


def _hold(log: Log, start: int) -> tuple[int, list[Held]]:
    """The tail, and the segments from `start` up to it, all of one moment."""
    while True:
        if log.keydir.words[at.EPOCH] != log.epoch:
            log.refresh()
        epoch, (entries, growing, active) = log.epoch, log.held
        _, tail = log.published()
        try:
            held = [
                _hold_active(entry, active, tail) if entry is growing else Held(log, entry, entry.length)
                for entry in entries.values()
                if start >> 32 <= entry.id <= tail >> 32
            ]
            for segment_held in held[: log.maps]:
                segment_held.open()
        except Gone as gone:
            log.require_change(epoch, gone)
            continue
        if log.keydir.words[at.EPOCH] == epoch == log.epoch:
            return tail, held


def _hold_active(entry: Entry, file: File, tail: int) -> Held:
    held = Held(None, entry, tail & MASK32 if entry.id == tail >> 32 else segment.FIRST_RECORD)
    held.file = file
    return held


def _walk_segment(log: Log, held: Held, first: int, tail: int, moved: set[bytes]) -> Iterator[tuple[bytes, int]]:
    """The inner loop: one turn a record. Written out in one function for `keys()`; `python -m compat.peers` times it."""
    base = held.entry.id << 32
    xxh3 = xxh3_64_intdigest
    epoch, (words, directory, shift, seed, checked) = log.epoch, log.keydir.table
    listed = held.entry.id in log.entries
    for offset, flags, key in held.keys(first):
        if flags & _SKIPPED:
            continue
        if words[at.EPOCH] != epoch:
            log.refresh()
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
                    yield key, location
                    continue
            except IndexError:  # the keydir has grown since
                pass
        due = _due(log, key, location, tail, moved)
        if due:
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
                if slot >= tail and log.peek(slot).key == key:
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
            slots = [table.words[slot] for slot in probe(table, key_hash(key, table.seed)).found]
        except Damaged:
            if table.words[at.EPOCH] == epoch:
                log.recover(damaged=True)
            else:
                log.refresh()
            continue
        if table.words[at.EPOCH] == epoch == log.epoch:
            return [location for location in slots if location >> 32 in log.entries]
        log.refresh()


class Held:
    """A segment that a walk keeps open, up to the end that it had when the walk began."""

    def __init__(self, log: Log | None, entry: Entry, end: int) -> None:
        self.entry = entry
        self.end = end
        self.file: File | None = None
        self.hint: Buffer | None = None
        self.damage: list[int] = []  # offsets
        self._log = log

    def open(self) -> File:
        """Open the segment, and its hint if it has one that can be used."""
        if self.file is None:
            assert self._log is not None
            try:
                self.file = segment.open_segment(self._log.directory, self.entry)
            except FileNotFoundError as missing:
                raise Gone(str(missing.filename)) from missing
            self.hint = contents.mapped_hint(self._log.directory, self.entry)
        return self.file

    def keys(self, first: int) -> Iterator[tuple[int, int, bytes]]:
        """(offset, flags, key) of each record from `first` on, from the hint or verified; what does not verify is noted as damage."""
        try:
            self.buffer: Buffer = segment.map_segment(self.open(), self.end)
        except Gone as gone:
            raise error(f"{gone} was merged away before the iteration came to it; allow more open files, or start anew") from gone
        if self.hint is not None and first == segment.FIRST_RECORD:
            return contents.hinted_keys(self.hint)
        return self._raw_keys(first)

    def _raw_keys(self, offset: int) -> Iterator[tuple[int, int, bytes]]:
        unpack, size, xxh3 = HEADER.unpack_from, HEADER.size, xxh3_64_intdigest
        data, salt, end = memoryview(self.buffer), self.entry.salt, self.end
        last = end - size
        while offset < end:
            checksum, length, key_end, padding, flags, _ = unpack(data, offset) if offset <= last else (0, 0, 0, 0, 0, 0)
            body = offset + CHECKSUM_SIZE
            after = body + length
            # Every record, for the length of a damaged one may lead past a good one to another good one.
            if after > end or length < size - CHECKSUM_SIZE or xxh3(data[body:after], salt ^ offset) != checksum:
                self.damage.append(offset)
                offset = segment.next_valid(self.buffer, salt, offset + record.ALIGNMENT, end) or end
                continue
            start = offset + size
            if flags & BATCH:
                offset = start + padding  # the records of the batch follow
                continue
            if flags & EXTENDED:
                start += 8
            yield offset, flags, bytes(data[start : body + key_end])
            offset = after
