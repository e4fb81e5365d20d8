"""Several processes, threads and forks on one database: what has no file of its own yet."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading

import pytest

import dbm_bitcask
from children import fork, fork_and_wait, put_and_close
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
    (path / "keydir").unlink()
    with dbm_bitcask.open(path, "r") as reader:
        assert reader[b"5"] == b"v"
        with dbm_bitcask.open(path, "w") as db:
            db[b"new"] = b"1"
            assert reader[b"new"] == b"1"
            assert len(reader) == len(list(reader)) == 101
