"""Store: the operations of one handle, bytes in, bytes out.

Reading takes no lock. Whatever changes the database runs in `locked`: under the lock, after `recovery.ready`. A failure in the middle of
it needs no clean-up here: the next operation, of whichever process, repairs what it finds.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, process_time, sleep, thread_time, time
from typing import TYPE_CHECKING, TypeVar

from . import backup, batch, compression, contents, files, merge, names, recovery, rotation, segment, walk, write
from . import header as at
from .errors import CorruptionError, NotFoundError, error
from .expiry import has_passed, is_expired, lifetime, time_left
from .header import PAGE_SIZE
from .log import Gone, Log, Options, read_manifest
from .manifest import MARKER, Entry, Manifest
from .page import SLOTS, Damaged
from .portable import open_directory
from .record import ALIGNMENT, EXPIRES, LIMIT, SYNCED, record_length
from .syncer import Syncer
from .ticker import Ticker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .batch import Item
    from .files import Directory, File
    from .record import Record

__all__ = [
    "BATCH_LIMIT", "MAXIMUM_SEGMENT", "MINIMUM_SEGMENT", "OVERHEAD", "SIZE_LIMIT", "UPDATE_LIMIT", "Item", "Options", "Stats", "Store",
    "has_passed", "is_database", "lifetime", "may_be_database", "time_left",
]  # fmt: skip

Result = TypeVar("Result")

_PAGES_A_SLICE = 256  # pages that are sealed under one hold of the lock
_CLEAN_KEYS = 100_000  # below this a rebuild after a restart is faster than it is noticed: no clean mark, so no fsync for it
_CLEAN_EVERY = 60.0  # seconds
_TRIES = 1000  # more than the commits that can come while a reader opens
_IDLE = 0.1  # seconds between two looks of the thread that merges while the process is idle
_IDLE_BREATH = 0.002  # seconds between two slices of it
_IDLE_PART = 10  # one over the part of the time that other threads may have had then
_SHRINK = 4  # a keydir with so many times the pages that it needs is made anew by a merge

MINIMUM_SEGMENT = 4096
MAXIMUM_SEGMENT = 2**32 - 1
SIZE_LIMIT = LIMIT - segment.FIRST_RECORD - record_length(EXPIRES, 0, 0) - ALIGNMENT  # of key and value together, in bytes
OVERHEAD = record_length(EXPIRES, 0, 0) + ALIGNMENT - 1  # a record takes at most so many bytes more than its key and value
BATCH_LIMIT = 256 * 2**20  # bytes of the records of one batch: they are in memory until they are written
UPDATE_LIMIT = 16 * 2**20  # bytes of the records that an `update` writes as one batch


def may_be_database(path: str) -> bool:
    """Whether there is a directory that only an attempt to open it can tell from a database: it holds our segments, or cannot be read."""
    try:
        return any(names.parse_segment(name) for name in open_directory(path).list())
    except (NotADirectoryError, FileNotFoundError):
        return False
    except OSError:
        return files.is_directory(path)


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of a database, as of one moment. Sizes are in bytes.

    `live_bytes` are those of records that count, also if they have expired, `dead_bytes` those that nobody needs, `tombstone_bytes` those
    of deletions that still have to be remembered; `disk_bytes` is what all files of the database take; `index_load` is the part of the
    index's slots that is in use. `merged_at` is the second since 1970 when a merge was last through with a segment, None if none was;
    `reclaimed_bytes` are those of the segments that merges have deleted, `copied_bytes` what they wrote for it: all three since the index
    was built.
    """

    keys: int
    live_bytes: int
    dead_bytes: int
    tombstone_bytes: int
    segments: int
    log_bytes: int
    disk_bytes: int
    index_bytes: int
    index_pages: int
    index_load: float
    merged_at: int | None
    reclaimed_bytes: int
    copied_bytes: int


def is_database(path: str) -> bool:
    """Whether there is a directory with the manifest of a database, as far as its first bytes tell."""
    try:
        head = open_directory(path).open(names.MANIFEST).read(len(MARKER), 0)
    except OSError:
        return False
    return head == MARKER


class Store:
    """One open database."""

    def __init__(self, log: Log, sync: float | None = None) -> None:
        self.log = log
        self.syncer = Syncer(log, sync)
        self.pack = compression.packer(log.compress if log.write else None)
        self.closed = False
        self._wrote = False
        self._pays = log.merge != "manual"
        self._cleaner = Ticker(_IDLE, self._clean_while_idle, "dbm_bitcask merge") if log.merge == "thread" and log.write else None
        self._was_busy = monotonic(), 0.0  # when the cleaner last looked, and the processor time that others had had until then
        self._popped = 0  # every key is at or behind this location, as far as this handle has popped them
        log.recover = self._recover

    # Opening.

    @classmethod
    def open_reader(cls, path: str, options: Options) -> Store:
        """Open for reading only: no lock is taken and no byte is written."""
        store = cls(Log(_directory(path, options)))
        return store._begin(store._open_to_read)

    @classmethod
    def open_writer(cls, path: str, options: Options, sync: float | None, *, create: bool) -> Store:
        """Open for reading and writing; with `create`, make the database if there is none.

        `sync` is the number of seconds after which writes are durable: 0 for at once, None for not before they are asked to be.
        """
        compression.packer(options.compress)  # an error before anything is made
        directory = _directory(path, options, create=create)
        store = cls(Log(directory, options, write=True), sync)
        return store._begin(lambda: store._under_lock(store._open, create))

    @classmethod
    def open_new(cls, path: str, options: Options, sync: float | None) -> Store:
        """Open an empty database in the place of one that is there, or of an empty file. The old contents stay until the commit."""
        compression.packer(options.compress)
        files.remove_empty_file(path)
        directory = _directory(path, options, create=True)
        store = cls(Log(directory, options, write=True), sync)
        return store._begin(lambda: store._under_lock(store._replace))

    def _begin(self, opening: Callable[[], object]) -> Store:
        try:
            opening()
            self.syncer.start()
            if self._cleaner is not None:
                self._cleaner.start()
        except BaseException:
            self._release()  # at once, and not when a collection finds it: others wait for the lock of the portable layer
            raise
        return self

    def _open_to_read(self) -> None:
        try:
            self._find_keydir()
        except NotFoundError:
            _refuse_lost_manifest(self.log.directory, self.log.directory.list())
            raise

    def _open(self, log: Log, create: bool) -> None:
        present = log.directory.list()
        if names.MANIFEST not in present:
            if not create:
                _refuse_lost_manifest(log.directory, present)
                raise NotFoundError(2, "no database here", log.directory.name)
            _refuse_foreign(log.directory, present)
            _refuse_lost_manifest(log.directory, present)
            self._create(1, 1)
            return
        log.adopt(read_manifest(log.directory))
        _refuse_other_lineage(log.directory, log.manifest, present)
        if not recovery.take_keydir(log):
            recovery.rebuild(log)
            if not log.can_map:
                recovery.renew_what_is_in_doubt(log)
        rotation.sweep(log.directory, log.manifest, present)
        try:
            self._make_whole(log)
        except Damaged:
            recovery.rebuild(log)
            self._make_whole(log)

    def _make_whole(self, log: Log) -> None:
        """Finish what others died in: now and not at the first write, for nothing may appear after it was seen to be absent."""
        if recovery.is_poisoned(log):
            recovery.heal(log)
        elif log.active.opened.links > 1:
            recovery.leave_linked_segment(log)
        elif recovery.is_unfinished(log):
            recovery.ready(log)
            self._wrote = True

    def _replace(self, log: Log) -> None:
        present = log.directory.list()
        if names.MANIFEST not in present:
            _refuse_foreign(log.directory, present)
            _refuse_lost_manifest(log.directory, present)
            self._create(1, 1)
            return
        old = read_manifest(log.directory)
        _refuse_other_lineage(log.directory, old, present)
        try:
            log.adopt(old)
            if recovery.take_keydir(log):
                recovery.ready(log)
                rotation.clear(log)
                return
        except (CorruptionError, FileNotFoundError, Damaged):
            pass  # what is not readable need not be read
        if log.manifest.segments and log.active.identity().links == 1:
            rotation.seal_behind(log, log.active.size())  # for whoever still writes there by a keydir that is gone
            segment.move_generation(log.active)  # and for whoever reads
        above = [names.parse_segment(name) or names.parse_hint(name) or 0 for name in present]
        self._create(max(old.next_id, *above) + 1, old.number + 1)

    def _create(self, first: int, number: int) -> None:
        """Make an empty database out of the files that are there: the manifest is what brings it into being, last."""
        log = self.log
        fresh = Entry(first, secrets.randbits(64), 0)
        segment.create(log.directory, fresh, log.mode)
        listed = rotation.publish_manifest(log.directory, Manifest(number, first + 1, (fresh,)), log.mode)
        recovery.rebuild(log)
        rotation.sweep(log.directory, listed)

    def _find_keydir(self) -> None:
        """Of a reader: the shared keydir if it can be trusted, else one of its own."""
        log = self.log
        for turn in range(_TRIES):
            listed, named = read_manifest(log.directory), _named_keydir(log)
            try:
                log.adopt(listed)
                if recovery.take_keydir(log):
                    listed = log.manifest  # which may be newer by now
                    # One look, for a good database is opened in no time whatever is in the directory.
                    _refuse_other_lineage(log.directory, listed, [names.segment_name(listed.next_id)])
                    return
                if turn > 1:  # else a writer may be opening it at this moment
                    _refuse_other_lineage(log.directory, listed, log.directory.list())
                    recovery.open_private_keydir(log, named)
                    return
            except (FileNotFoundError, Gone, CorruptionError):
                if read_manifest(log.directory).checksum == listed.checksum:
                    raise
        raise error(f"{log.directory.name}: the list of segments changes faster than it can be read")

    def _recover(self, *, damaged: bool) -> None:
        """The keydir was found damaged, or replaced, while it was mapped."""
        log = self.log
        if log.write:
            self._under_lock(_recover_keydir)
            return
        with log.recovering:  # two threads that build an own index would leave the older one
            if damaged:
                recovery.open_private_keydir(log, _named_keydir(log))
            elif log.beside is None or log.beside != log.seen_beside():
                self._find_keydir()

    # The lock.

    def locked(self, action: Callable[..., Result], *args: object) -> Result:
        """Run `action(log, ...)` under the lock, on a database that is whole and ready to be written."""
        result: Result = self._under_lock(self._run, action, *args)
        return result

    def _run(self, log: Log, action: Callable[..., Result], *args: object) -> Result:
        try:
            recovery.ready(log)
            self._wrote = True
            return action(log, *args)
        except Damaged:
            _recover_keydir(log)
            recovery.ready(log)
            return action(log, *args)
        except Gone as gone:
            raise CorruptionError(str(gone), None, "the manifest lists this segment, and it is not there; restore it") from gone

    def _change(self, action: Callable[..., Result], *args: object) -> Result:
        """Run `action(log, ...)` as `locked` does, for somebody who writes, and so pays for the merge."""
        result: Result = self._under_lock(self._run_and_pay, action, *args)
        return result

    def _run_and_pay(self, log: Log, action: Callable[..., Result], *args: object) -> Result:
        if self._cleaner is not None:
            self._cleaner.start()  # which a fork ends
        active = log.manifest.active.id
        log.made_dead = 0
        result = self._run(log, action, *args)
        if self._pays and (log.made_dead or log.manifest.active.id != active):
            # What the caller asked for is done: whatever fails here is for the next one to meet.
            with suppress(OSError, Damaged, Gone):
                merge.pay(log, log.made_dead, rotated=log.manifest.active.id != active)
        return result

    def _under_lock(self, action: Callable[..., Result], *args: object) -> Result:
        """Run `action(log, ...)` under the lock, on whatever is there."""
        return self.log.under_lock(action, *args)

    # Reading.

    def __len__(self) -> int:
        """The number of keys; those that have expired count until a merge. O(1)."""
        count = self._count()
        self.log.require_undamaged()
        return count

    def _count(self) -> int:
        """The number of keys, as far as they are known."""
        log = self.log
        log.look_beside()
        while True:
            if not log.is_current():
                log.follow()
                continue
            words = log.keydir.words
            count, _ = log.published()
            if words[at.EPOCH] == log.epoch:
                return count

    def contains(self, key: bytes) -> bool:
        """Whether the key is there, without reading its value."""
        return self.log.find(key) is not None

    def value_at(self, key: bytes, location: int) -> bytes | None:
        """The value of a key that a walk found at a location, or None if it is gone since."""
        if location >> 32 in self.log.entries:
            try:
                found = self.log.read(location)
                return None if is_expired(found) else self.log.value_of(found, location)
            except Gone:
                pass
        return self.log.get(key)

    def keys(self) -> Iterator[bytes]:
        """Every key, in the order of the log."""
        return (key for key, _ in walk.walk(self.log))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value."""
        for key, location in walk.walk(self.log):
            value = self.value_at(key, location)
            if value is not None:
                yield key, value

    def keys_after(self, key: bytes) -> Iterator[bytes]:
        """The keys behind this one in the order of the log."""
        location = self.log.find(key)
        if location is None:
            raise KeyError(key)
        return (other for other, _ in walk.walk(self.log, location) if other != key)

    def ttl(self, key: bytes) -> float | None:
        """The seconds for which a key will be there, None if for ever; KeyError if it is not there."""
        match = self.log.look_up(key)
        if match is None:
            raise KeyError(key)
        return time_left(match[1].expiry if match[1] else 0)

    # Writing.

    def set(self, key: bytes, value: bytes, flags: int = 0, expiry: int = 0) -> None:
        """Set a key to a value; `flags` are those of its record but for how the value is compressed. O(1)."""
        log = self.log
        if log.compress is not None:  # before the lock is taken
            packed, value = self.pack(value)
            flags |= packed
        lock = log.lock
        if log.timeout is not None:
            self._change(write.put, key, value, flags, expiry)
        else:
            with lock.mutex:  # as `lock.run` does, which would cost two calls more
                if lock.busy:
                    lock.refuse_reentry()
                try:
                    lock.busy = True
                    lock.acquire()
                    if flags or not write.put_new(log, key, value):
                        self._run_and_pay(log, write.put, key, value, flags, expiry)
                    self._wrote = True
                finally:
                    lock.busy = False
                    lock.release()
        if self.syncer.interval is not None:
            self.syncer.wrote()

    def touch(self, key: bytes, ttl: float | None) -> bool:
        """Give a key another time to live, from now on; False if it is not there. O(bytes of its value)."""
        found = self._change(_touch, key, *lifetime(ttl))
        if found:
            self.syncer.wrote()
        return found

    def write_batch(self, items: Sequence[Item]) -> None:
        """Write (key, value, flags, expiry) items, each of another key, all or nothing; a value of None deletes. O(items)."""
        if self.log.compress is not None:  # before the lock is taken
            items = [self._packed(*item) for item in items]
        written = bool(items) and self._change(_write_batch, items)
        if written:
            self.syncer.wrote()

    def _packed(self, key: bytes, value: bytes | None, flags: int, expiry: int) -> Item:
        if value is None:
            return key, value, flags, expiry
        packed, stored = self.pack(value)
        return key, stored, flags | packed, expiry

    def delete(self, key: bytes) -> bool:
        """Delete a key; False if it is not there. O(1)."""
        found = self._change(write.delete, key)
        if found:
            self.syncer.wrote()
        return found

    def pop(self, key: bytes) -> bytes | None:
        """Delete a key, and return its value; None if it is not there."""
        value = self._change(_pop, key)
        if value is not None:
            self.syncer.wrote()
        return value

    def popitem(self) -> tuple[bytes, bytes] | None:
        """Delete some key, and return it with its value; None if there is none. A loop of these is linear in all."""
        while len(self):
            start, moment = self._popped, (self.log.epoch, self.log.published())
            for key, location in walk.walk(self.log, self._popped, hold=False):
                self._popped = location
                value = self.pop(key)
                if value is not None:
                    return key, value
            if not start and moment == (self.log.epoch, self.log.published()):
                return None  # nobody wrote meanwhile: whatever is still counted has expired
            self._popped = 0
        return None

    def setdefault(self, key: bytes, default: bytes) -> bytes:
        """The value of a key, which is set to `default` if it is not there."""
        value = self.log.get(key)
        if value is None:
            value = self._change(_setdefault, key, default, *self.pack(default))
            self.syncer.wrote()
        return value

    def clear(self) -> None:
        """Delete every key. O(1), but for unlinking the files."""
        self.locked(rotation.clear)
        self._popped = 0

    def merge(self, progress: Callable[[int, int], object] | None = None) -> merge.MergeResult:
        """Give back the space of dead records. O(bytes of the segments that are worth it)."""
        result = merge.merge(self.log, self.locked, progress)
        self.locked(_shrink_keydir)
        return result

    def _clean_while_idle(self) -> None:
        """Merge as long as no other thread of this process does anything."""
        with suppress(OSError, Damaged, Gone):  # it is for whoever uses the database to meet that
            while self._is_idle() and self.locked(merge.work):
                sleep(_IDLE_BREATH)  # for other processes, which wait for the lock

    def _is_idle(self) -> bool:
        """Whether the other threads have used no tenth of the time since this was last asked."""
        then, had = self._was_busy
        now, have = monotonic(), process_time() - thread_time()
        self._was_busy = now, have
        return (have - had) * _IDLE_PART <= now - then

    def backup(self, path: str, progress: Callable[[int, int], object] | None = None) -> None:
        """Make a database at `path` that is what this one is now. It has its name when it is complete, and its index, too."""
        log = self.log
        begun = f"{path}.{secrets.token_hex(8)}.tmp"
        options = Options(log.mode, log.segment_size, files=log.directory.layer)
        directory = _directory(begun, options, create=True)
        try:
            backup.copy_to(log, directory, log.mode, progress)
            Store.open_writer(begun, options, None, create=False).close()
            files.rename_directory(begun, path)
        except BaseException:
            for name in directory.list():
                directory.remove(name)
            files.remove_directory(begun)
            raise
        open_directory(os.path.dirname(path), options.files).sync()

    # Durability.

    def sync(self) -> None:
        """Make everything that has been written durable (fdatasync)."""
        self.syncer.sync()

    def close(self) -> None:
        """Make everything durable, and leave the keydir to be trusted by the next one. A second call does nothing.

        Where it fails, the handle is closed nevertheless; one that is interrupted is not, so that it can be called again.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if self._wrote and not self.log.released:
                self._settle()
        except OSError:
            self._release()
            raise
        except BaseException:
            self.closed = False
            raise
        self._release()

    def _release(self) -> None:
        self.syncer.stop()
        if self._cleaner is not None:
            self._cleaner.stop()
        self.log.release()

    def _settle(self) -> None:
        log = self.log
        self.sync()
        with suppress(OSError):  # a full disk: neither is needed, and everything is durable
            self.locked(_vouch)
            self._write_hints()
        while not self.locked(_seal_slice):
            pass
        clean = self._count() >= _CLEAN_KEYS and abs(time() - log.keydir.words[at.CLEANED_AT]) > _CLEAN_EVERY
        self.locked(_rest, clean)
        if clean:
            tail = log.keydir.counter(at.TAIL)
            log.durable(log.keydir.file.sync)
            self._under_lock(_mark_clean, tail)
            log.durable(log.keydir.file.sync)

    def _write_hints(self) -> None:
        """The hints of the segments that this handle sealed: in proportion to what it wrote itself."""
        log = self.log
        for number in log.sealed_here:
            entry = log.entries.get(number)
            if entry is not None and entry.length and contents.mapped_hint(log.directory, entry) is None:
                buffer = segment.map_segment(segment.open_segment(log.directory, entry), entry.length)
                contents.write_hint(log.directory, buffer, entry, log.mode)
        log.sealed_here.clear()

    # Information.

    def stats(self) -> Stats:
        """The state of the database. O(segments + pages of the index)."""
        log = self.log
        while True:
            count, epoch = self._count(), log.epoch
            try:
                stats = self._stats(count)
            except KeyError:  # a rotation in between
                continue
            if log.keydir.words[at.EPOCH] == epoch:
                return stats

    def _stats(self, count: int) -> Stats:
        log = self.log
        words, rows = log.keydir.words, log.keydir.rows()
        lengths = {entry.id: log.end_of(entry) for entry in log.manifest.segments}
        dead = sum(words[rows[number] + at.ROW_DEAD] for number in lengths)
        active = log.manifest.active.id
        tombstones = log.keydir.counter(at.TOMBSTONES)
        tombstones += sum(words[rows[number] + at.ROW_TOMBSTONES] for number in lengths if number != active)
        log_bytes = sum(lengths.values())
        pages = sum(1 for _ in log.keydir.pages())
        return Stats(
            keys=count,
            live_bytes=log_bytes - len(lengths) * segment.FIRST_RECORD - dead - tombstones,
            dead_bytes=dead,
            tombstone_bytes=tombstones,
            segments=len(lengths),
            log_bytes=log_bytes,
            disk_bytes=log.directory.disk_bytes(),
            index_bytes=words[at.CAPACITY] * PAGE_SIZE,
            index_pages=pages,
            index_load=count / (pages * SLOTS),
            merged_at=words[at.MERGED_AT] or None,
            reclaimed_bytes=words[at.RECLAIMED],
            copied_bytes=words[at.COPIED],
        )


# Opening.


def _directory(path: str, options: Options, *, create: bool = False) -> Directory:
    try:
        return open_directory(path, options.files)
    except FileNotFoundError as missing:
        if not create:
            raise NotFoundError(missing.errno, "no database here", path) from missing
    except NotADirectoryError as other:
        raise error(other.errno, "this is a file and not a database (move it away, or convert it)", path) from other
    try:
        files.make_directory(path, options.mode | (options.mode & 0o444) >> 2)
        open_directory(os.path.dirname(path), options.files).sync()
    except FileExistsError:
        pass  # somebody else has just made it
    except FileNotFoundError as missing:
        raise NotFoundError(missing.errno, "the directory to make it in does not exist", os.path.dirname(path)) from missing
    return open_directory(path, options.files)


def _refuse_foreign(directory: Directory, present: list[str]) -> None:
    """A directory without a manifest may hold what a creation that was cut short left, and nothing else."""
    for name in present:
        if not _is_ours(directory, name):
            raise error(17, f"this directory is not a database: it holds {name!r}; nothing was changed", directory.name)


def _is_ours(directory: Directory, name: str) -> bool:
    if names.is_temporary(name) or names.parse_hint(name):
        return True
    if names.parse_segment(name):
        file = directory.open(name)
        # A crash may have left anything in the place of a header; and more than that is not there without a record.
        return file.opened.size <= segment.FIRST_RECORD or file.read(len(segment.MARKER), 0) == segment.MARKER
    if name == names.LOCK:
        status = directory.identity_of(name)  # not opened: closing it would drop a lock on it
        return status is not None and status.size == 0
    return name == names.KEYDIR and directory.open(name).read(8, 0) in (at.MAGIC_WORD.to_bytes(8, "little"), b"", bytes(8))


def _refuse_lost_manifest(directory: Directory, present: list[str]) -> None:
    """A directory without a manifest is a creation that was cut short, but only if no segment in it holds a record."""
    for name in present:
        number = names.parse_segment(name)
        if number is not None and segment.has_records(directory, number):
            raise CorruptionError(directory.where(names.MANIFEST), None, "it is missing, and there are segments with records; run `repair`")


def _refuse_other_lineage(directory: Directory, listed: Manifest, present: list[str]) -> None:
    for name in present:
        number = names.parse_segment(name) or 0
        if number >= listed.next_id and segment.has_records(directory, number):
            reason = f"segment {name} is newer than this manifest, which seems to be restored; nothing was changed; run `repair`"
            raise CorruptionError(directory.where(names.MANIFEST), None, reason)


def _named_keydir(log: Log) -> File | None:
    try:
        return log.directory.open(names.KEYDIR)
    except FileNotFoundError:
        return None


def _recover_keydir(log: Log) -> None:
    identity = log.directory.identity_of(names.KEYDIR)
    if identity is None or identity[:2] != log.keydir.file.identity()[:2]:
        recovery.open_keydir(log)
    else:
        recovery.rebuild(log)


# Actions under the lock.


def _find(log: Log, key: bytes) -> tuple[write.Place, Record] | None:
    """The place of a key and its record; None if it is not there, or has expired."""
    place = write.locate(log, key, room=False)
    log.require_undamaged(place.location)
    if not place.location:
        return None
    found = log.read(place.location)
    return None if is_expired(found) else (place, found)


def _pop(log: Log, key: bytes) -> bytes | None:
    there = _find(log, key)
    if there is None:
        return None
    place, found = there
    value = log.value_of(found, place.location)
    write.bury(log, place, key)
    return value


def _setdefault(log: Log, key: bytes, default: bytes, flags: int, packed: bytes) -> bytes:
    there = _find(log, key)
    if there is not None:
        place, found = there
        return log.value_of(found, place.location)
    write.put(log, key, packed, flags)
    return default


def _touch(log: Log, key: bytes, flags: int, expiry: int) -> bool:
    there = _find(log, key)
    if there is None:
        return False
    _, found = there
    if flags or found.flags & EXPIRES:
        write.put(log, key, found.value, found.flags & ~(EXPIRES | SYNCED) | flags, expiry)
    return True


def _write_batch(log: Log, items: Sequence[Item]) -> bool:
    try:
        return batch.write_all(log, items)
    except BaseException:
        if log.keydir.words[at.BATCH]:
            recovery.ready(log)  # or those who read would see a half of it until somebody writes
        raise


def _seal_slice(log: Log) -> bool:
    return log.keydir.seal(_PAGES_A_SLICE)


def _vouch(log: Log) -> None:
    """Leave a record that says that all before it is synced, unless somebody has written meanwhile."""
    words = log.keydir.words
    if words[at.SYNCED_TO] == words[words[at.CURRENT] + at.TAIL]:
        write.mark(log)


def _rest(log: Log, clean: bool) -> None:
    """The last thing that a closing writer does under the lock: seal pages and header."""
    words = log.keydir.words
    if words[at.UNSEALED] > len(log.keydir.touched) and (clean or words[at.PAGES] <= _PAGES_A_SLICE):
        log.keydir.touch_unsealed()
    log.keydir.seal(len(log.keydir.touched))
    log.keydir.rest(at.RESTING)


def _mark_clean(log: Log, tail: int) -> None:
    words = log.keydir.words
    if words[at.STATE] == at.RESTING and words[words[at.CURRENT] + at.TAIL] == tail and not words[at.UNSEALED]:
        at.enter(words, at.DIRTY)
        words[at.CLEANED_AT] = int(time()) & at.MASK32
        log.keydir.rest(at.CLEAN)


def _shrink_keydir(log: Log) -> None:
    needed = len(log.rows) // 64 + log.keydir.counter(at.COUNT) * 2 // SLOTS + 16
    if log.keydir.words[at.PAGES] > needed * _SHRINK:
        recovery.rebuild(log)
