"""Syncer: when what was written becomes durable.

    never      at `sync`, `close` and rotation only
    seconds    a thread syncs, and no write waits for the disk: whatever is not durable in this database, whoever wrote it, so that what a
               process left that died is taken over by the thread of another
    always     every write waits; writers that wait at the same time share one sync, whatever their threads and processes: one syncs, the
               others queue behind it, and the first of them to come next syncs for all who have written meanwhile

SYNCED_TO in the header says how far the log is durable. It only ever says too little: two syncs that end at once may store it in the
wrong order, and the price is one more sync. That is also the price of losing the place in the queue, which is a record lock on the keydir:
a process loses it whenever it closes another descriptor of that file.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING

from . import header as at
from . import recovery
from .lock import POLL, renew_after_fork
from .ticker import Ticker

if TYPE_CHECKING:
    from .files import File
    from .log import Log

__all__ = ["Syncer"]


class Syncer:
    """Makes the log of one handle durable. `interval` is in seconds; 0: with each write; None: when asked to."""

    def __init__(self, log: Log, interval: float | None) -> None:
        self._log = log
        self.interval = interval
        # Twice in an interval: what was written just after one sync is durable when the next has ended.
        self._ticker = Ticker((interval or 0) / 2, self._sync_if_needed, "dbm_bitcask sync")
        self.renew_after_fork()
        renew_after_fork(self)

    def renew_after_fork(self) -> None:
        """Also in a child, which inherits a mutex as it was in the parent."""
        self._mutex = threading.RLock()

    def sync(self) -> None:
        """Make everything that has been written so far durable (fdatasync)."""
        log = self._log
        if not log.is_current():
            log.follow()
        file, active = log.active, log.manifest.active.id
        tail = log.whole_tail()  # where a failed sync is healed, the segment ends: not within a batch
        recovery.require_sound(log)
        log.durable(file.sync_contents)
        recovery.require_sound(log)  # another sync may have failed at the same time: the kernel tells only one of them
        if tail >> 32 == active:  # else the rotation synced it
            log.keydir.words[at.SYNCED_TO] = tail

    def wrote(self) -> None:
        """To be called after each write, without the lock: wait for the disk, or see to it that a thread does."""
        if self.interval == 0:
            end = self._log.keydir.counter(at.TAIL)
            with self._mutex:
                self._sync_to(end)
        else:
            self.start()

    def _sync_to(self, end: int) -> None:
        queue = self._log.keydir.file
        try:
            self._queue_up(queue)
            if self._log.keydir.words[at.SYNCED_TO] < end:
                self.sync()
        finally:
            with suppress(OSError):
                queue.unlock()  # harmless if it was not taken

    def _queue_up(self, queue: File) -> None:
        """Wait until nobody else syncs, at most as long as for the writer lock: then this one syncs, too."""
        with suppress(OSError):  # the kernel sees a deadlock where two databases are synced by two threads of two processes
            if self._log.timeout is None:
                queue.lock()
                return
            deadline = monotonic() + self._log.timeout
            while not queue.try_lock() and monotonic() < deadline:
                sleep(POLL)

    def start(self) -> None:
        """Have a thread sync every few seconds, if that is asked for: from the opening on, for what others left that died."""
        if self.interval:
            self._ticker.start()

    def _sync_if_needed(self) -> None:
        with suppress(OSError):  # a failed sync has poisoned the database: the next write says so
            words = self._log.keydir.words
            if words[at.SYNCED_TO] != self._log.keydir.counter(at.TAIL):
                self.sync()

    def stop(self) -> None:
        """End the thread."""
        self._ticker.stop()
