"""A backup is the database as of one moment, whatever is written meanwhile, and goes its own way afterwards."""

from __future__ import annotations

import errno
import os
import threading

import pytest

import dbm_bitcask
from children import fork_and_wait
from crashes import freeze
from dbm_bitcask.engine import backup, files, names, segment
from dbm_bitcask.engine.check import check

TINY = {"segment_size": 4096}
ITEMS = {b"key %d" % number: b"value %d " % number * 20 for number in range(200)}


@pytest.fixture
def db(path):
    with dbm_bitcask.open(path, **TINY) as db:
        db.update(ITEMS)
        del db[b"key 7"]
        db[b"key 8"] = b"again"
        yield db


@pytest.fixture
def there(tmp_path):
    return tmp_path / "backup"


EXPECTED = {**{key: value for key, value in ITEMS.items() if key != b"key 7"}, b"key 8": b"again"}


def everything(path, flag="r"):
    with dbm_bitcask.open(path, flag) as db:
        assert len(db) == len(db.keys())
        return dict(db)


@pytest.mark.parametrize("flag", ["r", "w"])
def test_backup_is_what_the_database_was(db, path, there, flag):
    with dbm_bitcask.open(path, flag, **TINY) as handle:
        handle.backup(there)
    db[b"key 1"] = b"later"
    assert everything(there) == EXPECTED
    assert check(there) == []
    assert sorted(entry.name for entry in there.parent.iterdir()) == ["backup", "db"]


def test_backup_goes_its_own_way(db, there):
    db.backup(there)
    db.clear()
    assert everything(there) == EXPECTED
    with dbm_bitcask.open(there, **TINY) as other:
        other.update(dict.fromkeys(ITEMS, b"other"))
        other.merge()
    assert len(db) == 0
    assert everything(there) == dict.fromkeys(ITEMS, b"other")
    assert check(there) == []


def test_merge_of_the_original_leaves_the_backup_whole(db, there):
    db.backup(there)
    for turn in range(3):
        db.update(dict.fromkeys(ITEMS, b"%d" % turn * 50))
        db.merge()
    assert everything(there) == EXPECTED
    assert check(there) == []


def test_sealed_segments_are_shared_and_the_active_one_is_not(db, there):
    db.backup(there)
    shared = {file.name for file in there.iterdir() if file.stat().st_nlink > 1}
    sealed = {names.segment_name(entry.id) for entry in db._log.manifest.segments[:-1]}
    assert sealed
    assert sealed <= shared
    assert {name for name in shared if name.endswith(".data")} == sealed


@pytest.mark.skipif('config.getoption("files") == "portable"', reason="the index is in memory")
def test_backup_opens_by_its_own_index(db, there, monkeypatch):
    db.backup(there)
    monkeypatch.setattr(dbm_bitcask.engine.recovery, "rebuild", None)
    monkeypatch.setattr(dbm_bitcask.engine.recovery, "open_private_keydir", None)
    for flag in "rw":
        assert everything(there, flag) == EXPECTED


def test_where_no_file_can_be_shared_all_are_copied(db, there, monkeypatch):
    def link(*_args, **_kwargs):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", link)
    db.backup(there)
    assert {file.stat().st_nlink for file in there.iterdir()} == {1}
    assert everything(there) == EXPECTED
    assert check(there) == []


def test_backup_of_an_empty_database_and_of_a_backup(path, there, tmp_path):
    with dbm_bitcask.open(path) as db:
        db.backup(there)
        assert everything(there) == {}
        db[b"key"] = b"value"
        db.backup(tmp_path / "second")
    with dbm_bitcask.open(tmp_path / "second") as db:
        db[b"more"] = b""
        db.backup(tmp_path / "third")
    assert everything(tmp_path / "third") == {b"key": b"value", b"more": b""}


def test_progress_ends_with_all_bytes(db, there):
    told = []
    db.backup(there, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > len(ITEMS) * 100


def test_segments_that_are_merged_away_meanwhile_are_begun_with_anew(db, path, there, monkeypatch):
    take, merged = backup._take, []

    def merge_first(source, directory, entry, mode):
        if not merged and entry.id > 2:
            merged.append(entry)
            with dbm_bitcask.open(path, **TINY) as other:
                other.update(dict.fromkeys(ITEMS, b"merged"))
                other.merge()
        take(source, directory, entry, mode)

    monkeypatch.setattr(backup, "_take", merge_first)
    db.backup(there)
    assert merged
    assert merged[0].id not in [entry.id for entry in db._log.manifest.segments]
    assert everything(there) == dict.fromkeys(ITEMS, b"merged")
    assert check(there) == []


def test_backups_beside_a_writer_are_each_of_one_moment(path, tmp_path):
    """A counter that is written to several keys in turn: between two of them at most one step lies."""
    keys = [b"a", b"b", b"c", b"d"]
    stop = threading.Event()

    def write():
        with dbm_bitcask.open(path, **TINY) as writer:
            number = 0
            while not stop.is_set():
                number += 1
                for key in keys:
                    writer[key] = b"%d" % number * 40
                if number % 50 == 0:
                    writer.merge()

    with dbm_bitcask.open(path, **TINY) as db:
        db.update(dict.fromkeys(keys, b"0"))
        writing = threading.Thread(target=write)
        writing.start()
        try:
            for number in range(10):
                db.backup(tmp_path / f"backup {number}")
        finally:
            stop.set()
            writing.join()
    for number in range(10):
        found = everything(tmp_path / f"backup {number}")
        values = [int(found[key][: max(1, len(found[key]) // 40)]) for key in keys]
        assert values == sorted(values, reverse=True)
        assert values[0] - values[-1] <= 1
        assert check(tmp_path / f"backup {number}") == []


@pytest.mark.parametrize("what", ["file", "full directory", "database"])
def test_what_is_there_already_is_left_alone(db, there, what):
    if what == "file":
        there.write_bytes(b"mine")
    elif what == "full directory":
        there.mkdir()
        (there / "mine").write_bytes(b"mine")
    else:
        dbm_bitcask.open(there).close()
    before = there.read_bytes() if what == "file" else freeze(there)
    with pytest.raises(dbm_bitcask.error):
        db.backup(there)
    assert (there.read_bytes() if what == "file" else freeze(there)) == before
    assert sorted(entry.name for entry in there.parent.iterdir()) == ["backup", "db"]


def test_missing_parent_is_an_error(db, there):
    with pytest.raises(dbm_bitcask.error, match="does not exist"):
        db.backup(there / "deeper")


@pytest.mark.parametrize("step", range(1, 40, 3))
def test_failure_in_the_middle_leaves_nothing(db, there, monkeypatch, step):
    steps = []
    create = files.Directory.create

    def create_or_fail(self, name, mode):
        if ".tmp" in self.name:
            steps.append(name)
            if len(steps) == step:
                raise OSError(errno.ENOSPC, "full", name)
        return create(self, name, mode)

    monkeypatch.setattr(os, "link", lambda *_args, **_kwargs: (_ for _ in ()).throw(OSError(errno.EXDEV, "another file system")))
    monkeypatch.setattr(files.Directory, "create", create_or_fail)
    try:
        db.backup(there)
    except dbm_bitcask.error as failure:
        assert failure.errno == errno.ENOSPC
        assert [entry.name for entry in there.parent.iterdir()] == ["db"]
    else:
        assert everything(there) == EXPECTED


def test_process_that_dies_in_the_middle_leaves_no_database_at_the_path(db, path, there, monkeypatch):
    def work():
        monkeypatch.setattr(segment, "create", lambda *_: os._exit(0))
        with dbm_bitcask.open(path, "r") as other:
            other.backup(there)

    fork_and_wait(work)
    assert not there.exists()
    db.backup(there)
    assert everything(there) == EXPECTED


def test_lost_segment_is_told(db, path, there):
    number = db._log.manifest.segments[1].id
    lost = path / names.segment_name(number)
    lost.rename(path.parent / "kept")
    with pytest.raises(dbm_bitcask.CorruptionError, match=lost.name):
        db.backup(there)
    assert not there.exists()
    (path.parent / "kept").rename(lost)


def test_closed_database_has_no_backup(db, there):
    db.close()
    with pytest.raises(dbm_bitcask.error):
        db.backup(there)


@pytest.mark.parametrize("where", ["", "db", "db/within", "db/../db/within"])
def test_backup_to_no_path_or_into_the_database_itself_is_an_error(db, path, monkeypatch, where):
    monkeypatch.chdir(path.parent)
    db[b"key"] = b"value"
    before = sorted(path.iterdir())
    with pytest.raises(dbm_bitcask.error):
        db.backup(where)
    assert sorted(path.iterdir()) == before
