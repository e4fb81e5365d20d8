"""A database bigger than the memory that its process may have.

Two million keys of 16 bytes with values of 100 bytes are set in random order and got in another random order, in a
process whose RLIMIT_DATA is 150 MB. Bound: its anonymous memory never grows by 30 MB. For comparison, a dict of the
same data under the same limit, which is expected to die.
"""

import argparse
import resource
import sys
from array import array
from pathlib import Path

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, child, workplace
from dbm_bitcask.demo import anonymous_memory

GROWTH_BOUND = 30_000_000
SAMPLE_EVERY = 10_000


def main() -> int:
    """Run both children and print the verdicts."""
    args = arguments(__doc__, keys=2_000_000, limit=(150, "RLIMIT_DATA in MB"), child=str)
    if args.child:
        return run_child(args)
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        options = ("--keys", args.keys, "--limit", args.limit, "--directory", place)
        ours = child(__spec__.name, "--child", "store", *options)
        print(ours.stdout.strip() or ours.stderr.strip())
        verdicts.check(ours.returncode == 0, f"{args.keys:,} keys, anonymous memory grows by less than 30 MB")
        in_memory = child(__spec__.name, "--child", "dict", *options)
        died = "MemoryError" in in_memory.stderr or in_memory.returncode < 0
        verdicts.check(died, "a dict of the same data does not fit into the limit")
    return verdicts.status


def run_child(args: argparse.Namespace) -> int:
    """Fill and read the store, or a dict, under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (args.limit * 10**6, args.limit * 10**6))
    if args.child == "dict":
        dataset.fill({}, args.keys)
        return 0
    order = dataset.shuffled(args.keys)
    return use_store(args.directory / "bigger_than_memory.bitcask", order)


def use_store(path: Path, order: "array[int]") -> int:
    """Set and get every key; return 0 if all values are right and memory stayed below the bound."""
    before = memory()
    peak = before
    with dbm_bitcask.open(path, "n") as db:
        for number in range(len(order)):
            key = dataset.key(number)
            db[key] = dataset.value(key)
            if number % SAMPLE_EVERY == 0:
                peak = max(peak, memory())
        written = peak
        for count, number in enumerate(order):
            key = dataset.key(number)
            if db[key] != dataset.value(key):
                raise RuntimeError(f"key {number} has a wrong value")
            if count % SAMPLE_EVERY == 0:
                peak = max(peak, memory())
        peak = max(peak, memory())
    peak = max(peak, memory())
    print(f"anonymous memory grew by {(written - before) / 1e6:.1f} MB writing, {(peak - before) / 1e6:.1f} MB in all")
    return int(peak - before >= GROWTH_BOUND)


def memory() -> int:
    """Return the anonymous memory of this process in bytes."""
    found = anonymous_memory()
    if found is None:
        raise RuntimeError("this figure needs /proc/self/status")
    return found


if __name__ == "__main__":
    sys.exit(main())
