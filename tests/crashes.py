"""A machine that dies on the way: at the n-th store into shared words, or the n-th call that changes a file.

An operation is first run to its end, which tells how many steps it has; and then once for each of them, dying there. A death is either
an interruption (an exception like a KeyboardInterrupt: clean-up code runs, the same handle goes on) or a kill (nothing of the process
takes effect any more, another handle goes on).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import dbm_bitcask
from dbm_bitcask.engine import files, header, keydir, merge, page, portable, recovery, write
from dbm_bitcask.engine.check import check

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

PAGE = header.PAGE_SIZE


def every_write_pays(patch: pytest.MonkeyPatch) -> None:
    """Whoever writes cleans a part of the log, if enough of it is dead, and not one in 256; how much, no clock says."""
    patch.setattr(merge, "is_due", lambda _checksum, _share: True)
    patch.setattr(merge, "_ONE_IN", 1)
    patch.setattr(merge, "_LONGEST", 1e9)


class Died(BaseException):
    """The machine stopped here."""


class Machine:
    """Counts steps while an operation runs, and dies before a given one."""

    def __init__(self) -> None:
        self.steps = 0
        self._running = self._dead = self._killed = False
        self._dies_at = 0

    def step(self) -> None:
        if self._dead:
            raise Died
        if self._running:
            self.steps += 1
            if self.steps == self._dies_at:
                self._running, self._dead = False, self._killed
                raise Died

    def run(self, action: Callable[[], object], dies_at: int = 0, *, killed: bool = False) -> bool:
        """Whether `action()` died at this step; False if it has fewer."""
        self.steps, self._dies_at, self._killed = 0, dies_at, killed
        self._running = True
        try:
            action()
        except Died:
            return True
        finally:
            self._running = self._dead = False
        return False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the engine and its shared words and files."""

        def map_words(file: files.File, size: int, *, write: bool) -> Words:
            return Words(_map_words(file, size, write=write), self)

        def sync(fd: int) -> None:
            """Takes no time: a kill does not ask what has reached the disk."""
            os.fstat(fd)
            self.step()

        for module in (keydir, recovery):
            patch.setattr(module, "map_words", map_words)
        for module in (header, page):
            patch.setattr(module, "xxh3_64_intdigest", _digest)
        patch.setattr(write, "_COUNTERS", Counters)
        patch.setattr(files, "os", _System(self, sync))
        patch.setattr(files, "_fdatasync", sync)


_map_words = keydir.map_words
_xxh3 = page.xxh3_64_intdigest


class Words:
    """Shared words of which each store is a step; one of several words can die in its middle."""

    def __init__(self, view: memoryview, machine: Machine) -> None:
        self.view = view
        self._machine = machine

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, where: int | slice) -> object:
        found = self.view[where]
        return Words(found, self._machine) if isinstance(where, slice) else found

    def __setitem__(self, where: int | slice, what: object) -> None:
        self._machine.step()
        if isinstance(where, slice):
            target, what = self.view[where], memoryview(_bare(what))
            half = len(target) // 2
            target[:half] = what[:half]
            self._machine.step()
            target[half:] = what[half:]
        else:
            self.view[where] = what

    def tolist(self) -> list[int]:
        return self.view.tolist()


def _bare(words: object) -> object:
    return words.view if isinstance(words, Words) else words


def _digest(data: object, seed: int = 0) -> int:
    return _xxh3(_bare(data), seed)


class Counters:
    """In the place of the Struct that stores six words by one call."""

    @staticmethod
    def pack_into(words: Words, offset: int, *numbers: int) -> None:
        for place, number in enumerate(numbers, offset // 8):
            words[place] = number


class _System:
    """The module `os`, of which each change is a step; a write can die in its middle."""

    def __init__(self, machine: Machine, sync: Callable[[int], None]) -> None:
        self._machine = machine
        self.fsync = sync

    def __getattr__(self, name: str) -> object:
        found = getattr(os, name)
        if name not in {"replace", "unlink", "ftruncate", "posix_fallocate", "mkdir"}:
            return found

        def call(*args: object, **kwargs: object) -> object:
            self._machine.step()
            return found(*args, **kwargs)

        return call

    def open(self, name: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_CREAT:
            self._machine.step()
        return os.open(name, flags, *args, **kwargs)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._machine.step()
        half = os.pwrite(fd, data[: len(data) // 2], offset)
        self._machine.step()
        return half + os.pwrite(fd, data[half:], offset + half)

    def pwritev(self, fd: int, parts: list[bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(parts), offset)


# Databases that are left as they are, and copies of them that are none the wiser.


def abandon(db: dbm_bitcask.Database) -> None:
    """Have the handle go away as that of a process that is killed: without a close."""
    db._store.closed = True
    if not db._log.released and db._log.directory.layer == "portable":  # what this process would keep in memory goes with it, and the lock
        shared = portable._shared.pop(db._log.directory._place)
        shared._held = None


def freeze(path: Path) -> dict[str, bytes]:
    """The files of a database."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def require_same_without_keydir(path: Path, expected: dict[bytes, bytes]) -> None:
    """The log alone says the same."""
    for file in [path / "keydir", *path.glob("*.hint")]:
        file.unlink(missing_ok=True)
    for flag in ("r", "w"):
        with dbm_bitcask.open(path, flag) as db:
            assert dict(db) == expected
    assert check(path) == []


def thaw(frozen: dict[str, bytes], path: Path) -> Path:
    """Write the files, and have the keydir believe that it has always been here."""
    path.mkdir()
    for name, data in frozen.items():
        (path / name).write_bytes(data)
    if "keydir" in frozen:
        adopt(path / "keydir")
    return path


def adopt(file: Path) -> None:
    """Have a copied keydir believe that it is the original."""
    with edited(file) as words:
        status = file.stat()
        words[header.DEVICE], words[header.INODE] = status.st_dev, status.st_ino


class edited:  # noqa: N801
    """The words of a keydir, to be changed; its seal is renewed if it has one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data = bytearray(file.read_bytes())

    def __enter__(self) -> memoryview:
        self._words = memoryview(self._data).cast("Q")
        return self._words

    def __exit__(self, *_: object) -> None:
        if self._words[header.STATE] in (header.CLEAN, header.RESTING):
            self._words[header.SEAL] = header.header_checksum(self._words)
        self._words.release()
        with self._file.open("r+b") as stream:  # the same inode
            stream.write(self._data)
