"""Values of any size: what was set comes back, nothing is copied more than needed, and a write that is cut short goes on or is undone."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dbm_bitcask
from by_hand import active, everything, lose_index, rotate
from children import run_python
from crashes import abandon
from dbm_bitcask.engine import files, lookup, record, write
from dbm_bitcask.engine.check import check

LARGE = write.LARGE
EDGES = sorted({edge + more for edge in (lookup._LARGE, LARGE, 2 * LARGE) for more in range(-50, 20, 3)})
SIZES = [0, 1, 100, 1000, *EDGES, 300_000, 3_000_000]

each_layer = pytest.mark.parametrize("layer", ["native", "portable"])


def value(size, turn=0):
    return (b"%d of %d, " % (turn, size) * (size // 8 + 1))[:size]


def values(turn=0):
    return {b"key %d" % size: value(size, turn) for size in SIZES}


# As bytes.


@given(st.integers(0, 0xFF), st.binary(max_size=40), st.binary(max_size=3000), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_record_in_parts_is_the_record(flags, key, value, seed, expiry):
    whole = record.encode(flags, key, value, seed, 1_700_000_000, expiry)
    assert record.encode_before(flags, key, value, seed, 1_700_000_000, expiry) + value == whole
    assert record.encode_before(flags, key, memoryview(value), seed, 1_700_000_000, expiry) + value == whole


def test_decoded_value_is_a_view_of_the_bytes_that_it_was_decoded_from():
    data = bytearray(record.encode(0, b"key", value(1000), 7, 0))
    found = record.decode(data, 0, 7)
    assert found.value == value(1000)
    data[-1] ^= 1
    assert found.value != value(1000)


# In a database.


@each_layer
@pytest.mark.parametrize("segment_size", [4096, 100_000, 2**26])
def test_values_of_every_size_come_back(path, layer, segment_size):
    model = {**values(), **{b"key %d" % size: value(size, 1) for size in SIZES[::3]}}
    with dbm_bitcask.open(path, files=layer, segment_size=segment_size) as db, dbm_bitcask.open(path, "r", files=layer) as reader:
        db.update(values())
        assert dict(reader) == values()
        for size in SIZES[::3]:
            db[b"key %d" % size] = value(size, 1)
            assert db[b"key %d" % size] == reader[b"key %d" % size] == value(size, 1)
        assert all(db[key] == reader.get(key) == model[key] for key in model)
        assert all(type(found) is bytes for found in db.values())
        assert sorted(db) == sorted(model)
        assert all(key in reader for key in model)
        assert db.pop(b"key 300000") == model.pop(b"key 300000")
        assert db.setdefault(b"key 300000", value(300_000)) == model.setdefault(b"key 300000", value(300_000))
    assert everything(path) == model
    lose_index(path)
    assert everything(path, "w") == model
    with dbm_bitcask.open(path, "w", files=layer, segment_size=segment_size) as db:
        db.merge()
        assert dict(db) == model


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, bytes.decode])
@pytest.mark.parametrize("size", [1000, 300_000])
def test_every_kind_of_value_is_stored_as_of_now(db, kind, size):
    given = kind(value(size))
    db[b"key"] = given
    if kind is bytearray:
        given[0] ^= 1
    assert db[b"key"] == value(size)


def test_record_that_is_larger_than_a_segment_has_one_of_its_own_and_a_merge_beside_it_leaves_it_there(path):
    with dbm_bitcask.open(path, segment_size=10_000) as db:
        for turn in range(3):
            db.update({b"%d" % number: value(400, turn) for number in range(20)})
            if turn == 1:
                db[b"large"] = value(50_000)
        location = db._log.find(b"large")
        entry = db._log.entries[location >> 32]
        assert location & 0xFFFFFFFF == 32
        assert entry.length == 32 + record.record_length(0, 5, 50_000) + record.record_length(record.SEAL, 0, 0)
        db.merge()
        assert db[b"large"] == value(50_000)
        assert db._log.find(b"large") == location
        del db[b"large"]
        db.merge()
        assert entry.id not in db._log.entries
        assert not list(path.glob(f"*{entry.id}.data"))


def test_flipped_bit_anywhere_in_a_large_record_is_corruption(path):
    with dbm_bitcask.open(path) as db:
        db[b"large"] = value(100_000)
        db[b"other"] = b"value"
    file = active(path)
    good = file.read_bytes()
    for offset in [*range(32, 70), *range(70, 100_000, 9973)]:
        file.write_bytes(good[:offset] + bytes([good[offset] ^ 16]) + good[offset + 1 :])
        with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
            db[b"large"]
    file.write_bytes(good)
    assert everything(path) == {b"large": value(100_000), b"other": b"value"}


# Writes that are cut short.


def gather(patch, call):
    """Have `call(fd, parts, offset)` stand for the system call."""
    patch.setattr(files, "os", Gathering(call))


class Gathering:
    """The module `os` with another `pwritev`."""

    def __init__(self, call):
        self.pwritev = call

    def __getattr__(self, name):
        return getattr(os, name)


@pytest.mark.parametrize("new", [True, False], ids=["new key", "old key"])
@pytest.mark.parametrize("most", [0, 1, 23, 24, 28, 29, 31, 32, 33, 40_000, 59_999, 60_032])
def test_short_write_goes_on_where_it_ended(path, monkeypatch, most, new):
    short = []

    def pwritev(fd, parts, offset):
        short.append(most)
        return os.pwrite(fd, b"".join(parts)[:most], offset)

    gather(monkeypatch, pwritev)
    with dbm_bitcask.open(path) as db:
        for number in range(300):  # of the index everything has been touched
            db[b"%d" % number] = b""
        if not new:
            db[b"key"] = b"value"
        db[b"key"] = value(60_000)
        assert db[b"key"] == value(60_000)
        db[b"behind"] = b"value"
    assert short == [most]
    lose_index(path)
    assert everything(path, "w") == {**{b"%d" % number: b"" for number in range(300)}, b"key": value(60_000), b"behind": b"value"}


@pytest.mark.parametrize("done", [0, 10, 32, 40_000, 60_024])
def test_full_disk_in_the_middle_of_a_large_value_leaves_the_old_one(path, monkeypatch, done):
    def pwritev(fd, parts, offset):
        if done:
            os.pwrite(fd, b"".join(parts)[:done], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path, "r") as reader:
        db[b"key"] = b"old"
        with monkeypatch.context() as patch:
            gather(patch, pwritev)
            rotate(db)  # a file has the calls of when it was opened
            for key in (b"key", b"new"):
                with pytest.raises(dbm_bitcask.error) as failure:
                    db[key] = value(60_000)
                assert failure.value.errno == errno.ENOSPC
                assert dict(reader) == {b"key": b"old"}
        assert dict(db) == {b"key": b"old"}
        rotate(db)
        db[b"key"] = value(60_000)
        assert dict(db) == dict(reader) == {b"key": value(60_000)}


@pytest.mark.parametrize("missing", [1, 8, 30_000, 60_000, 60_020])
def test_torn_large_record_is_cut_when_there_is_no_index(path, missing):
    with dbm_bitcask.open(path) as db:
        db[b"before"] = b"value"
        end = active(path).stat().st_size
        db[b"large"] = value(60_000)
        data = active(path).read_bytes()[end:]
        abandon(db)
    file = active(path)
    file.write_bytes(file.read_bytes()[: end + len(data) - missing])
    (path / "keydir").unlink(missing_ok=True)
    assert everything(path, "w") == {b"before": b"value"}


@pytest.mark.parametrize("missing", [0, 1, 60_000])
def test_large_record_behind_the_tail_is_finished_or_undone_by_the_next_writer(path, missing):
    with dbm_bitcask.open(path) as db:
        db[b"before"] = b"value"
        offset = active(path).stat().st_size
        data = record.encode(0, b"large", value(60_000), db._log.salt ^ offset, 0)
        with active(path).open("ab") as file:
            file.write(data[: len(data) - missing])
        db[b"behind"] = b"value"
        assert dict(db) == {b"before": b"value", b"behind": b"value", **({} if missing else {b"large": value(60_000)})}


# Memory.

MEMORY = """
import gc, resource, sys
from pathlib import Path

import dbm_bitcask
from dbm_bitcask.engine.check import check

path, size = sys.argv[1], int(sys.argv[2])

def within(values, action):
    # What an action may take of memory that is no map of a file, in sizes of the value: beyond it the system gives none.
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) for line in status if line.startswith("VmData:")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + int(values * size), resource.RLIM_INFINITY))
    try:
        return action()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def get():
    found = db[b"large"]
    assert len(found) == size and found[:100] == found[-256:-156] == bytes(range(100))

value = bytes(range(256)) * (size // 256)
db = dbm_bitcask.open(path)
db[b"small"] = b"value"
within(0.1, lambda: db.__setitem__(b"large", value))
within(0.1, lambda: db.__setitem__(b"large", value))
del value
db[b"behind"] = b"value"
try:
    within(0.9, get)
except MemoryError:
    pass
else:
    raise AssertionError("nothing is measured here")
within(1.1, get)
assert within(0.1, lambda: b"large" in db)
assert within(0.1, lambda: sorted(db)) == [b"behind", b"large", b"small"]
within(0.1, db.merge)
within(0.1, db.close)
db = within(0.1, lambda: dbm_bitcask.open(path))
within(1.1, get)
within(1.1, lambda: [len(value) for value in db.values()])
db.close()
for file in [Path(path, "keydir"), *Path(path).glob("*.hint")]:
    file.unlink(missing_ok=True)
db = within(0.1, lambda: dbm_bitcask.open(path))
assert within(0.1, lambda: len(list(db))) == 3
within(1.1, get)
assert within(0.1, lambda: check(path)) == []
within(0.1, lambda: db.__setitem__(b"large", b"now small"))
within(0.1, db.merge)
db.close()
assert check(path) == []
print(sum(file.stat().st_size for file in Path(path).glob("*.data")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory that is no map of a file")
def test_large_value_is_copied_once_by_a_get_and_never_else(place, amount):
    size = amount(sample=64 * 2**20, full=2**30, release=2**30)
    assert int(run_python(MEMORY, place / "db", size)) < 1_000_000


def test_hint_and_scan_of_large_values_are_of_their_keys_only(path):
    with dbm_bitcask.open(path, segment_size=2**20) as db:
        db.update({b"key %d" % number: value(500_000, number) for number in range(6)})
    assert sum(file.stat().st_size for file in path.glob("*.hint")) < 1000
    assert check(path) == []
