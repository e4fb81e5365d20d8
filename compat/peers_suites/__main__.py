"""`python -m compat.peers_suites`: fetch the suites of others, run them on a stand-in over dbm_bitcask, compare with what is listed.

dbm_bitcask, pytest and pip are installed where this runs. A failure that is not in `differences.txt` is an error, and so is a line in it
whose test passes or does not exist.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DIFFERENCES = HERE / "differences.txt"


@dataclass(frozen=True)
class Suite:
    """The tests of a source distribution, and the modules in it that a file of `stand_ins` takes the place of."""

    name: str
    version: str
    tests: tuple[str, ...]
    replaced: tuple[str, ...]
    directories: tuple[str, ...] = ()  # that the tests expect to be there


SUITES = {
    suite.name: suite
    for suite in (
        Suite("sqlitedict", "2.1.0", ("tests",), ("sqlitedict.py",), ("tests/db",)),
        Suite("diskcache", "5.6.3", ("tests/test_index.py",), ("diskcache/__init__.py",)),
        # The third is for the tests, which want py-lmdb to be installed.
        Suite("zict", "3.0.0", ("zict/tests/test_file.py", "zict/tests/test_lmdb.py"), ("zict/file.py", "zict/lmdb.py", "lmdb.py")),
    )
}


def main() -> int:
    """Run the suites and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m compat.peers_suites", description=__doc__.partition("\n")[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, help="only these")
    parser.add_argument("--differences", type=Path, default=DIFFERENCES, help="another list of the tests that do not pass")
    args = parser.parse_args()
    listed = differences(args.differences)
    with tempfile.TemporaryDirectory() as place:
        return max([report(SUITES[name], outcomes(SUITES[name], Path(place)), listed) for name in args.suites])


def differences(file: Path) -> dict[str, str]:
    """The tests that are known not to pass, with the reasons."""
    lines = [line.partition(": ") for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    if not all(reason for *_, reason in lines):
        raise ValueError(f"{file}: a line is 'suite test: reason'")
    return {name: reason for name, _, reason in lines}


def outcomes(suite: Suite, place: Path) -> dict[str, str]:
    """Fetch a suite, put the stand-in into it, and run it: each test with "passed", "skipped" or what went wrong."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", "--dest", place]
    subprocess.run([*fetch, f"{suite.name}=={suite.version}"], check=True)
    with tarfile.open(place / f"{suite.name}-{suite.version}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    root = place / f"{suite.name}-{suite.version}"
    for module in suite.replaced:
        if module.endswith("__init__.py"):
            shutil.rmtree((root / module).parent)
        (root / module).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / "stand_ins" / f"{suite.name}.py", root / module)
    for directory in suite.directories:
        (root / directory).mkdir()
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
        "--junit-xml",
        "outcomes.xml",
    ]
    subprocess.run(
        [*run, *suite.tests],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        check=False,  # what failed stands in the outcomes
        timeout=600,
    )
    cases = ElementTree.parse(root / "outcomes.xml").iter("testcase")
    return {f"{suite.name} {case.get('classname')}.{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    """What came of one test."""
    for child in case:
        if child.tag in ("failure", "error"):
            return child.text or child.tag
        if child.tag == "skipped":
            return "skipped"
    return "passed"


def report(suite: Suite, found: dict[str, str], listed: dict[str, str]) -> int:
    """Print what came out, and return 1 if it is not what is listed."""
    failed = {name: why for name, why in found.items() if why not in ("passed", "skipped")}
    unlisted = {name: why for name, why in failed.items() if name not in listed}
    needless = [name for name in listed if name.startswith(f"{suite.name} ") and name not in failed]
    passed = sum(why == "passed" for why in found.values())
    print(f"{suite.name} {suite.version}: {len(found)} tests: {passed} passed, {len(failed)} differ")
    for name in failed.keys() & listed.keys():
        print(f"    differs: {name}: {listed[name]}")
    for name, why in unlisted.items():
        print(f"ERROR: {name} fails and is not listed:\n{why}")
    for name in needless:
        print(f"ERROR: {name} is listed and does not fail")
    return 1 if unlisted or needless or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
