"""Every database that a test makes at `path` is checked when the test is over."""

from __future__ import annotations

import os

import hypothesis
import pytest

import dbm_bitcask
from dbm_bitcask.engine.check import check

OPTIONS = {
    "default": {},
    "tiny segments": {"segment_size": 4096},
    "always synced": {"sync": "always"},
}

hypothesis.settings.register_profile("short", max_examples=25, stateful_step_count=40, deadline=None)
hypothesis.settings.register_profile("long", max_examples=2000, stateful_step_count=100, deadline=None)
hypothesis.settings.load_profile(os.environ.get("DBM_BITCASK_HYPOTHESIS_PROFILE", "short"))


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
