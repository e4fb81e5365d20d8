"""Compressed values: they come back as they were, whoever reads them, and what is wrong with one is said of it alone."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dbm_bitcask
from by_hand import active, append, encoded, everything, lose_index, poke, rotate, sealed
from children import run_python
from dbm_bitcask.engine import compression, log, record
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.names import segment_name
from dbm_bitcask.engine.record import ZLIB, ZSTD
from dbm_bitcask.engine.repair import repair

NAMES = ("zlib", "zstd")
FLAGS = {"zlib": ZLIB, "zstd": ZSTD}
TEXT = b"the frost was on the snow, and the snow was on the ice. " * 40
TINY = {"segment_size": 4096}

each_name = pytest.mark.parametrize("compress", NAMES)
each_layer = pytest.mark.parametrize("files", ["native", "portable"])
values = st.one_of(
    st.binary(max_size=1000),
    st.builds(lambda some, times, behind: some * times + behind, st.binary(max_size=40), st.integers(0, 200), st.binary(max_size=300)),
)


def text(number, size=3000):
    chance = random.Random(number)
    return b" ".join(chance.choice([b"snow", b"ice", b"frost", b"%d" % number]) for _ in range(size // 5))


def texts(count, turn=0):
    return {b"key %d" % number: text(number + 1000 * turn) for number in range(count)}


def stored(db, key):
    """The record of a key as it stands in the log."""
    return db._log.read(db._log.find(key))


@pytest.fixture
def without_zstd(monkeypatch):
    lose_zstd(monkeypatch)


def lose_zstd(monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", None)


# The bytes of a value.


@each_name
@given(value=values)
def test_value_comes_back(compress, value):
    flags, data = compression.packer(compress)(value)
    if not flags:
        assert data is value
    else:
        assert flags == FLAGS[compress]
        assert len(data) <= len(value) * 7 / 8 + 1
        assert compression.unpack(flags, memoryview(data), len(value)) == value


@each_name
def test_small_values_are_stored_as_they_are(compress):
    pack = compression.packer(compress)
    assert pack(b"a" * (compression.SMALLEST - 1)) == (0, b"a" * (compression.SMALLEST - 1))
    assert pack(b"a" * compression.SMALLEST)[0] == FLAGS[compress]


@each_name
def test_value_that_gets_hardly_smaller_is_stored_as_it_is(compress):
    value = random.Random(1).randbytes(10_000)
    assert compression.packer(compress)(value) == (0, value)
    assert compression.packer(compress)(value + bytes(1000))[0] == 0
    assert compression.packer(compress)(value + bytes(3000))[0] == FLAGS[compress]


@each_name
@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_compressed_value_are_bad_and_raise_nothing_else(compress, data):
    with pytest.raises(compression.BadValue):
        compression.unpack(FLAGS[compress], data, 10**6)


@each_name
def test_every_prefix_of_a_compressed_value_is_bad_and_so_is_what_follows_it(compress):
    flags, data = compression.packer(compress)(TEXT)
    for end in range(len(data)):
        with pytest.raises(compression.BadValue):
            compression.unpack(flags, data[:end], len(TEXT))
    for behind in (b"\0", data):
        with pytest.raises(compression.BadValue):
            compression.unpack(flags, data + behind, 2 * len(TEXT))


@each_name
def test_no_more_is_decompressed_than_a_value_may_have(compress):
    flags, data = compression.packer(compress)(TEXT)
    assert compression.unpack(flags, data, len(TEXT)) == TEXT
    with pytest.raises(compression.BadValue):
        compression.unpack(flags, data, len(TEXT) - 1)


def test_value_that_says_to_be_compressed_in_two_ways_is_bad():
    with pytest.raises(compression.BadValue):
        compression.unpack(ZLIB | ZSTD, zlib.compress(TEXT), 10**6)


# In a database.


@each_layer
@each_name
def test_every_way_to_get_a_value_gives_what_was_set(path, compress, files):
    with dbm_bitcask.open(path, compress=compress, files=files) as db:
        db[b"set"] = TEXT
        db["updated"] = TEXT.decode()
        db.update({b"bytearray": bytearray(TEXT), b"memoryview": memoryview(TEXT)})
        assert db.setdefault(b"default", TEXT) == db.setdefault(b"default", b"other") == TEXT
        keys = [b"set", b"updated", b"bytearray", b"memoryview", b"default"]
        assert stored(db, b"default").flags & record.EXTENDED == FLAGS[compress]
        assert [db[key] for key in keys] == [db.get(key) for key in keys] == list(db.values()) == [TEXT] * 5
        assert list(db.items()) == [(key, TEXT) for key in keys]
        assert all(type(value) is bytes for value in db.values())
        assert list(db) == db.keys() == keys
        assert b"set" in db
        assert db.get(b"other") is None
        assert db.pop(b"set") == TEXT
        assert db.popitem() == (b"updated", TEXT)
        assert len(db) == 3
    assert everything(path) == dict.fromkeys(keys[2:], TEXT)


@each_name
def test_database_takes_less_space(tmp_path, compress):
    sizes = []
    for how in (None, compress):
        with dbm_bitcask.open(tmp_path / str(how), compress=how) as db:
            db.update(texts(50))
            sizes.append(db.stats().log_bytes)
    assert sizes[1] < sizes[0] / 2


@each_layer
def test_handles_with_different_options_share_a_database(path, files):
    model = {}
    for turn, how in enumerate([None, "zlib", "zstd", None, "zstd", "zlib"]):
        with dbm_bitcask.open(path, compress=how, files=files) as db:
            assert dict(db) == model
            fresh = {b"key %d" % number: text(turn, 200 * number) for number in range(turn, 9)}
            db.update(fresh)
            model.update(fresh)
            assert dict(db) == model
    assert everything(path) == model
    with dbm_bitcask.open(path, "r", files=files) as db:
        assert {stored(db, key).flags & record.EXTENDED for key in db} == {0, ZLIB, ZSTD}


@each_name
def test_compressed_values_are_found_without_index_from_hints_and_from_the_log_alone(path, compress):
    with dbm_bitcask.open(path, compress=compress, **TINY) as db:
        db.update(texts(60))
        db.update(texts(20, turn=1))
        del db[b"key 7"]
    model = {**texts(60), **texts(20, turn=1)}
    del model[b"key 7"]
    assert everything(path) == model
    (path / "keydir").unlink(missing_ok=True)
    assert list(path.glob("*.hint"))
    assert everything(path) == everything(path, "w") == model
    lose_index(path)
    assert everything(path) == everything(path, "w") == model


@each_name
def test_merge_backup_and_repair_keep_the_stored_bytes_without_compressing_them_again(path, tmp_path, compress, monkeypatch):
    with dbm_bitcask.open(path, compress=compress, **TINY) as db:
        db.update(texts(40))
        db.update(texts(20, turn=1))
        model = dict(db)
        before = {key: (bytes(found.value), found.flags & record.EXTENDED) for key in db for found in [stored(db, key)]}
    assert {flags for _, flags in before.values()} == {FLAGS[compress]}
    monkeypatch.setattr(compression, "unpack", None)
    with dbm_bitcask.open(path, "w", **TINY) as db:
        db.merge()
        db.backup(tmp_path / "copy")
    monkeypatch.undo()
    lost = sealed(tmp_path / "copy")[0]
    data = lost.read_bytes()
    lost.unlink()  # the other database shares it
    lost.write_bytes(data.replace(b"key ", b"kex ", 1))
    repair(tmp_path / "copy")
    for place in (path, tmp_path / "copy"):
        with dbm_bitcask.open(place, "r") as db:
            assert len(model) - len(db) == (place != path)
            assert all((bytes(stored(db, key).value), stored(db, key).flags & record.EXTENDED) == before[key] for key in db)
            assert dict(db).items() <= model.items()


@each_name
def test_shelf_over_a_compressed_database(path, compress):
    rows = [{"name": f"number {number}", "tags": ["snow", "ice"] * 50} for number in range(20)]
    with dbm_bitcask.open_shelf(path, compress=compress) as shelf:
        for number, row in enumerate(rows):
            shelf[str(number)] = row
        assert shelf.pop("3") == shelf.setdefault("3", rows[3]) == rows[3]
    with dbm_bitcask.open_shelf(path, "r") as shelf:
        assert [shelf[str(number)] for number in range(20)] == rows
        assert sorted(map(json.dumps, shelf.values())) == sorted(map(json.dumps, rows))


@each_name
def test_pickled_handle_compresses_as_the_first_one_did(path, compress):
    with dbm_bitcask.open(path, compress=compress) as db, pickle.loads(pickle.dumps(db)) as other:
        other[b"key"] = TEXT
        assert db[b"key"] == TEXT
        assert stored(db, b"key").flags & FLAGS[compress]


@each_name
def test_threads_and_processes_see_what_others_set_compressed(path, compress):
    with dbm_bitcask.open(path, compress=compress) as db, dbm_bitcask.open(path, "r") as reader:
        for number in range(300):
            db[b"key"] = text(number)
            assert reader[b"key"] == text(number)
            if number % 60 == 0:
                rotate(db)
                db.merge()


@pytest.mark.parametrize("wrong", ["gzip", "ZLIB", "", 0, 1, True, b"zlib"], ids=repr)
def test_unknown_compression_is_a_value_error_and_nothing_is_made(path, wrong):
    with pytest.raises(ValueError, match="compress must be 'zlib', 'zstd' or None"):
        dbm_bitcask.open(path, compress=wrong)
    assert not path.exists()


# Without zstd.


@pytest.mark.usefixtures("without_zstd")
@pytest.mark.parametrize("flag", ["c", "n", "w"])
def test_zstd_without_a_module_for_it_is_an_error_that_says_what_to_install_and_nothing_is_made(path, flag):
    with pytest.raises(dbm_bitcask.error, match=r"install dbm-bitcask\[zstd\]"):
        dbm_bitcask.open(path, flag, compress="zstd")
    assert not path.exists()
    path.touch()
    with pytest.raises(dbm_bitcask.error, match=r"install dbm-bitcask\[zstd\]"):
        dbm_bitcask.open(path, flag, compress="zstd")
    assert path.is_file()


def test_zstd_value_is_an_error_where_it_cannot_be_read_and_everything_else_goes_on(path, monkeypatch):
    with dbm_bitcask.open(path, compress="zstd") as db:
        db.update({b"zstd": TEXT, b"small": b"value"})
    lose_zstd(monkeypatch)
    with dbm_bitcask.open(path, compress="zlib") as db:
        db[b"zlib"] = TEXT
        for look in (lambda: db[b"zstd"], lambda: db.get(b"zstd"), lambda: db.pop(b"zstd"), lambda: db.setdefault(b"zstd"), db.popitem):
            with pytest.raises(dbm_bitcask.error, match=r"install dbm-bitcask\[zstd\]"):
                look()
        with pytest.raises(dbm_bitcask.error, match=r"install dbm-bitcask\[zstd\]"):
            list(db.items())
        assert (db[b"small"], db[b"zlib"], list(db), len(db)) == (b"value", TEXT, [b"zstd", b"small", b"zlib"], 3)
        assert check(path) == []
        db.merge()
        del db[b"zstd"]
        assert dict(db) == {b"small": b"value", b"zlib": TEXT}


def test_zstd_is_not_imported_where_it_is_not_used(path):
    script = """
import sys, dbm_bitcask
with dbm_bitcask.open(sys.argv[1], compress="zlib") as db:
    db[b"key"] = bytes(1000)
    assert db[b"key"] == bytes(1000)
print([name for name in sys.modules if name.endswith("zstd")])
"""
    assert run_python(script, path).strip() == "[]"


# What somebody made up, or what is wrong although its checksum is right.


FORGED = {
    "zlib, no stream": (ZLIB, b"no stream at all, but some bytes"),
    "zlib, nothing": (ZLIB, b""),
    "zlib, cut": (ZLIB, zlib.compress(TEXT)[:-5]),
    "zlib, more behind it": (ZLIB, zlib.compress(TEXT) + b"more"),
    "zlib, flipped": (ZLIB, zlib.compress(TEXT)[:-1] + b"x"),
    "zstd, no frame": (ZSTD, b"no frame at all, but some bytes"),
    "zstd, nothing": (ZSTD, b""),
    "zstd that is zlib": (ZSTD, zlib.compress(TEXT)),
    "both": (ZLIB | ZSTD, zlib.compress(TEXT)),
}


def forge(path, flags, data, key=b"forged"):
    """Append a record with this value to a closed database."""
    with dbm_bitcask.open(path) as db:
        db[b"before"] = b"value"
        rotate(db)
    file = active(path)
    offset = file.stat().st_size
    append(file, (flags, key, data))
    assert record.decode(file.read_bytes(), offset, int.from_bytes(file.read_bytes()[16:24], "little") ^ offset) is not None


@each_layer
@pytest.mark.parametrize(("flags", "data"), FORGED.values(), ids=FORGED)
def test_value_that_cannot_be_decompressed_is_corruption_that_names_the_place_and_others_stay(path, flags, data, files):
    forge(path, flags, data)
    with dbm_bitcask.open(path, "w", files=files) as db:
        db[b"behind"] = TEXT
        location = db._log.find(b"forged")
        place = str(path / segment_name(location >> 32)), location & 0xFFFFFFFF
        for look in (db.__getitem__, db.get, db.pop, db.setdefault):
            with pytest.raises(dbm_bitcask.CorruptionError, match="cannot be decompressed") as failure:
                look(b"forged")
            assert (failure.value.path, failure.value.offset) == place
        with pytest.raises(dbm_bitcask.CorruptionError, match="cannot be decompressed"):
            list(db.items())
        assert b"forged" in db
        assert (db[b"before"], db[b"behind"], list(db)) == (b"value", TEXT, [b"before", b"forged", b"behind"])
        db[b"forged"] = b"new"
        assert db[b"forged"] == b"new"
        del db[b"forged"]
        assert len(db) == 2


@each_name
def test_value_of_more_bytes_than_a_value_may_have_is_corruption_before_they_are_made(path, compress, monkeypatch):
    flags, data = compression.packer(compress)(bytes(50_000_000))
    assert len(data) < 500_000
    forge(path, flags, data)
    with dbm_bitcask.open(path, "w") as db:
        assert len(db[b"forged"]) == 50_000_000
        monkeypatch.setattr(log, "LARGEST_VALUE", 1_000_000)
        with pytest.raises(dbm_bitcask.CorruptionError, match="cannot be decompressed"):
            db[b"forged"]
        del db[b"forged"]


@each_name
def test_flipped_bit_of_a_compressed_record_is_found_by_its_checksum(path, compress):
    with dbm_bitcask.open(path, compress=compress) as db:
        db[b"key"] = TEXT
        db[b"other"] = b"value"
        location = db._log.find(b"key")
        length = db._log.peek(location).length
    file = active(path)
    good = file.read_bytes()
    for place in itertools.chain(range(36), range(36, length, 7)):
        offset = (location & 0xFFFFFFFF) + place
        poke(file, offset, bytes([good[offset] ^ 8]))
        with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
            db[b"key"]
        poke(file, offset, good[offset : offset + 1])
    assert everything(path) == {b"key": TEXT, b"other": b"value"}


def test_expiry_stands_before_the_key_of_a_compressed_record(path):
    with dbm_bitcask.open(path, compress="zlib") as db:
        db[b"key"] = TEXT
    data = active(path).read_bytes()
    assert data[32 + 24 : 32 + 24 + 8 + 3] == bytes(8) + b"key"
    assert encoded(active(path), 32, b"key", zlib.compress(TEXT, 1), ZLIB)[24:40] == data[56:72]
