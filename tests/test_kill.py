"""A process that is killed at any moment loses nothing that it acknowledged.

The child works through a list of changes that is known beforehand and writes one byte to a pipe after each. So after a
kill the database must hold the outcome of exactly the acknowledged changes, or of one more: the one that it was in. A batch
is one change. The clock goes on by a second with each change, so that it is known, too, which keys have expired.
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
from dbm_bitcask.engine import batch, keydir, merge, recovery, rotation, segment, store, write
from dbm_bitcask.engine import contents as engine_contents
from dbm_bitcask.engine.check import check
from expected import START, Clock, Expected, contents

KINDS = ["set"] * 45 + ["expiring"] * 15 + ["touch"] * 4 + ["delete"] * 15 + ["batch"] * 3 + ["update"] * 2
KINDS += ["change"] * 2 + ["sync"] * 2 + ["merge"] + ["clear"]
KEYS = 150
LONGEST_WORK = 1_000_000  # changes of one child, and so many seconds
TTLS = [1, 20, 300, 2 * LONGEST_WORK, None]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    clock.install(monkeypatch)
    return clock


def moment(seed, number):
    """The second in which a change takes place."""
    return START + seed * LONGEST_WORK + number


def changes(seed):
    """An endless list of changes, the same for the same seed."""
    chance = random.Random(seed)
    for number in range(LONGEST_WORK):
        kind = chance.choice(KINDS if number % 50 else ["merge", "clear", "set"])
        ttl = chance.choice(TTLS) if kind in ("expiring", "touch", "batch") else None
        yield kind, chance.randrange(KEYS), b"%d " % number * chance.randrange(120), ttl


def name(number):
    return b"key %d" % (number % KEYS)


def apply(target, kind, number, value, ttl):
    """Do one change to a database or to what it should have."""
    key = name(number)
    if kind in ("set", "expiring"):
        target.set(key, value, ttl)
    elif kind == "touch":
        if key in target:
            target.touch(key, ttl)
    elif kind == "delete":
        target.pop(key, None)
    elif kind == "batch":
        with target.batch():
            for each in range(number, number + 8):
                if each % 4:
                    target.set(name(each), value[: each * 5], ttl if each % 2 else None)
                else:
                    target.pop(name(each), None)
            target[key] = target.get(name(number + 1), b"") + b"!"
    elif kind == "update":
        target.update({name(each): value[:50] for each in range(number, number + 8)})  # few enough for one batch
    elif kind == "change":
        target[key] = target.get(key, b"")[:50] + value[:50]
    elif kind == "clear":
        target.clear()
    elif isinstance(target, dbm_bitcask.Database):
        target.reorganize() if kind == "merge" else target.sync()


def work(db, pipe, seed, numbered, clock):
    for number, change in numbered:
        clock.seconds = moment(seed, number)
        apply(db, *change)
        os.write(pipe, b".")


def work_for_ever(path, pipe, seed, options, clock):
    work(dbm_bitcask.open(path, "w", **options), pipe, seed, enumerate(changes(seed)), clock)


def acknowledged_before_the_kill(path, seed, options, clock):
    """How many changes a child acknowledged; it is killed at some moment after a random one of them."""
    enough = random.Random(-seed).choice([0, 0, 1, 10, 100, 400])
    source, sink = os.pipe()
    try:
        pid = fork(lambda: work_for_ever(path, sink, seed, options, clock))
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


def outcomes(before, seed, acknowledged, clock):
    """The two states that the database may be in; the clock is set to the moment of the change that was not acknowledged."""
    state = Expected(clock.seconds, before.stored)
    for number, change in enumerate(changes(seed)):
        state.now = clock.seconds = moment(seed, number)
        if number >= acknowledged:
            following = Expected(clock.seconds, state.stored)
            apply(following, *change)
            return state, following
        apply(state, *change)
    raise AssertionError


def matching(states, found):
    """Those of some states that are what was found."""
    return [state for state in states if state.items() == found]


@pytest.mark.parametrize(
    "options",
    [{}, {"segment_size": 4096, "compress": "zlib"}, {"segment_size": 4096, "sync": "always"}],
    ids=["default", "tiny segments, compressed", "tiny segments, always synced"],
)
def test_every_acknowledged_change_survives_kill_9(path, options, clock):
    dbm_bitcask.open(path, "c", **options).close()
    state = Expected(clock.seconds)
    for seed in range(6):
        acknowledged = acknowledged_before_the_kill(path, seed, options, clock)
        possible = outcomes(state, seed, acknowledged, clock)
        with dbm_bitcask.open(path, "r") as db:
            assert matching(possible, contents(db, clock.seconds))
            assert len(db) >= len(db.keys())
        with dbm_bitcask.open(path, "w", **options) as db:
            found = contents(db, clock.seconds)
            [state, *_] = matching(possible, found)
            assert any(state.is_as_many(len(db)) for state in possible)
            assert {key: (db[key], found[key][1]) for key in found} == found
            assert not any(key in db for key in set(map(name, range(KEYS))) - found.keys())
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
    (engine_contents, "write_hint"),
    (keydir.Keydir, "split"),
    (keydir.Keydir, "_swing"),
    (keydir.Keydir, "add_rows"),
    (keydir.Keydir, "seal"),
    (write, "put"),
    (write, "publish"),
    (write, "keep"),
    (batch, "write_all"),
    (batch, "_append"),
    (batch, "_publish"),
    (batch, "_count"),
    (batch, "resume"),
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


def sessions(path, pipe, seed, options, clock):
    """The same work as `work_for_ever`, by many handles one after the other, of which each is opened and closed."""
    numbered = enumerate(changes(seed))
    clock.seconds = moment(seed, 0)
    while True:
        with dbm_bitcask.open(path, "w", **options) as db:
            work(db, pipe, seed, itertools.islice(numbered, 40), clock)
        if seed % 3 == 0:
            (path / "keydir").unlink(missing_ok=True)


def killed_within(path, seed, options, clock):
    """How many changes a child acknowledged that is killed within some function; or after a while, if it does not come there."""
    chance = random.Random(seed)
    source, sink = os.pipe()
    try:
        place, name = chance.choice(PLACES)
        call, line = chance.choice([1, 1, 2, 5]), chance.randrange(1, 30)
        pid = fork(lambda: [die_within(place, name, call, line), sessions(path, sink, seed, options, clock)])
        os.close(sink)
        count, enough = 0, 300
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


@pytest.mark.parametrize(
    "options",
    [{"segment_size": 4096}, {"segment_size": 20000, "sync": "always", "compress": "zlib"}],
    ids=["tiny", "always synced, compressed"],
)
def test_kills_within_what_is_rare_lose_nothing(place, monkeypatch, options, clock, amount, tally):
    """Rotation, merge, hints, manifest, page splits, recovery, opening and closing, each at any line."""
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0)
    monkeypatch.setattr(store, "_CLEAN_EVERY", -1.0)
    every_write_pays(monkeypatch)
    path = place / "db"
    dbm_bitcask.open(path, "c", **options).close()
    bases = [Expected(clock.seconds)]
    kills = amount(sample=15, full=500, release=10_000)
    for seed in range(kills):
        acknowledged = killed_within(path, seed, options, clock)
        pairs = [outcomes(base, seed, acknowledged, clock) for base in bases]
        possible = [state for pair in pairs for state in pair]
        began = time.monotonic()
        with dbm_bitcask.open(path, "r") as db:
            found = contents(db, clock.seconds)
            assert time.monotonic() - began < 30, f"seed {seed}"  # a second where nobody else computes
            assert matching(possible, found), f"seed {seed}"
            assert any(state.is_as_many(len(db)) for state in possible), f"seed {seed}"
        bases = different(still_possible(pairs, found, acknowledged))
        if seed % 4 == 0:
            with dbm_bitcask.open(path, "w", **options) as db:
                bases = matching(bases, contents(db, clock.seconds))
                assert bases, f"seed {seed}"
            assert check(path) == [], f"seed {seed}"
    tally("kills", kills)


def different(states):
    """One of each kind: or they would be twice as many after each kill."""
    kinds = []
    for state in states:
        if not any(state.stored == other.stored for other in kinds):
            kinds.append(state)
    return kinds


def still_possible(pairs, found, acknowledged):
    """The states that the next process may meet, of pairs of states without and with the change that was not acknowledged.

    What a reader did not see yet may still be finished by the next writer; what it saw is there for good. If the last writer acknowledged
    nothing, neither may it have finished what the one before it left, and that may still come, too.
    """
    states = []
    unfinished = False
    for before, after in pairs:
        if unfinished or before.items() == found:
            states += [before, after]
            unfinished = not acknowledged
        elif after.items() == found:
            states.append(after)
    return states


def test_writer_goes_on_beside_one_that_is_killed(path, clock):
    options = {"segment_size": 4096}
    with dbm_bitcask.open(path, "c", **options) as db:
        state = Expected(clock.seconds)
        for seed in range(100, 106):
            acknowledged = acknowledged_before_the_kill(path, seed, options, clock)
            possible = outcomes(state, seed, acknowledged, clock)
            db[b"mine"] = b"%d" % seed
            for outcome in possible:
                outcome[b"mine"] = b"%d" % seed
            [state, *_] = matching(possible, contents(db, clock.seconds))
            assert any(state.is_as_many(len(db)) for state in possible)


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
