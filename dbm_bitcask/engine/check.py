"""Check: walks every record, hint, slot and counter of a database, changes nothing, and returns what it found.

The writer lock is held meanwhile, so that log and index are of one moment. A keydir that is not trusted (after a restart of the machine,
or in a copy) is no problem: it is disposable, and is not looked at.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from . import contents, names, recovery, segment
from . import header as at
from .errors import CorruptionError, NotFoundError, as_error
from .files import Directory
from .header import MASK32, PAGE_SIZE, PAGE_WORDS
from .keydir import map_words
from .log import Log, read_manifest
from .page import (
    IN_USE,
    PAGE_COUNTS,
    PAGE_MAGIC,
    Damaged,
    check_entry,
    key_hash,
    page_counts,
    page_depth,
    page_slots,
)
from .record import TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .hint import Hint
    from .keydir import Keydir
    from .manifest import Entry

__all__ = ["Problem", "check"]


class Problem(NamedTuple):
    """Something that is not as it should be: in which file, at which offset (None: the file as a whole), and what."""

    file: str
    offset: int | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.offset is None else f"{self.file} at offset {self.offset}"
        return f"{where}: {self.message}"


def check(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> list[Problem]:
    """Verify the database at `path`: an empty list if all is well. O(bytes).

    Raises `error` if there is no database, or none that can be looked at.
    """
    name = os.fsdecode(path)
    try:
        log = Log(Directory(name))
    except OSError as failure:
        raise NotFoundError(failure.errno, "no database here", name) from failure
    try:
        return log.under_lock(lambda log: list(_check(log)))
    except OSError as failure:
        raise as_error(failure, name) from failure


def _check(log: Log) -> Iterator[Problem]:
    try:
        log.adopt(read_manifest(log.directory))
    except FileNotFoundError as missing:
        if missing.filename == log.directory.name:
            raise
        yield Problem(str(missing.filename), None, "the manifest lists this segment, and it is not there")
        return
    except CorruptionError as bad:
        yield Problem(bad.path, bad.offset, bad.reason)
        return
    yield from _check_names(log)
    keydir = _trusted_keydir(log)
    if keydir is None:
        yield from _check_seal(log)
    live: dict[bytes, tuple[int, int]] = {}
    tallies: dict[int, _Tally] = {}
    for entry in log.manifest.segments:
        yield from _check_segment(log, entry, keydir, live, tallies)
    if keydir is not None:
        yield from _check_keydir(log, keydir, live, tallies)


def _check_names(log: Log) -> Iterator[Problem]:
    for name in log.directory.list():
        number = names.parse_segment(name)
        if number is not None and number > log.manifest.next_id and segment.has_records(log.directory, number):
            yield Problem(log.directory.where(name), None, "its id is above the manifest's next one: it belongs to another database")


def _check_seal(log: Log) -> Iterator[Problem]:
    """Whether a keydir of this very place is untrusted only because its header does not verify."""
    try:
        file = log.directory.open(names.KEYDIR)
    except FileNotFoundError:
        return
    if file.opened.size < PAGE_SIZE:
        return
    words = map_words(file, file.opened.size, write=False)
    sealed = words[at.STATE] in (at.CLEAN, at.RESTING) and words[at.MANIFEST] == log.manifest.checksum
    if sealed and words[at.INODE] == file.opened.inode and words[at.SEAL] != at.header_checksum(words):
        yield Problem(log.directory.where(names.KEYDIR), 0, "the header does not verify; it will be rebuilt")


def _trusted_keydir(log: Log) -> Keydir | None:
    try:
        return log.keydir if recovery.take_keydir(log) else None
    except CorruptionError:
        return None


class _Tally:
    """Bytes of one segment by what they are."""

    def __init__(self) -> None:
        self.live = 0
        self.tombstones = 0
        self.length = 0


def _check_segment(
    log: Log, entry: Entry, keydir: Keydir | None, live: dict[bytes, tuple[int, int]], tallies: dict[int, _Tally]
) -> Iterator[Problem]:
    path = log.directory.where(names.segment_name(entry.id))
    tally = tallies[entry.id] = _Tally()
    try:
        file = log.active if entry == log.manifest.active else segment.open_segment(log.directory, entry)
    except FileNotFoundError:
        yield Problem(path, None, "the manifest lists this segment, and it is not there")
        return
    except CorruptionError as bad:
        yield Problem(bad.path, bad.offset, bad.reason)
        return
    size = segment.readable_size(file)
    end = entry.length or _end_of_active(entry, keydir, size) or contents.torn_tail_at(segment.map_segment(file, size), entry, size)
    tally.length = end - segment.FIRST_RECORD
    reading = contents.Reading(segment.map_segment(file, end), entry, end)
    keys = []
    for key in reading.keys():  # noqa: SIM118  (a method of that name, not a mapping)
        keys.append(key)
        _apply(entry.id, key, live, tallies)
    for damage in reading.damage:
        yield Problem(path, damage.offset, f"{damage.end - damage.offset} bytes are no record that verifies")
    if entry.length and log.directory.identity_of(names.hint_name(entry.id)) is not None:
        hinted = contents.read_keys(log.directory, entry)
        path = log.directory.where(names.hint_name(entry.id))
        if hinted is None:
            yield Problem(path, None, "the hint does not verify; it is not used, and can be deleted")
        elif not reading.damage and list(hinted) != keys:
            yield Problem(path, None, "the hint does not list the keys of its segment; delete it")


def _end_of_active(entry: Entry, keydir: Keydir | None, size: int) -> int:
    """The tail if the keydir knows it. What is behind it is an unfinished write, for the next writer to finish."""
    if keydir is None:
        return 0
    tail = keydir.counter(at.TAIL)
    return min(size, tail & MASK32) if tail >> 32 == entry.id else size


def _apply(number: int, key: Hint, live: dict[bytes, tuple[int, int]], tallies: dict[int, _Tally]) -> None:
    old = live.pop(key.key, None)
    if old is not None:
        tallies[old[0] >> 32].live -= old[1]
    if key.flags & TOMBSTONE:
        tallies[number].tombstones += key.size
    else:
        live[key.key] = number << 32 | key.offset, key.size
        tallies[number].live += key.size


def _check_keydir(log: Log, keydir: Keydir, live: dict[bytes, tuple[int, int]], tallies: dict[int, _Tally]) -> Iterator[Problem]:
    path = log.directory.where(names.KEYDIR)
    words = keydir.words
    if words[words[at.CURRENT] + at.TAIL] & MASK32 != log.active.size() or words[at.STATE] == at.CHANGING:
        return  # a write is unfinished: the next writer finishes it, and then there is something to compare
    keydir.listed = log.entries
    try:
        for index in range(1 << 64 - keydir.table.shift):
            check_entry(keydir.table, index)
    except Damaged as bad:
        yield Problem(path, None, f"{bad}; it will be rebuilt")
        return
    yield from _check_slots(log, keydir, path, live)
    yield from _check_counters(log, keydir, path, len(live), tallies)


def _check_slots(log: Log, keydir: Keydir, path: str, live: dict[bytes, tuple[int, int]]) -> Iterator[Problem]:
    table, words = keydir.table, keydir.words
    expected = {(key_hash(key, table.seed), location) for key, (location, _) in live.items()}
    seen: set[tuple[int, int]] = set()
    for page in keydir.pages():
        offset = page * PAGE_WORDS * 8
        if words[page * PAGE_WORDS + PAGE_MAGIC] != IN_USE:
            yield Problem(path, offset, "the directory names a page that is not in use")
        if words[page * PAGE_WORDS + PAGE_COUNTS] != page_counts(words, page):
            yield Problem(path, offset, "the counts of a page are not those of its slots")
        depth = page_depth(words, page)
        slots = [slot for slot in page_slots(words, page) if slot[1] >> 32 in log.entries]
        if len({hashed >> 64 - depth for hashed, _ in slots}) > 1:
            yield Problem(path, offset, "a page holds slots that belong to another")
        seen.update(slots)
    for _, location in sorted(seen - expected)[:10]:
        yield Problem(
            path, None, f"a slot points at {location >> 32:08d}.data offset {location & MASK32}, which is not the newest record of a key"
        )
    for _, location in sorted(expected - seen)[:10]:
        yield Problem(path, None, f"no slot points at {location >> 32:08d}.data offset {location & MASK32}, the newest record of its key")


def _check_counters(log: Log, keydir: Keydir, path: str, count: int, tallies: dict[int, _Tally]) -> Iterator[Problem]:
    words, rows = keydir.words, keydir.rows()
    if keydir.counter(at.COUNT) != count:
        yield Problem(path, None, f"it counts {keydir.counter(at.COUNT)} keys, and the log has {count}")
    for number, tally in tallies.items():
        row = rows.get(number)
        if row is None:
            yield Problem(path, None, f"segment {number} has no row")
            continue
        active = number == log.manifest.active.id
        tombstones = keydir.counter(at.TOMBSTONES) if active else words[row + at.ROW_TOMBSTONES]
        dead = tally.length - tally.live - tally.tombstones
        if (words[row + at.ROW_DEAD], tombstones) != (dead, tally.tombstones):
            have = f"{words[row + at.ROW_DEAD]} dead bytes and {tombstones} of tombstones"
            yield Problem(path, None, f"segment {number} counts {have}, and the log has {dead} and {tally.tombstones}")
    if words[at.STATE] in (at.CLEAN, at.RESTING) and words[at.SEAL] != at.header_checksum(words):
        yield Problem(path, 0, "the header does not verify")
