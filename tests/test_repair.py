"""What `repair` saves of a damaged database: everything that verifies, nothing invented, nothing thrown away."""

from __future__ import annotations

import shutil

import pytest

import dbm_bitcask
from crashes import Machine, freeze
from dbm_bitcask.engine import manifest, names, segment
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.header import MASK32
from dbm_bitcask.engine.record import TOMBSTONE
from dbm_bitcask.engine.repair import repair

TINY = {"segment_size": 4096}
KEYS = [b"key %02d" % number for number in range(60)]
OLD = {key: b"old value of %s " % key * 8 for key in KEYS}
NEW = {key: b"new value of %s " % key * 8 for key in KEYS[::2]}
GONE = KEYS[1::10]
EXPECTED = {**OLD, **NEW, b"synced": b"1", b"last": b"1"}
for _key in GONE:
    del EXPECTED[_key]


@pytest.fixture
def path(tmp_path):
    """A database with overwritten and deleted keys in several segments, and something synced in the active one."""
    path = tmp_path / "db"
    with dbm_bitcask.open(path, **TINY) as db:
        db.update(OLD)
        db.update(NEW)
        for key in GONE:
            del db[key]
        db[b"synced"] = b"1"
        db.sync()
        db[b"last"] = b"1"
    return path


def contents(path):
    with dbm_bitcask.open(path, "r") as db:
        return dict(db)


def require_whole(path):
    """What is always true after a repair."""
    assert check(path) == []
    found = contents(path)
    assert repair(path) == []
    assert contents(path) == found
    for file in path.iterdir():
        assert (
            names.parse_segment(file.name) or names.parse_hint(file.name) or file.name in ("MANIFEST", "keydir") or "damaged" in file.name
        )
    with dbm_bitcask.open(path, "w", **TINY) as db:
        db[b"written"] = b"after"
        assert len(db) == len(list(db)) == len({*found, b"written"})
        del db[b"written"]
    (path / "keydir").unlink(missing_ok=True)
    assert contents(path) == found
    return found


def place_of(path, key):
    with dbm_bitcask.open(path, "r") as db:
        location = db._log.find(key)
    return path / names.segment_name(location >> 32), location & MASK32


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def drop_hints(path):
    for file in path.glob("*.hint"):
        file.unlink()


def test_database_that_is_whole_is_left_alone(path):
    before = {name: data for name, data in freeze(path).items() if name != "keydir"}
    assert repair(path) == []
    assert {name: data for name, data in freeze(path).items() if name != "keydir"} == before
    assert require_whole(path) == EXPECTED


@pytest.mark.parametrize("where", [0, 8, 12, 29, 31], ids=["checksum", "size", "end of the key", "key", "value"])
@pytest.mark.parametrize("hints", [True, False])
@pytest.mark.parametrize("key", [KEYS[0], KEYS[7], b"synced"])
def test_damaged_record_is_lost_and_every_other_one_is_kept(path, where, hints, key):
    file, offset = place_of(path, key)
    flip(file, offset + where)
    if not hints:
        drop_hints(path)
    steps = repair(path)
    assert str(file) in str(steps[0])
    found = require_whole(path)
    others = {name: value for name, value in EXPECTED.items() if name != key}
    assert {name: value for name, value in found.items() if name != key} == others
    assert found.get(key) in ([None] if hints and key != b"synced" else [None, OLD.get(key)])
    aside = list(path.glob("*.damaged"))
    assert len(aside) == 1
    assert aside[0].name.startswith(file.name)


def test_damage_in_a_tombstone_does_not_hide_the_others(path):
    listed = manifest.decode((path / "MANIFEST").read_bytes())
    tombstones = {
        found.key: (path / names.segment_name(entry.id), offset)
        for entry in listed.segments
        for offset, found in segment.scan((path / names.segment_name(entry.id)).read_bytes(), entry.salt, segment.FIRST_RECORD, 1 << 20)
        if found.flags & TOMBSTONE
    }
    assert set(tombstones) == set(GONE)
    file, offset = tombstones[GONE[0]]
    flip(file, offset + 25)
    drop_hints(path)
    repair(path)
    found = require_whole(path)
    assert found.pop(GONE[0], None) in (None, OLD[GONE[0]])
    assert found == EXPECTED


@pytest.mark.parametrize("damage", ["missing", "empty", "one bit", "of nothing"])
def test_manifest_is_made_anew_from_the_segments(path, damage):
    file = path / "MANIFEST"
    if damage == "missing":
        file.unlink()
    elif damage == "one bit":
        flip(file, 20)
    else:
        file.write_bytes(b"" if damage == "empty" else b"nothing" * 20)
    with pytest.raises(dbm_bitcask.error, match="repair"):
        dbm_bitcask.open(path)
    assert repair(path)
    assert require_whole(path) == EXPECTED
    assert (damage != "missing") == any("MANIFEST" in file.name for file in path.glob("*.damaged"))


def test_manifest_of_earlier_gives_way_to_the_segments_that_are_newer(path):
    earlier = (path / "MANIFEST").read_bytes()
    with dbm_bitcask.open(path, "w", **TINY) as db:
        for turn in range(8):
            db.update(dict.fromkeys(KEYS, b"later %d" % turn * 20))
        expected = dict(db)
    (path / "MANIFEST").write_bytes(earlier)
    with pytest.raises(dbm_bitcask.error, match="repair"):
        dbm_bitcask.open(path)
    repair(path)
    assert require_whole(path) == expected


def test_manifest_of_a_newer_version_is_not_touched(path):
    data, _ = manifest.encode(manifest.decode((path / "MANIFEST").read_bytes()))
    newer = bytearray(data[:-8])
    newer[16] = 200
    (path / "MANIFEST").write_bytes(bytes(newer) + manifest.xxh3_64_intdigest(newer).to_bytes(8, "little"))
    before = freeze(path)
    with pytest.raises(dbm_bitcask.error, match="newer version"):
        repair(path)
    assert freeze(path) == before


def test_missing_segment_takes_its_keys_with_it_and_no_others(path):
    lost, _ = place_of(path, KEYS[3])
    with dbm_bitcask.open(path, "r") as db:
        kept = {key for key in db if db._log.find(key) >> 32 != int(lost.stem)}
    lost.unlink()
    assert "missing" in str(repair(path)[0])
    found = require_whole(path)
    assert {key: found[key] for key in kept} == {key: EXPECTED[key] for key in kept}
    assert all(value in (EXPECTED.get(key), OLD.get(key)) for key, value in found.items())


@pytest.mark.parametrize("length", [0, 10, 32, 33, 500, -1])
@pytest.mark.parametrize("which", [0, 2, -1], ids=["first", "third", "active"])
def test_segment_that_was_cut_keeps_what_is_left(path, length, which):
    file = sorted(path.glob("*.data"))[which]
    with dbm_bitcask.open(path, "r") as db:
        kept = {key for key in db if db._log.find(key) >> 32 != int(file.stem)}
    data = file.read_bytes()
    file.write_bytes(data[:length])
    repair(path)
    found = require_whole(path)
    assert {key: found[key] for key in kept} == {key: EXPECTED[key] for key in kept}
    assert all(value in (EXPECTED.get(key), OLD.get(key)) for key, value in found.items())


@pytest.mark.parametrize("offset", [0, 9, 17, 25])
def test_header_of_a_segment_is_written_anew(path, offset):
    flip(sorted(path.glob("*.data"))[1], offset)
    assert "header" in str(repair(path)[0])
    assert require_whole(path) == EXPECTED


def test_segment_of_another_database_is_set_aside(path, tmp_path):
    with dbm_bitcask.open(tmp_path / "other", **TINY) as db:
        db.update({b"foreign %d" % number: b"v" * 100 for number in range(100)})
    file, _ = place_of(path, KEYS[3])
    foreign = (tmp_path / "other" / file.name).read_bytes()
    file.write_bytes(foreign)
    repair(path)
    found = require_whole(path)
    assert all(value in (EXPECTED.get(key), OLD.get(key)) for key, value in found.items())
    assert foreign in [aside.read_bytes() for aside in path.glob("*.damaged")]


def test_damaged_index_is_made_anew(path):
    file = path / "keydir"
    file.write_bytes(b"x" * file.stat().st_size)
    repair(path)
    assert require_whole(path) == EXPECTED


def test_what_is_no_database_is_an_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(dbm_bitcask.error, match="no database"):
            repair(path)
    assert list(tmp_path.iterdir()) == []


def test_handles_that_are_open_go_on_after_a_repair(path):
    with dbm_bitcask.open(path, "w", **TINY) as db, dbm_bitcask.open(path, "r") as reader:
        assert reader[KEYS[5]] == db[KEYS[5]]
        flip(*place_of(path, KEYS[7]))
        repair(path)
        db[b"new"] = b"1"
        assert reader[b"new"] == b"1"
        assert reader[KEYS[5]] == EXPECTED[KEYS[5]]
        assert KEYS[7] not in reader


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("damage", ["record", "manifest"])
def test_repair_that_died_at_any_step_can_be_repeated(path, tmp_path, monkeypatch, damage, killed):
    if damage == "record":
        flip(*place_of(path, KEYS[7]))
    else:
        flip(path / "MANIFEST", 20)
    expected = {key: value for key, value in EXPECTED.items() if damage != "record" or key != KEYS[7]}
    machine = Machine()
    machine.install(monkeypatch)
    for step in range(1, 100000, 7):
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        died = machine.run(lambda copy=copy: repair(copy), step, killed=killed)
        repair(copy)
        assert check(copy) == []
        assert contents(copy) == expected
        shutil.rmtree(copy)
        if not died:
            break
    assert step > 50
