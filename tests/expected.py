"""What a database should have, with keys that expire, by a clock that stands still unless it is set.

Contents are compared as {key: (value, second at which it expires or None)}: so a time to live is never lost or wrong either.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

from dbm_bitcask.engine import expiry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypeAlias

    import pytest

    import dbm_bitcask

    Items: TypeAlias = dict[bytes, tuple[bytes, float | None]]

START = 1_700_000_000  # seconds


class Clock:
    """In the place of the system's: it stands still unless it is set."""

    def __init__(self) -> None:
        self.seconds: float = START

    def __call__(self) -> int:
        return round(self.seconds * 1000) * 1_000_000

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(expiry, "time_ns", self)


class Expected:
    """What a database should have at a moment, in seconds; it takes the changes that a database takes.

    `stored` is what was written last, expired or not.
    """

    def __init__(self, now: float, stored: Mapping[bytes, tuple[bytes, float | None]] = {}) -> None:
        self.now = now
        self.stored: Items = dict(stored)

    def at(self, now: float) -> Items:
        """What is there at a moment."""
        return {key: item for key, item in self.stored.items() if item[1] is None or item[1] > now}

    def items(self) -> Items:
        return self.at(self.now)

    def is_as_many(self, count: int) -> bool:
        """Whether a database may count so many keys: those that have expired count until a merge deletes them."""
        return len(self.items()) <= count <= len(self.stored)

    def __contains__(self, key: bytes) -> bool:
        return key in self.stored and ((moment := self.stored[key][1]) is None or moment > self.now)

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        return self.stored[key][0] if key in self else default

    def set(self, key: bytes, value: bytes, ttl: float | None = None) -> None:
        self.stored[key] = value, None if ttl is None else self.now + ttl

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.set(key, value)

    def touch(self, key: bytes, ttl: float | None) -> None:
        if key not in self:
            raise KeyError(key)
        self.set(key, self.stored[key][0], ttl)

    def pop(self, key: bytes, default: bytes | None = None) -> bytes | None:
        found = self.get(key, default)
        if key in self:
            del self.stored[key]
        return found

    def __delitem__(self, key: bytes) -> None:
        if key not in self:
            raise KeyError(key)
        del self.stored[key]

    def update(self, items: Mapping[bytes, bytes]) -> None:
        for key, value in items.items():
            self.set(key, value)

    def clear(self) -> None:
        self.stored.clear()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        yield


def contents(db: dbm_bitcask.Database, now: float) -> Items:
    """What a database has, read in two ways."""
    found: Items = {}
    for key, value in db.items():
        left = db.ttl(key)
        found[key] = value, None if left is None else now + left
    return found


def noise(number: int, size: int) -> bytes:
    """A value that can be stored in a good half of its bytes, and not in less."""
    return random.Random(number).randbytes(size // 2).hex().encode()
