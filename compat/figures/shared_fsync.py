"""One fsync for many writers: sets a second with `sync="always"`, by threads and by processes.

Alternating rounds of 1 and 8 threads on one handle, and of 1 and 4 processes with a handle each; every set is durable when it returns. The
sets a second of all together and the fsyncs for a set are printed, medians of the rounds. Bound: 8 threads, and 4 processes, need fewer
fsyncs than sets, and get more done than one.
"""

import mmap
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace
from compat.figures.visible_at_once import end_with
from dbm_bitcask.engine import files

CROWDS = ((1, 1), (1, 8), (4, 1))  # processes, threads of each
SETS, SYNCS, READY, WORDS = range(4)  # of each process


def main() -> int:
    """Run the rounds and print the verdicts."""
    args = arguments(__doc__, seconds=(2.0, "of a round"), rounds=5)
    verdicts = Verdicts()
    rates: dict[tuple[int, int], list[tuple[float, float]]] = {crowd: [] for crowd in CROWDS}
    with workplace(args.directory) as place:
        for number in range(args.rounds):
            for processes, threads in CROWDS:
                path = place / f"{processes}-{threads}-{number}.bitcask"
                rates[processes, threads].append(one_round(path, processes, threads, args.seconds))
    alone = median(rate for rate, _ in rates[1, 1])
    for (processes, threads), rounds in rates.items():
        rate, syncs = median(rate for rate, _ in rounds), median(syncs for _, syncs in rounds)
        spread = f"{min(rate for rate, _ in rounds):,.0f} to {max(rate for rate, _ in rounds):,.0f}"
        print(f"{processes} processes of {threads} threads: {rate:,.0f} sets a second ({spread}), {syncs:.2f} fsyncs a set")
        if processes * threads > 1:
            verdicts.check(syncs < 0.9 and rate > alone, f"they share fsyncs: {rate / alone:.2f} times the sets of one thread alone")
    return verdicts.status


def one_round(path: Path, processes: int, threads: int, seconds: float) -> tuple[float, float]:
    """Let so many write: sets a second of all, and fsyncs for a set."""
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    go = len(words) - 1
    dbm_bitcask.open(path, "n").close()
    children = []
    for number in range(processes):
        children.append(os.fork())
        if not children[-1]:
            end_with(lambda: write(path, words, WORDS * number, threads, seconds))  # noqa: B023  (called at once)
    while sum(words[WORDS * number + READY] for number in range(processes)) < processes:
        time.sleep(0.001)
    words[go] = 1
    if any([os.waitpid(child, 0)[1] for child in children]):  # noqa: C419  (every child is to be waited for)
        raise RuntimeError("a writer failed")
    done = sum(words[WORDS * number + SETS] for number in range(processes))
    return done / seconds, sum(words[WORDS * number + SYNCS] for number in range(processes)) / done


def write(path: Path, words: memoryview, base: int, threads: int, seconds: float) -> None:
    """Be a process of writers: set new keys until the time is over."""
    syncs = count_syncs()
    with dbm_bitcask.open(path, "w", sync="always") as db:
        syncs[0] = 0
        words[base + READY] = 1
        while not words[len(words) - 1]:
            time.sleep(0.0001)
        end = time.perf_counter() + seconds
        done = [0] * threads

        def work(thread: int) -> None:
            while time.perf_counter() < end:
                key = dataset.key(base << 48 | thread << 32 | done[thread])
                db[key] = dataset.value(key)
                done[thread] += 1

        crowd = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        words[base + SETS], words[base + SYNCS] = sum(done), syncs[0]


def count_syncs() -> list[int]:
    """Have the syncs of this process counted in the one item of a list."""
    syncs, sync = [0], files._fdatasync

    def counted(fd: int) -> None:
        syncs[0] += 1
        sync(fd)

    files._fdatasync = counted
    return syncs


if __name__ == "__main__":
    sys.exit(main())
