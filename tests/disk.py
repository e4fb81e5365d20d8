"""A disk that loses what was not synced: what an engine did to a directory, and every state in which a crash can leave it.

`Disk` stands between the engine and the operating system and writes down each change: of a file, of a name, of a page of the mapped keydir.
`crashes` goes through that record and makes, for each point in it, the directories that a crash there can leave. What was synced is there,
of a file with an fsync of the file, of a name with one of the directory; of everything else any part may be: each write, each name and each
page of the keydir by itself.

Source of the idea: T. S. Pillai et al., All File Systems Are Not Created Equal, OSDI 2014.
"""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dbm_bitcask.engine import files, portable
from dbm_bitcask.engine.record import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pytest

PAGE = 4096
SECTOR = 512


class Write(NamedTuple):
    """Bytes of a file at an offset; a page of the keydir is one, too."""

    file: int
    offset: int
    data: bytes
    mapped: bool = False


class Resize(NamedTuple):
    """A file that was cut, or grown by zeros."""

    file: int
    size: int
    grow: bool


class Name(NamedTuple):
    """A name that stands for another file now (0: for none), and the name that it had before."""

    name: str
    file: int
    before: str = ""


class Sync(NamedTuple):
    """A file, or the directory (0), is durable."""

    file: int


class Mark(NamedTuple):
    """What the workload did: a step began, was acknowledged, or made everything durable."""

    kind: str
    step: int


Change = Write | Resize | Name
Event = Change | Sync | Mark


class Disk:
    """Stands in the place of `os` in `files`, and writes down what becomes of one directory."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.events: list[Event] = []
        self.inodes: dict[int, int] = {}  # files by inode number, as it was when they were made
        self.numbers: dict[int, int] = {}  # and back
        self.names: dict[str, int] = {}
        self._maps: dict[int, tuple[int, bytes]] = {}  # keydirs: a descriptor of our own, and the last contents
        self.start = Image({}, {})

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(files, "os", self)
        patch.setattr(portable, "os", self)
        patch.setattr(files, "_fdatasync", self.fsync)

    def adopt(self) -> None:
        """Begin with what is there, as durable."""
        contents = {}
        for name in os.listdir(self.root):  # noqa: PTH208
            fd = os.open(self.root / name, os.O_RDONLY)
            number = self._number(fd, name)
            contents[number] = (self.root / name).read_bytes()
            self.names[name] = number
            if name == "keydir":
                self._maps[number] = fd, contents[number]
            else:
                os.close(fd)
        self.start = Image(contents, dict(self.names))

    def finish(self) -> None:
        for fd, _ in self._maps.values():
            os.close(fd)

    def mark(self, kind: str, step: int) -> None:
        self._look_at_maps()
        self.events.append(Mark(kind, step))

    def _number(self, fd: int, name: str) -> int:
        number = len(self.numbers) + 1
        inode = os.fstat(fd).st_ino
        self.inodes[inode], self.numbers[number] = number, inode
        if name.startswith("keydir") and number not in self._maps:
            self._maps[number] = os.dup(fd), b""
        return number

    def _note(self, fd: int, event: Callable[[int], Event]) -> None:
        number = self.inodes.get(os.fstat(fd).st_ino)
        if number is not None:
            self._look_at_maps()
            self.events.append(event(number))

    def _look_at_maps(self) -> None:
        """Note the pages of keydirs that changed since; before each other change, for that is when a crash may come."""
        for number, (fd, before) in self._maps.items():
            now = os.pread(fd, os.fstat(fd).st_size, 0)
            if now == before:
                continue
            for start in range(0, len(now), PAGE):
                page = now[start : start + PAGE]
                if page != before[start : start + PAGE]:
                    self.events.append(Write(number, start, page, mapped=True))
            self._maps[number] = fd, now

    # The calls of `os` that change something.

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, name: str, flags: int, *args: int, **kwargs: int) -> int:
        fd = os.open(name, flags, *args, **kwargs)
        if flags & os.O_CREAT and (kwargs.get("dir_fd") is not None or Path(name).parent == self.root):
            name = Path(name).name  # the portable layer says the whole path
            self._look_at_maps()
            self.names[name] = self._number(fd, name)
            self.events.append(Name(name, self.names[name]))
        return fd

    def write(self, fd: int, data: bytes) -> int:
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        self._note(fd, lambda number: Write(number, offset, bytes(data)))
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._note(fd, lambda number: Write(number, offset, bytes(data)))
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, parts: list[bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(parts), offset)

    def ftruncate(self, fd: int, length: int) -> None:
        self._note(fd, lambda number: Resize(number, length, grow=False))
        os.ftruncate(fd, length)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._note(fd, lambda number: Resize(number, offset + length, grow=True))
        os.posix_fallocate(fd, offset, length)

    def replace(self, old: str, new: str, **kwargs: int) -> None:
        self._look_at_maps()
        before, after = Path(old).name, Path(new).name
        self.names[after] = self.names.pop(before)
        self.events.append(Name(after, self.names[after], before))
        os.replace(old, new, **kwargs)  # noqa: PTH105  (by descriptors)

    def link(self, old: str, new: str, **kwargs: int) -> None:
        self._look_at_maps()
        self.names[new] = self.names[old]
        self.events.append(Name(new, self.names[new]))
        os.link(old, new, **kwargs)

    def unlink(self, name: str, **kwargs: int) -> None:
        os.unlink(name, **kwargs)
        self._look_at_maps()
        name = Path(name).name
        del self.names[name]
        self.events.append(Name(name, 0))

    def fsync(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._look_at_maps()
            self.events.append(Sync(0))
        else:
            self._note(fd, Sync)


# What a crash leaves.


class Image(NamedTuple):
    """The files of a directory, by number, and the names that they have."""

    files: dict[int, bytes]
    names: dict[str, int]

    def contents(self) -> dict[str, tuple[int, bytes]]:
        """What stands in the directory: the number of the file and its bytes, by name."""
        return {name: (number, self.files.get(number, b"")) for name, number in self.names.items()}

    def apply(self, changes: Iterable[Change]) -> Image:
        """This directory after some changes, in their order."""
        names, touched = dict(self.names), {}
        pages: dict[tuple[int, int], bytes] = {}
        for change in changes:
            if isinstance(change, Name):
                names.pop(change.before, None)
                names.pop(change.name, None)
                if change.file:
                    names[change.name] = change.file
                continue
            data = touched.get(change.file)
            if data is None:
                data = touched[change.file] = bytearray(self.files.get(change.file, b""))
            if isinstance(change, Resize):
                if not change.grow:
                    del data[change.size :]
                data.extend(bytes(max(0, change.size - len(data))))
            elif change.mapped:
                pages[change.file, change.offset] = change.data  # the last one of each counts
            else:
                write(data, change.offset, change.data)
        for (number, offset), page in pages.items():
            write(touched[number], offset, page)
        return Image({**self.files, **{number: bytes(data) for number, data in touched.items()}}, names)


def write(data: bytearray, offset: int, new: bytes) -> None:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(new)] = new


class Crash(NamedTuple):
    """A directory after a crash: how it came about, between which steps of the workload, and whether the machine was restarted."""

    how: str
    before: Image
    changes: list[Change]
    begun: int  # steps that had begun
    acknowledged: int
    durable: int  # steps that had been made durable
    reboot: bool

    def image(self) -> Image:
        return self.before.apply(self.changes)


class Crashes:
    """Every state that a crash can leave of a recorded run."""

    def __init__(self, disk: Disk, seed: int, *, random_subsets: int = 20, singles: int = 12) -> None:
        self.disk = disk
        self.choose = random.Random(seed)
        self.random_subsets = random_subsets
        self.singles = singles  # pending changes that are dropped, and kept, each by itself
        self.durable = disk.start
        self.pending: list[Change] = []
        self.begun = self.acknowledged = self.synced = 0

    def __iter__(self) -> Iterator[Crash]:
        for number, event in enumerate(self.disk.events):
            if isinstance(event, Mark):
                self._mark(event)
                continue
            if isinstance(event, Write) and event.mapped:
                self.pending.append(event)
                continue
            yield from self._here(number)
            if isinstance(event, Sync):
                self._sync(event)
                continue
            if isinstance(event, Write):
                yield from self._torn(number, event)
            self.pending.append(event)
        yield from self._here(len(self.disk.events))

    def _mark(self, mark: Mark) -> None:
        if mark.kind == "begin":
            self.begun = mark.step
        elif mark.kind == "acknowledged":
            self.acknowledged = mark.step
        else:
            self.synced = mark.step

    def _sync(self, sync: Sync) -> None:
        """Apply what is durable from here on; the rest stays pending."""
        synced: list[Change] = []
        left: list[Change] = []
        for change in self.pending:
            (synced if (0 if isinstance(change, Name) else change.file) == sync.file else left).append(change)
        self.durable, self.pending = self.durable.apply(synced), left

    def _crash(self, how: str, kept: list[Change], *, reboot: bool = True) -> Crash:
        return Crash(how, self.durable, list(kept), self.begun, self.acknowledged, self.synced, reboot)

    def _torn(self, number: int, write: Write) -> Iterator[Crash]:
        """The states within a write: parts of it, with everything before it kept."""
        for cut in sorted(edges(write)):
            torn = write._replace(data=write.data[:cut])
            yield self._crash(f"event {number}, torn at {cut}, killed", [*self.pending, torn], reboot=False)
            yield self._crash(f"event {number}, torn at {cut}", [*self.pending, torn])
        zeros = write._replace(data=bytes(len(write.data)))
        yield self._crash(f"event {number}, grown by zeros", [*self.pending, zeros])
        yield self._crash(f"event {number}, stale bytes", [*self.pending, write._replace(data=self._stale(len(write.data)))])

    def _stale(self, length: int) -> bytes:
        """Bytes that stood elsewhere on this disk before."""
        earlier = [event.data for event in self.disk.events if isinstance(event, Write) and not event.mapped]
        data = b"".join(self.choose.sample(earlier, min(3, len(earlier))))
        return (data * (length // max(1, len(data)) + 1))[:length]

    def _here(self, number: int) -> Iterator[Crash]:
        """The states between two calls."""
        pending, where = self.pending, f"event {number}"
        mapped = [change for change in pending if isinstance(change, Write) and change.mapped]
        others = [change for change in pending if not (isinstance(change, Write) and change.mapped)]
        yield self._crash(f"{where}, all kept, killed", pending, reboot=False)
        yield self._crash(f"{where}, all kept", pending)
        yield self._crash(f"{where}, only what was synced", [])
        yield self._crash(f"{where}, all but the keydir", others)
        yield self._crash(f"{where}, nothing but the keydir", mapped)
        yield self._crash(f"{where}, names without data", [change for change in pending if isinstance(change, Name)])
        yield self._crash(f"{where}, data without names", [change for change in pending if not isinstance(change, Name)])
        for index, change in self.choose.sample(list(enumerate(others)), min(len(others), self.singles)):
            pages = self._pages(mapped)
            yield self._crash(f"{where}, without pending {index}", [other for other in others if other is not change] + pages)
            yield self._crash(f"{where}, pending {index} alone", [change, *pages])
        for turn in range(self.random_subsets):
            part = self.choose.random()
            subset = [change for change in pending if self.choose.random() < part]
            yield self._crash(f"{where}, random subset {turn}", subset)

    def _pages(self, mapped: list[Change]) -> list[Change]:
        """Some pages of the keydir, each as it was at some time."""
        how = self.choose.randrange(3)
        return [] if how == 0 else mapped if how == 1 else [page for page in mapped if self.choose.random() < 0.5]


def edges(write: Write) -> set[int]:
    """Where a write can be torn: within its parts, and at the edges of sectors and pages."""
    length = len(write.data)
    cuts = {1, HEADER.size - 1, HEADER.size, HEADER.size + 3, length // 2, length - 1}
    for size in (SECTOR, PAGE):
        first = -write.offset % size or size
        cuts.update(range(first, length, size))
    return {cut for cut in cuts if 0 < cut < length}


class Restored:
    """In the place of `os` in `files`: the directory after a crash, whose keydir is the file that it was; syncs take no time."""

    def __init__(self, crash: Crash, disk: Disk, path: Path) -> None:
        self._inodes: dict[int, int] = {}
        path.mkdir()
        self.image = crash.image()
        for name, (number, data) in self.image.contents().items():
            (path / name).write_bytes(data)
            self._inodes[os.stat(path / name).st_ino] = disk.numbers[number]  # noqa: PTH116

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(files, "os", self)
        patch.setattr(portable, "os", self)
        patch.setattr(files, "_fdatasync", self.fsync)

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        """Nothing: the next crash is staged, too."""

    def fstat(self, fd: int) -> Status:
        return self._as_it_was(os.fstat(fd))

    def stat(self, *args: str, **kwargs: int) -> Status:
        return self._as_it_was(os.stat(*args, **kwargs))

    def _as_it_was(self, found: os.stat_result) -> Status:
        inode = self._inodes.get(found.st_ino, found.st_ino)
        return Status(found.st_dev, inode, found.st_nlink, found.st_size, found.st_mode, found.st_blocks)


class Status(NamedTuple):
    """What the engine asks a stat for."""

    st_dev: int
    st_ino: int
    st_nlink: int
    st_size: int
    st_mode: int
    st_blocks: int
