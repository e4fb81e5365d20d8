"""A database beside a dict: the same calls, in any order, give the same answers; and only the log matters."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dbm_bitcask
from children import fork_and_wait
from crashes import every_write_pays
from dbm_bitcask.engine import portable
from dbm_bitcask.engine.check import check

keys = st.one_of(st.integers(0, 30).map(lambda i: b"key %d" % i), st.binary(max_size=3), st.just(b"k" * 5000))
values = st.one_of(st.binary(max_size=20), st.binary(min_size=1, max_size=1).map(lambda byte: byte * 1500), st.just(b"v" * 5000))
items = st.dictionaries(keys, values, max_size=12)
default = object()


class BlockError(Exception):
    """Ends a batch."""


class DatabaseBesideDict(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.directory = tempfile.mkdtemp()
        self.path = Path(self.directory, "db")
        self.model = {}
        self.db = None
        self.damaged_hints = set()  # a hint that was damaged and is not used stays, and `check` says so

    def open(self, flag, **options):
        return dbm_bitcask.open(self.path, flag, **{**self.options, **options})

    def reopen(self, flag="w"):
        self.db.close()
        self.db = self.open(flag)
        self.compare(self.db)

    def compare(self, db):
        assert len(db) == len(self.model)
        assert dict(db.items()) == self.model
        assert sorted(db.keys()) == sorted(self.model)
        assert {key: db[key] for key in self.model} == self.model
        assert all(key in db for key in self.model)

    @initialize(
        segment_size=st.sampled_from([4096, 4096, 9000, 2**26]),
        sync=st.sampled_from(["never", "never", "always"]),
        compress=st.sampled_from([None, "zlib"]),
        pays=st.booleans(),
    )
    def create(self, segment_size, sync, compress, pays):
        self.options = {"segment_size": segment_size, "sync": sync, "compress": compress}
        if pays:
            every_write_pays(self.patch)
        self.db = self.open("c")

    # The mapping

    @rule(key=keys, value=values)
    def set(self, key, value):
        self.db[key] = value
        self.model[key] = value

    @rule(key=keys, value=values)
    def set_for_a_day(self, key, value):
        """What expires within the test is for `test_expiry`."""
        self.db.set(key, value, ttl=86_400)
        self.model[key] = value
        assert 80_000 < self.db.ttl(key) <= 86_400

    @rule(key=keys, ttl=st.sampled_from([None, 86_400]))
    def touch(self, key, ttl):
        if key in self.model:
            self.db.touch(key, ttl)
            assert (self.db.ttl(key) is None) == (ttl is None)
        else:
            with pytest.raises(KeyError):
                self.db.touch(key, ttl)

    @rule(items=items, doomed=st.lists(keys, max_size=5), fails=st.booleans())
    def batch(self, items, doomed, fails):
        before = dict(self.model)
        with suppress(BlockError), self.db.batch():
            for target in (self.db, self.model):
                target.update(items)
                for key in doomed:
                    target.pop(key, None)
            assert len(self.db) == len(self.model)
            assert dict(self.db.items()) == self.model
            if fails:
                self.model = before
                raise BlockError

    @rule(key=st.text(max_size=2), value=st.text(max_size=2))
    def set_text(self, key, value):
        self.db[key] = value
        self.model[key.encode()] = value.encode()

    @rule(key=keys)
    def get(self, key):
        assert self.db.get(key, default) == self.model.get(key, default)
        assert (key in self.db) == (key in self.model)

    @rule(key=keys)
    def get_item(self, key):
        if key in self.model:
            assert self.db[key] == self.model[key]
        else:
            with pytest.raises(KeyError):
                self.db[key]

    @rule(key=keys)
    def delete(self, key):
        if key in self.model:
            del self.db[key], self.model[key]
        else:
            with pytest.raises(KeyError):
                del self.db[key]

    @rule(key=keys, value=values)
    def setdefault(self, key, value):
        assert self.db.setdefault(key, value) == self.model.setdefault(key, value)

    @rule(key=keys)
    def pop(self, key):
        assert self.db.pop(key, default) == self.model.pop(key, default)

    @precondition(lambda self: self.model)
    @rule()
    def popitem(self):
        key, value = self.db.popitem()
        assert self.model.pop(key) == value

    @precondition(lambda self: not self.model)
    @rule()
    def popitem_of_nothing(self):
        with pytest.raises(KeyError):
            self.db.popitem()

    @rule(items=items)
    def update(self, items):
        self.db.update(items)
        self.model.update(items)

    @rule(items=items)
    def update_in_place(self, items):
        self.db |= items
        self.model |= items

    @rule(value=values)
    def overwrite_all(self, value):
        for key in self.db:
            self.db[key] = value
        self.model = dict.fromkeys(self.model, value)

    @rule()
    def delete_every_other(self):
        for key in sorted(self.model)[::2]:
            del self.db[key], self.model[key]

    @rule()
    def clear(self):
        self.db.clear()
        self.model.clear()

    @rule()
    def walk_by_nextkey(self):
        seen = []
        key = self.db.firstkey()
        while key is not None:
            seen.append(key)
            key = self.db.nextkey(key)
        assert sorted(seen) == sorted(self.model)

    @rule()
    def compare_all(self):
        self.compare(self.db)
        assert self.db == self.model
        assert self.db.stats().keys == len(self.model)

    # What must not matter

    @rule()
    def sync(self):
        self.db.sync()

    @rule()
    def merge(self):
        self.db.reorganize()

    @rule(flag=st.sampled_from(["w", "c", "wf", "cs"]))
    def close_and_open(self, flag):
        if flag.endswith("f"):
            self.options["sync"] = "never"
        elif flag.endswith("s"):
            self.options["sync"] = "always"
        self.reopen(flag)

    @rule(segment_size=st.sampled_from([4096, 5000, 2**20]))
    def close_and_open_with_another_segment_size(self, segment_size):
        self.options["segment_size"] = segment_size
        self.reopen()

    @rule()
    def close_and_read_only(self):
        self.db.close()
        with self.open("r") as db:
            self.compare(db)
            with pytest.raises(dbm_bitcask.error):
                db[b"key"] = b"value"
        self.db = self.open("w")

    @rule()
    def read_beside_the_writer(self):
        with self.open("r") as db:
            self.compare(db)

    @rule()
    def open_anew(self):
        self.model.clear()
        self.reopen("n")

    @rule(key=keys, value=values)
    def write_through_a_second_handle(self, key, value):
        with self.open("w") as other:
            other[key] = value
            self.model[key] = value
            self.compare(other)

    @rule(which=st.randoms(use_true_random=False))
    def close_and_delete_some_hints(self, which):
        self.db.close()
        for hint in sorted(self.path.glob("*.hint")):
            if which.random() < 0.5:
                hint.unlink()
        self.db = self.open("w")
        self.compare(self.db)

    @rule(at=st.integers(0, 2**16), bit=st.integers(0, 7), keydir=st.booleans())
    def close_and_damage_the_hints(self, at, bit, keydir):
        self.db.close()
        for hint in sorted(self.path.glob("*.hint")):
            data = bytearray(hint.read_bytes())
            if data:
                data[at % len(data)] ^= 1 << bit
            hint.write_bytes(data)
            self.damaged_hints.add(str(hint))
        if keydir:
            (self.path / "keydir").unlink(missing_ok=True)
        self.db = self.open("w")
        self.compare(self.db)

    @rule(flag=st.sampled_from(["r", "w", "c"]))
    def close_and_delete_the_keydir(self, flag):
        self.db.close()
        (self.path / "keydir").unlink(missing_ok=True)
        with self.open(flag) as db:
            self.compare(db)
        self.db = self.open("w")
        self.compare(self.db)

    @rule()
    def delete_keydir_and_hints_and_rebuild(self):
        self.db.close()
        for file in [self.path / "keydir", *self.path.glob("*.hint")]:
            file.unlink(missing_ok=True)
        self.db = self.open("w")
        self.compare(self.db)

    @rule(items=items, doomed=st.lists(keys, max_size=3), merge=st.booleans())
    def another_process_writes_and_dies_while_this_one_is_away(self, items, doomed, merge):
        self.db.close()
        self.write_and_die(items, doomed, merge)
        with self.open("r") as db:
            self.compare(db)
        self.db = self.open("w")
        self.compare(self.db)

    @precondition(lambda _: portable.AUTO == "native")  # else it would wait until this one closes
    @rule(items=items, doomed=st.lists(keys, max_size=3), merge=st.booleans())
    def another_process_writes_and_dies_beside_this_one(self, items, doomed, merge):
        self.write_and_die(items, doomed, merge)
        self.compare(self.db)

    def write_and_die(self, items, doomed, merge):
        def work():
            db = self.open("w")
            db.update(items)
            for key in doomed:
                db.pop(key, None)
            if merge:
                db.reorganize()

        fork_and_wait(work)
        self.model.update(items)
        for key in doomed:
            self.model.pop(key, None)

    @invariant()
    def counts_agree(self):
        if self.db is not None:
            assert len(self.db) == len(self.model)
            assert bool(self.db) == bool(self.model)

    def problems(self):
        return [problem for problem in check(self.path) if problem.file not in self.damaged_hints]

    def teardown(self):
        try:
            if self.db is not None:
                self.reopen("w")
                assert self.problems() == []
                self.db.close()
                assert self.problems() == []
        finally:
            self.patch.undo()
            shutil.rmtree(self.directory)


TestDatabaseBesideDict = DatabaseBesideDict.TestCase
