"""After `register`, `dbm` and `shelve` of the standard library know our databases; after `unregister`, nothing is left of it."""

from __future__ import annotations

import dbm
import dbm.dumb
import importlib
import pickle
import shelve
import sys
import threading

import pytest

import dbm_bitcask
from children import run_python

ORIGINAL = dbm.open, dbm.whichdb


def others():
    """The modules of the standard library that are here."""
    for name in "dbm.sqlite3", "dbm.gnu", "dbm.ndbm", "dbm.dumb":
        try:
            yield importlib.import_module(name)
        except ImportError:
            continue


every_other = pytest.mark.parametrize("module", list(others()), ids=lambda module: module.__name__)
either_default = pytest.mark.parametrize("default", [False, True])


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Each test begins and ends with the `dbm` of the standard library, as an import of dbm_bitcask leaves it."""
    state = dbm._names[:], dbm._defaultmod
    assert (dbm.open, dbm.whichdb) == ORIGINAL
    yield
    dbm_bitcask.unregister()
    assert (dbm.open, dbm.whichdb) == ORIGINAL
    assert "dbm_bitcask" not in dbm._modules
    assert dbm._names == state[0]
    assert dbm._defaultmod in (state[1], next(others()))  # what its first use makes it


@pytest.fixture
def ours(path):
    with dbm_bitcask.open(path) as db:
        db["key"] = "ours"
    return path


def test_import_registers_nothing():
    script = """
import dbm, sys
before = dbm.open, dbm.whichdb, dbm._names[:], dict(dbm._modules), dbm._defaultmod
import dbm_bitcask
assert before == (dbm.open, dbm.whichdb, dbm._names, dbm._modules, dbm._defaultmod)
print("same")
"""
    assert run_python(script).strip() == "same"


@either_default
def test_database_of_ours_is_recognised_and_opened(ours, default):
    assert dbm.whichdb(ours) is None
    dbm_bitcask.register(default)
    for name in (ours, str(ours), bytes(ours)):
        assert dbm.whichdb(name) == "dbm_bitcask"
        for flag in "rwc":
            with dbm.open(name, flag) as db:
                assert isinstance(db, dbm_bitcask.Database)
                assert db["key"] == b"ours"
    assert importlib.import_module(dbm.whichdb(ours)) is dbm_bitcask
    with dbm.open(ours) as db, pytest.raises(dbm.error, match="reading only"):
        db["key"] = b""


@either_default
def test_shelve_opens_a_database_of_ours(path, default):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["numbers"] = [1, 2]
    dbm_bitcask.register(default)
    with shelve.open(path) as shelf:
        assert isinstance(shelf.dict, dbm_bitcask.Database)
        assert shelf["numbers"] == [1, 2]


@either_default
def test_new_database_of_ours_is_made_in_the_place_of_ours(ours, default):
    dbm_bitcask.register(default)
    with dbm.open(ours, "n") as db:
        assert isinstance(db, dbm_bitcask.Database)
        assert len(db) == 0


@pytest.mark.parametrize("flag", ["c", "n", "cf", "ns", "nu"])
def test_default_makes_new_databases_ours(path, flag):
    dbm_bitcask.register(default=True)
    with dbm.open(path, flag) as db:
        assert isinstance(db, dbm_bitcask.Database)
        db["key"] = b"value"
    assert dbm_bitcask.whichdb(path) == dbm.whichdb(path) == "dbm_bitcask"
    with dbm.open(path) as db:
        assert db["key"] == b"value"


def test_mode_is_passed_on(path):
    dbm_bitcask.register(default=True)
    dbm.open(path, "c", 0o600).close()
    assert (path / "MANIFEST").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("flag", ["c", "n"])
def test_without_default_new_databases_are_as_ever(path, flag):
    dbm_bitcask.register()
    with dbm.open(str(path), flag) as db:
        assert not isinstance(db, dbm_bitcask.Database)
        db["key"] = b"value"
    assert dbm_bitcask.whichdb(path) is None
    assert dbm.whichdb(str(path)) == next(others()).__name__


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("flag", ["r", "w"])
def test_database_that_does_not_exist_is_the_usual_error(path, flag, registered):
    if registered:
        dbm_bitcask.register(default=True)
    with pytest.raises(dbm.error, match="use 'c' or 'n' flag"):
        dbm.open(path, flag)


@either_default
@every_other
def test_files_of_other_modules_keep_their_own(path, module, default):
    with module.open(str(path), "n") as db:
        db[b"key"] = b"theirs"
    dbm_bitcask.register(default)
    assert dbm.whichdb(str(path)) == module.__name__
    for flag in "rwc":
        with dbm.open(str(path), flag) as db:
            assert type(db).__module__ != "dbm_bitcask.database"
            assert db[b"key"] == b"theirs"
    with shelve.open(str(path)) as shelf:
        shelf["more"] = 1
    with module.open(str(path), "r") as db:
        assert db[b"more"] == pickle.dumps(1)


@every_other
def test_new_database_in_the_place_of_another_module_is_made_as_without_us(path, module):
    with module.open(str(path), "n") as db:
        db[b"key"] = b"theirs"
    dbm_bitcask.register(default=True)
    with dbm.open(str(path), "n") as db:
        assert not isinstance(db, dbm_bitcask.Database)
        assert len(db.keys()) == 0
    assert dbm_bitcask.whichdb(path) is None


def test_database_of_ours_wins_over_files_beside_it(ours):
    with dbm.dumb.open(str(ours), "n") as db:
        db[b"key"] = b"left over"
    assert dbm.whichdb(ours) == "dbm.dumb"
    dbm_bitcask.register()
    assert dbm.whichdb(ours) == "dbm_bitcask"
    with dbm.open(ours) as db:
        assert db["key"] == b"ours"


def test_directory_that_is_not_ours_does_not_win(path):
    with dbm.dumb.open(str(path), "n") as db:
        db[b"key"] = b"theirs"
    path.mkdir()
    (path / "MANIFEST").write_text("of something else")
    dbm_bitcask.register(default=True)
    assert dbm.whichdb(path) == "dbm.dumb"
    with dbm.open(str(path)) as db:
        assert db[b"key"] == b"theirs"


def test_file_that_nobody_knows_is_left_alone(tmp_path):
    file = tmp_path / "letter"
    file.write_text("dear reader")
    dbm_bitcask.register(default=True)
    assert dbm.whichdb(file) == ""
    with pytest.raises(dbm.error, match="could not be determined"):
        dbm.open(file, "c")
    with pytest.raises(dbm.error):
        dbm.open(file, "n")
    assert file.read_text() == "dear reader"


def test_empty_file_is_replaced_by_a_new_database(path):
    path.touch()
    dbm_bitcask.register(default=True)
    with dbm.open(path, "n") as db:
        assert isinstance(db, dbm_bitcask.Database)


def test_errors_of_ours_are_caught_as_dbm_error(ours):
    dbm_bitcask.register(default=True)
    for wrong in (
        lambda: dbm.open(ours, "x"),
        lambda: dbm.open(ours / "MANIFEST" / "x", "c"),
        lambda: dbm.open("", "c"),
        lambda: dbm.open(ours).__setitem__("key", b""),
    ):
        with pytest.raises(dbm.error):
            wrong()


def test_what_is_no_path_is_the_same_error_as_without_us():
    dbm_bitcask.register(default=True)
    with pytest.raises(TypeError):
        dbm.open(5)
    with pytest.raises(TypeError):
        dbm.whichdb(5)


def test_open_that_was_taken_before_finds_databases_of_ours(ours, tmp_path):
    taken = dbm.open
    dbm_bitcask.register(default=True)
    with taken(ours) as db:
        assert isinstance(db, dbm_bitcask.Database)
    with taken(str(tmp_path / "new"), "c") as db:
        assert not isinstance(db, dbm_bitcask.Database)


def test_keyword_that_we_do_not_know_is_passed_on(ours, monkeypatch):
    monkeypatch.setattr(dbm, "open", lambda *args, **others: (args, others))
    dbm_bitcask.register(default=True)
    assert dbm.open(ours, "c", backend="dbm.dumb") == ((ours, "c", 0o666), {"backend": "dbm.dumb"})
    dbm_bitcask.unregister()


# Registering and undoing it.


def test_register_twice_is_undone_by_one_unregister(ours):
    dbm_bitcask.register()
    first = dbm.open
    dbm_bitcask.register()
    assert dbm.open is first
    dbm_bitcask.unregister()
    assert (dbm.open, dbm.whichdb) == ORIGINAL
    assert dbm.whichdb(ours) is None
    dbm_bitcask.unregister()


def test_last_call_decides_on_the_default(path):
    dbm_bitcask.register(default=True)
    dbm_bitcask.register()
    with dbm.open(str(path), "c") as db:
        assert not isinstance(db, dbm_bitcask.Database)


def test_registered_lasts_for_its_block_also_if_it_raises(ours):
    with pytest.raises(ZeroDivisionError), dbm_bitcask.registered():
        assert dbm.whichdb(ours) == "dbm_bitcask"
        raise ZeroDivisionError
    assert dbm.whichdb(ours) is None


def test_nested_blocks_last_until_the_outermost_ends(ours, tmp_path):
    def makes_ours(name):
        with dbm.open(str(tmp_path / name), "c") as db:
            return isinstance(db, dbm_bitcask.Database)

    with dbm_bitcask.registered():
        assert not makes_ours("a")
        with dbm_bitcask.registered(default=True):
            assert makes_ours("b")
            with dbm_bitcask.registered():
                assert makes_ours("c")
            assert makes_ours("d")
        assert not makes_ours("e")
        dbm_bitcask.unregister()
        assert dbm.whichdb(ours) == "dbm_bitcask"
    assert dbm.whichdb(ours) is None


def test_register_within_a_block_lasts_beyond_it(ours):
    with dbm_bitcask.registered(default=True):
        dbm_bitcask.register()
    assert dbm.whichdb(ours) == "dbm_bitcask"


@either_default
def test_what_others_patched_before_is_kept_and_restored(ours, monkeypatch, default):
    asked = []
    monkeypatch.setattr(dbm, "whichdb", lambda path: asked.append(path) or "dbm.theirs")
    theirs = dbm.whichdb
    dbm_bitcask.register(default)
    assert dbm.whichdb(ours) == "dbm_bitcask"
    assert dbm.whichdb("other") == "dbm.theirs"
    assert asked == ["other"]
    dbm_bitcask.unregister()
    assert dbm.whichdb is theirs


def test_what_others_patched_in_between_stays_and_ours_below_it_does_nothing(ours, path, monkeypatch):
    with monkeypatch.context() as patched:
        dbm_bitcask.register(default=True)
        below, below_whichdb = dbm.open, dbm.whichdb
        patched.setattr(dbm, "open", lambda *args: below(*args))
        theirs = dbm.open
        dbm_bitcask.unregister()
        assert dbm.open is theirs
        assert dbm.whichdb is ORIGINAL[1]
        assert below_whichdb(ours) is None
        with dbm.open(str(path) + "-new", "c") as db:  # through theirs, and ours below
            assert not isinstance(db, dbm_bitcask.Database)
        with pytest.raises(dbm.error):
            dbm.open(ours, "r")
        dbm_bitcask.register()  # over theirs
        with dbm.open(ours) as db:
            assert isinstance(db, dbm_bitcask.Database)
        dbm_bitcask.unregister()
        assert dbm.open is theirs
    assert dbm.open is below
    dbm.open = ORIGINAL[0]


def test_register_again_reaches_a_dbm_that_was_imported_afresh(ours, monkeypatch):
    dbm_bitcask.register()
    old = sys.modules["dbm"]
    monkeypatch.delitem(sys.modules, "dbm")
    fresh = importlib.import_module("dbm")
    assert fresh is not old
    assert fresh.whichdb(ours) is None
    dbm_bitcask.register()
    assert fresh.whichdb(ours) == old.whichdb(ours) == "dbm_bitcask"
    dbm_bitcask.unregister()
    assert fresh.whichdb(ours) is None
    assert old.whichdb(ours) is None


def test_threads_register_and_open_at_once(ours, tmp_path):
    start, wrong = threading.Barrier(8), []

    def work(number):
        start.wait()
        for turn in range(10):
            with dbm_bitcask.registered(default=number % 2 == 0):
                with dbm.open(ours) as db:
                    wrong.extend([] if isinstance(db, dbm_bitcask.Database) else ["existing"])
                if number % 2 == 0:
                    with dbm.open(str(tmp_path / f"{number}-{turn}"), "n") as db:
                        wrong.extend([] if isinstance(db, dbm_bitcask.Database) else ["new"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What users do with it.


def test_script_that_only_imports_shelve_works_on_our_database(path):
    script = """
import shelve
with shelve.open(sys.argv[1]) as shelf:
    shelf["list"] = [1, 2]
    shelf["list"] += [3]
    del shelf["gone"]
with shelve.open(sys.argv[1], "r") as shelf:
    print(sorted(shelf.items()))
"""
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["gone"] = 1
    line = "import sys, dbm_bitcask; dbm_bitcask.register(default=True)\n"
    assert run_python(line + script, path).strip() == "[('list', [1, 2, 3])]"
    path = path.with_name("new")
    script = script.replace('    del shelf["gone"]\n', "")
    assert run_python(line + script, path).strip() == "[('list', [1, 2, 3])]"
    assert dbm_bitcask.whichdb(path)


def test_forty_shelves_of_the_standard_library_are_open_at_once(tmp_path):
    with dbm_bitcask.registered(default=True):
        shelves = [shelve.open(tmp_path / str(number)) for number in range(40)]
        for number, shelf in enumerate(shelves):
            shelf["key"] = number
        assert [shelf["key"] for shelf in shelves] == list(range(40))
        for shelf in shelves:
            assert isinstance(shelf.dict, dbm_bitcask.Database)
            shelf.close()


def lose_manifest(path):
    (path / "MANIFEST").rename(path.parent / "lost")


def damage_marker(path):
    (path / "MANIFEST").write_bytes(b"x" + (path / "MANIFEST").read_bytes()[1:])


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@either_default
@pytest.mark.parametrize("damage", [lose_manifest, damage_marker])
def test_damaged_database_of_ours_is_an_error_and_none_is_begun_beside_it(tmp_path, default, damage, flag):
    path = tmp_path / "precious"
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["key"] = 1
    damage(path)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with dbm_bitcask.registered(default), pytest.raises(dbm_bitcask.CorruptionError):
        dbm.open(str(path), flag)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


@either_default
def test_directory_that_cannot_be_looked_into_is_an_error_and_none_is_begun_beside_it(ours, default, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(ours))

    with dbm_bitcask.registered(default):
        monkeypatch.setattr("dbm_bitcask.engine.store.open_directory", refuse)
        for flag in "rwc":
            with pytest.raises(dbm_bitcask.error, match="Permission denied"):
                dbm.open(str(ours), flag)
    assert [entry.name for entry in ours.parent.iterdir()] == [ours.name]
    monkeypatch.undo()


def test_dbm_that_cannot_be_patched_is_left_as_it_was(monkeypatch):
    modules = dbm._modules
    monkeypatch.delattr(dbm, "_modules")
    for action in (dbm_bitcask.register, lambda: dbm_bitcask.registered().__enter__()):
        with pytest.raises(AttributeError):
            action()
        assert (dbm.open, dbm.whichdb) == ORIGINAL
    dbm._modules = modules
    dbm_bitcask.unregister()
