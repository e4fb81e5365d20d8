"""Syncer: when what was written becomes durable.

    never      at `sync`, `close` and rotation only
    seconds    a thread syncs, and no write waits for the disk: whatever is not durable in this database, whoever wrote it, so that what a
               process left that died is taken over by the thread of another
    always     every write waits; writers that wait at the same time share one sync

SYNCED_TO in the header says how far the log is durable. It only ever says too little: two syncs that end at once may store it in the
wrong order, and the price is one more sync.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from . import header as at
from .lock import renew_after_fork

if TYPE_CHECKING:
    from .log import Log

__all__ = ["Syncer"]


class Syncer:
    """Makes the log of one handle durable. `interval` is in seconds; 0: with each write; None: when asked to."""

    def __init__(self, log: Log, interval: float | None) -> None:
        self._log = log
        self.interval = interval
        self._stopped = threading.Event()
        self.renew_after_fork()
        renew_after_fork(self)

    def renew_after_fork(self) -> None:
        """Also in a child: threads are not inherited, and a mutex as it was in the parent."""
        self._mutex = threading.RLock()
        self._thread: threading.Thread | None = None

    def sync(self) -> None:
        """Make everything that has been written so far durable (fdatasync)."""
        log = self._log
        if log.keydir.words[at.EPOCH] != log.epoch:
            log.refresh()
        file, active = log.active, log.manifest.active.id
        tail = log.keydir.counter(at.TAIL)
        log.durable(file.sync_contents)
        if tail >> 32 == active:  # else the rotation synced it
            log.keydir.words[at.SYNCED_TO] = tail

    def wrote(self) -> None:
        """To be called after each write, without the lock: wait for the disk, or see to it that a thread does."""
        if self.interval == 0:
            end = self._log.keydir.counter(at.TAIL)
            with self._mutex:
                if self._log.keydir.words[at.SYNCED_TO] < end:
                    self.sync()
        elif self.interval is not None and self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._mutex:
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._sync_for_ever, name="dbm_bitcask sync", daemon=True)
                self._thread.start()

    def _sync_for_ever(self) -> None:
        # Twice in an interval: what was written just after one sync is durable when the next has ended.
        while not self._stopped.wait((self.interval or 0) / 2):
            with suppress(OSError):  # a failed sync has poisoned the database: the next write says so
                words = self._log.keydir.words
                if words[at.SYNCED_TO] != self._log.keydir.counter(at.TAIL):
                    self.sync()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
