"""Backup: a copy of the database as of one moment, while others go on writing.

    1. Note the list of segments and the tail, of one epoch.
    2. Give each sealed segment and its hint a second name in the new directory, or copy it where there are no hard links. If one has been
       merged away meanwhile, begin again.
    3. Copy the active segment up to the tail, to be listed as sealed there: it is never linked, for it is still written to.
    4. List them, and a new active segment, in a manifest of the copy.

No lock is taken. The copy is made in a directory that nobody knows; to give it its name is left to the caller.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from . import header as at
from . import names, rotation, segment
from .errors import error
from .header import MASK32
from .log import Gone
from .manifest import Entry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files import Directory, File
    from .log import Log

__all__ = ["copy_to"]

_BLOCK = 2**20  # bytes that are copied at once
_TRIES = 100  # more than the merges that can come while segments are linked


def copy_to(log: Log, directory: Directory, mode: int, progress: Callable[[int, int], object] | None = None) -> None:
    """Make a database of an empty directory: what is in this one. O(segments) and the bytes of the active one; else O(bytes)."""
    for _ in range(_TRIES):
        epoch, listed, active, end = _snapshot(log)
        try:
            total, done = sum(entry.length for entry in listed.segments) + end, 0
            for entry in listed.segments[:-1]:
                _take(log.directory, directory, entry, mode)
                done += entry.length
                if progress is not None:
                    progress(done, total)
        except FileNotFoundError:  # merged away; or, if the list is still the same, it is lost
            log.require_change(epoch, Gone(log.directory.where(names.segment_name(entry.id))))
            for name in directory.list():
                directory.remove(name)
            continue
        copied = listed.segments[:-1]
        if end > segment.FIRST_RECORD:
            _copy(active, directory.create(names.segment_name(listed.active.id), mode), end)
            copied += (listed.active._replace(length=end),)
        fresh = Entry(listed.next_id, secrets.randbits(64), 0)
        segment.create(directory, fresh, mode)  # syncs the names of all
        rotation.publish_manifest(directory, Manifest(listed.number + 1, fresh.id + 1, (*copied, fresh)), mode)
        if progress is not None:
            progress(total, total)
        return
    raise error(f"{log.directory.name}: segments are merged away faster than they can be linked")


def _snapshot(log: Log) -> tuple[int, Manifest, File, int]:
    """An epoch, with its list of segments, the file of its active one, and where the records of that end."""
    log.look_beside()
    while True:
        if not log.is_current():
            log.follow()
        epoch, listed, (_, entry, active) = log.epoch, log.manifest, log.held
        before = log.keydir.counter(at.TAIL)
        _, tail = log.published()
        tail = log.batch_around(tail)[0] or tail  # of a batch that is being published, nothing
        if log.keydir.counter(at.TAIL) != before:
            continue
        if tail >> 32 == entry.id == listed.active.id and log.is_current() and log.epoch == epoch:
            return epoch, listed, active, tail & MASK32


def _take(source: Directory, directory: Directory, entry: Entry, mode: int) -> None:
    name, hint = names.segment_name(entry.id), names.hint_name(entry.id)
    if not directory.link_from(source, name):
        _copy(segment.open_segment(source, entry), directory.create(name, mode), entry.length)
    if source.identity_of(hint) is not None and not directory.link_from(source, hint):
        file = source.open(hint)
        _copy(file, directory.create(hint, mode), file.opened.size)


def _copy(source: File, file: File, end: int) -> None:
    """Copy what stands before `end`, and make it durable."""
    for offset in range(0, end, _BLOCK):
        file.write(source.read(min(_BLOCK, end - offset), offset), offset)
    file.sync()
