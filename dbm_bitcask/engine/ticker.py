"""Ticker: a thread that does something every so many seconds, until it is told to stop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .lock import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ticker"]


class Ticker:
    """Calls `action()` every `seconds` seconds in a daemon thread, from `start` to `stop`. A child of a fork has to start it again."""

    def __init__(self, seconds: float, action: Callable[[], object], name: str) -> None:
        self._seconds = seconds
        self._action = action
        self._name = name
        self.stopped = threading.Event()
        self.renew_after_fork()
        renew_after_fork(self)

    def renew_after_fork(self) -> None:
        """Also in a child: threads are not inherited, and a mutex or an event as it was in the parent."""
        self._mutex = threading.RLock()
        was_stopped = self.stopped.is_set()
        self.stopped = threading.Event()
        if was_stopped:
            self.stopped.set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs, or is to stop. O(1)."""
        running = self._thread is not None
        if running:
            return
        with self._mutex:
            if self._thread is None and not self.stopped.is_set():
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        stopped = self.stopped
        while not stopped.wait(self._seconds):
            self._action()

    def stop(self) -> None:
        """End the thread, after what it is at."""
        self.stopped.set()
