"""Gets and sets beside a merge: how much slower the slowest are.

200,000 keys with values of 100 bytes are overwritten and read in random order, by turns through a handle that leaves merging to others
(idle) and one that pays for it (merging), on one database of which half is dead. Each single operation is timed. Bounds: p99 of get at
most 2 times, p99 of set at most 3 times what it is idle, in the same run; no set takes longer than 50 ms, but for the time that it spends
in fsync and fdatasync.

The second part, for information: the same operations while another process runs `merge()`, which has the lock most of the time.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, perf_counter_ns

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace
from dbm_bitcask.engine import files

BLOCK = 10_000  # operations between two changes of the handle
PERCENTS = (50, 90, 99, 99.9, 99.99, 100)
LONGEST = 50  # milliseconds
synced = 0  # nanoseconds spent in fsync


def main() -> int:
    """Measure both and print the distributions."""
    args = arguments(__doc__, keys=200_000, operations=1_000_000, segment_size=(4 * 2**20, "bytes"), child=Path)
    if args.child:
        with dbm_bitcask.open(args.child, "w", segment_size=args.segment_size) as db:
            print("begun", flush=True)
            db.merge()
        return 0
    time_syncs()
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        online(place / "online", args.keys, args.operations, args.segment_size, verdicts)
        beside_a_process(place / "whole", args.keys, args.segment_size)
    return verdicts.status


def online(path: Path, keys: int, operations: int, segment_size: int, verdicts: Verdicts) -> None:
    """By turns through the two handles."""
    numbers = random.Random(1)
    found: dict[str, list[int]] = {f"{operation} {how}": [] for operation in ("get", "set") for how in ("idle", "merging")}
    stalls: list[int] = []
    with (
        dbm_bitcask.open(path, "n", segment_size=segment_size, merge="manual") as idle,
        dbm_bitcask.open(path, "w", segment_size=segment_size) as merging,
    ):
        dataset.fill(idle, keys)
        for _ in range(keys):
            overwrite(idle, numbers.randrange(keys))
        handles = {"idle": idle, "merging": merging}
        before = merging.stats()
        for block in range(operations // BLOCK):
            how = ("idle", "merging")[block % 2]
            db = handles[how]
            for _ in range(BLOCK // 2):
                key = dataset.key(numbers.randrange(keys))
                value = dataset.value(key)
                found[f"get {how}"].append(timed(db.__getitem__, key)[0])
                key = dataset.key(numbers.randrange(keys))
                total, in_sync = timed(db.__setitem__, key, value)
                found[f"set {how}"].append(total)
                stalls.append(total - in_sync)
        after = merging.stats()
    print(f"{keys:,} keys, {operations:,} operations, segments of {segment_size / 2**20:.0f} MiB; microseconds")
    print(f"meanwhile merges copied {(after.copied_bytes - before.copied_bytes) / 1e6:.0f} MB and", end=" ")
    print(f"gave {(after.reclaimed_bytes - before.reclaimed_bytes) / 1e6:.0f} MB back")
    verdicts.check(after.reclaimed_bytes > before.reclaimed_bytes, "merges were at work")
    for what, times in found.items():
        show(what, times)
    for operation, bound in (("get", 2), ("set", 3)):
        ratio = percentile(found[f"{operation} merging"], 99) / percentile(found[f"{operation} idle"], 99)
        verdicts.check(ratio <= bound, f"p99 of {operation} at most {bound} x idle: {ratio:.2f}")
    show("set, without what fsync took", stalls)
    verdicts.check(max(stalls) <= LONGEST * 1e6, f"no set over {LONGEST} ms but for fsync: {max(stalls) / 1e6:.1f} ms")


def beside_a_process(path: Path, keys: int, segment_size: int) -> None:
    """While another process merges all that there is."""
    numbers = random.Random(2)
    with dbm_bitcask.open(path, "n", segment_size=segment_size, merge="manual") as db:
        dataset.fill(db, keys)
        for _ in range(keys):
            overwrite(db, numbers.randrange(keys))
        command = [sys.executable, "-m", __spec__.name, "--child", str(path), "--segment-size", str(segment_size)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            other.stdout.readline()
            begun, gets, sets = perf_counter(), [], []
            while other.poll() is None:
                key = dataset.key(numbers.randrange(keys))
                gets.append(timed(db.__getitem__, key)[0])
                sets.append(timed(db.__setitem__, key, dataset.value(key))[0])
        print(f"beside merge() of another process, {perf_counter() - begun:.1f} s:")
        show("get", gets)
        show("set", sets)


def overwrite(db: dbm_bitcask.Database, number: int) -> None:
    """Set a key anew."""
    key = dataset.key(number)
    db[key] = dataset.value(key)


def timed(operation: Callable[..., object], *args: bytes) -> tuple[int, int]:
    """Return the nanoseconds of a call, and those of them that it spent in fsync."""
    before, begun = synced, perf_counter_ns()
    operation(*args)
    return perf_counter_ns() - begun, synced - before


def time_syncs() -> None:
    """Count the time in fsync and fdatasync."""

    def counted(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            global synced
            begun = perf_counter_ns()
            sync(fd)
            synced += perf_counter_ns() - begun

        return call

    os.fsync = counted(os.fsync)  # type: ignore[assignment]
    files._fdatasync = counted(files._fdatasync)


def percentile(times: list[int], percent: float) -> int:
    """Return the time that so many of a hundred operations take at most."""
    return sorted(times)[min(len(times) - 1, int(len(times) * percent / 100))]


def show(what: str, times: list[int]) -> None:
    """Print the distribution in microseconds."""
    ordered = sorted(times)
    points = (ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1e3 for percent in PERCENTS)
    shown = "  ".join(f"p{percent:g} {point:,.1f}" for percent, point in zip(PERCENTS, points, strict=True))
    print(f"  {what + ':':<30} {shown}  ({len(times):,})")


if __name__ == "__main__":
    sys.exit(main())
