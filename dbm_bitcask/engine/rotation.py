"""Rotation: how the list of segments changes. The caller holds the lock.

Starting a new segment, for a rotation or for `clear`:

    1. Create the new segment, and write the new manifest under a temporary name: what needs space comes first. A crash leaves two files
       that nobody lists.
    2. Append a seal record to the active segment: every other writer finds it longer than it thinks, whatever index it believes in.
       A crash leaves a seal at the tail; whoever comes next goes on from 1, without appending another.
    3. Sync the active segment: what the manifest calls sealed is durable.
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
from .header import MASK32
from .log import read_manifest
from .manifest import Entry, Manifest
from .page import Damaged

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .files import Directory
    from .log import Log

__all__ = ["SEAL_LENGTH", "clear", "commit", "finish_commit", "leave", "publish_manifest", "relist", "rotate", "seal_behind", "sweep"]

SEAL_LENGTH = record.record_length(record.SEAL, 0, 0)


def rotate(log: Log, *, sealed: bool = False) -> None:
    """Seal the active segment and start a new one; `sealed` tells that a seal stands at the tail already."""
    log.sealed_here.append(log.manifest.active.id)
    end = _tail_offset(log) + SEAL_LENGTH
    fresh = _new_segment(log)
    temporary, listed = _list_with(log, fresh, (*log.manifest.segments[:-1], log.manifest.active._replace(length=end)))
    if not sealed:
        seal_behind(log, _tail_offset(log))
    log.durable(log.active.sync_contents)
    commit(log, temporary, listed)


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
    _require_own_manifest(log)
    kept = tuple(new for entry in log.manifest.segments for new in (replacement if entry.id == victim else (entry,)))
    temporary, listed = write_manifest(log.directory, log.manifest._replace(number=log.manifest.number + 1, segments=kept), log.mode)
    commit(log, temporary, listed)
    log.directory.remove(names.hint_name(victim))
    if not replacement:
        log.directory.remove(names.segment_name(victim))


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
