"""A reader where nothing may be written: a directory or file system that is read-only, for one who may not write.

It takes no lock and writes no byte. It shares the keydir if that can be trusted, and else builds one of its own outside of the database.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest

import dbm_bitcask
from children import fork, fork_and_wait, run_python
from dbm_bitcask.engine import files
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory

ITEMS = {b"key %d" % number: b"value %d" % number * 9 for number in range(200)}
TINY = {"segment_size": 4096}
NOBODY = 65534
NEW_NAMESPACE, READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


@pytest.fixture
def outside():
    """A directory that everybody may search; pytest's own are for nobody else."""
    outside = Path(tempfile.mkdtemp())
    outside.chmod(0o755)
    yield outside
    for directory in [outside, *filter(Path.is_dir, outside.iterdir())]:
        directory.chmod(0o755)
    shutil.rmtree(outside)


@pytest.fixture
def path(outside):
    """A database of several segments, with overwritten and deleted keys."""
    path = outside / "db"
    with dbm_bitcask.open(path, **TINY) as db:
        db.update(dict.fromkeys(ITEMS, b"old") | {b"gone": b"1"})
        db.update(ITEMS)
        del db[b"gone"]
    return path


def protect(path):
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)


def become_nobody():
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def mount_read_only(path):
    """Mount a directory onto itself, read-only, for this process alone; OSError if it may not."""
    system = ctypes.CDLL(None, use_errno=True)

    def call(function, *arguments):
        if function(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    name = os.fsencode(path)
    call(system.unshare, NEW_NAMESPACE)
    call(system.mount, b"none", b"/", None, RECURSIVE | PRIVATE, None)
    call(system.mount, name, name, None, BIND, None)
    call(system.mount, name, name, None, BIND | REMOUNT | READ_ONLY, None)
    assert os.statvfs(path).f_flag & os.ST_RDONLY


def in_protected_directory(path, work):
    protect(path)
    fork_and_wait(lambda: (become_nobody(), work()))


def on_read_only_mount(path, work):
    def try_to_mount():
        try:
            mount_read_only(path)
        except (OSError, AttributeError):
            os._exit(3)

    if os.waitstatus_to_exitcode(os.waitpid(fork(try_to_mount), 0)[1]) == 3:
        pytest.skip("this process may not mount anything")
    fork_and_wait(lambda: (mount_read_only(path), work()))


on_each = pytest.mark.parametrize("run", [in_protected_directory, on_read_only_mount], ids=["directory", "mount"])


def lose_nothing(path):
    assert (path / "keydir").exists()


def lose_keydir(path):
    (path / "keydir").unlink(missing_ok=True)


def damage_keydir(path):
    with (path / "keydir").open("r+b") as file:
        file.write(bytes(4096))


def lose_hints(path):
    lose_keydir(path)
    for file in path.glob("*.hint"):
        file.unlink()


LOSSES = [lose_keydir, damage_keydir, lose_hints]


def snapshot(path):
    """All that a writer could change: names, bytes, times and modes."""
    return {file.name: described(file) for file in path.iterdir()} | {".": described(path)}


def described(file):
    status = file.stat()
    return status.st_mtime_ns, status.st_mode, status.st_ino, status.st_size, file.read_bytes() if file.is_file() else b""


def require_unchanged(path, run, work):
    """Nothing in the directory changes by `work`, not even a time."""
    if run is in_protected_directory:
        protect(path)
    before = snapshot(path)
    run(path, work)
    assert snapshot(path) == before


def read_everything(path, *, shared):
    with dbm_bitcask.open(path, "r") as db:
        assert (db._log.beside is None) == shared
        assert {key: db[key] for key in ITEMS} == dict(db) == dict(db.items()) == ITEMS
        assert len(db) == db.stats().keys == len(ITEMS)
        assert b"key 1" in db
        assert b"gone" not in db
        assert db.get(b"gone") is None
        with pytest.raises(dbm_bitcask.error, match="reading only"):
            db[b"key 1"] = b"no"
        db.sync()
        assert (db._log.beside is None) == shared


@on_each
def test_everything_is_read_by_the_shared_keydir_and_nothing_is_changed(path, run):
    require_unchanged(path, run, lambda: read_everything(path, shared=True))


@on_each
@pytest.mark.parametrize("lose", LOSSES)
def test_everything_is_read_by_an_own_index_if_the_keydir_is_not_trusted_and_nothing_is_changed(path, run, lose):
    lose(path)
    require_unchanged(path, run, lambda: read_everything(path, shared=False))


@on_each
@pytest.mark.parametrize("flag", ["w", "c", "n"])
@pytest.mark.parametrize("lose", [lose_nothing, lose_keydir])
def test_open_for_writing_is_an_error_that_says_why_and_nothing_is_changed(path, run, lose, flag):
    lose(path)

    def work():
        with pytest.raises(dbm_bitcask.error, match=r"Permission denied|Read-only file system"):
            dbm_bitcask.open(path, flag)
        assert Directory(str(path)).try_lock()

    require_unchanged(path, run, work)


@on_each
@pytest.mark.parametrize("flag", ["w", "c", "n"])
def test_error_of_an_open_for_writing_names_the_path(path, run, flag):
    def work():
        with pytest.raises(dbm_bitcask.error, match=re.escape(str(path))):
            dbm_bitcask.open(path, flag)

    run(path, work)


@on_each
def test_check_and_whichdb_work(path, run):
    def work():
        assert check(path) == []
        assert dbm_bitcask.whichdb(path) == "dbm_bitcask"

    require_unchanged(path, run, work)


@on_each
def test_database_that_is_not_there_is_not_made(outside, run):
    empty = outside / "empty"
    empty.mkdir()

    def work():
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(empty / "db", "c")
        with pytest.raises(FileNotFoundError):
            dbm_bitcask.open(empty / "db", "r")
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(empty, "c")

    require_unchanged(empty, run, work)
    assert list(empty.iterdir()) == []


# Locks.


@on_each
@pytest.mark.parametrize("lose", [lose_nothing, lose_keydir])
def test_reader_does_not_wait_for_a_lock_that_another_process_holds(path, run, lose):
    lose(path)
    holder = Directory(str(path))
    assert holder.try_lock()

    def work():
        signal.alarm(30)  # kills it
        assert not Directory(str(path)).try_lock()
        read_everything(path, shared=lose is lose_nothing)

    run(path, work)
    holder.unlock()


@on_each
@pytest.mark.parametrize("lose", [lose_nothing, lose_keydir])
def test_reader_asks_for_no_lock_at_all(path, run, lose, monkeypatch):
    lose(path)

    def refuse(*_):
        raise AssertionError

    def work():
        for name in ("flock", "lockf"):
            monkeypatch.setattr(fcntl, name, refuse)
        read_everything(path, shared=lose is lose_nothing)

    run(path, work)


# Memory.


GROWTH = """
import re, sys
import dbm_bitcask

def anonymous_memory():
    with open("/proc/self/status", encoding="utf-8") as status:
        return int(re.search(r"RssAnon:\\s*(\\d+) kB", status.read())[1]) * 1024

with dbm_bitcask.open(sys.argv[1], "r") as db:
    assert db["key 1"] == b"v"
before = anonymous_memory()
with dbm_bitcask.open(sys.argv[2], "r") as db:
    assert db._log.beside is not None
    assert len(db) == sum(1 for _ in db) == int(sys.argv[3])
    print(anonymous_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("lose", [lose_keydir, lose_hints])
def test_own_index_takes_no_memory_per_key(outside, lose):
    """Which is a file without a name: its pages are not anonymous."""
    grown = {}
    for count in (2_000, 40_000):
        path = outside / str(count)
        with dbm_bitcask.open(path, segment_size=2**18) as db:
            db.update({b"key %d" % number: b"v" for number in range(count)})
        lose(path)
        protect(path)
        grown[count] = int(run_python(GROWTH, outside / "2000", path, count))
    assert grown[40_000] - grown[2_000] < 2**18  # 7 bytes a key would be as much


@on_each
def test_own_index_has_no_name(path, run, monkeypatch):
    lose_keydir(path)
    place = path.parent / "temporary"
    place.mkdir()
    place.chmod(0o777)

    def work():
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        with dbm_bitcask.open(path, "r") as db:
            assert db[b"key 1"] == ITEMS[b"key 1"]
            status = os.fstat(db._log.keydir.file.fd)
            assert (status.st_nlink, stat.S_ISREG(status.st_mode)) == (0, True)
            assert list(place.iterdir()) == []

    run(path, work)


# Beside a writer.


@on_each
@pytest.mark.parametrize("lose", [lose_nothing, lose_keydir])
def test_reader_sees_what_a_writer_elsewhere_does(path, run, lose):
    """The writer has its files open, or may write; the reader may not."""
    asking, answering = os.pipe(), os.pipe()

    def write():
        with dbm_bitcask.open(path, "w", segment_size=2**20) as db:
            os.write(answering[1], b".")
            while turn := os.read(asking[0], 1):
                db[b"turn"] = turn
                del db[b"key %d" % turn[0]]
                os.write(answering[1], b".")

    def read():
        with dbm_bitcask.open(path, "r") as db:
            for turn in range(10, 30):
                os.write(asking[1], bytes([turn]))
                os.read(answering[0], 1)
                assert db[b"turn"] == bytes([turn])
                assert b"key %d" % turn not in db
                assert len(db) == len(list(db)) == len(ITEMS) + 1 - (turn - 9)
            assert db._log.beside is None

    lose(path)
    writer = fork(lambda: (os.close(asking[1]), write()))
    os.read(answering[0], 1)
    run(path, read)
    for end in (asking[1], asking[0], *answering):
        os.close(end)
    assert os.waitpid(writer, 0) == (writer, 0)
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    assert check(path) == []


def test_reader_with_an_own_index_goes_over_to_the_keydir_that_a_writer_makes(path):
    """Under the same rule of trust: while that does not hold it has its own, and from then on the shared one."""
    lose_keydir(path)
    asking, answering = os.pipe(), os.pipe()

    def read():
        become_nobody()
        with dbm_bitcask.open(path, "r") as db:
            assert db._log.beside is not None
            os.write(answering[1], b".")
            os.read(asking[0], 1)
            assert (db[b"new"], len(db)) == (b"1", len(ITEMS) + 1)
            assert db._log.beside is None

    reader = fork(read)
    os.read(answering[0], 1)
    with dbm_bitcask.open(path, "w") as db:
        db[b"new"] = b"1"
        os.write(asking[1], b".")
        assert os.waitpid(reader, 0) == (reader, 0)
    for end in (*asking, *answering):
        os.close(end)


def test_after_a_restart_of_the_machine_a_reader_trusts_no_keydir_that_may_not_be_durable(path, monkeypatch):
    monkeypatch.setattr(files, "boot_id", lambda: 4711)
    require_unchanged(path, in_protected_directory, lambda: read_everything(path, shared=False))
