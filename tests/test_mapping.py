"""The contract of a MutableMapping and of a dbm object, under each option that changes what the engine does."""

from __future__ import annotations

import array
import dataclasses
from collections import UserDict
from collections.abc import Iterator, MutableMapping

import pytest

import dbm_bitcask

BYTES_LIKE = {
    "bytes": bytes,
    "str": bytes.decode,
    "bytearray": bytearray,
    "memoryview": memoryview,
}

NEITHER_BYTES_NOR_STR = [None, 1, 1.5, ("a",), ["a"], object()]

every_kind = pytest.mark.parametrize("kind", BYTES_LIKE.values(), ids=BYTES_LIKE)
every_wrong_type = pytest.mark.parametrize("wrong", NEITHER_BYTES_NOR_STR, ids=lambda wrong: type(wrong).__name__)


@pytest.fixture
def options(each_option):
    return each_option


@pytest.fixture
def reopen(db, path, options):
    """Closes the database and opens it again."""
    opened = []

    def reopen(flag="w"):
        for handle in (db, *opened):
            handle.close()
        opened.append(dbm_bitcask.open(path, flag, **options))
        return opened[-1]

    yield reopen
    for handle in opened:
        handle.close()


def numbered(count):
    return {b"key %d" % i: b"value %d" % i for i in range(count)}


class RaisedError(Exception):
    pass


class Keyed:
    """As much of a mapping as `dict.update` asks for."""

    def __init__(self, items=()):
        self.data = dict(items)

    def keys(self):
        return self.data.keys()

    def __getitem__(self, key):
        return self.data[key]


class FailingKeys(Keyed):
    def keys(self):
        raise RaisedError


class FailingIteratorOfKeys(Keyed):
    def keys(self):
        yield b"a"
        raise RaisedError


class FailingItem(Keyed):
    def __getitem__(self, key):
        raise RaisedError


def failing_pairs():
    yield b"a", b"1"
    raise RaisedError


def test_database_is_a_mutable_mapping(db):
    assert isinstance(db, dbm_bitcask.Database)
    assert isinstance(db, MutableMapping)


# Keys and values


@every_kind
def test_each_kind_of_key_names_the_same_value(db, kind):
    db[kind(b"key")] = b"value"
    assert db[b"key"] == b"value"
    assert db[kind(b"key")] == b"value"
    assert kind(b"key") in db
    assert db.get(kind(b"key")) == b"value"
    assert db.setdefault(kind(b"key"), b"other") == b"value"
    assert db.pop(kind(b"key")) == b"value"
    assert kind(b"key") not in db


@every_kind
def test_each_kind_of_key_can_be_deleted(db, kind):
    db[b"key"] = b"value"
    del db[kind(b"key")]
    assert db.keys() == []


@every_kind
def test_each_kind_of_value_is_stored(db, kind):
    db[b"key"] = kind(b"value")
    assert db[b"key"] == b"value"
    db.update({b"other": kind(b"value")})
    assert db[b"other"] == b"value"
    db.setdefault(b"third", kind(b"value"))
    assert db[b"third"] == b"value"


def test_keys_and_values_come_back_as_bytes(db):
    db["key"] = bytearray(b"value")
    assert type(db["key"]) is bytes
    assert [type(key) for key in db] == [bytes]
    assert list(map(type, db.keys())) == [bytes]
    assert [type(part) for item in db.items() for part in item] == [bytes, bytes]


def test_str_is_utf8(db):
    db["größe"] = "日本"
    assert dict(db) == {"größe".encode(): "日本".encode()}


def test_str_that_utf8_cannot_express_is_refused(db):
    with pytest.raises(UnicodeEncodeError):
        db["\ud800"] = b""
    with pytest.raises(UnicodeEncodeError):
        db[b"key"] = "\ud800"
    assert not db


def test_view_with_gaps_is_stored_as_its_bytes(db):
    db[memoryview(b"k-e-y-")[::2]] = memoryview(b"abcdef")[::-1]
    assert dict(db) == {b"key": b"fedcba"}


def test_view_of_wide_items_is_stored_as_its_bytes(db):
    wide = array.array("I", [1, 2, 3])
    db[memoryview(wide)] = memoryview(wide)
    db[b"array"] = wide
    assert dict(db) == {wide.tobytes(): wide.tobytes(), b"array": wide.tobytes()}


def test_value_is_what_it_was_when_it_was_stored(db):
    value = bytearray(b"before")
    db[b"key"] = value
    value[:] = b"after!"
    assert db[b"key"] == b"before"


def test_empty_key_and_empty_value_are_like_any_other(db, reopen):
    db[b""] = b"of the empty key"
    db[b"of the empty value"] = b""
    assert db[""] == b"of the empty key"
    assert db["of the empty value"] == b""
    db = reopen()
    assert dict(db) == {b"": b"of the empty key", b"of the empty value": b""}
    db[b""] = b""
    assert b"" in db
    assert db.pop(b"") == b""
    assert b"" not in db


def test_bytes_of_every_value_round_trip(db, reopen):
    expected = {bytes([byte]): bytes([byte]) * 3 for byte in range(256)}
    db.update(expected)
    assert dict(db) == expected
    assert dict(reopen()) == expected


def test_keys_with_a_common_beginning_are_different_keys(db):
    expected = {b"\0" * length: b"%d" % length for length in range(40)}
    db.update(expected)
    assert dict(db) == expected


@pytest.mark.parametrize("size", [4000, 4096, 5000, 100_000, 1_500_000])
def test_value_may_be_larger_than_a_segment_or_a_page(db, reopen, size):
    db[b"before"] = b"1"
    db[b"large"] = b"x" * size
    db[b"after"] = b"2"
    assert db[b"large"] == b"x" * size
    assert dict(reopen()) == {b"before": b"1", b"large": b"x" * size, b"after": b"2"}


def test_key_may_be_larger_than_a_segment(db, reopen):
    keys = [b"x" * 9999 + bytes([last]) for last in range(5)]
    db.update(dict.fromkeys(keys, b"value"))
    assert sorted(db) == keys
    assert sorted(reopen()) == keys


@every_wrong_type
def test_key_of_another_type_is_a_type_error(db, wrong):
    db[b"key"] = b"value"
    message = "keys must be bytes or strings"
    with pytest.raises(TypeError, match=message):
        db[wrong]
    with pytest.raises(TypeError, match=message):
        db[wrong] = b"value"
    with pytest.raises(TypeError, match=message):
        del db[wrong]
    with pytest.raises(TypeError, match=message):
        _ = wrong in db
    with pytest.raises(TypeError, match=message):
        db.get(wrong)
    with pytest.raises(TypeError, match=message):
        db.pop(wrong, None)
    with pytest.raises(TypeError, match=message):
        db.setdefault(wrong, b"value")
    with pytest.raises(TypeError, match=message):
        db.update({1: b"value"})
    assert dict(db) == {b"key": b"value"}


@every_wrong_type
def test_value_of_another_type_is_a_type_error_and_changes_nothing(db, wrong):
    db[b"key"] = b"value"
    with pytest.raises(TypeError):
        db[b"key"] = wrong
    with pytest.raises(TypeError):
        db[b"new"] = wrong
    with pytest.raises(TypeError):
        db.setdefault(b"new", wrong)
    assert dict(db) == {b"key": b"value"}


# One key


def test_missing_key_is_a_key_error_that_names_it(db):
    db[b"key"] = b"value"
    with pytest.raises(KeyError) as failure:
        db[b"missing"]
    assert failure.value.args == (b"missing",)
    with pytest.raises(KeyError) as failure:
        del db[b"missing"]
    assert failure.value.args == (b"missing",)
    with pytest.raises(KeyError):
        db.pop(b"missing")


def test_last_value_wins(db, reopen):
    for value in (b"1", b"22", b"", b"333"):
        db[b"key"] = value
        assert db[b"key"] == value
    assert len(db) == 1
    assert dict(reopen()) == {b"key": b"333"}


def test_deleted_key_is_gone(db, reopen):
    db.update(numbered(3))
    del db[b"key 1"]
    assert b"key 1" not in db
    assert len(db) == 2
    with pytest.raises(KeyError):
        db[b"key 1"]
    with pytest.raises(KeyError):
        del db[b"key 1"]
    assert sorted(reopen()) == [b"key 0", b"key 2"]


def test_deleted_key_can_be_set_again(db, reopen):
    for value in (b"1", b"2", b"3"):
        db[b"key"] = value
        del db[b"key"]
    assert not db
    db[b"key"] = b"4"
    assert dict(db) == {b"key": b"4"}
    assert dict(reopen()) == {b"key": b"4"}


def test_get_returns_the_default_for_a_missing_key_only(db):
    db[b"key"] = b""
    default = object()
    assert db.get(b"key", default) == b""
    assert db.get(b"missing") is None
    assert db.get(b"missing", default) is default
    assert db.get("missing", default) is default


def test_setdefault_keeps_a_value_that_is_there(db):
    db[b"key"] = b""
    assert db.setdefault(b"key", b"default") == b""
    assert db.setdefault(b"key") == b""
    assert db.setdefault(b"new", b"default") == b"default"
    assert dict(db) == {b"key": b"", b"new": b"default"}


def test_pop_removes_and_returns(db, reopen):
    db.update(numbered(3))
    assert db.pop(b"key 1") == b"value 1"
    assert db.pop(b"key 1", None) is None
    assert db.pop(b"key 1", b"default") == b"default"
    assert db.pop(b"key 2", b"default") == b"value 2"
    assert dict(reopen()) == {b"key 0": b"value 0"}


def test_popitem_removes_and_returns_some_item(db, reopen):
    expected = numbered(3)
    db.update(expected)
    key, value = db.popitem()
    assert expected.pop(key) == value
    assert dict(db) == expected
    assert dict(reopen()) == expected


def test_popitem_of_an_empty_database_is_a_key_error(db):
    with pytest.raises(KeyError):
        db.popitem()
    db[b"key"] = b"value"
    db.popitem()
    with pytest.raises(KeyError):
        db.popitem()


def test_loop_of_popitem_takes_every_item_once(db, reopen):
    expected = numbered(300)
    db.update(expected)
    popped = []
    while db:
        popped.append(db.popitem())
    assert sorted(popped) == sorted(expected.items())
    assert not reopen()


def test_loop_of_popitem_takes_what_is_set_meanwhile(db):
    db.update(numbered(20))
    popped = []
    while db:
        key, _ = db.popitem()
        popped.append(key)
        if len(popped) == 5:
            db[b"late"] = b"value"
            db[popped[0]] = b"again"
    assert sorted(popped) == sorted([*numbered(20), popped[0], b"late"])


# Many keys at once


@pytest.mark.parametrize("form", [dict, UserDict, Keyed, list, iter, lambda pairs: ([*pair] for pair in pairs)])
def test_update_takes_what_dict_update_takes(db, form):
    db[b"a"] = b"0"
    db[b"kept"] = b"k"
    db.update(form([(b"a", b"1"), ("b", "2")]))
    assert dict(db) == {b"a": b"1", b"b": b"2", b"kept": b"k"}


def test_update_takes_keyword_arguments(db):
    db.update(a=b"1")
    db.update({b"b": b"2"}, c="3", a="4")
    db.update()
    assert dict(db) == {b"a": b"4", b"b": b"2", b"c": b"3"}


def test_update_takes_another_database(db, tmp_path):
    with dbm_bitcask.open(tmp_path / "other") as other:
        other.update(numbered(10))
        db.update(other)
    assert dict(db) == numbered(10)


def test_update_with_itself_changes_nothing(db):
    db.update(numbered(10))
    db.update(db)
    assert dict(db) == numbered(10)


@pytest.mark.parametrize(
    "argument",
    [
        FailingKeys,
        lambda: FailingIteratorOfKeys({b"a": b"1"}),
        lambda: FailingItem({b"a": b"1"}),
        failing_pairs,
    ],
    ids=["keys", "iterator of keys", "item", "iterator of pairs"],
)
def test_update_passes_on_what_its_argument_raises(db, argument):
    db[b"before"] = b"0"
    with pytest.raises(RaisedError):
        db.update(argument())
    db[b"after"] = b"2"
    assert {key: db[key] for key in db if key != b"a"} == {b"before": b"0", b"after": b"2"}


@pytest.mark.parametrize("argument", [None, 42, [b"abc"], [(b"a",)], [1]], ids=repr)
def test_update_refuses_what_is_no_mapping_and_no_pairs(db, argument):
    with pytest.raises((TypeError, ValueError)):
        db.update(argument)
    assert not db


def test_update_takes_one_positional_argument(db):
    with pytest.raises(TypeError):
        db.update({}, {})


@pytest.mark.parametrize("argument", [{b"a": b"1", "b": "2"}, [(b"a", b"1"), ("b", "2")]], ids=["mapping", "pairs"])
def test_in_place_or_updates_the_same_object(db, argument):
    before = db
    db |= argument
    assert db is before
    assert dict(db) == {b"a": b"1", b"b": b"2"}


def test_in_place_or_refuses_what_is_no_mapping_and_no_pairs(db):
    with pytest.raises(TypeError):
        db |= 5


def test_clear_leaves_an_empty_database_that_works(db, reopen):
    db.update(numbered(200))
    db.clear()
    assert len(db) == 0
    assert db.keys() == []
    assert b"key 1" not in db
    with pytest.raises(KeyError):
        db[b"key 1"]
    db.clear()
    db[b"key 1"] = b"new"
    assert dict(db) == {b"key 1": b"new"}
    assert dict(reopen()) == {b"key 1": b"new"}


def test_cleared_database_stays_empty(db, reopen):
    db.update(numbered(200))
    db.clear()
    assert dict(reopen()) == {}


def test_five_hundred_keys_set_overwritten_and_deleted(db, reopen):
    expected = numbered(500)
    db.update(expected)
    for key in list(expected)[::3]:
        db[key] = expected[key] = b"overwritten " * 5
    for key in list(expected)[::4]:
        del db[key], expected[key]
    assert len(db) == len(expected)
    assert dict(db) == expected
    db = reopen()
    assert len(db) == len(expected)
    assert dict(db) == expected
    assert [db[key] for key in expected] == list(expected.values())


# The whole


def test_len_counts_keys(db, reopen):
    for count in range(1, 6):
        db[b"%d" % count] = b""
        db[b"%d" % count] = b"again"
        assert len(db) == count
    del db[b"1"]
    assert len(db) == 4
    assert len(reopen()) == 4


def test_database_is_true_unless_empty(db):
    assert not db
    db[b""] = b""
    assert db
    del db[b""]
    assert not db


def test_keys_is_a_list_of_its_own(db):
    assert db.keys() == []
    db.update(a=b"1", b=b"2")
    keys = db.keys()
    assert type(keys) is list
    assert sorted(keys) == [b"a", b"b"]
    del db[b"a"]
    assert sorted(keys) == [b"a", b"b"]


def test_iter_is_an_iterator_over_the_keys(db):
    db.update(numbered(3))
    keys = iter(db)
    assert isinstance(keys, Iterator)
    assert sorted(keys) == sorted(numbered(3))
    assert list(keys) == []


def test_items_and_values_fit_the_keys(db):
    expected = numbered(50)
    db.update(expected)
    assert sorted(db.items()) == sorted(expected.items())
    assert sorted(db.values()) == sorted(expected.values())
    assert list(zip(db, db.values(), strict=True)) == list(db.items())
    assert len(db.items()) == len(db.values()) == 50
    assert (b"key 1", b"value 1") in db.items()
    assert (b"key 1", b"value 2") not in db.items()
    assert b"value 1" in db.values()


def test_contains_is_about_keys(db):
    db[b"key"] = b"value"
    assert b"key" in db
    assert "key" in db
    assert b"value" not in db


def test_database_equals_a_mapping_with_the_same_items(db, tmp_path):
    assert db == {}
    db.update(a=b"1", b=b"2")
    assert db == {b"a": b"1", b"b": b"2"}
    assert db != {b"a": b"1", b"b": b"3"}
    assert db != {b"a": b"1"}
    assert db != {"a": "1", "b": "2"}
    assert db != [b"a", b"b"]
    with dbm_bitcask.open(tmp_path / "other") as other:
        assert db != other
        other.update(b=b"2", a=b"1")
        assert db == other


def test_repr_tells_the_path_open_and_closed(db, path):
    assert str(path) in repr(db)
    db.close()
    assert str(path) in repr(db)


# firstkey and nextkey


def test_firstkey_of_an_empty_database_is_none(db):
    assert db.firstkey() is None
    db[b"key"] = b"value"
    del db[b"key"]
    assert db.firstkey() is None


def test_nextkey_of_the_last_key_is_none(db):
    db[b"key"] = b"value"
    assert db.firstkey() == b"key"
    assert db.nextkey(b"key") is None
    assert db.nextkey("key") is None


def test_empty_key_is_visited_by_nextkey(db):
    db.update({b"": b"1", b"a": b"2", b"b": b"3"})
    assert sorted(chain(db)) == [b"", b"a", b"b"]


def chain(db, visit=lambda _key: None):
    """The keys in the order of firstkey and nextkey; `visit` is called with each before the next is asked for."""
    seen = []
    key = db.firstkey()
    while key is not None:
        seen.append(key)
        assert len(seen) < 10_000, "the loop does not end"
        visit(key)
        key = db.nextkey(key)
    return seen


def test_nextkey_visits_every_key_once(db):
    db.update(numbered(300))
    assert sorted(chain(db)) == sorted(numbered(300))


def test_nextkey_visits_the_survivors_of_deletions_and_overwriting(db):
    expected = numbered(300)
    db.update(expected)
    for key in list(expected)[::3]:
        db[key] = b"again"
    for key in list(expected)[::2]:
        del db[key], expected[key]
    assert sorted(chain(db)) == sorted(expected)


def test_nextkey_goes_on_from_a_key_that_was_just_deleted(db):
    db.update(numbered(300))
    assert sorted(chain(db, db.__delitem__)) == sorted(numbered(300))
    assert not db


def test_nextkey_asked_before_deleting_visits_every_key_once(db):
    db.update(numbered(300))
    seen = []
    key = db.firstkey()
    while key is not None:
        seen.append(key)
        following = db.nextkey(key)
        del db[key]
        key = following
    assert sorted(seen) == sorted(numbered(300))
    assert not db


def test_loop_of_firstkey_and_deletion_empties_the_database(db):
    db.update(numbered(300))
    seen = []
    while (key := db.firstkey()) is not None:
        seen.append(key)
        del db[key]
    assert sorted(seen) == sorted(numbered(300))


def test_nextkey_goes_on_from_a_key_that_was_just_overwritten(db):
    db.update(numbered(300))
    assert sorted(chain(db, lambda key: db.__setitem__(key, b"again"))) == sorted(numbered(300))
    assert set(db.values()) == {b"again"}


def test_nextkey_visits_every_key_once_while_others_are_added(db):
    db.update(numbered(100))
    seen = chain(db, lambda key: db.__setitem__(b"new " + key[:20], b"") if key in numbered(100) else None)
    assert sorted(set(seen) & set(numbered(100))) == sorted(numbered(100))
    assert len(seen) == len(set(seen))


def test_nested_loops_of_nextkey_do_not_disturb_each_other(db):
    db.update(numbered(12))
    inner = []
    outer = chain(db, lambda _key: inner.append(sorted(chain(db))))
    assert sorted(outer) == sorted(numbered(12))
    assert inner == [sorted(numbered(12))] * 12


def test_iteration_does_not_disturb_nextkey(db):
    db.update(numbered(12))
    assert sorted(chain(db, lambda _key: list(db))) == sorted(numbered(12))


# Merge, sync, statistics


def bytes_on_disk(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("method", ["reorganize", "merge"])
def test_merge_gives_back_the_space_of_what_was_deleted(db, path, reopen, method):
    expected = {b"%05d" % i: b"x" * 200 for i in range(600)}
    db.update(expected)
    for key in list(expected)[::2]:
        del db[key], expected[key]
    db.sync()
    before = bytes_on_disk(path)
    getattr(db, method)()
    assert dict(db) == expected
    db.close()
    assert bytes_on_disk(path) < before
    assert dict(reopen()) == expected


@pytest.mark.parametrize("method", ["reorganize", "merge"])
def test_merge_of_an_empty_database_leaves_it_empty(db, reopen, method):
    getattr(db, method)()
    assert not db
    getattr(db, method)()
    db[b"key"] = b"value"
    assert dict(reopen()) == {b"key": b"value"}


def test_deleted_keys_stay_deleted_through_merges(db, path, reopen):
    db.update(numbered(200))
    db.reorganize()
    for key in numbered(200):
        del db[key]
    db.reorganize()
    assert not db
    db = reopen()
    assert not db
    db.close()
    (path / "keydir").unlink(missing_ok=True)
    assert not reopen()


def test_database_works_on_after_a_merge(db, reopen):
    expected = {}
    for turn in range(4):
        for i in range(60):
            db[b"%d" % i] = expected[b"%d" % i] = b"turn %d" % turn * 10
        del db[b"%d" % turn], expected[b"%d" % turn]
        db.reorganize()
        assert dict(db) == expected
    assert dict(reopen()) == expected


def test_sync_changes_nothing_that_is_seen(db):
    db.sync()
    db.update(numbered(10))
    db.sync()
    db.sync()
    assert dict(db) == numbered(10)


def test_unsynced_writes_are_seen_by_another_handle_at_once(db, path, options):
    with dbm_bitcask.open(path, "w", **options) as other, dbm_bitcask.open(path, "r") as reader:
        db[b"key"] = b"1"
        assert other[b"key"] == reader[b"key"] == b"1"
        other[b"key"] = b"2"
        assert db[b"key"] == reader[b"key"] == b"2"
        del db[b"key"]
        assert b"key" not in other
        assert b"key" not in reader
        other.update(numbered(50))
        assert dict(db) == dict(reader) == numbered(50)
        db.clear()
        assert len(other) == len(reader) == 0


def test_stats_is_a_dataclass_that_counts_keys(db):
    db.update(numbered(10))
    del db[b"key 3"]
    stats = db.stats()
    assert dataclasses.is_dataclass(stats)
    assert stats.keys == 9
    assert stats.segments >= 1


def test_stats_tells_live_from_dead_bytes(db):
    db.update(numbered(10))
    fresh = db.stats()
    assert fresh.live_bytes >= sum(len(key) + len(value) for key, value in numbered(10).items())
    db[b"key 1"] = b"again"
    assert db.stats().dead_bytes > fresh.dead_bytes


def test_merge_leaves_more_live_than_dead_bytes(db):
    for turn in range(20):
        db.update(dict.fromkeys(numbered(40), b"%d" % turn * 10))
    db.reorganize()
    stats = db.stats()
    assert stats.keys == 40
    assert stats.live_bytes >= sum(len(key) + len(value) for key, value in db.items())
    assert stats.dead_bytes < stats.live_bytes


def test_segments_are_rotated_at_the_size_that_was_asked_for(path):
    with dbm_bitcask.open(path, segment_size=4096) as db:
        for i in range(300):
            db[b"%d" % i] = b"x" * 100
        assert db.stats().segments > 5
        db.sync()
        assert max(file.stat().st_size for file in path.glob("*.data")) <= 4096
