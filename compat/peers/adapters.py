"""The peers: one adapter each.

An adapter is a function that makes an empty store in a directory of its own. It imports the peer itself, so that one
that is not installed raises ImportError and is reported as missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

OURS = "dbm_bitcask"
GNU = "dbm.gnu"
NDBM = "dbm.ndbm"
LMDB = "py-lmdb"


class Store(Protocol):
    """What the workloads use of a store."""

    def __getitem__(self, key: bytes, /) -> bytes: ...
    def __setitem__(self, key: bytes, value: bytes, /) -> None: ...
    def keys(self) -> list[bytes]: ...
    def close(self) -> None: ...


def open_ours(place: Path) -> Store:
    """Open dbm_bitcask with its defaults: locks and checksums on, no fsync per write."""
    import dbm_bitcask

    store: Store = dbm_bitcask.open(place / "ours", "n")
    return store


def open_gnu(place: Path) -> Store:
    """Open dbm.gnu with its defaults, which do not fsync per write either."""
    import dbm.gnu

    store: Store = dbm.gnu.open(str(place / "gnu"), "n")
    return store


def open_ndbm(place: Path) -> Store:
    """Open dbm.ndbm."""
    import dbm.ndbm

    store: Store = dbm.ndbm.open(str(place / "ndbm"), "n")
    return store


def open_lmdb(place: Path) -> Store:
    """Open py-lmdb without fsync."""
    import lmdb

    # Sparse: room for the largest run, not disk that is used.
    return Lmdb(lmdb.open(str(place / "lmdb"), map_size=2**35, sync=False))


class Lmdb:
    """py-lmdb used as a mapping: one transaction per call."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def __getitem__(self, key: bytes, /) -> bytes:
        with self.environment.begin() as transaction:
            found: bytes = transaction.get(key)
            return found

    def __setitem__(self, key: bytes, value: bytes, /) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(key, value)

    def keys(self) -> list[bytes]:
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            return list(cursor.iternext(keys=True, values=False))

    def close(self) -> None:
        self.environment.close()


ADAPTERS: dict[str, Callable[[Path], Store]] = {
    OURS: open_ours,
    GNU: open_gnu,
    NDBM: open_ndbm,
    LMDB: open_lmdb,
}
