"""Many short scripts: open, set one key, close, again and again.

1,000 rounds on a database of 1,000,000 keys beside 1,000 rounds on one of 1,000 keys, in alternating blocks. Prints
the time per round and the number of fsyncs (counted by strace, in a run of its own). Bound: at most 1.5 times as long
on the large database.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from time import perf_counter

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, filled, strace, workplace

RATIO_BOUND = 1.5
BLOCKS = 10


def main() -> int:
    """Measure both databases and print the verdict."""
    args = arguments(__doc__, rounds=1000, large=(1_000_000, "keys"), small=(1_000, "keys"), child=Path)
    if args.child:
        rounds(args.child, args.rounds, 0)
        return 0
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        paths = [filled(place / f"{count}.bitcask", count) for count in (args.large, args.small)]
        times: dict[Path, list[float]] = {path: [] for path in paths}
        for block in range(BLOCKS):
            for path in paths:
                times[path] += rounds(path, args.rounds // BLOCKS, block)
        for path in paths:
            milliseconds = sorted(second * 1e3 for second in times[path])
            print(f"{path.stem:>9} keys: {median(milliseconds):.3f} ms a round, slowest {milliseconds[-1]:.1f} ms")
            count_fsyncs(path, args.rounds, verdicts)
        large, small = (median(times[path]) for path in paths)
        verdicts.check(large <= RATIO_BOUND * small, f"large beside small at most {RATIO_BOUND}: {large / small:.2f}")
    return verdicts.status


def rounds(path: Path, count: int, block: int) -> list[float]:
    """Open, set one key and close, `count` times; return the seconds of each."""
    seconds = []
    for number in range(count):
        key = dataset.key(block * count + number)
        start = perf_counter()
        with dbm_bitcask.open(path, "c") as db:
            db[key] = dataset.value(key)
        seconds.append(perf_counter() - start)
    return seconds


def count_fsyncs(path: Path, count: int, verdicts: Verdicts) -> None:
    """Run the rounds below strace and print how many fsyncs of each kind there were."""
    calls = strace(__spec__.name, "--child", path, "--rounds", count, calls="fsync,fdatasync,msync,sync_file_range,syncfs")
    if calls is None:
        verdicts.check(False, "fsyncs: not measured")
        return
    kinds = Counter(re.sub(r"^\d+ +(\w+)\(.*", r"\1", call) for call in calls)
    kinds_text = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "no fsync"
    print(f"{'':>15} {kinds_text} in {count} rounds")


if __name__ == "__main__":
    sys.exit(main())
