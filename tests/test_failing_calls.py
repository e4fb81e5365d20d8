"""Every call of the operating system fails once, and from then on: an `error`, and nothing that was acknowledged is lost.

A batch that failed is there as a whole or not at all; a key that has expired stays away.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import os
import shutil
from pathlib import Path

import pytest

import dbm_bitcask
from crashes import abandon, every_write_pays
from dbm_bitcask.engine import files, portable
from dbm_bitcask.engine.check import check
from expected import Clock, noise

OPTIONS = {"segment_size": 4096, "compress": "zlib"}
ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE]
SHORT, INTERRUPTED = "short write", "interrupted"
KINDS = [*ERRORS, SHORT, INTERRUPTED]
CALLS = {
    *("open", "pread", "pwrite", "pwritev", "fsync", "ftruncate", "posix_fallocate", "replace", "unlink", "link"),
    *("mkdir", "stat", "fstat", "lstat", "listdir", "lseek", "read", "write"),
}


class Interrupted(BaseException):
    """What a signal handler raised while a call waited."""


class Failing:
    """In the place of `os` in both layers of files: the n-th call fails, or every one from it on."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_at = self.fails_to = 0
        self.kind = errno.EIO
        self.failed = ""

    def install(self, patch):
        patch.setattr(files, "_fdatasync", self.guarded("fdatasync", os.fdatasync))
        for module in (files, portable):
            patch.setattr(module, "os", self)
            patch.setattr(module, "fcntl", _Fcntl(self))

    def __getattr__(self, name):
        found = getattr(os, name)
        return self.guarded(name, found) if name in CALLS else found

    def guarded(self, name, call):
        def guarded(*args, **kwargs):
            self.calls += 1
            if not self.fails_at <= self.calls < self.fails_to:
                return call(*args, **kwargs)
            self.failed = self.failed or name
            if self.kind == INTERRUPTED:
                raise Interrupted
            if self.kind == SHORT:
                if name in ("pwrite", "write"):
                    fd, data, *offset = args
                    return call(fd, data[: (len(data) + 1) // 2], *offset)
                if name == "pwritev":
                    fd, parts, offset = args
                    data = b"".join(parts)
                    return os.pwrite(fd, data[: (len(data) + 1) // 2], offset)
                return call(*args, **kwargs)
            raise OSError(self.kind, os.strerror(self.kind))

        return guarded


class _Fcntl:
    """In the place of `fcntl`: taking the lock can be interrupted, and fail."""

    def __init__(self, failing):
        self.flock = failing.guarded("flock", fcntl.flock)

    def __getattr__(self, name):
        return getattr(fcntl, name)


BATCH = [b"together %d" % number for number in range(4)]


class Run:
    """A workload, and what each key may have after it."""

    def __init__(self, path, sync, clock):
        self.path, self.sync, self.clock = path, sync, clock
        self.right = {}  # for each key the values that are right; None: it is not there
        self.db = None

    def do(self, action, changes=()):
        """Do something that sets keys, to None if it deletes them; if it fails, it was done or not."""
        changes = dict(changes)
        for key, value in changes.items():
            self.right[key] = self.right.get(key, {None}) | {value}
        try:
            action()
        except (dbm_bitcask.error, Interrupted):
            return False
        self.right |= {key: {value} for key, value in changes.items()}
        return True

    def open(self, flag="c"):
        def action():
            self.db = dbm_bitcask.open(self.path, flag, sync=self.sync, **OPTIONS)

        return self.do(action)

    def set(self, key, value, ttl=None):
        self.do(lambda: self.db.set(key, value, ttl), {key: value})

    def delete(self, key):
        self.do(lambda: self.db.pop(key, None), {key: None})

    def batch(self, value):
        """Set all keys of the batch to one value, or delete them all if that is None."""

        def action():
            with self.db.batch():
                for key in BATCH:
                    if value is None:
                        self.db.pop(key, None)
                    else:
                        self.db[key] = value

        self.do(action, dict.fromkeys(BATCH, value))

    def touch(self, key, ttl):
        """Whether a key was given more time."""
        return self.do(lambda: self.db.touch(key, ttl) if key in self.db else None)

    def expire(self, key, value):
        """The time is over of a key, if it has this value."""
        self.right[key] = {None if each == value else each for each in self.right[key]}

    def expiring(self):
        self.set(b"soon", b"for ever")
        self.set(b"soon", b"not for long", ttl=5)
        self.set(b"touched", b"for longer", ttl=5)
        touched = self.touch(b"touched", 50)
        self.look()
        self.clock.seconds += 10
        self.expire(b"soon", b"not for long")
        if not touched:
            self.right[b"touched"] |= {None}
        self.look()

    def clear(self):
        before = {key: set(values) for key, values in self.right.items()}
        if self.do(lambda: self.db.clear()):
            self.right = {}
        else:
            self.right = {key: values | {None} for key, values in before.items()}

    def look(self):
        def action():
            found = dict(self.db.items())
            for key, values in self.right.items():
                assert found.get(key) in values
                assert self.db.get(key) in values
            assert found.keys() <= self.right.keys()

        self.do(action)

    def work(self):
        if not self.open():
            return
        for number in range(9):
            self.set(b"key %d" % (number % 5), noise(number, 1600))
        self.delete(b"key 3")
        self.batch(b"once")
        self.expiring()
        self.do(lambda: self.db.sync())
        self.look()
        self.do(lambda: self.db.merge())
        self.set(b"behind", b"the merge")
        for number in range(9):
            self.set(b"key %d" % (number % 3), noise(number, 1600))
        self.batch(noise(1, 400))
        self.look()
        self.do(lambda: self.db.close())
        if not self.open("w"):
            return
        self.clear()
        self.batch(b"behind the clear")
        self.set(b"behind", b"the clear")
        self.set(b"large", noise(2, 9000))
        self.set(b"larger", noise(3, 100_000))
        self.batch(None)
        self.look()
        self.do(lambda: self.db.close())
        if self.open("r"):
            self.look()
            self.do(lambda: self.db.close())

    def require_right(self):
        with dbm_bitcask.open(self.path, **OPTIONS) as db:
            found = dict(db.items())
            assert 0 <= len(db) - len(found) <= len({b"soon", b"touched"} - found.keys())  # until a merge comes by
        assert len({found.get(key) for key in BATCH}) == 1, "a batch is there in part"
        for key, values in self.right.items():
            assert found.get(key) in values, key
        assert found.keys() <= self.right.keys()
        # A hint is written when there is time, and may be left half written.
        assert [problem for problem in check(self.path) if not problem.file.endswith(".hint")] == []
        assert [file.name for file in self.path.iterdir() if file.suffix == ".tmp"] == []


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("sync", ["never", "always"])
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if isinstance(kind, str) else errno.errorcode[kind])
def test_every_call_fails(place, kind, for_ever, sync, amount, tally):
    done = 0
    before = descriptors()
    for call in itertools.count(1, amount(sample=23, full=1, release=1)):
        failing, clock = Failing(), Clock()
        run = Run(place / "db", sync, clock)
        failing.kind, failing.fails_at, failing.fails_to = kind, call, 10**9 if for_ever else call + 1
        with pytest.MonkeyPatch.context() as patch:
            failing.install(patch)
            every_write_pays(patch)
            clock.install(patch)
            try:
                run.work()
            except Exception as failure:
                raise AssertionError(f"call {call}, {failing.failed}: {failure!r}") from failure
            if run.db is not None:
                abandon(run.db)  # whatever state it is in, it goes away as that of a killed process
            run.db = None
        failing.fails_to = 0  # also for what a traceback still holds
        with pytest.MonkeyPatch.context() as patch:
            clock.install(patch)
            try:
                run.require_right()
            except Exception as failure:
                raise AssertionError(f"after call {call}, {failing.failed}, failed: {failure!r}") from failure
        shutil.rmtree(place / "db")
        if failing.calls < call:
            break
        done += 1
    gc.collect()  # of handles that were abandoned
    assert descriptors() <= before
    tally("injected errors", done)
