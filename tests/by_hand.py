"""Databases whose files somebody looks at, or changes, behind the back of everybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dbm_bitcask
from dbm_bitcask.engine import record, rotation
from dbm_bitcask.engine.files import Directory

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"segment_size": 4096}
ITEMS = {b"key %d" % number: b"value %d" % number for number in range(8)}


def fill(db: dbm_bitcask.Database, count: int = 40, turn: int = 0) -> None:
    """Set so many keys to some hundred bytes each."""
    for number in range(count):
        db[b"key %d" % number] = b"%d %d " % (turn, number) * 60


def rotate(db: dbm_bitcask.Database) -> None:
    db._store.locked(rotation.rotate)


def is_free(path: Path) -> bool:
    """Whether nobody holds the writer lock."""
    beside = Directory(str(path))
    if beside.try_lock():
        beside.unlock()
        return True
    return False


def everything(path: Path, flag: str = "r") -> dict[bytes, bytes]:
    with dbm_bitcask.open(path, flag) as db:
        return dict(db)


def active(path: Path) -> Path:
    return max(path.glob("*.data"))


def sealed(path: Path) -> list[Path]:
    return sorted(path.glob("*.data"))[:-1]


def lose_index(path: Path) -> None:
    """From now on there is nothing but the log."""
    for file in [path / "keydir", *path.glob("*.hint")]:
        file.unlink(missing_ok=True)


def encoded(file: Path, offset: int, key: bytes, value: bytes, flags: int = 0) -> bytes:
    """A record for a place in a segment."""
    salt = int.from_bytes(file.read_bytes()[16:24], "little")
    return record.encode(flags, key, value, salt ^ offset, 1_700_000_000)


def append(file: Path, *records: tuple[int, bytes, bytes]) -> None:
    """Append (flags, key, value) to a segment."""
    for flags, key, value in records:
        data = encoded(file, file.stat().st_size, key, value, flags)
        with file.open("ab") as stream:
            stream.write(data)


def poke(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def flip(file: Path, offset: int, bits: int = 4) -> None:
    poke(file, offset, bytes([file.read_bytes()[offset] ^ bits]))
