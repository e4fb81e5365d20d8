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
from crashes import every_write_pays
from dbm_bitcask.engine import files, store
from disk import Crashes, Disk, Restored, Write
from expected import Clock, Expected, contents, noise
from test_crash_states import BOOT, Run

pytestmark = pytest.mark.harness

keys = st.integers(0, 12).map(lambda number: b"key %d" % number)
values = st.one_of(
    st.binary(max_size=20),
    st.binary(min_size=1, max_size=1).map(lambda byte: byte * 1500),
    st.integers(0, 9).map(lambda number: noise(number, 1500)),
)
ttls = st.sampled_from([None, None, 1, 10, 100])


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
        self.clock = Clock()
        self.clock.install(self.patch)

    @initialize(sync=st.sampled_from(["never", "always"]), compress=st.sampled_from([None, "zlib"]), pays=st.booleans())
    def create(self, sync, compress, pays):
        self.sync, self.compress = sync, compress
        if pays:
            every_write_pays(self.patch)
        self.path = self.directory / "0"
        self.path.mkdir()
        self.begin(Expected(self.clock.seconds))

    def begin(self, model):
        """A process on what is there."""
        self.disk = Disk(self.path)
        self.disk.adopt()
        self.run = Run(self.path, self.disk, self.sync, self.clock)
        self.run.compress = self.compress
        self.run.models = [model]
        self.disk.install(self.patch)
        self.run.open()
        assert contents(self.run.db, self.clock.seconds) == model.items()

    @property
    def model(self):
        return Expected(self.clock.seconds, self.run.models[-1].stored)

    @rule(key=keys, value=values, ttl=ttls)
    def set(self, key, value, ttl):
        self.run.set(key, value, ttl)

    @rule(key=keys, ttl=ttls)
    def touch(self, key, ttl):
        if key in self.model:
            self.run.touch(key, ttl)

    @rule(key=keys)
    def delete(self, key):
        if key in self.model:
            self.run.delete(key)

    @rule(changes=st.dictionaries(keys, st.none() | values, min_size=1, max_size=8), ttl=ttls)
    def batch(self, changes, ttl):
        self.run.batch(changes, ttl)

    @rule(seconds=st.sampled_from([1, 5, 50]))
    def wait(self, seconds):
        self.run.wait(seconds)

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
        assert contents(self.run.db, self.clock.seconds) == self.model.items()
        assert self.model.is_as_many(len(self.run.db))

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
        models = [Expected(self.clock.seconds, model.stored) for model in self.run.models[crash.durable : crash.begun + 1]]
        self.lives += 1
        self.path = self.directory / str(self.lives)
        restored = Restored(crash, self.disk, self.path)
        restored.install(self.patch)
        self.boot += crash.reboot
        with dbm_bitcask.open(self.path, "c", sync=self.sync, segment_size=4096) as db:
            found = contents(db, self.clock.seconds)
            right = [model for model in models if model.items() == found]
            assert right, crash.how
            assert any(model.is_as_many(len(db)) for model in right)
            db._store.closed = True
        stored = {key: item for model in right for key, item in model.stored.items()}  # what has expired may be counted, or not
        self.begin(Expected(self.clock.seconds, stored))

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
