"""The main job: a shelf in place of a dict, by `shelve.Shelf(dbm_bitcask.open(path))` and by `open_shelf`."""

from __future__ import annotations

import collections
import copy
import datetime
import decimal
import hashlib
import io
import json
import pathlib
import pickle
import shelve
import sys

import pytest

import dbm_bitcask
from children import run_python

VALUES = {
    "none": None,
    "number": 2**100,
    "float": 1e-300,
    "text": "größe",
    "empty bytes": b"",
    "list": [1, [2, [3]]],
    "dict": {"a": {1, 2}, (1, 2): None},
    "date": datetime.date(2024, 2, 29),
    "decimal": decimal.Decimal("0.10"),
    "counter": collections.Counter("mississippi"),
    "large": "x" * 100_000,
}

SHELVES = {
    "shelve.Shelf": lambda path, **options: shelve.Shelf(dbm_bitcask.open(path), **options),
    "open_shelf": lambda path, **options: dbm_bitcask.open_shelf(path, **options),
}
every_protocol = pytest.mark.parametrize("protocol", [None, *range(pickle.HIGHEST_PROTOCOL + 1)])


@pytest.fixture(params=SHELVES.values(), ids=SHELVES)
def opened(request, path):
    """Opens a shelf at `path`, in either way."""
    return lambda **options: request.param(path, **options)


def test_open_shelf_gives_a_shelf(path):
    with dbm_bitcask.open_shelf(path) as shelf:
        assert type(shelf) is dbm_bitcask.Shelf
        assert isinstance(shelf, shelve.Shelf)
        assert isinstance(shelf.dict, dbm_bitcask.Database)


@every_protocol
def test_values_come_back_equal_in_every_protocol(opened, protocol):
    with opened(protocol=protocol) as shelf:
        for key, value in VALUES.items():
            shelf[key] = value
        assert dict(shelf) == VALUES
    with opened(protocol=protocol) as shelf:
        assert len(shelf) == len(VALUES)
        assert {key: shelf[key] for key in VALUES} == VALUES
        assert dict(shelf.items()) == VALUES


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_protocol_is_the_one_that_was_asked_for(opened, protocol):
    with opened(protocol=protocol) as shelf:
        shelf["key"] = [1, 2]
        assert shelf.dict[b"key"] == pickle.dumps([1, 2], protocol)


def test_both_ways_read_what_the_other_wrote(path):
    with shelve.Shelf(dbm_bitcask.open(path)) as shelf:
        shelf.update(VALUES)
    with dbm_bitcask.open_shelf(path) as shelf:
        assert dict(shelf) == VALUES
        shelf["new"] = [1]
    with shelve.Shelf(dbm_bitcask.open(path, "r")) as shelf:
        assert dict(shelf) == {**VALUES, "new": [1]}


def test_keys_are_str(opened):
    with opened() as shelf:
        shelf["größe"] = 1
        shelf[""] = 2
        assert sorted(shelf) == sorted(shelf.keys()) == ["", "größe"]
        assert "größe" in shelf
        assert shelf.dict.keys()[0] in ("größe".encode(), b"")
        assert shelf.pop("größe") == 1
        assert list(shelf) == [""]


def test_keyencoding_is_that_of_the_stored_keys(opened):
    with opened(keyencoding="latin-1") as shelf:
        shelf["größe"] = 1
        assert shelf.dict.keys() == ["größe".encode("latin-1")]
    with opened(keyencoding="latin-1") as shelf:
        assert list(shelf) == ["größe"]
        assert shelf["größe"] == 1


def test_missing_key_is_a_key_error(opened):
    with opened() as shelf:
        shelf["key"] = 1
        with pytest.raises(KeyError):
            shelf["missing"]
        with pytest.raises(KeyError):
            del shelf["missing"]
        assert shelf.get("missing") is None
        assert shelf.get("missing", 5) == 5
        assert shelf.get("key", 5) == 1
        assert shelf.pop("missing", 6) == 6
        with pytest.raises(KeyError):
            shelf.pop("missing")


def test_shelf_is_a_mapping_like_a_dict(opened):
    expected = {str(i): list(range(i)) for i in range(40)}
    with opened() as shelf:
        shelf.update(expected)
        assert shelf == expected
        assert len(shelf) == 40
        assert sorted(shelf.items()) == sorted(expected.items())
        assert sorted(shelf.values()) == sorted(expected.values())
        assert shelf.setdefault("3", "other") == [0, 1, 2]
        assert shelf.setdefault("new", {"a": 1}) == {"a": 1}
        key, value = shelf.popitem()
        assert {**expected, "new": {"a": 1}}[key] == value
        assert len(shelf) == 40


def test_value_that_cannot_be_pickled_changes_nothing(opened):
    with opened() as shelf:
        shelf["key"] = "before"
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            shelf["key"] = lambda: None
        assert dict(shelf) == {"key": "before"}


def test_mutation_is_forgotten_without_writeback(opened):
    with opened() as shelf:
        shelf["list"] = [1]
        shelf["list"].append(2)
        assert shelf["list"] == [1]
        value = shelf["list"]
        value.append(2)
        shelf["list"] = value
    with opened() as shelf:
        assert shelf["list"] == [1, 2]


def test_mutation_is_written_back_when_the_shelf_is_closed(opened):
    with opened(writeback=True) as shelf:
        shelf["deep"] = {"a": {"b": []}}
        shelf["deep"]["a"]["b"].append(1)
        assert shelf["deep"]["a"]["b"] == [1]
    with opened(writeback=True) as shelf:
        shelf["deep"]["a"]["b"].append(2)
        shelf.setdefault("list", []).append(3)
    with opened() as shelf:
        assert dict(shelf) == {"deep": {"a": {"b": [1, 2]}}, "list": [3]}


def test_mutation_is_seen_by_others_after_sync(opened, path):
    with opened(writeback=True) as shelf:
        shelf["list"] = [1]
        shelf["list"].append(2)
        with dbm_bitcask.open_shelf(path, "r") as other:
            assert other["list"] == [1]
            shelf.sync()
            assert other["list"] == [1, 2]


def test_deleted_key_is_not_written_back(opened):
    with opened(writeback=True) as shelf:
        shelf["key"] = [1]
        shelf["key"].append(2)
        del shelf["key"]
    with opened() as shelf:
        assert dict(shelf) == {}


@pytest.mark.parametrize("writeback", [False, True])
def test_clear_empties_the_shelf_for_good(opened, writeback):
    with opened(writeback=writeback) as shelf:
        shelf.update({str(i): [i] for i in range(300)})
        assert shelf["7"] == [7]
        shelf.clear()
        assert dict(shelf) == {}
        assert len(shelf) == 0
        shelf["new"] = 1
    with opened() as shelf:
        assert dict(shelf) == {"new": 1}


@pytest.mark.parametrize("writeback", [False, True])
def test_pop_and_popitem_take_values_for_good(opened, writeback):
    with opened(writeback=writeback) as shelf:
        shelf.update({str(i): [i] for i in range(50)})
        assert shelf["7"] == [7]
        assert shelf.pop("7") == [7]
        taken = dict(shelf.popitem() for _ in range(49))
        assert taken == {str(i): [i] for i in range(50) if i != 7}
    with opened() as shelf:
        assert dict(shelf) == {}


def test_closing_a_shelf_closes_its_database(opened):
    shelf = opened()
    shelf["key"] = 1
    database = shelf.dict
    shelf.close()
    shelf.close()
    with pytest.raises(dbm_bitcask.error):
        database[b"key"]
    with pytest.raises(ValueError, match="closed"):
        shelf["key"]


@pytest.mark.parametrize("turn", range(3))
def test_shelf_can_be_changed_while_iterating(opened, turn):
    with opened() as shelf:
        shelf.update({str(i): i for i in range(100)})
        seen = []
        for key in shelf:
            seen.append(key)
            if turn == 0:
                shelf[key] = -1
            elif turn == 1:
                del shelf[key]
            else:
                shelf[key + "x"] = 0
            assert len(seen) < 1000
        assert sorted(key for key in seen if not key.endswith("x")) == sorted(str(i) for i in range(100))


def test_shelf_opened_for_reading_refuses_to_write_and_closes_quietly(path):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["key"] = [1]
    with dbm_bitcask.open_shelf(path, "r") as shelf:
        assert shelf["key"] == [1]
        with pytest.raises(dbm_bitcask.error, match="reading only"):
            shelf["key"] = 2
        with pytest.raises(dbm_bitcask.error, match="reading only"):
            del shelf["key"]
        with pytest.raises(dbm_bitcask.error, match="reading only"):
            shelf.clear()
    with dbm_bitcask.open_shelf(path, "r") as shelf:
        assert dict(shelf) == {"key": [1]}


def test_flags_of_open_shelf_are_those_of_open(path):
    with pytest.raises(FileNotFoundError):
        dbm_bitcask.open_shelf(path, "w")
    with pytest.raises(ValueError, match="Flag must be one of"):
        dbm_bitcask.open_shelf(path, "x")
    with dbm_bitcask.open_shelf(path, "c") as shelf:
        shelf["key"] = 1
    with dbm_bitcask.open_shelf(path, "n") as shelf:
        assert dict(shelf) == {}


def test_open_shelf_passes_options_to_open(path):
    with dbm_bitcask.open_shelf(path, segment_size=4096, sync="always") as shelf:
        for i in range(100):
            shelf[str(i)] = "x" * 200
        assert shelf.dict.stats().segments > 3
    with pytest.raises(ValueError, match="segment_size"):
        dbm_bitcask.open_shelf(path, segment_size=1)
    with pytest.raises(TypeError):
        dbm_bitcask.open_shelf(path, unknown=1)


def test_open_shelf_with_a_bad_protocol_leaves_the_database_as_it_was(path):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["key"] = 1
        with dbm_bitcask.open_shelf(path, protocol=99) as bad, pytest.raises(ValueError, match="protocol"):
            bad["key"] = 2
        assert dict(shelf) == {"key": 1}


def test_merging_under_a_shelf_keeps_its_values(opened):
    with opened() as shelf:
        for turn in range(5):
            shelf.update({str(i): [turn, i] for i in range(50)})
        shelf.dict.reorganize()
        assert dict(shelf) == {str(i): [4, i] for i in range(50)}
    with opened() as shelf:
        assert dict(shelf) == {str(i): [4, i] for i in range(50)}


def test_forty_shelves_are_open_at_once(tmp_path):
    shelves = [dbm_bitcask.open_shelf(tmp_path / str(i)) for i in range(40)]
    for i, shelf in enumerate(shelves):
        shelf["key"] = i
    assert [shelf["key"] for shelf in shelves] == list(range(40))
    for shelf in shelves:
        shelf.close()


def test_shelf_is_read_by_a_new_interpreter(path):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf.update(VALUES)
    script = """
import dbm_bitcask, shelve, sys
with shelve.Shelf(dbm_bitcask.open(sys.argv[1], "r")) as shelf:
    print(len(shelf), shelf["date"], shelf["counter"]["s"])
"""
    assert run_python(script, path).split() == [str(len(VALUES)), "2024-02-29", "4"]


# What newer versions of the standard library have, on every version.


JSON = {"serializer": lambda value, _: json.dumps(value), "deserializer": json.loads}

NEW_SHELVES = {
    "Shelf": lambda path, **options: dbm_bitcask.Shelf(dbm_bitcask.open(path), **options),
    "open_shelf": lambda path, **options: dbm_bitcask.open_shelf(path, **options),
}


@pytest.fixture(params=NEW_SHELVES.values(), ids=NEW_SHELVES)
def ours(request, path):
    """Opens a shelf of ours at `path`, in either way."""
    return lambda **options: request.param(path, **options)


def test_serializer_and_deserializer_take_the_place_of_pickle(ours, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "dumps", None)
    with ours(**JSON) as shelf:
        shelf["größe"] = {"a": [1, None, "x"]}
        assert shelf.dict["größe".encode()] == b'{"a": [1, null, "x"]}'
        assert shelf["größe"] == shelf.get("größe") == {"a": [1, None, "x"]}
        assert list(shelf.items()) == [("größe", {"a": [1, None, "x"]})]
        assert list(shelf.values()) == [{"a": [1, None, "x"]}]
    with ours(**JSON) as shelf:
        assert shelf.popitem() == ("größe", {"a": [1, None, "x"]})


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, str])
def test_serializer_may_return_bytes_or_str_and_deserializer_gets_bytes(ours, kind):
    def serializer(value, _):
        return value if kind is str else kind(value.encode())

    seen = []
    with ours(serializer=serializer, deserializer=lambda data: seen.append(type(data)) or data.decode()) as shelf:
        shelf["key"] = "größe"
        assert shelf["key"] == "größe"
    assert seen == [bytes]


@pytest.mark.parametrize("wrong", [None, 5, ["a"], object()])
@pytest.mark.parametrize("writeback", [False, True])
def test_serializer_that_returns_something_else_is_a_type_error_and_changes_nothing(ours, wrong, writeback):
    with ours(writeback=writeback, serializer=lambda value, _: value, deserializer=bytes) as shelf:
        shelf["key"] = b"before"
        with pytest.raises(TypeError, match="values must be bytes or strings"):
            shelf["key"] = wrong
        assert dict(shelf) == {"key": b"before"}


@every_protocol
def test_serializer_gets_the_protocol(ours, protocol):
    got = []
    with ours(protocol=protocol, serializer=lambda _, protocol: got.append(protocol) or b"", deserializer=bytes) as shelf:
        shelf["key"] = 1
    assert got == [pickle.DEFAULT_PROTOCOL if protocol is None else protocol]


@pytest.mark.parametrize("name", JSON)
def test_serializer_without_deserializer_is_a_type_error_and_opens_nothing(ours, path, name):
    with dbm_bitcask.open(path) as db:
        db["key"] = b"1"
    with pytest.raises(TypeError, match="must be given together") as caught:
        dbm_bitcask.open_shelf(path, "n", **{name: JSON[name]})
    with pytest.raises(TypeError):
        ours(**{name: JSON[name]})
    assert isinstance(caught.value, getattr(shelve, "ShelveError", TypeError))
    with dbm_bitcask.open(path, "r") as db:
        assert db["key"] == b"1"


def test_serializer_works_with_writeback(ours):
    with ours(writeback=True, **JSON) as shelf:
        shelf["deep"] = {"a": []}
        shelf["deep"]["a"].append(1)
    with ours(writeback=True, **JSON) as shelf:
        for value in shelf.values():
            value["a"].append(2)
        shelf.get("deep")["a"].append(3)
    with ours(**JSON) as shelf:
        assert dict(shelf) == {"deep": {"a": [1, 2, 3]}}


def test_shelf_reads_what_shelve_wrote_and_the_other_way_round(ours, path):
    with shelve.Shelf(dbm_bitcask.open(path)) as shelf:
        shelf.update(VALUES)
    with ours() as shelf:
        assert dict(shelf.items()) == VALUES
        shelf["new"] = {1}
    with shelve.Shelf(dbm_bitcask.open(path)) as shelf:
        assert shelf["new"] == {1}


def test_no_operation_lists_all_keys(ours, monkeypatch):
    with ours() as shelf:
        shelf.update({str(number): number for number in range(1000)})
        monkeypatch.setattr(dbm_bitcask.Database, "keys", None)
        monkeypatch.setattr(dbm_bitcask.Database, "__contains__", None)
        assert shelf.get("7") == 7
        assert len(list(shelf)) == len(list(shelf.items())) == len(list(shelf.values())) == 1000
        for _ in range(500):
            shelf.popitem()
        shelf.update(shelf.items())
        shelf.clear()
        assert len(shelf) == 0


def steps(action):
    """How many lines of Python an action runs: its cost, on every machine the same."""
    count = 0

    def trace(_frame, event, _argument):
        nonlocal count
        count += event == "line"
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(former)
    return count


def get_all(shelf):
    for number in range(len(shelf)):
        shelf.get(str(number))


def pop_all(shelf):
    while shelf:
        shelf.popitem()


@pytest.mark.parametrize(
    ("action", "growth"),
    [
        (get_all, 5),
        (lambda shelf: list(shelf.items()), 5),
        (lambda shelf: shelf.update({str(number): 0 for number in range(len(shelf))}), 5),
        (pop_all, 5),
        (lambda shelf: shelf.clear(), 1.5),
    ],
    ids=["get", "items", "update", "popitem", "clear"],
)
def test_four_times_the_keys_take_four_times_the_work(tmp_path, action, growth):
    took = {}
    for size in 500, 2000:
        with dbm_bitcask.open_shelf(tmp_path / str(size)) as shelf:
            shelf.update({str(number): number for number in range(size)})
            took[size] = steps(lambda shelf=shelf: action(shelf))
    assert took[2000] <= growth * took[500]


def test_shelf_that_is_written_back_gives_out_what_it_keeps(ours):
    with ours(writeback=True) as shelf:
        shelf["key"] = [1]
        shelf["key"].append(2)
        assert shelf.get("key") is shelf["key"]
        assert list(shelf.items()) == [("key", [1, 2])]
        assert shelf.popitem() == ("key", [1, 2])
        assert "key" not in shelf
    with ours() as shelf:
        assert dict(shelf) == {}


def test_value_that_cannot_be_read_is_not_lost_by_popitem(ours):
    with ours() as shelf:
        shelf.dict[b"key"] = b"no pickle"
        with pytest.raises(pickle.UnpicklingError):
            shelf.popitem()
        assert shelf.dict[b"key"] == b"no pickle"
        shelf.clear()
        with pytest.raises(KeyError):
            shelf.popitem()


def test_error_of_a_deserializer_is_not_taken_for_a_missing_key(ours):
    def deserializer(_):
        raise KeyError("inside")

    with ours(serializer=lambda value, _: value, deserializer=deserializer) as shelf:
        shelf["key"] = b""
        with pytest.raises(KeyError, match="inside"):
            shelf.get("key", "default")


@pytest.mark.parametrize(
    "operation", [len, list, lambda shelf: shelf.get("key"), lambda shelf: list(shelf.items()), lambda shelf: shelf.clear()]
)
def test_closed_shelf_is_a_value_error(ours, operation):
    shelf = ours()
    shelf.close()
    with pytest.raises(ValueError, match="closed"):
        operation(shelf)


def size_of(path):
    return sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize("opened", ["Database", "Shelf"])
def test_reorganize_gives_back_space_and_keeps_everything(path, opened):
    opener = dbm_bitcask.open if opened == "Database" else dbm_bitcask.open_shelf
    with opener(path) as it:
        for number in range(1000):
            it[str(number)] = "v" * 100
        for number in range(0, 1000, 2):
            del it[str(number)]
        before = dict(it)
        it.sync()
        size = size_of(path)
        it.reorganize()
        assert dict(it) == before
    assert size_of(path) < size
    with opener(path, "r") as it:
        assert dict(it) == before
        with pytest.raises(dbm_bitcask.error, match="reading only"):
            it.reorganize()
    with opener(path, "c") as it:
        it["new"] = "v"
        it.reorganize()
        assert len(it) == 501


def test_reorganize_writes_back_first(ours):
    with ours(writeback=True) as shelf:
        shelf["key"] = []
        shelf["key"].append(1)
        shelf.reorganize()
        assert pickle.loads(shelf.dict[b"key"]) == [1]


class InBytes:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return bytes(self.path)


@pytest.mark.parametrize("kind", [str, bytes, pathlib.Path, InBytes])
def test_path_may_be_of_any_kind(path, kind):
    with dbm_bitcask.open_shelf(kind(path)) as shelf:
        shelf["key"] = 1
    with dbm_bitcask.open(kind(path), "r") as db:
        assert db.keys() == [b"key"]
    assert dbm_bitcask.whichdb(kind(path)) == "dbm_bitcask"


class Blob:
    def __init__(self, data):
        self.data = data


def test_big_objects_stay_in_the_database_and_are_read_once_each(path):
    with dbm_bitcask.open(path) as db:

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if isinstance(value, Blob):
                    key = f"blob {hashlib.sha256(value.data).hexdigest()}"
                    db.setdefault(key, value.data)
                    return key
                return None

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, key):
                return Blob(db[key])

        blob = Blob(b"x" * 100_000)
        for number in range(10):
            file = io.BytesIO()
            Pickler(file, 5).dump({"number": number, "blob": blob, "again": blob})
            db[f"item {number}"] = file.getvalue()
        assert len(db) == 11
        assert db.stats().live_bytes < 150_000
        item = Unpickler(io.BytesIO(db["item 7"])).load()
        assert (item["number"], item["blob"].data) == (7, blob.data)


# What fails, and what comes after it.


def test_sync_that_failed_can_be_called_again(path):
    with dbm_bitcask.open_shelf(path, writeback=True) as shelf:
        shelf["a"], shelf["b"] = [1], [1]
        shelf["a"].append(lambda: 0)  # which nothing can pickle
        with pytest.raises((AttributeError, pickle.PicklingError)):
            shelf.sync()
        shelf["a"].pop()
        shelf["b"].append(2)
        shelf.sync()
        with dbm_bitcask.open_shelf(path, "r") as reader:
            assert dict(reader) == {"a": [1], "b": [1, 2]}
        shelf["b"].append(3)
    with dbm_bitcask.open_shelf(path, "r") as reader:
        assert dict(reader) == {"a": [1], "b": [1, 2, 3]}


def test_close_whose_sync_fails_closes_the_database_and_goes_quietly(path):
    shelf = dbm_bitcask.open_shelf(path, writeback=True)
    database = shelf.dict
    shelf["a"] = [1]
    shelf["a"].append(lambda: 0)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        shelf.close()
    with pytest.raises(dbm_bitcask.error):
        database["a"]
    shelf.close()


@pytest.mark.parametrize("writeback", [False, True])
def test_pop_and_setdefault_are_one_step(path, writeback):
    """What somebody else does while a value is read is not lost, and no KeyError where there is a default."""
    other = dbm_bitcask.open_shelf(path)

    def load(data):
        other.pop("key", None)
        return pickle.loads(data)

    with other, dbm_bitcask.open_shelf(path, writeback=writeback, serializer=pickle.dumps, deserializer=load) as shelf:
        other["key"] = 1
        assert shelf.pop("key", "default") == 1
        assert shelf.pop("key", "default") == "default"
        with pytest.raises(KeyError):
            shelf.pop("key")

    def dump(value, protocol):
        other["key"] = "first"
        return pickle.dumps(value, protocol)

    with (
        dbm_bitcask.open_shelf(path) as other,
        dbm_bitcask.open_shelf(path, writeback=writeback, serializer=dump, deserializer=pickle.loads) as shelf,
    ):
        assert shelf.setdefault("key", "second") == "first" == other["key"]
        del shelf["key"]
        assert shelf.setdefault("key", "second") == "first"


@pytest.mark.parametrize("writeback", [False, True])
def test_setdefault_keeps_what_it_sets(path, writeback):
    with dbm_bitcask.open_shelf(path, writeback=writeback) as shelf:
        numbers = shelf.setdefault("key", [1])
        numbers.append(2)
        assert shelf["key"] == ([1, 2] if writeback else [1])
        assert shelf.setdefault("key", []) == shelf["key"]


def test_value_that_cannot_be_read_is_not_lost_by_pop(path):
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf.dict["key"] = b"no pickle"
        with pytest.raises(pickle.UnpicklingError):
            shelf.pop("key", None)
        assert shelf.dict["key"] == b"no pickle"


class Plain:
    """A mapping with the methods that `dbm.gnu` has, and no others."""

    def __init__(self):
        self._items = {}

    def __getitem__(self, key):
        return self._items[key]

    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]

    def __contains__(self, key):
        return key in self._items

    def __len__(self):
        return len(self._items)

    def keys(self):
        return list(self._items)


def test_over_another_mapping_it_does_what_a_shelf_does():
    with dbm_bitcask.Shelf(Plain()) as shelf:
        shelf.update({"a": 1, "b": 2, "c": 3, "d": 4})
        assert (shelf.get("a"), shelf.get("x", 0), shelf.setdefault("a", 5), shelf.setdefault("e", 5)) == (1, 0, 1, 5)
        assert sorted(shelf) == ["a", "b", "c", "d", "e"]
        assert sorted(shelf.items()) == [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)]
        assert sorted(shelf.values()) == [1, 2, 3, 4, 5]
        assert (shelf.pop("a"), shelf.pop("a", 0)) == (1, 0)
        assert len([shelf.popitem()]) == 1
        for key in shelf:
            del shelf[key]
        shelf["f"] = 6
        shelf.clear()
        assert len(shelf) == 0


def test_serializer_that_returns_nothing_is_a_type_error_over_any_mapping():
    with dbm_bitcask.Shelf({}, serializer=lambda _value, _protocol: None, deserializer=pickle.loads) as shelf:
        with pytest.raises(TypeError, match="NoneType"):
            shelf["key"] = 1
        assert "key" not in shelf


def test_shelf_that_keeps_values_is_neither_copied_nor_pickled(path):
    with dbm_bitcask.open_shelf(path, writeback=True) as shelf:
        for copied in (copy.copy, pickle.dumps):
            with pytest.raises(TypeError, match="writeback"):
                copied(shelf)
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["key"] = 1
        with pickle.loads(pickle.dumps(shelf)) as other:
            assert other["key"] == 1
