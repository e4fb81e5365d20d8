"""`python -m compat.peers`: run the workloads on every peer that is installed; exit 1 if a bound is missed."""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

from compat.peers.adapters import ADAPTERS
from compat.peers.report import Rounds, table, verdicts
from compat.peers.workloads import Keys, make_keys, run


def main() -> int:
    """Measure, print, and return the exit status."""
    args = arguments()
    present = [peer for peer in args.peers if is_present(peer)]
    print(f"CPython {platform.python_version()}, {platform.machine()}, {args.repeats} rounds, microseconds per operation")
    missed = False
    for count in args.keys:
        rounds = measure(present, make_keys(count, args.gets), args.repeats, args.directory)
        print(f"\n{count:,} keys of 16 bytes, values of 100 bytes, random order")
        print("\n".join(table(rounds)))
        for passed, line in verdicts(rounds, count):
            print(line)
            missed = missed or not passed
    return int(missed)


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m compat.peers", description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[200_000], help="numbers of keys, one table each")
    parser.add_argument("--gets", type=int, default=500_000, help="most keys to get (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS), help="only these")
    parser.add_argument("--directory", type=Path, help="where the stores are made (default: the system's temporary one)")
    return parser.parse_args()


def is_present(peer: str) -> bool:
    """Return whether a peer can be used here, and print why not."""
    with tempfile.TemporaryDirectory() as place:
        try:
            ADAPTERS[peer](Path(place)).close()
        except ImportError as reason:
            print(f"{peer} is missing: {reason}")
            return False
    return True


def measure(peers: list[str], keys: Keys, repeats: int, directory: Path | None) -> Rounds:
    """Run every peer once per round, each round starting with another one."""
    rounds: Rounds = []
    for number in range(repeats):
        turn = number % len(peers)
        measured = {peer: run(ADAPTERS[peer], keys, directory) for peer in peers[turn:] + peers[:turn]}
        rounds.append({peer: measured[peer] for peer in peers})
    return rounds


if __name__ == "__main__":
    sys.exit(main())
