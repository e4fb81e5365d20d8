"""Writers of several processes together against one alone.

1, 2 and 8 processes set keys of their own in one database for some seconds, in alternating rounds; what they get done together counts, the
median of the rounds. Bound: 2 processes, and 8, reach at least 0.8 times the sets per second of one (no collapse under contention). The
longest that a single set waited is printed.
"""

import mmap
import os
import sys
import time
from pathlib import Path
from statistics import median

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace
from compat.figures.visible_at_once import end_with

CROWDS = (1, 2, 8)
BOUND = 0.8
GO = 0  # the word that starts the writers
FIRST, WORDS = 1, 3  # of each writer: sets done, the longest in ns, and whether it is ready


def main() -> int:
    """Run the rounds and print the verdicts."""
    args = arguments(__doc__, seconds=(3.0, "of a round"), rounds=5)
    verdicts = Verdicts()
    rates: dict[int, list[float]] = {crowd: [] for crowd in CROWDS}
    longest = dict.fromkeys(CROWDS, 0)
    with workplace(args.directory) as place:
        for number in range(args.rounds):
            for crowd in CROWDS:
                rate, slowest = one_round(place / f"{crowd}-{number}.bitcask", crowd, args.seconds)
                rates[crowd].append(rate)
                longest[crowd] = max(longest[crowd], slowest)
    alone = median(rates[1])
    for crowd in CROWDS:
        print(f"{crowd} writers: {median(rates[crowd]):,.0f} sets a second in all, longest wait {longest[crowd] / 1e6:.1f} ms")
    for crowd in CROWDS[1:]:
        ratio = median(rates[crowd]) / alone
        verdicts.check(ratio >= BOUND, f"{crowd} writers beside one: {ratio:.2f}, at least {BOUND}")
    return verdicts.status


def one_round(path: Path, crowd: int, seconds: float) -> tuple[float, int]:
    """Let so many processes write: sets a second of all, and the longest set in ns."""
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    dbm_bitcask.open(path, "n").close()
    children = []
    for writer in range(crowd):
        children.append(os.fork())
        if not children[-1]:
            end_with(lambda: write(path, words, writer, seconds))  # noqa: B023  (called at once)
    while sum(words[FIRST + WORDS * writer + 2] for writer in range(crowd)) < crowd:
        time.sleep(0.001)
    words[GO] = 1
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError("a writer failed")
    done = sum(words[FIRST + WORDS * writer] for writer in range(crowd))
    return done / seconds, max(words[FIRST + WORDS * writer + 1] for writer in range(crowd))


def write(path: Path, words: memoryview, writer: int, seconds: float) -> None:
    """Be a writer: set new keys until the time is over."""
    count, longest, base = 0, 0, FIRST + WORDS * writer
    with dbm_bitcask.open(path, "w") as db:
        words[base + 2] = 1
        while not words[GO]:
            pass
        end = time.perf_counter_ns() + int(seconds * 1e9)
        before = time.perf_counter_ns()
        while before < end:
            key = dataset.key(writer << 32 | count)
            db[key] = dataset.value(key)
            after = time.perf_counter_ns()
            longest = max(longest, after - before)
            before = after
            count += 1
        words[base], words[base + 1] = count, longest


if __name__ == "__main__":
    sys.exit(main())
