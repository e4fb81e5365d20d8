"""Expiry: when a record counts as deleted, and how many bytes of a segment do so by now. No I/O here, but for the clock.

A record that EXPIRES keeps its slot, and is counted, until a merge puts a tombstone in its place or something is written over it. It is
only whoever reads it that takes the key for absent, and not before the record is verified. So neither the order of the log, nor what a
rebuild finds, nor any counter depends on a clock.

The clock is that of the system (UTC), which all processes share, and which outlives a restart. It may jump: set forward, keys go early; set
back, they live longer, and one that had expired is there again, if no merge came before.

The expiring bytes of a segment stand in EXPIRING_ROWS words of its row, by the time to live that they had when they were written: up to
ten minutes, up to a day, up to thirty days, and longer. A word has their number and the second by which the last of them has expired.
That is an estimate, for a merge to choose what to clean, and never what to drop: bytes that were overwritten since count there, too.
"""

from __future__ import annotations

import math
from time import time_ns
from typing import TYPE_CHECKING

from .header import EXPIRING_ROWS, MASK32, ROW_EXPIRING
from .record import EXPIRES

if TYPE_CHECKING:
    from .header import Words
    from .record import Record

__all__ = ["expired_bytes", "has_passed", "is_expired", "lifetime", "note", "now", "time_left"]

_BOUNDS = (600_000, 86_400_000, 2_592_000_000)  # milliseconds
_LONGEST = 2**63 // 1000  # seconds: added to any clock, they still have a number in milliseconds


def now() -> int:
    """The milliseconds since 1970 by the clock of the system."""
    return max(time_ns() // 1_000_000, 0)


def has_passed(expiry: int) -> bool:
    """Whether this moment, in milliseconds, is over; 0 is never."""
    return 0 < expiry <= now()


def is_expired(found: Record) -> bool:
    """Whether a verified record counts as deleted."""
    return bool(found.flags & EXPIRES) and has_passed(found.expiry)


def time_left(expiry: int) -> float | None:
    """The seconds until this moment, in milliseconds, above 0; None if it is never."""
    return max(expiry - now(), 1) / 1000 if expiry else None


def lifetime(ttl: float | None) -> tuple[int, int]:
    """(flags, expiry) of a record that lives for so many seconds from now on, or for ever.

    ValueError for what is no time to live, TypeError for what is no number.

    >>> lifetime(None)
    (0, 0)
    """
    if ttl is None:
        return 0, 0
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(f"ttl must be None or a number of seconds, not {type(ttl).__name__}")
    if not 0 < ttl <= _LONGEST:
        raise ValueError(f"ttl must be None or a number of seconds above 0, at most {_LONGEST}, not {ttl!r}")
    return EXPIRES, now() + math.ceil(ttl * 1000)


def note(words: Words | list[int], row: int, length: int, expiry: int) -> None:
    """Count the bytes of a record that expires in the row of its segment."""
    left = expiry - now()
    place = row + ROW_EXPIRING + sum(left > bound for bound in _BOUNDS)
    word = words[place]
    second = min(-(-expiry // 1000), MASK32)
    words[place] = min((word & MASK32) + length, MASK32) | max(word >> 32, second) << 32


def expired_bytes(words: Words, row: int, moment: int) -> int:
    """The bytes of a segment that have expired at a moment, in milliseconds: at least so many, but for what was overwritten meanwhile."""
    noted = words[row + ROW_EXPIRING : row + ROW_EXPIRING + EXPIRING_ROWS]
    return sum(word & MASK32 for word in noted if (word >> 32) * 1000 <= moment)
