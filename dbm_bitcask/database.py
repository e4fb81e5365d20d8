"""Database: the mapping that a user of dbm sees. Knows flags, str and the errors of the standard library; leaves the rest to the engine."""

from __future__ import annotations

import os
from collections.abc import Container, ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from contextlib import suppress
from threading import TIMEOUT_MAX
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .batch import Batch, batch_of
from .engine.errors import CLOSED, FlagError, NotFoundError, as_error, error
from .engine.store import (
    BATCH_LIMIT,
    MAXIMUM_SEGMENT,
    MINIMUM_SEGMENT,
    OVERHEAD,
    SIZE_LIMIT,
    UPDATE_LIMIT,
    Options,
    Stats,
    Store,
    is_database,
    lifetime,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Literal, Self, TypeAlias
    from weakref import ref

    from typing_extensions import Buffer

    Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Bytes: TypeAlias = str | Buffer
    Items: TypeAlias = Mapping[str, Bytes] | Mapping[bytes, Bytes] | Mapping[str | bytes, Bytes] | Iterable[tuple[Bytes, Bytes]]

    Flag = Literal[
        "r", "w", "c", "n", "rf", "wf", "cf", "nf", "rs", "ws", "cs", "ns", "ru", "wu", "cu", "nu",
        "rfu", "wfu", "cfu", "nfu", "rsu", "wsu", "csu", "nsu", "ruf", "wuf", "cuf", "nuf", "rus", "wus", "cus", "nus",
    ]  # fmt: skip
    Sync: TypeAlias = Literal["never", "always"] | float
    Files: TypeAlias = Literal["auto", "native", "portable"]
    Merge: TypeAlias = Literal["auto", "thread", "manual"]
    Compression: TypeAlias = Literal["zlib", "zstd"]

__all__ = ["Database", "open", "whichdb"]

Default = TypeVar("Default")

_ERR_READONLY = "The database is opened for reading only"
_MISSING = object()
_BREATH = 0.0002  # seconds between two batches of an update: or the lock would be taken again before anybody who waits is awake
_WALKS = 16  # by `nextkey` that one handle remembers, as of several threads; one that is forgotten is found again by its key
_BY_DEFAULT: Any = "".join(("ne", "ver"))  # equal to "never" and another object: whether `sync` was given shows in its identity


def open(
    file: Path,
    flag: Flag = "c",
    mode: int = 0o666,
    *,
    sync: Sync = _BY_DEFAULT,
    segment_size: int = 64 * 2**20,
    timeout: float | None = None,
    files: Files = "auto",
    merge: Merge = "auto",
    compress: Compression | None = None,
) -> Database:
    """Open the database at `file`, a directory. Any number of processes and threads may have it open, and write.

    `flag` is "r" (read only), "w" (read and write), "c" (the same, created if it does not exist) or "n" (always a new, empty one), followed
    by any of "f" (sync="never"), "s" (sync="always") and "u" (no lock is taken: the caller promises that no other process uses the
    database). `mode` is that of new files under the umask; a new directory also gets the right to search it wherever it may be read.

    `sync` says what survives a power cut; killing the process never loses what was acknowledged. "never", the default: everything up to the
    last `sync()` or `close()`, and of what came later a prefix. A number: the same, and at most that many seconds are lost; no write waits
    for the disk. "always": everything, at the price of an fsync for every change, which writers that wait at the same time share.
    `segment_size` is the size in bytes, at least 4096, from which on a data file is closed and a new one begun. `timeout` is how many
    seconds a change waits for another writer before it raises `LockTimeout`; None is for ever, and so is infinity.

    `files` is "native" (memory maps; 64-bit CPython on POSIX, a local file system), "portable" (the same data files by plain reads: for
    Windows, 32 bits, PyPy and network file systems; one process writes at a time, for as long as it has the database open; an open reads
    all keys, which then take memory; a fork does not share the handle) or "auto", the first that can be had.

    `merge` says who gives back the space of what was overwritten and deleted. "auto": those who write, some milliseconds now and then, so
    that about half of the log is dead; "thread": they do, and besides a thread of this process while it is idle, down to a
    quarter; "manual": whoever calls `merge` or `reorganize`.

    `compress` is "zlib", "zstd" (in the standard library from Python 3.14 on; before it needs `dbm-bitcask[zstd]`) or None: how this handle
    stores values of at least 256 bytes, each by itself, if that saves an eighth. It is in the record which it is: whoever reads needs no
    option, and handles with different ones may write.

    Raises `error`; where there is no database and none is to be created, it is a FileNotFoundError, too; for an unknown flag a ValueError.
    O(1), after a restart of the machine at most O(keys).
    """
    letter, suffix = _parse(flag)
    interval = _interval(flag, suffix, sync)
    if not MINIMUM_SEGMENT <= segment_size <= MAXIMUM_SEGMENT:
        raise ValueError(f"segment_size must be from {MINIMUM_SEGMENT} to {MAXIMUM_SEGMENT} bytes, not {segment_size!r}")
    if timeout == float("inf"):
        timeout = None
    if timeout is not None and not 0 <= timeout <= TIMEOUT_MAX:
        raise ValueError(f"timeout must be None or a number of seconds from 0 to {TIMEOUT_MAX:.0f}, not {timeout!r}")
    if files not in ("auto", "native", "portable"):
        raise ValueError(f"files must be 'auto', 'native' or 'portable', not {files!r}")
    if merge not in ("auto", "thread", "manual"):
        raise ValueError(f"merge must be 'auto', 'thread' or 'manual', not {merge!r}")
    if compress not in (None, "zlib", "zstd"):
        raise ValueError(f"compress must be 'zlib', 'zstd' or None, not {compress!r}")
    given = os.fsdecode(file)
    if not given:  # which abspath would take for the working directory
        raise NotFoundError(2, "no database here", given)
    path = os.path.abspath(given)  # noqa: PTH100  (a later chdir must not change what messages say)
    try:
        options = Options(mode, segment_size, timeout, "u" in suffix, files, merge, compress)
        return _open(path, letter, options, interval)
    except NotFoundError as failure:
        failure.filename = given  # as the standard library's errors have it
        raise


def _open(path: str, letter: str, options: Options, interval: float | None) -> Database:
    try:
        if letter == "r":
            store = Store.open_reader(path, options)
        elif letter == "n":
            store = Store.open_new(path, options, interval)
        else:
            store = Store.open_writer(path, options, interval, create=letter == "c")
    except error:
        raise
    except OSError as failure:
        raise as_error(failure, path) from failure
    # Pickled, a handle of flag n or c becomes one of flag w: it must not wipe what it is a handle of.
    return Database(store, path, (path, "r" if letter == "r" else "w", options, interval))


def _parse(flag: Any) -> tuple[str, str]:
    suffix = flag[1:] if isinstance(flag, str) and flag[:1] in ("r", "w", "c", "n") else "?"
    if set(suffix) - set("fsu") or len(set(suffix)) < len(suffix) or {"f", "s"} <= set(suffix):
        raise FlagError(f"Flag must be one of 'r', 'w', 'c', or 'n', not {flag!r}")
    return flag[0], suffix


def _interval(flag: str, suffix: str, sync: Any) -> float | None:
    """The seconds after which writes are durable: 0 for at once, None for not before they are asked to be."""
    meant = "always" if "s" in suffix else "never" if "f" in suffix else sync
    if sync is not _BY_DEFAULT and sync != meant:
        raise ValueError(f"flag {flag!r} means sync={meant!r}, and sync={sync!r} was given")
    if meant in ("never", "always"):
        return 0.0 if meant == "always" else None
    if isinstance(meant, bool) or not isinstance(meant, (int, float)) or not 0 < meant <= TIMEOUT_MAX:
        raise ValueError(f"sync must be 'never', 'always' or a number of seconds above 0, at most {TIMEOUT_MAX:.0f}, not {sync!r}")
    return float(meant)


def whichdb(file: Path) -> str | None:
    """ "dbm_bitcask" if `file` is a database of ours, else None. Reads the first bytes of its manifest; never asks `dbm`."""
    return "dbm_bitcask" if is_database(os.fsdecode(file)) else None


def _as_bytes(data: object, what: str) -> bytes:
    """The bytes of a str or a bytes-like object; those that are too large are refused before they are copied."""
    if type(data) is bytes:
        return data
    if isinstance(data, str):
        return str.encode(data)
    try:
        view = memoryview(data)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} must be bytes or strings") from None
    _require_size(view.nbytes)
    return view.tobytes()


def _require_size(size: int) -> None:
    if size > SIZE_LIMIT:
        raise ValueError(f"key and value have {size} bytes; at most {SIZE_LIMIT} fit a record")


class _Container(Container[Any]):
    """For type checkers: else they took `"key" in db` for a mistake, as what is iterated is bytes."""

    __slots__ = ()


class Database(_Container, MutableMapping[bytes, bytes]):
    """A mapping of bytes to bytes on the disk, as `open` returns it.

    Keys and values may be given as str (stored in UTF-8) or as any bytes-like object; they come back as bytes. Besides what every mutable
    mapping has:

        set, ttl, touch          keys that expire after some time
        firstkey, nextkey        walk the keys one call at a time, as with dbm.gnu
        iterkeys                 the same as iter, as with dbm.dumb
        sync, close              make durable; end the use (also as a context manager)
        batch                    several changes, all or nothing after a crash
        merge, reorganize        give back the space of what was overwritten and deleted
        backup                   a copy as of now, while others write
        stats                    sizes and counts

    Every method raises `error` when the database is closed, when it is damaged, or when the file system fails; those that change it also
    if it was opened for reading only.

    The database may be changed while it is iterated: every key that is present all the time is met exactly once, and the loop ends.
    """

    def __init__(self, store: Store, path: str, how: tuple[str, str, Options, float | None]) -> None:
        self._store = store
        self._log = store.log
        self._path = path
        self._how = how
        self._writable = how[1] != "r"
        self._cursors: dict[bytes, Iterator[bytes]] = {}  # of walks by `nextkey`: the last key of each
        self._batches: dict[int, ref[Batch]] = {}  # by the thread that is in it

    def __repr__(self) -> str:
        state = "closed " if self._store.closed else ""
        return f"<{state}dbm_bitcask.Database {self._path!r}>"

    def __reduce__(self) -> tuple[Callable[..., Database], tuple[str, str, Options, float | None]]:
        """Pickle as a handle on the same database, opened again where it is unpickled."""
        self._open_store()
        return _open, self._how

    def _open_store(self) -> Store:
        if self._store.closed:
            raise error(CLOSED)
        return self._store

    def _writable_store(self) -> Store:
        if self._store.closed:
            raise error(CLOSED)
        if not self._writable:
            raise error(_ERR_READONLY)
        return self._store

    # One key.

    def __getitem__(self, key: Bytes) -> bytes:
        """The value of a key; KeyError if it is not there. O(1), verified."""
        if type(key) is not bytes:
            key = _as_bytes(key, "keys")
        try:
            value = self._log.get(key) if not self._batches else self._get(key)
        except error:
            raise
        except OSError as failure:
            raise as_error(failure, self._path) from failure
        if value is None:
            raise KeyError(key)
        return value

    @overload
    def get(self, key: Bytes) -> bytes | None: ...
    @overload
    def get(self, key: Bytes, default: Default) -> bytes | Default: ...
    def get(self, key: Bytes, default: Any = None) -> Any:
        """The value of a key, or `default` if it is not there. O(1), verified."""
        if type(key) is not bytes:
            key = _as_bytes(key, "keys")
        try:
            value = self._log.get(key) if not self._batches else self._get(key)
        except error:
            raise
        except OSError as failure:
            raise as_error(failure, self._path) from failure
        return default if value is None else value

    def __contains__(self, key: object) -> bool:
        """Whether a key is there. O(1); the value is not read, unless the key expires."""
        store = self._batch() or self._open_store()
        return self._call(store.contains, _as_bytes(key, "keys"))

    def __setitem__(self, key: Bytes, value: Bytes) -> None:
        """Set a key, for ever. O(1): one record is appended."""
        if self._store.closed or not self._writable:
            self._writable_store()
        if type(key) is not bytes:
            key = _as_bytes(key, "keys")
        if type(value) is not bytes:
            value = _as_bytes(value, "values")
        if len(key) + len(value) > SIZE_LIMIT:
            _require_size(len(key) + len(value))
        try:
            if self._batches and (batch := self._batch()) is not None:
                batch.put(key, value)
            else:
                self._store.set(key, value)
        except error:
            raise
        except OSError as failure:
            raise as_error(failure, self._path) from failure

    def set(self, key: Bytes, value: Bytes, ttl: float | None = None) -> None:
        """Set a key; with `ttl`, for so many seconds from now on, after which it is gone for every process at once. O(1).

        The end is a moment of the system's clock, which all processes share, to the millisecond. So it outlives reopening, merges and
        backups; if the clock is set forward, the key goes early; if it is set back, it lives longer, and a key that had expired is there
        again, unless a merge has deleted it. What was written last is never decided by a clock. Whatever else sets the key takes its time
        to live away.

        ValueError if `ttl` is not above 0, or above 292 million years; TypeError if it is no number.

        >>> import dbm_bitcask, os, tempfile
        >>> db = dbm_bitcask.open(os.path.join(tempfile.mkdtemp(), "example"))
        >>> db.set("session", "ada", ttl=1800)
        >>> 1790 < db.ttl("session") <= 1800
        True
        """
        store = self._writable_store()
        key, value = _as_bytes(key, "keys"), _as_bytes(value, "values")
        _require_size(len(key) + len(value))
        batch = self._batch()
        self._call(store.set if batch is None else batch.put, key, value, *lifetime(ttl))

    def ttl(self, key: Bytes) -> float | None:
        """The seconds that are left to a key, above 0; None if it does not expire; KeyError if it is not there. O(1), verified."""
        store = self._open_store()
        return self._call((self._batch() or store).ttl, _as_bytes(key, "keys"))

    def touch(self, key: Bytes, ttl: float | None) -> None:
        """Let a key live for `ttl` seconds from now on, or for ever if that is None; KeyError if it is not there.

        The value is not changed, but its record is appended again: O(bytes of it). `ttl` is as `set` takes it.
        """
        store = self._writable_store()
        key = _as_bytes(key, "keys")
        if not self._call((self._batch() or store).touch, key, ttl):
            raise KeyError(key)

    def __delitem__(self, key: Bytes) -> None:
        """Delete a key; KeyError if it is not there. O(1): a tombstone is appended."""
        store = self._writable_store()
        key = _as_bytes(key, "keys")
        batch = self._batch()
        found = self._call(store.delete if batch is None else batch.delete, key)
        if not found:
            raise KeyError(key)

    def setdefault(self, key: Bytes, default: Bytes = b"") -> bytes:
        """The value of a key, which is set to `default` first if it is not there."""
        store = self._writable_store()
        key, default = _as_bytes(key, "keys"), _as_bytes(default, "values")
        _require_size(len(key) + len(default))
        return self._call((self._batch() or store).setdefault, key, default)

    @overload
    def pop(self, key: Bytes) -> bytes: ...
    @overload
    def pop(self, key: Bytes, default: Default) -> bytes | Default: ...
    def pop(self, key: Bytes, default: Any = _MISSING) -> Any:
        """Delete a key and return its value; `default` if it is not there, or KeyError without one."""
        store = self._writable_store()
        key = _as_bytes(key, "keys")
        batch = self._batch()
        value = self._call(store.pop if batch is None else batch.take, key)
        if value is not None:
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    # All keys.

    def __len__(self) -> int:
        """The number of keys; those that have expired count until a merge deletes them. O(1); in a batch O(keys that it changes)."""
        store = self._open_store()
        batch = self._batch()
        return self._call(store.__len__ if batch is None else batch.count)

    def __iter__(self) -> Iterator[bytes]:
        """The keys, in the order of the log: that in which they were last written, or moved by a merge."""
        store = self._open_store()
        return self._guarded((self._batch() or store).keys())

    def keys(self) -> list[bytes]:  # type: ignore[override]
        """The keys as a list, as all dbm modules return them; `iter(db)` needs no memory for them."""
        return list(self)

    def items(self) -> ItemsView[bytes, bytes]:
        """A view of the keys with their values."""
        self._open_store()
        return _Items(self)

    def values(self) -> ValuesView[bytes]:
        """A view of the values."""
        self._open_store()
        return _Values(self)

    def iterkeys(self) -> Iterator[bytes]:
        """The keys, as `iter(db)`: the name that dbm.dumb has for it."""
        return iter(self)

    def firstkey(self) -> bytes | None:
        """The first key of a walk, or None if there is none."""
        return self._advance(iter(self))

    def nextkey(self, key: Bytes) -> bytes | None:
        """The key behind this one, or None if it is the last; KeyError if it is not there.

        O(1) in a loop that hands in what it got last, which meets every key exactly once.
        """
        key = _as_bytes(key, "keys")
        store = self._open_store()
        batch = self._batch()
        cursors = self._cursors if batch is None else batch.cursors
        keys = cursors.pop(key, None)  # at once: another thread may be at the same key
        return self._advance(keys or self._guarded(self._call((batch or store).keys_after, key)))

    def _advance(self, keys: Iterator[bytes]) -> bytes | None:
        key = next(keys, None)
        if key is not None:
            batch = self._batch()
            cursors = self._cursors if batch is None else batch.cursors
            cursors[key] = keys
            for oldest in list(cursors)[:-_WALKS]:
                cursors.pop(oldest, None)
        return key

    def popitem(self) -> tuple[bytes, bytes]:
        """Delete some key and return it with its value; KeyError if there is none. A loop of these is linear."""
        store = self._writable_store()
        item = self._call((self._batch() or store).popitem)
        if item is None:
            raise KeyError("popitem(): the database is empty")
        return item

    def clear(self) -> None:
        """Delete every key, and give back the space. O(1), but for unlinking the files. `error` in a batch."""
        self._writable_store()
        self._call(self._outside_of_a_batch("clear").clear)

    def __ior__(self, other: Items) -> Self:
        self.update(other)
        return self

    def update(self, other: Items = (), /, **named: Bytes) -> None:  # type: ignore[override]
        """Set keys from a mapping, from (key, value) pairs, and from keywords: far faster than one by one.

        They are written in batches of at most 16 MiB, and of a quarter of `segment_size`, each of which is all or nothing; in a batch they
        become a part of it. If something is not as it should be, or `other` raises, the batch that was being gathered is not written, and
        those before it are. What `other` reads of this database does not show what is being gathered. O(1) for a key.
        """
        limit = min(UPDATE_LIMIT, self._how[2].segment_size // 4)
        self._write_pairs(_pairs(other), limit)
        if named:
            self._write_pairs(named.items(), limit)

    def _write_pairs(self, pairs: Iterable[tuple[Bytes, Bytes]], limit: int) -> None:
        """Set keys in batches of at most so many bytes of records, or as a part of the batch that this thread is in."""
        store = self._writable_store()
        if self._batch() is not None:
            for key, value in pairs:
                self[key] = value
            return
        gathered: dict[bytes, bytes] = {}
        size = 0
        for key, value in pairs:  # one turn a record: `python -m compat.figures.bulk_load`
            if type(key) is not bytes:
                key = _as_bytes(key, "keys")
            if type(value) is not bytes:
                value = _as_bytes(value, "values")
            length = len(key) + len(value)
            size += length + OVERHEAD
            if size > limit:
                if length > SIZE_LIMIT:
                    _require_size(length)
                self._write_gathered(store, gathered)
                sleep(_BREATH)
                gathered, size = {}, length + OVERHEAD
            gathered[key] = value
        self._write_gathered(store, gathered)

    def _write_gathered(self, store: Store, gathered: dict[bytes, bytes]) -> None:
        self._call(store.write_batch, [(key, value, 0, 0) for key, value in gathered.items()])

    def _write_back(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Set keys, all or nothing if they fit one batch, for `Shelf.sync`."""
        self._write_pairs(pairs, BATCH_LIMIT)

    # Batches.

    def batch(self) -> Batch:
        """Write several changes as one: `with db.batch():`. After a crash all of them are there or none; it also takes far less time.

        What this thread sets and deletes in the block is kept in memory until the block ends, and is then written by one write under one
        lock. The thread's own reads see it before. Other threads and processes go on as if there was no batch, and may see it half
        written for the moment in which its keys come to be known; they may also have batches of their own. An exception that leaves the
        block drops everything; so does a fork, in the child.

        `error`: a batch within one of the same thread; more than 256 MiB of records, which leaves the batch as it was before;
        `sync`, `clear`, `merge`, `reorganize` and `backup` in the block; leaving it when the database has been closed.

        >>> import dbm_bitcask, os, tempfile
        >>> with dbm_bitcask.open(os.path.join(tempfile.mkdtemp(), "example")) as db:
        ...     with db.batch():
        ...         db["from"], db["to"] = "90", "110"
        ...         len(db)
        2
        """
        return Batch(self, self._batches, self._writable_store(), self._call)

    def _batch(self) -> Batch | None:
        """The batch that this thread is in."""
        return batch_of(self._batches) if self._batches else None

    def _get(self, key: bytes) -> bytes | None:
        batch = self._batch()
        return self._log.get(key) if batch is None else batch.get(key)

    def _outside_of_a_batch(self, what: str) -> Store:
        store = self._open_store()
        if self._batch() is not None:
            raise error(f"{what} in a batch: leave the batch first")
        return store

    # The whole.

    def sync(self) -> None:
        """Make everything written so far durable. Does nothing if the database was opened for reading only. `error` in a batch."""
        store = self._outside_of_a_batch("sync")
        if self._writable:
            self._call(store.sync)

    def merge(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Give back the space of records that were overwritten or deleted: old files are really deleted. O(bytes of what is merged).

        `progress(done, total)`, in bytes, is called now and then.
        """
        self._writable_store()
        self._call(self._outside_of_a_batch("merge").merge, progress)

    def reorganize(self, progress: Callable[[int, int], object] | None = None) -> None:
        """The name that the standard library has for `merge` since 3.15."""
        self.merge(progress)

    def backup(self, path: Path, progress: Callable[[int, int], object] | None = None) -> None:
        """Make a database at `path` that is what this one is now, while others go on writing; it is durable when this returns.

        Sealed files are shared by hard links where the file system has them, so that it takes little space; neither database notices.
        Readers can make one, too. There must be nothing at `path`, or an empty directory. `progress(done, total)`, in bytes, is called now
        and then. Raises `error`; nothing stands at `path` then. O(keys), for the index, and the bytes of what cannot be shared.
        """
        store = self._outside_of_a_batch("backup")
        given = os.fsdecode(path)
        if not given:  # which abspath would take for the working directory
            raise NotFoundError(2, "no path to back up to", given)
        target = os.path.abspath(given)  # noqa: PTH100  (also bytes)
        if os.path.realpath(target).startswith(os.path.realpath(self._path) + os.sep):
            raise error(22, "a backup cannot stand within its database", given)
        self._call(store.backup, target, progress)

    def stats(self) -> Stats:
        """Sizes and counts. O(segments and pages of the index)."""
        return self._call(self._open_store().stats)

    def close(self) -> None:
        """Make everything durable and end the use; a batch that is open is dropped.

        A second call does nothing, unless the first was interrupted.
        """
        self._cursors.clear()
        self._batches.clear()
        self._call(self._store.close)

    def __enter__(self) -> Self:
        self._open_store()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        store = getattr(self, "_store", None)
        if store is not None and not store.closed:
            with suppress(Exception):  # at the end of the interpreter anything may be gone; and nothing is lost without a close
                store.close()

    def _in_order(self) -> Iterator[tuple[bytes, bytes]]:
        store = self._open_store()
        return self._guarded((self._batch() or store).items())

    def _call(self, action: Callable[..., Default], *args: object) -> Default:
        try:
            return action(*args)
        except error:
            raise
        except OSError as failure:
            raise as_error(failure, self._path) from failure

    def _guarded(self, items: Iterator[Default]) -> Iterator[Default]:
        """An iteration that stops being one when the database is closed."""
        try:
            for item in items:
                yield item
                if self._store.closed:
                    raise error(CLOSED)
        except error:
            raise
        except OSError as failure:
            raise as_error(failure, self._path) from failure


def _pairs(other: Any) -> Iterable[tuple[Any, Any]]:
    """(key, value) pairs of what `update` takes."""
    if type(other) is dict:
        return other.items()
    if isinstance(other, Mapping):
        return ((key, other[key]) for key in other)
    if hasattr(other, "keys"):
        return ((key, other[key]) for key in other.keys())  # noqa: SIM118  (it need not be iterable)
    pairs: Iterable[tuple[Any, Any]] = other
    return pairs


class _Items(ItemsView[bytes, bytes]):
    _mapping: Database

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return self._mapping._in_order()


class _Values(ValuesView[bytes]):
    _mapping: Database

    def __iter__(self) -> Iterator[bytes]:
        return (value for _, value in self._mapping.items())
