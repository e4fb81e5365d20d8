"""The standard library's own tests of `dbm` and `shelve`, unchanged, on databases of ours: `compat/cpython`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import unittest
from pathlib import Path

import pytest

import dbm_bitcask

RUN = Path(__file__).parent.parent / "compat" / "cpython"
# How many tests pass at least, by suite.
LEAST = {
    "test_dbm": 14,
    "test_shelve": 182,
    "test_shelve, our Shelf": 182,
    "test_dbm, beside others": 27,
    "test_dbm, default": 14,
    "test_shelve, default": 182,
    "test_dbm_gnu": 14 if sys.version_info >= (3, 13) else 11,
    "test_dbm_dumb": 18,
}


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
    for suite, least in LEAST.items():
        passed = int(lines[suite].split(": ")[1].split()[0])
        assert passed >= least, suite
        if suite not in ("test_dbm_gnu", "test_dbm_dumb"):
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


def test_listed_test_that_does_not_exist_is_an_error(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_gone: no reason\n")
    assert done.returncode == 1
    assert "ERROR: test_dbm_gnu.TestGdbm.test_gone does not exist and is listed" in done.stdout


def test_listed_test_may_be_missing_where_the_line_is_about_later_versions(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_later [from 3.99]: no reason\n")
    assert done.returncode == 0, done.stdout
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_later [from 3.11]: no reason\n")
    assert done.returncode == 1


def test_line_about_no_suite_is_refused(gnu):
    done = gnu(lambda text: text + "test_dbm_gmu.TestGdbm.test_bytes: no reason\n")
    assert done.returncode == 1
    assert "test_dbm_gmu.TestGdbm.test_bytes is of no suite" in done.stderr


@pytest.fixture
def cpython():
    """The module that runs the tests of CPython."""
    spec = importlib.util.spec_from_file_location("cpython_suites", RUN / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome_of(cpython, monkeypatch, tmp_path):
    """What is noted of tests that pass, skip themselves, and fail where they are expected to and where not."""

    class Made(unittest.TestCase):
        def test_good(self):
            pass

        def test_skipped(self):
            self.skipTest("no reason")

        @unittest.expectedFailure
        def test_expected(self):
            self.fail()

        @unittest.expectedFailure
        def test_unexpected(self):
            pass

    monkeypatch.chdir(tmp_path)
    Made.__module__ = "test.test_dbm"
    outcome = cpython.Outcome()
    unittest.defaultTestLoader.loadTestsFromTestCase(Made).run(outcome)
    return outcome.found


def test_every_test_is_counted_and_an_unexpected_success_is_a_failure(cpython, monkeypatch, tmp_path):
    found = outcome_of(cpython, monkeypatch, tmp_path)
    assert {kind: [name.rpartition(".")[2] for name in names] for kind, names in found.items()} == {
        "passed": ["test_good"],
        "skipped": ["test_skipped"],
        "expected": ["test_expected"],
        "failed": ["test_unexpected"],
    }


def test_every_kind_of_outcome_is_reported(cpython, monkeypatch, tmp_path, capsys):
    found = outcome_of(cpython, monkeypatch, tmp_path)
    monkeypatch.setattr(cpython, "is_there", lambda _module: True)
    monkeypatch.setattr(cpython, "in_a_process", lambda _suite: found)
    listed = {f"test_dbm.Made.{name}": cpython.Difference(None, "no reason") for name in ("test_skipped", "test_expected", "test_gone")}
    assert cpython.report("test_dbm", listed) == 1
    said = capsys.readouterr().out
    assert "4 tests: 1 passed, 1 skipped, 1 failed as expected, 1 differ\n" in said
    assert "fails as its authors expect: test_dbm.Made.test_expected\n" in said
    assert "ERROR: test_dbm.Made.test_unexpected fails and is not listed" in said
    assert "ERROR: test_dbm.Made.test_skipped skips itself and is listed" in said
    assert "ERROR: test_dbm.Made.test_expected fails as its authors expect and is listed" in said
    assert "ERROR: test_dbm.Made.test_gone does not exist and is listed" in said


def test_line_without_a_reason_is_refused(gnu):
    done = gnu(lambda text: text + "test_dbm_gnu.TestGdbm.test_bytes\n")
    assert done.returncode == 1
    assert "is not 'module.Class.test [condition]: reason'" in done.stderr
