"""The portable layer: what it has of its own, on a file system that is made up, and beside the native layer on a real one."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import stat
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyfakefs.fake_filesystem_unittest import Patcher

import dbm_bitcask
from children import fork, fork_and_wait, run_python
from dbm_bitcask.engine import files, header, portable, recovery
from dbm_bitcask.engine.check import check
from native_only import NATIVE_ONLY

KEYS = {b"key %d" % number: b"value %d" % number * 5 for number in range(300)}
SMALL = {"files": "portable", "segment_size": 4096}


def fill(path, **options):
    with dbm_bitcask.open(path, **{**SMALL, **options}) as db:
        db.update(KEYS)


def read(path, **options):
    with dbm_bitcask.open(path, "r", **options) as db:
        assert len(db) == len(db.keys())
        return dict(db)


# On a file system that is made up: nothing here reaches a real file, or it would not be found.


@pytest.fixture
def made_up():
    with Patcher() as patcher:
        yield patcher.fs
        gc.collect()  # a descriptor that is closed later would be a real one


PLACE = Path("/made/up")


@pytest.fixture
def inside(made_up):
    made_up.create_dir(PLACE)
    return PLACE / "db"


def test_database_lives_on_a_made_up_file_system(inside):
    fill(inside)
    assert read(inside, files="portable") == KEYS
    with dbm_bitcask.open(inside, **SMALL) as db:
        del db[b"key 1"]
        db.merge()
        assert len(db) == len(KEYS) - 1
        db.clear()
    assert read(inside, files="portable") == {}
    assert dbm_bitcask.open(inside, "n", files="portable").keys() == []


def test_no_file_named_keydir_is_made(inside):
    fill(inside)
    assert not [name for name in inside.iterdir() if name.name.startswith("keydir")]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_mode_is_that_of_each_new_file(path, mode):
    """On a real disk: the fake opens a file that exists with the mode of a new one."""
    before = os.umask(0o022)
    try:
        fill(path, mode=mode)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode & ~0o022}
    assert stat.S_IMODE(path.stat().st_mode) == (mode | (mode & 0o444) >> 2) & ~0o022


@pytest.mark.parametrize("flag", ["r", "w"])
def test_missing_directory_is_no_database(inside, flag):
    with pytest.raises(FileNotFoundError) as missing:
        dbm_bitcask.open(inside, flag, files="portable")
    assert isinstance(missing.value, dbm_bitcask.error)
    assert list(PLACE.iterdir()) == []


def test_missing_parent_is_named(inside):
    with pytest.raises(dbm_bitcask.error, match="does not exist") as missing:
        dbm_bitcask.open(inside / "deeper", "c", files="portable")
    assert missing.value.filename == str(inside / "deeper")


def test_file_in_the_place_of_a_database_is_refused(inside):
    inside.write_bytes(b"foreign")
    for flag in "rwcn":
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(inside, flag, files="portable")
    assert inside.read_bytes() == b"foreign"


def test_foreign_directory_is_refused_and_left_as_it_is(inside):
    inside.mkdir()
    (inside / "letter.txt").write_bytes(b"dear")
    for flag in "rwcn":
        with pytest.raises(dbm_bitcask.error):
            dbm_bitcask.open(inside, flag, files="portable")
    assert [file.name for file in inside.iterdir()] == ["letter.txt"]


def test_foreign_files_in_a_database_are_never_touched(inside):
    fill(inside)
    foreign = ["1.data", "00000001.data.bak", "٠٠٠٠٠٠٠١.data", "keydir.tmp", "MANIFEST.old", "notes"]  # noqa: RUF001  (other digits)
    for name in foreign:
        (inside / name).write_bytes(b"foreign")
    with dbm_bitcask.open(inside, **SMALL) as db:
        db.update(KEYS)
        db.merge()
        db.clear()
    assert [name for name in foreign if (inside / name).read_bytes() != b"foreign"] == []


@pytest.mark.parametrize(("name", "flags"), [("MANIFEST", "rwn"), ("00000001.data", "rw")])
def test_symbolic_link_in_the_place_of_a_file_is_an_error_and_not_followed(inside, name, flags):
    fill(inside)
    elsewhere = PLACE / "elsewhere"
    elsewhere.write_bytes((inside / name).read_bytes())
    before = elsewhere.read_bytes()
    (inside / name).unlink()
    (inside / name).symlink_to(elsewhere)
    for flag in flags:
        with pytest.raises(dbm_bitcask.error, match="not a regular file"):
            dbm_bitcask.open(inside, flag, files="portable")[b"key 1"]
    assert elsewhere.read_bytes() == before


def test_path_may_be_a_symbolic_link(inside):
    fill(inside)
    (PLACE / "link").symlink_to(inside)
    assert read(PLACE / "link", files="portable") == KEYS


def test_full_disk_is_an_error_and_nothing_acknowledged_is_lost(inside, made_up):
    made_up.set_disk_usage(100_000, str(PLACE))
    written = {}
    with dbm_bitcask.open(inside, **SMALL) as db:
        with pytest.raises(dbm_bitcask.error) as full:
            for number in range(10_000):
                db[b"key %d" % number] = b"v" * 100
                written[b"key %d" % number] = b"v" * 100
        assert full.value.errno == errno.ENOSPC
        made_up.set_disk_usage(10_000_000, str(PLACE))  # now, for the fake tries a failed write again with whatever comes next
        unsure = {b"key %d" % len(written): b"v" * 100}
        assert dict(db) in (written, {**written, **unsure})
        db[b"more"] = b"1"
    assert len(written) > 100
    assert {**read(inside, files="portable"), **unsure} == {**written, **unsure, b"more": b"1"}


def test_full_disk_at_the_creation_leaves_something_that_is_created_later(inside, made_up):
    made_up.set_disk_usage(10, str(PLACE))
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(inside, files="portable")
    made_up.set_disk_usage(10_000_000, str(PLACE))
    fill(inside)
    assert read(inside, files="portable") == KEYS


def test_read_only_directory_can_be_read(inside):
    fill(inside)
    for file in [*inside.iterdir(), inside]:
        file.chmod(file.stat().st_mode & ~0o222)
    before = {file.name: file.read_bytes() for file in inside.iterdir()}
    assert read(inside, files="portable") == KEYS
    assert {file.name: file.read_bytes() for file in inside.iterdir()} == before


# Beside the native layer, on a real disk.


def test_both_layers_read_what_the_other_wrote(path):
    fill(path)
    assert read(path, files="native") == KEYS
    with dbm_bitcask.open(path, files="native") as db:
        del db[b"key 1"]
        db[b"key 2"] = b"native"
    fill_again = {**KEYS, b"key 2": b"native"}
    del fill_again[b"key 1"]
    assert read(path, files="portable") == fill_again
    with dbm_bitcask.open(path, **SMALL) as db:
        db[b"key 2"] = b"portable"
        db[b"key 1"] = b"back"
    assert read(path, files="native") == {**fill_again, b"key 1": b"back", b"key 2": b"portable"}


def test_native_index_is_not_believed_after_the_portable_layer_wrote(path):
    """The state in which it is believed most: nobody closed, so that every word of it says that it may be taken."""

    def die():
        db = dbm_bitcask.open(path, files="native")
        db.update(KEYS)
        os._exit(0)

    fork_and_wait(die)
    with dbm_bitcask.open(path, files="portable") as db:
        assert not (path / "keydir").exists()
        db[b"key 1"] = b"changed"
        del db[b"key 2"]
    found = read(path, files="native")
    assert found[b"key 1"] == b"changed"
    assert b"key 2" not in found


def test_live_reader_of_the_native_layer_sees_what_the_portable_one_writes(path):
    fill(path, files="native")
    script = """
import sys, dbm_bitcask
with dbm_bitcask.open(sys.argv[1], files="portable") as db:
    db["key 1"] = "changed"
    del db["key 2"]
"""
    with dbm_bitcask.open(path, "r", files="native") as reader, dbm_bitcask.open(path, "w", files="native") as writer:
        assert reader[b"key 1"] == KEYS[b"key 1"]
        run_python(script, path)
        for db in (reader, writer):
            assert db[b"key 1"] == b"changed"
            assert b"key 2" not in db
            assert len(db) == len(KEYS) - 1
        writer[b"key 3"] = b"written after it"
        assert reader[b"key 3"] == b"written after it"


def test_reader_of_the_portable_layer_sees_what_another_process_writes(path):
    fill(path)
    with dbm_bitcask.open(path, "r", files="portable") as reader:
        assert reader[b"key 1"] == KEYS[b"key 1"]
        run_python('import sys, dbm_bitcask\nwith dbm_bitcask.open(sys.argv[1]) as db: db["key 1"] = "changed"; db.merge()', path)
        assert reader[b"key 1"] == b"changed"


@pytest.mark.parametrize("layer", ["native", "portable"])
def test_another_process_waits_as_long_as_a_writer_has_it_open(path, layer):
    fill(path)
    script = f"""
import sys, dbm_bitcask
try:
    dbm_bitcask.open(sys.argv[1], "w", files={layer!r}, timeout=0.2)["key"] = "1"
except dbm_bitcask.LockTimeout:
    print("locked")
"""
    with dbm_bitcask.open(path, files="portable"):
        assert run_python(script, path).strip() == "locked"
    assert run_python(script, path).strip() == ""


def test_handles_of_one_process_share_their_changes(path):
    with dbm_bitcask.open(path, **SMALL) as one, dbm_bitcask.open(path, **SMALL) as other:
        for number in range(3000):  # the index is replaced by a larger one several times
            (one, other)[number % 2][b"%d" % number] = b"v%d" % number
            assert (other, one)[number % 2][b"%d" % number] == b"v%d" % number
        assert len(one) == len(other) == 3000
        with dbm_bitcask.open(path, "r", files="portable") as reader:
            del one[b"7"]
            assert b"7" not in reader
            one.merge()
            assert len(reader) == len(reader.keys()) == 2999
            other.clear()
            assert len(reader) == len(one) == 0


def test_iteration_beside_a_merge_sees_every_key_once(path):
    fill(path)
    with dbm_bitcask.open(path, **SMALL) as db:
        seen = []
        for key in db:
            seen.append(key)
            if len(seen) in (10, 100, 200):
                db.update(KEYS)
                db.merge()
        assert sorted(seen) == sorted(KEYS)


def test_layers_do_not_mix_in_one_process(path):
    with dbm_bitcask.open(path, files="portable"), pytest.raises(dbm_bitcask.error, match='files="portable"'):
        dbm_bitcask.open(path, "r", files="native")
    with dbm_bitcask.open(path, files="native"), pytest.raises(dbm_bitcask.error, match='files="native"'):
        dbm_bitcask.open(path, files="portable")


def test_lock_goes_with_the_last_handle(path):
    one = dbm_bitcask.open(path, files="portable")
    other = dbm_bitcask.open(path, files="portable")
    one.close()
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(path, files="native")
    other.close()
    dbm_bitcask.open(path, files="native").close()


def test_forked_handle_is_closed_in_the_child_and_open_in_the_parent(path):
    with dbm_bitcask.open(path, files="portable") as db:
        db[b"key"] = b"1"

        def child():
            for use in (lambda: db[b"key"], lambda: len(db), lambda: db.update(a=b"1"), lambda: list(db)):
                with pytest.raises(dbm_bitcask.error, match="fork"):
                    use()
            db.close()
            with pytest.raises(dbm_bitcask.LockTimeout):
                dbm_bitcask.open(path, files="portable", timeout=0.1)

        fork_and_wait(child)
        db[b"key"] = b"2"
    assert read(path, files="portable") == {b"key": b"2"}


def test_without_native_layer_it_cannot_be_asked_for(path, monkeypatch):
    monkeypatch.setattr(files, "NATIVE", False)
    with pytest.raises(dbm_bitcask.error, match="files="):
        dbm_bitcask.open(path, files="native")
    assert not path.exists()


@pytest.mark.parametrize("wrong", ["", "mmap", None, 1])
def test_unknown_layer_is_a_value_error(path, wrong):
    with pytest.raises(ValueError, match="files must be"):
        dbm_bitcask.open(path, files=wrong)
    assert not path.exists()


def test_memory_that_is_shared_does_not_move(path):
    """A keydir that moved under another handle would be two keydirs."""
    with dbm_bitcask.open(path, **SMALL) as db:
        before = db._log.keydir
        view, epoch = before.words, before.words[header.EPOCH]
        number = 0
        while db._log.keydir is before:
            db[b"%d" % number] = b""
            number += 1
        assert view[header.STATE] == header.MOVED
        assert view[header.EPOCH] > epoch
        assert len(db) == number


class Msvcrt(types.SimpleNamespace):
    """The lock of Windows: of a byte of a file, and without waiting."""

    LK_NBLCK = 2

    def __init__(self):
        self.locked = []
        self.free = True

    def locking(self, fd, how, length):
        assert (how, length) == (self.LK_NBLCK, 1)
        if not self.free:
            raise PermissionError(errno.EACCES, "locked")
        self.locked.append(str(Path(f"/proc/self/fd/{fd}").readlink()))


@pytest.fixture
def windows(monkeypatch):
    system = Msvcrt()
    monkeypatch.setattr(portable, "fcntl", None)
    monkeypatch.setattr(portable, "msvcrt", system)
    return system


def test_where_a_directory_cannot_be_locked_a_file_in_it_is(path, windows):
    fill(path)
    assert windows.locked == [str(path / "lock")]
    assert read(path, files="portable") == KEYS
    assert windows.locked == [str(path / "lock")]  # a reader needs none
    windows.free = False
    with pytest.raises(dbm_bitcask.LockTimeout):
        dbm_bitcask.open(path, files="portable", timeout=0.05)
    gc.collect()  # what the exception holds has the layer in use


def test_where_a_directory_cannot_be_locked_nothing_is_made_in_a_foreign_one(path, windows):
    path.mkdir()
    (path / "letter.txt").write_bytes(b"dear")
    with pytest.raises(dbm_bitcask.error, match="not a database"):
        dbm_bitcask.open(path, files="portable")
    assert [file.name for file in path.iterdir()] == ["letter.txt"]
    assert windows.locked == []


def test_copy_of_a_database_is_one(path, tmp_path):
    fill(path)
    shutil.copytree(path, tmp_path / "copy")
    assert read(tmp_path / "copy", files="portable") == KEYS
    assert check(tmp_path / "copy") == []


def test_what_is_left_out_on_this_layer_is_there():
    tests = Path(__file__).parent
    gone = []
    for name in NATIVE_ONLY:
        module, _, test = name.partition("::")
        text = (tests / f"{module}.py").read_text(encoding="utf-8") if (tests / f"{module}.py").exists() else ""
        if not text or (test and f"def {test}(" not in text):
            gone.append(name)
    assert gone == []


def test_files_are_opened_without_following_links_and_made_new(path, monkeypatch):
    opened, open_file = [], os.open

    def spy(name, flags, mode=0o777, *, dir_fd=None):
        opened.append((Path(name), flags))
        return open_file(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", spy)
    fill(path)
    read(path, files="portable")
    flags_of = [(name.name, flags) for name, flags in opened if name.parent == path]
    assert {name for name, _ in flags_of} >= {"MANIFEST", "00000001.data"}
    for name, flags in flags_of:
        assert flags & (os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK) == os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, name
        assert bool(flags & os.O_CREAT) == bool(flags & os.O_EXCL), name
        assert not flags & os.O_TRUNC, name


# What a review found.


def test_live_handles_of_the_native_layer_are_told_although_a_backup_shares_the_files(path, tmp_path):
    with dbm_bitcask.open(path, files="native") as writer, dbm_bitcask.open(path, "r", files="native") as reader:
        writer[b"key"] = b"old"
        assert reader[b"key"] == b"old"
        (tmp_path / "links").mkdir()
        for file in path.glob("*.data"):
            os.link(file, tmp_path / "links" / file.name)
        run_python(WRITE, path, "new")
        assert reader[b"key"] == writer[b"key"] == b"new"
        writer[b"more"] = b"1"
    assert read(path) == {b"key": b"new", b"more": b"1"}


WRITE = "import sys, dbm_bitcask\nwith dbm_bitcask.open(sys.argv[1], files='portable') as db: db['key'] = sys.argv[2]"


@pytest.mark.parametrize("layer", ["native", "portable"])
def test_threads_of_a_reader_with_an_own_index_agree_on_the_newest(path, layer, monkeypatch):
    """One builds slowly, and another one newer: the older must not be what stays."""
    with dbm_bitcask.open(path, files="portable") as db:
        db[b"key"] = b"0"
    build, slow, go_on = recovery._build, threading.Event(), threading.Event()

    def slowly(*args, **options):
        built = build(*args, **options)
        slow.set()
        assert go_on.wait(30)
        return built

    with dbm_bitcask.open(path, "r", files=layer) as reader:
        assert reader[b"key"] == b"0"
        monkeypatch.setattr(recovery, "_build", slowly)
        run_python(WRITE, path, 1)
        with ThreadPoolExecutor(2) as threads:
            older = threads.submit(reader.get, b"key")
            assert slow.wait(30)
            run_python(WRITE, path, 2)
            newer = threads.submit(reader.get, b"key")
            time.sleep(0.1)  # it should be waiting for the other by now; if it is not, the test is easier to pass
            go_on.set()
            assert older.result(30) in (b"1", b"2")
            assert newer.result(30) == b"2"
        assert reader[b"key"] == b"2"


MERGE = """
import sys, dbm_bitcask
with dbm_bitcask.open(sys.argv[1], segment_size=4096) as db:
    db.update(dict.fromkeys(db.keys(), b"m"))
    db.merge()
"""


def test_reader_beside_a_merge_of_another_process_is_told_of_no_damage(path, monkeypatch):
    fill(path)
    with dbm_bitcask.open(path, "r", files="portable") as reader:
        look, merged = reader._log.look_beside, []

        def look_and_then_merge():
            look()
            if not merged:
                merged.append(run_python(MERGE, path))

        monkeypatch.setattr(reader._log, "look_beside", look_and_then_merge)
        assert reader[b"key 1"] == b"m"
        merged.clear()
        assert dict(reader) == dict.fromkeys(KEYS, b"m")


FREE = "import sys, dbm_bitcask\ndbm_bitcask.open(sys.argv[1], files='native', timeout=1).close()"


def test_lock_goes_at_once(path, tmp_path):
    """Not when a collection finds what held it: an iterator that is kept, or an open that failed."""
    db = dbm_bitcask.open(path, **SMALL)
    db.update(KEYS)
    keys = iter(db)
    next(keys)
    db.close()
    run_python(FREE, path)
    with pytest.raises(dbm_bitcask.error):
        next(keys)
    gc.disable()
    try:
        (path / "MANIFEST").rename(tmp_path / "kept")
        for flag in "wcn":
            with pytest.raises(dbm_bitcask.CorruptionError):
                dbm_bitcask.open(path, flag, files="portable")
        (tmp_path / "kept").rename(path / "MANIFEST")
        run_python(FREE, path)
    finally:
        gc.enable()


def test_child_does_not_keep_the_lock_of_its_parent(path):
    db = dbm_bitcask.open(path, files="portable")
    ready, done = os.pipe(), os.pipe()

    def child():
        os.write(ready[1], b".")
        os.read(done[0], 1)

    pid = fork(child)
    os.read(ready[0], 1)
    db.close()
    run_python(FREE, path)
    os.write(done[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    for end in (*ready, *done):
        os.close(end)


@pytest.mark.parametrize("flag", ["r", "w"])
def test_segment_that_somebody_cuts_is_an_error_of_ours(path, flag):
    fill(path)
    with dbm_bitcask.open(path, flag, files="portable") as db:
        for hint in path.glob("*.hint"):
            hint.unlink()
        keys = iter(db)
        next(keys)
        for file in sorted(path.glob("*.data"))[1:-1]:
            os.truncate(file, 40)
        with pytest.raises(dbm_bitcask.error):
            list(keys)
    shutil.rmtree(path)


def test_database_that_takes_the_path_of_another_is_read_as_it_is(path, tmp_path):
    fill(path)
    with dbm_bitcask.open(tmp_path / "other", files="native", segment_size=4096) as other:
        other.update(dict.fromkeys(KEYS, b"other" * 9))
    with dbm_bitcask.open(path, "r", files="portable") as reader:
        assert dict(reader) == KEYS
        path.rename(tmp_path / "away")
        (tmp_path / "other").rename(path)
        assert {key: reader[key] for key in KEYS} == dict.fromkeys(KEYS, b"other" * 9)


def test_database_that_was_renamed_is_opened_by_its_new_path_while_a_handle_has_the_old_one(path, tmp_path):
    fill(path)
    with dbm_bitcask.open(path, "r", files="portable") as reader:
        reader[b"key 1"]
        path.rename(tmp_path / "moved")
        with dbm_bitcask.open(tmp_path / "moved", **SMALL) as db:
            db[b"key 1"] = b"new"
        assert read(tmp_path / "moved", files="portable") == {**KEYS, b"key 1": b"new"}


def test_loop_of_popitem_reads_no_segment_as_a_whole_each_time(path, monkeypatch):
    items = {b"%d" % number: bytes(1000) for number in range(300)}
    with dbm_bitcask.open(path, files="portable") as db:
        db.update(items)
        sizes, read_file = [], portable.File.read
        monkeypatch.setattr(portable.File, "read", lambda self, length, offset: sizes.append(length) or read_file(self, length, offset))
        taken = dict(db.popitem() for _ in range(len(items)))
    assert taken == items
    assert len(sizes) > len(items)
    assert sum(size > 2**16 for size in sizes) < 10


def test_what_a_failed_sync_left_in_doubt_is_written_again_at_the_next_open(path, monkeypatch):
    def fail(_self):
        raise OSError(errno.EIO, "disk")

    with dbm_bitcask.open(path, files="portable") as db:
        db[b"synced"] = b"1"
    db = dbm_bitcask.open(path, files="portable")
    db[b"doubtful"] = b"2"
    with monkeypatch.context() as patch:
        patch.setattr(portable.File, "sync_contents", fail)
        with pytest.raises(dbm_bitcask.error):
            db.sync()
    with pytest.raises(dbm_bitcask.error):
        db[b"more"] = b"3"
    with pytest.raises(dbm_bitcask.error):
        db.close()
    before = {file.name: file.read_bytes() for file in path.glob("*.data")}
    assert sum(b"doubtful" in data for data in before.values()) == 1
    with dbm_bitcask.open(path, files="portable") as db:
        assert dict(db) == {b"synced": b"1", b"doubtful": b"2"}
        fresh = {file.name: file.read_bytes() for file in path.glob("*.data") if file.name not in before}
        assert any(b"doubtful" in data for data in fresh.values())


TAKE = "import fcntl, sys\nwith open(sys.argv[1], 'r+b') as file: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_network_file_system_is_locked_by_a_file_that_other_machines_see(path, monkeypatch):
    monkeypatch.setattr(files, "_remote_kind", lambda _device: "nfs4")
    with pytest.raises(dbm_bitcask.error, match="nfs4"):
        dbm_bitcask.open(path, files="native")
    shutil.rmtree(path)
    fill(path)
    lock = path / "lock"
    with dbm_bitcask.open(path, files="portable"):
        with pytest.raises(AssertionError, match="BlockingIOError"):
            run_python(TAKE, lock)
        assert read(path, files="portable") == KEYS
        with pytest.raises(AssertionError, match="BlockingIOError"):
            run_python(TAKE, lock)
    run_python(TAKE, lock)
