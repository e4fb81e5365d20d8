"""The commands `check` and `repair`: what is wrong with a database, and what can be done about it."""

import argparse
from typing import TypeVar

from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.repair import repair

Found = TypeVar("Found")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of both."""
    parser = commands.add_parser("check", help="verify every record, the index and all counters; exit status 1 if something is wrong")
    add_arguments(parser)
    parser.set_defaults(run=run_check)
    parser = commands.add_parser("repair", help="make a damaged database one that opens, with everything in it that verifies")
    add_arguments(parser)
    parser.set_defaults(run=run_repair)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both take."""
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--files", choices=("auto", "native", "portable"), default="auto", help="how files are reached (default: %(default)s)"
    )


def printed(found: list[Found]) -> list[Found]:
    """Print what was found, a line each, and hand it on."""
    for each in found:
        print(each)
    return found


def run_check(args: argparse.Namespace) -> int:
    """Print what is wrong, a line each."""
    problems = printed(check(args.path, args.files))
    if problems:
        print(f"{args.path}: {len(problems)} problem{'s' * (len(problems) > 1)}; `repair` keeps whatever verifies")
        return 1
    print(f"{args.path}: no problem found")
    return 0


def run_repair(args: argparse.Namespace) -> int:
    """Print what was done, a line each."""
    steps = printed(repair(args.path, args.files))
    problems = printed(check(args.path, args.files))
    if problems:
        print(f"{args.path}: {len(problems)} problems are left")
        return 1
    print(f"{args.path}: {'repaired; what was damaged is kept beside it' if steps else 'there was nothing to repair'}")
    return 0
