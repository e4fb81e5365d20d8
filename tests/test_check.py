"""What `check` says of an index that does not fit the log, and what it costs."""

from __future__ import annotations

import tracemalloc

import pytest

import dbm_bitcask
from crashes import abandon
from dbm_bitcask.engine import contents, files, hint, rotation
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory
from dbm_bitcask.engine.header import PAGE_WORDS
from dbm_bitcask.engine.page import DELETED, PAGE_COUNTS, PAGE_DEPTH, key_hash, probe


@pytest.fixture
def db(tmp_path):
    """Two segments, with a key that was overwritten, one that was deleted, and others. Its process is killed by `complaints`."""
    db = dbm_bitcask.open(tmp_path / "db", "c")
    for number in range(9):
        db[b"key %d" % number] = b"older"
    db[b"deleted"] = b"x"
    db._store.locked(rotation.rotate)
    db[b"overwritten"] = b"older"
    db[b"key 1"] = db[b"overwritten"] = b"newer"
    del db[b"deleted"]
    db[b"key 2"] = b"newest"
    return db


@pytest.fixture
def keydir(db):
    return db._store.log.keydir


@pytest.fixture
def complaints(db, tmp_path):
    def complaints():
        abandon(db)
        return [problem.message for problem in check(tmp_path / "db")]

    return complaints


def slot_of(keydir, key):
    return probe(keydir.table, key_hash(key, keydir.table.seed)).found[0]


def page_of(keydir):
    """The page of most keys."""
    return probe(keydir.table, key_hash(b"key 0", keydir.table.seed)).page


def test_index_that_fits_the_log_is_no_problem(complaints):
    assert complaints() == []


def test_key_without_a_slot_is_found(keydir, complaints):
    slot = slot_of(keydir, b"key 1")
    location = keydir.words[slot]
    keydir.store(slot, keydir.words[slot - 1], 0)
    assert complaints() == [f"no slot points at 00000002.data offset {location & at.MASK32}, the newest record of its key"]


@pytest.mark.parametrize("again", [False, True])
def test_deleted_key_has_no_slot(db, keydir, complaints, again):
    hashed = key_hash(b"deleted", keydir.table.seed)
    if again:
        db[b"deleted"] = b"set again"
        del db[b"deleted"]
    [location] = [key.offset for key in contents_of(db, 1) if key.key == b"deleted"]
    keydir.store(keydir.room(hashed).free, hashed, 1 << 32 | location)
    assert complaints() == [f"a slot points at 00000001.data offset {location}, which is not the newest record of a key"]


def contents_of(db, number):
    log = db._store.log
    data, _, _ = log.bytes_at(number << 32 | 32)
    entry = log.entries[number]
    return list(contents.Reading(data, entry, entry.length).keys())


def test_slot_that_points_at_an_older_record_is_found(db, keydir, complaints):
    slot = slot_of(keydir, b"key 1")
    newest = keydir.words[slot]
    [older] = [key.offset for key in contents_of(db, 1) if key.key == b"key 1"]
    keydir.words[slot] = 1 << 32 | older
    assert complaints() == [
        f"a slot points at 00000001.data offset {older}, which is not the newest record of a key",
        f"no slot points at 00000002.data offset {newest & at.MASK32}, the newest record of its key",
    ]


def test_slot_that_points_between_records_is_found(keydir, complaints):
    slot = slot_of(keydir, b"key 1")
    keydir.words[slot] += 8
    assert complaints() == [
        "it has 10 slots, and the log 9 records that they point at",
        f"a slot points at 00000002.data offset {keydir.words[slot] & at.MASK32}, which is no record of its key",
    ]


def test_two_slots_of_one_record_are_found(keydir, complaints):
    slot = slot_of(keydir, b"key 1")
    hashed, location = keydir.words[slot - 1], keydir.words[slot]
    keydir.store(keydir.room(hashed).free, hashed, location)
    assert complaints() == ["it has 11 slots, and the log 10 records that they point at"]


def test_wrong_counters_are_found(keydir, complaints):
    words, row = keydir.words, keydir.rows()[1]
    words[words[at.CURRENT] + at.COUNT] += 1
    words[row + at.ROW_DEAD] += 8
    count, bytes_of_segment = complaints()
    assert count == "it counts 11 keys, and the log has 10"
    assert bytes_of_segment.startswith("segment 1 counts ")


def test_page_that_is_wrong_about_itself_is_found(keydir, complaints):
    words, base = keydir.words, page_of(keydir) * PAGE_WORDS
    words[base + PAGE_COUNTS] += DELETED
    words[base + PAGE_DEPTH] ^= 1 << 31
    assert complaints() == ["the counts of a page are not those of its slots", "a page is deeper than the directory"]


@pytest.mark.parametrize("change", [lambda keys: keys[1:], lambda keys: keys[:-1], lambda keys: [*keys[:3], *keys[4:]]])
def test_hint_that_does_not_list_all_keys_is_found(db, complaints, tmp_path, change):
    entry = db._store.log.entries[1]
    writer = hint.HintWriter(entry)
    body = writer.body(change(contents_of(db, 1)))
    (tmp_path / "db" / "00000001.hint").write_bytes(writer.head() + body + writer.checksum())
    assert contents.mapped_hint(Directory(str(tmp_path / "db")), entry) is not None
    assert complaints() == ["the hint does not list the keys of its segment; delete it"]


def test_memory_does_not_grow_with_the_keys(tmp_path, monkeypatch):
    """Whether they are there, overwritten or deleted."""
    monkeypatch.setattr(files, "_fdatasync", lambda _: None)
    taken = []
    for count in (1000, 8000):
        path = tmp_path / str(count)
        with dbm_bitcask.open(path, "c") as db:
            for number in [*range(count), *range(0, count, 3)]:
                db[b"key %d" % number] = b"value"
            for number in range(0, count, 2):
                del db[b"key %d" % number]
            db._store.locked(rotation.rotate)
        tracemalloc.start()
        try:
            assert check(path) == []
            taken.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert taken[1] < taken[0] + 7000 * 8, taken
