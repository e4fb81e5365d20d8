"""What a bulk load takes: `update()` beside single sets, one transaction of py-lmdb, and executemany of sqlite3.

Each loads the same records, keys of 16 bytes and values of 100 in random order, into a new database, with nothing synced before the end, up
to where all is durable (after a sync or commit); in interleaved rounds, of which the median counts. What a close takes besides is printed,
too: ours writes the hints of what it sealed. Bound: `update()` is at least 1.6 times as fast as single sets. py-lmdb is left out if it is
not installed.
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
    closing_seconds: dict[str, list[float]] = {}
    keys = [dataset.key(number) for number in range(args.keys)]
    with workplace(args.directory) as place:
        for number in range(args.rounds):
            for name, load in LOADS.items():
                path = place / f"{number}"
                start = perf_counter()
                done = load(path, keys)
                if done is not None:
                    seconds.setdefault(name, []).append(done - start)
                    closing_seconds.setdefault(name, []).append(perf_counter() - done)
                remove(path)
    for name, times in seconds.items():
        micro = sorted(time / args.keys * 1e6 for time in times)
        print(f"{name}: {median(micro):.2f} us a record ({micro[0]:.2f} to {micro[-1]:.2f})", end="")
        print(f", {median(ratios(times, seconds['update()'])):.2f} times what update() takes", end="")
        print(f"; the close {median(closing_seconds[name]) / args.keys * 1e6:.2f} us besides")
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


def durable(count: int, keys: list[bytes]) -> float:
    """The time at which everything is there."""
    now = perf_counter()
    if count != len(keys):
        raise RuntimeError(f"{count} records are there, of {len(keys)}")
    return now


def by_sets(path: Path, keys: list[bytes]) -> float | None:
    """Set key by key."""
    with dbm_bitcask.open(path, "n") as db:
        for key, value in items(keys):
            db[key] = value
        db.sync()
        return durable(len(db), keys)


def by_update(path: Path, keys: list[bytes]) -> float | None:
    """One call."""
    with dbm_bitcask.open(path, "n") as db:
        db.update(items(keys))
        db.sync()
        return durable(len(db), keys)


def by_lmdb(path: Path, keys: list[bytes]) -> float | None:
    """One transaction."""
    try:
        lmdb: Any = importlib.import_module("lmdb")
    except ImportError:
        return None
    with lmdb.open(str(path), map_size=MAP_SIZE, sync=False) as env:
        with env.begin(write=True) as transaction:
            for key, value in items(keys):
                transaction.put(key, value)
        env.sync(True)
        return durable(env.stat()["entries"], keys)


def by_sqlite(path: Path, keys: list[bytes]) -> float | None:
    """One transaction, into the table that dbm.sqlite3 makes."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE Dict (key BLOB UNIQUE NOT NULL, value BLOB NOT NULL)")
        db.execute("PRAGMA journal_mode = wal")
        with db:
            db.executemany("REPLACE INTO Dict (key, value) VALUES (?, ?)", items(keys))
        return durable(db.execute("SELECT count(*) FROM Dict").fetchone()[0], keys)


LOADS: dict[str, Callable[[Path, list[bytes]], float | None]] = {
    "single sets": by_sets,
    "update()": by_update,
    "py-lmdb, one transaction": by_lmdb,
    "sqlite3, executemany": by_sqlite,
}


if __name__ == "__main__":
    sys.exit(main())
