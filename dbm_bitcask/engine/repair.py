"""Repair: makes of a damaged database one that opens, with everything in it that verifies. Nothing is thrown away.

    1. The list. If the manifest is there and verifies, what it lists is corrected: a segment that is missing is left out, one that is
       shorter is listed as it is, a damaged header is written anew. If it does not, or is older than the segments beside it, every segment
       whose own header verifies is listed, in the order of the ids; so what had been merged or cleared away a moment before the damage,
       and was not deleted yet, comes back.
    2. The keydir is made anew.
    3. What is left of a segment with damage is appended again, as a merge does it. A key of which the hint of the segment or the keydir
       knows that its newest record is lost is deleted: it must not have an older value instead. Where neither knows, it may get one. Then a
       manifest without the segment is committed.

Whatever is left out gets another name, with `damaged` at its end, and stays. A crash anywhere leaves something to repair.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, NamedTuple

from . import contents, manifest, names, recovery, rotation, segment, write
from . import header as at
from .errors import CorruptionError, NotFoundError, error
from .log import LARGEST_MANIFEST, Log, read_manifest, under_lock_of
from .manifest import Entry, Manifest
from .page import Damaged, check_entry, locations, page_slots
from .record import TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import File
    from .hint import Hint

__all__ = ["Step", "repair"]


class Step(NamedTuple):
    """Something that was repaired: in which file, and what was done about it."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def repair(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], files: str = "auto") -> list[Step]:
    """Repair the database at `path`: what was done, an empty list if there was nothing to do. O(bytes).

    `files` is that of `dbm_bitcask.open`. Raises `error` if there is no database, or one of a newer version, which is not touched.
    """
    return under_lock_of(os.fsdecode(path), files, lambda log: list(_repair(log)), write=True)


def _repair(log: Log) -> Iterator[Step]:
    present = {number for number in map(names.parse_segment, log.directory.list()) if number}
    listed = _listed(log, present)
    if listed is None and not present:
        raise NotFoundError(2, "no database here", log.directory.name)
    lost: list[tuple[int, Hint]] = []
    yield from _correct_list(log, listed, present, lost)
    yield from _drop_hints(log)
    opens, rested = _opens(log)
    damaged = list(_damaged(log, opens=opens))
    if not opens:
        recovery.rebuild(log)
    for location, key in lost:  # before anything is moved: what stands before the lost record is older
        if write.locate(log, key.key, room=False).location != location:  # else it is not lost
            yield from _bury(log, location, key)
    recovery.ready(log)
    if any(entry == log.manifest.active for entry, _ in damaged):
        rotation.rotate(log)
    buried: set[bytes] = set()
    if opens and damaged:
        yield from _bury_revived(log, buried)
    for entry, reading in damaged:
        yield from _salvage(log, entry, reading, buried)
    if damaged or (opens and not rested):  # what a killed process touched has no checksum
        recovery.rebuild(log)


def _opens(log: Log) -> tuple[bool, bool]:
    """Whether there is an index that can be trusted, and a whole one; and whether it was at rest, so that checksums say so of all of it."""
    try:
        if not recovery.take_keydir(log):
            return False, False
        rested = log.keydir.words[at.STATE] in (at.CLEAN, at.RESTING)
        recovery.ready(log)
        table = log.keydir.table
        for index in range(1 << 64 - table.shift):
            check_entry(table, index)
        return not log.keydir.words[at.DAMAGED], rested
    except (OSError, Damaged):
        return False, False


def _drop_hints(log: Log) -> Iterator[Step]:
    """Delete the hints that cannot be used: they hold nothing that the segments do not."""
    for entry in log.manifest.segments:
        name = names.hint_name(entry.id)
        if log.directory.identity_of(name) is not None and contents.mapped_hint(log.directory, entry) is None:
            log.directory.remove(name)
            yield Step(log.directory.where(name), "this hint does not verify, and was deleted: it is made anew when it is needed")


# The list.


def _listed(log: Log, present: set[int]) -> Manifest | None:
    """The manifest, if it verifies and belongs to the segments that are there."""
    try:
        listed = read_manifest(log.directory)
    except NotFoundError:
        return None
    except CorruptionError:
        file = log.directory.open(names.MANIFEST)
        newer = manifest.version_told(file.read(manifest.BEGINNING, 0)) > manifest.VERSION
        if newer and manifest.is_newer(file.read(min(file.opened.size, LARGEST_MANIFEST), 0)):
            raise error(f"{file.name}: it was made by a newer version of dbm_bitcask; nothing was changed") from None
        return None
    return listed if all(number < listed.next_id or not segment.has_records(log.directory, number) for number in present) else None


def _correct_list(log: Log, listed: Manifest | None, present: set[int], lost: list[tuple[int, Hint]]) -> Iterator[Step]:
    wanted = listed.segments if listed else tuple(Entry(number, 0, 0) for number in sorted(present))
    for entry in wanted:
        if entry.id in present:
            segment.refuse_newer(log.directory.open(names.segment_name(entry.id)))
    found: list[Entry] = []
    steps: list[Step] = []
    for entry in wanted:
        before = len(steps)
        kept = list(_as_it_is(log, entry, steps, known=listed is not None))
        found.extend(kept)
        if len(steps) > before:
            lost += [(entry.id << 32 | key.offset, key) for key in _hinted(log, entry)]
    if listed and not steps:
        log.adopt(listed)
        return
    yield from steps
    number = listed.number if listed else 0
    next_id = max([listed.next_id if listed else 0, *present]) + 1
    sealed = [entry for entry in (_sealed(log, entry) for entry in found) if entry.length > segment.FIRST_RECORD]
    if not listed and log.directory.identity_of(names.MANIFEST) is not None:
        yield _set_aside(log, names.MANIFEST, "it did not list the segments that are there")
    fresh = Entry(next_id, secrets.randbits(64), 0)
    segment.create(log.directory, fresh, log.mode)
    rotation.publish_manifest(log.directory, Manifest(number + 1, next_id + 1, (*sealed, fresh)), log.mode)
    log.adopt(read_manifest(log.directory))
    yield Step(log.directory.where(names.MANIFEST), f"written anew, with {len(sealed)} segments")


def _as_it_is(log: Log, entry: Entry, steps: list[Step], *, known: bool) -> Iterator[Entry]:
    """The entry as the file is, or nothing if there is no such segment; `known` tells that salt and length are those of a manifest."""
    name = names.segment_name(entry.id)
    path = log.directory.where(name)
    try:
        file = log.directory.open(name, write=True)
    except FileNotFoundError:
        steps.append(Step(path, "it is missing, and left out: its keys are lost"))
        return
    salt = segment.read_salt(file, entry.id)
    if salt is None or (known and salt != entry.salt):
        if not known or not _has_records_of(file, entry):
            steps.append(_set_aside(log, name, "it is no segment of this database, and left out"))
            return
        segment.write_header(file, entry)
        steps.append(Step(path, "its header did not verify, and was written anew"))
        salt = entry.salt
    size = file.size()
    if entry.length > size:
        steps.append(Step(path, f"{entry.length - size} bytes are missing at its end: their keys are lost"))
    yield Entry(entry.id, salt, min(entry.length, size))


def _has_records_of(file: File, entry: Entry) -> bool:
    size = segment.readable_size(file)
    return size > segment.FIRST_RECORD and segment.next_valid(file.map(size), entry.salt, segment.FIRST_RECORD, size) is not None


def _sealed(log: Log, entry: Entry) -> Entry:
    """The entry with the length up to which there are records, if it has none yet."""
    if entry.length:
        return entry
    file = segment.open_segment(log.directory, entry)
    size = segment.readable_size(file)
    return entry._replace(length=contents.torn_tail_at(_buffer(file, size), entry, size))


def _set_aside(log: Log, name: str, why: str) -> Step:
    aside = names.damaged_name(name)
    log.directory.replace(name, aside)
    return Step(log.directory.where(name), f"{why}; it is {aside} now")


def _buffer(file: File, end: int) -> Buffer:
    return segment.map_segment(file, end) if end else b""


def _hinted(log: Log, entry: Entry) -> Iterator[Hint]:
    """What the hint of a segment says, while it is still bound to what the manifest says of the segment."""
    return iter(contents.read_keys(log.directory, entry) or ())


# Damage within segments.


def _damaged(log: Log, *, opens: bool) -> Iterator[tuple[Entry, contents.Reading]]:
    """The segments with bytes that are no record, and what was read of them."""
    for entry in log.manifest.segments:
        file = segment.open_segment(log.directory, entry)
        size = segment.readable_size(file)
        end = entry.length or (log.end_of(entry) if opens else contents.torn_tail_at(_buffer(file, size), entry, size))
        reading = contents.Reading(_buffer(file, end), entry, end)
        for _ in reading.records():
            pass
        if reading.damage:
            yield entry, reading


def _salvage(log: Log, entry: Entry, reading: contents.Reading, buried: set[bytes]) -> Iterator[Step]:
    """Append what counts of a damaged segment again, and list it no more."""
    recovery.ready(log)
    entry = log.entries[entry.id]  # maybe sealed by now
    name, damage = names.segment_name(entry.id), list(reading.damage)
    lost = [key for key in _hinted(log, entry) if any(place.offset <= key.offset < place.end for place in damage)]
    for offset, found in contents.Reading(reading.buffer, entry, reading.end).records():
        if not found.flags & contents.OVERHEAD:
            write.keep(log, entry.id << 32 | offset, found)
    for key in lost:
        if key.key not in buried:
            yield from _bury(log, entry.id << 32 | key.offset, key)
    log.durable(log.active.sync_contents)
    aside = names.damaged_name(name)
    log.directory.link(name, aside)
    rotation.relist(log, entry.id)
    for _, start, end in damage:
        yield Step(log.directory.where(name), f"{end - start} bytes at offset {start} are no record; the others were copied")
    yield Step(log.directory.where(name), f"it is {aside} now")


def _bury_revived(log: Log, buried: set[bytes]) -> Iterator[Step]:
    """Delete each key of which the keydir knows that its newest record is lost, a tombstone maybe, and that the log has an older one of."""
    readable = recovery.build_beside(log)
    for page in readable.pages():
        for _, location in page_slots(readable.words, page):
            key = log.peek(location).key
            slots = locations(log.keydir.table, key)
            if location not in slots and max(slots, default=location) >= location:  # else it is the keydir that is wrong
                newest = write.locate(log, key, room=False)
                write.bury(log, newest, key)
                if newest.location:
                    yield _deleted(log, newest.location, key)
                    buried.add(key)


def _bury(log: Log, location: int, key: Hint) -> Iterator[Step]:
    """See to it that a key whose newest record is lost has no older value instead. The record may have been a tombstone."""
    recovery.ready(log)
    newest = write.locate(log, key.key, room=False)
    if newest.location > location:
        return
    if newest.location or key.flags & TOMBSTONE:
        write.bury(log, newest, key.key)
    if not key.flags & TOMBSTONE:
        yield _deleted(log, location, key.key)


def _deleted(log: Log, location: int, key: bytes) -> Step:
    path = log.directory.where(names.segment_name(location >> 32))
    return Step(path, f"the value of key {key[:80]!r} is lost; the key was deleted")
