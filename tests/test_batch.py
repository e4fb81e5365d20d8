"""Batches: several changes that are all there after a crash, or none; and `update`, which is made of them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dbm_bitcask
from children import fork, fork_and_wait
from crashes import abandon
from dbm_bitcask import batch as pending
from dbm_bitcask import database
from dbm_bitcask.engine import batch, contents, expiry, files, names, page, record, recovery, segment, store, walk, write
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.record import BATCH, HEADER, SYNCED

ITEMS = {b"key %d" % number: b"value %d" % number for number in range(8)}
CHANGES = {b"new 1": b"1", b"key 1": b"another", b"new 2": b"2", b"key 2": None, b"key 3": b"", b"new 3": b"3" * 99}


@pytest.fixture
def items(db):
    db.update(ITEMS)
    return db


def apply(mapping, changes):
    for key, value in changes.items():
        if value is None:
            mapping.pop(key, None)
        else:
            mapping[key] = value


AFTER = dict(ITEMS)
apply(AFTER, CHANGES)


def active(path):
    return max(path.glob("*.data"))


def records(db):
    """(offset, record) of the active segment."""
    entry = db._log.manifest.active
    data = files.Directory(db._path).open(names.segment_name(entry.id)).read(2**30, 0)
    return list(contents.Reading(data, entry, len(data)).records())


def frames(db):
    return [(offset, found) for offset, found in records(db) if found.flags & BATCH]


class Halfway(BaseException):
    """The process dies within a batch."""


@contextlib.contextmanager
def dies_after(monkeypatch, published):
    """Have the next batch die when so many of its steps of publishing are done; one that counts new keys is one."""
    left = itertools.count(published, -1)

    def dying(function):
        def called(*args, **kwargs):
            if next(left) == 0:
                raise Halfway
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for name in ("publish", "publish_run"):
            patch.setattr(write, name, dying(getattr(write, name)))
        patch.setattr(recovery, "ready", lambda _: None)
        patch.setattr(store, "_write_batch", batch.write_all)
        yield


def left_halfway(path, monkeypatch, published=2):
    """A database whose writer died in a batch of `CHANGES`; the handle."""
    db = dbm_bitcask.open(path, "c")
    db.update(ITEMS)
    with dies_after(monkeypatch, published), pytest.raises(Halfway), db.batch():
        apply(db, CHANGES)
    return db


# The block.


def test_batch_is_written_when_the_block_ends(items, path):
    with dbm_bitcask.open(path, "r") as reader:
        with items.batch() as given_to_the_block:
            assert given_to_the_block is items
            apply(items, CHANGES)
            assert dict(reader) == ITEMS
        assert dict(reader) == dict(items) == AFTER
        assert len(reader) == len(AFTER)


def test_batch_is_one_record_around_plain_ones(items):
    with items.batch():
        apply(items, CHANGES)
    [(first, frame)] = frames(items)[1:]
    inner = [(offset, found) for offset, found in records(items) if first < offset < frame.end]
    assert [found.key for _, found in inner] == list(CHANGES)
    assert inner[0][0] == first + HEADER.size
    assert inner[-1][1].end == frame.end


def test_batch_of_one_change_is_a_plain_record(items):
    before = len(frames(items))
    with items.batch():
        items[b"key 1"] = b"x"
        items.pop(b"never there", None)
    with items.batch():
        del items[b"key 2"]
    assert len(frames(items)) == before
    assert b"key 2" not in items
    assert items[b"key 1"] == b"x"


@pytest.mark.parametrize("key", [b"gone", b"new"])
def test_batch_that_changes_nothing_writes_nothing(items, path, key):
    size = active(path).stat().st_size
    with items.batch():
        pass
    with items.batch():
        items[key] = b"1"
        items[key + b"2"] = b"2"
        del items[key]
        del items[key + b"2"]
    assert active(path).stat().st_size == size


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, GeneratorExit, dbm_bitcask.error])
def test_exception_in_the_block_writes_nothing(items, path, exception):
    size = active(path).stat().st_size
    with pytest.raises(exception), items.batch():
        apply(items, CHANGES)
        raise exception
    assert dict(items) == ITEMS
    assert active(path).stat().st_size == size
    with items.batch():
        items[b"next"] = b"1"
    assert items[b"next"] == b"1"


def test_batch_within_a_batch_is_an_error_and_the_outer_one_goes_on(items):
    with items.batch():
        items[b"a"] = b"1"
        with pytest.raises(dbm_bitcask.error, match="already"), items.batch():
            pass
        items[b"b"] = b"2"
    assert (items[b"a"], items[b"b"]) == (b"1", b"2")


def test_batch_is_used_once(items):
    once = items.batch()
    with once:
        items[b"a"] = b"1"
    with pytest.raises(dbm_bitcask.error, match="once"), once:
        pass


@pytest.mark.usefixtures("items")
def test_batch_of_a_reader_is_an_error(path):
    with dbm_bitcask.open(path, "r") as reader, pytest.raises(dbm_bitcask.error, match="reading only"):
        reader.batch()


@pytest.mark.parametrize("what", ["sync", "merge", "reorganize", "clear", "backup"])
def test_what_is_about_the_whole_database_is_an_error_within_a_batch(items, path, what):
    with items.batch():
        items[b"a"] = b"1"
        with pytest.raises(dbm_bitcask.error, match="leave the batch first"):
            getattr(items, what)(*([path.parent / "copy"] if what == "backup" else []))
        assert items[b"a"] == b"1"
    assert dict(items) == {**ITEMS, b"a": b"1"}
    assert not (path.parent / "copy").exists()


def test_close_within_a_batch_drops_it_and_the_end_of_the_block_tells(path):
    db = dbm_bitcask.open(path)
    with pytest.raises(dbm_bitcask.error, match="nothing of the batch"), db.batch():
        db[b"a"] = b"1"
        db.close()
        with pytest.raises(dbm_bitcask.error):
            db[b"a"]
        with pytest.raises(dbm_bitcask.error):
            db[b"a"] = b"2"
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {}


def test_batch_that_is_too_large_is_an_error_and_the_batch_stays_as_it_was(items, monkeypatch):
    monkeypatch.setattr(pending, "BATCH_LIMIT", 10_000)
    with items.batch():
        items[b"a"] = bytes(6000)
        with pytest.raises(dbm_bitcask.error, match="10000 bytes"):
            items[b"b"] = bytes(6000)
        items[b"a"] = bytes(9000)  # in the place of the other
        with pytest.raises(dbm_bitcask.error):
            items[b"a"] = bytes(10_000)
        assert len(items[b"a"]) == 9000
    assert dict(items) == {**ITEMS, b"a": bytes(9000)}


def test_batch_larger_than_a_segment_has_a_segment_of_its_own(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        db.update(ITEMS)
        before = len(db._log.entries)
        changes = {b"%d" % number: bytes(500) for number in range(50)}
        with db.batch():
            db.update(changes)
        assert len(db._log.entries) == before + 1
        assert segment.FIRST_RECORD in {offset for offset, _ in frames(db)}
        assert dict(db) == {**ITEMS, **changes}
    assert check(path) == []


def test_wrong_types_are_refused_as_ever(items):
    with items.batch():
        with pytest.raises(TypeError):
            items[b"a"] = 1
        with pytest.raises(KeyError):
            del items[b"never there"]
        with pytest.raises(KeyError):
            items[b"never there"]


# Reads within the block.

keys = st.integers(0, 12).map(lambda number: b"key %d" % number)
operation = st.one_of(
    st.tuples(st.just("set"), keys, st.binary(max_size=30)),
    st.tuples(st.sampled_from(["pop", "get", "in", "popitem", "len", "walk", "nextkey"]), keys, st.none()),
    st.tuples(st.just("setdefault"), keys, st.binary(max_size=3)),
    st.tuples(st.just("update"), keys, st.binary(max_size=3)),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@given(blocks=st.lists(st.tuples(st.booleans(), st.lists(operation, max_size=12)), max_size=5))
def test_thread_sees_its_own_batch_as_if_it_was_written(place, blocks):
    model: dict[bytes, bytes] = {}
    with dbm_bitcask.open(place / "db", "n", segment_size=4096) as db:
        for fails, operations in blocks:
            after = dict(model)
            with contextlib.suppress(ZeroDivisionError), db.batch():
                for what, key, value in operations:
                    one_step(db, after, what, key, value)
                if fails:
                    raise ZeroDivisionError
            model = model if fails else after
            assert dict(db.items()) == model
            assert len(db) == len(model)
    assert check(place / "db") == []


def one_step(db, model, what, key, value):
    if what == "set":
        db[key] = model[key] = value
    elif what == "setdefault":
        assert db.setdefault(key, value) == model.setdefault(key, value)
    elif what == "update":
        db.update({key: value, b"other": value})
        model.update({key: value, b"other": value})
    elif what == "pop":
        assert db.pop(key, None) == model.pop(key, None)
    elif what == "get":
        assert db.get(key) == model.get(key)
    elif what == "in":
        assert (key in db) == (key in model)
    elif what == "len":
        assert len(db) == len(model)
    elif what == "popitem" and model:
        found, data = db.popitem()
        assert model.pop(found) == data
    elif what == "walk":
        assert sorted(db) == sorted(db.keys()) == sorted(model)
        assert dict(db.items()) == model
        assert sorted(db.values()) == sorted(model.values())
    elif what == "nextkey":
        met, here = [], db.firstkey()
        while here is not None:
            met.append(here)
            here = db.nextkey(here)
        assert sorted(met) == sorted(model)


def test_iteration_within_a_batch_meets_each_key_once_while_they_are_changed(items):
    with items.batch():
        items[b"new"] = b"1"
        met = []
        for key in items:
            met.append(key)
            items[key] = b"changed"
    assert sorted(met) == sorted([*ITEMS, b"new"])
    assert set(items.values()) == {b"changed"}


# Threads, processes and forks.


def test_batch_belongs_to_its_thread(items):
    with items.batch():
        items[b"key 1"] = b"mine"

        def other():
            seen.append(items[b"key 1"])
            items[b"key 2"] = b"other"
            with items.batch():
                items[b"key 3"] = b"batch of the other"
            items.sync()

        seen: list[bytes] = []
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [ITEMS[b"key 1"]]
        assert (items[b"key 1"], items[b"key 2"], items[b"key 3"]) == (b"mine", b"other", b"batch of the other")
    assert items[b"key 1"] == b"mine"


def test_many_threads_write_batches_at_the_same_time(db):
    def work(name):
        for turn in range(20):
            with db.batch():
                for number in range(15):
                    db[b"%d %d" % (name, number)] = b"%d" % turn
                    db[b"shared %d" % number] = b"%d" % name

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(db) == 75
    assert len({db[b"shared %d" % number] for number in range(15)}) == 1
    assert {db[b"%d %d" % (name, number)] for name in range(4) for number in range(15)} == {b"19"}


def test_batch_that_is_never_begun_because_of_an_interruption_keeps_nobody_from_another(items):
    entered = items.batch()
    entered.__enter__()
    del entered
    with items.batch():
        items[b"a"] = b"1"
    assert items[b"a"] == b"1"


def test_two_processes_write_batches_and_readers_see_none_torn_apart_in_the_end(path):
    dbm_bitcask.open(path).close()

    def work(name):
        with dbm_bitcask.open(path, "w", segment_size=20_000) as db:
            for turn in range(60):
                with db.batch():
                    for number in range(30):
                        db[b"shared %d" % number] = b"%d %d" % (name, turn)

    children = [fork(lambda name=name: work(name)) for name in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    with dbm_bitcask.open(path, "r") as db:
        assert len(db) == 30
        assert len(set(db.values())) == 1


def test_child_of_a_fork_is_in_no_batch_and_writes_nothing_of_it(items):
    with items.batch():
        items[b"a"] = b"1"

        def work():
            assert b"a" not in items
            items[b"child"] = b"direct"
            with items.batch():
                items[b"batch"] = items[b"of the child"] = b"1"

        fork_and_wait(work)
        assert items[b"child"] == b"direct"
    assert dict(items) == {**ITEMS, b"a": b"1", b"child": b"direct", b"batch": b"1", b"of the child": b"1"}


def test_child_of_a_fork_that_leaves_the_block_writes_nothing(items):
    def work():
        block.__exit__(None, None, None)
        assert dict(items) == ITEMS

    block = items.batch()
    block.__enter__()
    items[b"a"] = items[b"b"] = b"1"
    fork_and_wait(work)
    assert items[b"a"] == b"1"
    block.__exit__(None, None, None)
    assert dict(items) == {**ITEMS, b"a": b"1", b"b": b"1"}


# Crashes.


@pytest.mark.parametrize("published", range(6))
def test_reader_that_comes_when_the_writer_died_in_a_batch_sees_all_of_it(path, monkeypatch, published):
    """Redteam 16: it would see a half for ever if no writer came."""
    db = left_halfway(path, monkeypatch, published)
    monkeypatch.setattr(recovery, "is_alive", lambda _: False)
    abandon(db)
    before = active(path).read_bytes()
    with dbm_bitcask.open(path, "r") as reader:
        assert dict(reader) == AFTER
        assert len(reader) == len(AFTER)
        assert reader.get(b"new 3") == b"3" * 99
    assert active(path).read_bytes() == before
    with dbm_bitcask.open(path, "w") as writer:
        assert dict(writer) == AFTER


def test_reader_beside_a_writer_that_is_in_a_batch_shares_its_index(path, monkeypatch):
    db = left_halfway(path, monkeypatch)
    with dbm_bitcask.open(path, "r") as reader:
        assert reader._log.beside is None
        assert len(reader) == len(dict(reader)) == len(list(reader.items()))
    abandon(db)
    dbm_bitcask.open(path, "w").close()


@pytest.mark.parametrize("published", range(6))
def test_whoever_writes_next_finishes_the_batch(path, monkeypatch, published):
    with dbm_bitcask.open(path) as other:
        db = left_halfway(path, monkeypatch, published)
        other[b"next"] = b"1"
        assert dict(other) == dict(db) == {**AFTER, b"next": b"1"}
        assert len(other) == len(AFTER) + 1
        assert check(path) == []
        db.close()


def test_interrupted_batch_is_finished_before_the_exception_leaves(items, path, monkeypatch):
    def interrupt(*_, **__):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt), items.batch():
        apply(items, CHANGES)
    with dbm_bitcask.open(path, "r") as reader:
        assert dict(reader) == dict(items) == AFTER
    assert items._log.keydir.words[at.BATCH] == 0


def test_every_torn_frame_is_cut_as_a_whole(tmp_path):
    """Also where all records in it are whole: the frame is what says that they count."""
    path = tmp_path / "db"
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    with db.batch():
        apply(db, CHANGES)
    [(first, frame)] = frames(db)[1:]
    inner = [offset for offset, _ in records(db) if first < offset < frame.end]
    abandon(db)
    data = active(path).read_bytes()
    flipped = [data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :] for offset in (first, first + 9, first + 14, inner[2] + 20)]
    for number, torn in enumerate([*(data[:end] for end in [first + 8, *inner, frame.end - 1]), *flipped]):
        copy = tmp_path / str(number)
        shutil.copytree(path, copy)
        (copy / "keydir").unlink(missing_ok=True)
        (copy / active(path).name).write_bytes(torn)
        for flag in "rwrw":
            with dbm_bitcask.open(copy, flag) as db:
                assert dict(db) == ITEMS
                assert len(db) == len(ITEMS)
        assert check(copy) == []


def test_torn_frame_at_the_tail_is_cut_by_the_next_writer(path, monkeypatch):
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    size = active(path).stat().st_size
    half = files.File.write

    def write_half(self, data, offset):
        half(self, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(db._log.active), "write", write_half)
        with pytest.raises(dbm_bitcask.error), db.batch():
            apply(db, CHANGES)
    assert active(path).stat().st_size > size
    assert dict(db) == ITEMS
    db[b"next"] = b"1"
    assert dict(db) == {**ITEMS, b"next": b"1"}
    db.close()


def test_record_of_a_batch_that_goes_bad_while_a_half_is_published_takes_all_of_it(path, monkeypatch):
    """What was published of it must not stay alone."""
    db = left_halfway(path, monkeypatch)
    tail = db._log.keydir.counter(at.TAIL) & at.MASK32
    abandon(db)
    data = bytearray(active(path).read_bytes())
    data[tail + 20] ^= 1
    with active(path).open("r+b") as file:  # the same inode
        file.write(data)
    with dbm_bitcask.open(path, "w") as again:
        assert dict(again) == ITEMS
        assert len(again) == len(ITEMS)


def test_full_disk_is_found_before_anything_is_appended(path, monkeypatch):
    """Redteam 24: pages are split before the frame is written."""
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        size = active(path).stat().st_size
        full = {b"%d" % number: b"v" for number in range(20 * page.SLOTS)}
        with monkeypatch.context() as patch:

            def reserve(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(type(db._log.keydir.file), "reserve", reserve)
            patch.setattr(type(db._log.keydir.file), "grows", True, raising=False)
            with pytest.raises(dbm_bitcask.error) as failure, db.batch():
                db.update(full)
            assert failure.value.errno == errno.ENOSPC
        assert active(path).stat().st_size == size
        assert dict(db) == ITEMS
        db.update(full)
        assert len(db) == len(full) + len(ITEMS)


def test_batch_over_keys_that_are_there_splits_no_page(db):
    db.update({b"%d" % number: b"v" for number in range(1000)})
    pages = db._log.keydir.words[at.PAGES]
    db.update({b"%d" % number: b"w" for number in range(1000)})
    assert db._log.keydir.words[at.PAGES] == pages
    assert set(db.values()) == {b"w"}


@pytest.mark.parametrize("layer", ["native", "portable"])
def test_batches_of_every_mixture_leave_counts_that_are_right(tmp_path, layer):
    path, choose = tmp_path / "db", random.Random(1)
    model: dict[bytes, bytes] = {}
    with dbm_bitcask.open(path, files=layer, segment_size=100_000) as db:
        for turn in range(25):
            changes = {b"%d" % choose.randrange(3000): bytes(choose.randrange(60)) for _ in range(choose.randrange(1200))}
            changes |= dict.fromkeys(choose.sample(list(changes), len(changes) // 4))
            with db.batch():
                apply(db, changes)
            apply(model, changes)
            if turn == 12:
                db.clear()
                model.clear()
            assert len(db) == len(model)
        assert dict(db.items()) == model
    assert check(path, files=layer) == []


def test_writer_that_is_killed_leaves_each_batch_whole(path):
    """Really killed: every batch gives 400 keys the same value, and deletes or sets another 100."""
    dbm_bitcask.open(path).close()
    choose = random.Random(1)
    last = 0

    def work():
        os.close(read)
        with dbm_bitcask.open(path, "w", segment_size=300_000) as db:
            for number in itertools.count(last + 1):
                with db.batch():
                    for key in range(400):
                        db[b"%d" % key] = b"%d" % number
                    for key in range(100):
                        apply(db, {b"now and then %d" % key: b"%d" % number if number % 2 else None})
                os.write(write_end, b"%d\n" % number)

    for _ in range(8):
        read, write_end = os.pipe()
        child = fork(work)
        os.close(write_end)
        with os.fdopen(read, "rb") as acknowledgements:
            for _ in range(choose.randrange(1, 12)):
                acknowledged = int(acknowledgements.readline())
            time.sleep(choose.random() * 0.005)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = max([acknowledged, *map(int, acknowledgements.read().split())])
        for flag in "rw":
            with dbm_bitcask.open(path, flag) as db:
                found = dict(db)
                assert len(db) == len(found)
            assert len(set(found.values())) == 1
            last = int(found[b"0"])
            assert acknowledged <= last <= acknowledged + 1
            assert len(found) == (500 if last % 2 else 400)
        assert check(path) == []


@pytest.mark.parametrize("layer", ["native", "portable"])
def test_loop_of_popitem_over_small_batches_stays_linear(tmp_path, layer, monkeypatch):
    looked_at = []
    keys_of = walk.Held.keys
    monkeypatch.setattr(walk.Held, "keys", lambda self, first: (looked_at.append(1) or found for found in keys_of(self, first)))
    mapped = []
    monkeypatch.setattr(segment, "map_segment", lambda file, end: mapped.append(end) or file.map(end))
    with dbm_bitcask.open(tmp_path / "db", files=layer) as db:
        for number in range(300):
            db.update({b"%d a" % number: b"1", b"%d b" % number: b"2"})
        mapped.clear()
        for _ in range(600):
            db.popitem()
        assert len(looked_at) < 3000
        assert layer == "native" or len(mapped) < 10
        assert len(db) == 0


# Durability.


def test_batch_is_synced_once_where_every_write_waits(path, monkeypatch):
    with dbm_bitcask.open(path, sync="always") as db:
        db.update(ITEMS)
        syncs = []
        monkeypatch.setattr(type(db._log.active), "sync_contents", lambda _: syncs.append(1))
        with db.batch():
            apply(db, CHANGES)
        assert len(syncs) == 1
        words = db._log.keydir.words
        assert words[at.SYNCED_TO] == db._log.keydir.counter(at.TAIL)


@pytest.mark.parametrize("published", range(1, 6))
def test_sync_within_a_batch_that_is_being_published_vouches_for_what_is_before_it(path, monkeypatch, published):
    db = left_halfway(path, monkeypatch, published)
    frame = frames(db)[-1][0]
    db.sync()
    assert db._log.keydir.words[at.SYNCED_TO] & at.MASK32 == frame
    db[b"next"] = b"1"
    assert dict(db) == {**AFTER, b"next": b"1"}
    db.close()


def test_only_the_frame_says_that_all_before_it_was_synced(items):
    items.sync()
    with items.batch():
        apply(items, CHANGES)
    flags = [found.flags & SYNCED for _, found in records(items)]
    [(first, frame)] = frames(items)[1:]
    assert frame.flags & SYNCED
    assert not any(found.flags & SYNCED for offset, found in records(items) if offset > first)
    assert any(flags)


def test_backup_of_a_database_in_a_batch_takes_all_of_it_or_nothing(path, monkeypatch):
    db = left_halfway(path, monkeypatch)
    with dbm_bitcask.open(path, "r") as reader:
        reader.backup(path.parent / "copy")
    with dbm_bitcask.open(path.parent / "copy", "r") as copy:
        assert dict(copy) == ITEMS
    assert check(path.parent / "copy") == []
    abandon(db)
    dbm_bitcask.open(path, "w").close()


@pytest.mark.parametrize("published", range(6))
def test_check_finds_nothing_wrong_with_a_batch_that_is_unfinished(path, monkeypatch, published):
    db = left_halfway(path, monkeypatch, published)
    assert check(path) == []
    abandon(db)
    with dbm_bitcask.open(path, "w") as again:
        assert dict(again) == AFTER


def test_merge_takes_the_records_of_batches_as_others(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        for turn in range(20):
            with db.batch():
                for number in range(10):
                    db[b"key %d" % number] = b"%d" % turn * 20
                db[b"only %d" % turn] = b"1"
        before = dict(db)
        db.merge()
        assert dict(db) == before
        assert db.stats().log_bytes < 4000
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == before


# update


def test_update_takes_what_a_mapping_takes(db):
    class WithKeys:
        def keys(self):
            return iter(["a", "b"])

        def __getitem__(self, key):
            return key * 2

    db.update(WithKeys())
    db.update([("c", b"3"), (b"d", bytearray(b"4"))], e="5")
    db.update({"f": "6"}, g=b"7")
    db.update(h="8")
    db.update()
    db |= {"i": "9"}
    db |= [("j", memoryview(b"10"))]
    expected = {"a": "aa", "b": "bb", "c": "3", "d": "4", "e": "5", "f": "6", "g": "7", "h": "8", "i": "9", "j": "10"}
    assert dict(db) == {key.encode(): value.encode() for key, value in expected.items()}


def test_update_with_a_key_that_comes_twice_has_the_last_value(db):
    db.update([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")])
    assert dict(db) == {b"a": b"3", b"b": b"2"}


def test_update_is_cut_into_batches(db, monkeypatch):
    monkeypatch.setattr(database, "UPDATE_LIMIT", 1000)
    expected = {b"%d" % number: bytes(100) for number in range(30)} | {b"large": bytes(5000)} | {b"next": b"1", b"last": b"1"}
    db.update(expected)
    assert dict(db) == expected
    lengths = [record.record_length(BATCH, 0, len(found.value)) for _, found in frames(db)]
    assert len(lengths) > 3
    assert max(lengths) <= 1000 + HEADER.size


def test_update_that_fails_in_the_middle_leaves_whole_batches(db, monkeypatch):
    monkeypatch.setattr(database, "UPDATE_LIMIT", 1000)

    def pairs():
        for number in range(25):
            yield b"%d" % number, bytes(100)
        yield b"last", 1

    with pytest.raises(TypeError):
        db.update(pairs())
    assert 0 < len(db) < 25
    assert set(db) == {b"%d" % number for number in range(len(db))}


@pytest.mark.parametrize("limit", [1000, 2**24])
def test_update_from_the_database_itself(db, monkeypatch, limit):
    monkeypatch.setattr(database, "UPDATE_LIMIT", limit)
    db.update({b"%d" % number: b"v%d" % number for number in range(100)})
    db.update((key, value * 2) for key, value in db.items())
    db.update(db)
    assert dict(db) == {b"%d" % number: b"v%d" % number * 2 for number in range(100)}


@pytest.mark.usefixtures("items")
def test_update_of_a_reader_is_an_error(path):
    with dbm_bitcask.open(path, "r") as reader, pytest.raises(dbm_bitcask.error):
        reader.update({})


# Shelves


def test_shelf_writes_back_in_one_batch(path):
    with dbm_bitcask.open_shelf(path, writeback=True) as shelf:
        shelf.update({f"{number}": [number] for number in range(20)})
        for value in shelf.values():
            value.append("changed")
        before = len(frames(shelf.dict))
        shelf.sync()
        assert len(frames(shelf.dict)) == before + 1
        assert shelf.cache == {}
        assert shelf.writeback
        assert shelf["7"] == [7, "changed"]


def test_shelf_that_cannot_serialize_a_value_writes_nothing_back(path):
    with dbm_bitcask.open_shelf(path, writeback=True) as shelf:
        shelf["a"], shelf["b"] = [1], [2]
        shelf.sync()
        shelf["a"].append("changed")
        shelf["b"].append(lambda: None)
        with pytest.raises(Exception, match="lambda"):
            shelf.sync()
        assert shelf.dict.get(b"a") == shelf._dumped([1])
        shelf["b"].pop()
        shelf.sync()
        assert shelf["a"] == [1, "changed"]


def test_shelf_writes_back_within_no_batch(path):
    with dbm_bitcask.open_shelf(path, writeback=True) as shelf:
        shelf["a"] = [1]
        with shelf.dict.batch():
            with pytest.raises(dbm_bitcask.error, match="leave the batch first"):
                shelf.sync()
            assert shelf.cache
        shelf.sync()


# With a time to live, and compressed


def test_batch_holds_keys_that_expire(db, monkeypatch):
    clock = [10**18]
    monkeypatch.setattr(expiry, "time_ns", lambda: clock[0])
    db[b"plain"] = b"value"
    with db.batch():
        db.set(b"session", b"ada", ttl=60)
        db.touch(b"plain", 30)
        db.set(b"short", b"gone soon", ttl=1)
        assert (db.ttl(b"session"), db.ttl(b"plain")) == (60, 30)
        clock[0] += 2 * 10**9
        assert b"short" not in db
        assert db.get(b"short") is None
        with pytest.raises(KeyError):
            db.ttl(b"absent")
        with pytest.raises(KeyError):
            db.touch(b"absent", 5)
    assert (db.ttl(b"session"), db.ttl(b"plain")) == (58, 28)
    assert dict(db) == {b"session": b"ada", b"plain": b"value"}
    words, row = db._log.keydir.words, db._log.rows[db._log.manifest.active.id]
    assert expiry.expired_bytes(words, row, (10**18 + 61 * 10**9) // 10**6) > 0
    clock[0] += 40 * 10**9
    assert dict(db) == {b"session": b"ada"}
    before = len(db)  # which counts what has expired
    with db.batch():
        db[b"plain"] = b"again"
        assert len(db) == before
    assert len(db) == before


def test_batch_and_update_compress_what_they_write(path):
    text = b"the same again and again " * 200
    with dbm_bitcask.open(path, compress="zlib") as db:
        with db.batch():
            db[b"one"] = text
            db[b"two"] = b"short"
            assert db[b"one"] == text
        db.update({b"three": text, b"four": text})
        assert db.stats().log_bytes < len(text)
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"one": text, b"two": b"short", b"three": text, b"four": text}


def test_batches_pay_for_the_merge(path):
    with dbm_bitcask.open(path, segment_size=64 * 1024) as db:
        for turn in range(100):
            db.update({b"key %d" % number: b"%d " % turn * 300 for number in range(60)})
        assert db.stats().reclaimed_bytes > 10 * 64 * 1024
        assert db.stats().log_bytes < 5 * 60 * 1000


# In doubt, after a sync that failed


def fail_to_sync(db):
    def fail():
        raise OSError(errno.EIO, "the disk does not answer")

    with pytest.raises(OSError, match="does not answer"):
        db._log.durable(fail)
    abandon(db)


def batches_on_disk(path):
    """The keys of each batch in the newest segment with records, and those that stand in none."""
    for file in sorted(path.glob("*.data"), reverse=True):
        data = file.read_bytes()
        salt = int.from_bytes(data[16:24], "little")
        found = list(segment.scan(data, salt, segment.FIRST_RECORD, len(data)))
        if found:
            batches = [one for one in found if one.record.flags & BATCH]
            inner = [[kept.record.key for kept in segment.scan(data, salt, one.offset + HEADER.size, one.record.end)] for one in batches]
            return inner, [one.record.key for one in found if one.record.key]
    return [], []


def test_batch_that_is_in_doubt_is_written_again_as_a_batch(path):
    """Record by record, a power cut within that would leave a half of it."""
    db = dbm_bitcask.open(path, merge="manual")
    db.update({b"1": b"old", b"2": b"old", b"gone": b"old"})
    db.sync()
    db[b"before"] = b"value"
    with db.batch():
        db[b"1"], db[b"3"] = b"new", b"new"
        del db[b"gone"]
    db[b"2"] = b"behind"
    fail_to_sync(db)
    with dbm_bitcask.open(path, "w") as db:
        assert dict(db) == {b"1": b"new", b"2": b"behind", b"3": b"new", b"before": b"value"}
        assert len(db) == 4
        inner, single = batches_on_disk(path)
        assert inner == [[b"1", b"3", b"gone"]]
        assert single == [b"before", b"2"]
    for file in [path / "keydir", *path.glob("*.hint")]:
        file.unlink(missing_ok=True)
    assert dict(dbm_bitcask.open(path, "r")) == {b"1": b"new", b"2": b"behind", b"3": b"new", b"before": b"value"}


def test_bytes_of_a_batch_that_expire_are_noted_before_it_is_published(db, monkeypatch):
    """Of a writer that died in between, nobody knew that they would; so their space never came back."""

    class Died(BaseException):
        pass

    def die(*_):
        raise Died

    monkeypatch.setattr(batch, "_publish", die)
    with pytest.raises(Died), db.batch():
        db.set(b"1", b"." * 500, ttl=1)
        db.set(b"2", b"." * 500, ttl=1)
    monkeypatch.undo()
    words, row = db._log.keydir.words, db._log.rows[db._log.manifest.active.id]
    assert expiry.expired_bytes(words, row, expiry.now() + 10_000) > 1000
