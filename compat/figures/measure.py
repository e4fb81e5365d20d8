"""What the figure scripts share: the command line, a place for the database, child processes, strace, and the verdict."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dbm_bitcask
from compat import dataset


class Verdicts:
    """The bounds of one figure; `status` is the exit status of the script."""

    def __init__(self) -> None:
        self.status = 0

    def check(self, passed: bool, what: str) -> None:
        """Print whether a bound holds."""
        print(f"{'PASS' if passed else 'MISS'}  {what}", flush=True)
        if not passed:
            self.status = 1


Default = float | str


def arguments(
    description: str | None, *, child: Callable[[str], object] | None = None, **options: Default | tuple[Default, str]
) -> argparse.Namespace:
    """Return the parsed command line: each option by its default, maybe with what it means, `--directory`, and `--child` of that type."""
    parser = argparse.ArgumentParser(description=description)
    for name, option in options.items():
        default, meaning = option if isinstance(option, tuple) else (option, "")
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"{meaning} (default: %(default)s)".strip()
        )
    parser.add_argument("--directory", type=Path, help="keep the databases in this directory, and not in a temporary one")
    parser.add_argument("--child", type=child, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def workplace(directory: Path | None) -> Iterator[Path]:
    """Yield `directory`, which is kept, or one that is deleted at the end."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="figures-") as place:
        yield Path(place)


def filled(path: Path, count: int) -> Path:
    """Return a closed database of `count` keys; the one that is there already if it has as many."""
    with dbm_bitcask.open(path, "c") as db:
        if len(db) < count:
            print(f"filling {path.name} with {count:,} keys ...", flush=True)
            dataset.fill(db, count)
    return path


def child(module: str, *args: object, tracer: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module args` in a new process, below a tracer if given, and return it with its output."""
    command = [*tracer, sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def strace(module: str, *args: object, calls: str = "all") -> list[str] | None:
    """Run a child below strace and return its system calls, one a line; without strace say so and return None."""
    if shutil.which("strace") is None:
        print("strace is missing: system calls are not counted")
        return None
    with tempfile.TemporaryDirectory() as place:
        log = Path(place, "strace")
        # -f: threads and children too. -y: descriptors with the paths of their files.
        traced = child(module, *args, tracer=["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(log)])
        if traced.returncode:
            print(f"strace failed: system calls are not counted: {traced.stderr.strip()[-300:]}")
            return None
        rows = log.read_text(errors="replace").splitlines()
    # A call that another thread interrupts takes two lines; "+++" and "---" are exits and signals.
    return [row for row in rows if re.match(r"\d+ +\w+\(", row)]
