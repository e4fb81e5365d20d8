"""The portable layer: the same data files where the native one cannot be had, by nothing but open, seek, read, write and fsync.

What differs from `files`, and what it costs:

    the keydir is in the memory of the process     RAM for each key; an open reads the hints; no file `keydir`
    records are read, not mapped                   a get makes two system calls
    one process writes at a time                   the directory stays locked from the first write-open of a process to its last close
    files are found by path                        not by the descriptor of their directory
    a fork does not share                          a handle that a child inherits is closed there

All handles that a process has on a directory share its keydir, under the name that it has on the disk in the native layer: so the engine
above knows of no difference. Other processes read beside it as they do beside a keydir that is not to be trusted: by an index of their own.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import secrets
import stat
import sys
import threading
import weakref
from array import array
from contextlib import suppress
from time import sleep
from typing import TYPE_CHECKING, Any

from . import files, header, names
from .errors import error
from .files import Identity

fcntl: Any = None
msvcrt: Any = None
with suppress(ImportError):  # Windows, WASM
    import fcntl
with suppress(ImportError):
    import msvcrt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer

    from .files import Map

__all__ = ["AUTO", "Directory", "File", "Memory", "open_directory"]

AUTO = "native" if files.NATIVE else "portable"
_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
_OPEN = _CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_POLL = 0.01  # seconds between two looks at a lock that cannot be waited for
_BOOT = secrets.randbits(128) | 1  # what is in memory is as old as the process
_inodes = itertools.count(1)


def open_directory(path: str, layer: str = "auto") -> files.Directory:
    """The directory of a database by the layer "native", "portable" or, with "auto", the native one where it is to be had."""
    chosen = AUTO if layer == "auto" else layer
    if chosen == "native" and not files.NATIVE:
        raise error(errno.ENOTSUP, 'files="native" needs a 64-bit little-endian CPython on POSIX; open it with files="auto"', path)
    return files.Directory(path) if chosen == "native" else Directory(path)


class File(files.File):
    """A regular file that is read by seek and read."""

    def __init__(self, fd: int, name: str) -> None:
        files.Descriptor.__init__(self, fd, name)
        self.opened = self.identity()
        self._position = threading.Lock()  # the threads of a process share it

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def pwrite(self, data: bytes, offset: int) -> int:
        with self._position:
            os.lseek(self.fd, offset, os.SEEK_SET)
            return os.write(self.fd, data)

    def pwritev(self, parts: Sequence[Buffer], offset: int) -> int:  # noqa: ARG002
        """Nothing: not every system has a call for it, and `write_rest` does it all."""
        return 0

    def read(self, length: int, offset: int) -> bytes:
        with self._position:
            os.lseek(self.fd, offset, os.SEEK_SET)
            data = os.read(self.fd, length)
            while len(data) < length and (more := os.read(self.fd, length - len(data))):
                data += more
        return data

    def sync_contents(self) -> None:
        self.sync()

    def map(self, length: int, *, write: bool = False) -> bytes:  # noqa: ARG002  (only a keydir is written by a map)
        return self.read(length, 0).ljust(length, b"\0")  # as the last page of a map

    def map_without_descriptor(self, length: int) -> bytes:
        return self.map(length)


class Memory(files.File):
    """What stands for the file of a keydir. It is moved as it grows, and so grows only as long as nobody shares it."""

    grows_shared = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.grows = True
        self._inode = next(_inodes)
        self._bytes = bytearray()

    def size(self) -> int:
        return len(self._bytes)

    @property
    def opened(self) -> Identity:  # type: ignore[override]
        return self.identity()

    def identity(self) -> Identity:
        return Identity(0, self._inode, 1, len(self._bytes), stat.S_IFREG)

    def reserve(self, offset: int, length: int) -> None:
        if offset + length > len(self._bytes):
            larger = bytearray(offset + length)
            larger[: len(self._bytes)] = self._bytes
            self._bytes = larger

    def map(self, length: int, *, write: bool = False) -> Map:
        view = memoryview(self._bytes)[:length]
        return view if write else view.toreadonly()  # type: ignore[return-value]

    def read(self, length: int, offset: int) -> bytes:
        return bytes(self._bytes[offset : offset + length])

    def sync(self) -> None:
        """Nothing is durable in memory."""

    def keep_blocks(self) -> None:
        """There are none."""

    def lock(self) -> None:
        """Other processes do not share it; threads that sync at once may do so twice."""

    def try_lock(self) -> bool:
        return True

    def unlock(self) -> None:
        pass


class _Shared:
    """What the handles of this process on one directory share: its keydir, and the lock, which they hold until the last of them goes."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.memory: dict[str, Memory] = {}
        self.handles = 0  # that are open
        self._held: list[files.Descriptor] = []

    def lock(self, path: str, device: int, *, wait: bool) -> bool:
        if not self._held:
            held = list(_locks(path, device))
            for descriptor, lock in held:
                while not _try_lock(lock, descriptor.fd):
                    if not wait:
                        return False
                    sleep(_POLL)
            self._held = [descriptor for descriptor, _ in held]
        return True

    def closed(self) -> None:
        """A handle is closed; with the last one goes the lock, at once and not when its object goes."""
        self.handles -= 1
        if self.handles <= 0:
            self.memory.clear()
            self._held = []  # nobody else has them: so they are closed
            if sys.implementation.name != "cpython":
                gc.collect()


def _locks(path: str, device: int) -> Iterator[tuple[files.Descriptor, str]]:
    """What to lock, and how: the directory itself, so that the native layer and this one keep each other out.

    That is for one machine. On Windows, and where other machines see the file system, it is a file in the directory, too.
    """
    if fcntl is not None:
        yield files.Descriptor(os.open(path, os.O_RDONLY | _CLOEXEC), path), "flock"
        if not files.is_remote(device):
            return
    present = os.listdir(path)
    if present and names.MANIFEST not in present and names.LOCK not in present:
        return  # a foreign directory: nothing is made in it
    how = "lockf" if fcntl is not None else "locking"
    yield files.Descriptor(os.open(os.path.join(path, names.LOCK), os.O_RDWR | os.O_CREAT | _OPEN, 0o666), path), how


def _try_lock(how: str, fd: int) -> bool:
    try:
        if how == "locking":
            if msvcrt is not None:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            getattr(fcntl, how)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


_shared: weakref.WeakValueDictionary[tuple[int, int], _Shared] = weakref.WeakValueDictionary()
_mutex = threading.RLock()  # of a thread that forks: taken before, so that no other has it in the child
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=lambda: _leave_to_parent())


def _leave_to_parent() -> None:
    """In a child: the locks are the parent's, and must go with it."""
    for shared in list(_shared.values()):
        if shared.pid != os.getpid():
            shared.handles = 1
            shared.closed()
    _mutex.release()


class Directory(files.Directory):
    """The directory of a database by its path, with a keydir in memory."""

    layer = "portable"
    can_map = False
    survives_fork = False

    def __init__(self, path: str) -> None:
        self.name = path
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        self.renew()

    def renew(self) -> None:
        """Also in a child of a fork: what the parent has in memory and its lock are the parent's."""
        self._place = self.identity()[:2]
        with _mutex:
            shared = _shared.get(self._place)
            if shared is None or shared.pid != os.getpid():
                shared = _shared[self._place] = _Shared()
        self._shared = shared
        self._memory = shared.memory

    def identity(self) -> Identity:
        return _identity(os.stat(self.name))

    def free_bytes(self) -> int:
        return files.free_bytes(self.name)

    def sync(self) -> None:
        """Make the names durable, where a directory can be opened."""
        if os.name == "posix":
            files.Descriptor(os.open(self.name, os.O_RDONLY | _CLOEXEC), self.name).sync()

    def lock(self) -> None:
        self._require_place()
        self._shared.lock(self.name, self._place[0], wait=True)

    def unlock(self) -> None:
        """It stays locked until the last handle is closed: nobody else sees the keydir."""

    def try_lock(self) -> bool:
        self._require_place()
        return self._shared.lock(self.name, self._place[0], wait=False)

    def begin(self) -> None:
        with _mutex:
            self._shared.handles += 1

    def end(self) -> None:
        with _mutex:
            if self._shared.pid == os.getpid():
                self._shared.closed()

    def is_in_place(self) -> bool:
        try:
            return self.identity()[:2] == self._place
        except OSError:
            return False

    def _require_place(self) -> None:
        """Files are found by path: another database must not be written to that has taken it."""
        if not self.is_in_place():
            raise error(errno.ESTALE, "another directory has taken the place of this database; nothing was written", self.name)

    def open(self, name: str, *, write: bool = False) -> files.File:
        if name in self._memory:
            return self._memory[name]
        if name == names.KEYDIR and self._is_native_keydir():
            raise FileNotFoundError(errno.ENOENT, "the layer in use has no file of this name", self.where(name))
        return self._open(name, write=write)

    def _open(self, name: str, *, write: bool) -> File:
        if not stat.S_ISREG(os.lstat(self.where(name)).st_mode):
            raise self._irregular(name)  # before it is opened: where there is no O_NOFOLLOW
        return File(os.open(self.where(name), (os.O_RDWR if write else os.O_RDONLY) | _OPEN), self.where(name))

    def create(self, name: str, mode: int) -> files.File:
        if _is_keydir(name):
            self._leave_native_keydir()
            self._memory[name] = Memory(self.where(name))
            return self._memory[name]
        return File(os.open(self.where(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, mode), self.where(name))

    def _leave_native_keydir(self) -> None:
        """Delete the keydir that knows nothing of what is written here, and tell those who have it mapped."""
        if not self._is_native_keydir():
            return
        file = self._open(names.KEYDIR, write=True)
        words = array("Q", file.read(8 * (header.INODE + 1), 0)) if file.size() > header.PAGE_SIZE else array("Q")
        if words and words[header.INODE] == file.opened.inode:  # else it is a copy, or a backup's, too
            file.write(array("Q", [words[header.EPOCH] + 1 & header.MASK64]).tobytes(), 8 * header.EPOCH)
            file.write(array("Q", [header.MOVED]).tobytes(), 8 * header.STATE)
        os.unlink(self.where(names.KEYDIR))

    def _is_native_keydir(self) -> bool:
        """Whether there is a file `keydir` that the native layer made, or began to make."""
        try:
            file = self._open(names.KEYDIR, write=False)
        except FileNotFoundError:
            return False
        return file.read(8, 0) in (header.MAGIC_WORD.to_bytes(8, "little"), bytes(8), b"")

    def temporary_file(self) -> files.File:
        return Memory("temporary keydir")

    def identity_of(self, name: str) -> Identity | None:
        if name in self._memory:
            return self._memory[name].identity()
        try:
            return _identity(os.lstat(self.where(name)))
        except FileNotFoundError:
            return None

    def replace(self, old: str, new: str) -> None:
        if old in self._memory:
            self._memory[old].grows = False
            self._memory[new] = self._memory.pop(old)
        else:
            os.replace(self.where(old), self.where(new))

    def link(self, name: str, new: str) -> None:
        self._copy(name, new)

    def link_from(self, source: files.Directory, name: str) -> bool:
        try:
            os.link(source.where(name), self.where(name), follow_symlinks=False)
        except FileNotFoundError:
            raise
        except (OSError, AttributeError, NotImplementedError):
            return False
        return True

    def remove(self, name: str) -> None:
        if self._memory.pop(name, None) is not None:
            return
        with suppress(FileNotFoundError, *([PermissionError] if sys.platform == "win32" else [])):  # open elsewhere: it is swept later
            os.unlink(self.where(name))

    def list(self) -> list[str]:
        own = {*self._memory, *([names.KEYDIR] if self._is_native_keydir() else [])}
        return [name for name in os.listdir(self.name) if name not in own] + [*self._memory]

    def disk_bytes(self) -> int:
        total = 0
        for name in os.listdir(self.name):
            with suppress(FileNotFoundError):
                status = os.lstat(self.where(name))
                total += getattr(status, "st_blocks", -(-status.st_size // 512)) * 512
        return total

    def boot_id(self) -> int:
        return _BOOT

    def maps_at_a_time(self) -> int:
        """One segment is held in memory as a whole: the one that a merge reads."""
        return 1

    def refuse_remote(self) -> None:
        """One process at a time, and no map: any file system that has locks will do."""


def _is_keydir(name: str) -> bool:
    return name == names.KEYDIR or (name.startswith(names.KEYDIR) and names.is_temporary(name))


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_nlink, status.st_size, status.st_mode)
