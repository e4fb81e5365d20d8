"""KeyboardInterrupt or MemoryError at any instruction or line of an operation: the handle stays usable, and the database whole.

`test_recovery` interrupts at every store into shared words and every call that changes a file; here it is every place in between.
"""

from __future__ import annotations

import itertools
import os
import shutil

import pytest

import dbm_bitcask
from crashes import abandon, freeze, thaw
from dbm_bitcask.engine import files, keydir, portable, store, write
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from interruptions import Interruption

ITEMS = {b"key %d" % number: b"value %d" % number for number in range(5)}
TINY = {"segment_size": 4096}
EXCEPTIONS = (KeyboardInterrupt, MemoryError)  # by turns


pytestmark = pytest.mark.usefixtures("fast_disk")


def tail_of(db):
    return db._log.keydir.counter(at.TAIL) & at.MASK32


turn = 0


def set_another(mapping):
    """Set a key that never was there: one that was has a slot, and takes another way."""
    mapping[b"turn %d" % turn] = b"1"


def some(db):
    """The items, whatever the operation before did to them, in a log that stays short."""
    global turn
    db.pop(b"turn %d" % turn, None)
    turn += 1
    if tail_of(db) > 1500 or len(db._log.entries) > 2:
        db.clear()
    db.pop(b"new", None)
    db.pop(b"filler", None)
    for key, value in ITEMS.items():
        if db.get(key) != value:
            db[key] = value


def dead_segments(db):
    """One of which a merge copies a half."""
    db.clear()
    for number in range(5):
        db[b"key %d" % (number % 4)] = b"%d" % number * 1700


def full_segment(db):
    some(db)
    db[b"filler"] = bytes(max(0, 4096 - tail_of(db) - 24 - 6 - 40))


class Operation:
    """What is done to a database, what was there before, and the same for a dict."""

    def __init__(self, do, model=lambda _: None, prepare=some, **options):
        self.do, self.model, self.prepare, self.options = do, model, prepare, options


def set_to(key, value):
    return lambda mapping: mapping.__setitem__(key, value)


def deleted(key):
    return lambda mapping: mapping.pop(key, None)


SOME_NEW = {b"new %d" % number: b"value" for number in range(3)}


def without_new(db):
    some(db)
    for key in SOME_NEW:
        db.pop(key, None)


def batch(db):
    with db.batch():
        batch_in_a_dict(db)


def batch_in_a_dict(mapping):
    mapping[b"new"] = b"1"
    mapping[b"key 1"] = b"another"
    mapping.pop(b"key 2", None)
    mapping[b"key 3"] = b"another"


PLAIN = {
    "get": Operation(lambda db: db.get(b"key 1")),
    "get of a missing key": Operation(lambda db: db.get(b"missing")),
    "in": Operation(lambda db: b"key 1" in db),
    "len": Operation(len),
    "set a new key": Operation(set_another, set_another),
    "set a deleted key": Operation(set_to(b"new", b"1"), set_to(b"new", b"1")),
    "overwrite": Operation(set_to(b"key 1", b"1"), set_to(b"key 1", b"1")),
    "delete": Operation(lambda db: db.__delitem__(b"key 1"), deleted(b"key 1")),
}
LONG = {
    "batch": Operation(batch, batch_in_a_dict),
    "update": Operation(lambda db: db.update(SOME_NEW), lambda model: model.update(SOME_NEW), without_new),
    "batch that rotates": Operation(batch, batch_in_a_dict, full_segment, **TINY),
    "set that is synced": Operation(set_to(b"new", b"1"), set_to(b"new", b"1"), sync="always"),
    "pop": Operation(deleted(b"key 1"), deleted(b"key 1")),
    "setdefault": Operation(lambda db: db.setdefault(b"new", b"1"), set_to(b"new", b"1")),
    "set for some time": Operation(lambda db: db.set(b"key 1", b"1", 10**6), set_to(b"key 1", b"1")),
    "touch": Operation(lambda db: db.touch(b"key 1", 10**6)),
    "set that rotates": Operation(set_to(b"new", b"1" * 99), set_to(b"new", b"1" * 99), full_segment, **TINY),
    "delete that rotates": Operation(deleted(b"key 1"), deleted(b"key 1"), full_segment, **TINY),
    "clear": Operation(lambda db: db.clear(), lambda model: model.clear(), dead_segments, **TINY),
    "sync": Operation(lambda db: db.sync()),
    "merge": Operation(lambda db: db.merge(), prepare=dead_segments, **TINY),
    "iteration": Operation(lambda db: dict(db.items())),
}


def outcomes(db, operation):
    before = dict(db)
    after = dict(before)
    operation.model(after)
    return before, after


def is_lock_free(path, lock):
    """Whether any process can have the writer lock, and any thread."""
    free = portable.AUTO == "portable" or files.Directory(str(path)).try_lock()  # else it stays locked while it is open
    return free and not lock.mutex._is_owned() and not lock.busy


def require_usable(db, path, possible):
    assert is_lock_free(path, db._log.lock)
    assert dict(db) in possible
    db[b"later"] = b"value"  # finishes what was interrupted
    found = dict(db)
    assert found in [{**state, b"later": b"value"} for state in possible]
    assert {key: db[key] for key in found} == found
    assert len(db) == len(found)


def interrupted_everywhere(path, operation, step):
    """The handle, and what it may hold, after an interruption of the operation at each of its steps."""
    interruption = Interruption(step)
    with dbm_bitcask.open(path, **operation.options) as db:
        for number in itertools.count(1):
            operation.prepare(db)
            possible = outcomes(db, operation)
            goes_on = interruption.run(lambda: operation.do(db), number, EXCEPTIONS)
            yield db, possible
            if not goes_on:
                break
    assert number > (60 if step == "opcode" else 10)


@pytest.mark.parametrize("name", PLAIN)
def test_operation_that_is_interrupted_at_any_instruction_is_done_or_not_and_the_handle_goes_on(path, name):
    for db, possible in interrupted_everywhere(path, PLAIN[name], "opcode"):
        require_usable(db, path, possible)
    with dbm_bitcask.open(path, "w") as db:
        db[b"last"] = b"value"


@pytest.mark.parametrize("name", [*PLAIN, *LONG])
def test_operation_that_is_interrupted_at_any_line_is_done_or_not_and_the_handle_goes_on(path, name):
    for db, possible in interrupted_everywhere(path, (PLAIN | LONG)[name], "line"):
        require_usable(db, path, possible)
        assert check(path) == []


def test_set_with_a_timeout_that_is_interrupted_at_any_line_leaks_no_lock(path):
    operation = Operation(set_to(b"new", b"1"), set_to(b"new", b"1"), timeout=60)
    for db, possible in interrupted_everywhere(path, operation, "line"):
        require_usable(db, path, possible)


def test_set_that_splits_a_page_and_is_interrupted_at_any_line_is_done_or_not_and_the_handle_goes_on(tmp_path, monkeypatch):
    for module in (keydir, write):
        monkeypatch.setattr(module, "FULL", 10)
    full = {b"%d" % number: b"v" for number in range(10)}
    template = dbm_bitcask.open(tmp_path / "template")
    template.update(full)
    abandon(template)
    frozen, interruption = freeze(tmp_path / "template"), Interruption("line")
    for number in itertools.count(1):
        path = thaw(frozen, tmp_path / str(number))
        with dbm_bitcask.open(path, "w") as db:
            goes_on = interruption.run(lambda db=db: db.update({b"new": b"1"}), number, EXCEPTIONS)
            require_usable(db, path, [full, {**full, b"new": b"1"}])
            assert check(path) == []
        shutil.rmtree(path)
        if not goes_on:
            break
    assert number > 100


# Opening and closing.


@pytest.fixture
def closed(tmp_path):
    """A database of two segments that was closed."""
    path = tmp_path / "template"
    with dbm_bitcask.open(path, **TINY) as db:
        db.update(ITEMS)
        db[b"filler"] = bytes(3900)
        db[b"key 1"] = b"again"
    return path


@pytest.fixture
def abandoned(closed):
    """One whose writer died within a set."""
    db = dbm_bitcask.open(closed, "w", **TINY)
    db[b"key 1"] = b"last"
    with max(closed.glob("*.data")).open("ab") as file:
        file.write(b"torn")
    abandon(db)
    return closed


@pytest.fixture
def indexless(closed):
    (closed / "keydir").unlink(missing_ok=True)
    return closed


def contents(path, flag="r"):
    with dbm_bitcask.open(path, flag) as db:
        return dict(db)


def open_lock_free(path, flag):
    """Open again after an interruption, as another process might: within a time."""
    with dbm_bitcask.open(path, flag, timeout=5) as db:
        assert is_lock_free(path, db._log.lock)
        return dict(db)


@pytest.mark.parametrize("left", ["closed", "abandoned", "indexless"])
def test_open_for_reading_that_is_interrupted_at_any_line_leaves_everything_as_it_is(request, left):
    path = request.getfixturevalue(left)
    expected, before, interruption = contents(path), freeze(path), Interruption("line", turns=1)
    for number in itertools.count(1):
        goes_on = interruption.run(lambda: dbm_bitcask.open(path, "r"), number, EXCEPTIONS)
        assert freeze(path) == before
        assert files.Directory(str(path)).try_lock()
        if number % 20 == 0 or not goes_on:
            assert contents(path) == expected
        if not goes_on:
            break
    assert number > 100


@pytest.mark.parametrize(
    ("left", "flag"),
    [
        ("closed", "w"),
        ("abandoned", "w"),
        ("indexless", "w"),
        ("closed", "n"),
        ("indexless", "n"),
    ],
)
def test_open_that_is_interrupted_at_any_line_leaves_the_database_whole(request, tmp_path, left, flag):
    template = request.getfixturevalue(left)
    frozen, interruption = freeze(template), Interruption("line", turns=1)
    expected = contents(template)
    for number in itertools.count(1):
        path = thaw(frozen, tmp_path / str(number)) if left != "indexless" else copied(frozen, tmp_path / str(number))
        goes_on = interruption.run(lambda path=path: dbm_bitcask.open(path, flag), number, EXCEPTIONS)
        found = open_lock_free(path, "w")
        assert found == expected or (flag == "n" and found == {})
        assert check(path) == []
        shutil.rmtree(path)
        if not goes_on:
            break
    assert number > 40


def copied(frozen, path):
    path.mkdir()
    for name, data in frozen.items():
        (path / name).write_bytes(data)
    return path


def test_creation_that_is_interrupted_at_any_line_can_be_done_again(tmp_path):
    interruption = Interruption("line", turns=1)
    for number in itertools.count(1):
        path = tmp_path / str(number)
        goes_on = interruption.run(lambda path=path: dbm_bitcask.open(path, "c"), number, EXCEPTIONS)
        assert open_lock_free(path, "c") == {}
        assert check(path) == []
        shutil.rmtree(path)
        if not goes_on:
            break
    assert number > 100


def test_close_that_is_interrupted_at_any_line_can_be_called_again_and_loses_nothing(closed, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CLEAN_KEYS", 0)  # it does most then
    synced: dict[int, int] = {}

    def sync(fd):
        status = os.fstat(fd)
        synced[status.st_ino] = status.st_size

    monkeypatch.setattr(files, "_fdatasync", sync)
    frozen, interruption = freeze(closed), Interruption("line", turns=1)
    expected = {**contents(closed), b"key 1": b"1" * 3000, b"last": b"value" * 200}
    for number in itertools.count(1):
        path = thaw(frozen, tmp_path / str(number))
        db = dbm_bitcask.open(path, "w", **TINY)
        db[b"key 1"] = b"1" * 3000
        db[b"last"] = b"value" * 200
        written = max(path.glob("*.data")).stat()
        synced.clear()
        goes_on = interruption.run(db.close, number, EXCEPTIONS)
        db.close()
        assert synced[written.st_ino] >= written.st_size
        assert contents(path) == open_lock_free(path, "w") == expected
        assert check(path) == []
        shutil.rmtree(path)
        if not goes_on:
            break
    assert number > 100
