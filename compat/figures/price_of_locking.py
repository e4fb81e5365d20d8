"""What the locks cost when nobody else is there.

set and get on the same database, with the locks and with them replaced by nothing, in alternating rounds in one process; the median of the
rounds counts. Bound: a get takes no lock, so its ratio is 1.0 within noise (at most 1.05). The price of a set is printed, with its two
parts: the thread lock alone, which is what flag u leaves, and the file lock.
"""

import contextlib
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

GET_BOUND = 1.05
SET_BOUND = 1.6


class NoMutex(contextlib.nullcontext[None]):
    """Stands where the thread lock was."""


def main() -> int:
    """Measure and print the verdicts."""
    args = arguments(__doc__, keys=(50_000, "of a round"), rounds=9)
    verdicts = Verdicts()
    seconds: dict[tuple[str, str], list[float]] = {}
    with workplace(args.directory) as place:
        databases = {kind: opened(place / f"{kind}.bitcask", kind, args.keys) for kind in ("locked", "alone", "bare")}
        for number in range(args.rounds):
            for kind, db in databases.items():
                seconds.setdefault(("set", kind), []).append(set_some(db, number, args.keys))
                seconds.setdefault(("get", kind), []).append(get_some(db, args.keys))
        for db in databases.values():
            db.close()
    micro = {what: median(times) / args.keys * 1e6 for what, times in seconds.items()}
    for what in ("set", "get"):
        print(f"{what}: {micro[what, 'locked']:.2f} us, thread lock alone {micro[what, 'alone']:.2f}, without {micro[what, 'bare']:.2f}")
    ratios = {what: micro[what, "locked"] / micro[what, "bare"] for what in ("set", "get")}
    verdicts.check(ratios["get"] <= GET_BOUND, f"get with locks beside get without: {ratios['get']:.3f}, at most {GET_BOUND}")
    verdicts.check(ratios["set"] <= SET_BOUND, f"set with locks beside set without: {ratios['set']:.3f}, at most {SET_BOUND}")
    return verdicts.status


def opened(path: Path, kind: str, keys: int) -> dbm_bitcask.Database:
    """A database with the first keys in it, and without the locks that its kind does not take."""
    db = dbm_bitcask.open(path, "n" if kind == "locked" else "nu")
    if kind == "bare":
        db._log.lock.mutex = NoMutex()  # type: ignore[assignment]
    dataset.fill(db, keys)
    return db


def set_some(db: dbm_bitcask.Database, number: int, keys: int) -> float:
    """Set as many new keys as there were, and the seconds that it takes."""
    fresh = [dataset.key((number + 1) * keys + count) for count in range(keys)]
    value = dataset.value(fresh[0])
    start = perf_counter()
    for key in fresh:
        db[key] = value
    return perf_counter() - start


def get_some(db: dbm_bitcask.Database, keys: int) -> float:
    """Get the first keys, and the seconds that it takes."""
    known = [dataset.key(count) for count in range(keys)]
    start = perf_counter()
    for key in known:
        db[key]
    return perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
