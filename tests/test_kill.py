"""A process that is killed at any moment loses nothing that it acknowledged.

The child works through a list of changes that is known beforehand and writes one byte to a pipe after each. So after a
kill the database must hold the outcome of exactly the acknowledged changes, or of one more: the one that it was in.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time

import pytest

import dbm_bitcask
from children import fork
from crashes import every_write_pays
from dbm_bitcask.engine import contents, keydir, merge, recovery, rotation, segment, store, write
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


PLACES = [
    (rotation, "commit"),
    (rotation, "finish_commit"),
    (rotation, "write_manifest"),
    (rotation, "sweep"),
    (rotation, "relist"),
    (segment, "create"),
    (merge, "_clean_slice"),
    (merge, "_clean_for"),
    (merge, "_finish"),
    (rotation, "drop"),
    (rotation, "_unlink"),
    (write, "move"),
    (contents, "write_hint"),
    (keydir.Keydir, "split"),
    (keydir.Keydir, "_swing"),
    (keydir.Keydir, "add_rows"),
    (keydir.Keydir, "seal"),
    (write, "put"),
    (write, "publish"),
    (recovery, "_repair"),
    (recovery, "_publish"),
    (recovery, "_finish_change"),
    (recovery, "rebuild"),
    (recovery, "_build"),
    (recovery, "_bind"),
    (recovery, "take_keydir"),
    (store, "_rest"),
    (store, "_mark_clean"),
    (store.Store, "_settle"),
]


def die_within(place, name, call, line):
    """Have this process killed before a line of a function, at one of its calls."""
    function = getattr(place, name)
    calls, left = itertools.count(1), [line]

    def trace(frame, event, _):
        if event == "call":
            return trace if frame.f_code is function.__code__ else None
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced(*args, **kwargs):
        if next(calls) == call:
            sys.settrace(trace)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(None)

    setattr(place, name, traced)


def sessions(path, pipe, seed, options):
    """The same work as `work_for_ever`, by many handles one after the other, of which each is opened and closed."""
    work = changes(seed)
    while True:
        with dbm_bitcask.open(path, "w", **options) as db:
            for change in itertools.islice(work, 40):
                apply(db, *change)
                os.write(pipe, b".")
        if seed % 3 == 0:
            (path / "keydir").unlink(missing_ok=True)


def killed_within(path, seed, options):
    """How many changes a child acknowledged that is killed within some function; or after a while, if it does not come there."""
    chance = random.Random(seed)
    source, sink = os.pipe()
    try:
        place, name = chance.choice(PLACES)
        call, line = chance.choice([1, 1, 2, 5]), chance.randrange(1, 30)
        pid = fork(lambda: [die_within(place, name, call, line), sessions(path, sink, seed, options)])
        os.close(sink)
        count, enough = 0, 400
        while count < enough and (more := os.read(source, enough - count)):
            count += len(more)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{name}: the child failed, its traceback is on stderr"
        while more := os.read(source, 65536):
            count += len(more)
    finally:
        os.close(source)
    return count


@pytest.mark.parametrize("options", [{"segment_size": 4096}, {"segment_size": 20000, "sync": "always"}], ids=["tiny", "always synced"])
def test_kills_within_what_is_rare_lose_nothing(place, monkeypatch, options, amount, tally):
    """Rotation, merge, hints, manifest, page splits, recovery, opening and closing, each at any line."""
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0)
    monkeypatch.setattr(store, "_CLEAN_EVERY", -1.0)
    every_write_pays(monkeypatch)
    path = place / "db"
    dbm_bitcask.open(path, "c", **options).close()
    bases = [{}]
    kills = amount(sample=15, full=500, release=10_000)
    for seed in range(kills):
        acknowledged = killed_within(path, seed, options)
        possible = [state for base in bases for state in outcomes(base, seed, acknowledged)]
        began = time.monotonic()
        with dbm_bitcask.open(path, "r") as db:
            state = dict(db)
            assert time.monotonic() - began < 30, f"seed {seed}"  # a second where nobody else computes
            assert state in possible, f"seed {seed}"
            assert len(db) == len(state), f"seed {seed}"
        # What a reader did not see yet may still be finished by the next writer; what it saw is there for good.
        bases = [later for later in possible[possible.index(state) :] if later == state or possible.index(state) % 2 == 0][:2]
        if seed % 4 == 0:
            with dbm_bitcask.open(path, "w", **options) as db:
                assert dict(db) in bases, f"seed {seed}"
                bases = [dict(db)]
            assert check(path) == [], f"seed {seed}"
    tally("kills", kills)


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
