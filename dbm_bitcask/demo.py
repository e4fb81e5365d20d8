"""The demo: the Unicode Character Database of the running Python as a shelf.

One record per assigned code point (surrogates and private use left out) and one per named character:

    "U+2603"   ->  {"name": "SNOWMAN", "category": "So", "bidirectional": "ON", "numeric": None, "decomposition": ""}
    "SNOWMAN"  ->  "U+2603"

1. The shelf is written and closed. A new process reads it, by code point and by name, and compares each record with
   what Python itself says.
2. Supplementary characters are overwritten by a record that has their UTF-16, the names of Hangul syllables (which
   follow a rule) are deleted, the database is merged, and another new process reads everything.

A record of its own marks the database as the demo's. One without it is refused: a rerun writes only to what the demo
has made, and there only to the demo's keys.
"""

import argparse
import json
import pickle
import random
import shelve
import shlex
import subprocess
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import dbm_bitcask

DEFAULT_PATH = "unicode.bitcask"
# Named, so that the mark's bytes are the same under every Python.
PROTOCOL = 5
MARK = "dbm_bitcask demo"
MARK_VALUE = "This database was made by the demo of dbm_bitcask."
HANGUL = range(0xAC00, 0xD7A4)
SUPPLEMENTARY = range(0x10000, 0x110000)
CHUNK = 1000

Record = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What a reading process measured: seconds, number of lookups, bytes of memory that grew (None: unknown)."""

    open_seconds: float
    lookups: int
    get_seconds: float
    memory: int | None


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` to the command line."""
    command = commands.add_parser("demo", help="store the Unicode Character Database, read it back, print the figures")
    command.add_argument("path", nargs="?", default=DEFAULT_PATH, metavar="PATH", help="default: %(default)s")
    # The reading half, which the demo runs in a new process.
    command.add_argument("--read", choices=["written", "merged"], help=argparse.SUPPRESS)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo, or only its reading half, and return the exit status."""
    if args.read:
        print(json.dumps(asdict(read(args.path, merged=args.read == "merged"))))
    else:
        show(args.path)
    return 0


def show(path: str) -> None:
    """Run the whole demo at `path` and print what it measured."""
    refuse_foreign(path)
    codes = assigned()
    print(f"Unicode {unicodedata.unidata_version}: {len(codes):,} assigned code points, into {path}", flush=True)
    write(path, codes)
    report_reading(read_in_new_process(path, "written"))
    change(path, codes)
    merge(path)
    report_reading(read_in_new_process(path, "merged"))
    print_how_to_look(path)


def refuse_foreign(path: str) -> None:
    """Raise `dbm_bitcask.error` if there is anything at `path` that the demo did not make."""
    place = Path(path)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if dbm_bitcask.whichdb(path) == "dbm_bitcask":
        with dbm_bitcask.open(path, "r") as db:
            # Compared as bytes: a value of somebody else's database is not unpickled.
            if len(db) == 0 or db.get(MARK) == pickle.dumps(MARK_VALUE, PROTOCOL):
                return
    raise dbm_bitcask.error(f"{path} exists and is not the demo's; it is left alone: choose another PATH")


def open_shelf(path: str, flag: Literal["r", "w", "c"]) -> "shelve.Shelf[Any]":
    """Open the demo's shelf: the one line that a program needs in place of `{}`."""
    return shelve.Shelf(dbm_bitcask.open(path, flag), protocol=PROTOCOL)


# What Python knows about the characters


def assigned() -> "array[int]":
    """Return the assigned code points, without surrogates and private use, in order."""
    unassigned = {"Cn", "Cs", "Co"}
    return array("I", (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in unassigned))


def code_key(code: int) -> str:
    """Return the key of a code point, in Unicode's own notation."""
    return f"U+{code:04X}"


def describe(code: int, *, merged: bool) -> Record:
    """Return the record of a code point, as it is before or after the demo has changed the database."""
    character = chr(code)
    record: Record = {
        "name": unicodedata.name(character, ""),
        "category": unicodedata.category(character),
        "bidirectional": unicodedata.bidirectional(character),
        "numeric": unicodedata.numeric(character, None),
        "decomposition": unicodedata.decomposition(character),
    }
    if merged and code in SUPPLEMENTARY:
        record["utf16"] = character.encode("utf-16-be").hex(" ", 2).upper()
    return record


def items(codes: "array[int]", *, merged: bool) -> dict[str, object]:
    """Return the keys and values that the shelf must hold for these code points."""
    found: dict[str, object] = {}
    for code in codes:
        record = describe(code, merged=merged)
        found[code_key(code)] = record
        if record["name"] and not (merged and code in HANGUL):
            found[record["name"]] = code_key(code)
    return found


def chunks(codes: "array[int]") -> "Iterator[array[int]]":
    """Yield the code points in small groups, so that neither memory nor time goes into preparing them."""
    for start in range(0, len(codes), CHUNK):
        yield codes[start : start + CHUNK]


# The steps


def write(path: str, codes: "array[int]") -> None:
    """Write all records and print what it took."""
    count, seconds = 0, 0.0
    with progress("writing", len(codes)) as advance:
        memory = anonymous_memory()
        with open_shelf(path, "c") as shelf:
            shelf[MARK] = MARK_VALUE
            for chunk in chunks(codes):
                prepared = items(chunk, merged=False)
                start = perf_counter()
                for key, value in prepared.items():
                    shelf[key] = value
                seconds += perf_counter() - start
                count += len(prepared)
                advance(len(chunk))
        memory = growth(memory)
    line("write", f"{count:,} records", seconds, f"{micro(seconds, count)} per set{grown(memory)}")


def read(path: str, *, merged: bool) -> Reading:
    """Look every record up in random order and compare it; raise `dbm_bitcask.error` at the first that is wrong."""
    codes = assigned()
    random.Random(0).shuffle(codes)
    lookups, seconds = 0, 0.0
    with progress("reading in a new process", len(codes)) as advance:
        memory, start = anonymous_memory(), perf_counter()
        with open_shelf(path, "r") as shelf:
            if shelf.get(MARK) != MARK_VALUE:
                raise dbm_bitcask.error(f"{path}: not the demo's")
            open_seconds = perf_counter() - start
            for chunk in chunks(codes):
                expected = items(chunk, merged=merged)
                start = perf_counter()
                found = look_up(shelf, list(expected))
                seconds += perf_counter() - start
                compare(path, found, expected)
                lookups += len(expected)
                advance(len(chunk))
            if merged:
                require_deleted(path, shelf)
        memory = growth(memory)
    return Reading(open_seconds, lookups, seconds, memory)


def look_up(shelf: "shelve.Shelf[Any]", keys: list[str]) -> dict[str, object]:
    """Return what the shelf has under the keys."""
    try:
        return {key: shelf[key] for key in keys}
    except KeyError as missing:
        raise dbm_bitcask.error(f"record is missing: {missing}") from missing


def compare(path: str, found: dict[str, object], expected: dict[str, object]) -> None:
    """Raise `dbm_bitcask.error` if a record is not as expected."""
    if found != expected:
        key = next(key for key in expected if found[key] != expected[key])
        raise dbm_bitcask.error(f"{path}: {key} is {found[key]!r}, not {expected[key]!r}")


def require_deleted(path: str, shelf: "shelve.Shelf[Any]") -> None:
    """Raise `dbm_bitcask.error` if a deleted record is still there."""
    for code in HANGUL:
        if unicodedata.name(chr(code)) in shelf:
            raise dbm_bitcask.error(f"{path}: the deleted name of {code_key(code)} is there")


def change(path: str, codes: "array[int]") -> None:
    """Overwrite and delete records and print what it took."""
    overwritten = array("I", (code for code in codes if code in SUPPLEMENTARY))
    start = perf_counter()
    with open_shelf(path, "w") as shelf, progress("overwriting and deleting", len(overwritten)) as advance:
        for chunk in chunks(overwritten):
            for code in chunk:
                shelf[code_key(code)] = describe(code, merged=True)
            advance(len(chunk))
        for code in HANGUL:
            del shelf[unicodedata.name(chr(code))]
    line("change", f"{len(overwritten):,} overwritten, {len(HANGUL):,} deleted", perf_counter() - start)


def merge(path: str) -> None:
    """Merge the database and print what it took, and what it gave back."""
    before, start = disk_bytes(path), perf_counter()
    with dbm_bitcask.open(path, "w") as db:
        db.reorganize()
    seconds = perf_counter() - start
    line("merge", f"{mega(before)} on disk before, {mega(disk_bytes(path))} after", seconds)


def read_in_new_process(path: str, stage: str) -> Reading:
    """Run the reading half in a new process and return what it measured."""
    command = [sys.executable, "-m", "dbm_bitcask", "demo", "--read", stage, "--", path]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise dbm_bitcask.error(f"the reading process failed with exit status {child.returncode}")
    return Reading(**json.loads(child.stdout))


# What a person sees


def line(step: str, what: str, seconds: float, note: str = "") -> None:
    """Print one step's line at once, so that a pipe shows it too."""
    print(f"  {step:<8}{what:<44}{seconds:7.2f} s   {note}".rstrip(), flush=True)


def report_reading(reading: Reading) -> None:
    """Print what a reading process measured."""
    line("open", "in a new process, and the first get", reading.open_seconds, f"{reading.open_seconds * 1e3:.1f} ms")
    note = f"{micro(reading.get_seconds, reading.lookups)} per get{grown(reading.memory)}"
    line("read", f"{reading.lookups:,} records, each one right", reading.get_seconds, note)


def print_how_to_look(path: str) -> None:
    """Print a command that shows the user a record of the database."""
    code = 'import shelve, sys, dbm_bitcask; s = shelve.Shelf(dbm_bitcask.open(sys.argv[1], "r")); print(s["SNOWMAN"], s[s["SNOWMAN"]])'
    print(f"\nThe database stays in {path} ({mega(disk_bytes(path))}). To look a character up:\n")
    print("  " + shlex.join([sys.executable, "-c", code, path]))


def micro(seconds: float, count: int) -> str:
    """Return the time of one of `count` operations."""
    return f"{seconds / count * 1e6:.1f} us"


def mega(size: int) -> str:
    """Return a number of bytes in MB."""
    return f"{size / 1e6:.1f} MB"


def grown(memory: int | None) -> str:
    """Return the remark on memory, nothing where the system does not tell."""
    return "" if memory is None else f", memory grew by {mega(memory)}"


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far a step is; yield the function that is told of each advance."""
    if not sys.stderr.isatty():
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        with plain_progress(label, total) as advance:
            yield advance
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda step: bar.advance(task, step)


@contextmanager
def plain_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show one line with a percentage, and wipe it at the end."""
    done = 0

    def advance(step: int) -> None:
        nonlocal done
        done += step
        print(f"\r  {label} {done / total:4.0%}", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        print("\r" + " " * (len(label) + 8) + "\r", end="", file=sys.stderr, flush=True)


def anonymous_memory() -> int | None:
    """Return the bytes of this process that no file backs, or None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = [int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("RssAnon:")]
    return sizes[0] if sizes else None


def growth(before: int | None) -> int | None:
    """Return by how many bytes the memory has grown since `before`."""
    now = anonymous_memory()
    return None if before is None or now is None else max(0, now - before)


def disk_bytes(path: str) -> int:
    """Return the size of all files of a database."""
    return sum(file.stat().st_size for file in Path(path).iterdir())
