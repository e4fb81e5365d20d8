"""Every call of the operating system fails once, and from then on: an `error`, and nothing that was acknowledged is lost."""

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

OPTIONS = {"segment_size": 4096}
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


class Run:
    """A workload, and what each key may have after it."""

    def __init__(self, path, sync):
        self.path, self.sync = path, sync
        self.right = {}  # for each key the values that are right; None: it is not there
        self.db = None

    def do(self, action, key=None, value=None):
        """Do something; if it fails, it was done or not."""
        before = self.right.get(key, {None})
        if key is not None:
            self.right[key] = before | {value}
        try:
            action()
        except (dbm_bitcask.error, Interrupted):
            return False
        if key is not None:
            self.right[key] = {value}
        return True

    def open(self, flag="c"):
        def action():
            self.db = dbm_bitcask.open(self.path, flag, sync=self.sync, **OPTIONS)

        return self.do(action)

    def set(self, key, value):
        self.do(lambda: self.db.__setitem__(key, value), key, value)

    def delete(self, key):
        self.do(lambda: self.db.pop(key, None), key)

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
            self.set(b"key %d" % (number % 5), b"%d " % number * 300)
        self.delete(b"key 3")
        self.do(lambda: self.db.sync())
        self.look()
        self.do(lambda: self.db.merge())
        self.set(b"behind", b"the merge")
        for number in range(9):
            self.set(b"key %d" % (number % 3), b"%d " % number * 300)
        self.look()
        self.do(lambda: self.db.close())
        if not self.open("w"):
            return
        self.clear()
        self.set(b"behind", b"the clear")
        self.set(b"large", b"l" * 5000)
        self.set(b"larger", b"l" * 50_000)
        self.look()
        self.do(lambda: self.db.close())
        if self.open("r"):
            self.look()
            self.do(lambda: self.db.close())

    def require_right(self):
        with dbm_bitcask.open(self.path, **OPTIONS) as db:
            found = dict(db.items())
            assert len(db) == len(found)
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
        failing, run = Failing(), Run(place / "db", sync)
        failing.kind, failing.fails_at, failing.fails_to = kind, call, 10**9 if for_ever else call + 1
        with pytest.MonkeyPatch.context() as patch:
            failing.install(patch)
            every_write_pays(patch)
            try:
                run.work()
            except Exception as failure:
                raise AssertionError(f"call {call}, {failing.failed}: {failure!r}") from failure
            if run.db is not None:
                abandon(run.db)  # whatever state it is in, it goes away as that of a killed process
            run.db = None
        failing.fails_to = 0  # also for what a traceback still holds
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
