"""Segment: a data file: a header, and records that are only ever appended.

    segment := marker:8s id:u32 generation:u32 salt:u64 checksum:u64 record...

All integers are little-endian. `checksum` is XXH3-64 over what stands before it, with 0 for the generation; `id` and `salt` are those
that the manifest lists. `generation` moves whenever a new keydir takes the place of another while the segment is active: so a handle that
maps a keydir that was deleted learns of the new one, from the file that nobody deletes without losing data.
Bytes of a segment are read from a map of it where they cannot change or vanish any more: a sealed one by its length in the manifest, the
active one below the tail.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from . import names, record
from .errors import CorruptionError, error
from .header import MASK32, Words
from .manifest import Entry
from .record import HEADER as RECORD_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from .files import Directory, File, Map

__all__ = [
    "FIRST_RECORD", "MARKER", "Found", "create", "has_records", "map_generation", "map_one_of_many", "map_segment", "move_generation",
    "next_valid", "open_segment", "read_salt", "readable_size", "refuse_newer", "scan", "write_header",
]  # fmt: skip

MARKER = b"bc.data\1"
_HEADER = struct.Struct("<8sIIQ")
_GENERATION = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
FIRST_RECORD = _HEADER.size + _CHECKSUM.size
_GENERATION_AT = 12
_LONG = 2**14  # bytes; the checksum of fewer takes no longer than the look at the header
_PATIENCE = 8
_ZEROS = bytes(4096)


class Found(NamedTuple):
    """A record and where it begins."""

    offset: int
    record: record.Record


def create(directory: Directory, entry: Entry, mode: int) -> File:
    """A new, durable segment without records. A file of this name is what a killed process left: it was never listed, and has none.

    Its name is durable, too: a file system may make names durable in another order, and the manifest that lists it must not come first.
    """
    name = names.segment_name(entry.id)
    if has_records(directory, entry.id):
        raise CorruptionError(directory.where(name), None, "it holds records and is not listed: was the manifest restored? run `repair`")
    directory.remove(name)
    file = directory.create(name, mode)
    file.write(_encode_header(entry), 0)
    file.sync()
    directory.sync()
    return file


def open_segment(directory: Directory, entry: Entry, *, write: bool = False) -> File:
    """The file of a segment that the manifest lists; `CorruptionError` if it is another one, or shorter than listed."""
    name = names.segment_name(entry.id)
    file = directory.open(name, write=write)
    if _without_generation(file.read(FIRST_RECORD, 0)) != _encode_header(entry):
        refuse_newer(file)
        raise CorruptionError(file.name, 0, "this is not the segment that the manifest lists; run `repair`")
    size = file.opened.size
    if size < entry.length:
        raise CorruptionError(file.name, size, f"the segment ends here, and {entry.length} bytes of it were written; run `repair`")
    return file


def readable_size(file: File) -> int:
    """The bytes of a segment in which there may be records: none ends beyond what a location can say, but for a seal."""
    return min(file.size(), record.LIMIT + record.record_length(record.SEAL, 0, 0))


def refuse_newer(file: File) -> None:
    """Raise if this is a whole header of a newer format: neither to be read nor to be repaired."""
    header = _without_generation(file.read(FIRST_RECORD, 0))
    known, version = MARKER[:-1], MARKER[-1]
    is_whole = header[-_CHECKSUM.size :] == _CHECKSUM.pack(xxh3_64_intdigest(header[: -_CHECKSUM.size]))
    if is_whole and header.startswith(known) and header[len(known)] > version:
        raise error(f"{file.name}: it was made by a newer version of dbm_bitcask; nothing was changed")


def has_records(directory: Directory, number: int) -> bool:
    """Whether there is a file of a segment's name with more in it than a header."""
    status = directory.identity_of(names.segment_name(number))
    return status is not None and status.size > FIRST_RECORD


def map_segment(file: File, end: int) -> Map:
    """The bytes of a segment up to `end`."""
    return file.map(end)


def map_one_of_many(file: File, end: int) -> Buffer:
    """The same, where there are more segments than descriptors."""
    return file.map_without_descriptor(end)


def map_generation(file: File) -> Words:
    """The word of the header that holds the generation, shared with whoever moves it."""
    word = _GENERATION_AT // 8
    return memoryview(file.map(FIRST_RECORD)).cast("Q")[word : word + 1]


def move_generation(file: File) -> None:
    """Tell everybody who has this segment open as the active one that there is another keydir. The caller holds the lock.

    Not in a file that a backup shares by a hard link: it is left as it is.
    """
    if file.identity().links == 1:
        (generation,) = _GENERATION.unpack(file.read(_GENERATION.size, _GENERATION_AT))
        file.write(_GENERATION.pack((generation + 1) & MASK32), _GENERATION_AT)


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
    """The offset of the first record that verifies at or behind `start`: how damage is looked past. O(bytes).

    Somebody may have made up values that look like the header of a long record wherever one looks. So the checksums of long ones may
    take several times the bytes that there are, and then no more of them are tried: what cannot be read is damage, and is reported.
    """
    view = memoryview(buffer)[:end]
    patience = _PATIENCE * (end - start)
    for offset in _places(view, start + -start % record.ALIGNMENT, end - RECORD_HEADER.size + 1):
        length = record.promised_length(view, offset)
        if not length or offset + length > end:
            continue
        if length > _LONG:
            if patience < 0:
                continue
            patience -= length
        try:
            if record.decode(view, offset, salt ^ offset) is not None:
                return offset
        except record.BadRecord:
            continue
    return None


def _places(view: memoryview, first: int, end: int) -> Iterator[int]:
    """Where a record may begin. A crash may leave gigabytes of zeros: the checksum of a record may be zero, and not the size behind it."""
    block = len(_ZEROS)
    for start in range(first & -block, end, block):
        zeros = view[start : start + block].tobytes() == _ZEROS
        yield from range(max(first, start + block - record.CHECKSUM_SIZE if zeros else start), min(end, start + block), record.ALIGNMENT)


def read_salt(file: File, number: int) -> int | None:
    """The salt in the header of a segment with this id, or None if the header does not verify, or is that of another one."""
    header = _without_generation(file.read(FIRST_RECORD, 0))
    if len(header) < FIRST_RECORD:
        return None
    entry = Entry(number, _HEADER.unpack_from(header)[3], 0)
    return entry.salt if header == _encode_header(entry) else None


def write_header(file: File, entry: Entry) -> None:
    """Write the header of a segment anew, whose own does not verify."""
    file.write(_encode_header(entry), 0)
    file.sync()


def _without_generation(header: bytes) -> bytes:
    return header[:_GENERATION_AT] + bytes(_GENERATION.size) + header[_GENERATION_AT + _GENERATION.size :]


def _encode_header(entry: Entry) -> bytes:
    data = _HEADER.pack(MARKER, entry.id, 0, entry.salt)
    return data + _CHECKSUM.pack(xxh3_64_intdigest(data))
