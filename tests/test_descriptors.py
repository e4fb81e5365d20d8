"""A database of 5,000 segments under a limit of 256 file descriptors, with threads that read."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import dbm_bitcask
from children import fork_and_wait
from dbm_bitcask.engine import files, lock, record, rotation, segment
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory
from dbm_bitcask.engine.manifest import Entry, Manifest

SEGMENTS, LIMIT = 5000, 256
DEAD = range(SEGMENTS - 20, SEGMENTS + 1)  # the keys whose segments a merge takes away
OWN_DESCRIPTOR_OF_A_MAP = sys.version_info < (3, 13)
# After a rotation, readers that are still in a search keep the maps of before: with a walk, and a descriptor for each map, too many.
BESIDE_A_WALK = {} if OWN_DESCRIPTOR_OF_A_MAP else {"segment_size": 4096}

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


def key_of(number):
    return b"%d" % number


def value_of(number):
    return key_of(number) * (3900 // len(key_of(number)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Made once, and by hand: 5,000 rotations would take half a minute."""
    path = tmp_path_factory.mktemp("descriptors") / "db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_fdatasync", lambda _: None)
        patch.setattr(os, "fsync", lambda _: None)
        path.mkdir()
        directory = Directory(str(path))
        sealed = [make_segment(directory, number) for number in range(1, SEGMENTS + 1)]
        active = Entry(SEGMENTS + 1, 0, 0)
        segment.create(directory, active, 0o666)
        rotation.publish_manifest(directory, Manifest(1, active.id + 1, (*sealed, active)), 0o666)
        dbm_bitcask.open(path, "w").close()
    return path


def make_segment(directory, number):
    """A segment with one record and a seal."""
    entry = Entry(number, number, 0)
    start = segment.FIRST_RECORD
    data = record.encode(0, key_of(number), value_of(number), entry.salt ^ start, 1)
    data += record.encode(record.SEAL, b"", b"", entry.salt ^ (start + len(data)), 1)
    segment.create(directory, entry, 0o666).write(data, start)
    return entry._replace(length=start + len(data))


def open_descriptors():
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208  (which opens one)


@contextmanager
def few_descriptors():
    """The limit, watched: in the end a list of how many were open from time to time."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))
    files._fdatasync = lambda _: None
    # Those of the test runner, and what interrupted tests left open, are none of ours: nor is what would close their numbers.
    gc.freeze()
    lock._locks.clear()
    os.closerange(3, 10_000)
    seen, stop = [open_descriptors()], threading.Event()

    def watch():
        while not stop.wait(0.005):
            seen.append(open_descriptors())

    with ThreadPoolExecutor(1) as watching:
        watched = watching.submit(watch)
        try:
            yield seen
        finally:
            stop.set()
        watched.result(60)
    assert max(seen) < LIMIT


def get_some(db, seed, share=3):
    """Gets of a part of all keys, in random order."""
    numbers = list(range(1 + seed % share, SEGMENTS + 1, share))
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        assert db[key_of(number)] == value_of(number)
        assert key_of(number) in db
        assert db.get(b"missing %d" % number) is None
        assert len(db) >= SEGMENTS


def require_keys(keys):
    assert sorted(key for key in keys if key.isdigit()) == sorted(map(key_of, range(1, SEGMENTS + 1)))


def require_items(items):
    count = 0
    for key, value in items:
        if key.isdigit():
            assert value == value_of(int(key))
            count += 1
    assert count == SEGMENTS


def set_and_delete(db):
    for number in range(60):
        db[b"new %d" % number] = b"v" * 200
        assert db[b"new %d" % number] == b"v" * 200
        del db[b"new %d" % number]


def together(*actions):
    with ThreadPoolExecutor(len(actions)) as threads:
        for done in [threads.submit(*action) for action in actions]:
            done.result(120)


@pytest.mark.parametrize("flag", ["r", "w"])
def test_threads_read_beside_a_walk_and_a_writer(path, flag):
    def work():
        with few_descriptors() as seen, dbm_bitcask.open(path, "w", **BESIDE_A_WALK) as writer, dbm_bitcask.open(path, flag) as reader:
            db = writer if flag == "w" else reader

            def walk():
                require_keys(db)
                require_items(db.items())

            readers = [(get_some, db, seed) for seed in range(3)]
            together(*readers, (walk,), (set_and_delete, writer))
            before = open_descriptors()
            together(*readers)
            assert open_descriptors() <= before + len(readers)  # each may have one more in its hand when it adds it to the maps
            assert db.stats().segments >= SEGMENTS
            assert len(seen) > 10

    fork_and_wait(work)
    assert check(path) == []


@pytest.mark.parametrize("flag", ["r", "w"])
def test_threads_read_beside_a_writer_that_rotates(path, flag):
    def work():
        with few_descriptors(), dbm_bitcask.open(path, "w", segment_size=4096) as writer, dbm_bitcask.open(path, flag) as reader:
            db = writer if flag == "w" else reader
            together(*((get_some, db, seed, 9) for seed in range(3)), (set_and_delete, writer))

    fork_and_wait(work)
    assert check(path) == []


def test_two_iterations_at_once(path):
    def work():
        with few_descriptors(), dbm_bitcask.open(path, "r") as db:
            keys, items = iter(db), iter(db.items())
            first, item = next(keys), next(items)
            get_some(db, 0, share=20)
            require_keys([first, *keys])
            require_items([item, *items])

    fork_and_wait(work)


def test_check_and_stats_need_few_descriptors(path):
    def work():
        with few_descriptors(), dbm_bitcask.open(path, "r") as db:
            assert db.stats().segments >= SEGMENTS
            assert check(path) == []

    fork_and_wait(work)


def test_open_handles_do_not_add_up_by_their_number_of_segments(path):
    def work():
        with few_descriptors():
            handles = [dbm_bitcask.open(path, "r") for _ in range(20)]
            for db in handles:
                assert db[key_of(7)] == value_of(7)
            assert open_descriptors() < 20 * 6 + 20

    fork_and_wait(work)


def kill_segments(db):
    """Have the last segments hold nothing that counts."""
    for number in DEAD:
        db[key_of(number)] = value_of(number)


def test_merge_beside_readers_leaves_every_get_right(path):
    def work():
        with few_descriptors(), dbm_bitcask.open(path, "w", segment_size=4096) as db:
            kill_segments(db)
            together(*((get_some, db, seed) for seed in range(3)), (db.merge,))
            assert db.stats().segments >= SEGMENTS

    fork_and_wait(work)
    assert check(path) == []


def test_merge_beside_a_walk_takes_nothing_away_from_it(path):
    """It maps more segments than there are descriptors, and what the merge takes away is at its end."""

    def work():
        with few_descriptors(), dbm_bitcask.open(path, "w", segment_size=4096) as db:
            kill_segments(db)
            walk = iter(db)
            first = next(walk)
            together((get_some, db, 0), (db.merge,))
            require_keys([first, *walk])
            require_keys(db)
            get_some(db, 1)

    fork_and_wait(work)
    assert check(path) == []
