"""Merge: cleans the log. Space of records that no slot points at is given back.

For each victim, oldest first:

    1. In slices under the lock: each record that its slot still points at is appended again at the tail. The order in the log stays the
       only order, so an old value never comes back over a newer one. A crash leaves some records copied and the victim listed.
    2. A tombstone is dropped if no listed segment is older than its own; else it is appended again if its key is still absent. Dropping
       it earlier would bring an older value back at the next rebuild. A tombstone takes the place of a record that has expired.
    3. Sync the active segment: what was copied is durable before the victim goes.
    4. If nothing in the victim counts any more, commit a manifest without it, and unlink it. A crash between the two leaves a file that
       nobody lists; the next writer removes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import contents, rotation, segment, write
from . import header as at
from .expiry import expired_bytes, now
from .header import MASK32
from .record import TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from .log import Log
    from .manifest import Entry

__all__ = ["MergeResult", "merge"]

_SLICE = 256  # records that are looked at under one hold of the lock
_MANY_TOMBSTONES = 4  # one over the part of the log from which on they are many
_WORTH = 64  # a victim gives back at least the 64th part of itself, or is small enough to be joined with another


class MergeResult(NamedTuple):
    """What a merge did. `reclaimed` is the bytes by which the log became shorter."""

    segments: int
    reclaimed: int


def merge(log: Log, locked: Callable[..., int], progress: Callable[[int, int], object] | None = None) -> MergeResult:
    """Clean every segment that is worth it; `locked(action, ...)` runs an action under the lock. O(bytes of the victims).

    `progress(done, total)` is called now and then, in bytes.
    """
    locked(_seal_if_worth)
    before = _total(log)
    victims = _victims(log)
    total = sum(entry.length for entry in victims)
    done = cleaned = 0
    for victim in victims:
        offset = segment.FIRST_RECORD
        while 0 < offset < victim.length:
            offset = locked(_copy_slice, victim, offset)
            if progress is not None:
                progress(done + offset, total)
        if offset:
            log.durable(log.active.sync_contents)
            cleaned += locked(_drop_if_empty, victim)
        done += victim.length
    return MergeResult(cleaned, before - _total(log))


def _total(log: Log) -> int:
    return sum(entry.length for entry in log.manifest.segments) + (log.keydir.counter(at.TAIL) & MASK32)


def _seal_if_worth(log: Log) -> int:
    log.require_undamaged()  # or what may be older would be copied behind what was lost
    row = log.rows[log.manifest.active.id]
    words = log.keydir.words
    dead = words[row + at.ROW_DEAD] + (log.keydir.counter(at.TOMBSTONES) if _can_tombstones_go(log) else 0)
    dead += expired_bytes(words, row, now())
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
    moment = now()
    for number, entry in enumerate(sealed):
        gone = words[rows[entry.id] + at.ROW_DEAD] - rotation.SEAL_LENGTH + expired_bytes(words, rows[entry.id], moment)
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
    return bool((tombstones + log.keydir.counter(at.TOMBSTONES)) * _MANY_TOMBSTONES > _total(log))


def _copy_slice(log: Log, victim: Entry, offset: int) -> int:
    """Look at some records of the victim from `offset` on: where the next slice begins; 0 if there is damage, which is never dropped."""
    if victim.id not in log.entries:
        return victim.length  # somebody else merged or cleared it away
    buffer = log.whole(victim)
    oldest = log.manifest.segments[0].id == victim.id
    reading = contents.Reading(buffer, victim, victim.length)
    for number, (at_offset, found) in enumerate(reading.records(offset)):
        if reading.damage:
            return 0
        if number == _SLICE:
            return at_offset
        if found.flags & contents.OVERHEAD:
            continue
        if not (oldest and found.flags & TOMBSTONE):
            write.keep(log, victim.id << 32 | at_offset, found)
    return 0 if reading.damage else victim.length


def _drop_if_empty(log: Log, victim: Entry) -> int:
    """Drop the victim if nothing in it counts; a damaged record that a slot points at keeps it."""
    if victim.id not in log.entries:
        return 0
    words, row = log.keydir.words, log.rows[victim.id]
    live = victim.length - segment.FIRST_RECORD - words[row + at.ROW_DEAD] - words[row + at.ROW_TOMBSTONES]
    if live:
        return 0
    rotation.relist(log, victim.id)
    return 1
