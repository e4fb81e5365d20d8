"""Contents: the keys of one segment in the order of the log, from its hint or from its records; and how its damage is looked past.

Whether bytes that do not verify are a torn tail or damage is decided here and nowhere else. In a sealed segment they are damage. In the
active one they are damage if a record behind them says that everything before it had been synced; otherwise they are a torn tail: what
was written last, and not to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import hint, names, record, segment
from .hint import Hint, HintWriter
from .record import BATCH, HEADER, MARK, SEAL, SYNCED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import Directory, File
    from .manifest import Entry

__all__ = ["Damage", "OVERHEAD", "Reading", "mapped_hint", "read_keys", "torn_tail_at", "write_hint"]

OVERHEAD = SEAL | MARK | BATCH  # records without a key
_BLOCK = 4096  # keys of a hint that are encoded at once


class Damage(NamedTuple):
    """Bytes of a segment that are no record: from `offset` to `end`."""

    segment: int
    offset: int
    end: int


class Reading:
    """One pass over the records of a segment, verified; afterwards `damage` tells what was not readable."""

    def __init__(self, buffer: Buffer, entry: Entry, end: int) -> None:
        self.buffer = buffer
        self.entry = entry
        self.end = end
        self.damage: list[Damage] = []

    def records(self, offset: int = segment.FIRST_RECORD) -> Iterator[segment.Found]:
        """Every record that verifies, the records of a batch one by one behind its frame."""
        while offset < self.end:
            for found in segment.scan(self.buffer, self.entry.salt, offset, self.end):
                yield found
                offset = found.record.end
                if found.record.flags & BATCH:
                    yield from self._batch(found)
            if offset < self.end:
                resume = segment.next_valid(self.buffer, self.entry.salt, offset + record.ALIGNMENT, self.end) or self.end
                self.damage.append(Damage(self.entry.id, offset, resume))
                offset = resume

    def _batch(self, frame: segment.Found) -> Iterator[segment.Found]:
        return segment.scan(self.buffer, self.entry.salt, frame.offset + HEADER.size, frame.record.end)

    def keys(self) -> Iterator[Hint]:
        """The records that have a key, without their values."""
        for offset, found in self.records():
            if not found.flags & OVERHEAD:
                yield Hint(offset, found.end - offset, found.flags & ~SYNCED, found.key, found.expiry)


def torn_tail_at(buffer: Buffer, entry: Entry, end: int) -> int:
    """Where the records of the active segment end: before the first bad bytes that no later record calls synced, or at `end`."""
    reading = Reading(buffer, entry, end)
    vouched = 0  # so many of the damaged places have a record behind them that was written after a sync
    for found in reading.records():
        if found.record.flags & SYNCED:
            vouched = len(reading.damage)
    return reading.damage[vouched].offset if len(reading.damage) > vouched else end


def mapped_hint(directory: Directory, entry: Entry) -> Buffer | None:
    """The bytes of a segment's hint if it has one that verifies and belongs to it."""
    try:
        file = directory.open(names.hint_name(entry.id))
        size = file.opened.size
        if size > hint.longest(entry):
            return None
        buffer: Buffer = file.map(size) if size else b""
    except OSError:
        return None
    return buffer if hint.is_bound(buffer, entry) else None


def read_keys(directory: Directory, entry: Entry) -> Iterator[Hint] | None:
    """The keys of a sealed segment from its hint, or None if it has no usable one."""
    buffer = mapped_hint(directory, entry)
    return None if buffer is None else hint.decode(buffer)


def write_hint(directory: Directory, buffer: Buffer, entry: Entry, mode: int) -> None:
    """Write the hint of a sealed segment, unless there is damage in it, which a hint would hide.

    Needs no lock: the segment does not change, and the last of several writers wins.
    """
    reading = Reading(buffer, entry, entry.length)
    name = names.hint_name(entry.id)
    temporary = names.temporary_name(name)
    file = directory.create(temporary, mode)
    try:
        _fill(file, HintWriter(entry), reading.keys())
        del file  # Windows renames and unlinks nothing that is open
        if not reading.damage:
            directory.replace(temporary, name)
            return
    except BaseException:
        directory.remove(temporary)
        raise
    directory.remove(temporary)


def _fill(file: File, writer: HintWriter, keys: Iterator[Hint]) -> None:
    end = len(writer.head())
    block: list[Hint] = []
    for key in keys:
        block.append(key)
        if len(block) == _BLOCK:
            data = writer.body(block)
            file.write(data, end)
            end += len(data)
            block.clear()
    data = writer.body(block)
    file.write(data, end)
    file.write(writer.checksum(), end + len(data))
    file.write(writer.head(), 0)
