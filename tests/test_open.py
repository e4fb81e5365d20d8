"""`open` and `whichdb`: flags, paths, modes, what they create, what they leave alone."""

from __future__ import annotations

import dbm
import gc
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

import dbm_bitcask
from children import fork_and_wait, run_python
from dbm_bitcask.engine.check import check

ITEMS = {b"key %d" % i: b"value %d" % i * 5 for i in range(120)}


@pytest.fixture
def umask():
    """Sets the umask for the time of the test."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.fixture
def full(path):
    """The path of a closed database with `ITEMS` and some history, in several segments."""
    with dbm_bitcask.open(path, "n", segment_size=4096) as db:
        db.update(dict.fromkeys(ITEMS, b"first"))
        db.update(ITEMS)
        db[b"deleted"] = b""
        del db[b"deleted"]
    return path


def fingerprint(directory):
    """Everything that a write to a file or to the directory would change."""
    found = {}
    for file in [directory, *directory.rglob("*")]:
        status = file.lstat()
        contents = hashlib.sha256(file.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else None
        found[str(file)] = (
            status.st_ino,
            status.st_mode,
            status.st_nlink,
            status.st_mtime_ns,
            status.st_ctime_ns,
            contents,
        )
    return found


def fill_and_die(path, **options):
    """A process that opens the database, writes `ITEMS` and is gone without closing it."""

    def work():
        db = dbm_bitcask.open(path, "c", **options)
        db.update(ITEMS)
        assert len(db) == len(ITEMS)

    fork_and_wait(work)


# Flags


@pytest.mark.parametrize("flag", ["r", "w"])
def test_missing_database_is_error_and_file_not_found(path, flag):
    with pytest.raises(dbm_bitcask.error) as failure:
        dbm_bitcask.open(path, flag)
    assert isinstance(failure.value, FileNotFoundError)
    assert os.fsdecode(failure.value.filename) == str(path)
    assert not path.exists()


@pytest.mark.parametrize("flag", ["c", "n", "cf", "ns"])
def test_missing_database_is_created(path, flag):
    with dbm_bitcask.open(path, flag) as db:
        assert dict(db) == {}
        db[b"key"] = b"value"
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


def test_database_is_created_by_default(path):
    with dbm_bitcask.open(path) as db:
        db[b"key"] = b"value"
    with dbm_bitcask.open(path) as db:
        assert dict(db) == {b"key": b"value"}


@pytest.mark.parametrize("flag", ["r", "w", "c", "rf", "ws", "cs"])
def test_existing_database_keeps_its_contents(full, flag):
    with dbm_bitcask.open(full, flag) as db:
        assert dict(db) == ITEMS


@pytest.mark.parametrize("flag", ["w", "c", "n", "wf", "cs"])
def test_every_flag_but_r_writes(full, flag):
    with dbm_bitcask.open(full, flag) as db:
        db[b"new"] = b"value"
        assert db[b"new"] == b"value"
    with dbm_bitcask.open(full, "r") as db:
        assert db[b"new"] == b"value"


def test_n_empties_an_existing_database(full):
    with dbm_bitcask.open(full, "n") as db:
        assert len(db) == 0
        assert db.keys() == []
        assert b"key 1" not in db
    with dbm_bitcask.open(full, "r") as db:
        assert dict(db) == {}


def test_n_never_uses_the_name_of_a_segment_again(full):
    def segments():
        return {file.name for file in full.glob("*.data")}

    before = segments()
    for _ in range(3):
        dbm_bitcask.open(full, "n").close()
        assert not segments() & before
        before |= segments()


def test_other_handles_see_that_n_emptied_the_database(full):
    with dbm_bitcask.open(full, "r") as reader, dbm_bitcask.open(full, "w") as writer:
        assert reader[b"key 1"] == ITEMS[b"key 1"]
        with dbm_bitcask.open(full, "n") as new:
            assert len(reader) == len(writer) == 0
            assert b"key 1" not in reader
            writer[b"key 2"] = b"through the old handle"
            assert dict(new) == dict(reader) == {b"key 2": b"through the old handle"}


@pytest.mark.parametrize("flag", ["x", "rx", "", "rw", "R", "cx", "cfs", "cuu", " r", "rff", "f"])
def test_unknown_flag_is_error_and_value_error_and_creates_nothing(path, flag):
    with pytest.raises(dbm_bitcask.error) as failure:
        dbm_bitcask.open(path, flag)
    assert isinstance(failure.value, ValueError)
    assert str(failure.value) == f"Flag must be one of 'r', 'w', 'c', or 'n', not {flag!r}"
    assert not path.exists()


@pytest.mark.parametrize(
    ("flag", "sync"),
    [("cf", "always"), ("nf", "always"), ("rf", "always"), ("cf", 1.0), ("cs", 1.0)],
)
def test_suffix_that_contradicts_sync_is_a_value_error_and_creates_nothing(path, flag, sync):
    with pytest.raises(ValueError, match="sync"):
        dbm_bitcask.open(path, flag, sync=sync)
    assert not path.exists()


def test_both_suffixes_at_once_are_a_value_error(path):
    for flag in ("cfs", "csf"):
        with pytest.raises(ValueError, match=r"Flag|sync"):
            dbm_bitcask.open(path, flag)
    assert not path.exists()


@pytest.mark.parametrize(("flag", "sync"), [("cs", "always"), ("cf", "never"), ("c", "always"), ("c", "never")])
def test_suffix_that_agrees_with_sync_is_accepted(path, flag, sync):
    with dbm_bitcask.open(path, flag, sync=sync) as db:
        db[b"key"] = b"value"
        assert db[b"key"] == b"value"


@pytest.mark.parametrize("sync", ["sometimes", "", -1, float("nan"), b"never", None])
def test_unknown_sync_is_refused_and_creates_nothing(path, sync):
    with pytest.raises((ValueError, TypeError)):
        dbm_bitcask.open(path, "c", sync=sync)
    assert not path.exists()


@pytest.mark.parametrize("sync", [1e10, pytest.param(10**400, id="huge"), float("inf"), threading.TIMEOUT_MAX + 1])
def test_sync_after_more_seconds_than_a_thread_can_wait_is_a_value_error_and_creates_nothing(path, sync):
    with pytest.raises(ValueError, match="sync must be"):
        dbm_bitcask.open(path, "c", sync=sync)
    assert not path.exists()


@pytest.mark.parametrize("timeout", [-1, -0.1, float("nan"), float("-inf"), 1e10, 10**30, threading.TIMEOUT_MAX + 1])
def test_timeout_out_of_range_is_a_value_error_and_creates_nothing(path, timeout):
    with pytest.raises(ValueError, match="timeout must be"):
        dbm_bitcask.open(path, "c", timeout=timeout)
    assert not path.exists()


@pytest.mark.parametrize("timeout", [0, 0.5, None, float("inf"), threading.TIMEOUT_MAX])
def test_longest_timeout_and_sync_are_as_good_as_any(path, timeout):
    with dbm_bitcask.open(path, "c", timeout=timeout, sync=threading.TIMEOUT_MAX) as db:
        db[b"key"] = b"value"
        assert any(thread.name == "dbm_bitcask sync" and thread.is_alive() for thread in threading.enumerate())
        db.sync()
        assert db[b"key"] == b"value"


@pytest.mark.parametrize("size", [0, -1, 1, 4095, 2**32, 2**40])
def test_segment_size_out_of_range_is_a_value_error_and_creates_nothing(path, size):
    with pytest.raises(ValueError, match="segment_size"):
        dbm_bitcask.open(path, "c", segment_size=size)
    assert not path.exists()


@pytest.mark.parametrize("size", [4096, 2**20, 2**32 - 1])
def test_segment_size_within_range_is_accepted(path, size):
    with dbm_bitcask.open(path, segment_size=size) as db:
        db.update(ITEMS)
        assert dict(db) == ITEMS


def test_segment_size_may_change_from_one_opening_to_the_next(path):
    for size in (4096, 2**20, 5000, 2**26):
        with dbm_bitcask.open(path, segment_size=size) as db:
            db.update({b"%d %d" % (size, i): b"x" * 300 for i in range(20)})
    with dbm_bitcask.open(path) as db:
        assert len(db) == 80
        assert set(db.values()) == {b"x" * 300}


def test_options_are_taken_by_name_only(path):
    with pytest.raises(TypeError):
        dbm_bitcask.open(path, "c", 0o666, "never")
    assert not path.exists()


# Paths


def spellings(path):
    return [str(path), os.fsencode(path), path]


@pytest.mark.parametrize("index", range(3), ids=["str", "bytes", "PathLike"])
def test_path_is_str_bytes_or_pathlike(path, index):
    spelling = spellings(path)[index]
    with dbm_bitcask.open(spelling) as db:
        db.update(ITEMS)
        db.reorganize()
    for other in spellings(path):
        with dbm_bitcask.open(other, "r") as db:
            assert dict(db) == ITEMS
        assert dbm_bitcask.whichdb(other) == "dbm_bitcask"


@pytest.mark.parametrize("name", ["größe 日本", "with space", "trailing.db", "-r", "%s {}", "MANIFEST"])
def test_any_name_will_do(tmp_path, name):
    with dbm_bitcask.open(tmp_path / name) as db:
        db[b"key"] = b"value"
    with dbm_bitcask.open(tmp_path / name, "r") as db:
        assert db[b"key"] == b"value"


def test_name_that_is_not_utf8_will_do(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    with dbm_bitcask.open(name) as db:
        db[b"key"] = b"value"
    assert dbm_bitcask.whichdb(name) == "dbm_bitcask"
    with dbm_bitcask.open(name, "r") as db:
        assert db[b"key"] == b"value"
        assert repr(db).isprintable()


@pytest.mark.parametrize("wrong", [None, 5.0, ["db"]], ids=repr)
def test_path_of_another_type_is_a_type_error(wrong):
    with pytest.raises(TypeError):
        dbm_bitcask.open(wrong)


def test_relative_path_is_meant_where_it_was_opened(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    with dbm_bitcask.open("db", segment_size=4096) as db:
        monkeypatch.chdir(there)
        db.update(ITEMS)
        db.reorganize()
        db.sync()
        db[b"after"] = b"chdir"
        assert dict(db) == {**ITEMS, b"after": b"chdir"}
    assert list(there.iterdir()) == []
    with dbm_bitcask.open(here / "db", "r") as db:
        assert dict(db) == {**ITEMS, b"after": b"chdir"}
    assert check(here / "db") == []


def test_symbolic_link_leads_to_the_database(full, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(full, target_is_directory=True)
    with dbm_bitcask.open(link, "w", segment_size=4096) as db:
        db.reorganize()
        db[b"key 1"] = b"through the link"
    assert link.is_symlink()
    with dbm_bitcask.open(full, "r") as db:
        assert dict(db) == {**ITEMS, b"key 1": b"through the link"}


def test_handle_stays_with_its_database_when_another_takes_its_path(full, tmp_path):
    with dbm_bitcask.open(tmp_path / "other", segment_size=4096) as other:
        other[b"other"] = b"value"
    with dbm_bitcask.open(full, "w", segment_size=4096) as db:
        full.rename(tmp_path / "moved")
        (tmp_path / "other").rename(full)
        before = fingerprint(full)
        db.update(dict.fromkeys(ITEMS, b"moved"))
        db.reorganize()
        assert fingerprint(full) == before
    assert fingerprint(full) == before
    with dbm_bitcask.open(full, "r") as db:
        assert dict(db) == {b"other": b"value"}
    with dbm_bitcask.open(tmp_path / "moved", "r") as db:
        assert dict(db) == dict.fromkeys(ITEMS, b"moved")
    assert check(tmp_path / "moved") == []


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_missing_parent_is_an_error_and_is_not_created(tmp_path, flag):
    with pytest.raises(dbm_bitcask.error) as failure:
        dbm_bitcask.open(tmp_path / "missing" / "db", flag)
    assert isinstance(failure.value, FileNotFoundError)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_parent_that_is_a_file_is_an_error(tmp_path, flag):
    (tmp_path / "file").write_bytes(b"contents")
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(tmp_path / "file" / "db", flag)
    assert (tmp_path / "file").read_bytes() == b"contents"


# Modes


def permissions(file):
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize(
    ("mode", "mask", "of_directory", "of_files"),
    [
        (0o666, 0o000, 0o777, 0o666),
        (0o666, 0o022, 0o755, 0o644),
        (0o666, 0o027, 0o750, 0o640),
        (0o600, 0o022, 0o700, 0o600),
        (0o640, 0o000, 0o750, 0o640),
        (0o644, 0o077, 0o700, 0o600),
    ],
)
def test_mode_under_the_umask_is_that_of_every_file(path, umask, mode, mask, of_directory, of_files):
    umask(mask)
    with dbm_bitcask.open(path, "c", mode, segment_size=4096) as db:
        for turn in range(3):
            db.update(dict.fromkeys(ITEMS, b"%d" % turn * 20))
            db.reorganize()
        names = {file.name: permissions(file) for file in path.iterdir()}
    assert len(names) > 3
    assert names == dict.fromkeys(names, of_files)
    assert permissions(path) == of_directory
    assert {permissions(file) for file in path.iterdir()} == {of_files}


def test_default_mode_leaves_everything_to_the_umask(path, umask):
    umask(0o077)
    dbm_bitcask.open(path).close()
    assert permissions(path) == 0o700
    assert {permissions(file) for file in path.iterdir()} == {0o600}


def test_mode_does_not_change_an_existing_directory(full, umask):
    umask(0)
    full.chmod(0o711)
    with dbm_bitcask.open(full, "w", 0o600):
        pass
    assert permissions(full) == 0o711


# What is not ours


def test_n_replaces_an_empty_regular_file(path):
    path.touch()
    with dbm_bitcask.open(path, "n") as db:
        assert not db
        db[b"key"] = b"value"
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


def test_n_refuses_a_link_to_an_empty_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    before = fingerprint(tmp_path)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(tmp_path / "link", "n")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize("contents", [b"precious", b"\0", b"dbm_bitcask"])
def test_regular_file_with_contents_is_left_untouched(tmp_path, flag, contents):
    path = tmp_path / "file"
    path.write_bytes(contents)
    before = fingerprint(tmp_path)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(path, flag)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("flag", ["r", "w"])
def test_empty_regular_file_is_left_untouched_by_r_and_w(tmp_path, flag):
    (tmp_path / "file").touch()
    before = fingerprint(tmp_path)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(tmp_path / "file", flag)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize(
    "names", [["notes.txt"], ["MANIFEST"], ["keydir"], ["00000001.data"], ["sub/notes.txt"], ["1.data", "a.hint"], [".hidden"]]
)
def test_directory_that_is_not_ours_is_left_untouched(tmp_path, flag, names):
    path = tmp_path / "directory"
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"include README.md\n" * 20)
    before = fingerprint(path)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(path, flag)
    assert fingerprint(path) == before


@pytest.mark.parametrize("flag", ["r", "w"])
def test_empty_directory_is_a_missing_database(tmp_path, flag):
    path = tmp_path / "directory"
    path.mkdir()
    with pytest.raises(dbm_bitcask.error) as failure:
        dbm_bitcask.open(path, flag)
    assert isinstance(failure.value, FileNotFoundError)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("flag", ["c", "n"])
def test_empty_directory_becomes_a_database(path, flag):
    path.mkdir()
    with dbm_bitcask.open(path, flag) as db:
        db[b"key"] = b"value"
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


@pytest.mark.parametrize("flag", ["c", "n"])
def test_crashed_creation_is_taken_over(path, flag):
    fork_and_wait(lambda: dbm_bitcask.open(path, "c"))
    (path / "MANIFEST").unlink()
    with dbm_bitcask.open(path, flag) as db:
        assert not db
        db[b"key"] = b"value"
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_records_without_a_manifest_are_left_untouched_and_repair_is_named(full, flag):
    (full / "MANIFEST").unlink()
    before = fingerprint(full)
    with pytest.raises(dbm_bitcask.error, match="repair"):
        dbm_bitcask.open(full, flag)
    assert fingerprint(full) == before


@pytest.mark.parametrize("flag", ["w", "c"])
def test_segment_of_another_lineage_is_an_error_and_nothing_is_deleted(full, flag):
    segment = max(full.glob("*.data"))
    (full / "00009999.data").write_bytes(segment.read_bytes())
    before = fingerprint(full)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(full, flag)
    assert fingerprint(full) == before
    (full / "00009999.data").unlink()


FOREIGN = [
    "notes.txt",
    "1.data",
    "00000000.data",
    "00000001.data.bak",
    "00000001.data~",
    "x00000001.hint",
    "MANIFEST.bak",
    "keydir.old",
    "manifest",
    ".hidden",
    "sub/00000001.data",
    "sub/MANIFEST",
]


def test_foreign_files_in_the_directory_of_a_database_survive_everything(full):
    for name in FOREIGN:
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(name.encode())
    (full / "link").symlink_to("notes.txt")

    def assert_untouched():
        assert {name: (full / name).read_bytes() for name in FOREIGN} == {name: name.encode() for name in FOREIGN}
        assert (full / "link").is_symlink()

    with dbm_bitcask.open(full, "w", segment_size=4096) as db:
        assert dict(db) == ITEMS
        db.update(dict.fromkeys(ITEMS, b"again"))
        db.reorganize()
        assert_untouched()
        db.clear()
        assert_untouched()
        db.update(ITEMS)
    assert_untouched()
    with dbm_bitcask.open(full, "n", segment_size=4096) as db:
        assert_untouched()
        db.update(ITEMS)
        db.reorganize()
    (full / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(full, "c") as db:
        assert dict(db) == ITEMS
    assert_untouched()


def test_leftovers_of_a_killed_process_are_not_in_the_way(full):
    segments = sorted(full.glob("*.data"))
    (full / f"MANIFEST.{'0' * 16}.tmp").write_bytes(b"half a manif")
    (full / f"keydir.{'f' * 16}.tmp").write_bytes(b"half a keydir")
    (full / "00000001.hint").write_bytes(b"half a hint")
    assert (full / "00000001.data") in segments
    for flag in ("r", "w", "c"):
        with dbm_bitcask.open(full, flag) as db:
            assert dict(db) == ITEMS
            if flag != "r":
                db.reorganize()
                assert dict(db) == ITEMS


# What is there after opening


def test_fresh_database_can_be_opened_again_at_once(path):
    with dbm_bitcask.open(path, "c") as db:
        for flag in ("r", "w", "c", "n"):
            with dbm_bitcask.open(path, flag) as other:
                assert dict(other) == {}
        db[b"key"] = b"value"
        with dbm_bitcask.open(path, "r") as other:
            assert dict(other) == {b"key": b"value"}


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize("created_with", ["c", "n"])
def test_fresh_database_of_a_process_that_died_can_be_opened(path, created_with, flag):
    fork_and_wait(lambda: dbm_bitcask.open(path, created_with))
    assert dbm_bitcask.whichdb(path) == "dbm_bitcask"
    with dbm_bitcask.open(path, flag) as db:
        assert dict(db) == {}


def test_database_of_a_process_that_died_holds_all_it_wrote(path):
    fill_and_die(path, segment_size=4096)
    for flag in ("r", "w", "c"):
        with dbm_bitcask.open(path, flag) as db:
            assert len(db) == len(ITEMS)
            assert dict(db) == ITEMS


def test_database_is_read_and_written_by_a_new_interpreter(full):
    script = """
import dbm_bitcask, sys
with dbm_bitcask.open(sys.argv[1], "w") as db:
    db["from the other"] = str(len(db))
    print(db["key 7"].decode())
"""
    assert run_python(script, full).strip() == ITEMS[b"key 7"].decode()
    with dbm_bitcask.open(full, "r") as db:
        assert dict(db) == {**ITEMS, b"from the other": b"%d" % len(ITEMS)}


def disk_usage(path):
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


def test_fresh_database_takes_less_than_64_kib_on_disk(path):
    with dbm_bitcask.open(path) as db:
        db.sync()
        assert disk_usage(path) < 64 * 1024
    assert disk_usage(path) < 64 * 1024
    with dbm_bitcask.open(path, "n"):
        pass
    assert disk_usage(path) < 64 * 1024


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_handle_that_is_dropped_without_close_loses_nothing(path):
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    del db
    gc.collect()
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == ITEMS


@pytest.mark.parametrize("lost", ["keydir", "hints", "both"])
def test_lost_keydir_and_hints_are_rebuilt(full, lost):
    with dbm_bitcask.open(full, "w") as db:
        db.reorganize()
        db[b"after the merge"] = b"value"
        del db[b"key 3"]
    expected = {**ITEMS, b"after the merge": b"value"}
    del expected[b"key 3"]
    if lost in ("hints", "both"):
        for hint in full.glob("*.hint"):
            hint.unlink()
    if lost in ("keydir", "both"):
        (full / "keydir").unlink(missing_ok=True)
    for flag in ("r", "w", "r", "c"):
        with dbm_bitcask.open(full, flag) as db:
            assert len(db) == len(expected)
            assert dict(db) == expected


# Flag r never creates or changes a byte


def read_everything(path, expected):
    with dbm_bitcask.open(path, "r") as db:
        assert len(db) == len(expected)
        assert dict(db) == dict(db.items()) == expected
        assert sorted(db.keys()) == sorted(expected)
        assert [db[key] for key in expected] == list(expected.values())
        assert all(key in db for key in expected)
        assert b"missing" not in db
        assert db.get(b"missing") is None
        key = db.firstkey()
        while key is not None:
            key = db.nextkey(key)
        db.stats()
        db.sync()
        with pytest.raises(dbm_bitcask.error):
            db[b"key"] = b"value"
        with pytest.raises(dbm_bitcask.error):
            db.reorganize()
        with pytest.raises(dbm_bitcask.error):
            db.clear()


def test_r_changes_nothing_after_a_clean_close(full):
    before = fingerprint(full)
    read_everything(full, ITEMS)
    assert fingerprint(full) == before


def test_r_changes_nothing_in_an_empty_database(path):
    dbm_bitcask.open(path).close()
    before = fingerprint(path)
    read_everything(path, {})
    assert fingerprint(path) == before


def test_r_changes_nothing_after_a_writer_died(path):
    fill_and_die(path, segment_size=4096)
    before = fingerprint(path)
    read_everything(path, ITEMS)
    assert fingerprint(path) == before


def test_r_changes_nothing_beside_a_writer(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        db.update(ITEMS)
        before = fingerprint(path)
        read_everything(path, ITEMS)
        assert fingerprint(path) == before


def test_r_changes_nothing_while_the_keydir_is_lost(full):
    (full / "keydir").unlink(missing_ok=True)
    before = fingerprint(full)
    read_everything(full, ITEMS)
    assert fingerprint(full) == before


def test_r_changes_nothing_while_the_keydir_is_lost_and_the_writer_died(path):
    fill_and_die(path, segment_size=4096)
    (path / "keydir").unlink(missing_ok=True)
    before = fingerprint(path)
    read_everything(path, ITEMS)
    assert fingerprint(path) == before


@pytest.mark.parametrize("name", ["keydir", "*.hint"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _data: b"", lambda data: bytes(len(data))])
def test_r_changes_nothing_while_what_can_be_rebuilt_is_damaged(full, name, damage):
    with dbm_bitcask.open(full, "w", segment_size=4096) as db:
        db.reorganize()
    for file in full.glob(name):
        file.write_bytes(damage(file.read_bytes()))
    before = fingerprint(full)
    read_everything(full, ITEMS)
    assert fingerprint(full) == before
    damaged = {str(file) for file in full.glob("*.hint")} if name == "*.hint" else set()
    assert {problem.file for problem in check(full)} == damaged
    for file in damaged:
        Path(file).unlink()


def test_r_changes_nothing_with_a_torn_tail(full):
    with max(full.glob("*.data")).open("ab") as active:
        active.write(b"torn" * 5)
    before = fingerprint(full)
    read_everything(full, ITEMS)
    assert fingerprint(full) == before
    with dbm_bitcask.open(full, "w") as db:
        assert dict(db) == ITEMS


def test_refused_opening_changes_nothing(full):
    before = fingerprint(full)
    with pytest.raises(ValueError, match="segment_size"):
        dbm_bitcask.open(full, "n", segment_size=1)
    with pytest.raises(ValueError, match="sync"):
        dbm_bitcask.open(full, "nf", sync="always")
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(full, "nx")
    assert fingerprint(full) == before


# whichdb


def test_whichdb_knows_a_database_closed_open_empty_and_abandoned(path, tmp_path):
    with dbm_bitcask.open(path):
        assert dbm_bitcask.whichdb(path) == "dbm_bitcask"
    assert dbm_bitcask.whichdb(path) == "dbm_bitcask"
    abandoned = tmp_path / "abandoned"
    fill_and_die(abandoned)
    assert dbm_bitcask.whichdb(abandoned) == "dbm_bitcask"


def test_whichdb_answers_none_for_everything_else(tmp_path):
    (tmp_path / "file").write_bytes(b"contents")
    (tmp_path / "empty file").touch()
    (tmp_path / "empty directory").mkdir()
    for name, contents in (("foreign", b"include README.md"), ("blank", b""), ("zeros", bytes(100))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "MANIFEST").write_bytes(contents)
    (tmp_path / "nested" / "MANIFEST").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in [tmp_path, tmp_path / "missing", tmp_path / "file" / "below", *tmp_path.iterdir()]:
        for spelling in spellings(path):
            assert dbm_bitcask.whichdb(spelling) is None


def test_whichdb_never_asks_dbm_and_changes_nothing(full, monkeypatch):
    def whichdb(_file):
        raise AssertionError("dbm was asked")

    monkeypatch.setattr(dbm, "whichdb", whichdb)
    before = fingerprint(full)
    assert dbm_bitcask.whichdb(full) == "dbm_bitcask"
    assert fingerprint(full) == before
    assert dbm_bitcask.whichdb(full.parent) is None


def test_unpatched_dbm_answers_none_and_not_a_type_that_it_could_not_determine(full):
    assert dbm.whichdb(full) is None


# The end of a handle


def test_context_manager_gives_the_database_and_closes_it(path):
    db = dbm_bitcask.open(path)
    with db as entered:
        assert entered is db
        db[b"key"] = b"value"
    with pytest.raises(dbm_bitcask.error):
        db[b"key"]


def test_context_manager_closes_when_the_body_fails_and_passes_the_failure_on(path):
    handles = []

    def fail():
        with dbm_bitcask.open(path) as db:
            handles.append(db)
            db[b"key"] = b"value"
            raise ValueError("from the body")

    with pytest.raises(ValueError, match="from the body"):
        fail()
    with pytest.raises(dbm_bitcask.error):
        handles[0][b"key"]
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db) == {b"key": b"value"}


@pytest.mark.parametrize("flag", ["r", "w"])
def test_closing_twice_is_fine(full, flag):
    db = dbm_bitcask.open(full, flag)
    db.close()
    db.close()
    with dbm_bitcask.open(full, flag) as db:
        db.close()


def test_closing_one_handle_leaves_the_others_open(full):
    with dbm_bitcask.open(full, "w") as one:
        with dbm_bitcask.open(full, "w") as two, dbm_bitcask.open(full, "r"):
            two[b"new"] = b"value"
        assert one[b"new"] == b"value"
        one[b"new"] = b"again"
        assert len(one) == len(ITEMS) + 1


def update_in_place(db):
    db |= {b"key": b"value"}


USES = {
    "get item": lambda db: db[b"key"],
    "set item": lambda db: db.__setitem__(b"key", b"value"),
    "delete item": lambda db: db.__delitem__(b"key"),
    "in": lambda db: b"key" in db,
    "len": len,
    "bool": bool,
    "iter": lambda db: next(iter(db)),
    "get": lambda db: db.get(b"key"),
    "keys": lambda db: db.keys(),
    "items": lambda db: list(db.items()),
    "values": lambda db: list(db.values()),
    "setdefault": lambda db: db.setdefault(b"key", b"value"),
    "pop": lambda db: db.pop(b"key"),
    "pop with default": lambda db: db.pop(b"key", None),
    "popitem": lambda db: db.popitem(),
    "update": lambda db: db.update({b"key": b"value"}),
    "|=": update_in_place,
    "clear": lambda db: db.clear(),
    "==": lambda db: db == {},
    "firstkey": lambda db: db.firstkey(),
    "nextkey": lambda db: db.nextkey(b"key"),
    "sync": lambda db: db.sync(),
    "reorganize": lambda db: db.reorganize(),
    "merge": lambda db: db.merge(),
    "stats": lambda db: db.stats(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("flag", ["r", "w"])
def test_use_of_a_closed_database_is_an_error(full, flag, use):
    db = dbm_bitcask.open(full, flag)
    db.close()
    with pytest.raises(dbm_bitcask.error) as failure:
        use(db)
    assert failure.value.args[0] == "DBM object has already been closed"


def test_database_leaves_no_descriptor_and_no_thread_behind(full):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("this system does not list the descriptors of a process")

    def use():
        with dbm_bitcask.open(full, "w", segment_size=4096) as db, dbm_bitcask.open(full, "r") as reader:
            db.update(ITEMS)
            assert dict(reader) == ITEMS
            db.reorganize()

    def held():
        gc.collect()
        return len(list(descriptors.iterdir())), threading.active_count()

    use()
    before = held()
    use()
    assert held() == before


@pytest.mark.parametrize("flag", ["r", "w"])
def test_missing_database_is_named_as_the_caller_named_it(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    for given in ("missing", b"missing", Path("missing"), "./missing", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError) as caught:
            dbm_bitcask.open(given, flag)
        assert caught.value.filename == os.fsdecode(given)


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_empty_path_is_no_database_and_not_the_working_directory(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    for given in ("", b""):
        with pytest.raises(dbm_bitcask.error) as caught:
            dbm_bitcask.open(given, flag)
        assert isinstance(caught.value, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []
