"""One test for each event by which an earlier draft of the design would have lost data, as far as one process can bring it about.

The numbers in the docstrings are those of the findings. Those on expiry (10, 28) wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading

import pytest

import dbm_bitcask
from children import fork_and_wait
from dbm_bitcask.engine import files, keydir, rotation, write
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check

TINY = {"segment_size": 4096}


def fill(path, count=200, **options):
    items = {b"key %d" % number: b"value %d" % number * 9 for number in range(count)}
    with dbm_bitcask.open(path, **options) as db:
        db.update(items)
    return items


def interrupted_after(monkeypatch, owner, name):
    """Have a function of the engine interrupted as it returns, once."""
    function = getattr(owner, name)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(owner, name, function)
        function(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


def test_interrupt_behind_the_slot_does_not_lose_the_old_value(path, monkeypatch):
    """1: there is no handler that cuts the log back."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"old"
        interrupted_after(monkeypatch, keydir.Keydir, "store")
        with pytest.raises(KeyboardInterrupt):
            db[b"key"] = b"new"
        assert db[b"key"] == b"new"
        db[b"other"] = b"1"
        assert dict(db) == {b"key": b"new", b"other": b"1"}
        assert len(db) == 2


def test_copy_of_a_database_that_is_open_is_rebuilt(path, tmp_path):
    """2 a, b: the keydir of a copy has another inode."""
    items = fill(path, **TINY)
    with dbm_bitcask.open(path, **TINY) as db:
        db[b"new"] = b"1"
        shutil.copytree(path, tmp_path / "copy")
        db[b"newer"] = b"2"
    with dbm_bitcask.open(tmp_path / "copy", "w") as copy:
        assert dict(copy) == {**items, b"new": b"1"}
    assert check(tmp_path / "copy") == []


def test_dirty_keydir_is_not_trusted_after_a_restart(path, monkeypatch):
    """2 c, d: pages may be any mix of old and new; the log is not."""
    items = fill(path)
    fork_and_wait(lambda: dbm_bitcask.open(path, "w").update({b"last": b"1"}))
    inode = (path / "keydir").stat().st_ino
    monkeypatch.setattr(files, "boot_id", lambda: 7)
    with dbm_bitcask.open(path, "w") as db:
        assert dict(db) == {**items, b"last": b"1"}
    assert (path / "keydir").stat().st_ino != inode


def test_segments_that_were_restored_under_a_newer_keydir_are_noticed(path, tmp_path):
    """2 f: records of one size end at the same places."""
    fill(path, 10)
    shutil.copytree(path, tmp_path / "backup")
    with dbm_bitcask.open(path, "w") as db:
        db[b"key 1"] = b"A" * 63
    with dbm_bitcask.open(tmp_path / "backup", "w") as other:
        other[b"key 1"] = b"B" * 63
    shutil.copyfile(tmp_path / "backup" / "00000001.data", path / "00000001.data")
    with dbm_bitcask.open(path, "r") as db:
        assert db[b"key 1"] == b"B" * 63


def test_keydir_that_is_deleted_while_it_is_used_costs_no_write_of_either_side(path):
    """3: the size of the log is the truth, not the tail in a file that can go."""
    with dbm_bitcask.open(path) as first:
        first[b"before"] = b"1"
        (path / "keydir").unlink()
        with dbm_bitcask.open(path, "w") as second:
            second[b"of the second"] = b"2"
            first[b"of the first"] = b"3"
            assert dict(first) == dict(second) == {b"before": b"1", b"of the second": b"2", b"of the first": b"3"}


def test_there_is_no_lock_file_to_delete(path):
    """4: the lock is on the directory."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        assert {file.suffix for file in path.iterdir()} <= {".data", ""}


def test_handle_stays_with_its_database_when_another_takes_its_path(path, tmp_path):
    """5: every file is reached through the descriptor of the directory."""
    with dbm_bitcask.open(path, **TINY) as old:
        old[b"old"] = b"1"
        path.rename(tmp_path / "moved")
        new_items = fill(path, **TINY)
        for number in range(300):
            old[b"%d" % number] = b"v" * 50
        old.reorganize()
    with dbm_bitcask.open(path, "r") as new:
        assert dict(new) == new_items
    with dbm_bitcask.open(tmp_path / "moved", "r") as moved:
        assert len(moved) == 301
    assert check(tmp_path / "moved") == []


def test_segment_above_the_next_id_is_another_lineage_and_is_not_deleted(path, tmp_path):
    """5: only the manifest was restored."""
    fill(path, 10)
    shutil.copyfile(path / "MANIFEST", tmp_path / "old")
    fill(path, 300, **TINY)
    shutil.copyfile(tmp_path / "old", path / "MANIFEST")
    present = {file.name for file in path.glob("*.data")}
    with pytest.raises(dbm_bitcask.CorruptionError, match="repair"):
        dbm_bitcask.open(path, "w")
    assert {file.name for file in path.glob("*.data")} == present
    (path / "MANIFEST").unlink()
    shutil.rmtree(path)


def test_hard_linked_backup_and_database_do_not_write_into_each_other(path, tmp_path):
    """6: the active segment and the keydir are shared inodes."""
    items = fill(path)
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in path.iterdir():
        os.link(file, backup / file.name)
    with dbm_bitcask.open(backup, "w") as copy:
        copy[b"only in the backup"] = b"1"
    with dbm_bitcask.open(path, "w") as db:
        assert dict(db) == items
        db[b"only in the database"] = b"2"
    with dbm_bitcask.open(backup, "r") as copy:
        assert dict(copy) == {**items, b"only in the backup": b"1"}
    assert check(path) == check(backup) == []


@pytest.mark.parametrize("keydir_too", [False, True])
def test_damage_in_the_synced_part_of_the_active_segment_is_reported_and_not_cut(path, keydir_too):
    """7: a record that was written after a sync says that everything before it was synced."""
    fill(path)
    segment = path / "00000001.data"
    data = bytearray(segment.read_bytes())
    data[data.index(b"value 100")] ^= 1
    segment.write_bytes(data)
    if keydir_too:
        (path / "keydir").unlink()
    with dbm_bitcask.open(path, "w") as db:
        assert db[b"key 199"] == b"value 199" * 9
        with pytest.raises(dbm_bitcask.CorruptionError) as failure:
            db[b"key 100"]
        assert failure.value.path == str(segment)
        assert failure.value.offset
    assert segment.stat().st_size >= len(data)
    assert any(problem.file == str(segment) for problem in check(path))
    shutil.rmtree(path)


def test_sealed_segment_that_became_shorter_is_damage_and_longer_is_ignored(path):
    """8: the manifest says how long a sealed segment is."""
    items = fill(path, **TINY)
    first = path / "00000001.data"
    data = first.read_bytes()
    first.write_bytes(data + b"garbage" * 100)
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == items
    first.write_bytes(data[:-500])
    with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
        dict(db)
    first.write_bytes(data)


def test_records_of_another_segment_do_not_verify(path):
    """9: the checksum is seeded with a salt of the segment and with the offset."""
    items = fill(path, **TINY)
    first, second = path / "00000001.data", path / "00000002.data"
    data = first.read_bytes()
    header = second.read_bytes()[:32]
    kept = second.read_bytes()
    second.write_bytes((header + data[32:]).ljust(len(kept), b"\0"))
    (path / "keydir").unlink()
    for hint in path.glob("*.hint"):
        hint.unlink()
    with dbm_bitcask.open(path, "r") as db:
        for key, value in items.items():
            try:
                assert db.get(key) == value
            except dbm_bitcask.CorruptionError:
                continue
    second.write_bytes(kept)


def test_record_bytes_inside_a_value_are_never_taken_for_a_record(path):
    """9: also when damage before them makes a search for the next record."""
    with dbm_bitcask.open(path) as db:
        db[b"inner"] = b"secret"
        inside = (path / "00000001.data").read_bytes()[32:]
        db[b"outer"] = inside * 20
        db[b"last"] = b"1"
        del db[b"inner"]
    segment = path / "00000001.data"
    data = bytearray(segment.read_bytes())
    whole = bytes(data)
    data[data.index(b"outer")] ^= 1
    segment.write_bytes(data)
    (path / "keydir").unlink()
    with dbm_bitcask.open(path, "r") as db:
        assert db[b"last"] == b"1"
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[b"inner"]
    segment.write_bytes(whole)


def test_nothing_is_appended_behind_a_cut_after_a_restart(path, monkeypatch):
    """11: the cut may be lost in the next crash, and what was appended not."""
    fill(path, 10)

    def child():
        db = dbm_bitcask.open(path, "w")
        db[b"in doubt"] = b"1"
        os._exit(0)

    fork_and_wait(child)
    first = path / "00000001.data"
    data = first.read_bytes()
    first.write_bytes(data[:-5])
    monkeypatch.setattr(files, "boot_id", lambda: 7)
    with dbm_bitcask.open(path, "w") as db:
        assert b"in doubt" not in db
        db[b"after"] = b"1"
    assert first.read_bytes() == data[:-5]
    with dbm_bitcask.open(path, "r") as db:
        assert len(db) == 11


@pytest.mark.parametrize("step", ["publish_manifest", "finish_commit", "seal_behind", "write_manifest"])
@pytest.mark.parametrize("act", ["rotate", "clear"])
def test_rotation_that_is_interrupted_anywhere_is_finished_or_undone(path, monkeypatch, step, act):
    """12: the seal record tells whoever comes next."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        interrupted_after(monkeypatch, rotation, step)
        with contextlib.suppress(KeyboardInterrupt):
            db.clear() if act == "clear" else db._store.locked(rotation.rotate)
        monkeypatch.undo()
        assert dict(db) in ({b"key": b"value"}, {})
        db[b"after"] = b"1"
        assert db[b"after"] == b"1"
        assert len(db) == len(dict(db))


@pytest.mark.parametrize("segment_size", [0, 4095, 2**32, 2**40])
def test_segment_in_which_a_location_could_overflow_is_refused(path, segment_size):
    """13: a location has 32 bits for the offset."""
    with pytest.raises(ValueError, match="segment_size"):
        dbm_bitcask.open(path, segment_size=segment_size)


def test_sync_that_failed_stops_every_writer_until_somebody_opens_anew(path, monkeypatch):
    """14: the kernel reports the error once, and calls dropped pages clean."""
    synced = []

    def failing(self):
        synced.append(self.name)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    db, other = dbm_bitcask.open(path), dbm_bitcask.open(path)
    db[b"key"] = b"value"
    with monkeypatch.context() as patch:
        patch.setattr(files.File, "sync_contents", failing)
        with pytest.raises(dbm_bitcask.error):
            db.sync()
    for handle in (db, other):
        with pytest.raises(dbm_bitcask.error, match="open the database again"):
            handle[b"more"] = b"1"
        assert handle[b"key"] == b"value"
    with dbm_bitcask.open(path, "w") as anew:
        assert dict(anew) == {b"key": b"value"}
        anew[b"more"] = b"1"
    assert len(synced) == 1
    for handle in (db, other):
        handle.close()


def test_lost_record_with_an_unknown_key_makes_older_answers_errors_and_can_be_overwritten(path):
    """17: a miss, or a value from before the damage, may be what the lost record replaced."""
    with dbm_bitcask.open(path) as db:
        db[b"old"] = b"1"
        db[b"lost"] = b"2"
        db[b"new"] = b"3"
    segment = path / "00000001.data"
    data = bytearray(segment.read_bytes())
    data[data.index(b"lost")] ^= 1
    segment.write_bytes(data)
    (path / "keydir").unlink()
    with dbm_bitcask.open(path, "w") as db:
        assert db[b"new"] == b"3"
        for key in (b"old", b"lost", b"never there"):
            with pytest.raises(dbm_bitcask.CorruptionError):
                db[key]
        db[b"lost"] = b"again"
        assert db[b"lost"] == b"again"
    shutil.rmtree(path)


class AlarmError(Exception):
    pass


def test_signal_at_any_moment_leaks_no_lock(path):
    """18: a signal may be delivered as the lock is handed over."""

    def ring(_number, _frame):
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    rung = 0
    try:
        with dbm_bitcask.open(path) as db:
            for number in range(400):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0001 + number % 40 / 100_000)
                    while True:
                        db[b"%d" % (number % 50)] = b"value"
                except AlarmError:
                    rung += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            fork_and_wait(lambda: dbm_bitcask.open(path, "w", timeout=5).update({b"of a child": b"1"}))
            assert db[b"of a child"] == b"1"
            assert len(db) == len(list(db))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == 400


def test_slot_into_a_segment_that_is_gone_is_an_empty_slot(path):
    """22: `clear` leaves the slots as they are."""
    with dbm_bitcask.open(path) as db:
        for turn in range(3):
            for number in range(500):
                db[b"%d" % number] = b"%d" % turn
            db.clear()
            assert db.get(b"7") is None
            assert b"7" not in db
            assert list(db) == []
        db[b"7"] = b"again"
        assert dict(db) == {b"7": b"again"}


def test_missing_segment_is_damage_and_no_endless_search(path):
    """22: what is listed has to be there."""
    fill(path, **TINY)
    (path / "00000001.data").rename(path.parent / "aside")
    with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError, match="not there"):
        dict(db)
    (path.parent / "aside").rename(path / "00000001.data")


def test_full_disk_at_a_split_changes_nothing_and_deleting_still_works(path, monkeypatch):
    """24: the pages that a split needs are reserved before the record is appended."""

    def full(_self, _offset, _length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dbm_bitcask.open(path) as db:
        monkeypatch.setattr(files.File, "reserve", full)
        written = 0
        with pytest.raises(dbm_bitcask.error) as failure:  # noqa: PT012  (which of the writes fails is not known)
            for number in range(100_000):
                db[b"%d" % number] = b"v"
                written = number + 1
        assert failure.value.errno == errno.ENOSPC
        assert len(db) == written == len(list(db))
        del db[b"0"]
        assert len(db) == written - 1
        monkeypatch.undo()
        db[b"now"] = b"1"


@pytest.mark.parametrize("operation", ["set new", "set old", "delete"])
def test_counts_are_right_after_a_death_between_slot_and_counts(path, operation):
    """25: the prepared counters say what the write wanted."""
    fill(path, 50)

    def die(self, *args):
        store(self, *args)
        os._exit(0)

    store = keydir.Keydir.store

    def child():
        db = dbm_bitcask.open(path, "w")
        db[b"key 1"] = b"first a write that does not die"
        keydir.Keydir.store = die
        write.put_new = lambda *_: False
        if operation == "delete":
            del db[b"key 2"]
        else:
            db[b"key 2" if operation == "set old" else b"new"] = b"1"

    fork_and_wait(child)
    expected = {"set new": 51, "set old": 50, "delete": 49}[operation]
    with dbm_bitcask.open(path, "r") as reader:
        assert len(reader) == expected == len(list(reader))
    with dbm_bitcask.open(path, "w") as db:
        assert len(db) == expected == len(list(db))


def test_threads_read_right_while_maps_are_dropped_under_them(path):
    """27: a descriptor is closed when the last reference goes, never by hand."""
    items = fill(path, 400, **TINY)
    with dbm_bitcask.open(path, "r") as db:
        db._log.maps = 2
        wrong = []

        def read():
            for _ in range(3):
                wrong.extend(key for key, value in items.items() if db[key] != value)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(db._log.segments) <= 2


def test_space_is_given_back_while_a_reader_is_open(path):
    """29: a reader drops what was merged away at its next operation."""
    items = fill(path, **TINY)
    with dbm_bitcask.open(path, "r") as reader, dbm_bitcask.open(path, "w", **TINY) as db:
        assert dict(reader) == items
        for key in items:
            db[key] = b"small"
        db.reorganize()
        assert not (path / "00000001.data").exists()
        assert dict(reader) == dict.fromkeys(items, b"small")
        assert reader._log.segments.keys() <= reader._log.entries.keys()


def test_index_does_not_grow_with_keys_that_come_and_go(path):
    """30: a page that is full of deleted slots is rewritten and not split."""
    with dbm_bitcask.open(path) as db:
        for number in range(20_000):
            db[b"%d" % number] = b"v"
            if number >= 100:
                del db[b"%d" % (number - 100)]
        assert len(db) == 100
        assert db._log.keydir.words[at.PAGES] < 20


def test_creation_that_was_cut_short_is_taken_over(path):
    """33: without a manifest there is no database, and what is left holds no record."""
    path.mkdir()
    (path / "00000001.data").write_bytes(b"")
    (path / "MANIFEST.0123456789abcdef.tmp").write_bytes(b"dbm")
    with dbm_bitcask.open(path, "c") as db:
        db[b"key"] = b"value"
    assert not list(path.glob("*.tmp"))
