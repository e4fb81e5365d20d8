"""Log: the segments that exist, with their index: what one handle holds of a database.

Nothing here takes the lock. Reading is right without it; `write`, `rotation` and `recovery` change what is held here, under it.
"""

from __future__ import annotations

import threading
from time import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeAlias, TypeVar

from . import compression, files, lookup, manifest, names, record, segment
from . import header as at
from .errors import CLOSED, CorruptionError, NotFoundError, as_error, error
from .expiry import is_expired
from .header import MASK32
from .lock import lock_of, renew_after_fork
from .page import Damaged, locations
from .portable import open_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from .files import Directory, File, Identity, Map
    from .header import Words
    from .keydir import Keydir
    from .manifest import Entry, Manifest

__all__ = ["LARGEST_MANIFEST", "Gone", "Log", "Options", "Peek", "read_manifest", "under_lock_of"]

Result = TypeVar("Result")

LARGEST_MANIFEST = 2**28  # bytes: ten million segments
LARGEST_VALUE = record.LIMIT  # bytes of one that was compressed
_READ_AHEAD = 512  # bytes read at once from beyond the map: most records are smaller
_FILES = 64  # that one handle keeps open where it cannot map them
_REMAP = 256 * 1024  # the active segment is mapped anew when it grew by so much
_TRIES = 1000  # more than the commits that can come between reading the header and reading the manifest


class Peek(NamedTuple):
    """A record's head and key, unverified: the hash in its slot vouches for the key."""

    flags: int
    key: bytes
    length: int


Match: TypeAlias = tuple[int, record.Record | None]  # the location of a key (0: it is not there), and its record if that was read


class Gone(Exception):
    """A segment that the manifest of this handle lists has no file; the text is its path."""


_FORKED = "this handle came with a fork, which the portable files do not share; open the database again"


class _Released:
    """Stands where a closed handle had its files."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def refuse(self, *_: object) -> NoReturn:
        raise error(self._reason)

    __iter__ = refuse

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()


class Options(NamedTuple):
    """How a writer goes about it; another may do otherwise at the same time."""

    mode: int = 0o666  # of new files, under the umask
    segment_size: int = 2**32 - 1  # bytes from which on a segment is sealed
    timeout: float | None = None  # seconds to wait for the lock; None: for ever
    alone: bool = False  # no other process uses the database: no lock is taken
    files: str = "auto"  # the layer: "native", "portable" or the better of them
    merge: str = "auto"  # who cleans the log: "auto", those who write; "thread", a thread besides; "manual", who asks for it
    compress: str | None = None  # how values are compressed: "zlib", "zstd" or not


DEFAULT = Options()


class Log:
    """The files of one handle: directory, manifest, open segments, active segment, keydir."""

    keydir: Keydir
    active: File
    held: tuple[dict[int, Entry], Entry, File]  # the segments, and the active one with its file
    shared_generation: Words  # of the active segment: one word
    get: Callable[[bytes], bytes | None]

    def __init__(self, directory: Directory, options: Options = DEFAULT, *, write: bool = False) -> None:
        self.directory = directory
        self.lock = lock_of(directory, alone=options.alone)
        self.timeout = options.timeout
        self.write = write
        self.mode = options.mode
        self.segment_size, self.merge = options.segment_size, options.merge
        self.made_dead = 0  # bytes of records, by the operation that is being done
        self.surveys_to_skip = 0  # by writes that pay for a merge, where looking at every segment takes its time
        self.compress = options.compress
        self.manifest: Manifest = manifest.Manifest(0, 1, ())
        self.entries: dict[int, Entry] = {}
        self.segments: dict[int, tuple[Map, int]] = {}  # what is mapped, with its salt
        self.opened: dict[int, tuple[File, int]] = {}  # of those that cannot be mapped
        self.can_map, self.survives_fork = directory.can_map, directory.survives_fork
        self.released = False
        self.rows: dict[int, int] = {}
        self.epoch = self.generation = 0
        self.salt = 0  # of the active segment
        self.sealed_here: list[int] = []  # segments that this handle sealed: it writes their hints when it closes
        self.scanned_end = 0  # how far the active segment is known to be whole while there is no keydir to tell
        self.beside: tuple[Identity | None, ...] | None = None  # `seen_beside` when an own keydir was built
        self.pages_wanted = 0  # by a batch: of the next keydir, where that cannot grow
        self.passed_over: File | None = None  # the keydir that was not trusted: kept open, so that no other one gets its inode
        self.recover: Callable[..., None] = self._cannot_recover
        self._refreshing, self.recovering = threading.RLock(), threading.RLock()
        renew_after_fork(self)
        self.maps = directory.maps_at_a_time()
        directory.begin()

    def renew_after_fork(self) -> None:
        """In a child: another thread of the parent may have been in `refresh`, or in a recovery."""
        self._refreshing, self.recovering = threading.RLock(), threading.RLock()
        if not self.survives_fork and not self.released:
            self.release(_FORKED)

    # What exists.

    def adopt(self, fresh: Manifest) -> None:
        """Hold what this manifest lists."""
        before = self.manifest
        if fresh.checksum == before.checksum:
            return
        entries = {entry.id: entry for entry in fresh.segments}
        active = segment.open_segment(self.directory, fresh.active, write=self.write)
        growing = before.active.id if before.segments else 0
        salts = {entry.id: entry.salt for entry in fresh.segments if entry.id != growing}  # an id may be another database's by now
        kept = {number: held for number, held in list(self.segments.items()) if held[1] == salts.get(number)}
        opened = {number: held for number, held in list(self.opened.items()) if held[1] == salts.get(number)}
        salt = fresh.active.salt
        held, generation = (entries, fresh.active, active), segment.map_generation(active)
        # Nothing is called from here on: a signal must not find half of it done.
        self.held, self.active, self.entries, self.segments, self.salt = held, active, entries, kept, salt
        self.opened = opened
        self.shared_generation, self.manifest = generation, fresh

    def is_current(self) -> bool:
        """Whether no other handle has changed anything that has to be caught up with."""
        return bool(self.keydir.words[at.EPOCH] == self.epoch and self.shared_generation[0] == self.generation)

    def follow(self) -> None:
        """Catch up with what other handles changed, without the lock: also with a keydir that another has taken the place of."""
        self.refresh()
        if not self.is_named():  # to be asked after the generation was read: who takes its place moves that before
            self.recover(damaged=False)

    def is_named(self) -> bool:
        """Whether the keydir is what its name stands for; an own one needs none."""
        named = self.directory.identity_of(names.KEYDIR)
        return self.beside is not None or (named is not None and named[:2] == self.keydir.file.opened[:2])

    def refresh(self) -> None:
        """Catch up with the manifest and the keydir, its size and its directory; under the lock, too."""
        while not self._catch_up():
            self.recover(damaged=False)  # takes the lock, so that it must not be called under the mutex of `_catch_up`

    def _catch_up(self) -> bool:
        """The same, but for a keydir that was replaced: False if it was."""
        with self._refreshing:
            for _ in range(_TRIES):
                words = self.keydir.words
                epoch = words[at.EPOCH]
                if words[at.STATE] == at.MOVED:
                    return False
                expected = words[at.MANIFEST], words[at.NEXT_MANIFEST]
                if self.manifest.checksum != expected[0] or expected[0] != expected[1]:
                    fresh = read_manifest(self.directory)
                    if fresh.checksum not in expected or fresh.number < self.manifest.number:
                        continue  # between two commits, or another thread was faster
                    try:
                        self.adopt(fresh)
                    except FileNotFoundError:
                        continue
                self.keydir.listed = self.entries
                self.keydir.refresh()
                self.rows = self.keydir.rows()
                generation = self.shared_generation[0]
                if files.fence:
                    files.fence()
                if words[at.EPOCH] == epoch:
                    self.epoch, self.generation = epoch, generation
                    self._bind()
                    return True
            raise error(f"{self.directory.name}: manifest and keydir do not agree; close and open the database again")

    def _bind(self) -> None:
        if self.keydir.words[at.DAMAGED] or self.beside is not None or not self.can_map:
            self.get = self.slow_get
        else:
            generation = self.shared_generation, self.generation
            self.get = lookup.reader(self.keydir.table, self.epoch, generation, self.segments, self.slow_get)

    def look_beside(self) -> None:
        """Of a reader with a keydir of its own: whether a writer has come since, which makes one that all share."""
        if self.beside is not None and self.beside != self.seen_beside():
            self.recover(damaged=False)

    def seen_beside(self) -> tuple[Identity | None, ...]:
        """What changes with whatever another handle does, as this reader saw it last."""
        active = names.segment_name(self.manifest.active.id)
        return tuple(self.directory.identity_of(name) for name in (names.KEYDIR, names.MANIFEST, active))

    def _cannot_recover(self, *, damaged: bool) -> None:
        del damaged
        raise error(f"{self.directory.name}: the keydir is damaged; close and open the database again")

    def durable(self, sync: Callable[[], None]) -> None:
        """Call a sync. One that failed is never tried again: the kernel may have dropped the pages, and would report success."""
        try:
            sync()
        except OSError:
            self.keydir.words[at.POISON] = 1
            self.keydir.words[at.STATE] = at.POISONED
            raise

    def release(self, reason: str = CLOSED) -> None:
        """Let go of every file and map; whoever reads at this moment in another thread keeps what it holds."""
        if not self.released:
            self.released = True  # first: who is interrupted here must not count down twice
            self.directory.end()
        self.segments, self.opened = {}, {}
        closed = _Released(reason)
        self.get = closed.refuse
        self.directory = self.lock = self.active = self.keydir = self.held = closed  # type: ignore[assignment]

    def under_lock(self, action: Callable[..., Result], *args: object) -> Result:
        """Run `action(log, ...)` under the writer lock, on whatever is there; `LockTimeout` if it is not to be had in time."""
        if self.timeout is None:
            return self.lock.run(action, self, *args)
        return self.lock.run_within(self.timeout, self._holder, action, self, *args)

    def _holder(self) -> str:
        """Who has the lock, as far as the keydir tells."""
        try:
            file = self.directory.open(names.KEYDIR)
        except OSError:
            return "another process"
        pid, since = (int.from_bytes(file.read(8, 8 * word), "little") for word in (at.HOLDER, at.HELD_SINCE))
        if not files.is_alive(pid):  # the one that has it has not come to write its name
            return "another process"
        return f"process {pid}, since {max(0, int(time()) - since)} s"

    # Reading records.

    def bytes_at(self, location: int, *, whole: bool = True) -> tuple[Buffer, int, int]:
        """(bytes, where the record begins in them, seed) for a location in a listed segment; without `whole`, at least head and key."""
        number, offset = location >> 32, location & MASK32
        entries, growing, active = self.held  # of one moment: another thread may be in `adopt`
        entry = entries.get(number)
        if entry is None:
            raise Gone(self.directory.where(names.segment_name(number)))
        seed = entry.salt ^ offset
        held = self.segments.get(number)
        if held is not None and offset < len(held[0]):
            return held[0], offset, seed
        if not self.can_map:
            return _read_at(active if entry is growing else self._open(entry), offset, whole=whole), 0, seed
        if entry is not growing:
            return self._map(entry, None, entry.length), offset, seed
        end = self.end_of(entry)
        mapped = len(held[0]) if held is not None else 0
        if end - mapped >= _REMAP and offset < end:
            return self._map(entry, active, end), offset, seed
        return _read_at(active, offset, whole=whole), 0, seed

    def end_of(self, entry: Entry) -> int:
        """Where the records of a segment end."""
        if entry.length:
            return entry.length
        if self.scanned_end:
            return self.scanned_end
        tail = self.keydir.counter(at.TAIL)
        return tail & MASK32 if tail >> 32 == entry.id else self.active.size()

    def whole(self, entry: Entry) -> Map:
        """All bytes of a sealed segment; `Gone` if it is not there."""
        held = self.segments.get(entry.id)
        return held[0] if held is not None else self._map(entry, None, entry.length)

    def _open(self, entry: Entry) -> File:
        """A segment that is read and not mapped."""
        held = self.opened.get(entry.id)
        if held is not None and held[1] == entry.salt:
            return held[0]
        file = self._open_or_gone(entry)
        with self._refreshing:
            opened = self.opened
            while len(opened) >= _FILES:
                del opened[next(iter(opened))]
            opened[entry.id] = file, entry.salt
        return file

    def _open_or_gone(self, entry: Entry) -> File:
        try:
            return segment.open_segment(self.directory, entry)
        except FileNotFoundError as gone:
            raise Gone(self.directory.where(names.segment_name(entry.id))) from gone

    def _map(self, entry: Entry, file: File | None, end: int) -> Map:
        if file is None:
            file = self._open_or_gone(entry)
        buffer = segment.map_segment(file, end)
        with self._refreshing:
            segments = self.segments  # a rotation may put another one in its place
            while len(segments) >= self.maps:
                del segments[next(iter(segments))]
            if self.entries.get(entry.id) == entry:
                segments[entry.id] = buffer, entry.salt
        return buffer

    def read(self, location: int) -> record.Record:
        """The verified record at a location; `CorruptionError` if it does not verify, `Gone` if its segment is not there."""
        data, offset, seed = self.bytes_at(location)
        try:
            found = record.decode(data, offset, seed)
        except record.BadRecord:
            found = None
        if found is None:
            raise self.corrupt(location, "the record does not verify; run `check`, then `repair`")
        return found

    def value_of(self, found: record.Record, location: int) -> bytes:
        """The value of a record as its user knows it: the one copy that is made of it."""
        if not found.flags & compression.COMPRESSED:
            return bytes(found.value)
        try:
            return compression.unpack(found.flags, found.value, LARGEST_VALUE)
        except compression.BadValue as bad:
            raise self.corrupt(location, "the value cannot be decompressed, although the record verifies; set or delete its key") from bad

    def peek(self, location: int) -> Peek:
        """Head and key of the record at a location, not verified."""
        data, offset, _ = self.bytes_at(location, whole=False)
        head = record.decode_head(data, offset)
        if head is None:
            raise self.corrupt(location, "no record begins here; run `check`, then `repair`")
        key = memoryview(data)[offset + head.key_start : offset + head.key_end]
        return Peek(head.flags, bytes(key), head.length)

    def corrupt(self, location: int, reason: str) -> CorruptionError:
        name = names.segment_name(location >> 32)
        return CorruptionError(self.directory.where(name), location & MASK32, reason)

    # Looking up.

    def slow_get(self, key: bytes) -> bytes | None:
        """The value of a key, or None: the whole of a search, whatever the state of the handle."""
        location, found = self._search(key, self._read_match)
        return None if found is None else self.value_of(found, location)

    def find(self, key: bytes) -> int | None:
        """The location of a key, or None if it is not there. Right without the lock."""
        return self._search(key, self._match)[0] or None

    def look_up(self, key: bytes) -> Match | None:
        """The location of a key, and its record if that is one that expires; None if the key is not there. Right without the lock."""
        match = self._search(key, self._match)
        return match if match[0] else None

    def counts(self, key: bytes) -> bool:
        """Whether a key is one of those that are counted: it is there, or has expired and was not deleted yet. Right without the lock."""
        return self._search(key, self._match, expired=True)[0] != 0

    def _search(self, key: bytes, match: Callable[[bytes, list[int]], Match], *, expired: bool = False) -> Match:
        """What `match` makes of the locations of a key, of one moment; (0, None) if its record has expired, unless that is asked for."""
        self.look_beside()
        while True:
            if not self.is_current():
                self.follow()
            epoch, table = self.epoch, self.keydir.table
            words = table.words
            try:
                found = match(key, locations(table, key))
            except Damaged:
                if words[at.EPOCH] == epoch:
                    self.recover(damaged=True)
                continue
            except Gone as gone:
                self.require_change(epoch, gone)
                continue
            except CorruptionError:
                if words[at.EPOCH] == epoch == self.epoch:
                    raise
                continue
            if words[at.EPOCH] == epoch == self.epoch:
                self.require_undamaged(found[0])
                return (0, None) if found[1] is not None and is_expired(found[1]) and not expired else found

    def _match(self, key: bytes, candidates: list[int]) -> Match:
        """The location with this key; its value is not read, but if it expires: no key is called gone by bytes that were not verified."""
        for location in candidates:
            if location and location >> 32 in self.held[0]:
                head = self.peek(location)
                if head.key == key:
                    return location, self.read(location) if head.flags & record.EXPIRES else None
                self.read(location)  # another key with this hash, or damage
        return 0, None

    def _read_match(self, key: bytes, candidates: list[int]) -> Match:
        """The location with this key, and its record."""
        for location in candidates:
            if location and location >> 32 in self.held[0]:
                found = self.read(location)
                if found.key == key:
                    return location, found
        return 0, None

    def require_undamaged(self, location: int = 0) -> None:
        """Raise if a record was lost whose key is not known, and what stands at this location, or is not there, may be older."""
        damage = self.keydir.words[at.DAMAGED]
        if damage and location <= damage:
            raise self.corrupt(damage, "a record was lost here whose key is not known, so that what is older cannot be told; run `repair`")

    def published(self) -> tuple[int, int]:
        """(number of keys, tail); an operation that died between its slot and the counters counts as its slot says."""
        words = self.keydir.words
        while True:
            current = words[at.CURRENT]
            other = current ^ at.OTHER
            tail, count = words[current + at.TAIL], words[current + at.COUNT]
            if tail >> 32 not in self.entries:
                return 0, tail  # a `clear` died behind its commit
            if words[other + at.START] == tail and words[other + at.TAIL] >> 32 == tail >> 32:
                prepared = words[other + at.COUNT], words[other + at.TAIL]
                if self._is_published(tail):
                    count, tail = prepared
            if files.fence:
                files.fence()
            if words[at.CURRENT] == current:
                return count, tail

    def _is_published(self, tail: int) -> bool:
        """Whether the slot of the record at the tail has been stored already."""
        try:
            found = self.peek(tail)
            slots = locations(self.keydir.table, found.key)
        except (CorruptionError, Damaged, Gone):
            return False
        return not slots if found.flags & record.TOMBSTONE else tail in slots

    def batch_around(self, tail: int) -> tuple[int, int]:
        """Where the batch begins and ends in whose middle a tail stands; 0 and 0 if it stands in none."""
        begun, (_, growing, active) = self.keydir.words[at.BATCH], self.held
        if not begun < tail or not begun >> 32 == tail >> 32 == growing.id:
            return 0, 0
        head = record.decode_head(active.read(record.HEADER.size, begun & MASK32), 0)
        return (begun, begun + head.length) if head is not None and tail < begun + head.length else (0, 0)

    def whole_tail(self) -> int:
        """Where the last operation ends that was published as a whole: the tail, or where the batch begins in which it stands."""
        while True:
            tail = self.keydir.counter(at.TAIL)
            begun, _ = self.batch_around(tail)
            if files.fence:
                files.fence()
            if self.keydir.counter(at.TAIL) == tail:  # else the batch may be over, and nothing tells of it
                return begun or tail

    def require_change(self, epoch: int, gone: Gone) -> None:
        """A listed segment is missing: somebody has just merged it away, or it is lost."""
        if self.beside is not None and self.beside != self.seen_beside():
            self.recover(damaged=False)
            return
        if not self.is_named():
            self.recover(damaged=False)
            return
        if self.keydir.words[at.EPOCH] == epoch:
            raise CorruptionError(str(gone), None, "the manifest lists this segment, and it is not there; restore it or run `repair`")
        self.follow()


def under_lock_of(path: str, files: str, action: Callable[[Log], Result], *, write: bool = False) -> Result:
    """Run `action(log)` under the lock of the database at `path`, whatever state it is in; every failure is an `error`."""
    try:
        log = Log(open_directory(path, files), write=write)
    except error:
        raise
    except OSError as failure:
        raise NotFoundError(failure.errno, "no database here", path) from failure
    try:
        return log.under_lock(action)
    except error:
        raise
    except OSError as failure:
        raise as_error(failure, path) from failure
    finally:
        log.release()


def _read_at(file: File, offset: int, *, whole: bool) -> bytes:
    """The bytes of the record at an offset, or of its beginning up to the end of the key, and maybe of what follows."""
    data = file.read(_READ_AHEAD, offset)
    head = record.decode_head(data, 0)
    if head is not None and head.length <= file.size() - offset:
        wanted = head.length if whole else head.key_end
        if wanted > len(data):
            data = file.read(wanted, offset)  # not what is missing of it: to put the two together would copy both
    return data


def read_manifest(directory: Directory) -> Manifest:
    """The manifest of a directory; `NotFoundError` if it has none, `CorruptionError` if it does not verify."""
    path = directory.where(names.MANIFEST)
    try:
        file = directory.open(names.MANIFEST)
    except FileNotFoundError as missing:
        raise NotFoundError(missing.errno, "no database here", directory.name) from missing
    try:
        return manifest.decode(_manifest_bytes(file))
    except manifest.BadManifest as bad:
        raise CorruptionError(path, None, f"{bad}; run `repair`") from bad


def _manifest_bytes(file: File) -> bytes:
    """The bytes of a manifest; of one that has not the length that it tells, no more than its beginning."""
    size = file.opened.size
    beginning = file.read(min(size, _READ_AHEAD), 0)
    if not manifest.length_told(beginning) == size <= LARGEST_MANIFEST:
        return beginning[: manifest.BEGINNING]
    return beginning if size == len(beginning) else file.read(size, 0)
