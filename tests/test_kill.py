"""A process that is killed at any moment loses nothing that it acknowledged.

The child works through a list of changes that is known beforehand and writes one byte to a pipe after each. So after a
kill the database must hold the outcome of exactly the acknowledged changes, or of one more: the one that it was in.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

import dbm_bitcask
from children import fork
from dbm_bitcask.engine.check import check

KINDS = ["set"] * 60 + ["delete"] * 15 + ["update"] * 2 + ["sync"] * 2 + ["merge"] + ["clear"]


def changes(seed):
    """An endless list of changes, the same for the same seed."""
    chance = random.Random(seed)
    for number in range(1_000_000):
        kind = chance.choice(KINDS if number % 50 else ["merge", "clear", "set"])
        yield kind, b"key %d" % chance.randrange(150), b"%d " % number * chance.randrange(120)


def apply(target, kind, key, value):
    """Do one change to a database or to a dict."""
    if kind == "set":
        target[key] = value
    elif kind == "delete":
        target.pop(key, None)
    elif kind == "update":
        target[key] = target.get(key, b"")[:50] + value[:50]
    elif kind == "clear":
        target.clear()
    elif isinstance(target, dbm_bitcask.Database):
        target.reorganize() if kind == "merge" else target.sync()


def work_for_ever(path, pipe, seed, options):
    db = dbm_bitcask.open(path, "w", **options)
    for change in changes(seed):
        apply(db, *change)
        os.write(pipe, b".")


def acknowledged_before_the_kill(path, seed, options):
    """How many changes a child acknowledged; it is killed at some moment after a random one of them."""
    enough = random.Random(-seed).choice([0, 0, 1, 10, 100, 400])
    source, sink = os.pipe()
    try:
        pid = fork(lambda: work_for_ever(path, sink, seed, options))
        os.close(sink)
        count = 0
        while count < enough:
            count += len(os.read(source, enough - count))
        time.sleep(random.random() / 200)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        while more := os.read(source, 65536):
            count += len(more)
    finally:
        os.close(source)
    return count


def outcomes(before, seed, acknowledged):
    """The two states that the database may be in."""
    state = dict(before)
    for number, change in enumerate(changes(seed)):
        if number >= acknowledged:
            following = dict(state)
            apply(following, *change)
            return state, following
        apply(state, *change)
    raise AssertionError


@pytest.mark.parametrize(
    "options",
    [{}, {"segment_size": 4096}, {"segment_size": 4096, "sync": "always"}],
    ids=["default", "tiny segments", "tiny segments, always synced"],
)
def test_every_acknowledged_change_survives_kill_9(path, options):
    dbm_bitcask.open(path, "c", **options).close()
    state = {}
    for seed in range(6):
        acknowledged = acknowledged_before_the_kill(path, seed, options)
        possible = outcomes(state, seed, acknowledged)
        with dbm_bitcask.open(path, "r") as db:
            assert dict(db) in possible
            assert len(db) == len(db.keys())
        with dbm_bitcask.open(path, "w", **options) as db:
            state = dict(db)
            assert state in possible
            assert len(db) == len(state)
            assert {key: db[key] for key in state} == state
            assert not any(key in db for key in {b"key %d" % i for i in range(150)} - state.keys())
        assert check(path) == []


def test_writer_goes_on_beside_one_that_is_killed(path):
    options = {"segment_size": 4096}
    with dbm_bitcask.open(path, "c", **options) as db:
        state = {}
        for seed in range(100, 106):
            acknowledged = acknowledged_before_the_kill(path, seed, options)
            possible = outcomes(state, seed, acknowledged)
            db[b"mine"] = b"%d" % seed
            state = dict(db)
            assert state in [{**outcome, b"mine": b"%d" % seed} for outcome in possible]
            assert len(db) == len(state)


def test_killed_creation_is_not_in_the_way(tmp_path):
    for turn in range(15):
        path = tmp_path / str(turn)
        pid = fork(lambda path=path: [dbm_bitcask.open(path, "c"), signal.pause()])
        time.sleep(random.random() / 200)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with dbm_bitcask.open(path, "c") as db:
            assert dict(db) == {}
            db[b"key"] = b"value"
        assert check(path) == []
