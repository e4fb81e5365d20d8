"""Shelf: `shelve.Shelf` over a database of ours."""

from __future__ import annotations

import shelve
from typing import TYPE_CHECKING, Any

from .database import Database, open

if TYPE_CHECKING:
    from .database import Flag, Path

__all__ = ["Shelf", "open_shelf"]


class Shelf(shelve.Shelf[Any]):
    """A `shelve.Shelf` whose `clear` is not quadratic.

    Values are pickled: whoever can write the database can run code in the process that reads it.
    """

    dict: Database

    def clear(self) -> None:
        """Delete every key. O(1)."""
        self.cache: dict[str, Any] = {}
        self.dict.clear()


def open_shelf(
    file: Path,
    flag: Flag = "c",
    protocol: int | None = None,
    writeback: bool = False,
    *,
    keyencoding: str = "utf-8",
    **options: Any,
) -> Shelf:
    """Open the database at `file` as a shelf: str keys, and values of any type that can be pickled.

    `protocol`, `writeback` and `keyencoding` are those of `shelve.Shelf`; everything else is for `dbm_bitcask.open`.
    """
    return Shelf(open(file, flag, **options), protocol, writeback, keyencoding)
