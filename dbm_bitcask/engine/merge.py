"""Merge: cleans the log. Space of records that no slot points at is given back.

For each victim, a sealed segment:

    1. In slices under the lock: each record that its slot still points at is appended again at the tail. The order in the log stays the
       only order, so an old value never comes back over a newer one. A crash leaves some records copied and the victim listed.
    2. A tombstone is dropped if every segment that is older than its own is cleaned already, and goes with it or before it; else it is
       appended again if its key is still absent. Dropping it earlier would bring an older value back at the next rebuild.
       A tombstone takes the place of a record that has expired.
    3. When the last record has been looked at, the victim's row is marked as cleaned (`rotation.CLEANED`, `CLEANED_BEHIND`). Nothing in it
       can come to count again. One with damage in it is marked as kept, and one with a record that is too large to be moved as left: when
       nothing in it counts any more, it is cleaned.
    4. Whoever starts a new segment next leaves the cleaned ones out of the manifest that it commits, which costs nothing more; if they are
       many, or somebody asked for the merge, they are dropped by a commit of their own. Before either the active segment is synced: what
       was copied is durable before the victim goes. A crash between commit and unlink leaves a file that nobody lists; the next writer
       removes it.

The log is cleaned online by those who make bytes dead. About one overwrite or deletion in 256, or more if they are large, pays for all of
them with a slice (`pay`): which one, the checksum of its record says, so that short scripts take their part without any state. A slice
frees twice the bytes that these writes stand for, and lasts for some milliseconds at most. The victim that is worked at, and how far,
stands in the header as MERGE_CURSOR: processes continue each other's work. A new victim is chosen while half of the log is dead: the
segment of which most is.

Sources: Sheehy and Smith, Bitcask (2010), for merging; Rosenblum and Ousterhout, The Design and Implementation of a Log-Structured File
System, ACM TOCS 10(1), 1992, for cleaning by the part that lives.
"""

from __future__ import annotations

from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Any, NamedTuple

from xxhash import xxh3_64_intdigest

from . import contents, record, rotation, segment, write
from . import header as at
from .header import BASE, MASK32
from .page import SLOT_MASK, locations
from .record import BATCH, BODY, CHECKSUM_SIZE, HEADER, SYNCED, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from .keydir import Keydir
    from .log import Log
    from .manifest import Entry

__all__ = ["MergeResult", "merge", "pay", "work"]

_SLICE = 256  # records that are looked at under one hold of the lock
_BREATH = 0.0001  # seconds between two holds
_MANY_TOMBSTONES = 4  # one over the part of the log from which on they are many
_WORTH = 64  # a victim gives back at least the 64th part of itself, or is small enough to be joined with another
_WORTH_WRITING = 2**22  # bytes that may be dead whatever the rest: below, the fsyncs of a rotation would cost more than the space
_SPARE = 2**20  # bytes of the disk that are not for a merge, which nobody asked for
_TOO_LARGE = 2**24  # bytes of a record that is never moved, if it is larger than a segment, too: it would take the lock for too long
_MANY_SMALL = 32  # segments that there may be beyond those that the bytes of the log need
_ONE_IN = 256  # writes, of which one pays for all
_LARGE = 2**11  # bytes that a write makes dead; one that makes twice as many pays twice as often
_FREED_PER_BYTE = 2  # bytes that are looked at and dead, for each byte that is written while there is something to clean
_WRITTEN = 2**19  # bytes made dead by a write, above which its slice may last longer in proportion: a batch took longer itself
_LONGEST = 0.03  # seconds of one slice
_BYTES = 2**20  # that are looked at under one hold of the lock, besides: values may be large
_LOOKS = 64  # segments that are surveyed for each write that pays


class MergeResult(NamedTuple):
    """What a merge did. `reclaimed` is the bytes by which the log became shorter."""

    segments: int
    reclaimed: int


class _Survey(NamedTuple):
    """What there is to clean: bytes of the log and of its dead records, without what is cleaned already; the best victim, and its gain."""

    total: int
    dead: int
    victim: Entry | None
    gain: float


# Online.


def pay(log: Log, dead: int, *, rotated: bool) -> None:
    """Clean a slice, if it is the turn of a write that made so many bytes dead: for it, and for those whose turn it is not.

    Whoever has just begun a new segment pays in any case, which takes longer anyhow: or segments of few records would wait for long.
    O(bytes that they made dead); O(segments) at times.
    """
    words = log.keydir.words
    share = 1 + dead // _LARGE
    if is_due(words[words[at.CURRENT] + at.CHECKSUM], share):
        _clean_for(log, _FREED_PER_BYTE * dead * max(1, _ONE_IN // share), _LONGEST * max(1, dead // _WRITTEN), dead_part=2)
    elif rotated:
        _clean_for(log, _FREED_PER_BYTE * min(log.segment_size, _ONE_IN * _LARGE), _LONGEST, dead_part=2)


def is_due(checksum: int, share: int) -> bool:
    """Whether it is the turn of a write whose record has this checksum, `share` of 256 times: at random, without any state."""
    return checksum % _ONE_IN < share


def work(log: Log) -> bool:
    """Clean a slice while there is nothing else to do, down to a quarter of dead bytes: False if there is nothing to clean."""
    return _clean_for(log, log.segment_size, _LONGEST, dead_part=4)


def _clean_for(log: Log, budget: int, seconds: float, *, dead_part: int) -> bool:
    """Clean until so many dead bytes have been seen, or the time is up; start with a new victim only if one over `dead_part` is dead."""
    deadline = monotonic() + seconds
    words = log.keydir.words
    if words[at.DAMAGED]:
        return False  # or what may be older would be copied behind what was lost
    while budget > 0:
        cursor = words[at.MERGE_CURSOR]
        victim = log.entries.get(cursor >> 32) or _choose(log, dead_part)
        if victim is None:
            return False
        offset = cursor & MASK32 if cursor >> 32 == victim.id else segment.FIRST_RECORD
        while 0 < offset < victim.length and budget > 0 and monotonic() < deadline:
            before = log.keydir.counter(at.TAIL)
            seen, offset = offset, _clean_slice(log, victim, offset, _SLICE // 8)
            budget -= max(0, offset - seen - _distance(log, before))
        words = log.keydir.words  # copying may have made it grow
        finished = not 0 < offset < victim.length
        words[at.MERGE_CURSOR] = 0 if finished else victim.id << 32 | offset
        if not finished:
            return True
        _drop_if_many(log)
    return True


def _distance(log: Log, before: int) -> int:
    """The bytes appended since the tail was there, as far as they are in the same segment."""
    tail = log.keydir.counter(at.TAIL)
    return tail - before if tail >> 32 == before >> 32 else 0


def _choose(log: Log, dead_part: int) -> Entry | None:
    """The segment that is to be cleaned next, if enough of the log is dead. O(segments), so not at every call if they are many."""
    log.surveys_to_skip -= 1
    if log.surveys_to_skip > 0:
        return None
    found = _survey(log)
    least = min(log.segment_size, _WORTH_WRITING)
    if found.dead < least or found.dead * dead_part < found.total:
        log.surveys_to_skip = len(log.entries) // _LOOKS
        return found.victim if _are_many(log, found.total) else None
    active, length = log.manifest.active, log.keydir.counter(at.TAIL) & MASK32
    dead = rotation.dead_bytes(log, active)
    if dead * 2 >= max(length, least) and dead >= found.gain * length:
        rotation.rotate(log)
        return log.entries[active.id]
    return found.victim


def _survey(log: Log) -> _Survey:
    words, rows = log.keydir.words, log.rows
    active = log.manifest.active
    total, dead = log.keydir.counter(at.TAIL) & MASK32, rotation.dead_bytes(log, active)
    victim, gain, many = None, 0.0, _are_tombstones_many(log)
    may_copy = max(0, log.directory.free_bytes() - _SPARE)  # on a full disk, only what needs no copying: it gives space back at once
    for entry in log.manifest.segments[:-1]:
        state = words[rows[entry.id] + at.ROW_MERGED] ^ entry.salt
        stays = state == rotation.KEPT or (state == rotation.LEFT and rotation.lives_in(log, entry))
        if stays:
            many = False  # so do tombstones behind it
        if stays or state in (rotation.CLEANED, rotation.CLEANED_BEHIND):
            continue
        gone = rotation.dead_bytes(log, entry)
        total += entry.length
        dead += gone
        part = 2.0 if many else gone / entry.length
        many = False  # tombstones go with the oldest segments
        if part > gain and entry.length - segment.FIRST_RECORD - words[rows[entry.id] + at.ROW_DEAD] <= may_copy:
            victim, gain = entry, part
    return _Survey(total, total if gain > 1 else dead, victim, gain)


def _are_many(log: Log, total: int) -> bool:
    return len(log.entries) > _MANY_SMALL + 4 * total // log.segment_size


def _drop_if_many(log: Log) -> None:
    """Drop what is cleaned by a commit of its own, if it is much: else the next rotation does."""
    cleaned = rotation.cleaned(log)
    if 8 * sum(log.entries[number].length for number in cleaned) >= rotation.total(log):
        rotation.drop(log, cleaned)


# All at once.


def merge(log: Log, locked: Callable[..., Any], progress: Callable[[int, int], object] | None = None) -> MergeResult:
    """Clean every segment that is worth it; `locked(action, ...)` runs an action under the lock. O(bytes of the victims).

    `progress(done, total)` is called now and then, in bytes.
    """
    locked(_seal_if_worth)
    locked(_drop_cleaned)
    before = rotation.total(log)
    victims = locked(_victims)
    total = sum(entry.length for entry in victims)
    done = cleaned = 0
    for victim in victims:
        offset, keydir = segment.FIRST_RECORD, log.keydir
        while 0 < offset < victim.length:
            offset = locked(_clean_next, victim, offset, keydir)
            if offset == segment.FIRST_RECORD:
                keydir = log.keydir
            sleep(_BREATH)  # or the lock would be taken again before anybody who waits for it is awake
            if progress is not None:
                progress(done + offset, total)
        if offset:
            log.durable(log.active.sync_contents)  # not under the lock, if it can be had so
            cleaned += locked(_drop_cleaned)
        done += victim.length
    return MergeResult(cleaned, before - rotation.total(log))


def _seal_if_worth(log: Log) -> int:
    log.require_undamaged()  # or what may be older would be copied behind what was lost
    dead = rotation.dead_bytes(log, log.manifest.active)
    dead += log.keydir.counter(at.TOMBSTONES) if _can_tombstones_go(log) else 0
    length = log.keydir.counter(at.TAIL) & MASK32
    if dead * _WORTH >= length:
        rotation.rotate(log)
    return 0


def _victims(log: Log) -> list[Entry]:
    """Sealed segments that give something back, oldest first, and small ones if there are several to be joined.

    A tombstone gives something back only if all older segments go, too; if tombstones are a large part of the log, all do.
    """
    words, rows, sealed = log.keydir.words, log.rows, log.manifest.segments[:-1]
    if _are_tombstones_many(log) and any(words[rows[entry.id] + at.ROW_TOMBSTONES] for entry in sealed):
        return list(sealed)
    small = [entry for entry in sealed if entry.length < log.segment_size // 2]
    victims: list[Entry] = []
    for number, entry in enumerate(sealed):
        gone = rotation.dead_bytes(log, entry) - rotation.SEAL_LENGTH
        if number == len(victims):
            gone += words[rows[entry.id] + at.ROW_TOMBSTONES]
        if gone * _WORTH >= entry.length or (entry in small and len(small) > 1):
            victims.append(entry)
    return victims


def _can_tombstones_go(log: Log) -> bool:
    """Whether the merge will drop those of the active segment: all older segments go."""
    return _are_tombstones_many(log) or len(_victims(log)) == len(log.manifest.segments) - 1


def _are_tombstones_many(log: Log) -> bool:
    """Whether it is worth rewriting what they are about."""
    words, rows = log.keydir.words, log.rows
    tombstones = sum(words[rows[entry.id] + at.ROW_TOMBSTONES] for entry in log.manifest.segments[:-1])
    return bool((tombstones + log.keydir.counter(at.TOMBSTONES)) * _MANY_TOMBSTONES > rotation.total(log))


def _clean_next(log: Log, victim: Entry, offset: int, keydir: Keydir) -> int:
    """The next slice. A keydir that took the place of another knows of no segment that was cleaned: so what is behind them stays needed."""
    return _clean_slice(log, victim, offset) if log.keydir is keydir else segment.FIRST_RECORD


def _drop_cleaned(log: Log) -> int:
    cleaned = rotation.cleaned(log)
    if cleaned:
        rotation.drop(log, cleaned)
    return len(cleaned)


# One slice.


def _clean_slice(log: Log, victim: Entry, offset: int, limit: int = _SLICE) -> int:
    """Look at some records of the victim from `offset` on: where the next slice begins; 0 if it has to stay.

    The loop is written out for plain records: half of what is written is cleaned by it (`python -m compat.figures.overwrites`).
    """
    if victim.id not in log.entries or rotation.cleaning_of(log, victim):
        return victim.length  # somebody else merged or cleared it away; or cleaned it, and a rotation within this slice would drop it
    data, salt, end = log.whole(victim), victim.salt, victim.length
    behind = rotation.is_behind_cleaned(log, victim)
    xxh3, unpack, last = xxh3_64_intdigest, HEADER.unpack_from, end - HEADER.size
    stop = min(end, offset + _BYTES)
    for _ in range(limit):
        if offset >= stop:
            break
        checksum, size, key_end, padding, flags, _ = unpack(data, offset) if offset <= last else (0, 0, 0, 0, 0, 0)
        if size > write.LARGE and _is_dead(log, data, victim.id << 32 | offset, end):
            offset += CHECKSUM_SIZE + size
            continue
        if CHECKSUM_SIZE + size > max(log.segment_size, _TOO_LARGE) and not flags & BATCH:
            return _finish(log, victim, rotation.LEFT)
        source = data if size <= write.LARGE else memoryview(data)  # which is not copied
        body = source[offset + CHECKSUM_SIZE : offset + CHECKSUM_SIZE + size]
        if len(body) < max(size, BODY.size) or xxh3(body, salt ^ offset) != checksum:
            return _finish(log, victim, rotation.KEPT)
        location = victim.id << 32 | offset
        offset += HEADER.size + padding if flags & BATCH else CHECKSUM_SIZE + size  # the records of a batch follow its header
        words, directory, shift, seed, checked = log.keydir.table
        hashed = xxh3(body[BODY.size : key_end], seed) or 1
        index = hashed >> shift
        if flags & ~SYNCED or size > write.LARGE or not checked[index]:
            if not (flags & contents.OVERHEAD or (behind and flags & TOMBSTONE)):
                _keep(log, location, data)
        else:
            page = directory[index] & BASE
            place = first = page | hashed & SLOT_MASK
            while (word := words[place]) and (word != hashed or words[place + 1] != location):
                place = page | place + 2 & SLOT_MASK
                if place == first:
                    word = 0
                    break
            if word:
                write.move(log, place + 1, hashed, body)  # type: ignore[arg-type]  # never a view: those are kept
                words[at.COPIED] += CHECKSUM_SIZE + size
    return offset if offset < end else _finish(log, victim, rotation.CLEANED_BEHIND if behind else rotation.CLEANED)


def _is_dead(log: Log, data: Buffer, location: int, end: int) -> bool:
    """Whether no slot points at a large record: then it is not read. If a flipped bit says so, the count of what lives is not 0."""
    offset = location & MASK32
    head = record.decode_head(data, offset)
    if head is None or head.flags & (contents.OVERHEAD | TOMBSTONE) or offset + head.length > end:
        return False
    key = bytes(memoryview(data)[offset + head.key_start : offset + head.key_end])
    return location not in locations(log.keydir.table, key)


def _keep(log: Log, location: int, data: Buffer) -> None:
    offset = location & MASK32
    found = record.decode(data, offset, log.entries[location >> 32].salt ^ offset)
    if found is not None and write.keep(log, location, found):
        log.keydir.words[at.COPIED] += found.end - offset


def _finish(log: Log, victim: Entry, state: int) -> int:
    words, row = log.keydir.words, log.rows[victim.id] + at.ROW_MERGED
    if words[row] ^ victim.salt not in (rotation.CLEANED, rotation.CLEANED_BEHIND):  # which others may rely on
        words[row] = state ^ victim.salt
    words[at.MERGED_AT] = int(time()) & MASK32
    return 0 if state in (rotation.KEPT, rotation.LEFT) else victim.length
