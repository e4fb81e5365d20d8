"""Writer lock: one writer at a time, across threads and processes.

The lock is flock on the directory itself: there is no lock file that could be deleted, and the kernel drops it when a process dies.
All handles of a process on one directory share one lock, found by device and inode; a mutex keeps its threads apart.

`run` shows the order of every use. A signal may arrive between any two calls, so that a `with` on an object written in Python would leak.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Protocol, TypeVar

from .errors import LockTimeout, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files import Directory

Result = TypeVar("Result")

_pid = os.getpid()

POLL = 0.002  # seconds between two looks: flock has no timeout of its own

__all__ = ["POLL", "WriterLock", "lock_of", "renew_after_fork"]


class WriterLock:
    """The writer lock of one directory in this process; with `alone`, of one that no other process uses: only threads are kept apart."""

    def __init__(self, directory: Directory, *, alone: bool) -> None:
        self.alone = alone
        self._set_up(directory)
        renew_after_fork(self)

    def _set_up(self, directory: Directory) -> None:
        self.mutex = threading.RLock()
        self.busy = False
        self.pid = _pid
        self.bind(directory)

    def bind(self, directory: Directory) -> None:
        """Lock by this directory from now on."""
        self.directory = directory
        self.acquire: Callable[[], object] = directory.lock if not self.alone else _nothing
        self.try_acquire: Callable[[], object] = directory.try_lock if not self.alone else lambda: True
        self.release: Callable[[], object] = directory.unlock if not self.alone else _nothing

    def run_within(self, timeout: float, holder: Callable[[], str], action: Callable[..., Result], *args: object) -> Result:
        """The same as `run`, but `LockTimeout` if the lock is not free within `timeout` seconds; `holder()` tells who has it."""
        deadline = monotonic() + timeout
        try:
            if not self.mutex.acquire(timeout=timeout):
                raise self._timeout(timeout, "another thread of this process")
            if self.busy:
                self.refuse_reentry()
            try:
                self.busy = True
                while not self.try_acquire():
                    left = deadline - monotonic()
                    if left <= 0:
                        raise self._timeout(timeout, holder())
                    sleep(min(left, POLL))
                return action(*args)
            finally:
                self.busy = False
                self.release()
        finally:
            # Not by `suppress`, which is Python: a signal may arrive within it, before the release.
            try:  # noqa: SIM105
                self.mutex.release()
            except RuntimeError:  # it was not taken
                pass

    def _timeout(self, timeout: float, holder: str) -> LockTimeout:
        return LockTimeout(errno.ETIMEDOUT, f"the writer lock was not free for {timeout:g} s: {holder} has it", self.directory.name)

    def run(self, action: Callable[..., Result], *args: object) -> Result:
        """Call `action(*args)` under the lock."""
        with self.mutex:  # in C: it cannot be interrupted between taking it and being responsible for it
            if self.busy:
                self.refuse_reentry()
            try:
                self.busy = True
                self.acquire()  # inside the try: a signal may be delivered as it returns
                return action(*args)
            finally:
                self.busy = False
                self.release()  # harmless if it was not taken: the mutex says that no other thread has it

    def refuse_reentry(self) -> None:
        """Raise if this thread is inside an operation already: a signal handler or a finalizer that uses the same database."""
        if self.busy:
            raise error(
                f"{self.directory.name}: the database is used inside one of its own operations (by a signal handler or a finalizer)"
            )

    def renew_after_fork(self) -> None:
        """In a child: a lock of its own, at once: with the inherited description it would keep the lock of a parent that is killed."""
        self._set_up(self.directory)
        try:
            self.directory.renew()
        except OSError:  # no descriptor to be had; nothing is unlocked by the inherited one, which would unlock for the parent
            self.release = _nothing
            self.acquire = partial(self._acquire_anew, "acquire")
            self.try_acquire = partial(self._acquire_anew, "try_acquire")

    def _acquire_anew(self, how: str) -> object:
        """There may be no descriptor to be had in a fork, and one later."""
        try:
            self.directory.renew()
        except OSError as failure:
            reason = f"this process was forked, and cannot open a lock of its own: {failure.strerror}"
            raise error(failure.errno, reason, self.directory.name) from failure
        self.bind(self.directory)
        return getattr(self, how)()


def _nothing() -> None:
    pass


_locks: weakref.WeakValueDictionary[tuple[int, int, bool], WriterLock] = weakref.WeakValueDictionary()
_registry_mutex = threading.Lock()


def lock_of(directory: Directory, *, alone: bool = False) -> WriterLock:
    """The lock of a directory: the same object for every handle of this process."""
    identity = directory.identity()
    key = identity.device, identity.inode, alone
    with _registry_mutex:
        lock = _locks.get(key)
        for other in (lock, _locks.get((*key[:2], not alone))):
            if other is not None and other.directory.layer != directory.layer:
                reason = f'this process has it open with files="{other.directory.layer}", and the two do not see each other\'s changes'
                raise error(errno.EBUSY, reason, directory.name)
        if lock is None:
            lock = _locks[key] = WriterLock(directory, alone=alone)
        elif not lock.directory.is_in_place():
            lock.bind(directory)
        return lock


class Renewed(Protocol):
    """What holds a mutex, a thread or a lock, and so needs a new one in a child."""

    def renew_after_fork(self) -> None: ...


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_after_fork(held: Renewed) -> None:
    """Have `held.renew_after_fork()` called in every child."""
    _renewed.add(held)


def _after_fork() -> None:
    global _registry_mutex, _pid
    _registry_mutex, _pid = threading.Lock(), os.getpid()
    for held in list(_renewed):
        held.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
