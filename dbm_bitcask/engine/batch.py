"""Batch: several records that are all there after a crash, or none of them. The caller holds the lock, and `recovery.ready` was called.

A batch is one framed record whose value is a run of whole plain records, each with the checksum of its own place.

    1. Make room in the index for every key that is new: pages are split ahead. A full disk is an OSError, and nothing has changed.
    2. Append the frame by one write. A crash leaves a torn frame, which is cut as a whole, or a whole one, which is published.
    3. Note in BATCH where the frame begins, and publish it like a mark: its header is dead from the beginning, and the tail moves into
       the frame. So whoever finds the tail there knows that all of it counts.
    4. Publish its records in their order. New keys in runs: slots and counts of pages first, then one switch of the counters for all of
       them, whose START is the last record of the run. Everything else one by one, as `write.publish` does.
    5. Forget BATCH. One that is left over is harmless: the tail does not stand in that frame.

A crash within 3 or 4 is gone on from by `resume`. A record whose slot points at itself was in a run that was not counted yet: it was new.
Live readers may see a part of the batch meanwhile. Who takes no lock and needs the end of whole batches asks `Log.whole_tail`.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import Counter
from time import time
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from . import header as at
from . import record, segment, write
from .expiry import note
from .header import BASE, MASK32, PAGE_WORDS
from .page import FULL, PAGE_CHECKSUM, PAGE_COUNTS, SLOT_MASK, Damaged, check_entry, page_depth, page_slots
from .record import BATCH, BODY, CHECKSUM_SIZE, EXPIRES, EXTENDED, HEADER, SYNCED, TOMBSTONE, ZEROS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from typing_extensions import Buffer

    from .log import Log

    Item: TypeAlias = tuple[bytes, bytes | None, int, int]  # key, value (None: delete it), flags, expiry

__all__ = ["resume", "write_all"]

_U64 = struct.Struct("<Q")
_EXACT = TOMBSTONE | EXPIRES  # flags of records that are published one by one
_RUN = 1024  # new keys that are counted at once: so much `len` of a live reader may be behind
_KEYS_A_PAGE = 32  # that a page has room for, as far as an index that cannot grow later is to be made larger


class _Run(NamedTuple):
    """The records of a frame, or those of them that are not published yet."""

    keys: list[bytes]
    exact: dict[int, int]  # flags of those that are published one by one, by their number
    hashes: list[int]
    starts: list[int]  # locations; the last is the end of the frame
    buffer: Buffer
    origin: int  # location of the beginning of the buffer

    def checksum(self, number: int) -> int:
        found: int = _U64.unpack_from(self.buffer, self.starts[number] - self.origin)[0]
        return found


def write_all(log: Log, items: Sequence[Item], *, again: bool = False) -> bool:
    """Write the items, each of another key, all or nothing; False if there was nothing to do.

    Deletions of absent keys are left out, but for those that are written `again`, because an older segment may have something of the key.
    """
    wanted = [item for item in items if again or item[1] is not None or write.locate(log, item[0], room=False).location]
    if len(wanted) <= 1 and not again:
        for key, value, flags, expiry in wanted:
            if value is None:
                write.delete(log, key)
            else:
                write.put(log, key, value, flags, expiry)
        return bool(wanted)
    hashes = _hashes(log, [item[0] for item in wanted])
    _make_room(log, hashes)
    run = _append(log, wanted, hashes)
    words = log.keydir.words
    for key, value, flags, expiry in wanted:  # before anything is published: counted twice they do no harm
        if flags & EXPIRES:
            note(words, log.rows[run.origin >> 32], record.record_length(flags, len(key), len(value or b"")), expiry)
    words[at.BATCH] = run.origin
    write.publish_mark(log, run.origin, HEADER.size, _U64.unpack_from(run.buffer)[0])
    _publish(log, run)
    log.keydir.words[at.BATCH] = 0
    return True


def resume(log: Log) -> None:
    """Publish what is left of the frame that the tail stands in, or behind. O(records that are left)."""
    tail = log.keydir.counter(at.TAIL)
    begun, end = log.batch_around(tail)
    if begun:
        offset, end = tail & MASK32, end & MASK32
        buffer, origin = segment.map_segment(log.active, end), tail - offset
        keys: list[bytes] = []
        starts = [tail]
        exact: dict[int, int] = {}
        for _, found in segment.scan(buffer, log.salt, offset, end):
            if found.flags & _EXACT:
                exact[len(keys)] = found.flags
            keys.append(found.key)
            starts.append(origin + found.end)
        if starts[-1] != origin + end:
            raise Damaged("a record of a batch does not verify, of which the frame did")
        hashes = _hashes(log, keys)
        _recount(log, hashes)
        _make_room(log, hashes)
        _publish(log, _Run(keys, exact, hashes, starts, buffer, origin))
    log.keydir.words[at.BATCH] = 0


def _hashes(log: Log, keys: list[bytes]) -> list[int]:
    seed = log.keydir.table.seed
    return [xxh3_64_intdigest(key, seed) or 1 for key in keys]


# Room for new keys.


def _make_room(log: Log, hashes: list[int]) -> None:
    """Split pages until each has room for the keys that are new; take the checksums off those that will change."""
    keydir = log.keydir
    words, directory, shift, _, checked = keydir.table
    coming: Counter[int] = Counter()
    for index, number in Counter([hashed >> shift for hashed in hashes]).items():
        if not checked[index]:
            check_entry(keydir.table, index)
        coming[directory[index] & BASE] += number
    tight = {base for base, number in coming.items() if (words[base + PAGE_COUNTS] & 0xFFFF) + number > FULL}
    if tight:
        log.pages_wanted = len(hashes) // _KEYS_A_PAGE  # if the index has to be made anew for it
        _split_ahead(log, sorted([hashed for hashed in hashes if directory[hashed >> shift] & BASE in tight]))
        log.pages_wanted = 0
        words, directory, shift, _, checked = keydir.table
    for index in {hashed >> shift for hashed in hashes}:
        base = directory[index] & BASE
        if not checked[index]:
            check_entry(keydir.table, index)
        if words[base + PAGE_CHECKSUM]:
            keydir.unseal(base // PAGE_WORDS)


def _split_ahead(log: Log, hashes: list[int]) -> None:
    """The same for the pages of these hashes, which are in order."""
    keydir = log.keydir
    first = 0
    while first < len(hashes):
        hashed = hashes[first]
        words, directory, shift = keydir.table[:3]
        page = (directory[hashed >> shift] & BASE) // PAGE_WORDS
        rest = 64 - page_depth(words, page)
        end = bisect_left(hashes, (hashed >> rest) + 1 << rest, first) if rest >= 0 else first
        if end == first:
            raise Damaged(f"page {page} says that it is deeper than a hash is long")
        used = words[page * PAGE_WORDS + PAGE_COUNTS] & 0xFFFF
        free = max(0, FULL - used)
        coming = end - first - used  # at least, for at most so many of them are there
        if coming <= free:
            present = {slot[0] for slot in page_slots(words, page)}
            coming = sum([one not in present for one in hashes[first:end]])
        if coming <= free:
            first = end
        else:
            keydir.split(page, hashed, coming)


def _recount(log: Log, hashes: list[int]) -> None:
    """Count the pages anew: somebody died in a run."""
    directory, shift = log.keydir.table.directory, log.keydir.table.shift
    for base in {directory[hashed >> shift] & BASE for hashed in hashes}:
        log.keydir.recount(base // PAGE_WORDS)


# The frame.


def _append(log: Log, items: list[Item], hashes: list[int]) -> _Run:
    """Append the frame at the tail, in a new segment if it does not fit."""
    length = HEADER.size + sum([HEADER.size + len(item[0]) + len(item[1] or b"") + 7 & ~7 for item in items])
    length += sum([_U64.size for item in items if item[2] & EXTENDED and item[1] is not None])
    tail, words = write.make_room(log, length), log.keydir.words
    now = int(time()) & MASK32
    frame, starts = _encode(items, tail, log.salt, now)
    size = len(frame) - CHECKSUM_SIZE
    flags = BATCH | (SYNCED if words[at.SYNCED_TO] == tail else 0)
    frame[CHECKSUM_SIZE : HEADER.size] = BODY.pack(size, BODY.size, 0, flags, now)
    offset = tail & MASK32
    frame[:CHECKSUM_SIZE] = _U64.pack(xxh3_64_intdigest(memoryview(frame)[CHECKSUM_SIZE:], log.salt ^ offset))
    log.active.write(frame, offset)  # not as bytes, which would be a copy
    exact = {number: _flags(item) for number, item in enumerate(items) if item[1] is None or item[2] & _EXACT}
    return _Run([item[0] for item in items], exact, hashes, starts, frame, tail)


def _flags(item: Item) -> int:
    return TOMBSTONE if item[1] is None else item[2]


def _encode(items: list[Item], tail: int, salt: int, now: int) -> tuple[bytearray, list[int]]:
    """A frame whose header is still to come, and where its records begin. One turn a record, written out for `compat.figures.bulk_load`."""
    frame, starts = bytearray(HEADER.size), []
    segment_id, offset = tail & ~MASK32, (tail & MASK32) + HEADER.size
    xxh3, pack, pack_checksum, key_start, zeros = xxh3_64_intdigest, BODY.pack, _U64.pack, BODY.size, ZEROS
    for key, value, flags, expiry in items:
        starts.append(segment_id | offset)
        if value is None or flags:
            data = record.encode(flags if value is not None else TOMBSTONE, key, value or b"", salt ^ offset, now, expiry)
            frame += data
            offset += len(data)
            continue
        key_end = key_start + len(key)
        size = key_end + len(value)
        padding = -size & 7
        size += padding
        body = pack(size, key_end, padding, 0, now) + key + zeros[padding] + value
        frame += pack_checksum(xxh3(body, salt ^ offset))
        frame += body
        offset += 8 + size
    starts.append(segment_id | offset)
    return frame, starts


# Publishing.


def _publish(log: Log, run: _Run) -> None:
    """Step 4. One turn a record, written out for `compat.figures.bulk_load`."""
    words, directory, shift = log.keydir.table[:3]
    starts, exact = run.starts, run.exact
    pages: list[int] = []  # of the slots that were stored and not counted yet
    begun = 0  # the first record that is not counted yet
    for number, hashed in enumerate(run.hashes):
        base = directory[hashed >> shift] & BASE
        slot = first = base | hashed & SLOT_MASK
        while (word := words[slot]) and word != hashed:
            slot = base | slot + 2 & SLOT_MASK
            if slot == first:
                raise Damaged(f"page {base // PAGE_WORDS} has no empty slot")
        if (word and words[slot + 1] != starts[number]) or number in exact:
            _count(log, run, begun, number, pages)
            _publish_one(log, run, number)
            begun, pages = number + 1, []
            words, directory, shift = log.keydir.table[:3]
            continue
        if not word:
            words[slot] = hashed
            words[slot + 1] = starts[number]
            pages.append(base)
        if number - begun == _RUN:
            _count(log, run, begun, number + 1, pages)
            begun, pages = number + 1, []
    _count(log, run, begun, len(run.hashes), pages)


def _count(log: Log, run: _Run, begun: int, end: int, pages: list[int]) -> None:
    """Count a run of new keys whose slots have been stored."""
    if begun < end:
        words = log.keydir.words
        for base, number in Counter(pages).items():
            words[base + PAGE_COUNTS] += number
        write.publish_run(log, end - begun, run.starts[end - 1], run.starts[end], run.checksum(end - 1))


def _publish_one(log: Log, run: _Run, number: int) -> None:
    """Publish a record that overwrites or deletes another, or of which more has to be counted than that it is there."""
    flags, start = run.exact.get(number, 0), run.starts[number]
    place = write.locate(log, run.keys[number], room=not flags & TOMBSTONE)
    if place.location == start:
        place = place._replace(location=0, length=0)
    write.publish(log, place, start, run.starts[number + 1] - start, run.checksum(number), flags=flags)
