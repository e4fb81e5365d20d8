"""Every state in which a crash can leave the disk opens by itself, and has everything that was promised, and nothing else.

A1  it opens, without a manual step            A5  a second open, and a reader, find the same
A2  what was made durable is there             A6  a writer leaves no file that is nobody's
A3  the contents are those after some step     A7  a reader changes no byte
A4  no key and no value was never written      A8  without hints and keydir it is the same
"""

from __future__ import annotations

import itertools
import random
import shutil
from contextlib import contextmanager

import pytest

import dbm_bitcask
from crashes import every_write_pays
from dbm_bitcask.engine import files, names, store
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.page import FULL
from disk import Crashes, Disk, Restored
from expected import Clock, Expected, contents, noise

SEGMENT = 4096
BOOT = 0x1111


class Run:
    """A workload on a recorded disk, and the contents that it should have after each step, at the moment of that step."""

    def __init__(self, path, disk, sync, clock):
        self.path, self.disk, self.sync, self.clock = path, disk, sync, clock
        self.compress = None
        self.models = [Expected(clock.seconds)]
        self.db = None
        self.commits = self.acknowledged = 0

    def step(self, action, change=None, *, durable=False):
        number = len(self.models)
        self.disk.mark("begin", number)
        action()
        model = Expected(self.clock.seconds, self.models[-1].stored)
        if change:
            change(model)
        self.models.append(model)
        self.disk.mark("acknowledged", number)
        commits = self.db._log.manifest.number if not self.db._store.closed else self.commits
        if durable or (self.sync == "always" and change):
            self.disk.mark("durable", number)
        elif commits > self.commits > 0:
            self.disk.mark("durable", self.acknowledged)  # a rotation syncs what it seals
        self.commits, self.acknowledged = commits, number

    def open(self, flag="c"):
        def action():
            self.db = dbm_bitcask.open(self.path, flag, segment_size=SEGMENT, sync=self.sync, compress=self.compress)

        self.step(action, (lambda model: model.clear()) if flag == "n" else None)

    def set(self, key, value, ttl=None):
        self.step(lambda: self.db.set(key, value, ttl), lambda model: model.set(key, value, ttl))

    def touch(self, key, ttl):
        self.step(lambda: self.db.touch(key, ttl), lambda model: model.touch(key, ttl))

    def wait(self, seconds):
        self.clock.seconds += seconds

    def delete(self, key):
        self.step(lambda: self.db.__delitem__(key), lambda model: model.__delitem__(key))

    def synced(self):
        self.step(lambda: self.db.sync(), durable=True)

    def close(self):
        self.step(lambda: self.db.close(), durable=True)

    def merge(self):
        self.step(lambda: self.db.merge())

    def batch(self, changes, ttl=None):
        """Set keys, and delete those whose value is None, all or nothing."""

        def change(target):
            with target.batch():
                for key, value in changes.items():
                    if value is None:
                        target.pop(key, None)
                    else:
                        target.set(key, value, ttl)

        self.step(lambda: change(self.db), change)

    def update(self, items):
        """All or nothing, if the items are small enough for one batch."""
        self.step(lambda: self.db.update(items), lambda model: model.update(items))

    def clear(self):
        self.step(lambda: self.db.clear(), lambda model: model.clear())


def overwrites_and_rotations(run):
    run.open()
    for number in range(14):
        run.set(b"key %d" % (number % 7), b"%d " % number * 200)
        if number % 5 == 4:
            run.synced()
    run.delete(b"key 3")
    run.delete(b"key 5")
    run.set(b"large", b"l" * 5000)
    run.close()


def large_values(run):
    run.open()
    run.set(b"small", b"value")
    run.set(b"large", b"0123456789" * 4000)  # written in parts
    run.set(b"large", b"9876543210" * 4000)
    run.synced()
    run.delete(b"small")
    run.close()


def merges(run):
    run.open()
    for number in range(16):
        run.set(b"key %d" % (number % 6), b"%d " % number * 150)
    run.delete(b"key 0")
    run.synced()
    run.merge()
    run.set(b"key 1", b"behind the merge")
    run.set(b"key 4", b"gone before the merge", ttl=5)
    run.set(b"key 5", b"still there behind it", ttl=50)
    run.delete(b"key 2")
    run.wait(10)
    run.merge()
    run.close()


def online_merges(run):
    with pytest.MonkeyPatch.context() as patch:
        every_write_pays(patch)
        run.open()
        for number in range(24):
            run.set(b"key %d" % (number % 5), b"%d " % number * 150)
            if number % 8 == 7:
                run.delete(b"key %d" % (number % 5))
        run.synced()
        run.set(b"large", b"l" * 5000)
        run.set(b"key 3", b"gone soon", ttl=5)
        run.set(b"key 4", b"gone later", ttl=500)
        for number in range(8):
            run.set(b"key %d" % (number % 2), b"%d " % number * 250, ttl=30 if number % 3 == 0 else None)
            run.wait(2)
        run.batch({b"key 0": None, b"key 1": b"%d " % 1 * 150, b"key 2": b"%d " % 2 * 150, b"key 3": b"again"})
        assert run.db.stats().reclaimed_bytes > SEGMENT
        run.close()


def clears_and_new_databases(run):
    run.open()
    for number in range(6):
        run.set(b"key %d" % number, b"%d " % number * 200)
    run.clear()
    run.set(b"key 1", b"behind the clear")
    run.close()
    run.open("n")
    run.set(b"key 2", b"in the new one")
    run.synced()
    run.close()


def short_sessions(run):
    run.compress = "zlib"
    for number in range(7):
        run.open()
        run.wait(1)
        run.set(b"key %d" % (number % 3), noise(number, 600), ttl=4 if number % 2 else None)
        if number % 3 == 2:
            run.delete(b"key 1")
        run.close()


def splits(run):
    run.open()
    most = [b"%d" % key for key in range(FULL - 3)]
    for key in most[:-1]:
        run.models.append(Expected(run.clock.seconds, {**run.models[-1].stored, key: (b"v", None)}))
    run.step(lambda: [run.db.__setitem__(key, b"v") for key in most], lambda model: model.__setitem__(most[-1], b"v"))
    for number in range(8):
        run.set(b"new %d" % number, b"v")
    run.synced()
    run.delete(b"7")
    run.close()


def keydirs_made_anew(run):
    run.open()
    for number in range(9):
        run.set(b"key %d" % (number % 4), b"%d " % number * 250)
    run.close()
    for _ in range(2):
        files.Directory(str(run.path)).remove("keydir")
        run.open("w")
        run.set(b"key 1", b"with a new keydir")
        run.set(b"key 2", b"gone with the next one", ttl=5)
        run.wait(10)
        run.close()


def batches(run):
    run.compress = "zlib"
    run.open()
    for number in range(5):
        run.batch({b"key %d" % (key % 9): b"%d " % number * 30 for key in range(number, number + 6)})
        run.set(b"plain", b"%d" % number)
    run.synced()
    run.batch({b"key 1": None, b"key 2": b"behind the sync", b"key 3": None, b"new": b"value"})
    run.batch({b"large": noise(1, 5000), b"larger": noise(2, 5000), b"key 4": None})
    run.batch({b"new": None, b"plain": None})
    run.batch({b"key 7": b"gone soon", b"key 8": noise(3, 600), b"key 1": b"again"}, ttl=5)
    run.touch(b"key 8", 50)
    run.wait(10)
    run.merge()
    run.update({b"key 5": b"behind the merge", b"key 6": noise(4, 500), b"key 7": b"again"})
    run.batch({b"key 1": None, b"key 8": None, b"large": None})
    run.close()


WORKLOADS = [
    overwrites_and_rotations,
    large_values,
    batches,
    merges,
    online_merges,
    clears_and_new_databases,
    short_sessions,
    splits,
    keydirs_made_anew,
]
SYNCS = ["never", "always"]


@contextmanager
def patches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_CLEAN_KEYS", 0)  # clean marks are made at every close
        patch.setattr(store, "_CLEAN_EVERY", -1.0)
        yield patch


def recorded(workload, path, sync):
    """The disk and the steps of a run."""
    path.mkdir()
    disk, clock = Disk(path), Clock()
    run = Run(path, disk, sync, clock)
    with patches() as patch:
        disk.install(patch)
        clock.install(patch)
        patch.setattr(files, "boot_id", lambda: BOOT)
        workload(run)
    disk.finish()
    return disk, run.models


class Trial:
    """Opens what a crash left, at the moment of the last step that had begun, and says what is wrong with it."""

    def __init__(self, crash, disk, models, path, boot=BOOT):
        self.crash, self.path = crash, path
        self.boot = boot + crash.reboot
        self.models = models
        self.clock = Clock()
        self.clock.seconds = models[crash.begun].now
        self.restored = Restored(crash, disk, path)

    def install(self, patch):
        self.restored.install(patch)
        self.clock.install(patch)
        patch.setattr(files, "boot_id", lambda: self.boot)

    def right(self):
        return [model.at(self.clock.seconds) for model in self.models[self.crash.durable : self.crash.begun + 1]]

    def contents(self, flag="w"):
        with dbm_bitcask.open(self.path, flag, segment_size=SEGMENT) as db:
            found = contents(db, self.clock.seconds)
            if flag == "w":
                db._store.closed = True  # and now it goes away without a close, as after a kill
            return found

    def judge(self, found):
        assert found in self.right(), f"{self.crash.how}: {len(found)} keys that are those of no step from {self.crash.durable} on"

    def run(self):
        """A1 to A4."""
        if "MANIFEST" not in self.restored.image.names and not self.crash.durable:
            return self.run_unborn()
        found = self.contents()
        self.judge(found)
        return found

    def run_unborn(self):
        """The database was not created yet, or not durably: flag c makes it."""
        with dbm_bitcask.open(self.path, "c", segment_size=SEGMENT) as db:
            assert dict(db) == {}
        return {}

    def run_thoroughly(self):
        """A5 to A8, too."""
        if "MANIFEST" not in self.restored.image.names and not self.crash.durable:
            self.run_unborn()
            return
        before = frozen(self.path)
        read = self.contents("r")
        assert frozen(self.path) == before, "a reader wrote"
        found = self.run()
        assert read == found, f"{self.crash.how}: a reader found something else than a writer"
        for name in frozen(self.path):
            assert names.parse_segment(name) or names.parse_hint(name) or name in ("MANIFEST", "keydir"), name
        assert self.contents() == found
        # A hint is not synced: a crash may leave it damaged, and then it is not used.
        assert [problem for problem in check(self.path) if not problem.file.endswith(".hint")] == []
        with dbm_bitcask.open(self.path, "w", segment_size=SEGMENT) as db:
            db[b"written"] = b"after"
        found[b"written"] = b"after", None
        assert self.contents("r") == self.contents() == found
        for name in frozen(self.path):
            if names.parse_hint(name) or name == "keydir":
                (self.path / name).unlink()
        assert self.contents("r") == self.contents() == found


def frozen(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def try_all(crashes, disk, models, place, *, thoroughly=0.1, seed=0):
    """Try every state, a part of them thoroughly: how many there were."""
    choose = random.Random(seed)
    count = 0
    for count, crash in enumerate(crashes, 1):
        path = place / f"{count}"
        trial = Trial(crash, disk, models, path)
        with patches() as patch:
            trial.install(patch)
            try:
                trial.run_thoroughly() if choose.random() < thoroughly else trial.run()
            except Exception as failure:
                raise AssertionError(f"{crash.how}, of steps {crash.durable} to {crash.begun}: {failure!r}") from failure
        shutil.rmtree(path)
    return count


every_run = pytest.mark.parametrize(
    ("workload", "sync"), list(itertools.product(WORKLOADS, SYNCS)), ids=lambda part: part if isinstance(part, str) else part.__name__
)


@every_run
def test_every_crash_leaves_what_was_promised(workload, sync, place, amount, tally):
    disk, models = recorded(workload, place / "db", sync)
    crashes = Crashes(disk, seed=1, random_subsets=amount(sample=20, full=64, release=1200))
    tally("crash states", try_all(itertools.islice(crashes, 0, None, amount(sample=50, full=1, release=1)), disk, models, place))


@every_run
def test_second_crash_within_the_recovery_from_the_first_loses_nothing_more(workload, sync, place, amount, tally):
    disk, models = recorded(workload, place / "db", sync)
    crashes = list(Crashes(disk, seed=2, random_subsets=4))
    count = 0
    for number in range(amount(sample=1, full=10, release=150)):
        crash = random.Random(number).choice(crashes)
        if "MANIFEST" in crash.image().names:
            count += crash_again(crash, disk, models, place / f"first {number}", number)
    tally("double crash states", count)


def crash_again(crash, disk, models, path, seed):
    """Open what a crash left, write, sync, write: and crash anywhere in it. The number of states."""
    trial = Trial(crash, disk, models, path)
    again = Disk(path)
    again.adopt()
    for name, number in again.names.items():
        again.numbers[number] = disk.numbers[trial.restored.image.names[name]]
    with patches() as patch:
        again.install(patch)
        every_write_pays(patch)
        trial.clock.install(patch)
        patch.setattr(files, "boot_id", lambda: trial.boot)
        again.mark("begin", 1)
        with dbm_bitcask.open(path, "w", segment_size=SEGMENT) as db:
            found = contents(db, trial.clock.seconds)
            trial.judge(found)
            db[b"second"] = b"not synced"
            again.mark("begin", 2)
            db.sync()
            again.mark("durable", 2)
            db[b"third"] = b"value"
            again.mark("begin", 3)
            db[b"large"] = b"l" * 5000
            again.mark("begin", 4)
    again.finish()
    steps = [{}, {b"second": b"not synced"}, {b"third": b"value"}, {b"large": b"l" * 5000}]
    after = [{**found, **{key: (value, None) for step in steps[: number + 1] for key, value in step.items()}} for number in range(4)]
    count = 0
    for count, second in enumerate(itertools.islice(Crashes(again, seed, random_subsets=2, singles=4), 0, None, 3), 1):
        right = [Expected(trial.clock.seconds, items) for items in (after[1:] if second.durable else [*trial.right(), *after])]
        another = path.parent / f"{path.name}, second {count}"
        try_one(second, again, right, another, trial.boot)
        shutil.rmtree(another)
    shutil.rmtree(path)
    return count


def try_one(crash, disk, right, path, boot):
    trial = Trial(crash._replace(durable=0, begun=len(right) - 1), disk, right, path, boot)
    with patches() as patch:
        trial.install(patch)
        try:
            trial.run()
        except Exception as failure:
            raise AssertionError(f"second crash: {crash.how}: {failure!r}") from failure
