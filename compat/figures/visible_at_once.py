"""From set returning in one process to get seeing it in another.

One process sets, overwrites and deletes keys, and after each raises a flag in shared memory; another one waits for the flag by looking at
it all the time, and gets the key at once, and a third of the times asks with `in` or `len` as well. 100,000 tries, in small segments, with
a merge now and then, so that rotations, splits and merges lie between set and get. Bound: 0 misses. The time is that from before the flag
is raised to the answer.
"""

import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

RAISED, SEEN, RAISED_AT = range(3)
SEGMENT_SIZE = 64 * 1024
MERGE_EVERY = 5_000
DELETE_EVERY = 7


def main() -> int:
    """Run both processes and print the verdict."""
    args = arguments(__doc__, tries=100_000, keys=(20_000, "different keys"))
    verdicts = Verdicts()
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    with workplace(args.directory) as place:
        path = place / "visible.bitcask"
        dbm_bitcask.open(path, "n").close()
        pid = os.fork()
        if not pid:
            end_with(lambda: write(path, words, args.tries, args.keys))
        misses, times = look(path, words, args.tries, args.keys, pid)
        _, status = os.waitpid(pid, 0)
    times.sort()
    print(f"{len(times):,} tries: {times[len(times) // 2] / 1e3:.1f} us from the flag to the answer,", end=" ")
    print(f"{times[len(times) * 99 // 100] / 1e3:.1f} us for 99 of 100, slowest {times[-1] / 1e6:.2f} ms")
    verdicts.check(not status and len(times) == args.tries, "both processes came to the end")
    verdicts.check(misses == 0, f"every get saw the set that had returned before ({misses} did not)")
    return verdicts.status


def end_with(work: Callable[[], None]) -> None:
    """Be a forked process: do the work and end, with status 1 if it fails."""
    status = 1
    try:
        work()
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def operation(number: int, keys: int) -> tuple[bytes, bytes | None]:
    """The key of a try, and the value it gets; None if it is deleted."""
    key = dataset.key(number * 7919 % keys)
    return key, None if number % DELETE_EVERY == 0 else b"%d " % number + dataset.value(key)


def write(path: Path, words: memoryview, tries: int, keys: int) -> None:
    """Set, raise the flag, and wait until the other one has looked."""
    with dbm_bitcask.open(path, "w", segment_size=SEGMENT_SIZE) as db:
        for number in range(1, tries + 1):
            key, value = operation(number, keys)
            if value is None:
                db.pop(key, None)
            else:
                db[key] = value
            words[RAISED_AT] = time.perf_counter_ns()
            words[RAISED] = number
            while words[SEEN] != number:
                pass
            if number % MERGE_EVERY == 0:
                db.merge()


def look(path: Path, words: memoryview, tries: int, keys: int, writer: int) -> tuple[int, list[int]]:
    """Wait for the flag and get, `tries` times: the number of wrong answers, and the time of each in ns."""
    misses, times = 0, []
    present: set[bytes] = set()
    with dbm_bitcask.open(path, "r") as db:
        for number in range(1, tries + 1):
            key, value = operation(number, keys)
            spins = 0
            while words[RAISED] != number:
                spins += 1
                if spins % 1_000_000 == 0 and os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return misses, times
            found = db.get(key)
            times.append(time.perf_counter_ns() - words[RAISED_AT])
            (present.discard if value is None else present.add)(key)
            right = found == value
            if number % 3 == 0:
                right = right and (key in db) == (value is not None) and len(db) == len(present)
            if not right:
                misses += 1
                print(f"try {number}: {key!r} is {found!r}, and not {value!r}; {len(db)} keys of {len(present)}")
            words[SEEN] = number
    return misses, times


if __name__ == "__main__":
    sys.exit(main())
