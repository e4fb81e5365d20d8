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
from .manifest import Entry, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .files import Directory
    from .log import Log

__all__ = ["SEAL_LENGTH", "clear", "commit", "drop", "finish_commit", "publish_manifest", "rotate", "sweep"]

SEAL_LENGTH = record.record_length(record.SEAL, 0, 0)


def rotate(log: Log, *, sealed: bool = False, seal_length: int = SEAL_LENGTH) -> None:
    """Seal the active segment and start a new one; `sealed` tells that its seal, of `seal_length`, stands at the tail already."""
    log.sealed_here.append(log.manifest.active.id)
    _start_segment(log, log.manifest.segments[:-1], keep=True, sealed=sealed, seal_length=seal_length)


def clear(log: Log) -> None:
    """Start a new segment and list no other. O(1), but for unlinking the files."""
    _start_segment(log, (), keep=False, sealed=False, seal_length=SEAL_LENGTH)
    sweep(log.directory, log.manifest)


def drop(log: Log, victim: int) -> None:
    """Commit a manifest without a segment that holds nothing any more, and unlink its files."""
    kept = tuple(entry for entry in log.manifest.segments if entry.id != victim)
    listed = log.manifest._replace(number=log.manifest.number + 1, segments=kept)
    temporary, listed = write_manifest(log.directory, listed, log.mode)
    commit(log, temporary, listed)
    log.directory.remove(names.segment_name(victim))
    log.directory.remove(names.hint_name(victim))


def _start_segment(log: Log, before: tuple[Entry, ...], *, keep: bool, sealed: bool, seal_length: int) -> None:
    words = log.keydir.words
    offset = words[words[at.CURRENT] + at.TAIL] & MASK32
    fresh = Entry(log.manifest.next_id, secrets.randbits(64), 0)
    segment.create(log.directory, fresh, log.mode)
    ended = (log.manifest.active._replace(length=offset + seal_length),) if keep else ()
    listed = Manifest(log.manifest.number + 1, fresh.id + 1, (*before, *ended, fresh))
    temporary, listed = write_manifest(log.directory, listed, log.mode)
    if not sealed:
        seal = record.encode(record.SEAL, b"", b"", log.manifest.active.salt ^ offset, int(time()))
        log.active.write(seal, offset)
    log.active.sync_contents()
    commit(log, temporary, listed)


def commit(log: Log, temporary: str, listed: Manifest) -> None:
    """Steps 4 and 5, for a manifest that stands under a temporary name."""
    words = log.keydir.words
    words[at.STATE] = at.CHANGING
    words[at.NEXT_MANIFEST] = listed.checksum
    log.directory.replace(temporary, names.MANIFEST)
    log.directory.sync()
    finish_commit(log, listed)


def finish_commit(log: Log, listed: Manifest) -> None:
    """Step 5."""
    log.adopt(listed)
    keydir = log.keydir
    keydir.listed = log.entries
    words = keydir.words
    tail = words[words[at.CURRENT] + at.TAIL]
    if tail >> 32 != listed.active.id:
        _enter(log, tail, listed.active.id << 32 | segment.FIRST_RECORD)
        words = keydir.words
    words[at.MANIFEST] = listed.checksum
    words[at.EPOCH] += 1
    words[at.STATE] = at.DIRTY
    log.refresh()


def _enter(log: Log, old_tail: int, new_tail: int) -> None:
    """Move the counters to a segment without records."""
    keydir = log.keydir
    keydir.add_row(new_tail >> 32)
    rows, words = keydir.rows(), keydir.words
    current = words[at.CURRENT]
    other = current ^ at.COUNTERS_A ^ at.COUNTERS_B
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
