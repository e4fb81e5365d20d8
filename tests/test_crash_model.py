"""A database beside a dict, with power cuts: after each the contents are those after some step since everything was durable."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import dbm_bitcask
from dbm_bitcask.engine import files, store
from disk import Crashes, Disk, Restored, Write
from test_crash_states import BOOT, Run

pytestmark = pytest.mark.harness

keys = st.integers(0, 12).map(lambda number: b"key %d" % number)
values = st.one_of(st.binary(max_size=20), st.binary(min_size=1, max_size=1).map(lambda byte: byte * 1500))


class DatabaseWithPowerCuts(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.lives = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(store, "_CLEAN_KEYS", 0)
        self.patch.setattr(store, "_CLEAN_EVERY", -1.0)
        self.boot = BOOT
        self.patch.setattr(files, "boot_id", lambda: self.boot)

    @initialize(sync=st.sampled_from(["never", "always"]))
    def create(self, sync):
        self.sync = sync
        self.path = self.directory / "0"
        self.path.mkdir()
        self.begin({})

    def begin(self, model):
        """A process on what is there."""
        self.disk = Disk(self.path)
        self.disk.adopt()
        self.run = Run(self.path, self.disk, self.sync)
        self.run.models = [model]
        self.disk.install(self.patch)
        self.run.open()
        assert dict(self.run.db) == model

    @property
    def model(self):
        return self.run.models[-1]

    @rule(key=keys, value=values)
    def set(self, key, value):
        self.run.set(key, value)

    @rule(key=keys)
    def delete(self, key):
        if key in self.model:
            self.run.delete(key)

    @rule(changes=st.dictionaries(keys, st.none() | values, min_size=1, max_size=8))
    def batch(self, changes):
        self.run.batch(changes)

    @rule()
    def make_durable(self):
        self.run.synced()

    @rule()
    def merge(self):
        self.run.merge()

    @rule()
    def clear(self):
        self.run.clear()

    @rule(flag=st.sampled_from(["w", "c"]))
    def reopen(self, flag):
        self.run.close()
        self.run.open(flag)

    @rule()
    def read(self):
        assert dict(self.run.db) == self.model
        assert len(self.run.db) == len(self.model)

    @rule(seed=st.integers(0, 2**32), back=st.integers(0, 30))
    def cut_the_power(self, seed, back):
        """At the end, or some calls before it."""
        self.run.db._store.closed = True  # it goes away as with its process
        self.disk.finish()
        events = self.disk.events
        del events[max(1, len(events) - back) :]
        while isinstance(events[-1], Write) and events[-1].mapped:
            events.pop()  # pages of one moment are noted together, before the next call
        crash = random.Random(seed).choice(list(Crashes(self.disk, seed, random_subsets=3, singles=2))[-40:])
        models = self.run.models[crash.durable : crash.begun + 1]
        self.lives += 1
        self.path = self.directory / str(self.lives)
        restored = Restored(crash, self.disk, self.path)
        restored.install(self.patch)
        self.boot += crash.reboot
        with dbm_bitcask.open(self.path, "c", sync=self.sync, segment_size=4096) as db:
            found = dict(db)
            assert len(db) == len(found)
            db._store.closed = True
        assert found in models, crash.how
        self.begin(found)

    def teardown(self):
        try:
            if hasattr(self, "run") and not self.run.db._store.closed:
                self.run.db.close()
                self.disk.finish()
        finally:
            self.patch.undo()
            shutil.rmtree(self.directory)


TestPowerCuts = DatabaseWithPowerCuts.TestCase
TestPowerCuts.settings = settings(stateful_step_count=30)
