"""What goes wrong is an `error` with a message, or what a mapping raises. Never what a parser happens to raise."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from pathlib import Path

import pytest

import dbm_bitcask
from children import run_python
from dbm_bitcask.engine import manifest
from dbm_bitcask.engine.check import check

ITEMS = {b"key %d" % i: b"value %d" % i * 5 for i in range(120)}
every_flag = pytest.mark.parametrize("flag", ["r", "w", "c", "n"])


@pytest.fixture
def full(tmp_path):
    """The path of a closed database in several segments. It need not be whole when the test is over."""
    path = tmp_path / "full"
    with dbm_bitcask.open(path, segment_size=4096) as db:
        db.update(dict.fromkeys(ITEMS, b"first"))
        db.reorganize()
        db.update(ITEMS)
    return path


@pytest.fixture
def reader(full):
    with dbm_bitcask.open(full, "r") as db:
        yield db


def contents_of_all_files(directory):
    return {str(file): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


# The tree


def test_error_is_an_os_error_of_its_own():
    assert issubclass(dbm_bitcask.error, OSError)
    assert dbm_bitcask.error is not OSError


def test_corruption_error_is_an_error():
    assert issubclass(dbm_bitcask.CorruptionError, dbm_bitcask.error)


def test_errors_survive_pickling(full):
    caught = [dbm_bitcask.CorruptionError("a path", 7, "a reason")]
    for path, flag in ((full.parent / "missing", "r"), (full, "rx")):
        with pytest.raises(dbm_bitcask.error) as failure:
            dbm_bitcask.open(path, flag)
        caught.append(failure.value)
    for before in caught:
        after = pickle.loads(pickle.dumps(before))
        assert type(after) is type(before)
        assert str(after) == str(before)


# Read-only


def update_in_place(db):
    db |= {b"key": b"value"}


WRITES = {
    "set item": lambda db: db.__setitem__(b"key 1", b"value"),
    "set new item": lambda db: db.__setitem__(b"new", b"value"),
    "delete item": lambda db: db.__delitem__(b"key 1"),
    "delete missing item": lambda db: db.__delitem__(b"missing"),
    "setdefault": lambda db: db.setdefault(b"new", b"value"),
    "pop": lambda db: db.pop(b"key 1"),
    "popitem": lambda db: db.popitem(),
    "update": lambda db: db.update({b"key 1": b"value"}),
    "|=": update_in_place,
    "clear": lambda db: db.clear(),
    "reorganize": lambda db: db.reorganize(),
    "merge": lambda db: db.merge(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_to_a_database_that_is_open_for_reading_is_an_error(reader, full, write):
    before = contents_of_all_files(full)
    with pytest.raises(dbm_bitcask.error) as failure:
        write(reader)
    assert failure.value.args[0] == "The database is opened for reading only"
    assert dict(reader) == ITEMS
    assert contents_of_all_files(full) == before


# Sizes

TOO_LARGE = """
import mmap, os, resource, sys
import dbm_bitcask

path, sparse, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(sparse, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, length)
large = mmap.mmap(fd, length, access=mmap.ACCESS_READ)
resource.setrlimit(resource.RLIMIT_DATA, (512 * 2**20, 512 * 2**20))
with dbm_bitcask.open(path) as db:
    db[b"key"] = b"value"
    db.sync()
    before = {name: os.stat(os.path.join(path, name)).st_size for name in os.listdir(path)}
    for buffer in (large, memoryview(large)):
        for key, value in ((b"key", buffer), (b"new", buffer), (buffer, b"value"), (buffer, buffer)):
            try:
                db[key] = value
            except ValueError as failure:
                assert type(failure) is ValueError, failure
                assert str(failure)
            else:
                raise AssertionError("it was accepted")
    assert before == {name: os.stat(os.path.join(path, name)).st_size for name in os.listdir(path)}
    assert dict(db) == {b"key": b"value"}
"""


@pytest.mark.skipif(sys.maxsize < 2**32, reason="a 32-bit process cannot hold anything that is too large")
@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files, and a limit on memory that leaves out maps of files")
@pytest.mark.parametrize("length", [2**32 - 1, 2**32, 2**32 + 4096, 2**33])
def test_what_is_too_large_is_a_value_error_before_anything_is_written(path, tmp_path, length):
    run_python(TOO_LARGE, path, tmp_path / "sparse", length)
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


# Bad files


@contextlib.contextmanager
def only_errors():
    """Accepts an `error` that says something, and nothing else that is raised."""
    try:
        yield
    except dbm_bitcask.error as failure:
        if not str(failure):
            raise


def opened_and_read(path, flag):
    """The items of a database whose files may be bad."""
    with dbm_bitcask.open(path, flag) as db:
        for key in [*ITEMS, b"missing"]:
            with only_errors():
                db.get(key)
                _ = key in db
        assert len(db) == len(db.keys())
        return dict(db.items())


BAD_MANIFESTS = {
    "empty": lambda _good: b"",
    "one byte": lambda good: good[:1],
    "only its marker": lambda good: good[:16],
    "without its last byte": lambda good: good[:-1],
    "with one byte more": lambda good: good + b"\0",
    "half": lambda good: good[: len(good) // 2],
    "zeros": lambda good: bytes(len(good)),
    "ones": lambda good: b"\xff" * len(good),
    "ones behind the marker": lambda good: good[:16] + b"\xff" * (len(good) - 16),
    "twice": lambda good: good * 2,
    "text": lambda _good: b"include README.md\ngraft tests\n" * 10,
    "json": lambda _good: b'{"version": 1, "segments": []}',
}


@every_flag
@pytest.mark.parametrize("bad", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_bad_manifest_is_an_error_that_names_the_file_and_nothing_is_touched(full, bad, flag):
    file = full / "MANIFEST"
    file.write_bytes(bad(file.read_bytes()))
    before = contents_of_all_files(full)
    with pytest.raises(dbm_bitcask.error, match="MANIFEST"):
        dbm_bitcask.open(full, flag)
    assert contents_of_all_files(full) == before


def test_every_truncated_manifest_is_an_error(full):
    file = full / "MANIFEST"
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(full, "r")
    file.write_bytes(good)
    assert opened_and_read(full, "r") == ITEMS


def test_every_flipped_bit_of_the_manifest_is_an_error(full):
    file = full / "MANIFEST"
    good = file.read_bytes()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(full, "r")


@every_flag
def test_manifest_of_a_newer_version_says_so_and_nothing_is_touched(full, flag, monkeypatch):
    file = full / "MANIFEST"
    old = manifest.decode(file.read_bytes())
    with monkeypatch.context() as newer:
        newer.setattr(manifest, "VERSION", manifest.VERSION + 1)
        encoded, _ = manifest.encode(old)
    file.write_bytes(encoded)
    before = contents_of_all_files(full)
    with pytest.raises(dbm_bitcask.error, match="version 2"):
        dbm_bitcask.open(full, flag)
    assert contents_of_all_files(full) == before


def flip_a_bit(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def overwrite_with(filling):
    def overwrite(data, chance):
        at = chance.randrange(len(data))
        piece = filling * chance.choice([4, 8, 64, 4096])
        return data[:at] + piece[: len(data) - at] + data[at + len(piece) :]

    return overwrite


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "ones": overwrite_with(b"\xff"),
    "zeros": overwrite_with(b"\0"),
    "noise": lambda data, chance: overwrite_with(chance.randbytes(1))(data, chance),
    "a cut": lambda data, chance: data[: chance.randrange(len(data))],
    "an empty file": lambda _data, _chance: b"",
    "noise behind": lambda data, chance: data + chance.randbytes(chance.randrange(1, 9000)),
    "only noise": lambda data, chance: chance.randbytes(len(data)),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def with_hints(full):
    """A database whose keydir had to be rebuilt is one that has hints."""
    (full / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(full, "w") as db:
        assert dict(db) == ITEMS
    return sorted(full.glob("*.hint"))


def damage_one(files, damage, seed):
    chance = random.Random(seed)
    file = chance.choice([file for file in files if file.stat().st_size])
    file.write_bytes(damage(file.read_bytes(), chance))


def lose_the_index(full):
    (full / "keydir").unlink(missing_ok=True)
    for hint in full.glob("*.hint"):
        hint.unlink()


with_and_without_index = pytest.mark.parametrize("lose", [lambda _full: None, lose_the_index], ids=["with index", "without index"])


@pytest.mark.parametrize("flag", ["r", "w"])
@every_damage
def test_damaged_keydir_never_changes_what_is_read(full, damage, flag):
    good = (full / "keydir").read_bytes()
    for seed in range(8):
        (full / "keydir").write_bytes(good)
        damage_one([full / "keydir"], damage, seed)
        try:
            assert opened_and_read(full, flag) == ITEMS
        except dbm_bitcask.error as failure:
            pytest.fail(f"a keydir is rebuilt and not complained of: {failure!r}")
        good = (full / "keydir").read_bytes() if flag == "w" else good


@pytest.mark.parametrize("keydir", ["there", "lost"])
@every_damage
def test_damaged_hint_never_changes_what_is_read(full, damage, keydir):
    hints = with_hints(full)
    good = {hint: hint.read_bytes() for hint in hints}
    for seed in range(8):
        for hint, data in good.items():
            hint.write_bytes(data)
        if not hints:
            pytest.skip("this engine wrote no hint")
        damage_one(hints, damage, seed)
        if keydir == "lost":
            (full / "keydir").unlink(missing_ok=True)
        assert opened_and_read(full, "r") == ITEMS
        assert opened_and_read(full, "w") == ITEMS


@pytest.mark.parametrize("flag", ["r", "w"])
@with_and_without_index
@every_damage
def test_damaged_segment_gives_errors_and_never_a_value_that_was_not_written(full, damage, lose, flag):
    before = contents_of_all_files(full)
    for seed in range(8):
        for name, data in before.items():
            Path(name).write_bytes(data)
        damage_one(sorted(full.glob("*.data")), damage, seed)
        lose(full)
        with only_errors():
            items = opened_and_read(full, flag)
            assert all(value in (b"first", ITEMS[key]) for key, value in items.items())


def what_is_readable(full):
    """The items that can be read one by one; a KeyError is not caught, it would be a loss that nobody is told of."""
    readable = {}
    try:
        with dbm_bitcask.open(full, "w") as db:
            for key in ITEMS:
                try:
                    readable[key] = db[key]
                except dbm_bitcask.CorruptionError:
                    continue
    except dbm_bitcask.CorruptionError:
        return {}
    return readable


@pytest.mark.parametrize("damage", [flip_a_bit, overwrite_with(b"\0"), overwrite_with(b"\xff")])
@with_and_without_index
def test_damage_in_a_sealed_segment_is_never_a_silent_loss(full, damage, lose):
    before = contents_of_all_files(full)
    for seed in range(12):
        for name, data in before.items():
            Path(name).write_bytes(data)
        damage_one(sorted(full.glob("*.data"))[:-1], damage, seed)
        lose(full)
        assert what_is_readable(full).items() <= ITEMS.items()


@with_and_without_index
def test_flipped_bit_in_the_active_segment_of_a_closed_database_is_never_a_silent_loss(full, lose):
    before = contents_of_all_files(full)
    for seed in range(24):
        for name, data in before.items():
            Path(name).write_bytes(data)
        damage_one([max(full.glob("*.data"))], flip_a_bit, seed)
        lose(full)
        assert what_is_readable(full).items() <= ITEMS.items()


@pytest.mark.parametrize("filling", [b"\xff" * 8, bytes(8)], ids=["ones", "zeros"])
def test_wherever_a_word_of_the_log_is_damaged_all_keys_are_listed_or_an_error_tells_that_they_are_not(full, filling):
    for file in sorted(full.glob("*.data")):
        good = file.read_bytes()
        for at in range(0, len(good), 8):
            file.write_bytes(good[:at] + filling + good[at + 8 :])
            with contextlib.suppress(dbm_bitcask.CorruptionError), dbm_bitcask.open(full, "r") as db:
                assert sorted(db.keys()) == sorted(ITEMS), f"{file.name} at offset {at}"
        file.write_bytes(good)


def test_damaged_value_is_a_corruption_error_with_the_place_and_the_others_stay_readable(full):
    data = {file: file.read_bytes() for file in full.glob("*.data")}
    value = ITEMS[b"key 60"]
    [(file, at)] = [(file, found.find(value)) for file, found in data.items() if value in found]
    file.write_bytes(data[file][:at] + b"X" + data[file][at + 1 :])
    with dbm_bitcask.open(full, "r") as db:
        with pytest.raises(dbm_bitcask.CorruptionError) as failure:
            db[b"key 60"]
        assert Path(failure.value.path).name == file.name
        assert 0 < failure.value.offset <= at
        assert file.name in str(failure.value)
        assert str(failure.value.offset) in str(failure.value)
        assert {key: db[key] for key in ITEMS if key != b"key 60"} == {key: value for key, value in ITEMS.items() if key != b"key 60"}
    assert check(full)


def test_damaged_record_can_be_overwritten(full):
    value = ITEMS[b"key 60"]
    for file in full.glob("*.data"):
        file.write_bytes(file.read_bytes().replace(value, value.swapcase()))
    with dbm_bitcask.open(full, "w") as db:
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[b"key 60"]
        db[b"key 60"] = b"new"
        assert db[b"key 60"] == b"new"
        assert len(db) == len(ITEMS)


def test_missing_segment_is_a_corruption_error_for_its_keys_and_not_a_key_error(full):
    value = ITEMS[b"key 60"]
    [file] = [file for file in full.glob("*.data") if value in file.read_bytes()]
    file.unlink()
    with pytest.raises(dbm_bitcask.CorruptionError, match=file.name), dbm_bitcask.open(full, "r") as db:
        db[b"key 60"]


def test_check_of_what_is_no_database_is_an_error(tmp_path):
    with pytest.raises(dbm_bitcask.error):
        check(tmp_path / "missing")
    with pytest.raises(dbm_bitcask.error):
        check(tmp_path)


@every_damage
def test_check_reports_damage_and_raises_nothing_but_error(full, damage):
    before = contents_of_all_files(full)
    for seed in range(4):
        for kind in ("*.data", "keydir", "MANIFEST"):
            for name, data in before.items():
                Path(name).write_bytes(data)
            damage_one(sorted(full.glob(kind)), damage, seed)
            damaged = contents_of_all_files(full)
            with only_errors():
                assert isinstance(check(full), list)
            assert contents_of_all_files(full) == damaged


def test_check_finds_every_flipped_byte_of_a_sealed_segment(full):
    file = min(full.glob("*.data"))
    good = file.read_bytes()
    assert check(full) == []
    for at in range(0, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 0x10
        file.write_bytes(bad)
        assert check(full), f"a flipped bit at {at} went unnoticed"
