"""What values of 1 MB cost, beside plain system calls on one file.

set beside `os.write`, get (verified, through the map) beside `os.pread`, in turn, so that both have the same machine. Twice: within one
segment, value by value, where the median of a round's values counts; and over many of the default size, segment by segment, where the mean
counts, for it is a few values that wait. There the plain file gets an fdatasync wherever a segment ends, for what is in a segment that
ended is durable. The ratio is that of plain calls over ours, the median of the rounds. Bound: 0.8 of what the plain calls reach.
"""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import NamedTuple

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

BOUND = 0.8
SEGMENTS = {"one segment": (2**32 - 1, median), "segments of 64 MB": (64 * 2**20, fmean)}
SMALL = 5000  # values of 100 bytes that are there before
SPARE = 64  # bytes of a segment, and of each value in it, at most, that are not the values


class Times(NamedTuple):
    """The seconds that plain calls took, each, and ours."""

    plain: list[float]
    ours: list[float]


def main() -> int:
    """Measure and print the verdicts."""
    args = arguments(__doc__, values=(256, "of a round"), size=(2**20, "bytes of a value"), rounds=9)
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        for what, (segment_size, typical) in SEGMENTS.items():
            rounds = [measured(place, args.values, args.size, segment_size) for _ in range(args.rounds)]
            judge(f"{what}, written", [times for times, _ in rounds], typical, verdicts)
            judge(f"{what}, read", [times for _, times in rounds], median, verdicts)
    return verdicts.status


def judge(what: str, rounds: list[Times], typical: Callable[[list[float]], float], verdicts: Verdicts) -> None:
    """Print the figures of some rounds, and check them."""
    found = [(typical(times.plain), typical(times.ours)) for times in rounds]
    ratios = sorted(plain / ours for plain, ours in found)
    plain, ours = (median(column) * 1e6 for column in zip(*found, strict=True))
    print(f"{what}: {ours:.0f} us a value, plain {plain:.0f}; the rounds from {ratios[0]:.2f} to {ratios[-1]:.2f}")
    verdicts.check(median(ratios) >= BOUND, f"{what}: {median(ratios):.2f} of what plain calls reach, at least {BOUND}")


def measured(place: Path, count: int, size: int, segment_size: int) -> tuple[Times, Times]:
    """Write values in both ways and read them again."""
    values = [random.Random(seed).randbytes(size) for seed in range(7)]
    path, plain = place / "large.bitcask", place / "plain"
    fd = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    with dbm_bitcask.open(path, "n", segment_size=segment_size) as db:
        dataset.fill(db, SMALL)  # else most of what is touched of the index were new to the process
        try:
            a_segment = (segment_size - SPARE) // (size + SPARE)
            return written(db, fd, count, values, a_segment), read(db, fd, count, values)
        finally:
            os.close(fd)
            plain.unlink()
            db.clear()


def written(db: dbm_bitcask.Database, fd: int, count: int, values: list[bytes], a_segment: int) -> Times:
    """Write them, as many at a time as fill a segment, if that is not all of them, now the one first and now the other."""
    times = Times([], [])
    some = a_segment if a_segment < count else 1

    def write_plain(number: int) -> None:
        if number and number % a_segment == 0:
            os.fdatasync(fd)
        os.write(fd, values[number % len(values)])

    def write_ours(number: int) -> None:
        db[b"%d" % number] = values[number % len(values)]

    both = [(times.plain, write_plain), (times.ours, write_ours)]
    for start in range(0, count, some):
        for taken, write in both:
            taken.extend(seconds(write, number) for number in range(start, min(start + some, count)))
        both.reverse()
    return times


def read(db: dbm_bitcask.Database, fd: int, count: int, values: list[bytes]) -> Times:
    """Read them in random order, now the one first and now the other; twice, for the first time every page is new to the map."""
    size = len(values[0])

    def read_plain(number: int) -> bytes:
        return os.pread(fd, size, number * size)

    def read_ours(number: int) -> bytes:
        return db[b"%d" % number]

    for turn in range(2):
        times = Times([], [])
        both = [(times.plain, read_plain), (times.ours, read_ours)]
        order = random.Random(turn).sample(range(count), count)
        for pair in zip(order, reversed(order), strict=True):  # none reads what the other has just read
            for (taken, look), number in zip(both, pair, strict=True):
                taken.append(seconds(look, number))
            both.reverse()
    for number in range(count):
        if db[b"%d" % number] != values[number % len(values)]:
            raise RuntimeError("wrong value")
    return times


def seconds(call: Callable[..., object], *args: object) -> float:
    """The seconds that a call takes, without those in which its result is given back."""
    start = perf_counter()
    result = call(*args)
    taken = perf_counter() - start
    del result
    return taken


if __name__ == "__main__":
    sys.exit(main())
