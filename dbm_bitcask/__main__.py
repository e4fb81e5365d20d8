"""The command line: `python -m dbm_bitcask COMMAND`, installed also as `dbm-bitcask`.

One module per command, or for two that belong together. Each has `add_command(commands)`, which adds its parser and sets
`run`: a function of the parsed arguments that returns the exit status. Status 0 is success, 1 a failure (one line on
stderr, no traceback) or problems found, 2 wrong usage.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from dbm_bitcask import check, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        # A pipe that nobody reads any more shows at the flush: here, not at exit, where nobody could catch it.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # What is still buffered must go somewhere when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # dbm_bitcask.error is one too
        print(f"dbm_bitcask: {error}", file=sys.stderr)
        return 1
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="dbm_bitcask", description="A persistent dict behind dbm and shelve.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check.add_command(commands)
    demo.add_command(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
