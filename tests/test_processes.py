"""Several processes, threads and forks on one database: what has no file of its own yet."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import pickle
import signal
import threading

import pytest

import dbm_bitcask
from children import fork, fork_and_wait, put_and_close
from dbm_bitcask.engine import files, keydir, log, lookup, page, recovery, segment, write
from dbm_bitcask.engine import header as at


def wait_for(pid):
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_set_of_one_process_is_seen_by_the_next_get_of_another(path):
    with dbm_bitcask.open(path, segment_size=4096) as db, dbm_bitcask.open(path, "r") as reader:
        for number in range(200):
            fork_and_wait(lambda number=number: dbm_bitcask.open(path, "w", segment_size=4096).update({b"key": b"%d" % number}))
            assert db[b"key"] == reader[b"key"] == b"%d" % number
            if number % 50 == 0:
                db.reorganize()


def test_parent_and_child_go_on_with_the_same_handle(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        db[b"before"] = b"1"

        def child():
            for number in range(300):
                db[b"child %d" % number] = b"c" * 50
            db.close()

        pid = fork(child)
        for number in range(300):
            db[b"parent %d" % number] = b"p" * 50
        wait_for(pid)
        assert len(db) == 601
        assert db[b"child 299"] == b"c" * 50


def test_threads_share_one_handle(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        failures = []

        def work(name):
            try:
                for number in range(200):
                    db[b"%d %d" % (name, number)] = b"v" * 40
                    assert db[b"%d %d" % (name, number)] == b"v" * 40
            except BaseException as failure:  # noqa: BLE001  (of a thread: for the main one to show)
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(db) == 1600


@pytest.mark.parametrize("flag", ["w", "c", "n"])
def test_pickled_handle_opens_the_database_again_and_does_not_wipe_it(path, flag):
    dbm_bitcask.open(path, "c").close()
    with dbm_bitcask.open(path, flag, sync="always", segment_size=4096) as db:
        db[b"key"] = b"value"
        with pickle.loads(pickle.dumps(db)) as other:
            assert other[b"key"] == b"value"
            other[b"other"] = b"1"
        assert db[b"other"] == b"1"


def test_pickled_reader_stays_a_reader(path):
    dbm_bitcask.open(path, "c").close()
    with dbm_bitcask.open(path, "r") as db, pickle.loads(pickle.dumps(db)) as other, pytest.raises(dbm_bitcask.error):
        other[b"key"] = b"value"


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_handle_is_handed_to_processes_of_each_kind(path, method):
    context = multiprocessing.get_context(method)
    with dbm_bitcask.open(path) as db:
        processes = [context.Process(target=put_and_close, args=(db, b"%d" % number)) for number in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(db) == [b"0", b"1", b"2"]


def test_lock_that_is_held_for_too_long_is_a_timeout_that_names_the_holder(path):
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        holding, go_on = os.pipe(), os.pipe()

        def hold():
            with dbm_bitcask.open(path, "w") as other:
                other[b"mine"] = b"1"

                def wait():
                    os.write(holding[1], b".")
                    os.read(go_on[0], 1)

                other._log.lock.run(wait)

        pid = fork(hold)
        os.read(holding[0], 1)
        with pytest.raises(dbm_bitcask.LockTimeout, match=f"process {pid}") as failure:
            dbm_bitcask.open(path, "w", timeout=0.05)
        assert isinstance(failure.value, TimeoutError)
        assert str(path) in str(failure.value)
        assert db[b"key"] == b"value"
        os.write(go_on[1], b".")
        wait_for(pid)
        with dbm_bitcask.open(path, "w", timeout=5) as late:
            late[b"late"] = b"1"
        for pipe in (*holding, *go_on):
            os.close(pipe)


def test_thread_that_waits_for_another_times_out(path):
    with dbm_bitcask.open(path, timeout=0.05) as db:
        holding, go_on = threading.Event(), threading.Event()
        thread = threading.Thread(target=db._log.lock.run, args=(lambda: (holding.set(), go_on.wait(10)),))
        thread.start()
        holding.wait(10)
        with pytest.raises(dbm_bitcask.LockTimeout):
            db[b"key"] = b"value"
        go_on.set()
        thread.join()
        db[b"key"] = b"value"


def test_use_inside_an_operation_is_an_error_and_no_deadlock(path):
    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path) as other:
        with pytest.raises(dbm_bitcask.error, match="inside"):
            db._log.lock.run(other.__setitem__, b"key", b"value")
        other[b"key"] = b"value"


def is_synced(db):
    return db._log.keydir.words[at.SYNCED_TO] == db._log.keydir.counter(at.TAIL)


def wait_until(condition):
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return True
        pause.wait(0.01)
    return False


def test_thread_syncs_what_any_process_wrote(path):
    with dbm_bitcask.open(path, sync=0.02) as db:
        db[b"key"] = b"value"
        assert wait_until(lambda: is_synced(db))
        fork_and_wait(lambda: dbm_bitcask.open(path, "w").update({b"of a process that dies": b"1"}))
        assert wait_until(lambda: is_synced(db))


def test_thread_starts_again_in_a_child(path):
    with dbm_bitcask.open(path, sync=0.02) as db:
        db[b"key"] = b"value"

        def child():
            db[b"child"] = b"1"
            assert wait_until(lambda: is_synced(db))

        fork_and_wait(child)


@pytest.mark.parametrize("sync", [0, -1, float("nan"), float("inf"), True, "sometimes", None])
def test_sync_that_is_no_time_is_a_value_error(path, sync):
    with pytest.raises(ValueError, match="sync"):
        dbm_bitcask.open(path, sync=sync)


def test_with_suffix_u_no_lock_is_taken(path):
    with dbm_bitcask.open(path) as db, dbm_bitcask.open(path, "wu") as alone:
        db._log.lock.run(alone.__setitem__, b"key", b"value")
        assert db[b"key"] == b"value"


def test_reader_with_an_index_of_its_own_goes_over_to_the_shared_one(path):
    with dbm_bitcask.open(path) as db:
        db.update({b"%d" % number: b"v" for number in range(100)})
    (path / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(path, "r") as reader:
        assert reader[b"5"] == b"v"
        with dbm_bitcask.open(path, "w") as db:
            db[b"new"] = b"1"
            assert reader[b"new"] == b"1"
            assert len(reader) == len(list(reader)) == 101


def test_child_of_a_fork_within_a_close_closes_without_waiting(path):
    """A fork while the parent's thread held the mutex of the event by which a close ends it: the child waited for ever."""
    with dbm_bitcask.open(path, sync=60) as db:
        db[b"key"] = b"value"

        def close():
            signal.alarm(20)  # kills it
            db.close()

        with db._store.syncer._ticker.stopped._cond:
            fork_and_wait(close)


def test_reader_opens_beside_a_writer_that_makes_everything_new(path, monkeypatch):
    """The segment that the manifest listed was gone when the reader came to open it, and that was a FileNotFoundError."""
    opened = segment.open_segment
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"

        def clear_first(directory, entry, *, write=False):
            if not write and len(cleared) < 5:
                cleared.append(entry)
                db.clear()
                db[b"new"] = b"%d" % len(cleared)
            return opened(directory, entry, write=write)

        cleared = []
        monkeypatch.setattr(segment, "open_segment", clear_first)
        with dbm_bitcask.open(path, "r") as reader:
            assert dict(reader) == {b"new": b"5"}


def test_listed_segment_that_stays_away_is_an_error_when_a_reader_opens(path):
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
    segment_file = path / "00000001.data"
    kept = segment_file.rename(path.parent / "kept")
    with pytest.raises(dbm_bitcask.error, match=r"00000001\.data"):
        dbm_bitcask.open(path, "r")
    kept.rename(segment_file)


def test_reader_that_built_an_index_of_its_own_beside_a_writer_sees_what_is_set_without_a_rotation(path, monkeypatch):
    """It looked at keydir and manifest before it read them, and those do not change with a plain set."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"1"
        with monkeypatch.context() as patch:
            patch.setattr(recovery, "take_keydir", lambda _: False)
            reader = dbm_bitcask.open(path, "r")
            db[b"key"] = b"2"
            assert reader[b"key"] == b"2"
        db[b"new"] = b"3"
        assert reader[b"new"] == b"3"
        assert reader._log.beside is None
        reader.close()


def test_readers_agree_on_a_write_that_died_whatever_index_they_came_to(path, monkeypatch):
    """One built its own just before a keydir came that could be trusted, showed the unfinished write, and never looked at the other."""
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
    turns, take = [], recovery.take_keydir

    def die_before_the_slot():
        monkeypatch.setattr(recovery, "take_keydir", take)
        db = dbm_bitcask.open(path, "w")
        monkeypatch.setattr(write, "put_new", lambda *_: False)
        monkeypatch.setattr(write, "publish", lambda *_, **__: os._exit(0))
        db[b"unfinished"] = b"value"

    def find_none_that_can_be_trusted(_):
        turns.append(1)
        if len(turns) == 3:
            (path / "keydir").unlink(missing_ok=True)
            fork_and_wait(die_before_the_slot)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "take_keydir", find_none_that_can_be_trusted)
        first = dbm_bitcask.open(path, "r")
    with dbm_bitcask.open(path, "r") as second:
        assert first.get(b"unfinished") == second.get(b"unfinished")
        assert len(first) == len(second)
    first.close()


def test_processes_that_wait_for_the_disk_at_the_same_time_share_one_sync(path, monkeypatch):
    syncs = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    syncing = files._fdatasync

    def sync(fd):
        syncs[0] += 1
        syncing(fd)

    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        db.sync()

        def put(number):
            with dbm_bitcask.open(path, "w", sync="always") as other:
                monkeypatch.setattr(files, "_fdatasync", sync)
                other[b"%d" % number] = b"value"
                monkeypatch.undo()

        queue = db._log.keydir.file
        queue.lock()
        children = [fork(lambda number=number: put(number)) for number in range(4)]
        assert wait_until(lambda: len(db) == 5)
        queue.unlock()
        for pid in children:
            wait_for(pid)
        assert syncs[0] == 1


def test_sync_does_not_wait_longer_for_another_process_than_for_the_lock(path):
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
        db.sync()

        def put():
            signal.alarm(20)  # kills it
            with dbm_bitcask.open(path, "w", sync="always", timeout=0.05) as other:
                other[b"other"] = b"value"
                assert is_synced(other)

        db._log.keydir.file.lock()
        fork_and_wait(put)


def test_deadlock_that_the_kernel_sees_in_the_queue_is_no_failure(path, monkeypatch):
    def lock(_):
        raise OSError(errno.EDEADLK, "as with two databases and two threads of two processes")

    with dbm_bitcask.open(path, sync="always") as db:
        monkeypatch.setattr(files.File, "lock", lock)
        db[b"key"] = b"value"
        assert is_synced(db)


def test_write_that_waited_for_a_sync_that_failed_is_not_acknowledged(path, monkeypatch):
    """The kernel tells of a failed sync once, and to whoever comes next that all is well."""
    with dbm_bitcask.open(path, sync="always") as db:
        with monkeypatch.context() as patch:
            patch.setattr(files.File, "lock", lambda _: db._log.keydir.words.__setitem__(at.POISON, 1))
            with pytest.raises(dbm_bitcask.error, match="sync failed"):
                db[b"key"] = b"value"
        with pytest.raises(dbm_bitcask.error, match="sync failed"):
            db[b"key"] = b"value"
        with dbm_bitcask.open(path, "w") as healed:
            assert healed[b"key"] == b"value"


def test_fences_change_nothing(path, monkeypatch):
    """What runs where a processor does not keep loads and stores in order runs here, too."""
    fences = []
    for module in (keydir, log.files, lookup, page, write):
        monkeypatch.setattr(module, "fence", lambda: (fences.append(1), files._fence()))
    with dbm_bitcask.open(path, segment_size=4096) as db:
        for number in range(1000):
            db[b"%d" % number] = b"v"
        written = len(fences)
        db.update({b"%d" % number: b"v" for number in range(500, 1500)})
        assert len(fences) > written
        assert len(db) == 1500
        assert db.get(b"no such key") is None
        assert len(fences) > written
        db.clear()
        assert len(db) == 0
    assert written >= 2000


def test_threads_walk_with_nextkey_at_the_same_time(path):
    """They shared one cursor, and met each other in the middle of its generator."""
    with dbm_bitcask.open(path) as db:
        keys = {b"%d" % number for number in range(500)}
        db.update(dict.fromkeys(keys, b"v"))
        walks, barrier = [], threading.Barrier(4)

        def walk():
            barrier.wait()
            met, key = [], db.firstkey()
            while key is not None:
                met.append(key)
                key = db.nextkey(key)
            walks.append(met)

        threads = [threading.Thread(target=walk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [sorted(met) for met in walks] == [sorted(keys)] * 4


def test_timeout_names_no_process_that_is_dead(path):
    """The last one to write left its name, and whoever has the lock since, to open a large database, has not come to write its own."""
    dbm_bitcask.open(path).close()
    fork_and_wait(lambda: dbm_bitcask.open(path, "w").update({b"key": b"value"}))
    with dbm_bitcask.open(path, "r") as reader:
        directory = files.Directory(str(path))
        directory.lock()
        with pytest.raises(dbm_bitcask.LockTimeout, match="another process has it"):
            dbm_bitcask.open(path, "w", timeout=0.01)
        directory.unlock()
        assert reader[b"key"] == b"value"
