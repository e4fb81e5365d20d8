"""Writer lock: one writer at a time, across threads and processes.

The lock is flock on the directory itself: there is no lock file that could be deleted, and the kernel drops it when a process dies.
All handles of a process on one directory share one lock, found by device and inode; a mutex keeps its threads apart.

The order of every use, inline because a signal may arrive between any two calls (a `with` on an object written in Python would leak):

    with lock.mutex:                        # in C: cannot be interrupted between taking it and being responsible for it
        lock.refuse_reentry()
        try:
            lock.busy = True
            lock.acquire()                  # inside the try: a signal may be delivered as it returns
            ...
        finally:
            lock.busy = False
            lock.release()                  # harmless if it was not taken; the mutex says that no other thread has it
"""

from __future__ import annotations

import os
import threading
import weakref

from .errors import error
from .files import Directory

__all__ = ["WriterLock", "lock_of"]


class WriterLock:
    """The writer lock of one directory in this process."""

    def __init__(self, directory: Directory) -> None:
        self._set_up(directory)

    def _set_up(self, directory: Directory) -> None:
        self.directory = directory
        self.mutex = threading.RLock()
        self.busy = False
        self.acquire = directory.lock
        self.release = directory.unlock

    def refuse_reentry(self) -> None:
        """Raise if this thread is inside an operation already: a signal handler or a finalizer that uses the same database."""
        if self.busy:
            raise error(
                f"{self.directory.name}: the database is used inside one of its own operations (by a signal handler or a finalizer)"
            )

    def renew_after_fork(self) -> None:
        """In a child: a lock of its own. The inherited descriptor shares the parent's lock and must not be unlocked."""
        self._set_up(self.directory.again())


_locks: weakref.WeakValueDictionary[tuple[int, int], WriterLock] = weakref.WeakValueDictionary()
_registry_mutex = threading.Lock()


def lock_of(directory: Directory) -> WriterLock:
    """The lock of a directory: the same object for every handle of this process."""
    identity = directory.identity()
    with _registry_mutex:
        lock = _locks.get(identity[:2])
        if lock is None:
            lock = _locks[identity[:2]] = WriterLock(directory)
        return lock


def _after_fork() -> None:
    global _registry_mutex
    _registry_mutex = threading.Lock()
    for lock in list(_locks.values()):
        lock.renew_after_fork()


os.register_at_fork(after_in_child=_after_fork)
