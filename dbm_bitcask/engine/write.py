"""Write: how one operation changes log and index. The caller holds the lock, and `recovery.ready` has been called.

    1. Find the place of the key, and make room for it: a full page is split, which asks for space before anything changes.
    2. Append the record. From here on the segment is longer than TAIL says: whoever comes next finds the operation unfinished.
    3. Prepare the other copy of the counters, its START last.
    4. Store the slot.
    5. Store the dead bytes of the segment that held the old record; make the copy current.

A crash after 2 or 3 is finished by `recovery.repair`, from the record or from the prepared counters; both give the same. Nothing here
cuts anything back: a failed call leaves what it leaves, and the next operation repairs.
"""

from __future__ import annotations

import struct
from time import time
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from . import header as at
from . import record, rotation
from .errors import CorruptionError
from .expiry import is_expired, note
from .files import fence
from .header import BASE, COUNT, CURRENT, DIRTY, EPOCH, HELD_SINCE, HOLDER, MASK32, OTHER, START, STATE, SYNCED_TO, TOMBSTONES
from .log import Gone
from .page import FULL, PAGE_CHECKSUM, PAGE_COUNTS, SLOT_MASK, key_hash, probe
from .record import BODY, CHECKSUM_SIZE, EXPIRES, SYNCED, TOMBSTONE, ZEROS
from .segment import FIRST_RECORD

if TYPE_CHECKING:
    from .log import Log
    from .record import Value

__all__ = [
    "LARGE", "Place", "append", "bury", "delete", "keep", "locate", "make_room", "mark", "move", "place_if_counts", "publish",
    "publish_mark", "publish_run", "put", "put_new", "settle",
]  # fmt: skip

_COUNTERS = struct.Struct("=6Q")  # TAIL, COUNT, TOMBSTONES, CHECKSUM, ROW, DEAD: START follows by itself
_U64 = struct.Struct("<Q")
_KEY_START = BODY.size
LARGE = 2**15  # bytes of a record from which on to put it together takes longer than to write it in parts


class Place(NamedTuple):
    """The slot for a key, and the record that it replaces (location 0: none)."""

    hashed: int
    slot: int
    location: int
    length: int


def locate(log: Log, key: bytes, *, room: bool) -> Place:
    """The place of a key; with `room`, one that can take a new key."""
    keydir = log.keydir
    hashed = key_hash(key, keydir.table.seed)
    found, free, _ = keydir.room(hashed) if room else probe(keydir.table, hashed)
    words = keydir.words
    for slot in found:
        location = words[slot]
        if location >> 32 not in log.entries:
            free = slot  # of a segment that is gone: as good as empty, and of this very hash
            continue
        length = length_if_same(log, location, key)
        if length is not None:
            return Place(hashed, slot, location, length)
    return Place(hashed, free, 0, 0)


def length_if_same(log: Log, location: int, key: bytes) -> int | None:
    """The length of the record if its key is this one. A damaged record counts as the same key: or it could never be replaced."""
    try:
        old = log.peek(location)
        if old.key == key:
            return old.length
        log.read(location)
    except (CorruptionError, Gone):
        return 0
    return None


def put_new(log: Log, key: bytes, value: bytes) -> bool:
    """Set a key if all is as it mostly is: the key is new, its page and the segment have room, and the database is ready. Else False.

    All steps in one function: it takes a third less time than `recovery.ready` and `put` do (`python -m compat.peers`). Needs the lock,
    and nothing else.
    """
    words, directory, shift, seed, checked = log.keydir.table
    hashed = xxh3_64_intdigest(key, seed)
    index = hashed >> shift
    if words[EPOCH] != log.epoch or log.shared_generation[0] != log.generation or words[STATE] != DIRTY or not checked[index]:
        return False
    base = directory[index] & BASE
    slot = first = base | hashed & SLOT_MASK
    while word := words[slot]:
        slot = base | slot + 2 & SLOT_MASK
        if word == hashed or slot == first:
            return False
    counts = words[base + PAGE_COUNTS]
    current = words[CURRENT]
    tail = words[current]
    offset = tail & MASK32
    key_end = _KEY_START + len(key)
    size = key_end + len(value)
    padding = -size & 7
    size += padding
    length = CHECKSUM_SIZE + size
    end = offset + length
    active = log.active
    if active.size() != offset or end > log.segment_size or counts & 0xFFFF >= FULL or words[base + PAGE_CHECKSUM] or not hashed:
        return False
    flags = SYNCED if words[SYNCED_TO] == tail else 0
    now = int(time()) & MASK32
    words[HOLDER], words[HELD_SINCE] = log.lock.pid, now
    body = BODY.pack(size, key_end, padding, flags, now) + key + ZEROS[padding]
    if length > LARGE:
        head = record.with_checksum(body, value, log.salt ^ offset)
        done = active.pwritev((head, value), offset)
        if done != length:
            active.write_rest((head, value), offset, done)
        (checksum,) = _U64.unpack_from(head)
    else:
        body += value
        checksum = xxh3_64_intdigest(body, log.salt ^ offset)
        done = active.pwrite(_U64.pack(checksum) + body, offset)
        if done != length:
            active.write((_U64.pack(checksum) + body)[done:], offset + done)
    other = current ^ OTHER
    _COUNTERS.pack_into(words, other * 8, tail + length, words[current + COUNT] + 1, words[current + TOMBSTONES], checksum, 0, 0)
    if fence:
        fence()
    words[other + START] = tail
    words[base + PAGE_COUNTS] = counts + 1
    words[slot] = hashed
    words[slot + 1] = tail
    if fence:
        fence()
    words[CURRENT] = other
    return True


def put(log: Log, key: bytes, value: Value, flags: int = 0, expiry: int = 0) -> None:
    """Set a key to a value, which is stored as it is and flagged so."""
    place = locate(log, key, room=True)
    start, length, checksum = append(log, flags, key, value, expiry=expiry)
    publish(log, place, start, length, checksum, flags=flags)


def delete(log: Log, key: bytes) -> bool:
    """Delete a key; False if it is not there."""
    place = locate(log, key, room=False)
    if not place.location or _is_expired_at(log, place.location):
        return False
    bury(log, place, key)
    return True


def _is_expired_at(log: Log, location: int) -> bool:
    """Whether a key is gone though it has a slot. A damaged record is not: or its key could never be deleted."""
    try:
        return bool(log.peek(location).flags & EXPIRES) and is_expired(log.read(location))
    except (CorruptionError, Gone):
        return False


def bury(log: Log, place: Place, key: bytes) -> None:
    """Append a tombstone of a key, whether it is there or only older segments have something of it."""
    start, length, checksum = append(log, TOMBSTONE, key, b"")
    publish(log, place, start, length, checksum, flags=TOMBSTONE)


def place_if_counts(log: Log, location: int, found: record.Record) -> Place | None:
    """The place of a record that counts: its slot points at it, or it is a tombstone whose key is still absent. Else None."""
    place = locate(log, found.key, room=False)
    return place if place.location == (0 if found.flags & TOMBSTONE else location) else None


def keep(log: Log, location: int, found: record.Record) -> bool:
    """Append a record again if it counts.

    In the place of one that has expired stands a tombstone: what is older must not come back.
    """
    place = place_if_counts(log, location, found)
    if place is None:
        return False
    if is_expired(found):
        bury(log, place, found.key)
        return True
    flags = found.flags & ~SYNCED
    start, length, checksum = append(log, flags, found.key, found.value, found.time, found.expiry)
    publish(log, place, start, length, checksum, flags=flags)
    return True


def move(log: Log, slot: int, hashed: int, body: bytes) -> None:
    """Append a plain record again that a slot points at, of which `body` is what stands behind the checksum: `keep`, without a look-up."""
    location, length = log.keydir.words[slot], CHECKSUM_SIZE + len(body)
    tail = make_room(log, length)
    offset = tail & MASK32
    body = record.with_flags(body, SYNCED if log.keydir.words[at.SYNCED_TO] == tail else 0)
    checksum = xxh3_64_intdigest(body, log.salt ^ offset)
    _append(log, _U64.pack(checksum) + body, offset)
    publish(log, Place(hashed, slot, location, length), tail, length, checksum, flags=0)


def append(log: Log, flags: int, key: bytes, value: Value, written: int | None = None, expiry: int = 0) -> tuple[int, int, int]:
    """Append a record at the tail, in a new segment if it does not fit: its location, length and checksum."""
    length = record.record_length(flags, len(key), len(value))
    tail = make_room(log, length)
    if log.keydir.words[at.SYNCED_TO] == tail:
        flags |= SYNCED
    offset = tail & MASK32
    written = int(time()) & MASK32 if written is None else written
    if length > LARGE:
        data = record.encode_before(flags, key, value, log.salt ^ offset, written, expiry)
        done = log.active.pwritev((data, value), offset)
        if done != length:
            log.active.write_rest((data, value), offset, done)
    else:
        data = record.encode(flags, key, value, log.salt ^ offset, written, expiry)
        _append(log, data, offset)
    if flags & EXPIRES:
        note(log.keydir.words, log.rows[tail >> 32], length, expiry)
        log.made_dead += length  # sooner or later
    return tail, length, _U64.unpack_from(data)[0]


def make_room(log: Log, length: int) -> int:
    """The tail, in a segment that so many bytes fit into."""
    words = log.keydir.words
    tail = words[words[at.CURRENT] + at.TAIL]
    if (tail & MASK32) + length > log.segment_size and tail & MASK32 > FIRST_RECORD:
        rotation.rotate(log)
        words = log.keydir.words
        tail = words[words[at.CURRENT] + at.TAIL]
    return int(tail)


def _append(log: Log, data: bytes, offset: int) -> None:
    done = log.active.pwrite(data, offset)
    if done != len(data):
        log.active.write(data[done:], offset + done)


def publish(log: Log, place: Place, start: int, length: int, checksum: int, *, flags: int) -> None:
    """Make the appended record the one that counts for its key."""
    keydir = log.keydir
    words = keydir.words
    current = words[at.CURRENT]
    count, tombstones = words[current + at.COUNT], words[current + at.TOMBSTONES]
    row = dead = 0
    if place.location:
        row = log.rows[place.location >> 32] + at.ROW_DEAD
        dead = words[row] + place.length
        log.made_dead += place.length
    location = start
    if flags & TOMBSTONE:
        location = 0
        count -= 1 if place.location else 0
        tombstones += length
    elif not place.location:
        count += 1
    other = current ^ OTHER
    _COUNTERS.pack_into(words, other * 8, start + length, count, tombstones, checksum, row, dead)
    if fence:
        fence()
    words[other + at.START] = start
    settle(log, place, location, other)


def publish_run(log: Log, number: int, start: int, end: int, checksum: int) -> None:
    """Count so many new keys, whose slots have been stored, of which `start` is the last one's record.

    Until this is done, the START of the other counters is not the tail: whoever comes next goes through the records one by one.
    """
    words = log.keydir.words
    current = words[at.CURRENT]
    other = current ^ OTHER
    _COUNTERS.pack_into(words, other * 8, end, words[current + at.COUNT] + number, words[current + at.TOMBSTONES], checksum, 0, 0)
    if fence:
        fence()
    words[other + at.START] = start
    if fence:
        fence()
    words[at.CURRENT] = other


def settle(log: Log, place: Place, location: int, prepared: int) -> None:
    """Steps 4 and 5: do what the prepared counters say."""
    words = log.keydir.words
    if location or place.location:
        log.keydir.store(place.slot, place.hashed, location)
    row = words[prepared + at.ROW]
    if row:
        words[row] = words[prepared + at.DEAD]
    if fence:
        fence()
    words[at.CURRENT] = prepared


def mark(log: Log) -> None:
    """Append a record that says: everything before me in this segment has been synced."""
    start, length, checksum = append(log, record.MARK, b"", b"")
    publish_mark(log, start, length, checksum)


def publish_mark(log: Log, start: int, length: int, checksum: int) -> None:
    """Count an appended mark, or the header of a batch: its bytes are dead from the beginning."""
    words = log.keydir.words
    current = words[at.CURRENT]
    other = current ^ OTHER
    row = log.rows[start >> 32] + at.ROW_DEAD
    if words[other + at.START] != start:
        count, tombstones = words[current + at.COUNT], words[current + at.TOMBSTONES]
        _COUNTERS.pack_into(words, other * 8, start + length, count, tombstones, checksum, row, words[row] + length)
        words[other + at.START] = start
    words[row] = words[other + at.DEAD]
    words[at.CURRENT] = other
