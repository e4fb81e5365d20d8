"""A harness that never fails proves nothing: each engine with a seeded bug is found out by the tests that are there for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dbm_bitcask
from mutants import MUTANTS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path, request, tally):
    if request.config.getoption("mutant"):
        pytest.skip("this is the run of a mutant")
    if request.config.getoption("harness") == "sample" and sum(map(ord, name)) % 8:
        pytest.skip("a sample: `--harness full` runs them all")
    nodes = [str(TESTS / node) for node in MUTANTS[name].caught_by]
    command = [sys.executable, "-m", "pytest", "-c", str(request.config.inipath), "--rootdir", str(request.config.rootpath)]
    done = subprocess.run(
        [*command, "-q", "-x", "-p", "no:cacheprovider", "--harness", "full", "--mutant", name, *nodes],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(dbm_bitcask.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert " failed" in done.stdout or " error" in done.stdout
    tally("mutants caught", 1)
