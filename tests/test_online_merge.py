"""Space comes back without anybody asking for it: those who write clean the log, a slice at a time."""

from __future__ import annotations

import errno
import random
import threading
from time import monotonic, sleep

import pytest

import crashes
import dbm_bitcask
from children import run_python
from crashes import require_same_without_keydir
from dbm_bitcask.engine import files, merge, recovery, rotation
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check

SMALL = 64 * 1024


@pytest.fixture
def options():
    return {"segment_size": SMALL}


@pytest.fixture
def every_write_pays(monkeypatch):
    crashes.every_write_pays(monkeypatch)


def fill(db, numbers, turn=0, size=1000):
    for number in numbers:
        db[b"key %d" % number] = value(number, turn, size)


def value(number, turn, size=1000):
    return (b"%d %d " % (turn, number)).ljust(size, b".")


def disk_bytes(path):
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


def log_bytes(path):
    return sum(file.stat().st_size for file in path.glob("*.data"))


# Space


@pytest.mark.parametrize("pattern", ["one after the other", "at random", "mostly the same ones"])
def test_overwrites_do_not_grow_the_log_without_bound(db, path, pattern):
    source = random.Random(pattern)
    live = 500 * 1016
    largest = 0
    fill(db, range(500))
    for turn in range(1, 15_000):
        number = turn % 500
        if pattern != "one after the other":
            number = source.randrange(50 if pattern == "mostly the same ones" and source.random() < 0.9 else 500)
        db[b"key %d" % number] = value(number, turn)
        largest = max(largest, log_bytes(path)) if turn % 50 == 0 else largest
    assert largest < 2.5 * live
    assert db.stats().reclaimed_bytes > 10 * live
    assert {key: data.split()[1] for key, data in db.items()} == {b"key %d" % n: b"%d" % n for n in range(500)}


@pytest.mark.usefixtures("every_write_pays")
def test_deleting_everything_gives_the_space_back(db, path):
    fill(db, range(2000), size=300)
    before = log_bytes(path)
    for number in range(2000):
        del db[b"key %d" % number]
    assert log_bytes(path) < before / 2
    assert dict(db) == {}


def test_manual_merge_is_left_to_the_user(path):
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        for turn in range(30):
            fill(db, range(100), turn)
        assert db.stats().merged_at is None
        assert log_bytes(path) > 30 * 100 * 1000
        db.reorganize()
        assert log_bytes(path) < 2 * 100 * 1000
        assert db.stats().merged_at is not None


@pytest.mark.usefixtures("every_write_pays")
def test_one_handle_cleans_for_another_that_does_not(path):
    with (
        dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as careless,
        dbm_bitcask.open(path, segment_size=SMALL) as careful,
    ):
        for turn in range(10):
            fill(careless, range(200), turn)
            fill(careful, range(10), turn)
        assert careful.stats().reclaimed_bytes > 0
        expected = {b"key %d" % number: value(number, 9) for number in range(200)}
        assert dict(careful) == dict(careless) == expected


SCRIPT = """
import sys, dbm_bitcask
path, turn = sys.argv[1], int(sys.argv[2])
for script in range(turn * 50, turn * 50 + 50):
    with dbm_bitcask.open(path, segment_size=65536) as db:
        for number in range(20):
            db[b"key %d" % number] = (b"%d " % script).ljust(1000, b".")
"""


def test_short_scripts_continue_each_others_merge(path):
    largest = 0
    for turn in range(4):
        run_python(SCRIPT, path, turn)
        largest = max(largest, disk_bytes(path))
    assert largest < 2**20
    with dbm_bitcask.open(path, "r") as db:
        assert {data.split()[0] for data in db.values()} == {b"199"}  # and four megabytes were written


@pytest.mark.usefixtures("every_write_pays")
def test_next_process_goes_on_at_the_cursor(path, monkeypatch):
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        for turn in range(3):
            fill(db, range(200), turn)
    monkeypatch.setattr(merge, "_LONGEST", 0)  # not a record in time
    with dbm_bitcask.open(path, "w", segment_size=SMALL) as db:
        db[b"key 0"] = b"a write that pays"
        started = db._log.keydir.words[at.MERGE_CURSOR]
        assert started >> 32 in db._log.entries
    monkeypatch.setattr(merge, "_LONGEST", 60)
    seen = []
    clean = merge._clean_slice
    monkeypatch.setattr(merge, "_clean_slice", lambda log, victim, *rest: seen.append(victim.id) or clean(log, victim, *rest))
    with dbm_bitcask.open(path, "w", segment_size=SMALL) as db:
        db[b"key 0"] = b"another one"
        assert seen[0] == started >> 32


def test_cleaned_segments_go_with_the_next_rotation_at_no_price(db, path, monkeypatch):
    for turn in range(6):
        fill(db, range(100), turn)
    monkeypatch.setattr(merge, "_drop_if_many", lambda _log: None)
    store, log = db._store, db._log
    victim = log.manifest.segments[0]
    offset = 32
    while 0 < offset < victim.length:
        offset = store.locked(merge._clean_slice, victim, offset)
    assert rotation.cleaned(log) == {victim.id}
    number = log.manifest.number
    store.locked(rotation.rotate)
    assert log.manifest.number == number + 1
    assert victim.id not in log.entries
    assert not (path / f"{victim.id:08x}.data").exists() or victim.id not in log.entries


@pytest.mark.usefixtures("every_write_pays")
def test_active_segment_that_is_mostly_dead_is_sealed_early(path, monkeypatch):
    monkeypatch.setattr(merge, "_WORTH_WRITING", SMALL)
    with dbm_bitcask.open(path) as db:  # segments of 64 MiB
        for turn in range(50):
            fill(db, range(10), turn)
        assert db.stats().segments <= 3
        assert log_bytes(path) < 4 * SMALL
        assert {number: db[b"key %d" % number] for number in range(10)} == {number: value(number, 49) for number in range(10)}


def test_thread_cleans_while_the_process_is_idle(path):
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        fill(db, range(300))
        fill(db, range(0, 300, 3), turn=1)  # a third is dead: nothing that a writer would clean
    with dbm_bitcask.open(path, "w", segment_size=SMALL, merge="thread") as db:
        expected = dict(db)
        deadline = monotonic() + 30
        while db.stats().reclaimed_bytes == 0 and monotonic() < deadline:
            sleep(0.05)
        assert db.stats().reclaimed_bytes > 0
        assert dict(db) == expected
        names = {thread.name for thread in threading.enumerate()}
        assert "dbm_bitcask merge" in names
    sleep(0.3)
    assert "dbm_bitcask merge" not in {thread.name for thread in threading.enumerate()}


def test_space_comes_back_while_a_reader_is_open(db, path):
    fill(db, range(300))
    with dbm_bitcask.open(path, "r") as reader:
        dict(reader)
        for turn in range(1, 20):
            fill(db, range(300), turn)
            assert reader[b"key 7"] == value(7, turn)
        listed = set(db._log.entries)
        assert set(reader._log.segments) <= listed
        assert log_bytes(path) < 3 * 300 * 1016


@pytest.mark.parametrize("keys", [20, 2000, 30_000])
def test_updates_do_not_outgrow_the_merge(path, keys):
    """A batch makes as many bytes dead as very many writes, and has to pay as much."""
    with dbm_bitcask.open(path, segment_size=2**20) as db:
        for turn in range(1, 3 + 150_000 // keys):
            db.update({b"%d" % number: b"%d" % turn * 20 for number in range(keys)})
        assert log_bytes(path) < 3 * db.stats().live_bytes + 2**22
        assert db[b"7"] == b"%d" % turn * 20


@pytest.mark.usefixtures("every_write_pays")
@pytest.mark.parametrize("by_hand", [False, True], ids=["online", "all at once"])
def test_record_that_is_larger_than_a_segment_is_never_moved_only_dropped(db, monkeypatch, by_hand):
    """Redteam 35: copying it would take the lock for as long as that takes."""
    monkeypatch.setattr(merge, "_TOO_LARGE", 0)
    db[b"large"] = b"." * 2 * SMALL
    first = db._log.manifest.active.id
    for number in range(3000):  # so many tombstones that all that is older is worth moving
        db[b"%d" % number] = b""
        del db[b"%d" % number]
    if by_hand:
        db.reorganize()
    assert first in db._log.entries
    assert db[b"large"] == b"." * 2 * SMALL
    before = db.stats().copied_bytes
    db[b"large"] = b"small"
    fill(db, range(80))
    fill(db, range(80), turn=1)
    if by_hand:
        db.reorganize()
    assert first not in db._log.entries
    assert db.stats().copied_bytes - before < 2 * SMALL
    assert db[b"large"] == b"small"


# What is in it


@pytest.mark.usefixtures("every_write_pays")
def test_everything_is_there_while_every_write_cleans(db, path):
    source = random.Random(4)
    model = {}
    for turn in range(4000):
        key = b"key %d" % source.randrange(150)
        if key in model and source.random() < 0.3:
            del db[key], model[key]
        else:
            db[key] = model[key] = value(turn, turn, source.randrange(1500))
        if turn % 400 == 0:
            assert dict(db) == model
    assert dict(db) == model
    assert len(db) == len(model)
    assert db.stats().reclaimed_bytes > 2**20
    db.close()
    require_same_without_keydir(path, model)


@pytest.mark.usefixtures("every_write_pays")
def test_walk_meets_every_key_once_while_they_are_moved(db):
    fill(db, range(300))
    fill(db, range(0, 300, 2), turn=1)
    met = []
    for number, key in enumerate(db):
        met.append(key)
        fill(db, [300 + number % 50], turn=number)  # which nobody has to meet
    assert sorted(key for key in met if int(key[4:]) < 300) == sorted(b"key %d" % number for number in range(300))
    assert len(met) == len(set(met))


@pytest.mark.usefixtures("every_write_pays")
def test_tombstones_of_older_segments_stay(db, path):
    """Only the segment of the tombstone is cleaned, and not that of the value."""
    fill(db, range(60))
    del db[b"key 3"]
    for turn in range(60):
        fill(db, range(100, 110), turn)
    expected = dict(db)
    assert "key 3" not in db
    db.close()
    require_same_without_keydir(path, expected)


def test_keydir_that_is_made_anew_within_a_merge_brings_nothing_back(path):
    """The first segment was cleaned but is still listed, and the second was looked at behind it: then nothing says so any more."""
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        db[b"victim"] = b"the old value"
        fill(db, range(62))
        db._store.locked(rotation.rotate)
        fill(db, range(100, 130))
        del db[b"victim"]
        fill(db, range(200, 230))
        db._store.locked(rotation.rotate)
        fill(db, range(300))
        first, second = db._log.manifest.segments[:2]

        def clean(victim, offset, limit=10**6):
            return db._store.locked(merge._clean_slice, victim, offset, limit)

        assert clean(first, 32) == first.length
        keydir = db._log.keydir
        offset = clean(second, 32, 40)  # the tombstone is left, for the value goes before it
        assert offset < second.length
        db._store.locked(lambda log: recovery.rebuild(log))
        while offset < second.length:
            offset = db._store.locked(merge._clean_next, second, offset, keydir)
            keydir = db._log.keydir
        db._store.locked(merge._drop_cleaned)
        assert second.id not in db._log.entries
        assert first.id in db._log.entries
        expected = dict(db)
        assert b"victim" not in expected
    require_same_without_keydir(path, expected)


def test_segment_whose_tombstones_went_stays_if_an_older_one_does_not_count_as_cleaned_any_more(path):
    """As after a bit that flipped in the mark of the older one: or the value would come back at the next rebuild."""
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        db[b"victim"] = b"the old value"
        fill(db, range(62))
        db._store.locked(rotation.rotate)
        del db[b"victim"]
        db._store.locked(rotation.rotate)
        first, second = db._log.manifest.segments[:2]
        for victim in (first, second):
            assert db._store.locked(merge._clean_slice, victim, 32, 10**6) == victim.length
        db._log.keydir.words[db._log.rows[first.id] + at.ROW_MERGED] ^= 1 << 40
        assert db._store.locked(merge._drop_cleaned) == 0
        expected = dict(db)
        assert b"victim" not in expected
    require_same_without_keydir(path, expected)


def test_segment_that_somebody_else_has_cleaned_meanwhile_is_left_alone(path):
    """Its tombstones would be copied once more; and a rotation within the slice would drop it while it is read."""
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        fill(db, range(100))
        db._store.locked(rotation.rotate)
        for number in range(60):
            del db[b"key %d" % number]
        db._store.locked(rotation.rotate)
        victim = db._log.manifest.segments[-2]
        assert db._store.locked(merge._clean_slice, victim, 32, 10**6) == victim.length
        db[b"filler"] = bytes(SMALL - (db._log.keydir.counter(at.TAIL) & at.MASK32) - 500)
        expected, tail = dict(db), db._log.keydir.counter(at.TAIL)
        assert db._store.locked(merge._clean_slice, victim, 32, 10**6) == victim.length
        assert db._log.keydir.counter(at.TAIL) == tail
        assert dict(db) == expected
    require_same_without_keydir(path, expected)


# Failures


@pytest.mark.usefixtures("every_write_pays")
def test_merge_that_fails_does_not_fail_the_write_that_pays_for_it(db, monkeypatch):
    for turn in range(4):
        fill(db, range(100), turn)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(merge.write, "move", fail)
    monkeypatch.setattr(merge.write, "keep", fail)
    fill(db, range(100), turn=5)
    assert db.pop(b"key 9") == value(9, 5)
    assert b"key 9" not in db
    monkeypatch.undo()
    fill(db, range(100), turn=6)
    assert len(db) == 100


@pytest.mark.usefixtures("every_write_pays")
def test_on_a_full_disk_only_what_needs_no_copying_is_cleaned(path, monkeypatch):
    """Nobody asked for the merge: the last space is for those who write."""
    free = [2**20]
    monkeypatch.setattr(files, "free_bytes", lambda _place: free[0])
    with dbm_bitcask.open(path, segment_size=SMALL) as db:
        source = random.Random(6)
        for turn in range(1500):
            fill(db, [source.randrange(240)], turn)
        assert db.stats().copied_bytes == 0
        free[0] = 2**30
        for turn in range(1500):
            fill(db, [source.randrange(240)], turn)
        assert db.stats().copied_bytes > 0
        free[0] = 2**20
        before = db.stats()
        for turn in range(10):
            fill(db, range(240), turn)
        after = db.stats()
        assert after.reclaimed_bytes > before.reclaimed_bytes


@pytest.mark.usefixtures("every_write_pays")
def test_segment_with_damage_is_kept_and_not_tried_again_and_again(tmp_path):
    path = tmp_path / "damaged"
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        fill(db, range(60))
        fill(db, range(1, 60), turn=1)
        fill(db, range(1, 60), turn=2)
        damaged = db._log.entries[1]
    data = bytearray((path / "00000001.data").read_bytes())
    data[200] ^= 1  # in the value of key 0, which counts
    (path / "00000001.data").write_bytes(data)
    with dbm_bitcask.open(path, "w", segment_size=SMALL) as db:
        for turn in range(3, 20):
            fill(db, range(1, 60), turn)
        assert damaged.id in db._log.entries
        assert rotation.KEPT ^ damaged.salt == db._log.keydir.words[db._log.rows[damaged.id] + at.ROW_MERGED]
        assert db.stats().reclaimed_bytes > SMALL
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[b"key 0"]
    assert check(path) != []


@pytest.mark.usefixtures("every_write_pays")
def test_flipped_bit_in_the_mark_or_in_the_count_of_a_row_drops_nothing(tmp_path):
    """A keydir that is in use has no checksum: neither word alone says that a segment can go."""
    path = tmp_path / "flipped"
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        fill(db, range(200))
        expected = dict(db)
        log = db._log
        first, second = log.manifest.segments[:2]
        words = log.keydir.words
        words[log.rows[first.id] + at.ROW_MERGED] = rotation.CLEANED ^ first.salt
        words[log.rows[second.id] + at.ROW_DEAD] = second.length - 32
        assert rotation.cleaned(log) == set()
        db._store.locked(rotation.rotate)
        assert dict(db) == expected


def test_merge_option_is_checked(path):
    with pytest.raises(ValueError, match="merge must be 'auto', 'thread' or 'manual', not 'never'"):
        dbm_bitcask.open(path, merge="never")
    assert not path.exists()


def test_nothing_is_dropped_while_what_was_copied_out_of_it_is_in_doubt(path, monkeypatch):
    """A sync of the segment that has the copies failed; whoever writes them again needs a new segment on the way."""
    with dbm_bitcask.open(path, segment_size=SMALL, merge="manual") as db:
        fill(db, range(300))
    db = dbm_bitcask.open(path, "w", merge="manual")
    fill(db, range(0, 300, 2), turn=1)
    victim = db._log.manifest.segments[0]
    db._store.locked(merge._clean_slice, victim, 32, 10**6)
    assert rotation.cleaned(db._log) == {victim.id}

    def fail():
        raise OSError(errno.EIO, "the disk does not answer")

    with pytest.raises(OSError, match="does not answer"):
        db._log.durable(fail)
    crashes.abandon(db)
    dropped, rotated, unlink, rotate = [], [], rotation._unlink, rotation.rotate
    monkeypatch.setattr(rotation, "_unlink", lambda log, gone, bytes_: dropped.extend(gone) or unlink(log, gone, bytes_))
    monkeypatch.setattr(rotation, "rotate", lambda log, **how: rotated.append(1) or rotate(log, **how))
    with dbm_bitcask.open(path, "w", segment_size=SMALL, merge="manual") as db:
        assert rotated
        assert dropped == []
        assert {key: data.split()[0] for key, data in db.items()} == {b"key %d" % n: b"1" if n % 2 == 0 else b"0" for n in range(300)}
