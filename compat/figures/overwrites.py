"""Space that comes back by itself: overwrites, and nobody ever calls merge.

100,000 keys with values of 1,000 bytes are overwritten 50 times, in the order of the keys, at random (uniform), and so that a tenth of
the keys gets nine tenths of the writes (90/10), with segments of 1 MiB. Every 2,000 writes the blocks of all files are counted. Bounds: at
every moment less than 2.5 times the bytes of the live keys and values; after `reorganize()` less than 1.3 times. The write amplification
is (bytes written by the user + bytes that the merge wrote again) / bytes written by the user.

Then the same with the default segment size and 5,000 keys, where all would fit the active segment, which is sealed early; and 10,000
scripts that open a database of 20 such keys with segments of 64 KiB, overwrite them and close: less than 1 MB at every moment.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import dbm_bitcask
from compat.figures.measure import Verdicts, arguments, workplace

MIB = 2**20
VALUE = 1000  # bytes
PATTERNS = ("in order", "uniform", "90/10")


def main() -> int:
    """Measure every pattern and print the verdicts."""
    args = arguments(__doc__, keys=100_000, rounds=50, scripts=10_000)
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        for pattern in PATTERNS:
            overwrite(place / pattern.replace("/", "-"), args.keys, args.rounds, pattern, verdicts, segment_size=MIB)
        overwrite(place / "default", max(1, args.keys // 20), 20 * args.rounds, "uniform", verdicts, early=True)
        scripts(place / "scripts", args.scripts, verdicts)
    return verdicts.status


def overwrite(path: Path, keys: int, rounds: int, pattern: str, verdicts: Verdicts, *, early: bool = False, **options: int) -> None:
    """Overwrite, and look at the disk now and then."""
    live = keys * (len(key(0)) + VALUE)
    with dbm_bitcask.open(path, "n", **options) as db:
        for number in range(keys):
            db[key(number)] = value(0)
        largest, begun = 0, perf_counter()
        for count, number in enumerate(numbers(keys, keys * rounds, pattern)):
            db[key(number)] = value(count)
            if count % 2000 == 0:
                largest = max(largest, disk_bytes(path))
        seconds = perf_counter() - begun
        stats, written = db.stats(), keys * rounds * (len(key(0)) + VALUE + 24)
        print(
            f"{pattern}, {keys:,} keys, {rounds} times, {'default segments' if early else 'segments of 1 MiB'}: "
            f"{keys * rounds / seconds:,.0f} sets/s, write amplification {1 + stats.copied_bytes / written:.2f}, "
            f"{stats.reclaimed_bytes / 1e9:.2f} GB given back, {stats.segments} segments"
        )
        if early:
            print(f"      at most {largest / live:.2f} x live, {largest / MIB:.1f} MiB, where the segment size is 64 MiB")
            verdicts.check(largest < 64 * MIB, "an active segment with mostly dead bytes is sealed before it is full")
        else:
            verdicts.check(largest < 2.5 * live, f"at every moment below 2.5 x live: {largest / live:.2f}")
        db.reorganize()
        after = disk_bytes(path)
        verdicts.check(after < 1.3 * live, f"after reorganize() below 1.3 x live: {after / live:.2f}")
        verdicts.check(len(db) == keys, "every key is there")


def scripts(path: Path, count: int, verdicts: Verdicts) -> None:
    """Open, overwrite 20 keys and close, again and again."""
    largest = 0
    for script in range(count):
        with dbm_bitcask.open(path, "c", segment_size=64 * 1024) as db:
            for number in range(20):
                db[key(number)] = value(script)
        largest = max(largest, disk_bytes(path))
    verdicts.check(largest < 1e6, f"{count:,} short scripts stay below 1 MB: {largest / 1e6:.2f} MB")


def numbers(keys: int, count: int, pattern: str) -> Iterator[int]:
    """The keys to overwrite, by number."""
    source = random.Random(pattern)
    for turn in range(count):
        if pattern == "in order":
            yield turn % keys
        elif pattern == "uniform" or source.random() < 0.1:
            yield source.randrange(keys)
        else:
            yield source.randrange(max(1, keys // 10))


def key(number: int) -> bytes:
    """Return a key of 16 bytes."""
    return b"key %012d" % number


def value(turn: int) -> bytes:
    """Return a value of 1,000 bytes."""
    return (b"%d " % turn).ljust(VALUE, b".")


def disk_bytes(path: Path) -> int:
    """Return the bytes of the blocks of all files."""
    total = 0
    for file in path.iterdir():
        try:
            total += file.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


if __name__ == "__main__":
    sys.exit(main())
