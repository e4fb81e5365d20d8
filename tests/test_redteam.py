"""What an earlier draft of the design got wrong, event by event: a test for each finding, which says so in its first line.

Those without a test have their reason in `NOT_HERE`, and what pure Python cannot promise in `LIMITS_NOT_HERE`.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pickle
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest

import dbm_bitcask
import mutants
from by_hand import ITEMS, TINY, active, append, encoded, everything, fill, flip, is_free, lose_index, rotate, sealed
from children import fork, fork_and_wait
from crashes import Machine, abandon, edited, freeze, thaw
from dbm_bitcask.engine import contents, expiry, files, manifest, merge, names, record, rotation, segment, store, write
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory
from dbm_bitcask.engine.header import MASK32, PAGE_WORDS
from dbm_bitcask.engine.page import FULL, PAGE_COUNTS, key_hash, probe


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


FINDINGS = 36
NOT_HERE: dict[int, str] = {}
PARTLY_HERE = {
    16: "a batch that is merged, or half published by a writer that dies: when batches are written",
    34: "others read a value before it is durable: that is so",
}
# What pure Python cannot promise.
LIMITS = "abcdefg"
LIMITS_NOT_HERE = {
    "b": "order of loads and stores on ARM: no test could fail on this processor; `test_keydir` has those of the fences",
    "d": "a page fault of a map holds the GIL: that is so",
    "f": "flock has neither timeout nor fairness: `test_processes` has the tests of `timeout`, and a figure is how long the slowest waits",
}
# The bugs that a harness for crashes has to find, and the mutants that have them.
SEEDED = {
    "flock before try": "lock_is_taken_before_the_try",
    "cut after the store of the slot": "interrupted_write_is_cut_off",
    "clean mark without a look at the tail": "clean_mark_is_made_over_a_tail_that_has_moved",
    "dirty mark believed before its fsync": "clean_mark_is_taken_off_without_a_sync",
    "live keydir unlinked": "nobody_is_told_that_a_keydir_lost_its_name",
    "copied dirty keydir, in the same boot": "copied_keydir_is_trusted",
    "expired record skipped in a replay": "expired_record_is_passed_over_in_a_replay",
    "manifest without lengths": "length_of_a_sealed_segment_is_that_of_its_file",
    "append behind a cut": "after_a_restart_records_are_appended_behind_a_cut",
    "entry without a version": "entry_of_the_directory_has_no_version",
    "tombstones counted as dead": "tombstones_count_as_dead",
    "paths in the place of the descriptor of the directory": "files_are_found_by_path",
}


def told_of(word):
    """What the docstrings of the tests say that they are about, as in "Findings 3 and 12: ..."."""
    found = [re.match(rf"{word}s? ([^:,]*)", test.__doc__ or "") for name, test in globals().items() if name.startswith("test_")]
    return {each for match in found if match for each in re.findall(r"\d+|\b[a-g]\b", match[1])}


def test_every_finding_has_a_test_or_a_reason():
    tested = {int(each) for each in told_of("Finding") if each.isdigit()}
    assert tested | set(NOT_HERE) == set(range(1, FINDINGS + 1))
    assert not tested & set(NOT_HERE)
    assert set(PARTLY_HERE) <= tested


def test_every_limit_of_pure_python_has_a_test_or_a_reason():
    assert told_of("Limit") | set(LIMITS_NOT_HERE) == set(LIMITS)
    assert not told_of("Limit") & set(LIMITS_NOT_HERE)


def test_every_bug_that_a_harness_has_to_find_is_seeded():
    assert set(SEEDED.values()) <= set(mutants.MUTANTS)


# 1. Loses acknowledged data, resurrects, or returns wrong values


def test_interrupted_overwrite_never_loses_the_acknowledged_value(tmp_path, machine):
    """Finding 1: the exception path cuts back behind the store of the slot."""
    for step in itertools.count(1):
        path = tmp_path / str(step)
        with dbm_bitcask.open(path, "c") as db:
            db[b"key"] = b"acknowledged"
            died = machine.run(lambda db=db: db.__setitem__(b"key", b"interrupted"), step)
            db[b"other"] = b"lands where the interrupted one would have been cut"
            assert db[b"key"] in (b"acknowledged", b"interrupted")
            assert db[b"other"] == b"lands where the interrupted one would have been cut"
        assert check(path) == []
        if not died:
            break
    assert step > 10


def test_copy_of_a_live_database_whose_keydir_is_torn_apart_finds_every_key(path, tmp_path):
    """Finding 2 a: `cp -r` copies the header before a split, and the pages behind it."""
    db = dbm_bitcask.open(path, "c")
    for number in range(180):
        db[b"%d" % number] = b"value"
    header = (path / "keydir").read_bytes()[:4096]
    for number in range(180, 2000):
        db[b"%d" % number] = b"value"
    copy = shutil.copytree(path, tmp_path / "copy")
    with (copy / "keydir").open("r+b") as file:
        file.write(header)
    db.close()
    for flag in "rw":
        assert everything(copy, flag) == {b"%d" % number: b"value" for number in range(2000)}
    assert check(copy) == []


def test_copy_that_says_clean_over_pages_of_later_is_not_trusted(path, tmp_path):
    """Finding 2 b: the header was copied while it was clean."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    with edited(path / "keydir") as words:
        words[at.STATE] = at.CLEAN
    header = (path / "keydir").read_bytes()[:4096]
    db = dbm_bitcask.open(path, "w")
    del db[b"key 1"]
    copy = shutil.copytree(path, tmp_path / "copy")
    with (copy / "keydir").open("r+b") as file:
        file.write(header)
    db.close()
    assert b"key 1" not in everything(copy, "r")
    assert b"key 1" not in everything(copy, "w")


def test_dirty_mark_is_durable_before_the_first_change_whoever_made_it(path, monkeypatch):
    """Finding 2 d: the mark of a process that was killed before its fsync returned is believed by the next one."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    with edited(path / "keydir") as words:
        words[at.STATE] = at.CLEAN
    first, second = (dbm_bitcask.open(path, "w") for _ in range(2))

    def die():
        raise KeyboardInterrupt

    monkeypatch.setattr(first._log.keydir.file, "sync", die)
    with pytest.raises(KeyboardInterrupt):
        first[b"key"] = b"value"
    assert second._log.keydir.words[at.STATE] == at.DIRTYING
    synced = []
    monkeypatch.setattr(second._log.keydir.file, "sync", lambda: synced.append(second._log.keydir.words[at.STATE]))
    second[b"key"] = b"value"
    assert synced == [at.DIRTYING]
    abandon(first)
    second.close()


@pytest.mark.parametrize("closes", [False, True])
def test_keydir_is_not_marked_clean_over_the_write_of_another_handle(path, monkeypatch, closes):
    """Finding 2 e: A syncs the keydir, B writes (and leaves it at rest again), A marks it clean."""
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0)
    closing, writing = dbm_bitcask.open(path, "c"), dbm_bitcask.open(path, "c")
    closing.update(ITEMS)
    keydir = closing._log.keydir
    sync, states = keydir.file.sync, []

    def write_between():
        states.append(words[at.STATE])
        sync()
        if len(states) > 1:
            return
        writing[b"between"] = b"value"
        if closes:
            writing._store._wrote = True
            monkeypatch.setattr(store, "_CLEAN_KEYS", 10**9)
            writing._store._settle()

    words = keydir.words
    monkeypatch.setattr(keydir.file, "sync", write_between)
    closing.close()
    assert states[0] == at.RESTING
    assert words[at.STATE] == (at.RESTING if closes else at.DIRTY)
    writing.close()
    monkeypatch.undo()
    assert everything(path) == {**ITEMS, b"between": b"value"}


def test_keydir_of_a_later_state_is_not_trusted_over_a_restored_log(path):
    """Finding 2 f: manifest and segments come from a backup, which happens to end on the boundary of a record."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    backup = freeze(path)
    with dbm_bitcask.open(path, "w") as db:
        for key in ITEMS:
            db[key] = b"later %d" % len(ITEMS)
    for name, data in backup.items():
        if name != "keydir":
            (path / name).write_bytes(data)
    for flag in "rwr":
        assert everything(path, flag) == ITEMS


@pytest.mark.parametrize("clean", [False, True])
def test_keydir_on_another_device_is_trusted_after_a_clean_close_only(path, monkeypatch, clean):
    """Finding 2 c: a block snapshot that is mounted beside the original, in the same boot, has pages of any time."""
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0 if clean else 10**9)
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
        before = db._log.keydir.file.identity().inode
    with edited(path / "keydir") as words:
        words[at.DEVICE] += 1
    with dbm_bitcask.open(path, "r") as db:
        assert (db._log.keydir.file.identity().inode == before) == clean
        assert dict(db) == ITEMS
    with dbm_bitcask.open(path, "w") as db:
        assert (db._log.keydir.file.identity().inode == before) == clean
        assert dict(db) == ITEMS


@pytest.mark.parametrize("step", ["first write", "first sync of the close", "second sync of the close"])
def test_keydir_whose_sync_failed_is_not_trusted_any_more(path, monkeypatch, step):
    """Finding 2 g: a page that could not be written back is dropped, and the old one comes back, in the same boot."""
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0)
    monkeypatch.setattr(store, "_CLEAN_EVERY", -1)
    with dbm_bitcask.open(path, "c") as db:
        db[b"before"] = b"value"
    db = dbm_bitcask.open(path, "w")
    keydir, calls = db._log.keydir.file, []
    sync, fails_at = keydir.sync, ["first write", "first sync of the close", "second sync of the close"].index(step)

    def fail():
        calls.append(1)
        if len(calls) > fails_at:
            raise OSError(5, "Input/output error")
        sync()

    monkeypatch.setattr(keydir, "sync", fail)
    with pytest.raises(dbm_bitcask.error, match="Input/output error"):
        db.update(ITEMS)
        db.close()
    abandon(db)
    assert len(calls) == fails_at + 1
    monkeypatch.undo()
    expected = {b"before": b"value", **(ITEMS if fails_at else {})}
    with dbm_bitcask.open(path, "w") as db:
        assert db._log.keydir.file.identity().inode != keydir.identity().inode
        assert dict(db) == expected
    assert everything(path) == expected


def test_writer_whose_keydir_was_deleted_overwrites_nothing(path):
    """Finding 3: two indexes over one log, and the tail in a disposable file says where to write."""
    first = dbm_bitcask.open(path, "c")
    first.update(ITEMS)
    (path / "keydir").unlink(missing_ok=True)
    second = dbm_bitcask.open(path, "w")
    second[b"second"] = b"acknowledged"
    first[b"first"] = b"acknowledged"
    second[b"second again"] = b"acknowledged"
    first[b"first again"] = b"acknowledged"
    expected = {**ITEMS, **dict.fromkeys([b"first", b"second", b"first again", b"second again"], b"acknowledged")}
    assert dict(first) == dict(second) == expected
    first.close()
    second.close()
    assert everything(path) == expected


def test_rotation_by_a_writer_whose_keydir_was_deleted_loses_nothing(path):
    """Finding 3: and clear and rotation come upon it as well."""
    first = dbm_bitcask.open(path, "c", **TINY)
    fill(first, 8)
    (path / "keydir").unlink(missing_ok=True)
    second = dbm_bitcask.open(path, "w", **TINY)
    second[b"second"] = b"acknowledged"
    fill(first, 30, turn=1)
    fill(second, 30, turn=2)
    assert dict(first) == dict(second)
    assert first[b"second"] == b"acknowledged"
    (path / "keydir").unlink(missing_ok=True)
    third = dbm_bitcask.open(path, "w", **TINY)
    third[b"third"] = b"acknowledged"
    first.clear()
    second[b"behind"] = third[b"behind"] = b"the clear"
    assert dict(first) == dict(second) == dict(third) == {b"behind": b"the clear"}
    for db in (first, second, third):
        db.close()


def test_handle_that_reads_by_a_deleted_keydir_is_not_told_of_damage_that_is_not_there(path):
    """Finding 3: its segments were merged away meanwhile, by writers that it cannot hear of."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        with dbm_bitcask.open(path, "r") as reader:
            (path / "keydir").unlink(missing_ok=True)
            with dbm_bitcask.open(path, "w", **TINY) as other:
                fill(other, turn=1)
                other.reorganize()
                expected = dict(other)
            assert dict(reader) == expected
            assert dict(db) == expected


@pytest.mark.parametrize("flag", ["r", "w"])
@pytest.mark.parametrize("gone", ["deleted", "replaced by a copy", "damaged"])
def test_handle_whose_keydir_lost_its_name_sees_what_is_written_by_another_one(path, flag, gone):
    """Finding 3: it looked things up in the old keydir for ever, and was told old values."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 100)
    with dbm_bitcask.open(path, flag, **TINY) as first:
        assert len(first) == len(dict(first))
        key = next(iter(first))
        keydir_file = path / "keydir"
        data = keydir_file.read_bytes()
        if gone == "damaged":
            keydir_file.write_bytes(b"nothing" + data[7:])
        else:
            keydir_file.unlink()
        if gone == "replaced by a copy":
            keydir_file.write_bytes(data)
        with dbm_bitcask.open(path, "w", **TINY) as second:
            second[key] = b"of another index"
            second[b"new"] = b"key"
            assert first[key] == b"of another index"
            assert first.get(b"new") == b"key"
            assert b"new" in first
            del second[key]
            assert key not in first
            assert first.get(key) is None
            assert len(first) == len(second) == len(list(first))
            if flag == "w":
                first[key] = b"back"
                assert second[key] == b"back"


def test_handle_that_slept_through_rotations_and_the_loss_of_its_keydir_sees_what_is_written(path):
    """Finding 3: the segment whose header told of the new keydir was not the one that it had open."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 100)
        reader = dbm_bitcask.open(path, "r")
        key = next(iter(reader))
        fill(db, 100, turn=1)
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "w", **TINY) as db:
        db[key] = b"of another index"
        assert reader[key] == b"of another index"
    reader.close()


def test_reader_of_a_lost_keydir_sees_that_the_database_was_made_anew(path):
    """Finding 3: flag n found no keydir by which to tell anybody."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 100)
    with dbm_bitcask.open(path, "r") as reader:
        assert len(reader)
        (path / "keydir").unlink(missing_ok=True)
        with dbm_bitcask.open(path, "n") as db:
            assert len(reader) == 0
            db[b"new"] = b"1"
            assert dict(reader) == {b"new": b"1"}


def test_there_is_no_lock_file_that_somebody_could_delete(path):
    """Finding 4: a "stale" LOCK that is deleted by hand makes two writers."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        known = re.compile(r"MANIFEST|keydir|\d{8}\.(data|hint)")
        assert [name for name in os.listdir(path) if not known.fullmatch(name)] == []  # noqa: PTH208
        beside = Directory(str(path))
        assert db._store.locked(lambda _: beside.try_lock()) is False
        assert beside.try_lock() is True
        beside.unlock()


def test_old_handle_does_nothing_to_a_database_that_took_the_place_of_its_own(path, tmp_path):
    """Finding 5: rotation and merge by path replace the manifest of the new one, and delete its segments."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
    backup = shutil.copytree(path, tmp_path / "backup")
    old = dbm_bitcask.open(path, "w", **TINY)
    bad = path.rename(tmp_path / "bad")
    backup.rename(path)
    before = freeze(path)
    for turn in range(1, 4):
        fill(old, turn=turn)
    old.reorganize()
    old.close()
    assert freeze(path) == before
    assert everything(bad)[b"key 1"].startswith(b"3 1 ")
    assert everything(path)[b"key 1"].startswith(b"0 1 ")


def test_manifest_restored_alone_is_an_error_and_no_segment_is_deleted(path):
    """Finding 5: segments that are newer than the manifest prove another lineage."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 4)
        old = (path / "MANIFEST").read_bytes()
        fill(db)
    new = (path / "MANIFEST").read_bytes()
    (path / "MANIFEST").write_bytes(old)
    before = freeze(path)
    for flag in "wcn":
        with pytest.raises(dbm_bitcask.error, match="newer than this manifest"):
            dbm_bitcask.open(path, flag)
        assert freeze(path) == before
    (path / "MANIFEST").write_bytes(new)


def linked(path, to):
    """A backup as `cp -al` makes it."""
    to.mkdir()
    for file in path.iterdir():
        os.link(file, to / file.name)
    return to


def test_backup_of_hard_links_can_be_written_without_changing_the_original(path, tmp_path):
    """Finding 6: opening the backup appends to, cuts, or rebuilds in place what is live."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    backup = linked(path, tmp_path / "backup")
    before = freeze(path)
    with dbm_bitcask.open(backup, "w") as db:
        assert dict(db) == ITEMS
        db.update(dict.fromkeys(ITEMS, b"changed in the backup"))
    after = freeze(path)
    assert {name: data for name, data in after.items() if name != "keydir"} == {
        name: data for name, data in before.items() if name != "keydir"
    }
    assert everything(path) == ITEMS
    assert everything(path, "w") == ITEMS
    assert set(everything(backup).values()) == {b"changed in the backup"}


def test_original_can_be_written_without_changing_a_backup_of_hard_links(path, tmp_path):
    """Finding 6, the other way round."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    backup = linked(path, tmp_path / "backup")
    with dbm_bitcask.open(path, "w") as db:
        db.update(dict.fromkeys(ITEMS, b"changed"))
        db[b"new"] = b"value"
    assert everything(backup) == ITEMS
    assert everything(backup, "w") == ITEMS
    assert everything(path) == {**dict.fromkeys(ITEMS, b"changed"), b"new": b"value"}


def test_torn_tail_of_a_linked_segment_is_not_cut(path, tmp_path):
    """Finding 6: it may be the beginning of what the other one is writing."""
    db = dbm_bitcask.open(path, "c")
    db.update(ITEMS)
    abandon(db)
    with active(path).open("ab") as file:
        file.write(b"somebody is writing here")
    torn = active(path).read_bytes()
    backup = linked(path, tmp_path / "backup")
    name = active(path).name
    with dbm_bitcask.open(backup, "w") as db:
        db[b"new"] = b"value"
    assert (path / name).read_bytes() == torn
    assert everything(backup) == {**ITEMS, b"new": b"value"}
    shutil.rmtree(backup)
    assert everything(path, "w") == ITEMS


def test_torn_tail_of_a_segment_that_a_backup_links_is_not_cut_by_a_handle_that_is_open(path, tmp_path):
    """Finding 6: the backup came after the database had been opened, and has no keydir."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
        first = active(path)
        os.link(first, tmp_path / "backup")
        with first.open("ab") as file:
            file.write(b"torn")
        torn = first.read_bytes()
        db[b"new"] = b"value"
        assert (tmp_path / "backup").read_bytes() == torn
        assert dict(db) == {**ITEMS, b"new": b"value"}
    assert everything(path, "w") == {**ITEMS, b"new": b"value"}


def test_bit_rot_in_the_synced_part_of_the_active_segment_is_not_cut_as_a_torn_tail(path):
    """Finding 7: everything behind it was truncated, although it had been synced."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
        location = db._log.find(b"key 2")
    flip(active(path), (location & MASK32) + 30)
    damaged = active(path).read_bytes()
    lose_index(path)
    with dbm_bitcask.open(path, "w") as db:
        for number in range(3, 8):
            assert db[b"key %d" % number] == b"value %d" % number
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[b"key 2"]
    records = slice(segment.FIRST_RECORD, None)
    assert active(path).read_bytes()[records].startswith(damaged[records])
    flip(active(path), (location & MASK32) + 30)
    lose_index(path)
    assert everything(path, "w") == ITEMS


def test_sealed_segment_that_ends_early_on_the_boundary_of_a_record_is_damage(path):
    """Finding 8: a backup copied it while it was still growing."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
    victim = sealed(path)[1]
    good = victim.read_bytes()
    ends, offset = [], segment.FIRST_RECORD
    while (head := record.decode_head(good, offset)) is not None:
        offset += head.length
        ends.append(offset)
    victim.write_bytes(good[: ends[2]])
    lose_index(path)
    assert [problem for problem in check(path) if problem.file == str(victim)]
    for flag in "rw":
        with pytest.raises(dbm_bitcask.CorruptionError, match=victim.name), dbm_bitcask.open(path, flag) as db:
            list(db.items())
    victim.write_bytes(good)


def test_bytes_behind_the_length_of_a_sealed_segment_are_not_there(path):
    """Finding 8: also not if they are whole records of the right salt and offset."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        expected = dict(db)
    append(sealed(path)[0], (0, b"key 1", b"was never here"), (0, b"new", b"was never here"))
    lose_index(path)
    assert everything(path, "r") == everything(path, "w") == expected


def test_records_of_a_deleted_segment_never_verify_in_another(path):
    """Finding 9: the blocks of a file that was freed come back as the tail of the active one."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        old = [file.read_bytes() for file in sealed(path)]
        db.clear()
        db.update(ITEMS)
        size = active(path).stat().st_size
    for data in old:
        assert segment.next_valid(active(path).read_bytes()[:size] + data[size:], db._log.salt, size, len(data)) is None
    with active(path).open("ab") as file:
        file.write(old[0][size:])
    lose_index(path)
    assert everything(path, "w") == ITEMS


def test_swapped_segments_are_damage(path):
    """Finding 9: with one salt for all they verified."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        expected = dict(db)
    one, two = sealed(path)[:2]

    def swap():
        one.rename(path / "swap")
        two.rename(one)
        (path / "swap").rename(two)

    swap()
    with pytest.raises(dbm_bitcask.CorruptionError), dbm_bitcask.open(path, "r") as db:
        list(db.items())
    assert len(check(path)) >= 2
    swap()
    lose_index(path)
    assert everything(path, "w") == expected


def test_value_that_holds_records_is_never_taken_for_records(path):
    """Finding 9: neither as a tail nor when damage is looked past."""
    with dbm_bitcask.open(path, "c") as db:
        db[b"inner"] = b"value of the inner record"
        stolen = active(path).read_bytes()[segment.FIRST_RECORD :]
        db[b"inner"] = b"new value"
        db[b"outer"] = stolen * 20
        location = db._log.find(b"outer")
    good = active(path).read_bytes()
    flip(active(path), (location & MASK32) + 10)
    lose_index(path)
    with dbm_bitcask.open(path, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
        dict(db)
    active(path).write_bytes(good)


def test_ids_are_never_used_twice(path):
    """Finding 9: descriptors that others hold, and hints that lie about, would be of another segment."""
    seen = set()
    for turn in range(4):
        with dbm_bitcask.open(path, "n" if turn == 2 else "c", **TINY) as db:
            fresh = {file.name for file in path.glob("*.data")} - (seen if turn in (1, 3) else set())
            assert not fresh & seen
            fill(db, turn=turn)
            fill(db, turn=turn)
            seen |= {file.name for file in path.glob("*.data")}
            db.clear() if turn % 2 else db.reorganize()
            now = {file.name for file in path.glob("*.data")}
            assert max(now) > max(seen)
            seen |= now


def test_ids_are_never_used_twice_by_a_new_database_over_an_unusable_index_either(path):
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        seen = {file.name for file in path.glob("*.data")}
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "n") as db:
        fresh = {file.name for file in path.glob("*.data")}
        assert min(fresh) > max(seen)
        assert len(db) == 0


def test_expired_record_never_brings_the_older_value_back(path):
    """Finding 10: a rebuild or a merge that takes it for absent."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        db[b"key"] = b"older value"
        fill(db, 20)

        def put_expired(log):
            place = write.locate(log, b"key", room=True)
            start, length, checksum = write.append(log, record.EXPIRES, b"key", b"expired", 1, 1000)
            write.publish(log, place, start, length, checksum, flags=record.EXPIRES)

        db._store.locked(put_expired)
        assert db.get(b"key") != b"older value"
        fill(db, 20, turn=1)
        db.reorganize()
        assert db.get(b"key") != b"older value"
    lose_index(path)
    for flag in "rw":
        assert everything(path, flag).get(b"key") != b"older value"


@pytest.mark.parametrize("merged", ["nothing", "all", "the tombstone", "the expired", "the tombstone, then the expired"])
@pytest.mark.parametrize("clock", ["stays", "goes back"])
def test_older_value_under_a_key_that_expires_never_comes_back(path, monkeypatch, merged, clock):
    """Finding 10: by a replay without the expired record, a merge that drops it, or one that drops the tombstone before it."""
    now = 1_700_000_000
    monkeypatch.setattr(expiry, "time_ns", lambda: now * 1_000_000_000)
    with dbm_bitcask.open(path, "c", segment_size=2**20) as db:
        db[b"key"] = db[b"beside"] = b"older value"
        rotate(db)
        with_tombstone = "tombstone" in merged
        if with_tombstone:
            del db[b"key"]
            rotate(db)
        db.set(b"key", b"value", ttl=10)
        rotate(db)
        if with_tombstone:
            merge_segment(db, -3)  # which does not keep it: the key is there
            assert b"key" in db
        now += 20
        if "expired" in merged:
            merge_segment(db, -2)
        if merged == "all":
            db.reorganize()
        gone = merged == "all" or "expired" in merged
        assert b"key" not in db
    lose_index(path)
    now -= 20 if clock == "goes back" else 0
    for flag in "rw":
        assert everything(path, flag).get(b"key") == (b"value" if clock == "goes back" and not gone else None)


def merge_segment(db, number):
    """Clean one segment, as they are listed, and drop it."""
    log = db._log
    victim = log.manifest.segments[number]
    offset = segment.FIRST_RECORD
    while offset < victim.length:
        offset = db._store.locked(merge._clean_slice, victim, offset)
    db._store.locked(merge._drop_cleaned)
    assert victim.id not in log.entries


def test_moved_record_keeps_its_expiry(path):
    """Finding 10: a merge appends it as it is."""
    with dbm_bitcask.open(path, "c", **TINY) as db:

        def put_expiring(log):
            place = write.locate(log, b"key", room=True)
            start, length, checksum = write.append(log, record.EXPIRES, b"key", b"value", 1, 2**62)
            write.publish(log, place, start, length, checksum, flags=record.EXPIRES)

        db._store.locked(put_expiring)
        before = db._log.find(b"key")
        fill(db, 20)
        fill(db, 20, turn=1)
        db.reorganize()
        found = db._log.read(db._log.find(b"key"))
        assert db._log.find(b"key") != before
        assert (found.value, found.expiry, found.flags & record.EXPIRES) == (b"value", 2**62, record.EXPIRES)


def test_second_crash_that_undoes_a_cut_brings_nothing_back(path, monkeypatch):
    """Finding 11: A B C, B is lost; cut at B, B' of its length written; the cut is lost in the next crash: A B' C."""
    db = dbm_bitcask.open(path, "c")
    db[b"A"] = b"value"
    start = active(path).stat().st_size
    db[b"B"] = b"value"
    db[b"C"] = b"value"
    abandon(db)
    first = active(path)
    data = bytearray(first.read_bytes())
    data[start : start + (len(data) - start) // 2] = bytes((len(data) - start) // 2)
    first.write_bytes(data)
    monkeypatch.setattr(files, "boot_id", lambda: 1)
    db = dbm_bitcask.open(path, "w")
    assert dict(db) == {b"A": b"value"}
    db[b"b"] = b"value"
    abandon(db)
    written = first.read_bytes()
    first.write_bytes(written[: len(written)] + data[len(written) :])  # what was behind the cut is there again
    monkeypatch.setattr(files, "boot_id", lambda: 2)
    assert everything(path, "r") == everything(path, "w") == {b"A": b"value", b"b": b"value"}


def test_nobody_ever_appends_to_a_segment_that_the_manifest_calls_sealed(tmp_path, machine):
    """Finding 12: killed between the commit of the manifest and the tail."""
    for step in itertools.count(1):
        path = tmp_path / str(step)
        dying = dbm_bitcask.open(path, "c", **TINY)
        fill(dying, 10)
        died = machine.run(lambda dying=dying: fill(dying, 5, turn=1), step, killed=True)
        abandon(dying)
        with dbm_bitcask.open(path, "w", **TINY) as db:
            fill(db, 6, turn=2)
        listed = manifest.decode((path / "MANIFEST").read_bytes())
        assert len(listed.segments) > 1
        for entry in listed.segments[:-1]:
            assert (path / names.segment_name(entry.id)).stat().st_size == entry.length
        assert check(path) == []
        shutil.rmtree(path)
        if not died:
            break
    assert step > 60


def test_no_record_ends_beyond_what_a_location_can_say(tmp_path):
    """Finding 13: the sum of a location and a length carries into the id of the segment."""
    path = tmp_path / "huge"
    db = dbm_bitcask.open(path, "c", segment_size=2**32 - 1)
    first = active(path)
    words = db._log.keydir.words
    db[b"key"] = b"value"
    for tail in (2**32 - 64, 2**32 - 152):  # of 8-byte steps; 152: header, key and value of the next record and a little
        os.truncate(first, tail)
        words[words[at.CURRENT] + at.TAIL] = 1 << 32 | tail
        db[b"far"] = b"v" * 96
        location = db._log.find(b"far")
        assert (location & MASK32) + 128 < 2**32
        assert db[b"far"] == b"v" * 96
        if location >> 32 != 1:
            break
    assert location == 2 << 32 | segment.FIRST_RECORD
    assert db._log.manifest.segments[0].length <= 2**32 + rotation.SEAL_LENGTH
    db._log.sealed_here.clear()  # no hint of four gigabytes of nothing
    abandon(db)


@pytest.fixture
def failing_sync(monkeypatch):
    """Have the next sync fail once, as the kernel reports a lost page."""

    def arm(name="_fdatasync"):
        real = getattr(files, name)
        synced = []

        def sync(fd):
            synced.append(fd)
            if len(synced) == 1:
                raise OSError(5, "Input/output error")
            real(fd)

        monkeypatch.setattr(files, name, sync)
        return synced

    return arm


def test_after_a_failed_sync_nobody_writes_until_the_database_is_opened_again(path, failing_sync):
    """Finding 14: the next fsync reports success over pages that the kernel has dropped."""
    first, second = dbm_bitcask.open(path, "c"), dbm_bitcask.open(path, "c")
    first.update(ITEMS)
    synced = failing_sync()
    with pytest.raises(dbm_bitcask.error):
        first.sync()
    for db in (first, second):
        for change in (lambda db=db: db.sync(), lambda db=db: db.__setitem__(b"k", b"v"), lambda db=db: db.__delitem__(b"key 1"), db.clear):
            with pytest.raises(dbm_bitcask.error):
                change()
        assert dict(db) == ITEMS
    with pytest.raises(dbm_bitcask.error):
        first.close()
    second.close()  # it wrote nothing
    assert len(synced) == 1
    with dbm_bitcask.open(path, "w") as db:
        assert dict(db) == ITEMS
        db[b"new"] = b"value"
        db.sync()
    assert everything(path) == {**ITEMS, b"new": b"value"}


def test_what_a_failed_sync_leaves_in_doubt_is_written_anew(path, failing_sync):
    """Finding 14: the file is never synced again; what was synced before stays where it is."""
    db = dbm_bitcask.open(path, "c")
    db[b"before"] = b"durable"
    db.sync()
    db[b"behind"] = b"in doubt"
    doubtful = active(path)
    failing_sync()
    with pytest.raises(dbm_bitcask.error):
        db.sync()
    abandon(db)
    with dbm_bitcask.open(path, "w") as db:
        assert db._log.find(b"before") >> 32 == int(doubtful.stem)
        assert db._log.find(b"behind") >> 32 != int(doubtful.stem)
        assert dict(db) == {b"before": b"durable", b"behind": b"in doubt"}


@pytest.mark.parametrize("step", range(1, 12))
def test_failed_sync_within_a_rotation_or_merge_poisons_as_well(path, monkeypatch, step):
    """Finding 14: a rotation that is "finished" later would sync the same file again, with success."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 30)
    db = dbm_bitcask.open(path, "w", **TINY)
    count = 0

    def sync(_fd):
        nonlocal count
        count += 1
        if count == step:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_fdatasync", sync)
        try:
            fill(db, 30, turn=1)
            db.reorganize()
        except dbm_bitcask.error:
            with pytest.raises(dbm_bitcask.error):
                db[b"key"] = b"value"
        else:
            assert count < step
        expected = dict(db)
    abandon(db)
    with dbm_bitcask.open(path, "w", **TINY) as db:
        assert dict(db) == expected
        db[b"key"] = b"value"
    lose_index(path)
    assert everything(path, "w") == {**expected, b"key": b"value"}


@pytest.mark.parametrize("flag", ["n", "c", "w", "r"])
def test_pickled_handle_does_not_wipe_the_database(path, flag):
    """Finding 15: flag n is meant once."""
    if flag in "wr":
        dbm_bitcask.open(path, "c").close()
    with dbm_bitcask.open(path, flag) as db:
        if flag != "r":
            db.update(ITEMS)
        expected = dict(db)
        with pickle.loads(pickle.dumps(db)) as again:
            assert dict(again) == expected


def batch(file, offset, items):
    inner, place = b"", offset + record.HEADER.size
    for flags, key, value in items:
        inner += encoded(file, place + len(inner), key, value, flags)
    return encoded(file, offset, b"", inner, record.BATCH)


def test_batch_is_replayed_whole_or_not_at_all(tmp_path):
    """Finding 16: one framed record around plain ones."""
    base = tmp_path / "base"
    db = dbm_bitcask.open(base, "c")
    db.update(ITEMS)
    abandon(db)
    frame = batch(active(base), active(base).stat().st_size, [(0, b"one", b"1"), (record.TOMBSTONE, b"key 1", b""), (0, b"two", b"2")])
    expected = {key: value for key, value in ITEMS.items() if key != b"key 1"} | {b"one": b"1", b"two": b"2"}
    for length in (*range(0, len(frame), 8), len(frame)):
        path = shutil.copytree(base, tmp_path / str(length))
        with active(path).open("ab") as file:
            file.write(frame[:length])
        lose_index(path)
        assert everything(path, "r") == everything(path, "w") == (expected if length == len(frame) else ITEMS)
        assert check(path) == []


def test_damage_with_an_unknown_key_is_never_answered_by_an_older_value(path):
    """Finding 17: nor by a KeyError; what is newer than the damage is served."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        db[b"key"] = b"older value"
        fill(db, 12)
        db[b"key"] = b"newer value"
        location = db._log.find(b"key")
        fill(db, 30, turn=1)
    victim = path / names.segment_name(location >> 32)
    flip(victim, (location & MASK32) + 30)
    lose_index(path)
    with dbm_bitcask.open(path, "w", **TINY) as db:
        for _ in range(2):
            with pytest.raises(dbm_bitcask.CorruptionError):
                db[b"key"]
        assert db[b"key 29"].startswith(b"1 29 ")
        db[b"key"] = b"set anew"
        assert db[b"key"] == b"set anew"
    flip(victim, (location & MASK32) + 30)
    lose_index(path)
    assert everything(path, "w")[b"key"] == b"set anew"


@pytest.mark.parametrize("keydir", [True, False], ids=["keydir", "no keydir"])
def test_damaged_record_can_be_overwritten_and_deleted(path, keydir):
    """Finding 17: or its key is stuck for ever."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
        places = [db._log.find(key) & MASK32 for key in (b"key 2", b"key 5")]
    for place in places:
        flip(active(path), place + record.HEADER.size)  # the key itself
    if not keydir:
        lose_index(path)
    with dbm_bitcask.open(path, "w") as db:
        db[b"key 2"] = b"set anew"
        assert db[b"key 2"] == b"set anew"
        if keydir:
            del db[b"key 5"]
            assert b"key 5" not in db
        else:
            db[b"key 5"] = b""
            del db[b"key 5"]
    for place in places:
        flip(active(path), place + record.HEADER.size)
    lose_index(path)
    expected = {**ITEMS, b"key 2": b"set anew"}
    del expected[b"key 5"]
    assert everything(path, "w") == expected


# 2. Hangs, SIGBUS, space, wrong counts


def test_signal_that_arrives_as_the_lock_is_taken_does_not_leak_it(path, monkeypatch):
    """Finding 18: `flock` followed by `try`; the process lives on, and all others hang."""
    with dbm_bitcask.open(path, "c") as db:
        lock = db._log.lock

        def acquire_and_be_interrupted():
            fcntl.flock(lock.directory.fd, fcntl.LOCK_EX)
            raise KeyboardInterrupt

        operations = [
            lambda: db.__setitem__(b"key", b"value"),
            lambda: db.__delitem__(b"key"),
            lambda: db.pop(b"key", None),
            lambda: db.setdefault(b"key", b"value"),
            db.clear,
            db.reorganize,
        ]
        for operation in operations:
            with monkeypatch.context() as patch:
                patch.setattr(lock, "acquire", acquire_and_be_interrupted)
                with pytest.raises(KeyboardInterrupt):
                    operation()
            assert is_free(path)
            result = []
            thread = threading.Thread(target=lambda result=result: result.append(db.setdefault(b"other", b"value")))
            thread.start()
            thread.join(20)
            assert result == [b"value"]


def test_reader_waits_for_nobody_who_died_within_a_split(tmp_path, machine):
    """Finding 19: it took the index for one that was being changed, and waited, or built one of its own."""
    base = tmp_path / "base"
    db = dbm_bitcask.open(base, "c")
    expected = {b"%d" % number: b"value" for number in range(FULL)}
    db.update(expected)
    abandon(db)
    frozen = freeze(base)
    for step in itertools.count(1):
        path = thaw(frozen, tmp_path / str(step))
        dying = dbm_bitcask.open(path, "w")
        died = machine.run(lambda dying=dying: dying.__setitem__(b"last", b"value"), step, killed=True)
        abandon(dying)
        with dbm_bitcask.open(path, "r") as reader:
            assert reader._log.keydir.file.identity().inode == (path / "keydir").stat().st_ino
            assert {key: reader[key] for key in expected} == expected
            assert reader.get(b"last") in (None, b"value")
            assert len(reader) == len(dict(reader))
        if not died:
            break
    assert step > 20


def test_index_is_written_in_place_by_file_systems_that_copy_on_write(path, monkeypatch):
    """Finding 20: a page of a map that is written back needs a new block there, and a full disk is a SIGBUS; space was reserved before."""
    asked, ioctl = [], fcntl.ioctl
    get_flags, set_flags, no_copy_on_write = 0x80086601, 0x40086602, 0x00800000

    def spy(fd, request, flags):
        if request == set_flags:
            assert int.from_bytes(flags, "little") & no_copy_on_write
            assert os.fstat(fd).st_size == 0  # the flag is for files without contents
            asked.append(os.fstat(fd).st_ino)
        return bytes(8) if request in (get_flags, set_flags) else ioctl(fd, request, flags)

    monkeypatch.setattr(fcntl, "ioctl", spy)
    with dbm_bitcask.open(path, "c") as db:
        db.update({b"%d" % number: b"" for number in range(2000)})
    assert (path / "keydir").stat().st_ino in asked


@pytest.mark.parametrize("beside", [False, True], ids=["the same handle", "another handle"])
def test_use_inside_an_operation_is_an_error_and_no_deadlock(path, monkeypatch, beside):
    """Finding 21: a signal handler or a finalizer uses the same database."""
    with dbm_bitcask.open(path, "c") as db, dbm_bitcask.open(path, "w") as other:
        db.update(ITEMS)
        inner = other if beside else db
        failures = []
        pwrite = db._log.active.pwrite

        def be_interrupted(data, offset):
            for change in (lambda: inner.__setitem__(b"inner", b"value"), lambda: inner.__delitem__(b"key 1"), inner.reorganize):
                with pytest.raises(dbm_bitcask.error, match="inside one of its own operations") as failure:
                    change()
                failures.append(failure)
            assert inner[b"key 1"] == ITEMS[b"key 1"]  # reading is no problem
            return pwrite(data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(db._log.active, "pwrite", be_interrupted)
            db[b"outer"] = b"value"
        assert len(failures) == 3
        inner[b"inner"] = b"later"
        assert dict(db) == {**ITEMS, b"outer": b"value", b"inner": b"later"}


def test_slot_into_a_segment_that_is_not_listed_is_an_empty_slot(path):
    """Finding 22: "segment gone, look up again" loops for ever."""
    with dbm_bitcask.open(path, "c", **TINY) as db, dbm_bitcask.open(path, "r") as reader:
        fill(db)
        db.clear()
        words = db._log.keydir.words
        table = db._log.keydir.table
        assert [words[slot] for slot in probe(table, key_hash(b"key 1", table.seed)).found] != []
        for handle in (db, reader):
            assert handle.get(b"key 1") is None
            assert b"key 1" not in handle
        assert db.setdefault(b"key 1", b"new") == b"new"
        assert dict(db) == dict(reader) == {b"key 1": b"new"}


def test_listed_segment_without_a_file_is_damage(path):
    """Finding 22: it is not an empty slot, and no loop either."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db)
        expected = dict(db)
        victim = sealed(path)[0]
        locations = {key: db._log.find(key) for key in expected}
    data = victim.read_bytes()
    victim.unlink()
    with dbm_bitcask.open(path, "r") as db:
        for key, location in locations.items():
            if location >> 32 == int(victim.stem):
                with pytest.raises(dbm_bitcask.CorruptionError, match=victim.name):
                    db[key]
            else:
                assert db[key] == expected[key]
    assert check(path) != []
    victim.write_bytes(data)


def test_tombstones_over_a_cold_segment_are_not_merged_for_ever(path):
    """Finding 23: each merge moves them all, and the result is a victim again."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        for number in range(60):
            db[b"cold %d" % number] = bytes(200)
        for _ in range(3):
            for number in range(200):
                db[b"hot %d" % number] = b""
                del db[b"hot %d" % number]
            db.reorganize()
        db.reorganize()  # drops tombstones that are a large part of the log, and moves what they are about
        cold = {number: db._log.find(b"cold %d" % number) for number in range(60)}
        sizes = set()
        for _ in range(3):
            db.reorganize()
            sizes.add((db.stats().log_bytes, tuple(sorted(file.name for file in path.glob("*.data")))))
        assert len(sizes) == 1
        assert cold == {number: db._log.find(b"cold %d" % number) for number in range(60)}


def test_few_tombstones_over_a_cold_segment_stay_where_they_are(path):
    """Finding 23: they were bytes that a merge gives back, and a merge can not give them back."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        for number in range(60):
            db[b"cold %d" % number] = bytes(2000)
        for number in range(200):
            db[b"hot %d" % number] = b""
            del db[b"hot %d" % number]
        db.reorganize()
        assert db.stats().tombstone_bytes > 0
        before = {file.name for file in path.glob("*.data")}
        for _ in range(3):
            db.reorganize()
            assert {file.name for file in path.glob("*.data")} == before


@pytest.fixture
def disk_is_full(monkeypatch):
    """Nothing can be reserved any more."""

    def fill():
        def reserve(*_args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.File, "reserve", reserve)

    return fill


def test_full_disk_is_found_before_anything_is_appended(path, disk_is_full):
    """Finding 24: the record is written, its slot needs a split, and from then on no writer can work."""
    with dbm_bitcask.open(path, "c") as db:
        disk_is_full()
        written = {}
        size = 0

        def fill_up():
            nonlocal size
            for number in range(100_000):
                size = active(path).stat().st_size
                db[b"%d" % number] = b"value"
                written[b"%d" % number] = b"value"

        with pytest.raises(dbm_bitcask.error, match="No space left"):
            fill_up()
        assert active(path).stat().st_size == size
        assert dict(db) == written
        for key in list(written)[: len(written) // 2]:
            del db[key]
            del written[key]
        assert dict(db) == written
        assert len(db) == len(written)
        with dbm_bitcask.open(path, "w") as other:
            assert dict(other) == written


def test_writer_that_died_as_the_page_became_full_needs_no_space_to_be_finished(tmp_path, machine, monkeypatch):
    """Finding 24: the repair needs a split that the write did not need."""
    base = tmp_path / "base"
    db = dbm_bitcask.open(base, "c")
    for number in range(FULL - 1):
        db[b"%d" % number] = b"value"
    words = db._log.keydir.words
    page = probe(db._log.keydir.table, 1).page
    assert words[page * PAGE_WORDS + PAGE_COUNTS] == FULL - 1
    abandon(db)
    frozen = freeze(base)
    before = {b"%d" % number: b"value" for number in range(FULL - 1)}
    for step in itertools.count(1):
        path = thaw(frozen, tmp_path / str(step))
        dying = dbm_bitcask.open(path, "w")
        died = machine.run(lambda dying=dying: dying.__setitem__(b"last", b"value"), step, killed=True)
        abandon(dying)
        with monkeypatch.context() as patch:

            def reserve(*_args):
                raise OSError(28, "No space left on device")

            patch.setattr(files.File, "reserve", reserve)
            with dbm_bitcask.open(path, "w") as db:
                del db[b"1"]
                assert dict(db) in [{**state, b"0": b"value"} for state in _without(before)]
        assert check(path) == []
        if not died:
            break


def _without(before):
    left = {key: value for key, value in before.items() if key != b"1"}
    return left, {**left, b"last": b"value"}


@pytest.mark.parametrize("name", ["overwrite", "delete", "set"])
def test_count_and_dead_bytes_do_not_drift_after_a_kill(tmp_path, machine, name):
    """Finding 25: the repair cannot know whether slot and counts had been stored, unless it is told."""
    operation = {
        "overwrite": lambda db: db.__setitem__(b"key 1", b"another value of another length"),
        "delete": lambda db: db.__delitem__(b"key 1"),
        "set": lambda db: db.__setitem__(b"new", b"value"),
    }[name]
    for step in itertools.count(1):
        path = tmp_path / str(step)
        dying = dbm_bitcask.open(path, "c")
        dying.update(ITEMS)
        died = machine.run(lambda dying=dying: operation(dying), step, killed=True)
        abandon(dying)
        with dbm_bitcask.open(path, "w") as db:
            assert len(db) == len(db.keys())
            stats = db.stats()
            assert check(path) == []
        lose_index(path)
        with dbm_bitcask.open(path, "w") as db:
            again = db.stats()
            assert (again.keys, again.live_bytes, again.tombstone_bytes) == (stats.keys, stats.live_bytes, stats.tombstone_bytes)
        if not died:
            break
    assert step > 8


def test_no_write_makes_a_hint(path, monkeypatch):
    """Finding 26: sealing a segment scanned all of it under the lock."""
    made = []
    with dbm_bitcask.open(path, "c", **TINY) as db:
        monkeypatch.setattr(contents, "write_hint", lambda *_: made.append(db._log.lock.busy))
        fill(db)
        fill(db, turn=1)
        assert len(sealed(path)) > 3
        assert made == []
    assert made
    assert not any(made)


def test_values_stay_right_while_descriptors_and_maps_run_short(path, monkeypatch):
    """Finding 27: a descriptor was closed, and its number reused, under a thread that was about to read from it."""
    monkeypatch.setattr(files, "maps_at_a_time", lambda: 2)
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 100)
        expected = dict(db)
        wrong = []

        def read(step):
            for key in list(expected)[::step] * 3:
                if db[key] != expected[key]:
                    wrong.append(key)

        threads = [threading.Thread(target=read, args=(step,)) for step in (1, -1, 3, -7)]
        for thread in threads:
            thread.start()
        for number in range(50):
            Path(os.devnull).open("rb").close()
            db[b"other %d" % number] = b"value" * 20
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(db._log.segments) <= 2


def test_no_descriptor_is_closed_by_hand():
    """Finding 27: only the object that holds it closes it, when nobody refers to it any more."""
    source = Path(files.__file__).read_text(encoding="utf-8")
    for module in Path(files.__file__).parent.glob("*.py"):
        assert module.name == "files.py" or "os.close" not in module.read_text(encoding="utf-8")
    inside = [line.split("def ")[1].split("(")[0] for line in _functions_that_close(source)]
    assert sorted(inside) == ["__del__", "__init__", "boot_id"]


def _functions_that_close(source):
    function = ""
    for line in source.splitlines():
        if line.strip().startswith("def "):
            function = line
        if "os.close(" in line:
            yield function


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_database_of_nothing_but_keys_that_expire_is_merged(path, monkeypatch):
    """Finding 28: nothing is ever overwritten, and yet bytes are dead."""
    now = 1_700_000_000
    monkeypatch.setattr(expiry, "time_ns", lambda: now * 1_000_000_000)
    with dbm_bitcask.open(path, "c", **TINY) as db:
        longest = 0
        for turn in range(30):
            for number in range(30):
                db.set(b"key %d %d" % (turn, number), b"value" * 20, ttl=60)
            now += 30
            db.reorganize()
            longest = max(longest, db.stats().log_bytes)
            assert len(list(db)) == min(turn + 1, 1) * 30
        assert longest < 6 * 30 * record.record_length(record.EXPIRES, 9, 100)


def test_reader_lets_go_of_merged_segments_with_its_next_operation(path):
    """Finding 29: the space is not given back while somebody holds a map."""

    def held():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in lines if str(path) in line and ".data (deleted)" in line]

    with dbm_bitcask.open(path, "c", **TINY) as db, dbm_bitcask.open(path, "r") as reader:
        fill(db)
        dict(reader)
        dict(db)
        fill(db, turn=1)
        db.reorganize()
        assert reader[b"key 1"] == db[b"key 1"]
        assert held() == []


def test_new_keys_all_the_time_do_not_make_the_index_grow(path):
    """Finding 30: deleted slots count as used, and pages split for ever."""
    with dbm_bitcask.open(path, "c") as db:
        pages = set()
        for number in range(6000):
            db[b"%d" % number] = b""
            if number >= 50:
                del db[b"%d" % (number - 50)]
            if number % 500 == 499:
                pages.add(db.stats().index_pages)
        assert pages == {1}


def test_index_gets_smaller_by_reorganize_after_most_keys_are_gone(path):
    """Finding 30: delete all, then rebuild smaller."""
    with dbm_bitcask.open(path, "c") as db:
        for number in range(20_000):
            db[b"%d" % number] = b""
        large = db.stats().index_bytes
        for number in range(10, 20_000):
            del db[b"%d" % number]
        db.reorganize()
        assert db.stats().index_bytes < large / 4
        assert len(db) == len(db.keys()) == 10


def test_reader_beside_a_writer_shares_its_keydir(path):
    """Finding 31: it built one of its own, in its own memory, and could not follow."""
    with dbm_bitcask.open(path, "c") as db, dbm_bitcask.open(path, "r") as reader:
        assert reader._log.keydir.file.identity().inode == (path / "keydir").stat().st_ino
        db.update(ITEMS)
        assert dict(reader) == ITEMS


def test_what_a_dead_process_left_is_synced_by_any_that_lives(path):
    """Finding 32: killed a second before its sync; who was left wrote nothing, and so synced nothing."""
    dbm_bitcask.open(path).close()
    with dbm_bitcask.open(path, sync=0.02) as db:
        fork_and_wait(lambda: dbm_bitcask.open(path, "w").update({b"of a process that dies": b"1"}))
        words, pause = db._log.keydir.words, threading.Event()
        for _ in range(1000):
            if words[at.SYNCED_TO] == db._log.keydir.counter(at.TAIL):
                break
            pause.wait(0.01)
        assert words[at.SYNCED_TO] == db._log.keydir.counter(at.TAIL)


@pytest.mark.parametrize("flag", ["c", "n"])
def test_creation_that_was_killed_at_any_step_is_taken_over(tmp_path, machine, flag):
    """Finding 33: a directory with our names, and no manifest and no record in it."""
    for step in itertools.count(1):
        path = tmp_path / str(step)
        opened = []
        died = machine.run(lambda path=path, opened=opened: opened.append(dbm_bitcask.open(path, "c")), step, killed=True)
        for db in opened:
            abandon(db)
        if (path / "MANIFEST").exists():
            assert everything(path, "r") == {}
        with dbm_bitcask.open(path, flag) as db:
            assert dict(db) == {}
            db.update(ITEMS)
        assert everything(path) == ITEMS
        assert check(path) == []
        assert [name for name in os.listdir(path) if names.is_temporary(name)] == []  # noqa: PTH208
        if not died:
            break
    assert step > 20


def test_new_database_is_durable_in_its_parent(path, monkeypatch):
    """Finding 33: mkdir without an fsync of the parent."""
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
    dbm_bitcask.open(path, "c").close()
    assert path.parent.stat().st_ino in synced
    assert path.stat().st_ino in synced
    assert active(path).stat().st_ino in synced


def test_macos_is_asked_to_reach_the_disk(path, monkeypatch):
    """Finding 34: fsync is not durable there."""
    asked, full_sync, control = [], 51, fcntl.fcntl
    with dbm_bitcask.open(path, "c") as db:
        db[b"key"] = b"value"
        monkeypatch.setattr(files, "_FSYNC_FULL", full_sync)
        monkeypatch.setattr(fcntl, "fcntl", lambda fd, what, *how: asked.append(fd) if what == full_sync else control(fd, what, *how))
        monkeypatch.setattr(files, "_fdatasync", None)
        db.sync()
        assert asked == [db._log.active.fd]
        monkeypatch.undo()


def test_large_record_has_a_segment_of_its_own(path):
    """Finding 35: so that nobody has to move it with others."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        fill(db, 3)
        db[b"large"] = bytes(20_000)
        large = db._log.find(b"large")
        fill(db, 3, turn=1)
        others = {db._log.find(b"key %d" % number) >> 32 for number in range(3)}
        assert large & MASK32 == segment.FIRST_RECORD
        assert large >> 32 not in others


@pytest.mark.parametrize("turn", range(3))
def test_rotation_is_noticed_by_every_handle_that_holds_an_old_idea_of_the_tail(path, turn):
    """Findings 3 and 12: the seal makes the segment longer than they think."""
    handles = [dbm_bitcask.open(path, "c", **TINY) for _ in range(3)]
    rotations = [lambda db: db._store.locked(rotation.rotate), lambda db: db.clear(), lambda _: dbm_bitcask.open(path, "n").close()]
    for db in handles:
        db[b"before"] = b"value"
    rotations[turn](handles[0])
    for number, db in enumerate(handles):
        db[b"%d" % number] = b"behind"
    expected = {b"%d" % number: b"behind" for number in range(3)} | ({b"before": b"value"} if turn == 0 else {})
    assert all(dict(db) == expected for db in handles)
    for db in handles:
        db.close()
    lose_index(path)
    assert everything(path, "w") == expected


def test_child_does_not_keep_the_lock_of_a_parent_that_was_killed_within_a_write(path):
    """Finding 36: the child had the open file description on which the parent took its lock, and kept it as long as it lived."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"1"
    holding, ending = os.pipe(), os.pipe()

    def be_parent():
        db = dbm_bitcask.open(path, "w")

        def fork_and_die():
            os.write(holding[1], b"%d" % fork(lambda: os.read(ending[0], 1)))
            os.kill(os.getpid(), signal.SIGKILL)

        db._log.lock.run(fork_and_die)

    os.waitpid(fork(be_parent), 0)
    os.read(holding[0], 20)
    try:
        with dbm_bitcask.open(path, "w", timeout=10) as db:
            db[b"key"] = b"2"
    finally:
        os.write(ending[1], b".")
        for pipe in (*holding, *ending):
            os.close(pipe)


# 3. What pure Python cannot promise


def test_keydir_of_another_byte_order_is_not_believed(path):
    """Limit a: words are loaded and stored whole on little-endian 64-bit machines only."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    data = (path / "keydir").read_bytes()
    (path / "keydir").write_bytes(b"".join(data[place : place + 8][::-1] for place in range(0, len(data), 8)))
    for flag in "rw":
        assert everything(path, flag) == ITEMS


def test_keydir_has_no_holes_and_never_shrinks(path):
    """Limit c: a SIGBUS cannot be caught, so nothing of ours may lead to one."""
    with dbm_bitcask.open(path, "c") as db:
        before = (path / "keydir").stat()
        for turn in range(4):
            db.update({b"%d" % number: b"" for number in range(3000)})
            after = (path / "keydir").stat()
            assert after.st_ino == before.st_ino
            assert after.st_blocks * 512 >= after.st_size >= before.st_size
            db.clear() if turn % 2 else dbm_bitcask.open(path, "n").close()
            before = after


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "fuseblk"])
def test_file_system_that_two_machines_may_share_is_refused(path, monkeypatch, kind):
    """Limit e: a lock may be local there, and a map is not coherent. Without a boot id a dirty keydir is not believed: `test_recovery`."""
    device = path.parent.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /somewhere rw - {kind} server:/share rw\n"
    monkeypatch.setattr(files, "open", lambda *_, **__: io.StringIO(line), raising=False)
    for flag in "cn":
        with pytest.raises(dbm_bitcask.error, match=kind):
            dbm_bitcask.open(path, flag)


def test_maps_stay_valid_for_whoever_still_reads_them(path):
    """Limit g: a map cannot grow while a view of it is in use; another one takes its place."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
        table = db._log.keydir.table
        words = table.words
        db.update({b"%d" % number: b"" for number in range(3000)})
        assert len(words) < len(db._log.keydir.table.words)
        assert words[: at.COUNTERS_A] == db._log.keydir.table.words[: at.COUNTERS_A]  # of the same file, still
