"""What a bulk load takes: `update()` beside single sets, one transaction of py-lmdb, and executemany of sqlite3.

Each loads the same records, keys of 16 bytes and values of 100 in random order, into a new database, with nothing synced before the end and
the end (a sync or commit) included; in interleaved rounds, of which the median counts. Bound: `update()` is at least 1.6 times as fast as
single sets. py-lmdb is left out if it is not installed.
"""

import importlib
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

BOUND = 1.6
MAP_SIZE = 2**34


def main() -> int:
    """Measure and print the verdict."""
    args = arguments(__doc__, keys=1_000_000, rounds=3)
    verdicts = Verdicts()
    seconds: dict[str, list[float]] = {}
    keys = [dataset.key(number) for number in range(args.keys)]
    with workplace(args.directory) as place:
        for number in range(args.rounds):
            for name, load in LOADS.items():
                path = place / f"{number}"
                start = perf_counter()
                done = load(path, keys)
                if done:
                    seconds.setdefault(name, []).append(perf_counter() - start)
                remove(path)
    for name, times in seconds.items():
        micro = sorted(time / args.keys * 1e6 for time in times)
        print(f"{name}: {median(micro):.2f} us a record ({micro[0]:.2f} to {micro[-1]:.2f})", end="")
        print(f", {median(ratios(times, seconds['update()'])):.2f} times what update() takes")
    ratio = median(ratios(seconds["single sets"], seconds["update()"]))
    verdicts.check(ratio >= BOUND, f"single sets take {ratio:.2f} times what update() takes, at least {BOUND}")
    return verdicts.status


def ratios(times: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [time / other for time, other in zip(times, others, strict=True)]


def remove(path: Path) -> None:
    """Delete a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def items(keys: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The records; making them is a part of what every load takes."""
    value = dataset.value
    return ((key, value(key)) for key in keys)


def by_sets(path: Path, keys: list[bytes]) -> bool:
    """Set key by key."""
    with dbm_bitcask.open(path, "n") as db:
        for key, value in items(keys):
            db[key] = value
        db.sync()
        return len(db) == len(keys)


def by_update(path: Path, keys: list[bytes]) -> bool:
    """One call."""
    with dbm_bitcask.open(path, "n") as db:
        db.update(items(keys))
        db.sync()
        return len(db) == len(keys)


def by_lmdb(path: Path, keys: list[bytes]) -> bool:
    """One transaction."""
    try:
        lmdb: Any = importlib.import_module("lmdb")
    except ImportError:
        return False
    with lmdb.open(str(path), map_size=MAP_SIZE, sync=False) as env:
        with env.begin(write=True) as transaction:
            for key, value in items(keys):
                transaction.put(key, value)
        env.sync(True)
        return bool(env.stat()["entries"] == len(keys))


def by_sqlite(path: Path, keys: list[bytes]) -> bool:
    """One transaction, into the table that dbm.sqlite3 makes."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE Dict (key BLOB UNIQUE NOT NULL, value BLOB NOT NULL)")
        db.execute("PRAGMA journal_mode = wal")
        with db:
            db.executemany("REPLACE INTO Dict (key, value) VALUES (?, ?)", items(keys))
        return bool(db.execute("SELECT count(*) FROM Dict").fetchone()[0] == len(keys))


LOADS: dict[str, Callable[[Path, list[bytes]], bool]] = {
    "single sets": by_sets,
    "update()": by_update,
    "py-lmdb, one transaction": by_lmdb,
    "sqlite3, executemany": by_sqlite,
}


if __name__ == "__main__":
    sys.exit(main())
