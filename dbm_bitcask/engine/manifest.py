"""Manifest: which segments exist. No I/O here.

    manifest := marker:16s version:u32 count:u32 number:u64 next_id:u64 segment{count} checksum:u64
    segment  := id:u64 salt:u64 length:u64

All integers are little-endian. The segments stand in the order of the history, ids ascending; the last one is active and has length 0,
all others are sealed: bytes behind their length are ignored, a shorter file is damaged. `number` grows by one with every commit.
`next_id` is above every id ever used. `checksum` is XXH3-64 over everything before it.

What the manifest does not list does not exist. It is replaced as a whole, and that is the one commit point of the database.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

__all__ = [
    "BEGINNING", "MARKER", "SHORTEST", "VERSION", "BadManifest", "Entry", "Manifest", "decode", "encode", "is_newer", "length_told",
    "version_told",
]  # fmt: skip

MARKER = b"dbm_bitcask\r\n\x1a\n\0"
VERSION = 1

_HEAD = struct.Struct("<16sIIQQ")
_SEGMENT = struct.Struct("<QQQ")
_CHECKSUM = struct.Struct("<Q")
BEGINNING = _HEAD.size + _CHECKSUM.size  # bytes that every manifest has
SHORTEST = 32  # bytes of a sealed segment: those of its header
_LONGEST = 2**33  # its last record ends below 2^32, and a seal stands behind it
_NEVER = 2**63  # commits: so that the next one has a number, too


class BadManifest(Exception):
    """The bytes are no manifest that this version reads; the text says why."""


class Entry(NamedTuple):
    """One segment: its id, the salt of its checksums, and its length in bytes (0 while it is active)."""

    id: int
    salt: int
    length: int


class Manifest(NamedTuple):
    """The list of segments, with the checksum that identifies it."""

    number: int
    next_id: int
    segments: tuple[Entry, ...]
    checksum: int = 0

    @property
    def active(self) -> Entry:
        return self.segments[-1]


def encode(manifest: Manifest) -> tuple[bytes, Manifest]:
    """The bytes of a manifest, and the manifest with the checksum that they end with."""
    segments = manifest.segments
    body = _HEAD.pack(MARKER, VERSION, len(segments), manifest.number, manifest.next_id)
    body += b"".join(_SEGMENT.pack(*entry) for entry in segments)
    checksum = xxh3_64_intdigest(body)
    return body + _CHECKSUM.pack(checksum), manifest._replace(checksum=checksum)


def length_told(beginning: bytes) -> int:
    """The bytes that a manifest takes which begins so."""
    count = _HEAD.unpack_from(beginning)[2] if len(beginning) >= BEGINNING else 0
    return BEGINNING + count * _SEGMENT.size


def version_told(beginning: bytes) -> int:
    """The version of the format that a manifest says it has which begins so; 0 if none does."""
    return _HEAD.unpack_from(beginning)[1] if len(beginning) >= BEGINNING and beginning.startswith(MARKER) else 0


def is_newer(data: bytes) -> bool:
    """Whether this is a whole manifest of a newer format, and not a damaged one."""
    if len(data) < BEGINNING:
        return False
    marker, version, *_ = _HEAD.unpack_from(data)
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    return bool(marker == MARKER and version > VERSION and checksum == _CHECKSUM.pack(xxh3_64_intdigest(body)))


def decode(data: bytes) -> Manifest:
    """The manifest in `data`; `BadManifest` if it is damaged, foreign, or of a newer format."""
    if len(data) < BEGINNING:
        raise BadManifest("it is too short for a manifest")
    marker, version, count, number, next_id = _HEAD.unpack_from(data)
    if marker != MARKER:
        raise BadManifest("it does not begin with the marker of a manifest")
    if version != VERSION:
        raise BadManifest(f"format version {version} is not known here (this is {VERSION}); use a newer dbm_bitcask")
    end = _HEAD.size + count * _SEGMENT.size
    if len(data) != end + _CHECKSUM.size:
        raise BadManifest("its length does not fit the number of its segments")
    (checksum,) = _CHECKSUM.unpack_from(data, end)
    if xxh3_64_intdigest(data[:end]) != checksum:
        raise BadManifest("its checksum does not verify")
    segments = tuple(map(Entry._make, _SEGMENT.iter_unpack(data[_HEAD.size : end])))
    _require_order(number, segments, next_id)
    return Manifest(number, next_id, segments, checksum)


def _require_order(number: int, segments: tuple[Entry, ...], next_id: int) -> None:
    ids = [entry.id for entry in segments]
    if not ids or ids != sorted(set(ids)) or not 0 < ids[0] <= ids[-1] < next_id <= 2**32:
        raise BadManifest("its segments are out of order")
    if segments[-1].length or any(entry.length < SHORTEST for entry in segments[:-1]):
        raise BadManifest("not exactly its last segment is active")
    if number >= _NEVER or any(entry.length >= _LONGEST for entry in segments):
        raise BadManifest("it holds numbers that are never reached")
