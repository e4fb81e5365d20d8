"""What a review found, and what must not come back: several handles, threads, forks, iterations and failed syncs."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import threading
from contextlib import suppress

import pytest

import dbm_bitcask
from children import fork_and_wait
from dbm_bitcask.engine import files, keydir, log, page, recovery, segment
from dbm_bitcask.engine.page import FULL

SMALL = {"segment_size": 4096}
MANY = 10_000  # keys: the keydir has grown several times


def fill(db, count, value=b"v" * 100):
    db.update({b"k%03d" % number: value for number in range(count)})


def make_anew(db):
    """Put a new keydir in the place of the one that everybody maps."""
    db._store.locked(recovery.rebuild)


def fail(_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# Several handles.


def test_handle_writes_after_another_one_has_made_the_keydir_grow(path):
    """Open twice, grow the keydir by one handle: the other one's next set was an IndexError, beyond the end of its map."""
    with dbm_bitcask.open(path) as first, dbm_bitcask.open(path) as second:
        first[b"before"] = b"1"
        second.update({b"k%d" % number: b"v" for number in range(MANY)})
        for number in range(200):
            first[b"new %d" % number] = b"v"
        assert len(second) == MANY + 201


@pytest.mark.parametrize("flag", ["r", "w"])
def test_handle_reads_after_another_one_has_made_the_keydir_grow(path, flag):
    """Open twice, grow the keydir by one handle: the other one's next get of a present key was an IndexError."""
    with dbm_bitcask.open(path) as writer, dbm_bitcask.open(path, flag) as other:
        assert b"k1" not in other
        writer.update({b"k%d" % number: b"v" for number in range(MANY)})
        assert {other[b"k%d" % number] for number in range(300)} == {b"v"}


def test_handle_writes_after_another_one_has_made_the_keydir_anew(path):
    """Replace the keydir by one handle: every set, pop and delete of the other one was refused as a use inside its own operation."""
    with dbm_bitcask.open(path) as first, dbm_bitcask.open(path) as second:
        first[b"key"] = b"1"
        make_anew(second)
        first[b"other"] = b"2"
        make_anew(second)
        assert first.pop(b"key") == b"1"
        make_anew(second)
        assert first.setdefault(b"third", b"3") == b"3"
        assert dict(second) == {b"other": b"2", b"third": b"3"}


def test_thread_that_reads_and_one_that_writes_while_the_keydir_is_replaced_do_not_block_each_other(path, monkeypatch):
    """The reader held the mutex of a refresh and wanted the lock, the writer had the lock and wanted the mutex: both hung for ever."""

    def child():
        signal.alarm(20)  # kills it
        db, other = dbm_bitcask.open(path), dbm_bitcask.open(path)
        db[b"key"] = b"1"
        make_anew(other)
        recovering, locked, seen = threading.Event(), threading.Event(), []
        recover, ready = db._log.recover, recovery.ready

        def recover_while_locked(**how):
            recovering.set()
            locked.wait()
            recover(**how)

        def ready_under_lock(log):
            locked.set()
            ready(log)

        monkeypatch.setattr(db._log, "recover", recover_while_locked)
        reader = threading.Thread(target=lambda: seen.append(db[b"key"]))
        reader.start()
        recovering.wait()
        monkeypatch.setattr(recovery, "ready", ready_under_lock)
        writer = threading.Thread(target=lambda: db.update({b"key": b"2"}))
        writer.start()
        reader.join()
        writer.join()
        assert seen in ([b"1"], [b"2"])
        assert db[b"key"] == b"2"

    fork_and_wait(child)


def test_reader_that_looks_between_the_mark_and_the_new_name_of_a_keydir_goes_on_to_the_new_one(path, monkeypatch):
    """It read while a rebuild had marked the old keydir and not yet put the new one in place: it never saw a change again."""
    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path, "r") as reader:
        db[b"key"] = b"1"
        assert reader[b"key"] == b"1"
        replace, seen = files.Directory.replace, []

        def replace_after_a_look(directory, old, new):
            if new == "keydir":
                seen.append(reader[b"key"])
            replace(directory, old, new)

        with monkeypatch.context() as patch:
            patch.setattr(files.Directory, "replace", replace_after_a_look)
            make_anew(db)
        assert seen == [b"1"]
        db.update({b"key": b"2", b"new": b"2"})
        assert (reader[b"key"], reader[b"new"]) == (b"2", b"2")


def test_reader_that_found_no_keydir_sees_what_a_later_writer_does(path):
    """A reader made a keydir of its own (after a restart, or in a copy): it showed the old values for ever, and after a merge an error."""
    with dbm_bitcask.open(path, **SMALL) as db:
        fill(db, 200)
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "r") as reader:
        assert reader[b"k001"] == b"v" * 100
        with dbm_bitcask.open(path, "w", **SMALL) as db:
            fill(db, 200, b"w" * 100)
            db[b"new"] = b"1"
            del db[b"k005"]
            assert (reader[b"k001"], reader[b"new"], b"k005" in reader, len(reader)) == (b"w" * 100, b"1", False, 200)
            db.merge()
            assert reader[b"k150"] == b"w" * 100
            assert set(reader) == set(db)


def test_set_through_a_handle_whose_database_was_made_anew_without_its_keydir_is_not_lost(path):
    """The keydir was deleted under a writer, and flag n made a new database: what the writer set went to a file nobody listed."""
    with dbm_bitcask.open(path) as db:
        db[b"old"] = b"1"
        (path / "keydir").unlink(missing_ok=True)
        with dbm_bitcask.open(path, "n") as new:
            db[b"acknowledged"] = b"1"
            assert dict(db) == dict(new) == {b"acknowledged": b"1"}
    with dbm_bitcask.open(path, "r") as reader:
        assert dict(reader) == {b"acknowledged": b"1"}


def test_set_through_a_handle_whose_files_a_backup_links_is_not_lost(path, tmp_path):
    """Hard-link an open database, open it again for writing: what the first handle set afterwards went to the file left behind."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"1"
        shutil.copytree(path, tmp_path / "backup", copy_function=os.link)
        with dbm_bitcask.open(path, "w") as other:
            db[b"acknowledged"] = b"1"
            assert other[b"acknowledged"] == b"1"
            other[b"key"] = b"2"
            assert db[b"key"] == b"2"
    with dbm_bitcask.open(path, "r") as reader:
        assert dict(reader) == {b"key": b"2", b"acknowledged": b"1"}
    with dbm_bitcask.open(tmp_path / "backup", "r") as backup:
        assert dict(backup) == {b"key": b"1"}


# Forks.


def test_child_that_can_open_no_lock_of_its_own_refuses_to_write_until_it_can(path):
    """Fork while no descriptor is free: the child shared the parent's lock, and wrote while the parent held it."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"1"
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free_again = [lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))]

        def child():
            assert db[b"key"] == b"1"
            with pytest.raises(dbm_bitcask.error, match="lock of its own"):
                db[b"child"] = b"1"
            free_again[0]()
            db[b"child"] = b"1"

        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            fork_and_wait(child)
        finally:
            free_again[0]()
        assert db[b"child"] == b"1"
        db[b"parent"] = b"1"
        assert dict(db) == {b"key": b"1", b"child": b"1", b"parent": b"1"}


def test_child_of_a_fork_within_a_refresh_of_another_thread_reads(path, monkeypatch):
    """Fork while another thread catches up with the keydir: the child inherited a mutex that nobody would ever release."""
    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path) as other:
        db[b"key"] = b"1"
        refreshing, go_on, refresh = threading.Event(), threading.Event(), keydir.Keydir.refresh

        def refresh_slowly(self):
            if threading.current_thread() is thread:
                refreshing.set()
                assert go_on.wait(60)
            refresh(self)

        def child():
            signal.alarm(20)  # kills it
            assert b"key" not in db

        thread = threading.Thread(target=lambda: db.get(b"key"))
        monkeypatch.setattr(keydir.Keydir, "refresh", refresh_slowly)
        other.clear()
        thread.start()
        try:
            assert refreshing.wait(20)
            fork_and_wait(child)
        finally:
            go_on.set()
            thread.join(20)
        assert not thread.is_alive()


# Walks and statistics.


def test_items_never_hands_out_a_value_that_was_overwritten_before_the_iteration_began(path):
    """Set a key twice, begin to iterate, set it a third time: items() handed out the first of the values."""
    with dbm_bitcask.open(path) as db:
        db.update({b"a": b"0", b"k": b"v1"})
        db[b"k"] = b"v2"
        items = iter(db.items())
        assert next(items) == (b"a", b"0")
        db[b"k"] = b"v3"
        assert list(items) in ([(b"k", b"v2")], [(b"k", b"v3")])


@pytest.mark.parametrize("view", ["items", "values"])
def test_iteration_that_runs_out_of_descriptors_is_an_error_of_the_module(path, monkeypatch, view):
    """No descriptor was free for the next segment: items() and values() raised a bare OSError, which `except error` does not catch."""
    with dbm_bitcask.open(path, **SMALL) as db:
        fill(db, 200)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with dbm_bitcask.open(path, "r") as reader:
        monkeypatch.setattr(segment, "open_segment", fail)
        with pytest.raises(dbm_bitcask.error) as caught:
            list(getattr(reader, view)())
        assert caught.value.errno == errno.EMFILE


def test_stats_are_of_one_moment_while_a_merge_takes_segments_away(path, monkeypatch):
    """Another handle merged while stats() added up, and another thread caught up with it: sums of two moments, or a KeyError."""
    with dbm_bitcask.open(path, **SMALL) as db, dbm_bitcask.open(path, "r") as reader:
        fill(db, 50)
        end_of, turns = log.Log.end_of, [1]

        def end_of_after_a_merge(self, entry):
            if turns and self is reader._log:
                turns.clear()
                fill(db, 50)
                db.merge()
                reader.get(b"k000")  # as another thread would
            return end_of(self, entry)

        monkeypatch.setattr(log.Log, "end_of", end_of_after_a_merge)
        assert reader.stats() == db.stats()
        assert not turns


# Failed syncs.


def test_what_a_failed_sync_left_in_doubt_is_written_anew_and_its_file_not_synced_again(path, monkeypatch):
    """The fsync of a rotation failed: the next open synced the same file again, which the kernel answers with an untrue success."""
    failed, synced, written = [], [], {}
    fdatasync, failing = files._fdatasync, [True]

    def sync(fd):
        (failed if failing else synced).append(os.fstat(fd).st_ino)
        if failing:
            fail(fd)
        fdatasync(fd)

    monkeypatch.setattr(files, "_fdatasync", sync)
    db = dbm_bitcask.open(path, **SMALL)

    def write():
        for number in range(100):
            db[b"k%d" % number] = b"v" * 100
            written[b"k%d" % number] = b"v" * 100

    with pytest.raises(dbm_bitcask.error):
        write()
    with suppress(dbm_bitcask.error):
        db.close()
    failing.clear()
    with dbm_bitcask.open(path, "w") as db:
        assert written.items() <= dict(db).items()
    assert failed
    assert synced
    assert not {*failed} & {*synced}


def test_sync_that_fails_while_another_handle_changes_the_keydir_stops_all_writing(path, monkeypatch):
    """It marked the keydir as poisoned within a split of another handle, which then unmarked it: later syncs said that all is well."""
    with dbm_bitcask.open(path) as db:
        swing = keydir.Keydir._swing
        other = dbm_bitcask.open(path)
        other[b"key"] = b"1"

        def swing_during_a_failed_sync(self):
            monkeypatch.setattr(keydir.Keydir, "_swing", swing)
            with monkeypatch.context() as patch:
                patch.setattr(files, "_fdatasync", fail)
                with pytest.raises(dbm_bitcask.error):
                    other.sync()
            swing(self)

        monkeypatch.setattr(keydir.Keydir, "_swing", swing_during_a_failed_sync)
        with pytest.raises(dbm_bitcask.error, match="an earlier sync failed"):
            for number in range(300):
                db[b"k%d" % number] = b"v"
        for handle in (db, other):
            with pytest.raises(dbm_bitcask.error, match="an earlier sync failed"):
                handle.sync()
            with pytest.raises(dbm_bitcask.error, match="an earlier sync failed"):
                handle.close()
    with dbm_bitcask.open(path, "w") as db:
        assert db[b"key"] == b"1"
        db[b"new"] = b"1"


def test_key_whose_page_was_split_and_used_again_within_a_search_is_found(path, monkeypatch):
    """The search was right, and then the location was read from a page that held other keys by then: a key that was there was missing."""
    search, searches = page.probe, []

    def search_slowly(table, hashed):
        found = search(table, hashed)
        if not searches:
            searches.append(found)
            split = used_again = False
            numbers = itertools.count(FULL)
            while not used_again:
                other[b"%d" % next(numbers)] = b"v"
                in_use = found.page in other._log.keydir.pages()
                split, used_again = split or not in_use, split and in_use
        return found

    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path) as other:
        for number in range(FULL):
            db[b"%d" % number] = b"v"
        epoch, [first] = db._log.epoch, list(db._log.keydir.pages())
        location = db._log.find(b"7")
        with monkeypatch.context() as patch:
            patch.setattr(page, "probe", search_slowly)
            assert db._log.find(b"7") == location
        assert searches[0].page == first
        assert first in db._log.keydir.pages()
        assert db._log.epoch == epoch
