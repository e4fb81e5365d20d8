"""`python -m compat.cpython`: run the tests of this interpreter's `dbm` and `shelve`, unchanged, on databases of ours.

Nothing of them is copied: they are imported from the `test` package that the interpreter brings. Debian's python3, for one, brings none of
them: then the run says so, and has exit status 0 all the same. Each suite runs in a process of its own, which prepares `dbm` before the
tests are imported:

    test_dbm, test_shelve     `dbm_bitcask.register()`, and ours as the only module that `dbm` knows
    the same, beside others   the same with all modules of the standard library: their tests stay green, too
    the same, default         `dbm_bitcask.register(default=True)`, and `dbm` knows the modules that it has: what `dbm.open` creates is ours
    test_shelve, our Shelf    with `dbm_bitcask.Shelf` and `open_shelf` in the place of `shelve.Shelf` and `shelve.open`
    test_dbm_gnu, ...         ours in the place of that one module

The tests walk the modules in `dbm._names`, each named `dbm.` and something: without "default", the run puts an alias of ours there,
`dbm.bitcask`, and `dbm` creates by that. With "default" nothing is put there; that no test creates a database of ours is an error then.
Every test has an empty working directory of its own; the clean-up of theirs, which knows files only, is taught to remove directories.

`differences.txt` lists the tests that do not pass, one a line with the reason. A failure that is not in it is an error, and so is a line in
it whose test passes, skips itself or does not exist: unless the line says that it is about users other than root, about Pythons from some
version on, or about a test that has certain words, and this one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import dbm_bitcask

DIFFERENCES = Path(__file__).with_name("differences.txt")
LINE = re.compile(r"(?P<name>\w+\.\w+\.\w+)( \[(?P<condition>unprivileged|from 3\.\d+|if it has .+)\])?: (?P<reason>.+)")
ALIAS = "dbm.bitcask"
SUITES = {
    "test_dbm": "test_dbm",
    "test_shelve": "test_shelve",
    "test_dbm, beside others": "test_dbm",
    "test_shelve, beside others": "test_shelve",
    "test_dbm, default": "test_dbm",
    "test_shelve, default": "test_shelve",
    "test_shelve, our Shelf": "test_shelve",
    "test_dbm_gnu": "test_dbm_gnu",
    "test_dbm_dumb": "test_dbm_dumb",
    "test_dbm_sqlite3": "test_dbm_sqlite3",
}
KINDS = {"passed": "passed", "skipped": "skipped", "expected": "failed as expected", "failed": "differ"}
VERBS = {"passed": "passes", "skipped": "skips itself", "expected": "fails as its authors expect"}
CREATED: list[Any] = []  # the databases of ours that `dbm.open` made because of `register(default=True)`


def main() -> int:
    """Run the suites and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m compat.cpython", description=__doc__.partition("\n")[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, help="only these")
    parser.add_argument("--differences", type=Path, default=DIFFERENCES, help="another list of the tests that do not pass")
    parser.add_argument("--in-this-process", choices=SUITES, help=argparse.SUPPRESS)  # the process of one suite
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps(run_suite(args.in_this_process)))
        return 0
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if not is_there("test_dbm"):
        print(f"{version} ships without its own tests: there is no test.test_dbm, and nothing was run")
        return 0
    print(version)
    listed = differences(args.differences)
    return max([report(suite, listed) for suite in args.suites])


def is_there(module: str) -> bool:
    """Whether the interpreter has this module of tests."""
    try:
        return importlib.util.find_spec(f"test.{module}") is not None
    except ModuleNotFoundError:
        return False


def report(suite: str, listed: dict[str, Difference]) -> int:
    """Run one suite in a process of its own, print what came out, and return 1 if it is not what is listed."""
    module = SUITES[suite]
    if not is_there(module):
        print(f"{suite:27}not in this version")
        return 0
    found = in_a_process(suite)
    unlisted = {name: why for name, why in found["failed"].items() if name not in listed}
    about = [name for name in listed if name.startswith(f"{module}.") and name not in found["failed"]]
    needless = [name for name in about if listed[name].applies_to(found["passed"].get(name, ""))]
    counts = {kind: len(found[kind]) for kind in KINDS}
    said = ", ".join(f"{counts[kind]} {word}" for kind, word in KINDS.items() if counts[kind] or kind != "expected")
    print(f"{suite:27}{sum(counts.values())} tests: {said}")
    for name, why in found["skipped"].items():
        print(f"    skipped by itself: {name}: {why}")
    for name in found["expected"]:
        print(f"    fails as its authors expect: {name}")
    for name in found["failed"].keys() - unlisted.keys():
        print(f"    differs: {name}: {listed[name].reason}")
    for name, why in unlisted.items():
        print(f"ERROR: {name} fails and is not listed:\n{why}")
    for name in needless:
        how = next((verb for kind, verb in VERBS.items() if name in found[kind]), "does not exist")
        print(f"ERROR: {name} {how} and is listed as one that does not pass")
    return 1 if unlisted or needless or not counts["passed"] else 0


def in_a_process(suite: str) -> dict[str, dict[str, str]]:
    """What `run_suite` returns, from a new interpreter in an empty directory."""
    ours = str(Path(dbm_bitcask.__file__).parent.parent)
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, __file__, "--in-this-process", suite],
            cwd=place,
            env={**os.environ, "PYTHONPATH": ours},
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


class Difference(NamedTuple):
    """A line of `differences.txt`."""

    condition: str | None
    reason: str

    def applies_to(self, source: str) -> bool:
        """Whether it is about this user, this version of Python, and the test that this version has."""
        if self.condition is None:
            return True
        if self.condition == "unprivileged":
            return os.geteuid() != 0
        if self.condition.startswith("from 3."):
            return sys.version_info >= (3, int(self.condition.removeprefix("from 3.")))
        return self.condition.removeprefix("if it has ") in source


def differences(file: Path) -> dict[str, Difference]:
    """The tests that are known not to pass, with the reasons."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    found = [LINE.fullmatch(line) for line in lines]
    if None in found:
        raise ValueError(f"{file}: {lines[found.index(None)]!r} is not 'module.Class.test [condition]: reason'")
    listed = {each["name"]: Difference(each["condition"], each["reason"]) for each in found if each}
    if foreign := [name for name in listed if name.partition(".")[0] not in SUITES.values()]:
        raise ValueError(f"{file}: {foreign[0]} is of no suite")
    return listed


# The process of one suite.


def run_suite(suite: str) -> dict[str, dict[str, str]]:
    """Prepare `dbm`, run the tests, and return what happened: by each of `KINDS` the names, with source or reason."""
    from test.support import os_helper

    os_helper.unlink = functools.partial(unlink, os_helper.unlink)  # before the tests take it from there
    module = SUITES[suite]
    if module in ("test_dbm", "test_shelve"):
        take_part(beside="beside" in suite, default="default" in suite)
    else:
        take_the_place_of(module.removeprefix("test_dbm_"))
    if "our Shelf" in suite:
        import shelve

        shelve.Shelf = dbm_bitcask.Shelf
        shelve.open = lambda filename, *args, **options: dbm_bitcask.open_shelf(filename, *args, **options)  # type: ignore[assignment]
    tests = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(f"test.{module}"))
    outcome = Outcome()
    tests.run(outcome)
    if "default" in suite and not CREATED:
        outcome.found["failed"]["register(default=True)"] = "of what the tests created, nothing is ours"
    return outcome.found


def unlink(former: Any, path: Any) -> None:
    """Remove a file, or a database of ours."""
    shutil.rmtree(path) if dbm_bitcask.whichdb(path) and not Path(os.fsdecode(path)).is_symlink() else former(path)


def take_part(*, beside: bool, default: bool) -> None:
    """Register with `dbm`, also with each that is imported afresh, as one of its modules or as the only one; or by `default` alone."""

    def prepare(dbm: Any) -> None:
        dbm_bitcask.register(default)
        if default:
            dbm.open = counted(dbm.open)
            return
        sys.modules[ALIAS] = module_like_dbm(ALIAS)
        dbm._names[:] = [ALIAS, *(dbm._names if beside else [])]
        dbm.whichdb = functools.partial(translated, dbm.whichdb)

    class Afresh:
        """Finds `dbm` where it is, and prepares it as soon as it has run."""

        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:  # noqa: ARG002  (the protocol's)
            if name != "dbm":
                return None
            spec: Any = importlib.machinery.PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                prepare(module)

            spec.loader.exec_module = exec_module
            return spec

    import dbm

    prepare(dbm)
    sys.meta_path.insert(0, Afresh())


def counted(open: Any) -> Any:  # noqa: A002  (dbm.open)
    """The same `dbm.open`, which notes what it creates that is ours."""

    @functools.wraps(open)
    def noting(file: Any, *args: Any, **others: Any) -> Any:
        before = dbm_bitcask.whichdb(file)
        db = open(file, *args, **others)
        if before is None and isinstance(db, dbm_bitcask.Database):
            CREATED.append(file)
        return db

    return noting


def translated(whichdb: Any, path: Any) -> Any:
    """What `dbm.whichdb` says, with the name that the tests know us by."""
    name = whichdb(path)
    return ALIAS if name == "dbm_bitcask" else name


def take_the_place_of(name: str) -> None:
    """Put a module of ours in the place of `dbm.gnu`, `dbm.dumb` or `dbm.sqlite3`, with what its tests want beside `open` and `error`."""
    import dbm

    module: Any = module_like_dbm(f"dbm.{name}")
    if name == "gnu":
        module.open_flags = "rwcnfsu"
    elif name == "dumb":
        module.open = open_like_dumb
    else:
        module._normalize_uri = None  # the tests import it
    sys.modules[module.__name__] = module
    setattr(dbm, name, module)


def module_like_dbm(name: str) -> ModuleType:
    """Return a module of the given name with `open` and `error`."""

    def open(file: Any, flag: Any = "r", mode: int = 0o666) -> dbm_bitcask.Database:  # noqa: A001  (a dbm module's)
        return dbm_bitcask.open(file, flag, mode)

    module: Any = ModuleType(name)
    module.open, module.error = open, dbm_bitcask.error
    return module  # type: ignore[no-any-return]


def open_like_dumb(file: Any, flag: Any = "c", mode: int = 0o666) -> dbm_bitcask.Database:
    """Open with the flags that `dbm.dumb` has, and under its two names: the database is `name.dir`, and `name.dat` a link to it."""
    name = os.fsdecode(file)
    if flag not in ("r", "w", "c", "n"):
        flag = "no such flag"
    database = dbm_bitcask.open(f"{name}.dir", flag, mode)
    with contextlib.suppress(FileExistsError):
        Path(f"{name}.dat").symlink_to(f"{name}.dir")
    return database


class Outcome(unittest.TestResult):
    """Gives each test an empty working directory, and notes how it went."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        self.place = tempfile.mkdtemp()
        os.chdir(self.place)

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().stopTest(test)
        os.chdir(tempfile.gettempdir())
        shutil.rmtree(self.place, ignore_errors=True)  # a skipped test stops without a start on 3.12.1

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        if short(test) not in self.found["failed"]:
            self.found["passed"][short(test)] = inspect.getsource(getattr(test, test._testMethodName))

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self.found["skipped"][short(test)] = reason

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        self.found["failed"][short(test)] = self._exc_info_to_string(err, test)  # type: ignore[attr-defined]

    addError = addFailure  # noqa: N815

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802, ARG002
        self.found["expected"][short(test)] = "fails, as its authors expect"

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self.found["failed"][short(test)] = "passes, and its authors expect it to fail"

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802, ARG002
        if err is not None:
            self.addFailure(test, err)


def short(test: unittest.TestCase) -> str:
    """The name of a test: module.Class.test."""
    return ".".join([type(test).__module__.removeprefix("test."), *test.id().split(".")[-2:]])


if __name__ == "__main__":
    sys.exit(main())
