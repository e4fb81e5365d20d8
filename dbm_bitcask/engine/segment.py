"""Segment: a data file: a header, and records that are only ever appended.

    segment := marker:8s id:u64 salt:u64 checksum:u64 record...

All integers are little-endian. `checksum` is XXH3-64 over what stands before it; `id` and `salt` are those that the manifest lists.
Bytes of a segment are read from a map of it where they cannot change or vanish any more: a sealed one by its length in the manifest, the
active one below the tail.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from . import names, record
from .errors import CorruptionError
from .record import HEADER as RECORD_HEADER

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import Directory, File
    from .manifest import Entry

__all__ = ["FIRST_RECORD", "MARKER", "Found", "create", "map_segment", "next_valid", "open_segment", "scan"]

MARKER = b"bc.data\1"
_HEADER = struct.Struct("<8sQQ")
_CHECKSUM = struct.Struct("<Q")
FIRST_RECORD = _HEADER.size + _CHECKSUM.size


class Found(NamedTuple):
    """A record and where it begins."""

    offset: int
    record: record.Record


def create(directory: Directory, entry: Entry, mode: int) -> File:
    """A new, durable segment without records. A file of this name is what a killed process left: it was never listed, and has none."""
    name = names.segment_name(entry.id)
    present = directory.identity_of(name)
    if present is not None and present.size > FIRST_RECORD:
        raise CorruptionError(directory.where(name), None, "it holds records and is not listed: was the manifest restored? run `repair`")
    directory.remove(name)
    file = directory.create(name, mode)
    file.write(_encode_header(entry), 0)
    file.sync()
    return file


def open_segment(directory: Directory, entry: Entry, *, write: bool = False) -> File:
    """The file of a segment that the manifest lists; `CorruptionError` if it is another one, or shorter than listed."""
    name = names.segment_name(entry.id)
    file = directory.open(name, write=write)
    if file.read(FIRST_RECORD, 0) != _encode_header(entry):
        raise CorruptionError(file.name, 0, "this is not the segment that the manifest lists; run `repair`")
    size = file.opened.size
    if size < entry.length:
        raise CorruptionError(file.name, size, f"the segment ends here, and {entry.length} bytes of it were written; run `repair`")
    return file


def map_segment(file: File, end: int) -> mmap.mmap:
    """The bytes of a segment up to `end`."""
    return file.map(end)


def scan(buffer: Buffer, salt: int, start: int, end: int) -> Iterator[Found]:
    """The whole records from `start` on, each verified; stops before the first that is not whole or does not verify."""
    view = memoryview(buffer)[:end]
    offset = start
    while offset < end:
        try:
            found = record.decode(view, offset, salt ^ offset)
        except record.BadRecord:
            return
        if found is None:
            return
        yield Found(offset, found)
        offset = found.end


def next_valid(buffer: Buffer, salt: int, start: int, end: int) -> int | None:
    """The offset of the first record that verifies at or behind `start`: how damage is looked past. O(bytes)."""
    view = memoryview(buffer)[:end]
    for offset in range(start + -start % record.ALIGNMENT, end - RECORD_HEADER.size + 1, record.ALIGNMENT):
        try:
            if record.decode(view, offset, salt ^ offset) is not None:
                return offset
        except record.BadRecord:
            continue
    return None


def _encode_header(entry: Entry) -> bytes:
    data = _HEADER.pack(MARKER, entry.id, entry.salt)
    return data + _CHECKSUM.pack(xxh3_64_intdigest(data))
