"""A key that expires is gone for whoever reads, wherever its record goes; and the clock decides nothing else."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import zlib
from array import array
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import dbm_bitcask
from by_hand import everything, fill, flip, lose_index, rotate
from children import fork_and_wait
from crashes import Machine, abandon, edited, freeze, thaw
from dbm_bitcask.engine import expiry, names, record
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.header import MASK32
from dbm_bitcask.engine.repair import repair
from expected import START, Clock

MINUTE, HOUR, DAY = 60, 3600, 86_400


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    clock.install(monkeypatch)
    return clock


@pytest.fixture
def options():
    return {"segment_size": 4096}


def missing(action):
    try:
        action()
    except KeyError:
        return True
    return False


# Gone for every reader

READINGS = {
    "get": lambda db: db.get("key") is None,
    "item": lambda db: missing(lambda: db["key"]),
    "in": lambda db: "key" not in db,
    "iter": lambda db: b"key" not in list(db),
    "keys": lambda db: b"key" not in db.keys(),  # noqa: SIM118
    "items": lambda db: (b"key", b"value") not in list(db.items()),
    "values": lambda db: b"value" not in list(db.values()),
    "firstkey": lambda db: db.firstkey() != b"key",
    "nextkey": lambda db: missing(lambda: db.nextkey("key")),
    "ttl": lambda db: missing(lambda: db.ttl("key")),
}
WRITINGS = {
    "del": lambda db: missing(lambda: db.__delitem__("key")),
    "pop": lambda db: missing(lambda: db.pop("key")),
    "pop with a default": lambda db: db.pop("key", "default") == "default",
    "popitem": lambda db: db.popitem()[0] != b"key",
    "setdefault": lambda db: db.setdefault("key", "default") == b"default",
    "touch": lambda db: missing(lambda: db.touch("key", 10)),
}


@pytest.mark.parametrize("is_gone", [*READINGS.values(), *WRITINGS.values()], ids=[*READINGS, *WRITINGS])
def test_key_is_there_up_to_its_time_and_not_from_then_on(db, clock, is_gone):
    db.set("key", "value", ttl=10)
    db["other"] = "stays"
    clock.seconds += 9.999
    if is_gone in READINGS.values():
        assert not is_gone(db)
    assert db["key"] == b"value"
    clock.seconds += 0.001
    assert is_gone(db)


@pytest.mark.parametrize("hints", [True, False])
@pytest.mark.parametrize("is_gone", READINGS.values(), ids=READINGS)
def test_key_of_a_sealed_segment_is_gone_with_or_without_its_hint(db, clock, is_gone, hints):
    db.set("key", "value", ttl=10)
    fill(db)
    rotate(db)
    if hints:
        db._store._write_hints()
    assert not is_gone(db)
    clock.seconds += 10
    assert is_gone(db)
    assert len(list(db)) == 40


@pytest.mark.parametrize("index", ["shared", "own"])
@pytest.mark.parametrize("is_gone", READINGS.values(), ids=READINGS)
def test_key_is_gone_for_a_handle_that_only_reads_by_the_shared_index_or_by_one_of_its_own(path, clock, is_gone, index):
    with dbm_bitcask.open(path) as db:
        db.set("key", "value", ttl=10)
    if index == "own":
        lose_index(path)
    with dbm_bitcask.open(path, "r") as reader:
        assert not is_gone(reader)
        clock.seconds += 10
        assert is_gone(reader)


def test_key_is_gone_for_every_process_at_once(path):
    with dbm_bitcask.open(path) as db:
        db.set("key", "value", ttl=1.5)
        db.set("long", "value", ttl=1000)
        if db._log.survives_fork:
            fork_and_wait(lambda: require_seen(path, {b"key", b"long"}))
        time.sleep(1.6)
        if db._log.survives_fork:
            fork_and_wait(lambda: require_seen(path, {b"long"}))
        assert list(db) == [b"long"]
    require_seen(path, {b"long"})


def require_seen(path, expected):
    for flag in "r", "w":
        with dbm_bitcask.open(path, flag) as db:
            assert set(db) == {key for key in (b"key", b"long") if key in db} == expected


def test_number_of_keys_counts_the_expired_until_a_merge(db, path, clock):
    for number in range(20):
        db.set(b"key %d" % number, "value" * 50, ttl=10)
    db["other"] = "stays"
    clock.seconds += 11
    assert list(db) == [b"other"]
    assert len(db) == 21
    assert check(path) == []
    db.merge()
    assert len(db) == 1
    assert check(path) == []


def test_database_of_nothing_but_expired_keys_is_empty_for_whoever_takes_keys_out(db, clock):
    for number in range(20):
        db.set(b"key %d" % number, "value", ttl=10)
    assert db.popitem()[1] == b"value"
    clock.seconds += 10
    for _ in range(2):
        with pytest.raises(KeyError):
            db.popitem()
    assert (list(db), db.firstkey()) == ([], None)
    assert db == {}
    db["key"] = "value"
    assert db.popitem() == (b"key", b"value")
    with pytest.raises(KeyError):
        db.popitem()
    db.clear()
    assert len(db) == 0


def test_loop_of_popitem_takes_every_key_that_is_there_and_none_that_has_expired(db, clock):
    for number in range(60):
        db.set(b"key %d" % number, b"value" * 30, ttl=10 if number % 3 else None)
    clock.seconds += 10
    taken = []
    with pytest.raises(KeyError):
        while True:
            taken.append(db.popitem()[0])
    assert sorted(taken) == sorted(b"key %d" % number for number in range(0, 60, 3))  # a merge may have changed their order


def test_shelf_takes_an_expired_key_for_absent(path, clock):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["other"] = [0]
        shelf["key"] = [1, 2]
        shelf.dict.touch("key", 10)
        assert shelf["key"] == [1, 2]
        clock.seconds += 10
        assert shelf.get("key", "default") == "default"
        assert list(shelf) == ["other"]
        assert list(shelf.items()) == [("other", [0])]
        assert shelf.pop("key", None) is None
        assert shelf.setdefault("key", [3]) == [3]
        assert shelf["key"] == [3]


# set, ttl, touch


def test_time_to_live_is_what_is_left(db, clock):
    db.set("key", "value", ttl=10)
    db.set(b"fraction", memoryview(b"value"), 0.25)
    db.set("for ever", "value")
    clock.seconds += 0.2
    assert db.ttl("key") == 9.8
    assert db.ttl(b"fraction") == 0.05
    assert db.ttl("for ever") is None
    with pytest.raises(KeyError):
        db.ttl("absent")


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda db: db.__setitem__("key", "new"),
        lambda db: db.set("key", "new"),
        lambda db: db.set("key", "new", ttl=None),
        lambda db: db.update({"key": "new"}),
        lambda db: db.__ior__({"key": "new"}),
    ],
    ids=["item", "set", "set to None", "update", "in place"],
)
def test_whatever_sets_a_key_takes_its_time_to_live_away(db, clock, overwrite):
    db.set("key", "value", ttl=10)
    overwrite(db)
    assert db.ttl("key") is None
    clock.seconds += 1000
    assert db["key"] == b"new"
    assert len(db) == 1


def test_setdefault_of_an_expired_key_sets_it_for_ever(db, clock):
    db.set("key", "value", ttl=10)
    assert db.setdefault("key", "default") == b"value"
    clock.seconds += 10
    assert db.setdefault("key", "default") == b"default"
    assert db.ttl("key") is None
    assert len(db) == 1


def test_expired_key_can_be_set_again_and_counts_once(db, clock):
    for turn in range(3):
        db.set("key", b"%d" % turn, ttl=10)
        assert db["key"] == b"%d" % turn
        clock.seconds += 10
        assert "key" not in db
    assert len(db) == 1


def test_key_that_expires_can_be_deleted_and_popped(db):
    db.set("one", "1", ttl=10)
    db.set("two", "2", ttl=10)
    del db["one"]
    assert db.pop("two") == b"2"
    assert len(db) == 0


def test_touch_gives_a_key_another_time_to_live_and_leaves_its_value(db, clock):
    db.set("key", "value", ttl=10)
    clock.seconds += 5
    db.touch("key", 10)
    clock.seconds += 9
    assert (db["key"], db.ttl("key")) == (b"value", 1.0)
    db.touch("key", 0.5)
    assert db.ttl("key") == 0.5
    db.touch("key", None)
    assert (db["key"], db.ttl("key")) == (b"value", None)
    db.touch("key", 10)
    clock.seconds += 10
    for key in "key", "absent":
        with pytest.raises(KeyError):
            db.touch(key, 10)
        with pytest.raises(KeyError):
            db.touch(key, None)
    assert len(db) == 1


def test_touch_of_a_key_that_lives_for_ever_to_live_for_ever_writes_nothing(db):
    db["key"] = "value"
    before = db.stats()
    db.touch("key", None)
    assert db.stats() == before


def test_touch_leaves_the_stored_bytes_and_their_flags_as_they_are(db, clock):
    stored = zlib.compress(b"value" * 100)
    db._store.set(b"key", stored, record.ZLIB)
    for ttl, flags in (10, record.ZLIB | record.EXPIRES), (20, record.ZLIB | record.EXPIRES), (None, record.ZLIB):
        db.touch("key", ttl)
        found = db._log.read(db._log.find(b"key"))
        assert (found.flags & ~record.SYNCED, found.value) == (flags, stored)
        assert found.expiry == ((clock.seconds + ttl) * 1000 if ttl else 0)
    assert db.ttl("key") is None


NO_TIMES = [
    *((ValueError, ttl) for ttl in (0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf, 1e300, 10**400, 2**63)),
    *((TypeError, ttl) for ttl in (True, "10", b"10", [10], 1j)),
]


@pytest.mark.parametrize(("kind", "ttl"), NO_TIMES)
def test_what_is_no_time_to_live_is_refused_and_changes_nothing(db, kind, ttl):
    db["key"] = "value"
    with pytest.raises(kind, match="ttl must be"):
        db.set("key", "new", ttl=ttl)
    with pytest.raises(kind, match="ttl must be"):
        db.touch("key", ttl)
    assert (db["key"], db.ttl("key")) == (b"value", None)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("ttl", [1e-9, 0.0005, 1, 4 * 10**9, 2**63 // 1000])
def test_shortest_and_longest_time_to_live(db, ttl):
    db.set("key", "value", ttl=ttl)
    assert db["key"] == b"value"
    assert db.ttl("key") == pytest.approx(max(ttl, 0.001))
    rotate(db)
    db.merge()
    assert db["key"] == b"value"


def test_keys_and_values_that_cannot_be_stored_are_refused_as_by_an_item(db):
    for wrong in (5, None):
        with pytest.raises(TypeError):
            db.set(wrong, "value", ttl=1)
        with pytest.raises(TypeError):
            db.set("key", wrong, ttl=1)
        with pytest.raises(TypeError):
            db.touch(wrong, 1)
        with pytest.raises(TypeError):
            db.ttl(wrong)
    assert len(db) == 0


def test_closed_and_read_only_databases_refuse(path):
    with dbm_bitcask.open(path) as db:
        db.set("key", "value", ttl=1000)
    for action in lambda db: db.set("key", "value", ttl=1), lambda db: db.set("key", "value"), lambda db: db.touch("key", 1):
        with pytest.raises(dbm_bitcask.error, match="closed"):
            action(db)
        with dbm_bitcask.open(path, "r") as reader, pytest.raises(dbm_bitcask.error, match="reading only"):
            action(reader)
    with pytest.raises(dbm_bitcask.error, match="closed"):
        db.ttl("key")
    with dbm_bitcask.open(path, "r") as reader:
        assert 0 < reader.ttl("key") <= 1000


# Wherever the record goes


def move(db, _):
    fill(db, 20)
    fill(db, 20, turn=1)
    before = db._log.find(b"key")
    db.merge()
    assert db._log.find(b"key") != before


def rebuild(_, path):
    (path / "keydir").unlink(missing_ok=True)


def rebuild_without_hints(_, path):
    lose_index(path)


def back_up_and_restore(db, path):
    db.backup(path.with_name("copy"))
    db.close()
    shutil.rmtree(path)
    path.with_name("copy").rename(path)


def damage_and_repair(db, path):
    fill(db)
    before = db._log.find(b"key")
    other = db._log.find(b"key 0")
    assert before >> 32 == other >> 32
    db.close()
    lose_index(path)
    flip(path / names.segment_name(other >> 32), (other & MASK32) + 60)
    assert repair(path)
    with dbm_bitcask.open(path, "r") as db:
        assert db._log.find(b"key") != before


def lose_the_manifest(db, path):
    db.close()
    (path / "MANIFEST").unlink()
    assert repair(path)


@pytest.mark.parametrize(
    "happens", [lambda *_: None, move, rebuild, rebuild_without_hints, back_up_and_restore, damage_and_repair, lose_the_manifest]
)
def test_expiry_outlives(path, clock, options, happens):
    db = dbm_bitcask.open(path, **options)
    db.set("key", "value", ttl=10)
    happens(db, path)
    db.close()
    for flag in "r", "w":
        clock.seconds = START + 9.999
        with dbm_bitcask.open(path, flag) as db:
            assert db.ttl("key") == 0.001
            assert (b"key", b"value") in list(db.items())
            clock.seconds = START + 10
            assert "key" not in db
            assert b"key" not in list(db)
    assert check(path) == []


def test_expired_records_are_nothing_that_check_or_repair_has_to_do_with(db, path, clock):
    for number in range(30):
        db.set(b"key %d" % number, b"value" * 40, ttl=10)
    db._store._write_hints()
    clock.seconds += 10
    assert check(path) == []
    db.close()
    assert check(path) == repair(path) == []
    lose_index(path)
    assert check(path) == []
    assert everything(path, "w") == {}
    assert check(path) == []


def test_key_that_was_set_as_its_process_died_expires(path, clock, monkeypatch):
    """The record is whole, and neither slot nor counters are stored."""
    for dies_at in range(1, 100):
        machine = Machine()
        with monkeypatch.context() as patch:
            machine.install(patch)
            db = dbm_bitcask.open(path, "n")
            db["other"] = "value"
            died = machine.run(lambda db=db: db.set("key", "value", ttl=10), dies_at, killed=True)
            abandon(db)
        with dbm_bitcask.open(path, "w") as db:
            assert len(db) == len(list(db))
            there = "key" in db
            assert not there or db.ttl("key") == 10
            clock.seconds += 10
            assert list(db) == [b"other"]
            clock.seconds -= 10
        assert check(path) == []
        if not died:
            assert there
            return
    pytest.fail("it never ends")


def test_merge_of_expired_keys_that_is_killed_at_any_step_brings_nothing_back(tmp_path, clock, monkeypatch, options):
    made = tmp_path / "made"
    db = dbm_bitcask.open(made, **options)
    expected = {b"other %d" % number: b"stays" for number in range(10)}
    db.update({**expected, **{b"key %d" % number: b"older" * 20 for number in range(30)}})
    rotate(db)
    for number in range(30):
        db.set(b"key %d" % number, b"value" * 20, ttl=10)
    rotate(db)
    abandon(db)
    frozen = freeze(made)
    machine = Machine()
    machine.install(monkeypatch)
    for step in range(1, 10**9, 5):
        path = thaw(frozen, tmp_path / str(step))
        clock.seconds = START + 20
        db = dbm_bitcask.open(path, **options)
        died = machine.run(db.merge, step, killed=True)
        abandon(db)
        if step % 2:
            lose_index(path)
        for flag in "rw":
            assert everything(path, flag) == expected
        assert check(path) == []
        clock.seconds = START  # what is there again is the newest
        assert set(everything(path).values()) <= {b"stays", b"value" * 20}
        shutil.rmtree(path)
        if not died:
            break
    assert step > 100


# The clock


def test_clock_that_is_set_back_lets_keys_live_longer(db, clock):
    db.set("key", "value", ttl=10)
    clock.seconds -= 1000
    assert db.ttl("key") == 1010
    clock.seconds += 1009
    assert db["key"] == b"value"


def test_clock_that_goes_back_brings_back_what_no_merge_has_deleted(db, clock):
    db.set("key", "value", ttl=10)
    clock.seconds += 20
    assert "key" not in db
    clock.seconds -= 15
    assert db["key"] == b"value"


def test_clock_that_goes_back_does_not_bring_back_what_a_merge_has_deleted(db, path, clock):
    db["key"] = "older"
    rotate(db)
    db.set("key", "value", ttl=10)
    rotate(db)
    clock.seconds += 20
    db.merge()
    clock.seconds -= 20
    assert "key" not in db
    db.close()
    lose_index(path)
    assert everything(path) == {}


def test_order_of_writes_does_not_depend_on_the_clock(db, path, clock):
    db.set("key", "1", ttl=1000)
    clock.seconds -= 500
    db.set("key", "2", ttl=10)
    clock.seconds -= 500
    db["other"] = "1"
    db.set("other", "2", ttl=10)
    assert dict(db) == {b"key": b"2", b"other": b"2"}
    db.close()
    lose_index(path)
    assert everything(path) == {b"key": b"2", b"other": b"2"}
    clock.seconds = START
    assert everything(path) == {}


def test_clock_before_1970_stands_still(db, clock):
    clock.seconds = -1000
    db.set("key", "value", ttl=10)
    assert db.ttl("key") == 10


# Damage


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("sealed_one", [True, False])
def test_key_is_never_called_gone_by_an_expiry_that_does_not_verify(path, sealed_one):
    with dbm_bitcask.open(path) as db:
        db.set("key", "value", ttl=100)
        location = db._log.find(b"key")
        if sealed_one:
            rotate(db)
        db["other"] = "value"
    for bit in range(64):
        at_byte = (location & MASK32) + record.HEADER.size + bit // 8
        flip(path / names.segment_name(location >> 32), at_byte, 1 << bit % 8)
        with dbm_bitcask.open(path, "r") as db:
            for read in (
                lambda db=db: db.get("key"),
                lambda db=db: "key" in db,
                lambda db=db: db.ttl("key"),
                lambda db=db: db.nextkey("key"),
            ):
                with pytest.raises(dbm_bitcask.CorruptionError):
                    read()
        flip(path / names.segment_name(location >> 32), at_byte, 1 << bit % 8)
    for hint in path.glob("*.hint"):
        hint.unlink()
    flip(path / names.segment_name(location >> 32), (location & MASK32) + record.HEADER.size + 5, 1)
    with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
        list(db)
    flip(path / names.segment_name(location >> 32), (location & MASK32) + record.HEADER.size + 5, 1)


def test_damaged_record_that_expires_can_be_overwritten_and_deleted(path, clock):
    for repaired in lambda db: db.__setitem__("key", "new"), lambda db: db.__delitem__("key"):
        with dbm_bitcask.open(path, "n") as db:
            db.set("key", "value", ttl=10)
            rotate(db)
            location = db._log.find(b"key")
        flip(path / names.segment_name(location >> 32), (location & MASK32) + record.HEADER.size)
        with dbm_bitcask.open(path, "w") as db:
            for read in lambda db=db: db.touch("key", 10), lambda db=db: db.pop("key"), lambda db=db: db.setdefault("key", "new"):
                with pytest.raises(dbm_bitcask.CorruptionError):
                    read()
            clock.seconds += 10
            repaired(db)
            assert db.get("key") in (b"new", None)
    repair(path)


# Iteration


def test_key_that_is_touched_while_it_is_walked_is_met_once_though_its_old_record_has_expired(db, clock):
    for number in range(30):
        db.set(b"key %02d" % number, b"value" * 40, ttl=10)
    seen = []
    for key in db:
        if not seen:
            for number in range(30):
                db.touch(b"key %02d" % number, 1000)
            clock.seconds += 20
        seen.append(key)
    assert sorted(seen) == [b"key %02d" % number for number in range(30)]


def test_key_that_expires_while_it_is_walked_is_not_met_from_then_on(db, clock):
    for number in range(30):
        db.set(b"key %02d" % number, b"value" * 40, ttl=10 if number % 2 else 1000)
    seen = []
    for key, _ in db.items():
        seen.append(key)
        if len(seen) == 5:
            clock.seconds += 20
    assert seen == [b"key %02d" % number for number in [*range(4), *range(4, 30, 2)]]


def test_key_that_was_moved_and_has_expired_is_not_met(db, clock):
    db["first"] = "1"
    db.set("key", "value", ttl=10)
    db["last"] = "1"
    seen = []
    for key in db:
        seen.append(key)
        if key == b"first":
            db.touch("key", 20)
            clock.seconds += 30
    assert seen == [b"first", b"last"]


# Space


def test_merge_gives_back_the_space_of_what_has_expired(db, clock):
    for number in range(200):
        db.set(b"key %d" % number, b"value" * 40, ttl=100)
    before = db.stats()
    db.merge()
    assert db.stats().log_bytes > before.log_bytes * 0.9
    clock.seconds += 101
    db.merge()
    assert len(db) == 0
    for _ in range(2):  # the tombstones, too
        db.merge()
    assert db.stats().log_bytes < 4096


def test_merge_moves_what_has_not_expired(db, path, clock):
    for number in range(100):
        db.set(b"short %d" % number, b"value" * 40, ttl=100)
        db.set(b"long %d" % number, b"value" * 40, ttl=HOUR)
    clock.seconds += 101
    db.merge()
    assert len(db) == 100
    assert {db.ttl(key) for key in db} == {HOUR - 101}
    db.close()
    lose_index(path)
    with dbm_bitcask.open(path, "w") as db:
        assert len(db) == len(list(db)) == 100
        assert {db.ttl(key) for key in db} == {HOUR - 101}


def row_of(db, number=None):
    number = number or db._log.manifest.active.id
    return db._log.keydir.words, db._log.rows[number]


@pytest.mark.parametrize(("ttl", "bucket"), [(1, 0), (10 * MINUTE, 0), (601, 1), (DAY, 1), (DAY + 1, 2), (30 * DAY, 2), (31 * DAY, 3)])
def test_bytes_that_expire_are_counted_by_their_time_to_live(db, clock, ttl, bucket):
    db["other"] = "for ever"
    for turn in range(3):
        clock.seconds = START + turn / 4
        db.set(b"key %d" % turn, b"value", ttl=ttl)
    words, row = row_of(db)
    noted = words[row + at.ROW_EXPIRING : row + at.ROW_EXPIRING + at.EXPIRING_ROWS].tolist()
    length = record.record_length(record.EXPIRES, 5, 5)
    assert noted == [3 * length | START + ttl + 1 << 32 if number == bucket else 0 for number in range(at.EXPIRING_ROWS)]
    for seconds, expected in (0, 0), (ttl, 0), (ttl + 1, 3 * length), (2 * ttl + 1, 3 * length):
        assert expiry.expired_bytes(words, row, (START + seconds) * 1000) == expected


@pytest.mark.usefixtures("clock")
def test_counts_of_bytes_that_expire_do_not_overflow():
    words = array("Q", bytes(8 * 2 * at.ROW_WORDS))
    for _ in range(3):
        expiry.note(memoryview(words), at.ROW_WORDS, 2**31, 2**64 - 1)
        expiry.note(memoryview(words), at.ROW_WORDS, 2**31, (START + 1) * 1000)
    assert words[at.ROW_WORDS + at.ROW_EXPIRING] == MASK32 | START + 1 << 32
    assert words[at.ROW_WORDS + at.ROW_EXPIRING + 3] == MASK32 | MASK32 << 32
    assert sum(words) == words[at.ROW_WORDS + at.ROW_EXPIRING] + words[at.ROW_WORDS + at.ROW_EXPIRING + 3]


@pytest.mark.parametrize("lose", [rebuild, rebuild_without_hints])
def test_rebuild_counts_the_bytes_that_expire_by_what_is_left_of_their_time(db, path, clock, options, lose):
    for number in range(40):
        db.set(b"key %d" % number, b"value" * 20, ttl=HOUR)
    db["other"] = "value"
    before = {number: expiry.expired_bytes(*row_of(db, number), (START + HOUR) * 1000) for number in db._log.entries}
    assert len(before) > 1
    assert all(before.values())
    db.close()
    lose(db, path)
    clock.seconds += HOUR - MINUTE
    with dbm_bitcask.open(path, "w", **options) as db:
        for number, expected in before.items():
            words, row = row_of(db, number)
            assert expiry.expired_bytes(words, row, (START + HOUR) * 1000) == expected
            assert words[row + at.ROW_EXPIRING] & MASK32 == expected


def test_counts_of_bytes_that_expire_may_be_anything(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        fill(db, 20)
        expected = dict(db)
        rows = list(db._log.rows.values())
    with edited(path / "keydir") as words:
        for row in rows:
            for word in range(at.EXPIRING_ROWS):
                words[row + at.ROW_EXPIRING + word] = 2**64 - 1 if word % 2 else MASK32
    with dbm_bitcask.open(path, "w") as db:
        db.merge()
        assert dict(db) == expected
        db.set("key", "value", ttl=10)
        assert len(db) == 21


# A database beside a dict

keys = st.integers(0, 12).map(lambda number: b"key %d" % number)
values = st.one_of(st.binary(max_size=5), st.binary(min_size=1, max_size=1).map(lambda byte: byte * 900))
ttls = st.sampled_from([None, 0.001, 1, 1.5, 5, 100, HOUR, 40 * DAY])


class ExpiringBesideDict(RuleBasedStateMachine):
    """`stored` is what was written last: (value, expiry in milliseconds or 0). What had expired when a merge came may be deleted since."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.path = Path(self.directory, "db")
        self.clock, self.real = Clock(), expiry.time_ns
        expiry.time_ns = self.clock
        self.stored = {}
        self.maybe_deleted = set()

    @initialize(segment_size=st.sampled_from([4096, 2**26]))
    def create(self, segment_size):
        self.options = {"segment_size": segment_size}
        self.db = dbm_bitcask.open(self.path, **self.options)

    def now(self):
        return round(self.clock.seconds * 1000)

    def expiry(self, ttl):
        return 0 if ttl is None else self.now() + round(ttl * 1000)

    def is_past(self, key):
        return 0 < self.stored[key][1] <= self.now()

    def expected(self, key, seen):
        """Whether the key has to be there; what may be deleted or not is known when it has been seen."""
        if key in self.stored and key in self.maybe_deleted and not self.is_past(key):
            if seen:
                self.maybe_deleted.discard(key)
            else:
                del self.stored[key]
        return key in self.stored and not self.is_past(key)

    def write(self, key, value, moment):
        self.stored[key] = value, moment
        self.maybe_deleted.discard(key)

    def may_delete(self):
        self.maybe_deleted |= {key for key in self.stored if self.is_past(key)}

    @rule(key=keys, value=values, ttl=ttls)
    def set(self, key, value, ttl):
        self.db.set(key, value, ttl)
        self.write(key, value, self.expiry(ttl))

    @rule(key=keys, value=values)
    def set_item(self, key, value):
        self.db[key] = value
        self.write(key, value, 0)

    @rule(key=keys, value=values)
    def setdefault(self, key, value):
        there = self.expected(key, key in self.db)
        assert self.db.setdefault(key, value) == (self.stored[key][0] if there else value)
        if not there:
            self.write(key, value, 0)

    @rule(key=keys, ttl=ttls)
    def touch(self, key, ttl):
        if self.expected(key, key in self.db):
            self.db.touch(key, ttl)
            self.write(key, self.stored[key][0], self.expiry(ttl))
        else:
            with pytest.raises(KeyError):
                self.db.touch(key, ttl)

    @rule(key=keys)
    def delete(self, key):
        if self.expected(key, key in self.db):
            del self.db[key]
            del self.stored[key]
        else:
            with pytest.raises(KeyError):
                del self.db[key]

    @rule(key=keys)
    def pop(self, key):
        there = self.expected(key, key in self.db)
        assert self.db.pop(key, None) == (self.stored.pop(key)[0] if there else None)

    @rule()
    def popitem(self):
        if self.visible():
            key, value = self.db.popitem()
            assert self.stored.pop(key)[0] == value
        else:
            with pytest.raises(KeyError):
                self.db.popitem()

    @rule(seconds=st.sampled_from([0.001, 0.5, 1, 4, 50, 200, HOUR, DAY, 50 * DAY]))
    def clock_goes_on(self, seconds):
        self.clock.seconds += seconds

    @rule(seconds=st.sampled_from([0.5, 10, HOUR, DAY]))
    def clock_is_set_back(self, seconds):
        self.clock.seconds -= seconds

    @rule()
    def rotate(self):
        rotate(self.db)

    @rule()
    def merge(self):
        self.may_delete()
        self.db.merge()

    @rule(loses=st.sampled_from([lambda *_: None, rebuild, rebuild_without_hints]))
    def reopen(self, loses):
        self.may_delete()  # portable: what may not be durable is written again
        self.db.close()
        loses(self.db, self.path)
        for flag in "rw":
            with dbm_bitcask.open(self.path, flag, **self.options) as db:
                self.compare(db)
        self.db = dbm_bitcask.open(self.path, **self.options)

    def visible(self):
        return {key: self.stored[key][0] for key in list(self.stored) if self.expected(key, key in self.db)}

    def compare(self, db):
        for key in list(self.stored):
            self.expected(key, key in db)
        visible = {key: value for key, (value, _) in self.stored.items() if not self.is_past(key)}
        assert dict(db.items()) == visible
        assert sorted(db) == sorted(visible) == sorted(key for key in self.stored if key in db)
        assert {key: db.get(key) for key in self.stored} == {key: visible.get(key) for key in self.stored}
        assert {key: db.ttl(key) for key in visible} == {
            key: (self.stored[key][1] - self.now()) / 1000 if self.stored[key][1] else None for key in visible
        }
        assert len(visible) <= len(db) <= len(self.stored)

    @invariant()
    def agrees(self):
        if hasattr(self, "db"):
            self.compare(self.db)

    def teardown(self):
        try:
            if hasattr(self, "db"):
                self.db.close()
                assert check(self.path) == []
        finally:
            expiry.time_ns = self.real
            shutil.rmtree(self.directory)


TestExpiringBesideDict = ExpiringBesideDict.TestCase
