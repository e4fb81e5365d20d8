"""What opening a large database costs.

`open` and the first get on two million keys, in new processes that have imported the package. Bounds: under 20 ms each
time; a clean reopen opens no hint and reads no more of the log than the last record (4 KiB are allowed for it); at
most 40 system calls for `open` and the first get, counted by strace.
"""

import re
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import dbm_bitcask
from compat import dataset
from compat.figures.measure import Verdicts, arguments, child, filled, strace, workplace

SECONDS_BOUND = 0.020
CALLS_BOUND = 40
LOG_BYTES_BOUND = 4096
# Marks in the trace: files that do not exist, asked for at the boundaries.
MARKS = ("/mark-open", "/mark-get", "/mark-end")


def main() -> int:
    """Measure with and without strace and print the verdicts."""
    args = arguments(__doc__, keys=2_000_000, repeats=20, flag=("c", "flag of the reopen"), child=Path)
    if args.child:
        print(open_and_get(args.child, args.flag))
        return 0
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        path = filled(place / f"{args.keys}.bitcask", args.keys)
        options = ("--child", path, "--flag", args.flag)
        seconds = sorted(float(child(__spec__.name, *options).stdout) for _ in range(args.repeats))
        print(f"open and first get: median {median(seconds) * 1e3:.2f} ms, slowest {seconds[-1] * 1e3:.2f} ms")
        verdicts.check(seconds[-1] < SECONDS_BOUND, "open and first get under 20 ms, each time")
        calls = strace(__spec__.name, *options)
        if calls is None:
            verdicts.check(False, "system calls: not measured")
        else:
            judge_calls(calls, verdicts)
    return verdicts.status


def open_and_get(path: Path, flag: str) -> float:
    """Open the database, get one key, and return the seconds."""
    key = dataset.key(1)
    Path(MARKS[0]).exists()
    start = perf_counter()
    db = dbm_bitcask.open(path, flag)
    Path(MARKS[1]).exists()
    found = db[key]
    seconds = perf_counter() - start
    Path(MARKS[2]).exists()
    db.close()
    if found != dataset.value(key):
        raise RuntimeError("wrong value")
    return seconds


def judge_calls(calls: list[str], verdicts: Verdicts) -> None:
    """Print the system calls of `open` and of the first get, and check them."""
    at = [next(number for number, call in enumerate(calls) if mark in call) for mark in MARKS]
    opening, getting = calls[at[0] + 1 : at[1]], calls[at[1] + 1 : at[2]]
    print(f"system calls: {len(opening)} for open, {len(getting)} for the first get")
    for call in opening + getting:
        print("    " + re.sub(r"^\d+ +", "", call)[:150])
    verdicts.check(len(opening) + len(getting) <= CALLS_BOUND, f"at most {CALLS_BOUND} system calls")
    hints = [call for call in opening if ".hint" in call]
    read = sum(log_bytes(call) for call in opening)
    verdicts.check(not hints and read <= LOG_BYTES_BOUND, f"reopen reads no hint, and {read} bytes of the log")


def log_bytes(call: str) -> int:
    """Return how many bytes a system call read from a segment."""
    match = re.search(r"p?read(?:64|v)?\(\d+<[^>]*\.data>.* = (\d+)$", call)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    sys.exit(main())
