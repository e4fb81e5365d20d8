"""What stores of this kind got wrong, mechanism by mechanism, and what happens here: one test for each pitfall, by its number.

Those without a test have their reason in `NOT_HERE`.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
import shutil
import signal
import threading

import pytest

import dbm_bitcask
from by_hand import ITEMS, TINY, active, everything, fill, flip, is_free, lose_index, poke, rotate
from children import fork, fork_and_wait, run_python
from crashes import Machine, abandon, freeze, thaw
from dbm_bitcask.engine import files, hint, merge, record, recovery, rotation, segment, store, write
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.header import MASK32

PITFALLS = 27
NOT_HERE = {
    21: "files that are open or mapped cannot be renamed over or deleted on Windows: the engine has no files for Windows yet",
}


def test_every_pitfall_has_a_test_or_a_reason():
    numbers = [int(found[1]) for name in globals() if (found := re.match(r"test_pitfall_(\d\d)_", name))]
    assert sorted([*numbers, *NOT_HERE]) == list(range(1, PITFALLS + 1))


@pytest.fixture
def damaged(tmp_path):
    """Where a database may stand that is not whole when the test is over."""
    return tmp_path / "damaged"


# Tombstones and merge


def merge_only(db, number):
    """Merge one segment, whatever a merge would choose."""
    victim = db._log.entries[number]
    offset = segment.FIRST_RECORD
    while 0 < offset < victim.length:
        offset = db._store.locked(merge._clean_slice, victim, offset)
    assert db._store.locked(merge._drop_cleaned) == 1


def test_pitfall_01_merge_of_some_segments_drops_no_tombstone(path):
    """The segment of the tombstone was merged, and the one of the value was not: the next start found the value."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        rotate(db)
        del db[b"key"]
        rotate(db)
        merge_only(db, 2)
        assert dict(db) == {}
        assert list(db._log.entries) == [1, 3]
    lose_index(path)
    assert everything(path, "r") == everything(path, "w") == {}


def test_pitfall_02_files_of_a_merge_may_be_deleted_in_any_order(path, tmp_path):
    """A crash after the tombstone's file was deleted, and before the value's was."""
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        rotate(db)
        del db[b"key 1"]
        rotate(db)
        before = freeze(path)
        db.reorganize()
        expected = dict(db)
    lose_index(path)
    after = freeze(path)
    value, tombstone = "00000001.data", "00000002.data"
    assert {value, tombstone}.isdisjoint(after)
    for left in ([value], [tombstone], [value, tombstone]):
        copy = tmp_path / "-".join(left)
        copy.mkdir()
        for name, data in {**after, **{name: before[name] for name in left}}.items():
            (copy / name).write_bytes(data)
        assert everything(copy, "r") == everything(copy, "w") == expected
        assert not any((copy / name).exists() for name in left)


def test_pitfall_03_merge_undoes_no_change_that_comes_meanwhile(path):
    """What a merge writes has a higher place in the log than a deletion that came while it was at it."""
    with dbm_bitcask.open(path) as db:
        keys = [b"%03d" % number for number in range(2 * merge._SLICE)]
        db.update(dict.fromkeys(keys, b"old"))
        db.update(dict.fromkeys(keys[:: merge._SLICE // 8], b"old, too"))  # so that it is worth merging
        turns = []

        def change(done, _total):
            turns.append(done)
            if len(turns) == 1:  # the first slice is copied, the second is not
                for key in (keys[1], keys[-2]):
                    del db[key]
                for key in (keys[2], keys[-3]):
                    db[key] = b"new"

        db.merge(change)
        assert len(turns) > 2
        expected = dict(db)
        assert [expected.get(key) for key in (keys[1], keys[-2], keys[2], keys[-3])] == [None, None, b"new", b"new"]
        assert len(db) == len(expected) == len(keys) - 2
    lose_index(path)
    assert everything(path, "r") == everything(path, "w") == expected


@pytest.mark.parametrize("hour", [-3600, 0, 2**40], ids=["goes back", "stands still", "is beyond all bounds"])
def test_pitfall_04_no_clock_orders_anything(path, monkeypatch, hour):
    """Two writes within a second, or a clock that was set back, and the older value won."""
    now = 3600.0

    def clock():
        nonlocal now
        now += hour
        return now

    for module in (write, rotation, recovery, store):
        monkeypatch.setattr(module, "time", clock)
    with dbm_bitcask.open(path, **TINY) as db:
        for turn in range(4):
            fill(db, 12, turn)
            del db[b"key 1"], db[b"key 11"]
        db[b"key 1"] = b"newest"
        expected = dict(db)
    for flag in "rw":
        lose_index(path)
        assert everything(path, flag) == expected
    with dbm_bitcask.open(path, "w", **TINY) as db:
        db.reorganize()
    lose_index(path)
    assert everything(path) == expected
    assert expected[b"key 1"] == b"newest"


def test_pitfall_05_newest_segment_without_a_key_is_counted(path):
    """The highest number was that of the newest segment with a key in it: one without was opened again, or written over."""
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        rotate(db)
        rotate(db)
    seen = {file.name for file in path.glob("*.data")}
    lose_index(path)
    with dbm_bitcask.open(path, "w") as db:
        db[b"new"] = b"value"
        db.clear()
        db.reorganize()
    lose_index(path)
    with dbm_bitcask.open(path, "w") as db:
        rotate(db)
        assert {file.name for file in path.glob("*.data")}.isdisjoint(seen)
        db[b"new"] = b"value"
    assert everything(path) == {b"new": b"value"}


def test_pitfall_06_merge_never_reads_the_segment_that_is_written(path, monkeypatch):
    """It found out which one that was, and listed the directory; a rotation in between made it merge a segment that grew."""
    looked_at, copy = [], merge._clean_slice

    def spy(log, victim, *rest):
        looked_at.append(victim)
        assert victim.id != log.manifest.active.id
        return copy(log, victim, *rest)

    monkeypatch.setattr(merge, "_clean_slice", spy)
    with dbm_bitcask.open(path, **TINY) as db, dbm_bitcask.open(path, **TINY) as other:
        fill(db, 100)
        fill(db, 60, turn=1)
        first = db._log.manifest.active.id
        db.merge(lambda *_: fill(other, 6, turn=2))
        assert len(looked_at) > 4
        assert all(victim.id <= first and victim.length for victim in looked_at)
        assert other._log.manifest.active.id > first + 1
        expected = {b"key %d" % number: b"%d %d " % (turn_of(number), number) * 60 for number in range(100)}
        assert dict(db) == dict(other) == expected


def turn_of(number):
    return 2 if number < 6 else 1 if number < 60 else 0


def test_pitfall_07_walk_loses_no_key_to_a_merge_that_deletes_files_as_it_opens_them(path, monkeypatch):
    """The list of files was taken, then they were opened; those that had gone in between were passed over without a word."""
    with dbm_bitcask.open(path, **TINY) as db:
        fill(db)
        fill(db, 30, turn=1)
        expected = sorted(db.items())
        merged, open_segment = [], segment.open_segment

        def merge_first(directory, entry, **how):
            if not merged:
                merged.append(entry)
                db.reorganize()
            return open_segment(directory, entry, **how)

        with dbm_bitcask.open(path, "r") as reader:
            reader.get(b"key 1")
            monkeypatch.setattr(segment, "open_segment", merge_first)
            assert sorted(reader.items()) == expected
        assert merged
        assert merged[0].id not in db._log.entries


# Hints and recovery


def test_pitfall_08_hint_that_does_not_fit_its_segment_returns_nothing_wrong(path, tmp_path):
    """A hint that is whole, but of another time or of another copy of the segment; or that leads elsewhere."""
    other = tmp_path / "other"
    for place, turn in ((path, 0), (other, 1)):
        with dbm_bitcask.open(place, **TINY) as db:
            fill(db, 30, turn)
    expected = everything(path)
    good = {file: file.read_bytes() for file in path.glob("*.hint")}
    assert len(good) > 1
    for file in good:
        shutil.copy(other / file.name, file)
    for flag in "rw":
        (path / "keydir").unlink(missing_ok=True)
        assert everything(path, flag) == expected

    file, data = next(iter(good.items()))
    keys = list(hint.decode(data))
    writer = hint.HintWriter(next(entry for entry in entries(path) if entry.id == int(file.stem)))
    body = writer.body(key._replace(offset=other.offset, size=other.size) for key, other in zip(keys, reversed(keys), strict=True))
    file.write_bytes(writer.head() + body + writer.checksum())
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "r") as db:
        assert [key for key in keys if db.get(key.key) not in (None, expected[key.key])] == []
    file.write_bytes(data)


def entries(path):
    with dbm_bitcask.open(path, "r") as db:
        return db._log.manifest.segments


def test_pitfall_09_rebuild_takes_no_record_that_does_not_verify(path):
    """Checksums were left out while the log was read, for speed: keys came in with whatever stood in their records."""
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        place = db._log.find(b"key 3") & MASK32
        rotate(db)
    for offset in (record.HEADER.size, record.HEADER.size + len(b"key 3") + 3):  # in the key, in the value
        flip(path / "00000001.data", place + offset)
        for flag in "rw":
            lose_index(path)
            with dbm_bitcask.open(path, flag) as db:
                with pytest.raises(dbm_bitcask.CorruptionError):
                    db[b"key 3"]
                assert {key: db[key] for key in list(ITEMS)[4:]} == dict(list(ITEMS.items())[4:])
                with pytest.raises(dbm_bitcask.CorruptionError):
                    len(db)
        flip(path / "00000001.data", place + offset)
    lose_index(path)
    assert everything(path, "w") == ITEMS


@pytest.mark.parametrize("length", [0, 56 + 64, 2**31, 2**32 - 8], ids=hex)
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_pitfall_10_length_in_a_record_that_does_not_verify_is_not_followed(damaged, length, index):
    """It led past the next record, into the middle of a value, or behind the end of the file, where reading ended as if all were well."""
    keys = [b"k%07d" % number for number in range(60)]
    with dbm_bitcask.open(damaged) as db:
        db.update(dict.fromkeys(keys, b"v" * 32))  # records of 64 bytes
        place = db._log.find(keys[5]) & MASK32
    poke(damaged / "00000001.data", place + record.CHECKSUM_SIZE, length.to_bytes(4, "little"))
    if not index:
        lose_index(damaged)
    seen = set()
    with dbm_bitcask.open(damaged, "r") as db:
        for key in keys[6:]:
            assert db[key] == b"v" * 32
        with pytest.raises(dbm_bitcask.CorruptionError):
            db[keys[5]]
        with pytest.raises(dbm_bitcask.CorruptionError):
            seen.update(db)  # adds one by one
    # Without an index nothing tells which key the damaged record has: what stands before it may be older.
    assert set(keys) - seen == ({keys[5]} if index else set(keys[:6]))


def test_pitfall_11_checksum_covers_the_header(path):
    """The checksum of nothing is 0, so that a header of zeros was a valid record; and a flipped flag made a value a deletion."""
    for seed in (0, 1, 2**64 - 1):
        with pytest.raises(record.BadRecord):
            record.decode(bytes(64), 0, seed)
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        place = db._log.find(b"key 3") & MASK32
        for bit in range(8 * record.HEADER.size):
            flip(path / "00000001.data", place + bit // 8, 1 << bit % 8)
            with pytest.raises(dbm_bitcask.CorruptionError):
                db[b"key 3"]
            flip(path / "00000001.data", place + bit // 8, 1 << bit % 8)
        assert dict(db) == ITEMS


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_pitfall_12_tail_of_zeros_or_of_stale_records_is_cut(path, tmp_path, index):
    """The size of a file reaches the disk before its contents: zeros stand there, or blocks that were freed, with valid old records."""
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    assert active(path).stat().st_size == db._log.keydir.counter(at.TAIL) & MASK32  # no space is taken in advance
    abandon(db)
    frozen, stale = freeze(path), active(path).read_bytes()
    shifted = [stale[segment.FIRST_RECORD :], stale[segment.FIRST_RECORD + 8 :], stale]
    for number, tail in enumerate([bytes(8), bytes(24), bytes(64), bytes(9999), b"\xff" * 64, *shifted]):
        copy = thaw(frozen, tmp_path / str(number))
        with active(copy).open("ab") as file:
            file.write(tail)
        if not index:
            lose_index(copy)
        assert everything(copy, "r") == everything(copy, "w") == ITEMS
        assert check(copy) == []
    (copy / "MANIFEST").write_bytes(bytes(16))
    with pytest.raises(dbm_bitcask.CorruptionError):
        dbm_bitcask.open(copy)


@pytest.mark.parametrize("synced", [False, True])
def test_pitfall_13_hole_is_a_torn_tail_behind_the_last_sync_and_damage_before_it(damaged, monkeypatch, synced):
    """Of two unsynced writes the second may reach the disk, and the first not; the same bytes before a sync are a loss to be told."""
    db = dbm_bitcask.open(damaged)
    db[b"first"] = b"value"
    start = active(damaged).stat().st_size
    db[b"second"] = b"value"
    end = active(damaged).stat().st_size
    if synced:
        db.sync()
    db[b"third"] = b"value"
    abandon(db)
    poke(active(damaged), start, bytes(end - start))
    monkeypatch.setattr(files, "boot_id", lambda: 1)
    if synced:
        with dbm_bitcask.open(damaged, "w") as db:
            assert db[b"third"] == b"value"
            for key in (b"second", b"first"):  # nobody knows whether it was set again in the lost record
                with pytest.raises(dbm_bitcask.CorruptionError):
                    db[key]
    else:
        assert everything(damaged, "r") == everything(damaged, "w") == {b"first": b"value"}


def test_pitfall_14_recovery_that_is_killed_twice_loses_nothing(path, tmp_path, monkeypatch):
    """The first crash was recovered from; a crash within the recovery was not."""
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    abandon(db)
    with active(path).open("ab") as file:
        file.write(b"torn")
    lose_index(path)
    torn = freeze(path)
    machine = Machine()
    machine.install(monkeypatch)

    def open_and_die(place, step):
        opened = []
        died = machine.run(lambda: opened.append(dbm_bitcask.open(place, "w")), step, killed=True)
        for db in opened:
            abandon(db)
        return died

    twice = 0
    for first in range(1, 10**9, 4):
        for second in range(1, 10**9, 13):
            place = tmp_path / f"{first} {second}"
            place.mkdir()
            for name, data in torn.items():
                (place / name).write_bytes(data)
            died = [open_and_die(place, first), open_and_die(place, second)]
            assert everything(place, "r") == everything(place, "w") == ITEMS
            shutil.rmtree(place)
            twice += all(died)
            if not died[1]:
                break
        if not died[0]:
            break
    assert twice > 20


# File system


@pytest.fixture
def calls(path, monkeypatch):
    """What happens to names, and what is made durable, in order: (call, name); the directory is called "."."""
    done = []

    def name_of(fd):
        number = os.fstat(fd).st_ino
        return next((file.name for file in path.iterdir() if file.stat().st_ino == number), ".")

    def spy(where, name, note):
        real = getattr(where, name)

        def call(*args, **kwargs):
            done.append(note(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    spy(os, "replace", lambda _, new: ("replace", new))
    spy(os, "unlink", lambda name: ("unlink", name) if (path / name).exists() else ("unlink", ""))
    spy(os, "fsync", lambda fd: ("sync", name_of(fd)))
    spy(files, "_fdatasync", lambda fd: ("sync", name_of(fd)))
    return done


COMMIT = ("replace", "MANIFEST")


@pytest.mark.parametrize("change", [rotate, lambda db: db.reorganize(), lambda db: db.clear()], ids=["rotation", "merge", "clear"])
def test_pitfall_15_directory_is_synced_behind_each_commit_and_before_anything_is_deleted(path, calls, change):
    """Only files were synced: after a power cut the name of a new one was gone, or the deletion of old ones came before it."""
    with dbm_bitcask.open(path, **TINY) as db:
        fill(db, 20)
        fill(db, 20, turn=1)
        calls.clear()
        change(db)
        before = calls[: calls.index(COMMIT)]
        assert before[-1][0] == "sync"
        assert any(re.fullmatch(r"MANIFEST\..*\.tmp", name) for call, name in before if call == "sync")
        assert [name for call, name in before if call == "unlink" and name] == []
        for number, call in enumerate(calls):
            if call == COMMIT:
                assert calls[number + 1] == ("sync", ".")
        if change is not rotate:
            assert [name for call, name in calls if call == "unlink" and name.endswith(".data")]


def test_pitfall_16_segment_is_durable_before_the_next_one_is_used(path, calls, monkeypatch):
    """What was written later survived, and what was written earlier did not; and a failure that a close reports was passed over."""
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    calls.clear()
    rotate(db)
    before = calls[: calls.index(COMMIT)]
    assert ("sync", "00000001.data") in before  # the old one
    assert before.index(("sync", "00000002.data")) < before.index(("sync", "."))  # the new one, and its name
    db[b"new"] = b"value"

    def fail(_fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(dbm_bitcask.error, match="Input/output error"):
        patch.setattr(files, "_fdatasync", fail)
        db.close()
    assert everything(path, "w") == {**ITEMS, b"new": b"value"}


def test_pitfall_17_failed_sync_is_not_tried_again(path, monkeypatch):
    """The kernel reports a lost page once, and calls it clean: the next fsync is a success, and the data are gone."""
    tried = []

    def fail_once(fd):
        tried.append(fd)
        if len(tried) == 1:
            raise OSError(errno.EIO, "Input/output error")

    db = dbm_bitcask.open(path, sync="always")
    db.update(ITEMS)
    monkeypatch.setattr(files, "_fdatasync", fail_once)
    for change in (
        lambda: db.update({b"in doubt": b"1"}),
        lambda: db.update({b"refused": b"1"}),
        lambda: db.pop(b"key 1"),
        db.sync,
        db.close,
    ):
        with pytest.raises(dbm_bitcask.error):
            change()
    assert len(tried) == 1
    assert everything(path) == {**ITEMS, b"in doubt": b"1"}
    with dbm_bitcask.open(path, "w") as db:
        assert db._log.find(b"in doubt") >> 32 > 1  # written anew elsewhere
        db[b"refused"] = b"1"
    assert everything(path) == {**ITEMS, b"in doubt": b"1", b"refused": b"1"}


def test_pitfall_18_nothing_is_appended_behind_a_write_that_stopped_half_way(path):
    """A short write, then an error; the next record was appended behind the half one."""

    def work():
        db = dbm_bitcask.open(path)
        db.update(ITEMS)
        size = active(path).stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
        with pytest.raises(dbm_bitcask.error) as failure:
            db[b"too large"] = bytes(1000)
        assert failure.value.errno == errno.EFBIG
        assert active(path).stat().st_size == size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert dict(db) == ITEMS
        db[b"behind"] = b"value"
        assert dict(db) == {**ITEMS, b"behind": b"value"}

    fork_and_wait(work)
    assert check(path) == []
    lose_index(path)
    assert everything(path, "w") == {**ITEMS, b"behind": b"value"}


def test_pitfall_19_reader_beside_an_unfinished_append_sees_what_was_there_before(path):
    """It took the half record for damage, or for the end of the log, and cut it."""
    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path, "r") as reader:
        db.update(ITEMS)
        write_all, looks = db._log.active.pwrite, []

        def write_by_eights(data, offset):
            done = write_all(data[:8], offset)
            looks.append((dict(reader), everything(path)))
            return done

        db._log.active.pwrite = write_by_eights
        db[b"key 1"] = b"new value"
        assert len(looks) == record.record_length(0, 5, 9) // 8
        assert all(look == (ITEMS, ITEMS) for look in looks)
        assert dict(reader) == everything(path) == {**ITEMS, b"key 1": b"new value"}


def test_pitfall_20_nothing_is_cut_that_somebody_may_have_mapped(path):
    """To read in a map behind the new end of its file is a SIGBUS, which kills the interpreter."""

    def work():
        cut, ftruncate = [], os.ftruncate
        os.ftruncate = lambda fd, length: (cut.append(length), ftruncate(fd, length))
        with dbm_bitcask.open(path) as db, dbm_bitcask.open(path, "r") as reader:
            db[b"large"] = bytes(300_000)  # so large that its segment is mapped while it is written
            db.update(ITEMS)
            assert len(reader[b"large"]) == 300_000
            held = dict(reader._log.segments)
            with active(path).open("ab") as file:
                file.write(b"torn" * 2000)
            db[b"next"] = b"value"
            assert cut
            assert min(cut) >= len(held[1][0]) >= 300_000
            indexes = [(path / "keydir").stat()]
            for change in (rotate, lambda db: db.reorganize(), lambda db: db.clear(), lambda _: dbm_bitcask.open(path, "n").close()):
                assert bytes(held[1][0])
                assert reader.get(b"key 1") == db.get(b"key 1")
                change(db)
                indexes.append((path / "keydir").stat())
            assert all(one.st_ino != other.st_ino or one.st_size <= other.st_size for one, other in itertools.pairwise(indexes))

    fork_and_wait(work)


# Locks and processes


def test_pitfall_22_lock_of_a_dead_process_is_free_whoever_has_its_number_now(path):
    """A lock file with the number of a process: empty after a crash, so locked for ever; or the number was another process's by then."""

    def die_with_the_lock():
        db = dbm_bitcask.open(path)
        db.update(ITEMS)
        db._log.lock.run(lambda: os.kill(os.getpid(), signal.SIGKILL))

    os.waitpid(fork(die_with_the_lock), 0)
    with dbm_bitcask.open(path, "w", timeout=0) as db:
        for number in (os.getpid(), os.getppid(), 1, 0, 2**64 - 1):
            db._log.keydir.words[at.HOLDER] = number
            with dbm_bitcask.open(path, "w", timeout=0) as other:
                other[b"new"] = b"%d" % number
        assert db[b"new"] == b"%d" % (2**64 - 1)


def test_pitfall_23_lock_is_not_lost_with_another_descriptor_of_the_same_file(path):
    """A record lock goes when the process closes any descriptor of the file, and the same process gets it twice."""
    with dbm_bitcask.open(path, timeout=0) as db:
        db.update(ITEMS)

        def use_it_otherwise():
            for name in (".", "MANIFEST", "keydir", "00000001.data"):
                os.close(os.open(path / name, os.O_RDONLY))
            assert dbm_bitcask.whichdb(path)
            assert everything(path) == ITEMS
            assert not is_free(path)
            fork_and_wait(lambda: None if not is_free(path) else 1 / 0)

        db._log.lock.run(use_it_otherwise)
        assert is_free(path)


def test_pitfall_24_child_takes_no_lock_away_and_is_not_stuck_in_one(path):
    """A child has the parent's locks: to unlock one there unlocks the parent's, and one that another thread held is held for ever."""
    with dbm_bitcask.open(path, timeout=0.02) as db:
        db.update(ITEMS)

        def close_in_child():
            with pytest.raises(dbm_bitcask.LockTimeout):
                db.close()

        db._log.lock.run(lambda: (fork_and_wait(close_in_child), is_free(path) and 1 / 0))

        held, let_go = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: db._log.lock.run(lambda: (held.set(), let_go.wait())))
        thread.start()
        held.wait()

        def set_in_child():
            with pytest.raises(dbm_bitcask.LockTimeout, match=r"s: (another )?process"):  # and not a thread, which is not here
                db[b"too early"] = b"1"

        fork_and_wait(set_in_child)
        let_go.set()
        thread.join()
        fork_and_wait(lambda: db.update({b"child": b"1"}))
        db[b"parent"] = b"1"
        assert dict(db) == {**ITEMS, b"child": b"1", b"parent": b"1"}


PRINT_INTO_WHATEVER_IS_THERE = """
import contextlib, os, sys

import dbm_bitcask

answer = os.dup(1)
for turn in range(3):
    for fd in range(3):
        with contextlib.suppress(OSError):
            os.close(fd)
    db = dbm_bitcask.open(sys.argv[1], "c", segment_size=4096)
    for number in range(400):
        db[b"%d" % number] = b"%d" % turn * 30
        for fd in range(3):
            with contextlib.suppress(OSError):
                os.write(fd, b"this is printed by the program\\n" * 9)
    db.close()
os.write(answer, b"done")
"""


def test_pitfall_25_what_a_program_prints_lands_in_no_file_of_ours(path):
    """A program closed its standard streams, and a file of the database got their numbers."""
    assert run_python(PRINT_INTO_WHATEVER_IS_THERE, path) == "done"
    for file in path.iterdir():
        assert b"this is printed" not in file.read_bytes(), file.name
    assert check(path) == []
    assert everything(path) == {b"%d" % number: b"2" * 30 for number in range(400)}


END_WITHOUT_A_CLOSE = """
import os, sys, threading

import dbm_bitcask

db = dbm_bitcask.open(sys.argv[1], "c", sync=0.01, segment_size=4096)

def write_for_ever(name):
    number = 0
    while True:
        db[b"%d %d" % (name, number)] = b"v" * 50
        os.write(1, b"%d %d\\n" % (name, number))
        number += 1
        if number % 50 == 0:
            db.reorganize()

for name in range(2):
    threading.Thread(target=write_for_ever, args=(name,), daemon=True).start()
while len(db) < 300:
    pass
sys.exit()
"""


def test_pitfall_26_nothing_has_to_happen_when_the_interpreter_ends(path):
    """The index was written by `__del__`; a background thread ended in the middle of a merge."""
    acknowledged = run_python(END_WITHOUT_A_CLOSE, path).encode().splitlines()
    assert len(acknowledged) >= 290
    found = everything(path)
    assert set(acknowledged) <= set(found)
    assert set(found.values()) == {b"v" * 50}
    with dbm_bitcask.open(path, "w") as db:
        db[b"next"] = b"value"
    assert check(path) == []


@pytest.mark.parametrize("guess", [0, 1, "another database"], ids=str)
def test_pitfall_27_record_within_a_value_is_never_taken_for_one_of_the_log(path, tmp_path, guess):
    """A search for the next record behind damage found those that somebody had put into a value."""
    if guess == "another database":
        dbm_bitcask.open(tmp_path / "other").close()
        guess = int.from_bytes(active(tmp_path / "other").read_bytes()[16:24], "little")
    with dbm_bitcask.open(path) as db:
        db[b"first"] = b"value"
        start = active(path).stat().st_size + record.HEADER.size + 8  # of the value: its key takes eight bytes
        forged = b"".join(record.encode(0, b"first", b"forged", guess ^ offset, 0) for offset in range(start, start + 40 * 99, 40))
        assert len(forged) == 40 * 99
        db[b"carrier "] = forged
        assert active(path).read_bytes()[start : start + len(forged)] == forged
        db.sync()
        db[b"last"] = b"value"
    flip(active(path), start - 10)
    for flag in "rw":
        lose_index(path)
        with dbm_bitcask.open(path, flag) as db:
            assert db[b"last"] == b"value"
            for ask in (lambda: db[b"first"], lambda: len(db), lambda: dict(db)):
                with pytest.raises(dbm_bitcask.CorruptionError):
                    ask()
    flip(active(path), start - 10)
    lose_index(path)
    assert everything(path, "w") == {b"first": b"value", b"carrier ": forged, b"last": b"value"}
