"""One handle in 8 threads, and in 8 forked children.

Three parts, each on a database with tiny segments and with merges going on:

    threads              8 threads share one handle
    children             8 children forked from a process with an open handle use that handle, and so does the parent; some close it
    children of threads  children are forked while threads of the parent are in the middle of their operations

Every worker sets, deletes, gets and iterates keys of its own, by a sequence that its seed decides, so that the result is known exactly. On
top of that all of them draw from one heap by pops, and race with `setdefault` for keys that only one can win. Bounds: the
contents are exact, everything is drawn once, each race has one winner whom all see, nobody fails or hangs, `check` finds nothing.
"""

import argparse
import faulthandler
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import dbm_bitcask
from compat.figures.measure import Verdicts, arguments, workplace
from dbm_bitcask.engine.check import check

SEGMENT_SIZE = 16 * 1024
PATIENCE = 300  # seconds for one part

Database = dbm_bitcask.Database
Expected = dict[bytes, bytes]


def main() -> int:
    """Run the parts and print the verdicts."""
    args = arguments(__doc__, workers=8, operations=(5_000, "of each worker"), heap=(2_000, "keys that are drawn by all"), seed=0)
    verdicts = Verdicts()
    parts: dict[str, Callable[[Database, argparse.Namespace], list[str]]] = {
        "threads": in_threads,
        "children": in_children,
        "children of threads": in_children_of_threads,
    }
    with workplace(args.directory) as place:
        for title, part in parts.items():
            end_in_time()
            path = place / f"{title.replace(' ', '_')}.bitcask"
            with dbm_bitcask.open(path, "n", segment_size=SEGMENT_SIZE) as db:
                db.update({b"heap %d" % number: b"%d" % number for number in range(args.heap)})
                failures = part(db, args) + differences(db, args)
            failures += map(str, check(path))
            with dbm_bitcask.open(path, "w") as db:
                failures += differences(db, args)
            for failure in failures[:10]:
                print(failure)
            verdicts.check(not failures, f"{title}: the result is exact ({len(failures)} failures)")
    return verdicts.status


def end_in_time() -> None:
    """See to it that this process ends if it hangs, and says where."""
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
    signal.alarm(PATIENCE)


# What one worker does.


def work(db: Database, args: argparse.Namespace, worker: int) -> None:
    """Do the operations of a worker, and hold every answer against what it must be; ValueError if it is another."""
    expected: Expected = {}
    for count, (key, value) in enumerate(operations(args, worker)):
        if value is None:
            require(db.pop(key, None), expected.pop(key, None), key)
        else:
            db[key] = expected[key] = value
        if count % 3 == 0:
            require(db.get(key), expected.get(key), key)
            require(key in db, key in expected, key)
        if count % 10 == 0:
            draw(db, args, worker, count)
            race(db, worker, count)
        if count % 1000 == 500:
            iterate(db, expected, worker)
        if count % 1000 == 900 and worker % 2 == 0:
            db.merge()


def operations(args: argparse.Namespace, worker: int) -> list[tuple[bytes, bytes | None]]:
    """(key, value to set, or None to delete) of each operation of a worker."""
    choose = random.Random(f"{args.seed} {worker}")
    keys = [b"own %d %d" % (worker, number) for number in range(args.operations // 5 + 1)]
    return [(choose.choice(keys), choose.randbytes(choose.randrange(200)) if choose.randrange(4) else None) for _ in range(args.operations)]


def draw(db: Database, args: argparse.Namespace, worker: int, count: int) -> None:
    """Take one number off the heap, whoever comes first, and note who got it."""
    key = b"heap %d" % (count * 31 % args.heap)
    value = db.pop(key, None)
    if value is not None:
        require(b"heap " + value, key, key)
        db[b"drawn %b by %d" % (value, worker)] = b""


def race(db: Database, worker: int, count: int) -> None:
    """Be one of those who set a key that is set only once."""
    key = b"race %d" % count
    winner = db.setdefault(key, b"%d" % worker)
    require(db.get(key), winner, key)
    db[b"saw %d %d" % (count, worker)] = winner


def iterate(db: Database, expected: Expected, worker: int) -> None:
    """Meet each key of this worker exactly once, whatever the others do."""
    mine = b"own %d " % worker
    met = [(key, value) for key, value in db.items() if key.startswith(mine)]
    require(sorted(met), sorted(expected.items()), b"an iteration")


def require(found: Any, right: Any, key: bytes) -> None:
    """Raise ValueError if the two are not the same."""
    if found != right:
        raise ValueError(f"{key!r}: {str(found)[:200]} is not {str(right)[:200]}")


# Who does it.


def in_threads(db: Database, args: argparse.Namespace) -> list[str]:
    """Every worker is a thread."""
    failures: list[str] = []
    run_threads(db, args, range(args.workers), failures)
    return failures


def run_threads(
    db: Database, args: argparse.Namespace, workers: range, failures: list[str], beside: Callable[[], None] | None = None
) -> None:
    """Run workers in threads, with something beside them in this one."""

    def run(worker: int) -> None:
        try:
            work(db, args, worker)
        except Exception:  # noqa: BLE001  (whatever it is, it is a failure)
            failures.append(f"thread {worker}: {traceback.format_exc()}")

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    if beside is not None:
        beside()
    for thread in threads:
        thread.join()


def in_children(db: Database, args: argparse.Namespace) -> list[str]:
    """Every worker but the first is a forked child, and the first is the parent."""
    children = [fork(db, args, worker) for worker in range(1, args.workers)]
    work(db, args, 0)
    return [f"child {pid} ended with {status}" for pid in children if (status := os.waitpid(pid, 0)[1])]


def in_children_of_threads(db: Database, args: argparse.Namespace) -> list[str]:
    """Half of the workers are threads; the others are children, forked while the threads write."""
    failures: list[str] = []
    children: list[int] = []

    def fork_all() -> None:
        children.extend(fork(db, args, worker) for worker in range(args.workers // 2, args.workers))

    run_threads(db, args, range(args.workers // 2), failures, fork_all)
    return failures + [f"child {pid} ended with {status}" for pid in children if (status := os.waitpid(pid, 0)[1])]


def fork(db: Database, args: argparse.Namespace, worker: int) -> int:
    """Let a child do the work of one worker on the parent's handle; an odd one closes it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        end_in_time()
        work(db, args, worker)
        if worker % 2:
            db.close()
        status = 0
    except BaseException:  # noqa: BLE001  (whatever it is, it is a failure)
        traceback.print_exc()
    os._exit(status)


# What must have come of it.


def differences(db: Database, args: argparse.Namespace) -> list[str]:
    """What in the database is not as all workers together must have left it."""
    expected: Expected = {}
    for worker in range(args.workers):
        for key, value in operations(args, worker):
            if value is None:
                expected.pop(key, None)
            else:
                expected[key] = value
    found = dict(db.items())
    own = {key: value for key, value in found.items() if key.startswith(b"own ")}
    failures = [f"{key!r} is wrong" for key in own.keys() | expected.keys() if own.get(key) != expected.get(key)]
    failures += drawn_wrongly(found, args) + raced_wrongly(found, args)
    if not len(db) == len(found) == len(db.keys()):
        failures.append(f"len() says {len(db)}, and there are {len(found)} keys")
    return failures


def drawn_wrongly(found: Expected, args: argparse.Namespace) -> list[str]:
    """Everything of the heap was drawn once, or is still there."""
    drawn = [key.split()[1] for key in found if key.startswith(b"drawn ")]
    left = [value for key, value in found.items() if key.startswith(b"heap ")]
    right = [b"%d" % number for number in range(args.heap)]
    return [] if sorted(drawn + left) == sorted(right) else [f"{len(drawn)} were drawn, {len(left)} are left, of {len(right)}"]


def raced_wrongly(found: Expected, args: argparse.Namespace) -> list[str]:
    """All who were in a race saw the same winner."""
    failures = []
    for count in range(0, args.operations, 10):
        winner = found.get(b"race %d" % count)
        saw = {found.get(b"saw %d %d" % (count, worker)) for worker in range(args.workers)}
        if saw != {winner}:
            failures.append(f"race {count}: {winner!r} won, and {saw} were seen")
    return failures


if __name__ == "__main__":
    sys.exit(main())
