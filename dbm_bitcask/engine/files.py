"""The operating system, as far as the engine needs it: with `portable` the one place that opens, reads, writes, maps and locks.

Rule 1: every file is reached through the descriptor of its directory, so that a handle stays with its database when the path is renamed
or another directory is put in its place.
Rule 2: a descriptor is closed when the last reference to its object goes, never by hand: a number must not be reused under a reader.
Rule 3: only regular files, never through a symbolic link, never waiting for a FIFO.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import error

try:
    import fcntl
    import resource
except ImportError:  # Windows, WASM: `portable` needs what is common to both layers
    fcntl = resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from typing_extensions import Buffer

    Map: TypeAlias = mmap.mmap | bytes

__all__ = [
    "Directory",
    "File",
    "Identity",
    "Map",
    "NATIVE",
    "boot_id",
    "fence",
    "is_alive",
    "is_directory",
    "is_remote",
    "make_directory",
    "maps_at_a_time",
    "remove_directory",
    "remove_empty_file",
    "rename_directory",
    "temporary_file",
]

NATIVE = os.name == "posix" and sys.maxsize > 2**32 and sys.byteorder == "little" and sys.implementation.name == "cpython"

# Before 3.13 every map keeps a descriptor of its own.
_MAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_MAPS = 65530  # that a process may have, unless vm.max_map_count says otherwise
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK if NATIVE else 0
_FSYNC_FULL = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone does not reach the disk's platters
_fdatasync = getattr(os, "fdatasync", os.fsync)
_GATHERS = hasattr(os, "pwritev")

# Linux: keep copy-on-write file systems from needing a new block for each page of the map that is written back (SIGBUS when full).
_GET_FLAGS, _SET_FLAGS, _NO_COW = 0x80086601, 0x40086602, 0x00800000


_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "virtiofs"}


_fences = threading.Lock()


def _fence() -> None:
    for _ in range(2):
        _fences.acquire()
        _fences.release()


# Keeps the loads and stores of shared words before it from being seen behind those after it. x86-64 keeps loads in order among each other,
# and stores, so that there it is None; elsewhere two cycles of a lock order them, which nothing in Python promises but every lock does.
fence = None if NATIVE and os.uname().machine in ("x86_64", "AMD64") else _fence


class Identity(NamedTuple):
    """What tells one file from another, and how large it is."""

    device: int
    inode: int
    links: int
    size: int
    mode: int


class Descriptor:
    """An open file description; the descriptor goes with the object."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd  # first: whatever interrupts from here on, the descriptor goes with the object
        self.name = name
        if fd < 3 and fcntl is not None:  # a print() of a program that closed its stdout must not land in a segment
            self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(fd)
            _occupy_standard_streams()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)

    def identity(self) -> Identity:
        status = os.fstat(self.fd)
        return Identity(status.st_dev, status.st_ino, status.st_nlink, status.st_size, status.st_mode)

    def sync(self) -> None:
        """Make contents and metadata durable (fsync)."""
        if _FSYNC_FULL is not None:
            fcntl.fcntl(self.fd, _FSYNC_FULL)
        else:
            os.fsync(self.fd)


class File(Descriptor):
    """A regular file. `size()`, `pwrite(data, offset)` and `pwritev(parts, offset)`, which writes parts that follow each other without
    putting them together first, are the bare system calls: they stand in the path of every write.
    """

    grows = grows_shared = True  # while other handles map it, too

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        self.opened = self.identity()  # as it was then
        self._mapped = False
        self.size: Callable[[], int] = partial(os.lseek, self.fd, 0, os.SEEK_END)
        self.pwrite: Callable[[bytes, int], int] = partial(os.pwrite, self.fd)
        self.pwritev: Callable[[Sequence[Buffer], int], int] = partial(os.pwritev, self.fd) if _GATHERS else _write_nothing

    def read(self, length: int, offset: int) -> bytes:
        """At most `length` bytes from `offset`; fewer only where the file ends."""
        data = os.pread(self.fd, length, offset)
        while len(data) < length and (more := os.pread(self.fd, length - len(data), offset + len(data))):
            data += more
        return data

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            done = self.pwrite(view, offset)  # type: ignore[arg-type]
            if not done:
                raise error(errno.EIO, "nothing could be written", self.name)
            view, offset = view[done:], offset + done

    def write_rest(self, parts: Sequence[Buffer], offset: int, done: int) -> None:
        """Write what `pwritev`, which wrote `done` bytes, has left of `parts`."""
        for part in parts:
            view = memoryview(part)
            self.write(view[done:], offset + min(done, len(view)))
            done, offset = max(0, done - len(view)), offset + len(view)

    def sync_contents(self) -> None:
        """Make contents and length durable (fdatasync)."""
        if _FSYNC_FULL is not None:
            fcntl.fcntl(self.fd, _FSYNC_FULL)
        else:
            _fdatasync(self.fd)

    def lock(self) -> None:
        """Wait for the record lock on this file. It is this process's, not a thread's; closing any descriptor of the file drops it."""
        fcntl.lockf(self.fd, fcntl.LOCK_EX)

    def try_lock(self) -> bool:
        """Take the record lock if it is free."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self) -> None:
        """Drop the record lock."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN)

    def truncate(self, length: int) -> None:
        os.ftruncate(self.fd, length)

    def reserve(self, offset: int, length: int) -> None:
        """Allocate the range, so that a later write into a map of it cannot run out of space."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.fd, offset, length)
                return
            except OSError as failure:
                if failure.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        self.write(bytes(length), offset)

    def map(self, length: int, *, write: bool = False) -> Map:
        """The first `length` bytes as shared memory."""
        if self._mapped and not _MAP_OPTIONS:
            _occupy_standard_streams()  # a program may have closed them since the file was opened
        self._mapped = True
        return mmap.mmap(self.fd, length, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ, **_MAP_OPTIONS)

    def map_without_descriptor(self, length: int) -> Buffer:
        """The same to be read, but it keeps no descriptor before Python 3.13 either: for more maps than there are descriptors."""
        if _MAP_OPTIONS:
            return self.map(length)
        import ctypes  # takes time, and few need it

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), self.name)
        pages = (ctypes.c_char * length).from_address(address)
        weakref.finalize(pages, libc.munmap, address, length)
        return memoryview(pages).cast("B").toreadonly()

    def keep_blocks(self) -> None:
        """Ask a copy-on-write file system to write this (still empty) file in place; others do not know the flag."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                flags = int.from_bytes(fcntl.ioctl(self.fd, _GET_FLAGS, bytes(8)), sys.byteorder)
                fcntl.ioctl(self.fd, _SET_FLAGS, (flags | _NO_COW).to_bytes(8, sys.byteorder))


def _write_nothing(parts: Sequence[Buffer], offset: int) -> int:  # noqa: ARG001
    """Stands for a system call that is not there: `write_rest` does it all."""
    return 0


class Directory(Descriptor):
    """The directory of a database: names are looked up in it by descriptor, and its descriptor is what writers lock."""

    layer = "native"
    can_map = True
    survives_fork = True

    def __init__(self, path: str, *, at: int | None = None) -> None:
        super().__init__(os.open("." if at is not None else path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at), path)
        self.lock: Callable[[], None] = partial(fcntl.flock, self.fd, fcntl.LOCK_EX)
        self.unlock: Callable[[], None] = partial(fcntl.flock, self.fd, fcntl.LOCK_UN)

    def try_lock(self) -> bool:
        """Take the lock if it is free."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def renew(self) -> None:
        """Go on by another open file description, which does not share its locks, under the same number."""
        fresh = Directory(self.name, at=self.fd)
        os.dup2(fresh.fd, self.fd, inheritable=False)

    def where(self, name: str) -> str:
        """The path of a file, for messages only."""
        return os.path.join(self.name, name)

    def open(self, name: str, *, write: bool = False) -> File:
        """Open a regular file that exists; FileNotFoundError if it does not."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | _OPEN
        try:
            file = File(os.open(name, flags, dir_fd=self.fd), self.where(name))
        except OSError as failure:
            if failure.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._irregular(name) from failure
            raise
        if not stat.S_ISREG(file.opened.mode):
            raise self._irregular(name)
        return file

    def create(self, name: str, mode: int) -> File:
        """Create a regular file for reading and writing; FileExistsError if the name is taken."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, mode, dir_fd=self.fd)
        return File(fd, self.where(name))

    def identity_of(self, name: str) -> Identity | None:
        """The identity of a name in this directory, or None if it is not there."""
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return Identity(status.st_dev, status.st_ino, status.st_nlink, status.st_size, status.st_mode)

    def replace(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def link(self, name: str, new: str) -> None:
        """Give a file another name besides; a copy of it where the file system has no links."""
        try:
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except PermissionError:
            self._copy(name, new)

    def _copy(self, name: str, new: str) -> None:
        source, copy = self.open(name), self.create(new, 0o600)
        copy.write(source.read(source.opened.size, 0), 0)

    def link_from(self, source: Directory, name: str) -> bool:
        """Give a file of another directory the same name here; False where the two cannot share a file."""
        try:
            os.link(name, name, src_dir_fd=source.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except OSError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Unlink a name; nothing happens if it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def list(self) -> list[str]:
        return os.listdir(self.fd)

    def begin(self) -> None:
        """A handle is open here."""

    def end(self) -> None:
        """It is closed."""

    def is_in_place(self) -> bool:
        """Whether what is found by this object is still what was opened."""
        return True

    def temporary_file(self) -> File:
        """An unlinked file outside the database, gone with the last reference."""
        return temporary_file()

    def maps_at_a_time(self) -> int:
        """How many maps one handle may keep."""
        return maps_at_a_time()

    def boot_id(self) -> int:
        """A number that is the same until the machine restarts; 0 where the system does not tell."""
        return boot_id()

    def refuse_remote(self) -> None:
        """Raise where two machines could write at once, or where a map of a file is not the file."""
        kind = _remote_kind(self.identity().device)
        if kind:
            reason = f'the file system is {kind}: a database needs a local one; or open it with files="portable", one process at a time'
            raise error(errno.EOPNOTSUPP, reason, self.name)

    def free_bytes(self) -> int:
        """The bytes that the file system has left for this user."""
        return free_bytes(self.fd)

    def disk_bytes(self) -> int:
        """The bytes that the files in this directory take on the disk."""
        total = 0
        for name in self.list():
            with contextlib.suppress(FileNotFoundError):  # merged away in between
                total += os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_blocks * 512
        return total

    def _irregular(self, name: str) -> error:
        return error(
            errno.EINVAL,
            "not a regular file (move it away: a database is made of regular files only)",
            self.where(name),
        )


def _occupy_standard_streams() -> None:
    """Have /dev/null under those of the first three numbers that are closed.

    Before Python 3.13 a map keeps a descriptor of its own, and what is printed would land in the file.
    """
    for fd in range(3):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def is_remote(device: int) -> bool:
    """Whether other machines may see the file system."""
    return _remote_kind(device) is not None


def make_directory(path: str, mode: int) -> None:
    """Create a directory; its name is durable when its parent is synced."""
    os.mkdir(path, mode)


def is_directory(path: str) -> bool:
    """Whether a directory is there, as far as one may know."""
    return os.path.isdir(path)


def rename_directory(path: str, new: str) -> None:
    """Give a directory another path, where nothing is yet, or an empty directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rmdir(new)  # not every system replaces it
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(path, new)


def remove_directory(path: str) -> None:
    """Remove an empty directory, if it is there."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def remove_empty_file(path: str) -> None:
    """Unlink a regular file without contents; nothing happens to anything else."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        os.unlink(path)


def _remote_kind(device: int) -> str | None:
    """The name of the file system if it is one that others see, too."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            kinds = [line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == number]
    except (OSError, IndexError):
        return None  # no Linux: nothing tells
    return next((kind for kind in kinds if kind in _REMOTE or kind.startswith("fuse")), None)


def temporary_file() -> File:
    """An unlinked file outside the database, gone with the last reference."""
    import tempfile  # only a reader that finds no trusted keydir needs it

    with tempfile.TemporaryFile() as stream:
        return File(os.dup(stream.fileno()), "temporary keydir")


def maps_at_a_time() -> int:
    """How many maps one handle may keep, so that a program is left enough for itself: descriptors where each map keeps one, else maps."""
    if _MAP_OPTIONS:
        return _MAPS // 4
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1024 if limit == resource.RLIM_INFINITY else max(8, min(1024, limit // 4))


def free_bytes(place: int | str) -> int:
    """The bytes that a file system has left for this user; very many where it does not tell."""
    try:
        status = os.statvfs(place)
    except (OSError, AttributeError):
        return 2**63
    return status.f_bavail * status.f_frsize


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def boot_id() -> int:
    """A number that is the same until the machine restarts; 0 where the system does not tell."""
    try:
        fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(os.read(fd, 64).replace(b"-", b""), 16)
    except (OSError, ValueError):
        return 0
    finally:
        os.close(fd)
