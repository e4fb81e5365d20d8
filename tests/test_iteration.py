"""Changing a database while iterating it: whatever is present all the time is seen exactly once, and the loop ends."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dbm_bitcask
from dbm_bitcask.engine import walk as walk_module
from dbm_bitcask.engine.check import check

KEYS = {b"key %d" % i: b"value %d" % i for i in range(200)}
NEVER_ENDING = 10_000


@pytest.fixture
def options(each_option):
    return each_option


@pytest.fixture
def full(db):
    db.update(KEYS)
    return db


def bounded(iterable):
    """All of an iterable that ends."""
    seen = list(islice(iterable, NEVER_ENDING))
    assert len(seen) < NEVER_ENDING, "the loop does not end"
    return seen


def visiting(iterable, change):
    """All of an iterable, with a change of the database after each step."""

    def steps():
        for step, item in enumerate(iterable):
            yield item
            change(step, item)

    return bounded(steps())


def test_without_changes_every_key_is_seen_once(full):
    assert sorted(bounded(full)) == sorted(KEYS)


def test_loop_that_inserts_a_key_each_step_ends(full):
    seen = visiting(full, lambda step, _key: full.__setitem__(b"new %d" % step, b""))
    assert Counter(key for key in seen if key in KEYS) == Counter(KEYS.keys())
    assert len(full) == len(KEYS) + len(seen)


def test_overwritten_keys_are_seen_once(full):
    seen = visiting(full, lambda step, key: full.__setitem__(key, b"again %d" % step))
    assert sorted(seen) == sorted(KEYS)


def test_keys_overwritten_before_their_turn_are_seen_once(full):
    ahead = sorted(KEYS)
    seen = visiting(full, lambda step, _key: full.__setitem__(ahead[-1 - step % len(ahead)], b"again"))
    assert sorted(seen) == sorted(KEYS)


def test_all_keys_overwritten_again_and_again_are_seen_once(full):
    seen = visiting(full, lambda step, _key: full.update(dict.fromkeys(KEYS, b"%d" % step)) if step % 50 == 0 else None)
    assert sorted(seen) == sorted(KEYS)


def test_each_key_can_be_deleted_when_it_is_seen(full):
    seen = visiting(full, lambda _step, key: full.__delitem__(key))
    assert sorted(seen) == sorted(KEYS)
    assert not full


def test_key_deleted_before_its_turn_is_not_seen(full):
    keys = iter(full)
    first = next(keys)
    for key in KEYS:
        if key != first:
            del full[key]
    assert bounded(keys) == []


def test_half_of_the_keys_deleted_leaves_the_other_half_seen_once(full):
    doomed = sorted(KEYS)[::2]
    seen = visiting(full, lambda _step, _key: full.pop(doomed.pop(), None) if doomed else None)
    kept = sorted(KEYS)[1::2]
    assert sorted(key for key in seen if key in kept) == kept


@pytest.mark.parametrize("every", [1, 40])
def test_merging_while_iterating_shows_every_key_once(full, every):
    for key in sorted(KEYS)[::2]:
        full[key] = b"again"
    seen = visiting(full, lambda step, _key: full.reorganize() if step % every == 0 else None)
    assert sorted(seen) == sorted(KEYS)


def test_merging_and_overwriting_while_iterating_shows_every_key_once(full):
    def change(step, key):
        full[key] = b"again %d" % step
        if step % 30 == 0:
            full.reorganize()

    assert sorted(visiting(full, change)) == sorted(KEYS)


def test_clear_ends_the_loop(full):
    keys = iter(full)
    assert next(keys) in KEYS
    full.clear()
    assert bounded(keys) == []


def test_key_deleted_and_set_again_does_not_hide_the_others(full):
    def change(_step, key):
        value = full.pop(key)
        full[key] = value

    assert set(visiting(full, change)) == set(KEYS)


def test_items_overwritten_while_iterating_carry_a_value_that_was_there(full):
    seen = visiting(full.items(), lambda _step, _item: full.update({b"key 7": b"a", b"key 190": b"b"}))
    assert Counter(key for key, _ in seen) == Counter(KEYS.keys())
    allowed = {
        **{key: {value} for key, value in KEYS.items()},
        b"key 7": {b"value 7", b"a"},
        b"key 190": {b"value 190", b"b"},
    }
    assert all(value in allowed[key] for key, value in seen)


@pytest.mark.parametrize("view", ["items", "values"])
def test_deleting_what_a_view_has_not_reached_does_not_break_it(full, view):
    doomed = sorted(KEYS)
    bounded_view = visiting(getattr(full, view)(), lambda _step, _item: full.pop(doomed.pop(), None) if doomed else None)
    assert len(bounded_view) <= len(KEYS)


def test_keys_is_a_snapshot_that_can_be_deleted_from(full):
    for key in full.keys():  # noqa: SIM118  (the list is the point)
        del full[key]
    assert not full


def test_iterators_are_independent(full):
    one, two = iter(full), iter(full)
    ahead = [next(one) for _ in range(50)]
    assert sorted(bounded(two)) == sorted(KEYS)
    assert sorted(ahead + bounded(one)) == sorted(KEYS)


def test_abandoned_iterator_holds_nothing_up(full):
    keys = iter(full)
    next(keys)
    full.clear()
    full.reorganize()
    full[b"key"] = b"value"
    del keys
    assert dict(full) == {b"key": b"value"}


def test_exhausted_iterator_stays_exhausted(full):
    keys = iter(full)
    bounded(keys)
    full[b"new"] = b""
    assert bounded(keys) == []


def test_iterator_of_a_closed_database_is_an_error(full):
    keys = iter(full)
    next(keys)
    full.close()
    with pytest.raises(dbm_bitcask.error, match="DBM object has already been closed"):
        next(keys)


def test_changes_through_another_handle_while_iterating_show_every_key_once(full, path, options):
    with dbm_bitcask.open(path, "w", **options) as other:

        def change(step, key):
            other[key] = b"again"
            other[b"new %d" % step] = b""
            if step % 50 == 0:
                other.reorganize()

        seen = visiting(full, change)
    assert Counter(key for key in seen if key in KEYS) == Counter(KEYS.keys())


def test_merge_by_a_writer_leaves_the_iteration_of_a_reader_whole(full, path):
    with dbm_bitcask.open(path, "r") as reader:
        keys = iter(reader)
        seen = [next(keys) for _ in range(20)]
        full.update(dict.fromkeys(KEYS, b"again"))
        full.reorganize()
        assert sorted(seen + bounded(keys)) == sorted(KEYS)


some_key = st.integers(0, 24).map(lambda i: b"%d" % i)
change = st.one_of(
    st.tuples(st.just("set"), some_key, st.integers(0, 900)),
    st.tuples(st.just("delete"), some_key, st.just(0)),
    st.tuples(st.just("merge"), st.just(b""), st.just(0)),
    st.tuples(st.just("clear"), st.just(b""), st.just(0)),
    st.tuples(st.just("nothing"), st.just(b""), st.just(0)),
)
few_clears = st.lists(change, max_size=60).filter(lambda changes: sum(kind == "clear" for kind, _, _ in changes) < 2)


def apply(db, kind, key, size):
    match kind:
        case "set":
            db[key] = b"x" * size
        case "delete":
            db.pop(key, None)
        case "merge":
            db.reorganize()
        case "clear":
            db.clear()


@given(before=few_clears, meanwhile=few_clears, through_another_handle=st.booleans())
def test_any_changes_meanwhile_leave_what_is_always_present_seen_exactly_once(before, meanwhile, through_another_handle):
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/db"
        with (
            dbm_bitcask.open(path, segment_size=4096) as db,
            dbm_bitcask.open(path, segment_size=4096) as other,
        ):
            for step in before:
                apply(db, *step)
            writer = other if through_another_handle else db
            always = ever = set(db.keys())
            seen = []
            keys = iter(db)
            for step in meanwhile:
                seen += islice(keys, 1)
                apply(writer, *step)
                now = set(writer.keys())
                always, ever = always & now, ever | now
            seen += bounded(keys)
            assert {key: count for key, count in Counter(seen).items() if key in always} == dict.fromkeys(always, 1)
            assert set(seen) <= ever
        assert check(path) == []


def test_iteration_over_more_segments_than_descriptors_beside_a_merge_sees_each_key_once(path):
    """It kept only so many segments open as there were descriptors, and lost those that were merged away before their turn."""
    keys = {b"%d" % number for number in range(200)}
    with dbm_bitcask.open(path, segment_size=4096) as db, dbm_bitcask.open(path, "w", segment_size=4096) as other:
        for key in keys:
            db[key] = key * 100
        db._log.maps = 2
        before, segments = open_descriptors(), set(path.glob("*.data"))
        walk = iter(db)
        first = next(walk)
        assert open_descriptors() <= before + 3
        for key in keys:
            other[key] = key * 101
        other.reorganize()
        assert segments & set(path.glob("*.data")) == set()
        assert sorted([first, *walk]) == sorted(keys)


def open_descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_popitem_goes_on_where_a_segment_was_merged_away_before_its_turn(path, monkeypatch):
    with dbm_bitcask.open(path, segment_size=4096) as db, dbm_bitcask.open(path, "w", segment_size=4096) as other:
        db.update({b"%d" % number: b"v" * 500 for number in range(100)})

        def merge_and_open(held, *, one_of_many=False):
            monkeypatch.undo()
            other.update({b"%d" % number: b"w" * 500 for number in range(100)})
            other.reorganize()
            held.open(one_of_many=one_of_many)

        monkeypatch.setattr(walk_module.Held, "open", merge_and_open)
        popped = dict(db.popitem() for _ in range(100))
        assert popped == {b"%d" % number: b"w" * 500 for number in range(100)}
        assert len(db) == 0
