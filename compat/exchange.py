"""Several versions of Python read and go on with what each of them wrote, by `shelve` after `register(default=True)`.

    python -m compat.exchange PYTHON PYTHON ...
    python -m compat.exchange --tox .tox

Each PYTHON has dbm_bitcask installed; with `--tox`, they are those of the environments that tox made. Each writes a database, and all take
turns with it: read everything, compare, change something, merge. Exit status 1 if one of them finds anything else than was written, or if
there is none: one alone, as tox makes it on a machine with one version of Python, has nothing to exchange, which is no error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What runs in each interpreter: it gets a path, the number of turns that others took before, and prints its version.
TURN = """
import platform, shelve, sys
import dbm_bitcask

path, turn = sys.argv[1], int(sys.argv[2])
value = lambda number: {"number": number, "text": "größe", "nested": [(number,), {1, 2}, b"x", None, 1.5]}
dbm_bitcask.register(default=True)
if not turn:
    with shelve.open(path, "n") as shelf:
        for number in range(1000):
            shelf[str(number)] = value(number)
with shelve.open(path, "r") as shelf:
    expected = {str(number): value(number) for number in range(turn, 1000)} | {f"turn {each}": each for each in range(turn)}
    if dict(shelf) != expected:
        sys.exit(f"turn {turn}: found something else than was written")
with shelve.open(path, "w") as shelf:
    del shelf[str(turn)]
    shelf[f"turn {turn}"] = turn
    shelf[str(turn + 1)] = value(turn + 1)
    shelf.dict.reorganize()
print(platform.python_version())
"""


def main() -> int:
    """Let each interpreter write, and all take turns; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m compat.exchange", description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", type=Path, metavar="PYTHON")
    parser.add_argument("--tox", type=Path, help="the working directory of tox")
    args = parser.parse_args()
    if bool(args.pythons) == bool(args.tox):
        parser.error("give either interpreters or --tox")
    # Not resolved: an environment's python is a link to one that lacks what is installed in the environment.
    pythons = [each.absolute() for each in args.pythons or environments(args.tox)]
    if not pythons:
        print(f"{args.tox}: no environment of tox with a Python; make them first: tox -e py311,py312,py313,py314")
        return 1
    if len(pythons) == 1:
        print(f"there is only {pythons[0]}: nothing to exchange")
        return 0
    with tempfile.TemporaryDirectory() as place:
        for first in range(len(pythons)):
            order = [*pythons[first:], *pythons[:first]] * 2
            print("written and read in turn by", *[take_turn(python, Path(place, str(first)), turn) for turn, python in enumerate(order)])
    return 0


def environments(place: Path) -> list[Path]:
    """The interpreters of those environments of tox that have a version of Python as their name."""
    return sorted(each for each in place.glob("py3*/bin/python") if re.fullmatch(r"py3\d+", each.parts[-3]))


def take_turn(python: Path, path: Path, turn: int) -> str:
    """Let one interpreter take its turn with the database; return its version."""
    done = subprocess.run([python, "-c", TURN, path, str(turn)], cwd=path.parent, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError:
        sys.exit(1)
