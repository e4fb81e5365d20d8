"""What compression saves, and what it costs.

Pickled records of English-like text, of several sizes, in a database of their own for each way to compress: bytes of the log for each
byte of the values, and microseconds for a set and a get, the median of the rounds. Prints a table; there is no bound.
"""

import argparse
import pickle
import random
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import dbm_bitcask
from compat.figures.measure import arguments, workplace

if TYPE_CHECKING:
    from dbm_bitcask.database import Compression

WAYS: "tuple[Compression | None, ...]" = (None, "zlib", "zstd")
WORDS = {10: 3000, 50: 3000, 200: 2000, 1500: 400, 20_000: 50}  # of a record's text: so many records


class Cost(NamedTuple):
    """Bytes of the log, seconds of all sets, seconds of all gets."""

    stored: int
    setting: float
    getting: float


def main() -> int:
    """Measure and print the table."""
    args = arguments(__doc__, rounds=5)
    print(f"{'bytes of a value':>16}   " + "   ".join(f"{way or 'none':>6}: of it    set    get" for way in WAYS))
    with workplace(args.directory) as place:
        for words, count in WORDS.items():
            print(row(words, count, place, args))
    return 0


def row(words: int, count: int, place: Path, args: argparse.Namespace) -> str:
    """The line of the table for records with so many words."""
    values = {b"%d" % number: record(number, words) for number in range(count)}
    size = sum(map(len, values.values()))
    costs: dict[Compression | None, list[Cost]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            costs[way].append(cost(place / f"{way}.bitcask", way, values))
    line = f"{size // count:>16,}   "
    for each in costs.values():
        stored, setting, getting = (median(column) for column in zip(*each, strict=True))
        line += f"{stored / size:>14.2f} {setting / count * 1e6:>6.0f} {getting / count * 1e6:>6.0f}   "
    return line


def record(number: int, words: int) -> bytes:
    """A pickled record: words as often as in a text, where the n-th takes 1/n of it, and some fields besides."""
    chance = random.Random(number)
    known = [f"word{each:x}" for each in range(5000)]
    text = " ".join(known[min(4999, int(2 ** (chance.random() * 12.3)) - 1)] for _ in range(words))
    return pickle.dumps({"id": number, "title": text[:40], "score": chance.random(), "tags": ["snow", "ice"], "text": text})


def cost(path: Path, way: "Compression | None", values: dict[bytes, bytes]) -> Cost:
    """What a new database with these values costs."""
    with dbm_bitcask.open(path, "n", compress=way) as db:
        begun = perf_counter()
        for key, value in values.items():
            db[key] = value
        between = perf_counter()
        for key in values:
            db[key]
        done = perf_counter()
        return Cost(db.stats().log_bytes, between - begun, done - between)


if __name__ == "__main__":
    sys.exit(main())
