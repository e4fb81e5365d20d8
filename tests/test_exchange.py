"""`compat/exchange` finds its interpreters, and says so where there is nothing to exchange."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dbm_bitcask

EXCHANGE = Path(__file__).parent.parent / "compat" / "exchange.py"


def run(place, *arguments):
    return subprocess.run(
        [sys.executable, EXCHANGE, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(dbm_bitcask.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def environments(tmp_path):
    """Makes what stands for environments of tox: their python is a link, which wants to be started by its own name, as in a real one."""
    start = tmp_path / "start"
    start.write_text(f"""#!/bin/sh\ncase "$0" in */.tox/*) exec '{sys.executable}' "$@" ;; esac\nexit 1\n""", encoding="utf-8")
    start.chmod(0o755)

    def environments(*names):
        for name in names:
            python = tmp_path / ".tox" / name / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(start)
        return tmp_path

    return environments


@pytest.mark.parametrize("arguments", [("--tox", ".tox"), (".tox/py311/bin/python", ".tox/py312/bin/python")])
def test_paths_may_be_relative(environments, arguments):
    done = run(environments("py311", "py312", "exchange"), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("written and read in turn by") == 2


def test_no_environment_is_an_error(tmp_path):
    done = run(tmp_path, "--tox", ".tox")
    assert done.returncode == 1
    assert "make them first: tox -e py311" in done.stdout


def test_one_environment_alone_is_none(environments):
    done = run(environments("py311", "exchange"), "--tox", ".tox")
    assert done.returncode == 0
    assert "nothing to exchange" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("--tox", ".tox", sys.executable)])
def test_either_interpreters_or_environments(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "either interpreters or --tox" in done.stderr
