"""Merging gives back space, and never changes what is in the database."""

from __future__ import annotations

import pytest

import dbm_bitcask
from crashes import freeze, require_same_without_keydir
from dbm_bitcask.engine import rotation, segment
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.record import TOMBSTONE

TINY = 4096


@pytest.fixture
def options():
    return {"segment_size": TINY, "merge": "manual"}


def fill(db, numbers, turn=0, size=300):
    for number in numbers:
        db[b"key %d" % number] = b"%d %d " % (turn, number) * (size // 6)


def segments(path):
    return {file.name for file in path.glob("*.data")}


def records(path):
    """(flags, key) of every record on the disk, oldest first."""
    for file in sorted(path.glob("*.data")):
        data = file.read_bytes()
        salt = int.from_bytes(data[16:24], "little")
        for found in segment.scan(data, salt, segment.FIRST_RECORD, len(data)):
            yield found.record.flags, found.record.key


def tombstones(path):
    return [key for flags, key in records(path) if flags & TOMBSTONE]


# Space


def test_merge_gives_back_the_space_of_what_was_overwritten(db, path):
    for turn in range(10):
        fill(db, range(20), turn)
    expected, before = dict(db), db.stats()
    result = db._store.merge()
    after = db.stats()
    assert dict(db) == expected
    assert after.log_bytes < before.log_bytes / 5
    assert after.live_bytes == before.live_bytes
    assert after.dead_bytes < after.log_bytes / 10
    assert result.reclaimed == before.log_bytes - after.log_bytes
    assert sum((path / name).stat().st_size for name in segments(path)) == after.log_bytes


def test_merge_gives_back_the_space_of_what_was_deleted(db, path):
    fill(db, range(100))
    for number in range(100):
        del db[b"key %d" % number]
    db.reorganize()
    assert dict(db) == {}
    assert tombstones(path) == []
    assert db.stats().log_bytes < TINY


def test_merge_gives_back_what_is_dead_in_the_active_segment_too(db, path):
    for turn in range(5):
        fill(db, range(2), turn)
    assert len(segments(path)) == 1
    db.reorganize()
    assert sum((path / name).stat().st_size for name in segments(path)) < 3 * 350
    assert db.stats().dead_bytes == 0


def test_merge_takes_the_files_away(db, path):
    for turn in range(10):
        fill(db, range(20), turn)
        db._store._write_hints()
    before = segments(path)
    hints = {file.name for file in path.glob("*.hint")}
    assert len(hints) > 5
    db.reorganize()
    assert segments(path) & before <= {max(before)}  # the active one was mostly live
    assert not {file.name for file in path.glob("*.hint")} & hints


def test_merge_of_nothing_does_nothing(db, path):
    before = freeze(path)
    assert db._store.merge() == (0, 0)
    assert {name: data for name, data in freeze(path).items() if name != "keydir"} == {
        name: data for name, data in before.items() if name != "keydir"
    }


def test_live_segments_are_left_alone(db, path):
    fill(db, range(200))
    before = segments(path)
    db.reorganize()
    assert segments(path) >= before - {max(before)}


def test_segments_that_are_mostly_live_are_left_alone(db, path):
    fill(db, range(100), size=30)
    big = {name for name in segments(path) if name != max(segments(path))}
    db[b"key 0"] = b"the only one that is dead"
    db.reorganize()
    assert big & segments(path)


def test_second_merge_does_nothing(db, path):
    for turn in range(5):
        fill(db, range(40), turn)
    db.reorganize()
    before = segments(path)
    expected = dict(db)
    assert db._store.merge().segments == 0
    assert segments(path) == before
    assert dict(db) == expected


def test_second_merge_does_nothing_although_tombstones_have_to_stay(db, path):
    """Redteam 23: tombstones over a cold segment would be moved by every merge for ever."""
    fill(db, range(200))
    fill(db, range(1000, 1050), size=6)
    for number in range(1000, 1050):
        del db[b"key %d" % number]
    db.reorganize()
    before = segments(path)
    db.reorganize()
    assert segments(path) == before


def test_small_segments_are_joined(path):
    for number in range(12):
        with dbm_bitcask.open(path, "c", segment_size=TINY * (1 + number % 2)) as db:
            fill(db, range(number * 3, number * 3 + 3))
            db._store.locked(rotation.rotate)
    expected_keys = {b"key %d" % number for number in range(36)}
    assert len(segments(path)) == 13
    with dbm_bitcask.open(path, "w") as db:
        expected = dict(db)
        db.reorganize()
        assert dict(db) == expected
        assert expected.keys() == expected_keys
    assert len(segments(path)) <= 3
    require_same_without_keydir(path, expected)


# What is in it


def test_merge_keeps_every_key(db, path):
    for turn in range(4):
        fill(db, range(turn, 60, turn + 1), turn)
    for number in range(0, 60, 7):
        del db[b"key %d" % number]
    db[b""] = b"empty key"
    db[b"empty value"] = b""
    db[b"large"] = bytes(3 * TINY)
    expected = dict(db)
    for _ in range(3):
        db.reorganize()
        assert dict(db) == expected
        assert {key: db[key] for key in expected} == expected
        assert len(db) == len(expected)
        assert check(path) == []
        db[b"key 1"] = expected[b"key 1"] = b"overwritten"
    db.close()
    require_same_without_keydir(path, expected)


def test_merged_database_takes_new_keys(db, path):
    fill(db, range(50))
    fill(db, range(50), turn=1)
    db.reorganize()
    fill(db, range(100), turn=2)
    expected = dict(db)
    assert len(db) == 100
    db.close()
    require_same_without_keydir(path, expected)


def test_values_read_before_and_after_are_the_same_for_a_reader_that_is_open(db, path):
    fill(db, range(50))
    fill(db, range(0, 50, 2), turn=1)
    with dbm_bitcask.open(path, "r") as reader:
        expected = dict(reader)
        db.reorganize()
        assert dict(reader) == expected == dict(db)


def test_order_of_the_log_stays_the_only_order(db, path):
    """An old value that is moved to the tail must not come over a newer one, whichever segment is merged."""
    fill(db, range(30))
    fill(db, range(0, 30, 2), turn=1)
    fill(db, range(0, 30, 3), turn=2)
    expected = dict(db)
    db.reorganize()
    fill(db, range(0, 30, 5), turn=3)
    expected.update({b"key %d" % number: db[b"key %d" % number] for number in range(0, 30, 5)})
    db.reorganize()
    db.close()
    require_same_without_keydir(path, expected)


# Tombstones


@pytest.fixture
def deleted(path):
    """A key in a segment that is not worth merging, deleted in one that is; the key is not in the keydir any more."""
    with dbm_bitcask.open(path, "c", segment_size=TINY, merge="manual") as db:
        fill(db, range(11), size=300)
        db[b"victim"] = b"the old value"
        while len(segments(path)) < 2:
            db[b"filler %d" % len(db)] = b""
        del db[b"victim"]
        for turn in range(20):
            fill(db, range(100, 103), turn)
        assert b"victim" not in db
    return path


def test_tombstone_stays_while_the_value_that_it_deletes_is_still_there(deleted):
    with dbm_bitcask.open(deleted, "w", segment_size=TINY) as db:
        before = segments(deleted)
        expected = dict(db)
        db.reorganize()
        assert "00000001.data" in segments(deleted)  # the one with the old value
        assert "00000002.data" in before - segments(deleted)  # the one with the tombstone
        assert b"victim" not in db
    assert b"victim" in [key for flags, key in records(deleted) if not flags & TOMBSTONE]
    assert tombstones(deleted) == [b"victim"]
    require_same_without_keydir(deleted, expected)


def test_tombstone_stays_through_merge_after_merge(deleted):
    with dbm_bitcask.open(deleted, "w", segment_size=TINY) as db:
        for turn in range(4):
            for again in range(20):
                fill(db, range(100, 103), 100 * turn + again)
            db.reorganize()
            assert b"victim" not in db
        expected = dict(db)
    assert tombstones(deleted) == [b"victim"]
    require_same_without_keydir(deleted, expected)


def test_tombstone_goes_when_the_value_goes(deleted):
    with dbm_bitcask.open(deleted, "w", segment_size=TINY) as db:
        for number in range(11):
            db[b"key %d" % number] = b""
        for _ in range(3):
            db.reorganize()
        expected = dict(db)
    assert "00000001.data" not in segments(deleted)
    assert tombstones(deleted) == []
    require_same_without_keydir(deleted, expected)


def test_tombstone_of_a_key_that_was_set_again_is_not_moved(deleted):
    with dbm_bitcask.open(deleted, "w", segment_size=TINY) as db:
        db[b"victim"] = b"the new value"
        db.reorganize()
        expected = dict(db)
        assert expected[b"victim"] == b"the new value"
    assert tombstones(deleted) == []
    require_same_without_keydir(deleted, expected)


# Damage


@pytest.mark.parametrize("keydir", [True, False], ids=["keydir", "no keydir"])
def test_damaged_segment_is_kept(path, keydir):
    with dbm_bitcask.open(path, "c", segment_size=TINY) as db:
        for turn in range(2):
            fill(db, range(40), turn)
        with dbm_bitcask.open(path, "r") as reader:
            location = reader._log.find(b"key 5")
    file = path / f"{location >> 32:08d}.data"
    good = file.read_bytes()
    bad = bytearray(good)
    bad[(location & 0xFFFFFFFF) + 60] ^= 1
    file.write_bytes(bad)
    if not keydir:
        (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "w", segment_size=TINY) as db:
        db.reorganize()
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[b"key 5"]
        assert file.name in segments(path)
        assert file.read_bytes() == bytes(bad)
        assert db[b"key 39"].startswith(b"1 39 ")
    file.write_bytes(good)
    require_same_without_keydir(path, {b"key %d" % number: b"1 %d " % number * 50 for number in range(40)})


# Progress


def test_progress_is_told_in_bytes_up_to_the_total(db):
    for turn in range(5):
        fill(db, range(40), turn)
    told = []
    db.merge(lambda done, total: told.append((done, total)))
    totals = {total for _, total in told}
    assert len(totals) == 1
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == totals.pop()


def test_progress_of_a_large_segment_is_told_more_than_once(path):
    with dbm_bitcask.open(path, "c") as db:
        fill(db, range(2000), size=12)
        fill(db, range(0, 2000, 2), turn=1, size=12)
        told = []
        db.merge(lambda *progress: told.append(progress))
        assert len(told) > 5


def test_failing_progress_stops_the_merge_and_leaves_a_whole_database(db, path):
    for turn in range(5):
        fill(db, range(40), turn)
    expected = dict(db)

    def fail(_done, _total):
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            db.merge(fail)
        assert dict(db) == expected
        assert check(path) == []
    db.merge()
    assert dict(db) == expected


def test_database_can_be_changed_by_the_progress_callback(db, path):
    for turn in range(5):
        fill(db, range(40), turn)
    expected = dict(db)

    def change(done, _total):
        db[b"key %d" % (done % 40)] = expected[b"key %d" % (done % 40)] = b"changed meanwhile"
        db.pop(b"key %d" % (done % 41), None)
        expected.pop(b"key %d" % (done % 41), None)

    db.merge(change)
    assert dict(db) == expected
    db.close()
    require_same_without_keydir(path, expected)
