"""Other processes, for tests about what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import dbm_bitcask

if TYPE_CHECKING:
    from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a child that leaves by `os._exit`: no handle is closed, nothing is flushed. Returns the pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a test runner that has threads
        pid = os.fork()
    if not pid:
        _work_and_die(work)
    return pid


def fork_and_wait(work: Callable[[], object]) -> None:
    _, status = os.waitpid(fork(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed, its traceback is on stderr"


def _work_and_die(work: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001  (a child must never return into the test runner)
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def put_and_close(db: dbm_bitcask.Database, key: bytes) -> None:
    """The work of a process that was handed a pickled handle. It stands here because such a process has to import it."""
    db[key] = key
    db.close()


def run_python(script: str, *arguments: object) -> str:
    """Run a script in a new interpreter that imports the same package; its output."""
    package = Path(dbm_bitcask.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_handle: dbm_bitcask.Database | None = None


def use_handle(db: dbm_bitcask.Database | None) -> None:
    """Have the workers of a pool that are forked from now on use this handle."""
    global _handle
    _handle = db


def set_and_get(number: int) -> bytes:
    """The work of such a worker."""
    assert _handle is not None
    _handle[b"pool %d" % number] = b"%d" % number * 50
    return _handle[b"pool %d" % number]
