"""The writer lock and processes that are stopped, killed, forked or interrupted: nobody waits for one that will never let go."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

import dbm_bitcask
from children import fork, fork_and_wait, set_and_get, use_handle
from dbm_bitcask.engine import files, write
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory

ITEMS = {b"key %d" % number: b"value %d" % number for number in range(100)}
TINY = {"segment_size": 4096}


@pytest.fixture(autouse=True)
def no_hang():
    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def full(path):
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
    return path


def is_free(path):
    """Whether nobody holds the writer lock."""
    return Directory(str(path)).try_lock()


def require_held(path):
    assert not is_free(path)


@contextmanager
def stopped_within_a_set(path, key, value):
    """The pid of a writer that is stopped between the record of a set and its slot; it is killed in the end."""
    publish = write.publish

    def stop_and_publish(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGSTOP)
        publish(*args, **kwargs)

    def work():
        db = dbm_bitcask.open(path, "w")
        write.publish = stop_and_publish
        db[key] = value

    pid = fork(work)
    try:
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def require_exit(pid):
    """Wait for a process to end well, and leave it to be reaped."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


# A writer that is stopped.


def test_readers_go_on_while_a_writer_is_stopped_within_a_set(full):
    with dbm_bitcask.open(full, "r") as before, dbm_bitcask.open(full, "w") as writer, stopped_within_a_set(full, b"key 1", b"unfinished"):
        assert not is_free(full)
        with dbm_bitcask.open(full, "r") as after:
            for db in (before, writer, after):
                assert dict(db) == dict(db.items()) == ITEMS
                assert (db[b"key 1"], len(db), b"missing" in db) == (b"value 1", len(ITEMS), False)


def test_writer_that_waits_for_a_stopped_one_times_out_and_names_path_pid_and_age(full):
    with dbm_bitcask.open(full, "w", timeout=0.02) as db, stopped_within_a_set(full, b"key 1", b"unfinished") as pid:
        for change in (
            lambda: db.update({b"mine": b"1"}),
            lambda: db.pop(b"key 2"),
            db.clear,
            lambda: dbm_bitcask.open(full, "w", timeout=0),
        ):
            with pytest.raises(dbm_bitcask.LockTimeout, match=rf"process {pid}, since \d+ s") as failure:
                change()
            assert str(full) in str(failure.value)
        assert dict(db) == ITEMS
        os.kill(pid, signal.SIGCONT)
        require_exit(pid)


def test_stopped_writer_that_goes_on_finishes_its_set_and_the_next_has_its_turn(full):
    with stopped_within_a_set(full, b"key 1", b"finished") as pid, ThreadPoolExecutor() as threads, dbm_bitcask.open(full, "r") as reader:
        waiting = threads.submit(lambda: dbm_bitcask.open(full, "w").update({b"mine": b"1"}))
        assert dict(reader) == ITEMS
        os.kill(pid, signal.SIGCONT)
        waiting.result(60)
        require_exit(pid)
        assert dict(reader) == {**ITEMS, b"key 1": b"finished", b"mine": b"1"}


@pytest.mark.parametrize("timeout", [None, 60])
def test_writer_goes_on_as_soon_as_the_stopped_one_is_killed(full, timeout):
    with dbm_bitcask.open(full, "w", timeout=timeout) as db, ThreadPoolExecutor() as threads:
        with stopped_within_a_set(full, b"key 1", b"of a dead process"):
            waiting = threads.submit(db.update, {b"mine": b"1"})
            assert dict(db) == ITEMS
        waiting.result(60)
        assert dict(db) == {**ITEMS, b"key 1": b"of a dead process", b"mine": b"1"}


# Signals.


class Alarm(Exception):  # noqa: N818
    """What the handler of a signal raises."""


class Alarmed:
    """Sets that are interrupted again and again by the handler of an alarm."""

    def __init__(self, db, path, alarms):
        self.db, self.left, self.acknowledged = db, alarms, 0
        self.keys = [b"key %d" % number for number in range(50)]
        self.possible = {}  # what each may have now
        self.chance = random.Random(alarms)
        self.usual = sorted(self.timed_set(key) for key in self.keys)[25]
        signal.signal(signal.SIGALRM, self.ring)
        while self.left > 0:
            with suppress(Alarm):
                self.set_until_it_rings()
            assert is_free(path)

    def timed_set(self, key):
        before = time.perf_counter()
        self.db[key] = b"first"
        self.possible[key] = {b"first"}
        return time.perf_counter() - before

    def ring(self, *_):
        self.left -= 1
        raise Alarm

    def set_until_it_rings(self):
        while self.left > 0:
            key, value = self.keys[self.left % 50], b"%d" % self.left * 9
            self.possible[key].add(value)
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, self.usual * self.chance.uniform(0, self.chance.choice([3, 30]))))
            self.db[key] = value
            self.possible[key] = {value}
            self.acknowledged += 1
            while signal.getitimer(signal.ITIMER_REAL)[0]:
                assert self.db.get(key) == value


def work_under_alarms(path, options):
    """Many interruptions; then another thread and another process write at once, and nothing acknowledged is lost."""
    sys.unraisablehook = lambda _: None  # where it rings in a finalizer
    files._fdatasync = lambda _: None  # or it would always ring within that
    db = dbm_bitcask.open(path, "w", **options)
    alarmed = Alarmed(db, path, 2000)
    with ThreadPoolExecutor() as threads:
        threads.submit(db.update, {b"thread": b"1"}).result(60)
    fork_and_wait(lambda: dbm_bitcask.open(path, "w", timeout=10).update({b"process": b"1"}))
    found = dict(db)
    assert (found[b"thread"], found[b"process"]) == (b"1", b"1")
    assert all(found.get(key) in values for key, values in alarmed.possible.items())
    assert alarmed.acknowledged > 20


SIGNALS = [
    {},
    TINY,
    {"sync": "always"},
    {"sync": 0.01},
    {"timeout": 0.5},
]


@pytest.mark.parametrize("options", SIGNALS, ids=["default", "tiny segments", "always synced", "synced by a thread", "timeout"])
def test_signals_at_any_moment_leak_no_lock(path, options):
    dbm_bitcask.open(path).close()
    fork_and_wait(lambda: work_under_alarms(path, options))
    assert is_free(path)
    with dbm_bitcask.open(path, "w", timeout=10) as db:
        db[b"last"] = b"1"
    assert check(path) == []


# Forks.


def test_closing_in_a_child_changes_nothing_for_the_parent(path):
    with dbm_bitcask.open(path, **TINY) as db, dbm_bitcask.open(path, "r") as reader:
        db.update(ITEMS)
        walk = iter(db)
        first = next(walk)
        fork_and_wait(lambda: (db.close(), reader.close()))
        assert [first, *walk] == list(ITEMS)
        db[b"parent"] = b"1"
        assert dict(db) == dict(reader) == {**ITEMS, b"parent": b"1"}
        assert is_free(path)


def test_grandchildren_use_the_handle_of_their_grandparent(path):
    with dbm_bitcask.open(path, **TINY) as db:
        db[b"parent"] = b"1"

        def work(depth):
            db[b"depth %d" % depth] = db[b"parent"]
            if depth < 3:
                fork_and_wait(lambda: work(depth + 1))
                fork_and_wait(lambda: (work(depth + 1), db.close()))
            db[b"back %d" % depth] = b"1"

        fork_and_wait(lambda: work(0))
        db[b"parent"] = b"2"
        assert len(db) == 1 + 2 * 4
        assert db[b"back 0"] == b"1"


@pytest.mark.parametrize("options", [{}, {"timeout": 60}, {"sync": "always"}, {"sync": 0.01}])
def test_child_of_a_fork_while_another_thread_sets_can_set(path, options):
    with dbm_bitcask.open(path, **options) as db:
        stop = threading.Event()

        def set_until_stopped():
            number = 0
            while not stop.is_set():
                db[b"parent"] = b"%d" % number
                number += 1

        def set_and_get():
            signal.alarm(60)  # kills it
            db[b"child"] = b"1"
            assert (db[b"child"], b"parent" in db) == (b"1", True)

        db[b"parent"] = b""
        with ThreadPoolExecutor() as threads:
            setting = threads.submit(set_until_stopped)
            for _ in range(10):
                fork_and_wait(set_and_get)
            stop.set()
            setting.result(60)
        assert db[b"child"] == b"1"


def test_child_of_a_fork_within_a_set_of_another_thread_can_set_when_that_is_over(path, monkeypatch):
    inside, go_on, publish = threading.Event(), threading.Event(), write.publish

    def publish_slowly(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)
        publish(*args, **kwargs)

    with dbm_bitcask.open(path, timeout=60) as db, ThreadPoolExecutor() as threads:
        db.update(ITEMS)
        monkeypatch.setattr(write, "publish", publish_slowly)
        setting = threads.submit(db.__setitem__, b"key 1", b"parent")
        assert inside.wait(60)
        pid = fork(lambda: db.update({b"child": db[b"key 1"]}))
        go_on.set()
        setting.result(60)
        assert os.waitpid(pid, 0) == (pid, 0)
        assert db[b"child"] in (b"value 1", b"parent")
        assert dict(db) == {**ITEMS, b"key 1": b"parent", b"child": db[b"child"]}


def test_workers_of_a_forked_pool_use_a_global_handle(path):
    with dbm_bitcask.open(path, **TINY) as db, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside the threads of the test runner
        use_handle(db)
        try:
            with multiprocessing.get_context("fork").Pool(4) as pool:
                assert pool.map(set_and_get, range(300)) == [b"%d" % number * 50 for number in range(300)]
        finally:
            use_handle(None)
        assert dict(db) == {b"pool %d" % number: b"%d" % number * 50 for number in range(300)}


def test_threads_of_an_executor_share_a_handle_with_readers_and_an_iteration(path):
    with dbm_bitcask.open(path, **TINY) as db, dbm_bitcask.open(path, "r") as reader, ThreadPoolExecutor(6) as threads:
        db.update(ITEMS)

        def change(number):
            db[b"own %d" % number] = b"%d" % number * 30
            assert db.setdefault(b"own %d" % number, b"no") == reader[b"own %d" % number]
            return db.pop(b"own %d" % number)

        walks = [threads.submit(lambda: {key: value for key, value in reader.items() if key in ITEMS}) for _ in range(3)]
        assert list(threads.map(change, range(300))) == [b"%d" % number * 30 for number in range(300)]
        assert [walk.result(60) for walk in walks] == [ITEMS] * 3
        assert dict(db) == dict(reader) == ITEMS
