"""Every database that a test makes at `path` is checked when the test is over."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

import damage
import dbm_bitcask
import native_only
from dbm_bitcask.engine import portable
from dbm_bitcask.engine.check import check

OPTIONS = {
    "default": {},
    "tiny segments": {"segment_size": 4096},
    "always synced": {"sync": "always"},
}

# Nothing here is about time: a machine may be busy.
TIMELESS = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("short", max_examples=25, stateful_step_count=40, **TIMELESS)
hypothesis.settings.register_profile("long", max_examples=2000, stateful_step_count=100, **TIMELESS)
hypothesis.settings.load_profile(os.environ.get("DBM_BITCASK_HYPOTHESIS_PROFILE", "short"))


def pytest_addoption(parser):
    parser.addoption("--harness", choices=("sample", "full", "release"), default="sample", help="how much of each heavy harness is run")

    group = parser.getgroup("schedules", "interleavings of processes (tests/test_schedules.py)")
    group.addoption("--schedule", type=int, metavar="SEED", help="replay the schedule of one seed, and show its last steps")
    group.addoption("--schedules", type=int, metavar="N", help="run the schedules of the seeds below N (default: as --harness says)")
    parser.addoption("--files", choices=("native", "portable"), default="native", help='the layer that files="auto" stands for')
    parser.addoption("--mutant", help="run the tests on an engine with a seeded bug, by its name in mutants.py")


def pytest_configure(config):
    portable.AUTO = config.getoption("files")
    if config.getoption("mutant"):
        import mutants  # which imports the engine

        mutants.apply(config.getoption("mutant"))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.getoption("files") == "portable" and (reason := native_only.reason_of(item.path.stem, item.name.partition("[")[0])):
            item.add_marker(pytest.mark.skip(reason=reason))
        if "amount" in item.fixturenames:
            item.add_marker("harness")


@pytest.fixture
def amount(request):
    """Chooses among the amounts of a heavy harness by the option `--harness`: `amount(sample=..., full=..., release=...)`."""
    return lambda **amounts: amounts[request.config.getoption("harness")]


@pytest.fixture
def tally(record_property):
    """Counts what a harness did; the sums stand at the end of the run."""
    return record_property


def pytest_terminal_summary(terminalreporter):
    sums = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for what, number in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                sums[what] += number
    for what, number in sums.items():
        terminalreporter.write_line(f"{number:,} {what}")


@pytest.fixture
def place():
    """A directory in memory if there is such a file system: for crashes that are staged, and syncs that need not be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


@pytest.fixture
def fast_disk(monkeypatch):
    """Nothing in the test asks what has reached the disk."""
    damage.fast_disk(monkeypatch)


@pytest.fixture
def watched():
    """What calls `damage.alarm` does not hang for ever."""
    with damage.watched():
        yield


@pytest.fixture
def path(tmp_path):
    """Where a database may stand; if one stands there at the end, it is whole."""
    path = tmp_path / "db"
    yield path
    if dbm_bitcask.whichdb(path):
        assert check(path) == []


@pytest.fixture
def options():
    """The options that `db` is opened with. A module that runs under each of them overrides this with `each_option`."""
    return {}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def each_option(request):
    return request.param


@pytest.fixture
def db(path, options):
    with dbm_bitcask.open(path, "c", **options) as db:
        yield db
