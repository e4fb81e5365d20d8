"""What a review found, and what must not come back: processes that are killed or interrupted, and files that are damaged."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from contextlib import contextmanager

import pytest

import dbm_bitcask
from children import fork, fork_and_wait
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine import keydir, log, rotation, write
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.page import FULL, key_hash, probe

SMALL = {"segment_size": 4096}
KILLED = 9


@pytest.fixture
def damaged(tmp_path):
    """Where a database may stand that is not whole when the test is over."""
    return tmp_path / "damaged"


@contextmanager
def alarm(seconds=20):
    """A hang becomes an exception."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fill(db, count, value=b"v" * 100):
    db.update({b"k%03d" % number: value for number in range(count)})


def poke(file, offset, data):
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def flip(file, offset, bit=1):
    poke(file, offset, bytes([file.read_bytes()[offset] ^ bit]))


@contextmanager
def before_line(number, function, act):
    """Call `act` before the n-th line that a function executes."""
    code, passed = function.__code__, itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code is not code:
            return None
        if event == "line" and next(passed) == number:
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupt():
    raise KeyboardInterrupt


def die():
    os._exit(KILLED)


def is_killed(work):
    """Whether a child that does `work` dies on the way."""
    _, status = os.waitpid(fork(work), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), "the child failed, its traceback is on stderr"
    return code == KILLED


# Kills and interruptions.


@pytest.mark.parametrize("flag", ["w", "c"])
def test_kill_between_the_hash_and_the_location_of_a_slot_is_repaired(path, flag):
    """A slot got its hash and no location, which the counts of its page took for a deleted one: no writer could open the database again."""
    with dbm_bitcask.open(path) as db:
        db[b"before"] = b"1"

    def set_and_die_between_two_stores():
        db = dbm_bitcask.open(path, "w")
        db[b"first"] = b"1"
        words, table = db._log.keydir.words, db._log.keydir.table
        before = words[at.CURRENT]
        db[b"new"] = b"2"
        (slot,) = probe(table, key_hash(b"new", table.seed)).found
        words[slot], words[at.CURRENT] = 0, before  # as before the last two stores of that

    fork_and_wait(set_and_die_between_two_stores)
    with dbm_bitcask.open(path, flag) as db:
        assert dict(db) == {b"before": b"1", b"first": b"1", b"new": b"2"}


def test_split_that_a_kill_left_undone_is_not_done_by_a_later_recovery(tmp_path):
    """Killed as it noted a split; others wrote; killed in a rotation, whose recovery did the split: deleted keys had old values again."""
    for line in itertools.count(1):
        path = tmp_path / str(line)
        with dbm_bitcask.open(path) as db:
            db.update({b"k%d" % number: b"old" for number in range(FULL)})

        def split(path=path, line=line):
            db = dbm_bitcask.open(path, "w")
            with before_line(line, keydir.Keydir.split, die):
                db[b"new"] = b"1"

        def delete_and_die_within_a_rotation(path=path):
            db = dbm_bitcask.open(path, "w")
            for number in range(100):
                del db[b"k%d" % number]
            db.sync()
            rotation.finish_commit = lambda *_: die()
            db._store.locked(rotation.rotate)

        if not is_killed(split):
            break
        assert is_killed(delete_and_die_within_a_rotation)
        with dbm_bitcask.open(path, "w") as db:
            assert {key for key in db if key != b"new"} == {b"k%d" % number for number in range(100, FULL)}
        assert check(path) == []
    assert line > 10


@pytest.mark.parametrize("last", range(3, 9))
def test_interrupted_split_leaves_the_free_list_whole(path, monkeypatch, last):
    """Ctrl-C while a split filled a page of the free list: the list led into that page's slots, and splits were IndexErrors for good."""
    write_page, filled = keydir.write_page, []
    keys = {b"k%d" % number: b"v" for number in range(3000)}

    def write_page_and_stop(*args):
        write_page(*args)
        filled.append(args)
        if len(filled) == last:
            raise KeyboardInterrupt

    with dbm_bitcask.open(path) as db, monkeypatch.context() as patch:
        patch.setattr(keydir, "write_page", write_page_and_stop)
        with pytest.raises(KeyboardInterrupt):
            db.update(keys)
    with dbm_bitcask.open(path, "w") as db:
        db.update(keys)
        assert len(db) == len(db.keys()) == len(keys)


def test_interrupted_refresh_leaves_the_salt_of_the_segment_that_is_written(path):
    """Ctrl-C between segment and salt of a handle that caught up: it wrote records that nobody can read, and they were acknowledged."""
    for line in itertools.count(1):
        with dbm_bitcask.open(path, "n", **SMALL) as db, dbm_bitcask.open(path, "w", **SMALL) as other:
            for number in range(100):
                other[b"k%d" % number] = b"v" * 100
            try:
                with before_line(line, log.Log.adopt, interrupt):
                    db.get(b"k0")
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
            db[b"acknowledged"] = b"1"
            assert db[b"acknowledged"] == other[b"acknowledged"] == b"1"
        assert check(path) == []
        if not interrupted:
            break
    assert line > 5


def test_damaged_page_in_the_way_of_an_unfinished_write_does_not_keep_the_database_from_opening(path):
    """Killed between record and slot, and a bit flipped in the slot's page: each open was an exception of the engine's own."""
    with dbm_bitcask.open(path) as db:
        db.update({b"k%d" % number: b"v" for number in range(150)})
        page = next(db._log.keydir.pages())

    def die_before_the_slot():
        db = dbm_bitcask.open(path, "w")
        write.publish = lambda *_, **__: die()
        db[b"k3"] = b"w"

    assert is_killed(die_before_the_slot)
    flip(path / "keydir", page * at.PAGE_SIZE + 800)
    with dbm_bitcask.open(path, "w") as db:
        assert (db[b"k3"], len(db)) == (b"w", 150)


# Damage.


def test_hint_does_not_hide_damage_in_its_segment(damaged):
    """A record was damaged before its segment got a hint: the hint left it out, and a rebuild from hints lost the key without a word."""
    with dbm_bitcask.open(damaged, **SMALL) as db:
        fill(db, 60)
        poke(damaged / "00000001.data", db._log.find(b"k005") + 60 & at.MASK32, b"X")
    (damaged / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(damaged, "w") as db, pytest.raises(dbm_bitcask.CorruptionError):
        db.get(b"k005")


@pytest.mark.parametrize(("where", "what"), [(8, b"\xff" * 4), (24, b"X")], ids=["length", "key"])
def test_damage_to_an_overwritten_record_hides_nothing_from_a_rebuild_by_hints(damaged, where, what):
    """A dead record was damaged that a hint lists, and the keydir was lost: the database could not be opened, or had a key twice."""
    with dbm_bitcask.open(damaged, **SMALL) as db:
        fill(db, 60)
        location = db._log.find(b"k005")
        fill(db, 60, b"w" * 100)
    assert (damaged / "00000001.hint").exists()
    poke(damaged / "00000001.data", where + (location & at.MASK32), what)
    (damaged / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(damaged, "r") as db:
        assert (db[b"k005"], len(db)) == (b"w" * 100, 60)
    with dbm_bitcask.open(damaged, "w") as db:
        assert (db[b"k005"], len(db), len(db.keys())) == (b"w" * 100, 60, 60)
        del db[b"k005"]
        assert b"k005" not in db


def test_walk_over_thousands_of_damaged_records_ends_with_an_error(damaged):
    """Every second record was damaged: the walk went one call deeper for each of them, up to a RecursionError."""
    with dbm_bitcask.open(damaged) as db:
        db.update({b"k%07d" % number: b"v" * 32 for number in range(4000)})
        locations = [db._log.find(b"k%07d" % number) for number in range(0, 4000, 2)]
    for location in locations:
        poke(damaged / "00000001.data", (location & at.MASK32) + 8, b"\xff" * 4)
    with dbm_bitcask.open(damaged, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
        db.keys()


@pytest.mark.parametrize("use", [lambda db: db.pop(b"k000"), lambda db: db.merge()], ids=["pop", "merge"])
def test_missing_segment_is_a_corruption_error_of_whatever_needs_it(damaged, use):
    """A listed segment was deleted: pop and merge raised an exception of the engine's own that is not an `error`."""
    with dbm_bitcask.open(damaged, **SMALL) as db:
        fill(db, 200)
        db.update({b"k%03d" % number: b"w" for number in range(1, 200)})
    (damaged / "00000001.data").unlink()
    with dbm_bitcask.open(damaged, "w") as db, pytest.raises(dbm_bitcask.CorruptionError):
        use(db)


def test_huge_manifest_is_a_corruption_error(damaged):
    """Something made the manifest a sparse file of a terabyte: opening read it whole, which was a MemoryError."""
    dbm_bitcask.open(damaged).close()
    os.truncate(damaged / "MANIFEST", 2**40)
    with pytest.raises(dbm_bitcask.CorruptionError):
        dbm_bitcask.open(damaged, "r")


@pytest.mark.parametrize("bit", [20, 30, 38])
def test_directory_of_the_keydir_that_leads_nowhere_is_made_anew_by_a_set(path, bit):
    """One bit flipped in each entry of the keydir's directory: the next set was an IndexError, and every one after it."""
    with dbm_bitcask.open(path) as db:
        fill(db, 100)
        start = (db._log.keydir.words[at.ROOT] & at.MASK32) * at.PAGE_SIZE
    for entry in range(at.PAGE_WORDS):
        flip(path / "keydir", start + 8 * entry + bit // 8, 1 << bit % 8)
    with dbm_bitcask.open(path, "w") as db:
        db[b"new"] = b"1"
        assert (len(db), db[b"k003"]) == (101, b"v" * 100)


def test_page_without_an_empty_slot_does_not_hang_a_set(path):
    """A page of the keydir was overwritten so that none of its slots is empty: a set searched it for ever, under the lock."""
    with dbm_bitcask.open(path) as db:
        fill(db, 100)
        page = next(db._log.keydir.pages())
    poke(path / "keydir", page * at.PAGE_SIZE + 32, b"\x55" * (at.PAGE_SIZE - 32))
    with alarm(), dbm_bitcask.open(path, "w") as db:
        db[b"new"] = b"1"
        assert (len(db), db[b"k001"]) == (101, b"v" * 100)


def test_segment_that_somebody_cuts_off_under_a_writer_is_reported_and_no_torn_tail(damaged):
    """The active segment was truncated below its tail while it was open: the next set made the keydir anew, and lost keys were absent."""
    with dbm_bitcask.open(damaged) as db:
        db[b"key"] = b"v" * 100
        os.truncate(damaged / "00000001.data", 40)
        for use in (lambda: db[b"key"], lambda: db.update({b"new": b"1"}), lambda: db[b"key"]):
            with pytest.raises(dbm_bitcask.CorruptionError):
                use()
        with pytest.raises(dbm_bitcask.CorruptionError):
            db.close()


def test_manifest_of_an_older_state_is_refused_and_nothing_is_changed(damaged):
    """MANIFEST was restored from before a rotation: the segment of that rotation, with its records, was overwritten."""
    with dbm_bitcask.open(damaged, **SMALL) as db:
        db[b"key"] = b"1"
        db.sync()
        older = (damaged / "MANIFEST").read_bytes()
        fill(db, 40)
    (damaged / "MANIFEST").write_bytes(older)
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    with pytest.raises(dbm_bitcask.CorruptionError):
        dbm_bitcask.open(damaged, "w", **SMALL)
    assert {file.name: file.read_bytes() for file in damaged.iterdir()} == before


@pytest.mark.parametrize(("name", "offset"), [("00000001.hint", 60), ("keydir", 8 * at.SEED)])
def test_check_reports_a_flipped_bit_in_what_is_only_derived(damaged, name, offset):
    """One bit flipped in a hint, or in the header of the keydir: it was not used any more, and `check` said that all was well."""
    with dbm_bitcask.open(damaged, **SMALL) as db:
        fill(db, 100)
    assert check(damaged) == []
    flip(damaged / name, offset)
    assert [os.path.basename(problem.file) for problem in check(damaged)] == [name]  # noqa: PTH119
