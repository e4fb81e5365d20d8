"""Rotation: how the list of segments changes. The caller holds the lock.

Starting a new segment, for a rotation or for `clear`:

    1. Create the new segment, and write the new manifest under a temporary name: what needs space comes first. A crash leaves two files
       that nobody lists.
    2. Append a seal record to the active segment: every other writer finds it longer than it thinks, whatever index it believes in.
       A crash leaves a seal at the tail; whoever comes next goes on from 1, without appending another.
    3. Sync the active segment: what the manifest calls sealed is durable, and what was copied out of the segments that it leaves out,
       because a merge has cleaned them.
    4. Enter CHANGING, note the checksum of the new manifest, and replace the manifest: the commit. A crash before it changes nothing,
       one behind it leaves NEXT_MANIFEST for whoever comes next.
    5. Bring the keydir up to it: row and counters of the new segment, MANIFEST, EPOCH. Leave CHANGING. Every part can be done again.
"""

from __future__ import annotations

import secrets
from time import time
from typing import TYPE_CHECKING

from . import header as at
from . import manifest, names, record, segment
from .expiry import expired_bytes, now
from .header import MASK32
from .log import read_manifest
from .manifest import Entry, Manifest
from .page import Damaged

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .files import Directory
    from .log import Log

__all__ = [
    "CLEANED", "CLEANED_BEHIND", "KEPT", "LEFT", "SEAL_LENGTH", "cleaned", "cleaning_of", "clear", "commit", "dead_bytes", "drop",
    "finish_commit", "is_behind_cleaned", "leave", "lives_in", "publish_manifest", "relist", "rotate", "seal_behind", "sweep", "total",
]  # fmt: skip

SEAL_LENGTH = record.record_length(record.SEAL, 0, 0)

# How far a merge came with a segment, in the word ROW_MERGED of its row, exclusive-or its salt: no flipped bit looks like one of them.
CLEANED = 1  # nothing in it counts: it can go
CLEANED_BEHIND = 2  # the same, but for tombstones that are needed as long as an older segment is listed
KEPT = 3  # there is damage in it: it never goes
LEFT = 4  # a record that counts is too large to be moved: it stays as long as anything in it counts


def rotate(log: Log, *, sealed: bool = False) -> None:
    """Seal the active segment and start a new one; `sealed` tells that a seal stands at the tail already."""
    log.sealed_here.append(log.manifest.active.id)
    end = _tail_offset(log) + SEAL_LENGTH
    gone = cleaned(log) if not log.keydir.words[at.POISON] else set()  # what was copied out of them may be what is in doubt
    kept = tuple(entry for entry in log.manifest.segments[:-1] if entry.id not in gone)
    fresh = _new_segment(log)
    temporary, listed = _list_with(log, fresh, (*kept, log.manifest.active._replace(length=end)))
    if not sealed:
        seal_behind(log, _tail_offset(log))
    log.durable(log.active.sync_contents)
    reclaimed = sum(log.entries[number].length for number in gone)
    commit(log, temporary, listed)
    _unlink(log, gone, reclaimed)


def clear(log: Log) -> None:
    """Start a new segment and list no other. O(1), but for unlinking the files."""
    fresh = _new_segment(log)
    temporary, listed = _list_with(log, fresh, ())
    seal_behind(log, _tail_offset(log))
    commit(log, temporary, listed)
    sweep(log.directory, log.manifest)


def leave(log: Log, *, sync: bool) -> None:
    """Start a new segment without a byte written to the active one, which is listed as it ends at the tail; an empty one is not kept."""
    end = _tail_offset(log)
    fresh = _new_segment(log)
    left = (log.manifest.active._replace(length=end),) if end > segment.FIRST_RECORD else ()
    temporary, listed = _list_with(log, fresh, (*log.manifest.segments[:-1], *left))
    if sync:
        log.durable(log.active.sync_contents)
    commit(log, temporary, listed)


def relist(log: Log, victim: int, replacement: tuple[Entry, ...] = ()) -> None:
    """Commit a manifest with another entry, or none, in the place of a sealed segment; unlink its files if there is none."""
    _commit_list(log, tuple(new for entry in log.manifest.segments for new in (replacement if entry.id == victim else (entry,))))
    log.directory.remove(names.hint_name(victim))
    if not replacement:
        log.directory.remove(names.segment_name(victim))


def drop(log: Log, gone: set[int]) -> None:
    """Commit a manifest without segments that are cleaned, once what was copied out of them is durable; unlink their files."""
    tail = log.keydir.counter(at.TAIL)
    if log.keydir.words[at.SYNCED_TO] != tail:
        log.durable(log.active.sync_contents)
        log.keydir.words[at.SYNCED_TO] = tail
    reclaimed = sum(log.entries[number].length for number in gone)
    _commit_list(log, tuple(entry for entry in log.manifest.segments if entry.id not in gone))
    _unlink(log, gone, reclaimed)


def _commit_list(log: Log, segments: tuple[Entry, ...]) -> None:
    _require_own_manifest(log)
    temporary, listed = write_manifest(log.directory, log.manifest._replace(number=log.manifest.number + 1, segments=segments), log.mode)
    commit(log, temporary, listed)


def _unlink(log: Log, gone: set[int], reclaimed: int) -> None:
    """Give back the space of segments that are not listed any more."""
    for number in gone:
        log.directory.remove(names.hint_name(number))
        log.directory.remove(names.segment_name(number))
    log.keydir.words[at.RECLAIMED] += reclaimed


# What is dead, and what is cleaned.


def total(log: Log) -> int:
    """The bytes of the log."""
    return sum(entry.length for entry in log.manifest.segments) + _tail_offset(log)


def dead_bytes(log: Log, entry: Entry) -> int:
    """The bytes of a segment that no record that counts takes, nor a tombstone; of those that have expired an estimate."""
    words, row = log.keydir.words, log.rows[entry.id]
    dead = int(words[row + at.ROW_DEAD])
    expired = expired_bytes(words, row, now()) if any(words[row + at.ROW_EXPIRING : row + at.ROW_EXPIRING + at.EXPIRING_ROWS]) else 0
    return min(dead + expired, log.end_of(entry)) if expired else dead


def cleaned(log: Log) -> set[int]:
    """The segments that a commit may leave out. O(segments)."""
    gone: set[int] = set()
    are_all = True
    for entry in log.manifest.segments[:-1]:
        state = cleaning_of(log, entry)
        if state == CLEANED or (state == CLEANED_BEHIND and are_all):
            gone.add(entry.id)
        else:
            are_all = False
    return gone


def is_behind_cleaned(log: Log, victim: Entry) -> bool:
    """Whether every older segment is cleaned, so that it goes before this one, or with it. O(segments that are)."""
    for entry in log.manifest.segments:
        if entry.id == victim.id:
            return True
        if not cleaning_of(log, entry):
            return False
    return False


def cleaning_of(log: Log, entry: Entry) -> int:
    """CLEANED or CLEANED_BEHIND, or 0 while something in the segment may count.

    Not by the mark alone, nor by the count of what lives alone: in a keydir that is in use a bit may have flipped in either.
    """
    state: int = log.keydir.words[log.rows[entry.id] + at.ROW_MERGED] ^ entry.salt
    return state if state in (CLEANED, CLEANED_BEHIND) and not lives_in(log, entry) else 0


def lives_in(log: Log, entry: Entry) -> int:
    """The bytes of the records of a sealed segment that count, expired ones too, but no tombstones."""
    words, row = log.keydir.words, log.rows[entry.id]
    return int(entry.length - segment.FIRST_RECORD - words[row + at.ROW_DEAD] - words[row + at.ROW_TOMBSTONES])


def _tail_offset(log: Log) -> int:
    return log.keydir.counter(at.TAIL) & MASK32


def _require_own_manifest(log: Log) -> None:
    """Commit nothing over the list of those who go by another keydir."""
    if read_manifest(log.directory).checksum != log.manifest.checksum:
        raise Damaged("the manifest is not the one that this keydir belongs to")


def _new_segment(log: Log) -> Entry:
    _require_own_manifest(log)
    fresh = Entry(log.manifest.next_id, secrets.randbits(64), 0)
    log.keydir.add_rows((fresh.id,))  # before the commit: it may need space
    segment.create(log.directory, fresh, log.mode)
    return fresh


def _list_with(log: Log, fresh: Entry, before: tuple[Entry, ...]) -> tuple[str, Manifest]:
    """Write, under a temporary name, the manifest that ends with a new segment."""
    return write_manifest(log.directory, Manifest(log.manifest.number + 1, fresh.id + 1, (*before, fresh)), log.mode)


def seal_behind(log: Log, offset: int) -> None:
    """Append a seal to the active segment, at an offset that is its end."""
    log.active.write(record.encode(record.SEAL, b"", b"", log.salt ^ offset, int(time()) & MASK32), offset)


def commit(log: Log, temporary: str, listed: Manifest) -> None:
    """Steps 4 and 5, for a manifest that stands under a temporary name."""
    words = log.keydir.words
    words[at.STATE] = at.CHANGING
    words[at.NEXT_MANIFEST] = listed.checksum
    log.directory.replace(temporary, names.MANIFEST)
    log.durable(log.directory.sync)
    finish_commit(log, listed)


def finish_commit(log: Log, listed: Manifest) -> None:
    """Step 5."""
    log.adopt(listed)
    keydir = log.keydir
    keydir.listed = log.entries
    words = keydir.words
    words[at.EPOCH] += 1  # before the tail moves, too: nobody may have the new tail with the old list
    tail = words[words[at.CURRENT] + at.TAIL]
    if tail >> 32 != listed.active.id:
        _enter(log, tail, listed.active.id << 32 | segment.FIRST_RECORD)
        words = keydir.words
    words[at.MANIFEST] = listed.checksum
    words[at.EPOCH] += 1
    at.enter(words, at.DIRTY)
    log.refresh()


def _enter(log: Log, old_tail: int, new_tail: int) -> None:
    """Move the counters to a segment without records."""
    keydir = log.keydir
    keydir.add_rows((new_tail >> 32,))
    rows, words = keydir.rows(), keydir.words
    current = words[at.CURRENT]
    other = current ^ at.OTHER
    row = rows.get(old_tail >> 32, 0)
    if not (words[other + at.START] == old_tail and words[other + at.TAIL] == new_tail):
        words[other + at.START] = 0
        words[other + at.TAIL], words[other + at.TOMBSTONES], words[other + at.CHECKSUM] = new_tail, 0, 0
        words[other + at.COUNT] = words[current + at.COUNT] if row else 0
        words[other + at.ROW] = row + at.ROW_DEAD if row else 0
        sealed = log.entries[old_tail >> 32].length - (old_tail & MASK32) if row else 0
        words[other + at.DEAD] = words[row + at.ROW_DEAD] + sealed if row else 0
        words[other + at.START] = old_tail
    if row:
        words[row + at.ROW_TOMBSTONES] = words[current + at.TOMBSTONES]
        words[row + at.ROW_DEAD] = words[other + at.DEAD]
    words[at.CURRENT] = other


def write_manifest(directory: Directory, listed: Manifest, mode: int) -> tuple[str, Manifest]:
    """Write a manifest durably under a temporary name: the name, and the manifest with its checksum."""
    data, listed = manifest.encode(listed)
    temporary = names.temporary_name(names.MANIFEST)
    file = directory.create(temporary, mode)
    try:
        file.write(data, 0)
        file.sync()
    except BaseException:
        directory.remove(temporary)
        raise
    return temporary, listed


def publish_manifest(directory: Directory, listed: Manifest, mode: int) -> Manifest:
    """Commit a manifest where no keydir has to follow it."""
    temporary, listed = write_manifest(directory, listed, mode)
    directory.replace(temporary, names.MANIFEST)
    directory.sync()
    return listed


def sweep(directory: Directory, listed: Manifest, present: Iterable[str] | None = None) -> None:
    """Delete what killed processes left: temporary files of ours, and segments and hints that are not listed."""
    ids = {entry.id for entry in listed.segments}
    for name in directory.list() if present is None else present:
        number = names.parse_segment(name) or names.parse_hint(name)
        if names.is_temporary(name) or (number is not None and number not in ids and number < listed.next_id):
            directory.remove(name)
