"""The standard library's own tests of `dbm` and `shelve`, unchanged, on databases of ours: `compat/cpython`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dbm_bitcask

RUN = Path(__file__).parent.parent / "compat" / "cpython"


def run(*arguments, **variables):
    ours = str(Path(dbm_bitcask.__file__).parent.parent)  # what is installed, and not the checkout
    path = os.pathsep.join([*([variables.pop("PYTHONPATH")] if "PYTHONPATH" in variables else []), ours])
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def gnu(tmp_path):
    """Runs the suite of dbm.gnu with another list of differences than that of the checkout."""
    if "ships without" in run("--suites", "test_dbm_gnu").stdout:
        pytest.skip("this Python ships without its own tests")

    def gnu(change):
        listed = tmp_path / "differences.txt"
        listed.write_text(change((RUN / "differences.txt").read_text(encoding="utf-8")), encoding="utf-8")
        return run("--suites", "test_dbm_gnu", "--differences", listed)

    return gnu


def test_tests_of_the_standard_library_pass(capsys):
    done = run()
    with capsys.disabled():  # the counts stand in every run
        print("", *[line for line in done.stdout.splitlines() if line[:1] != " "], sep="\n")
    assert done.returncode == 0, done.stdout + done.stderr
    if "ships without" in done.stdout:
        pytest.skip(done.stdout)
    lines = {line[:27].strip(): line[27:] for line in done.stdout.splitlines()}
    for suite, least in ("test_dbm", 14), ("test_shelve", 182), ("test_shelve, our Shelf", 182), ("test_dbm, beside others", 27):
        passed = int(lines[suite].split(": ")[1].split()[0])
        assert passed >= least
        assert lines[suite].endswith(" 0 differ")


def test_python_without_its_tests_is_said_to_be_one(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "__init__.py").touch()
    done = run(PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "ships without its own tests" in done.stdout


def test_failure_that_is_not_listed_is_an_error(gnu):
    done = gnu(lambda text: "\n".join(line for line in text.splitlines() if "TestGdbm.test_reorganize:" not in line))
    assert done.returncode == 1
    assert "ERROR: test_dbm_gnu.TestGdbm.test_reorganize fails and is not listed" in done.stdout


def test_listed_test_that_passes_is_an_error(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_bytes: no reason\n")
    assert done.returncode == 1
    assert "ERROR: test_dbm_gnu.TestGdbm.test_bytes passes and is listed" in done.stdout


def test_listed_test_that_passes_may_lack_the_words_that_the_line_is_about(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_bytes [if it has no such words]: no reason\n")
    assert done.returncode == 0, done.stdout
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_bytes [if it has bytes key]: no reason\n")
    assert done.returncode == 1


def test_line_without_a_reason_is_refused(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_bytes\n")
    assert done.returncode == 1
    assert "is not 'module.Class.test [condition]: reason'" in done.stderr
