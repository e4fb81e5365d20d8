"""kill -9 at random moments of a writer.

A process sets, overwrites and deletes keys, and prints the number of each operation once it has returned. It is killed
after a random time, the database is opened again and written to, and every key is compared with what the acknowledged
operations left. 200 rounds on one database, with small segments, so that kills also hit rotation and growth of the
index. Bounds: no acknowledged operation is lost, and opening takes under 1 s, every time.

The operation that was under way may have happened or not, whole in either case.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, workplace

SECONDS_BOUND = 1.0
SEGMENT_SIZE = 2**20
PROBE = b"probe"

Operation = tuple[bytes, bytes | None]


def main() -> int:
    """Run the rounds and print the verdicts."""
    args = arguments(
        __doc__, rounds=200, keys=(50_000, "different keys"), longest=(0.4, "longest life of a writer in s"), seed=0, child=int
    )
    if args.child is not None:
        write_for_ever(args.directory, args.child, args.keys)
    verdicts = Verdicts()
    moments = random.Random(args.seed)
    expected: dict[bytes, bytes] = {}
    lost, slowest, acknowledged = 0, 0.0, 0
    with workplace(args.directory) as place:
        path = place / "kill_writer.bitcask"
        dbm_bitcask.open(path, "n", segment_size=SEGMENT_SIZE).close()
        for number in range(args.rounds):
            count = kill_one(path, number, args.keys, moments.uniform(0, args.longest))
            seconds, wrong = compare(path, expected, number, count, args.keys)
            acknowledged, lost, slowest = acknowledged + count, lost + wrong, max(slowest, seconds)
    print(f"{args.rounds} kills, {acknowledged:,} acknowledged operations, slowest open {slowest * 1e3:.1f} ms")
    verdicts.check(lost == 0, f"every acknowledged operation is there ({lost} are not)")
    verdicts.check(slowest < SECONDS_BOUND, "opening after a kill takes under 1 s")
    return verdicts.status


def operations(number: int, keys: int) -> Iterator[Operation]:
    """Yield the operations of a round, the same ones in the writer and in the judge; a value of None deletes."""
    choose = random.Random(f"round {number}")
    while True:
        key = dataset.key(choose.randrange(keys))
        kind = choose.randrange(10)
        yield key, None if kind == 0 else choose.randbytes(choose.choice((0, 10, 100, 1000)))


def write_for_ever(path: Path, number: int, keys: int) -> None:
    """Be the writer: acknowledge each operation on stdout, at once, until killed."""
    with dbm_bitcask.open(path, "w", segment_size=SEGMENT_SIZE) as db:
        os.write(1, b"open\n")
        for count, (key, value) in enumerate(operations(number, keys), 1):
            if value is None:
                db.pop(key, None)
            else:
                db[key] = value
            os.write(1, b"%d\n" % count)


def kill_one(path: Path, number: int, keys: int, life: float) -> int:
    """Let a writer live for some seconds after its open, kill it, and return how many operations it acknowledged."""
    command = [sys.executable, "-m", __spec__.name]
    command += ["--child", str(number), "--keys", str(keys), "--directory", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as writer:
        assert writer.stdout is not None
        if writer.stdout.read(5) != b"open\n":
            raise RuntimeError("the writer did not start")
        try:
            writer.communicate(timeout=life)
        except subprocess.TimeoutExpired:
            writer.kill()
        output, _ = writer.communicate()
    if writer.returncode != -9:
        raise RuntimeError(f"the writer ended by itself with {writer.returncode}")
    whole = output.rpartition(b"\n")[0]
    return int(whole.rpartition(b"\n")[2] or 0)


def compare(path: Path, expected: dict[bytes, bytes], number: int, count: int, keys: int) -> tuple[float, int]:
    """Bring `expected` up to date and return the seconds that opening took and the number of keys that are wrong."""
    under_way = replay(expected, number, count, keys)
    start = time.perf_counter()
    with dbm_bitcask.open(path, "w", segment_size=SEGMENT_SIZE) as db:
        db[PROBE] = b"%d" % number
        seconds = time.perf_counter() - start
        key, value = under_way
        found = db.get(key)
        allowed = found in (value, expected.get(key))
        adopt(expected, key, found)
        wrong = sum(db.get(key) != value for key, value in expected.items())
        wrong += (len(db) - 1 != len(expected)) + (not allowed)
    if wrong:
        print(f"round {number}: {wrong} keys are wrong after {count} acknowledged operations")
    return seconds, wrong


def replay(expected: dict[bytes, bytes], number: int, count: int, keys: int) -> Operation:
    """Apply the acknowledged operations to `expected` and return the one after them."""
    for done, (key, value) in enumerate(operations(number, keys)):
        if done == count:
            return key, value
        adopt(expected, key, value)
    raise AssertionError("operations never end")


def adopt(expected: dict[bytes, bytes], key: bytes, value: bytes | None) -> None:
    """Set or delete one key in memory."""
    if value is None:
        expected.pop(key, None)
    else:
        expected[key] = value


if __name__ == "__main__":
    sys.exit(main())
