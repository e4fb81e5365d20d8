"""A small store of which every byte is known, copies of it that were damaged, and what may be answered by one that was.

`answers` asks a database everything there is to ask; `wrong` compares that with what is true. An answer is right, or an explicit `error`:
never a value that is wrong, or older, nor a key that was invented, or is missing without a word, nor a foreign exception, nor a hang.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

import dbm_bitcask
from crashes import abandon, freeze
from dbm_bitcask.engine import batch, compression, expiry, files, header, manifest, names, rotation, store, write
from dbm_bitcask.engine.contents import OVERHEAD, Reading
from dbm_bitcask.engine.record import SYNCED, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import pytest

OLD, NEW = b"older value of ", b"newer value of "
NEVER = [b"never there", b"key", b"key 99", b"invented"]
FOR_LONG = 10**10  # seconds to live
SECONDS = 20  # until what takes milliseconds counts as a hang


class Hang(BaseException):
    """It took too long."""


class Written(NamedTuple):
    """One record of the log, and the place that it has there; the value of a tombstone is None."""

    file: str
    offset: int
    end: int
    key: bytes
    value: bytes | None
    synced: bool
    overhead: bool


class Small(NamedTuple):
    """A store: its files, every record of its log in order, and what is in it."""

    files: dict[str, bytes]
    log: tuple[Written, ...]
    items: dict[bytes, bytes]

    @property
    def keys(self) -> list[bytes]:
        return [*dict.fromkeys(each.key for each in self.log if not each.overhead), *NEVER]

    @property
    def active(self) -> str:
        return max(name for name in self.files if names.parse_segment(name))


# Making one.


def fast_disk(patch: pytest.MonkeyPatch) -> None:
    """Nothing here asks what has reached the disk."""
    patch.setattr(files, "_fdatasync", lambda _: None)
    patch.setattr(os, "fsync", lambda _: None)


def _first(db: dbm_bitcask.Database) -> None:
    for number in range(9):
        db[b"key %d" % number] = OLD + b"key %d" % number
    db[b""] = b"the empty key"
    db[b"large"] = b"a large value " * 15


def _second(db: dbm_bitcask.Database) -> None:
    db._store.locked(rotation.rotate)
    for number in range(0, 9, 2):
        db[b"key %d" % number] = NEW + b"key %d" % number
    del db[b"key 1"], db[b"key 2"]
    db.set(b"expiring", NEW + b"expiring", ttl=FOR_LONG)
    with db.batch():
        db[b"key 0"] = NEW + b"key 0, in a batch"
        db[b"in a batch"] = NEW + b"in a batch"
        db.set(b"expiring in a batch", NEW + b"expiring", ttl=FOR_LONG)
        del db[b"key 8"]
    db[b"empty value"] = b""
    for number in range(9, 12):
        db[b"key %d" % number] = OLD + b"key %d" % number


def _third(db: dbm_bitcask.Database) -> None:
    db._store.locked(rotation.rotate)
    for number in (3, 4, 9):
        db[b"key %d" % number] = NEW + b"key %d, again" % number
    del db[b"key 5"], db[b"key 10"]
    db[b"compressed"] = b"a value that can be made smaller " * 9
    db.update({b"key 9": NEW + b"key 9, in a batch", b"key 11": NEW + b"key 11, in a batch"})


def _fourth(db: dbm_bitcask.Database) -> None:
    for number in range(12, 18):
        db[b"key %d" % number] = NEW + b"key %d" % number


PARTS = (_first, _second, _third, _fourth)


def make(path: Path, patch: pytest.MonkeyPatch, state: int = header.RESTING, earlier: list[dict[str, bytes]] | None = None) -> Small:
    """A store whose last session ended so: RESTING, CLEAN, or DIRTY, for its process was killed. Always of the same bytes.

    Two sealed segments and an active one, with keys that are overwritten and deleted across them, some of them in batches, keys that
    expire one day, and a compressed value. With `earlier`, each part is a session of its own, and the list gets the files as they were
    behind each but the last.
    """
    chance = random.Random(1)
    with patch.context() as fixed:
        fixed.setattr(secrets, "randbits", chance.getrandbits)
        fixed.setattr(expiry, "time_ns", lambda: 1_700_000_000 * 10**9)
        for module in (write, rotation, batch):
            fixed.setattr(module, "time", lambda: 1_700_000_000.0)
        if state == header.CLEAN:
            fixed.setattr(store, "_CLEAN_KEYS", 0)
        db = dbm_bitcask.open(path, files="native", compress="zlib")
        for part in PARTS:
            if earlier is not None and part is not PARTS[0]:
                db.close()
                earlier.append(freeze(path))
                db = dbm_bitcask.open(path, files="native", compress="zlib")
            part(db)
        if state == header.DIRTY:
            db._store._write_hints()
            abandon(db)
        else:
            db.close()
    frozen = freeze(path)
    shutil.rmtree(path)
    assert struct.unpack_from("<Q", frozen["keydir"], 8 * header.STATE) == (state,)
    return Small(frozen, *_read(frozen))


def _read(frozen: Mapping[str, bytes]) -> tuple[tuple[Written, ...], dict[bytes, bytes]]:
    log, items = [], {}
    for entry in manifest.decode(frozen["MANIFEST"]).segments:
        name = names.segment_name(entry.id)
        data = frozen[name]
        for offset, found in Reading(data, entry, len(data)).records():
            value = None if found.flags & TOMBSTONE else bytes(found.value)
            if found.flags & compression.COMPRESSED:
                value = compression.unpack(found.flags, found.value, 2**20)
            overhead = bool(found.flags & OVERHEAD)
            log.append(Written(name, offset, found.end, found.key, value, bool(found.flags & SYNCED), overhead))
            if not overhead:
                items[found.key] = value
    return tuple(log), {key: value for key, value in items.items() if value is not None}


def as_of(log: tuple[Written, ...]) -> dict[bytes, bytes]:
    """What is in the store behind these records."""
    items = {each.key: each.value for each in log if not each.overhead}
    return {key: value for key, value in items.items() if value is not None}


# Copies of it.


class Copy:
    """A directory that is made to hold the files of a store, again and again; the keydir believes that it has always been there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._adopted: tuple[tuple[bytes, int, int], bytes] | None = None

    def put(self, frozen: Mapping[str, bytes]) -> None:
        """Have the directory hold these files and no others."""
        with os.scandir(self.path) as present:
            for entry in present:
                if entry.name not in frozen or entry.stat(follow_symlinks=False).st_nlink != 1 or not entry.is_file(follow_symlinks=False):
                    remove(entry.path)
        for name, data in frozen.items():
            fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
            os.pwrite(fd, self._believing(fd, data) if name == "keydir" else data, 0)
            os.ftruncate(fd, len(data))
            os.close(fd)

    def _believing(self, fd: int, data: bytes) -> bytes:
        status = os.fstat(fd)
        asked = data, status.st_dev, status.st_ino
        if self._adopted is None or self._adopted[0] != asked:
            self._adopted = asked, adopted(*asked)
        return self._adopted[1]

    def flip(self, name: str, bit: int) -> None:
        """Flip a bit of a file; a second time to flip it back."""
        fd = os.open(self.path / name, os.O_RDWR)
        byte = os.pread(fd, 1, bit // 8)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)
        os.close(fd)


def adopted(data: bytes, device: int, inode: int) -> bytes:
    """A keydir that believes that it is the file of this number; its seal is renewed if it was right."""
    if len(data) < header.PAGE_SIZE:
        return data
    image = bytearray(data[: len(data) & -8])
    with memoryview(image).cast("Q") as words:
        is_sealed = words[header.SEAL] == header.header_checksum(words)
        words[header.DEVICE], words[header.INODE] = device, inode
        if is_sealed:
            words[header.SEAL] = header.header_checksum(words)
    return bytes(image) + data[len(image) :]


def remove(path: str | Path) -> None:
    """Delete whatever is there."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)  # noqa: PTH108  (by the ten thousand)


# Asking it.


class Failed(NamedTuple):
    """An answer that is an explicit error, and what had been listed before it."""

    error: dbm_bitcask.error
    listed: tuple = ()


class Foreign(NamedTuple):
    """An answer that is an exception which is none of ours."""

    failure: Exception


MISSING = "KeyError"


def _ask(action: Callable[[], object]) -> object:
    try:
        return action()
    except KeyError:
        return MISSING
    except dbm_bitcask.error as failure:
        return Failed(failure)
    except Exception as failure:  # noqa: BLE001  (which ones there are is what is asked)
        return Foreign(failure)


def _list(things: Callable[[], Iterator[object]]) -> object:
    listed: list[object] = []
    answer = _ask(lambda: listed.extend(each for each in _into(listed, things())))
    return sorted(listed) if answer is None else answer._replace(listed=tuple(listed)) if isinstance(answer, Failed) else answer


def _into(listed: list[object], things: Iterator[object]) -> Iterator[object]:
    for each in things:
        listed.append(each)
    return iter(())


EVERY_WAY = ("[]", "in", "len", "keys", "items")


def ask_all(db: dbm_bitcask.Database, keys: list[bytes], ways: tuple[str, ...] = EVERY_WAY) -> dict[object, object]:
    """Everything there is to ask, by name."""
    found: dict[object, object] = {}
    for key in keys:
        found["[]", key] = _ask(lambda key=key: db[key])
        if "in" in ways:
            found["in", key] = _ask(lambda key=key: key in db)
            found["get", key] = _ask(lambda key=key: db.get(key))  # not the first time: by way of `lookup`
    aggregates = {
        "len": lambda: _ask(lambda: len(db)),
        "keys": lambda: _list(lambda: iter(db)),
        "items": lambda: _list(lambda: iter(db.items())),
    }
    return found | {way: aggregates[way]() for way in ways if way in aggregates}


def truth(items: Mapping[bytes, bytes], keys: list[bytes]) -> dict[object, object]:
    """The right answers."""
    right: dict[object, object] = {"len": len(items), "keys": sorted(items), "items": sorted(items.items())}
    for key in keys:
        right["[]", key], right["in", key], right["get", key] = items.get(key, MISSING), key in items, items.get(key)
    return right


class Wrong(NamedTuple):
    """An answer that is neither right nor an error."""

    what: object
    answer: object
    right: object

    def __str__(self) -> str:
        return f"{self.what}: {self.answer!r}, and not {self.right!r}"


def wrong(found: Mapping[object, object], right: Mapping[object, object]) -> list[Wrong]:
    """The answers that are neither right nor an error."""
    return [Wrong(what, answer, right.get(what, "that")) for what, answer in found.items() if not _is_right(what, answer, right)]


def _is_right(what: object, answer: object, right: Mapping[object, object]) -> bool:
    if what not in right:
        return isinstance(answer, Failed)
    if isinstance(answer, Failed):
        return set(answer.listed) <= set(right[what]) if answer.listed else True
    return answer == right[what]


def errors(found: Mapping[object, object]) -> list[dbm_bitcask.error]:
    return [answer.error for answer in found.values() if isinstance(answer, Failed)]


class Look(NamedTuple):
    """What one who opened a store was told."""

    wrong: list[Wrong]
    errors: list[dbm_bitcask.error]


def read(path: Path, small: Small, items: Mapping[bytes, bytes] | None = None) -> Look:
    """Open it for reading, and ask everything."""
    db = _ask(lambda: dbm_bitcask.open(path, "r"))
    if not isinstance(db, dbm_bitcask.Database):
        return _look({"open": db}, {})
    found = ask_all(db, small.keys)
    found["close"] = _ask(db.close)
    return _look(found, {**truth(small.items if items is None else items, small.keys), "close": None})


def _look(found: Mapping[object, object], right: Mapping[object, object]) -> Look:
    return Look(wrong(found, right), errors(found))


SETS = {b"key 6": b"set just now", b"new": b"a new key"}
DELETED = b"key 7"


def read_and_write(path: Path, small: Small, items: Mapping[bytes, bytes] | None = None) -> Look:
    """Open it for writing; ask everything; set two keys and delete one; ask again, and once more by another handle."""
    before = dict(small.items if items is None else items)
    db = _ask(lambda: dbm_bitcask.open(path, "w"))
    if not isinstance(db, dbm_bitcask.Database):
        return _look({"open": db}, {})
    keys = [*small.keys, b"new"]
    first = _look(ask_all(db, keys), truth(before, keys))
    acts: dict[object, object] = {
        ("set", key): _ask(lambda key=key, value=value: db.__setitem__(key, value)) for key, value in SETS.items()
    }
    acts["del", DELETED] = _ask(lambda: db.__delitem__(DELETED))
    after = {**before, **SETS}
    after.pop(DELETED, None)
    right = _unless_refused(truth(after, keys), acts)
    second = _look({what: answer for what, answer in ask_all(db, keys, ("[]", "len")).items() if what in right}, right)
    acts["close"] = _ask(db.close)
    done = _look(acts, {**dict.fromkeys(acts), ("del", DELETED): None if DELETED in before else MISSING})
    third = _reread(path, keys, right)
    return Look(*map(sum, zip(first, second, done, third, strict=True), ([], [])))


def _reread(path: Path, keys: list[bytes], right: Mapping[object, object]) -> Look:
    db = _ask(lambda: dbm_bitcask.open(path, "r"))
    if not isinstance(db, dbm_bitcask.Database):
        return _look({"open": db}, {})
    found = {what: answer for what, answer in ask_all(db, keys, ("[]", "len", "items")).items() if what in right}
    db.close()
    return _look(found, right)


def _unless_refused(right: dict[object, object], acts: Mapping[object, object]) -> dict[object, object]:
    """What is true of a store whether or not what was refused took place."""
    refused = {key for (_, key), answer in acts.items() if isinstance(answer, Failed)}
    if not refused:
        return right
    return {what: answer for what, answer in right.items() if isinstance(what, tuple) and what[1] not in refused}


LOOKS = {"r": read, "w": read_and_write}


def is_never_right(complaint: Wrong, small: Small) -> bool:
    """Whether no state of an index explains this: an exception of Python's, or a value that the key never had."""
    if isinstance(complaint.answer, Foreign):
        return True
    if not isinstance(complaint.answer, bytes) or complaint.what[0] not in ("[]", "get"):
        return False
    key = complaint.what[1]
    return complaint.answer not in {SETS.get(key), *(each.value for each in small.log if each.key == key)}


# Not for ever.


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Have `alarm` raise `Hang` where it is."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def alarm(seconds: float = SECONDS) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)


def report(failures: list[str], done: int) -> None:
    """Fail if anything failed, with the first of it."""
    print(f"{done} cases, {len(failures)} failures")
    assert not failures, "\n".join([f"{len(failures)} of {done} cases failed:", *failures[:25]])
