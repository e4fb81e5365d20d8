"""The slowest sets while a database grows.

Sets two million new keys, each one timed, and prints the ten slowest. Bound: none takes more than 20 ms. One segment
holds them all, so that a stall is the index's and not that of an fsync at rotation; `--segment-size` adds rotation. The
processor time says whether a slow set worked or waited.
"""

import heapq
import sys
from pathlib import Path
from time import perf_counter_ns, thread_time_ns

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

NANOSECONDS_BOUND = 20_000_000
SHOWN = 10


def main() -> int:
    """Measure and print the verdict."""
    args = arguments(__doc__, keys=2_000_000, segment_size=(2**30, "bytes"))
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        slowest = time_sets(place / "slowest_sets.bitcask", args.keys, args.segment_size)
    for elapsed, worked, number in slowest:
        print(f"{elapsed / 1e6:9.3f} ms, of it {worked / 1e6:9.3f} ms processor time, at key {number:,}")
    verdicts.check(slowest[0][0] <= NANOSECONDS_BOUND, f"no set of {args.keys:,} takes more than 20 ms")
    return verdicts.status


def time_sets(path: Path, count: int, segment_size: int) -> list[tuple[int, int, int]]:
    """Set the keys; return the slowest as nanoseconds, nanoseconds of processor time and number of the key."""
    slowest: list[tuple[int, int, int]] = []
    with dbm_bitcask.open(path, "n", segment_size=segment_size) as db:
        for number in range(count):
            key = dataset.key(number)
            value = dataset.value(key)
            worked, start = thread_time_ns(), perf_counter_ns()
            db[key] = value
            elapsed = perf_counter_ns() - start
            measured = (elapsed, thread_time_ns() - worked, number)
            if len(slowest) < SHOWN:
                heapq.heappush(slowest, measured)
            elif elapsed > slowest[0][0]:
                heapq.heapreplace(slowest, measured)
    return sorted(slowest, reverse=True)


if __name__ == "__main__":
    sys.exit(main())
