"""Batch: what one thread is about to write to a database, until it is written as a whole."""

from __future__ import annotations

import os
from itertools import dropwhile
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

from .engine.errors import CLOSED, error
from .engine.store import BATCH_LIMIT, OVERHEAD, has_passed, lifetime, time_left

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from .engine.store import Item, Store

__all__ = ["Batch", "Pending", "batch_of"]


class Pending(NamedTuple):
    """What a key will be: a value, or None if it will be deleted; flags and expiry are those of its record."""

    written: bytes | None
    flags: int = 0
    expiry: int = 0

    @property
    def value(self) -> bytes | None:
        """The value that is there for who reads it now."""
        return None if has_passed(self.expiry) else self.written


class Batch:
    """The context manager that `Database.batch` returns; the block is given `database`.

    The writes of the thread that enters it are kept until the block ends, and its own reads see them. Nobody else does before they are
    written, and nothing is written if the block ends with an exception, or in the child of a fork.
    """

    def __init__(self, database: object, batches: dict[int, ref[Batch]], store: Store, call: Callable[..., None]) -> None:
        self.pending: dict[bytes, Pending] = {}
        self.cursors: dict[bytes, Iterator[bytes]] = {}  # of walks by `nextkey` within the block
        self.pid = 0
        self._database = database
        self._batches = batches
        self._store = store
        self._call = call
        self._owner = 0
        self._size = 0

    # The block.

    def __enter__(self) -> object:
        """Begin. `error` if this thread is in a batch of the same database already, or if the database is closed."""
        if self._store.closed:
            raise error(CLOSED)
        owner = get_ident()
        if self.pid or batch_of(self._batches) is not None:
            raise error("this thread is in a batch of this database already: a batch has no other one in it, and is used once")
        self._owner, self.pid = owner, os.getpid()
        batches = self._batches

        def forget(gone: ref[Batch]) -> None:
            if batches.get(owner) is gone:
                del batches[owner]

        # Weakly: who is interrupted before the block begins is in no batch.
        batches[owner] = ref(self, forget)
        return self._database

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Write everything, or nothing if there was an exception. `error` if the database has been closed."""
        held = self._batches.get(self._owner)
        if held is not None and held() is self:
            del self._batches[self._owner]
        pending, self.pending = self.pending, {}
        if kind is not None or self.pid != os.getpid():
            return
        if self._store.closed:
            raise error(f"{CLOSED}: nothing of the batch was written")
        items: list[Item] = [(key, *what) for key, what in pending.items()]
        self._call(self._store.write_batch, items)

    # Writing.

    def put(self, key: bytes, value: bytes | None, flags: int = 0, expiry: int = 0) -> None:
        """Have a key be set, or deleted with None. `error` if the batch grows too large, which stays as it was."""
        before = self.pending.get(key)
        size = self._size + len(key) + len(value or b"") + OVERHEAD
        if before is not None:
            size -= len(key) + len(before.written or b"") + OVERHEAD
        if size > BATCH_LIMIT:
            raise error(f"a batch takes at most {BATCH_LIMIT} bytes of records; this write was left out: write in several batches")
        self._size = size
        self.pending[key] = Pending(value, flags, expiry)

    def delete(self, key: bytes) -> bool:
        """Delete a key; False if it is not there."""
        found = self.contains(key)
        if found:
            self.put(key, None)
        return found

    def take(self, key: bytes) -> bytes | None:
        """Delete a key, and return its value; None if it is not there."""
        value = self.get(key)
        if value is not None:
            self.put(key, None)
        return value

    # Reading. What is not pending is as it is in the database.

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None if it is not there."""
        pending = self.pending.get(key)
        return self._store.log.get(key) if pending is None else pending.value

    def contains(self, key: bytes) -> bool:
        """Whether a key is there."""
        pending = self.pending.get(key)
        return self._store.contains(key) if pending is None else pending.value is not None

    def count(self) -> int:
        """The number of keys. O(keys that are pending)."""
        store = self._store
        change = sum([(what.written is not None) - store.log.counts(key) for key, what in self.pending.items()])
        return len(store) + change

    def keys(self) -> Iterator[bytes]:
        """Every key; those that were pending when this began come last."""
        before = dict.fromkeys(self.pending)
        for key in self._store.keys():  # noqa: SIM118  (a store is no mapping)
            if key not in before and self._is_left(key):
                yield key
        for key in before:
            if self.contains(key):
                yield key

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value, in the same order."""
        before = dict.fromkeys(self.pending)
        for key, value in self._store.items():
            if key not in before and self._is_left(key):
                pending = self.pending.get(key)
                yield key, value if pending is None else pending.value or b""
        for key in before:
            found = self.get(key)
            if found is not None:
                yield key, found

    def _is_left(self, key: bytes) -> bool:
        pending = self.pending.get(key)
        return pending is None or pending.value is not None

    def keys_after(self, key: bytes) -> Iterator[bytes]:
        """The keys behind this one."""
        if not self.contains(key):
            raise KeyError(key)
        keys = dropwhile(lambda other: other != key, self.keys())
        next(keys, None)
        return keys

    def ttl(self, key: bytes) -> float | None:
        """The seconds that are left to a key; None if it does not expire; KeyError if it is not there."""
        pending = self.pending.get(key)
        if pending is None:
            return self._store.ttl(key)
        if pending.value is None:
            raise KeyError(key)
        return time_left(pending.expiry)

    def touch(self, key: bytes, ttl: float | None) -> bool:
        """Give a key another time to live, from now on; False if it is not there."""
        value = self.get(key)
        if value is not None:
            self.put(key, value, *lifetime(ttl))
        return value is not None

    def popitem(self) -> tuple[bytes, bytes] | None:
        """Delete some key, and return it with its value; None if there is none."""
        for key in self.keys():
            value = self.take(key)
            if value is not None:
                return key, value
        return None

    def setdefault(self, key: bytes, default: bytes) -> bytes:
        """The value of a key, which is set to `default` if it is not there."""
        value = self.get(key)
        if value is None:
            self.put(key, default)
            return default
        return value


def batch_of(batches: dict[int, ref[Batch]]) -> Batch | None:
    """The batch that this thread is in. A child of a fork is in none."""
    held = batches.get(get_ident())
    batch = None if held is None else held()
    if batch is None or batch.pid == os.getpid():
        return batch
    batches.clear()
    return None
