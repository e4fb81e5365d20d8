"""Recovery: the log decides; keydir and counters follow. The caller holds the lock, except for a reader with a keydir of its own.

`ready` comes before every write. It compares three words and the size of the active segment, and does something only if

    the EPOCH moved          another handle changed what this one holds: catch up; so if the generation of the active segment did
    the STATE is not DIRTY   begin to write on a resting or clean keydir, or finish what somebody died in
    the size is not TAIL     somebody died or failed between a record and its slot: `repair`

`repair`, at the tail of a trusted keydir:

    1. If another keydir stands under the name, go over to it.
    2. A torn record is cut off: it was never acknowledged. A whole one is published, from the prepared counters if they are about it.
       A seal is a rotation to be finished. Of a batch the rest is published; one that turns out not to verify is cut as a whole, by a
       rebuild. Again, until the size is TAIL. Each step leaves a state that this procedure finishes.

`open_keydir` takes the keydir that is there if it can be trusted (`header.is_sound`, and the log is the one it was written for), and
otherwise makes a new one from hints and records, beside the old one, which is left behind marked MOVED:

    1. Read the whole log into a keydir under a temporary name.
    2. If the active segment has a torn tail, list it as sealed where its records end and start a new one: after a restart nothing is ever
       appended behind a cut, because the cut itself may be lost in the next crash while what was appended is not.
    3. Move the generation of the active segment, for those who map a keydir that has lost its name. A crash here makes them look for
       one, once for nothing.
    4. Give the new keydir its name. A crash before this leaves the old state for the next one.
"""

from __future__ import annotations

import secrets
from time import time
from typing import TYPE_CHECKING

from . import batch, contents, names, record, rotation, segment, write
from . import header as at
from .errors import error
from .expiry import note
from .files import is_alive
from .header import MASK32, PAGE_SIZE
from .keydir import Keydir, map_words
from .log import Log, read_manifest
from .manifest import Entry
from .page import key_hash, probe
from .record import BATCH, EXPIRES, MARK, SEAL, SYNCED, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .files import File
    from .hint import Hint

__all__ = [
    "build_beside",
    "heal",
    "is_poisoned",
    "is_unfinished",
    "leave_linked_segment",
    "open_keydir",
    "open_private_keydir",
    "ready",
    "rebuild",
    "renew_what_is_in_doubt",
    "require_sound",
    "take_keydir",
]


def ready(log: Log) -> None:
    """Make log and keydir agree before something is written."""
    while True:
        words = log.keydir.words
        if words[at.STATE] == at.MOVED:
            open_keydir(log)
        elif not log.is_current():
            _follow(log)
        elif words[at.STATE] != at.DIRTY:
            _begin(log)
        elif log.active.size() != words[words[at.CURRENT] + at.TAIL] & MASK32:
            _repair(log)
        else:
            if words[at.BATCH]:
                words[at.BATCH] = 0
            words[at.HOLDER], words[at.HELD_SINCE] = log.lock.pid, int(time()) & MASK32
            return


def _follow(log: Log) -> None:
    """Catch up, under the lock."""
    log.refresh()
    if not log.is_named():
        open_keydir(log)


def is_unfinished(log: Log) -> bool:
    """Whether somebody died in an operation."""
    words = log.keydir.words
    if words[at.STATE] in (at.CLEAN, at.RESTING):
        return False  # or it would not have been trusted
    return bool(words[at.STATE] == at.CHANGING or log.active.size() != log.keydir.counter(at.TAIL) & MASK32)


def _begin(log: Log) -> None:
    words = log.keydir.words
    state = words[at.STATE]
    require_sound(log)
    if state == at.CHANGING:
        _finish_change(log)
    elif state == at.CLEAN:
        boot, identity = log.directory.boot_id(), log.keydir.file.identity()
        words[at.DEVICE], words[at.BOOT_LOW], words[at.BOOT_HIGH] = identity.device, boot & at.MASK64, boot >> 64
        at.enter(words, at.DIRTYING)
    elif state == at.DIRTYING:
        log.durable(log.keydir.file.sync)  # before the first change: a clean mark must not outlive it
        at.enter(words, at.DIRTY)
    elif state == at.RESTING:
        at.enter(words, at.DIRTY)
    else:
        raise error(f"{log.directory.name}: the keydir is in no state that this version knows; delete the file `keydir`")


def _finish_change(log: Log) -> None:
    """Somebody died while changing the directory or the manifest."""
    words = log.keydir.words
    if words[at.NEXT_MANIFEST] != words[at.MANIFEST]:
        listed = read_manifest(log.directory)
        if listed.checksum == words[at.NEXT_MANIFEST]:
            rotation.finish_commit(log, listed)
            rotation.sweep(log.directory, listed)
        else:
            words[at.NEXT_MANIFEST] = words[at.MANIFEST]
    log.keydir.finish_split()
    log.refresh()


def _repair(log: Log) -> None:
    identity = log.directory.identity_of(names.KEYDIR)
    if identity is None or identity[:2] != log.keydir.file.identity()[:2]:
        open_keydir(log)
        return
    words = log.keydir.words
    tail = log.keydir.counter(at.TAIL)
    size = log.active.size()
    if size < tail & MASK32:
        raise log.corrupt(tail, f"somebody has cut {(tail & MASK32) - size} bytes off this segment; restore it, or open the database again")
    if read_manifest(log.directory).checksum != words[at.MANIFEST]:
        rebuild(log)
        return
    found = _record_at(log, tail & MASK32, size)
    if found is None and log.batch_around(tail)[0]:
        rebuild(log)  # a part of it has been published
    elif found is None and log.active.identity().links > 1:
        rotation.leave(log, sync=True)  # the file is a backup's, too: what is behind the tail stays there
    elif found is None:
        log.active.truncate(tail & MASK32)
    elif found.flags & SEAL:
        rotation.rotate(log, sealed=True)
    else:
        _publish(log, tail, found)


def _publish_next(log: Log) -> bool:
    """Publish the record behind the tail, if there is a whole one and it is no seal."""
    tail = log.keydir.counter(at.TAIL)
    found = _record_at(log, tail & MASK32, log.active.size())
    if found is None or found.flags & SEAL:
        return False
    _publish(log, tail, found)
    return True


def _record_at(log: Log, offset: int, size: int) -> record.Record | None:
    head = record.decode_head(log.active.read(record.HEADER.size, offset), 0)
    if head is None or head.length > size - offset:
        return None
    try:
        if log.can_map and head.length > write.LARGE:  # not read: it may be larger than what memory there is
            return record.decode(segment.map_segment(log.active, offset + head.length), offset, log.manifest.active.salt ^ offset)
        found = record.decode(log.active.read(head.length, offset), 0, log.manifest.active.salt ^ offset)
    except record.BadRecord:
        return None
    return None if found is None else found._replace(end=offset + head.length)


def _publish(log: Log, tail: int, found: record.Record) -> None:
    """Finish the operation whose record stands whole at the tail; a batch as a whole, also if the tail stands in its middle."""
    if found.flags & BATCH:
        log.keydir.words[at.BATCH] = tail
        checksum = int.from_bytes(log.active.read(record.CHECKSUM_SIZE, tail & MASK32), "little")
        write.publish_mark(log, tail, record.HEADER.size, checksum)
    else:
        _publish_one(log, tail, found)
    batch.resume(log)


def _publish_one(log: Log, tail: int, found: record.Record) -> None:
    words = log.keydir.words
    end = (tail & -(MASK32 + 1)) | found.end
    length = end - tail
    other = words[at.CURRENT] ^ at.OTHER
    checksum = int.from_bytes(log.active.read(record.CHECKSUM_SIZE, tail & MASK32), "little")
    prepared = (words[other + at.START], words[other + at.TAIL], words[other + at.CHECKSUM]) == (tail, end, checksum)
    prepared = prepared and words[other + at.ROW] in (0, *(row + at.ROW_DEAD for row in log.rows.values()))
    if found.flags & MARK:
        write.publish_mark(log, tail, length, checksum)
        return
    keydir = log.keydir
    hashed = key_hash(found.key, keydir.table.seed)
    keydir.recount(probe(keydir.table, hashed).page)  # before they are counted on
    place = write.locate(log, found.key, room=not found.flags & TOMBSTONE)
    if prepared:
        write.settle(log, place, 0 if found.flags & TOMBSTONE else tail, other)
    else:
        if place.location == tail:  # stored in a run of a batch, and not counted
            place = place._replace(location=0, length=0)
        write.publish(log, place, tail, length, checksum, flags=found.flags)
    keydir.recount(probe(keydir.table, hashed).page)


# Opening.


def open_keydir(log: Log) -> None:
    """Give the handle of a writer a keydir that can be trusted, and the newest manifest."""
    log.adopt(read_manifest(log.directory))
    if not take_keydir(log):
        rebuild(log)


def take_keydir(log: Log) -> bool:
    """Give the handle the keydir that is there, if it can be trusted to say where the keys of this log are."""
    try:
        file = log.directory.open(names.KEYDIR, write=log.write)
    except FileNotFoundError:
        return False
    identity = file.opened
    if identity.size < 4 * PAGE_SIZE:
        return False
    words = map_words(file, identity.size, write=log.write)
    boot = log.directory.boot_id()
    if not (at.is_sound(words, identity, boot) and _fits_log(log, words)):
        return False
    log.keydir = Keydir(file, words, write=log.write)
    log.beside = None
    log.refresh()
    if not log.keydir.has_rows() and log.is_current():
        return False
    if not log.write and log.batch_around(log.keydir.counter(at.TAIL))[0] and not is_alive(words[at.HOLDER]):
        return False  # half a batch is there, and who wrote it will not go on
    return log.write or log.is_named()  # under the lock nobody puts another one in its place


def _fits_log(log: Log, words: at.Words) -> bool:
    listed = log.manifest.checksum
    if words[at.MANIFEST] != listed and not (words[at.STATE] == at.CHANGING and words[at.NEXT_MANIFEST] == listed):
        return False
    while True:
        current = words[at.CURRENT]
        tail, start, checksum = (words[current + which] for which in (at.TAIL, at.START, at.CHECKSUM))
        if words[at.CURRENT] == current:
            break
    entry = log.entries.get(tail >> 32)
    if entry is None or (entry != log.manifest.active and words[at.STATE] != at.CHANGING):
        return bool(words[at.STATE] == at.CHANGING)
    file = log.active if entry == log.manifest.active else segment.open_segment(log.directory, entry)
    size, offset = file.size(), tail & MASK32
    if size < offset or (size != offset and words[at.STATE] in (at.CLEAN, at.RESTING)):
        return False  # nobody was writing, and yet the log went on: this keydir is older
    if start >> 32 != entry.id:
        return not start or offset == segment.FIRST_RECORD  # of a keydir that was just built, or of a segment without records
    header = file.read(record.HEADER.size, start & MASK32)
    if not header.startswith(checksum.to_bytes(record.CHECKSUM_SIZE, "little")):
        return False
    head = record.decode_head(header, 0)
    if head is not None and head.flags & BATCH and tail == start + record.HEADER.size:
        return True  # whoever published it had seen it whole
    # Either the tail is wrong, and would have good records cut off, or the record is damaged, which whoever reads it is told.
    return head is None or start + head.length == tail or not _is_whole(file, start & MASK32, head.length, entry.salt)


def _is_whole(file: File, offset: int, length: int, salt: int) -> bool:
    if offset + length > file.size():
        return False  # a length that is not verified yet may be anything
    try:
        return record.decode(file.read(length, offset), 0, salt ^ offset) is not None
    except record.BadRecord:
        return False


def open_private_keydir(log: Log, named: File | None) -> None:
    """Give the handle of a reader a keydir of its own, in a file outside the database, for `named` is not to be trusted."""
    while True:
        log.adopt(read_manifest(log.directory))
        log.passed_over = named
        seen = named.opened if named else None, *log.seen_beside()[1:]  # one that came since is to be looked at
        if read_manifest(log.directory).checksum == log.manifest.checksum:  # else what was seen is not what belongs to this manifest
            break
    end = _end_of_active(log)
    keydir = _build(log, log.directory.temporary_file(), end)
    _bind(log, keydir, end)
    log.keydir = keydir
    log.beside = seen  # last: other threads must not take the old one for what was seen
    log.refresh()


def build_beside(log: Log) -> Keydir:
    """A keydir of every record that verifies, whatever the hints say, in a file outside the database."""
    beside = _build(log, log.directory.temporary_file(), log.keydir.counter(at.TAIL) & MASK32, read_hints=False)
    log.scanned_end = 0
    return beside


def rebuild(log: Log) -> None:
    """Make a new keydir from the log, and put it in the place of the one that is there. O(bytes of the log); O(keys) with hints."""
    log.directory.refuse_remote()
    log.adopt(read_manifest(log.directory))
    end = _end_of_active(log)
    active, torn = log.active, end < log.active.size()
    temporary = names.temporary_name(names.KEYDIR)
    file = log.directory.create(temporary, log.mode)
    try:
        keydir = _build(log, file, end, write_hints=True)
        if torn:
            end = _leave_torn_segment(log, keydir, end)
        keydir.make_room(log.pages_wanted)
        log.pages_wanted = 0
        _bind(log, keydir, end)
        if not _mark_moved(log):
            segment.move_generation(active)
        log.directory.replace(temporary, names.KEYDIR)
    except BaseException:
        log.directory.remove(temporary)
        raise
    log.keydir = keydir
    log.refresh()


def _end_of_active(log: Log) -> int:
    """Where the records of the active segment end."""
    size = segment.readable_size(log.active)
    if size <= segment.FIRST_RECORD:
        return segment.FIRST_RECORD
    return contents.torn_tail_at(segment.map_segment(log.active, size), log.manifest.active, size)


def leave_linked_segment(log: Log) -> None:
    """A backup shares the file of the active segment by a hard link: seal it by its length, without a byte written to it."""
    ready(log)
    rotation.leave(log, sync=True)


def is_poisoned(log: Log) -> bool:
    """Whether a sync failed since the database was opened last."""
    return bool(log.keydir.words[at.POISON])


def require_sound(log: Log) -> None:
    """Raise if a sync failed since the database was opened last."""
    if is_poisoned(log):
        raise error(f"{log.directory.name}: an earlier sync failed, so that data may be lost; close and open the database again")


def heal(log: Log) -> None:
    """Make durable what a failed sync has left in doubt. The file is never synced again: the kernel may call dropped pages written.

    1. Start a new segment, and append everything again that stands behind the last good sync and counts. A crash here leaves what was in
       doubt in doubt.
    2. Sync the new segment, and list the old one as it ends at the last good sync. If something behind it cannot be read, the old one
       stays listed as it is: the damage is reported by whoever reads it.
    """
    _finish_change(log)  # the failed sync may have been that of a commit
    words = log.keydir.words
    while _publish_next(log):
        pass
    doubtful = log.manifest.active
    synced, tail = words[at.SYNCED_TO], log.keydir.counter(at.TAIL)
    start = synced & MASK32 if synced >> 32 == doubtful.id else segment.FIRST_RECORD
    rotation.leave(log, sync=False)
    left = log.entries.get(doubtful.id)
    if left is not None:
        reading = contents.Reading(segment.map_segment(segment.open_segment(log.directory, left), tail & MASK32), left, left.length)
        _append_again(log, left.id << 32, reading.records(start))
        log.durable(log.active.sync_contents)
        if not reading.damage:
            rotation.relist(log, left.id, (left._replace(length=start),) if start > segment.FIRST_RECORD else ())
    rebuild(log)


def _append_again(log: Log, base: int, records: Iterable[segment.Found]) -> None:
    """Append every record again that counts; those of a batch as a batch, of which a crash leaves all or nothing."""
    kept: list[batch.Item] = []
    end = 0  # of the batch that is being gathered
    for offset, found in records:
        if kept and offset >= end:
            batch.write_all(log, kept, again=True)
            kept = []
        end = end if offset < end else 0
        if found.flags & BATCH:
            end = found.end
        elif end and write.place_if_counts(log, base | offset, found) is not None:
            value = None if found.flags & TOMBSTONE else bytes(found.value)
            kept.append((found.key, value, found.flags & ~SYNCED, found.expiry))
        elif not end and not found.flags & contents.OVERHEAD:
            write.keep(log, base | offset, found)
    if kept:
        batch.write_all(log, kept, again=True)


def renew_what_is_in_doubt(log: Log) -> None:
    """Write again what no later record calls synced: where no keydir remembers whether a sync of it has failed. O(bytes of the segment)."""
    active, tail = log.manifest.active, log.keydir.counter(at.TAIL)
    synced, doubtful = segment.FIRST_RECORD, False
    for offset, found in contents.Reading(segment.map_segment(log.active, tail & MASK32), active, tail & MASK32).records():
        if found.flags & SYNCED:
            synced, doubtful = offset, False
        doubtful = doubtful or not found.flags & contents.OVERHEAD
    if doubtful:
        log.keydir.words[at.SYNCED_TO] = active.id << 32 | synced
        heal(log)


def _leave_torn_segment(log: Log, keydir: Keydir, end: int) -> int:
    """List the active segment as sealed where its records end, and start a new one: where that one's records end."""
    log.active.sync()
    fresh = Entry(log.manifest.next_id, secrets.randbits(64), 0)
    segment.create(log.directory, fresh, log.mode)
    cut = log.manifest.active._replace(length=end)
    listed = log.manifest._replace(number=log.manifest.number + 1, next_id=fresh.id + 1, segments=(*log.manifest.segments[:-1], cut, fresh))
    log.adopt(rotation.publish_manifest(log.directory, listed, log.mode))
    keydir.listed = log.entries
    row = keydir.rows()[cut.id]
    keydir.words[row + at.ROW_TOMBSTONES] = keydir.words[at.COUNTERS_A + at.TOMBSTONES]
    keydir.words[at.COUNTERS_A + at.TOMBSTONES] = 0
    keydir.add_rows((fresh.id,))
    return segment.FIRST_RECORD


def _mark_moved(log: Log) -> bool:
    """Tell those who map the keydir of this name that another one takes its place: False if it is not there, or not the one they map.

    A backup's link of it is not trusted anyway.
    """
    try:
        file = log.directory.open(names.KEYDIR, write=True)
    except OSError:
        return False
    identity = file.opened
    if identity.size < 4 * PAGE_SIZE:
        return False
    words = map_words(file, identity.size, write=True)
    if words[at.MAGIC] != at.MAGIC_WORD or words[at.INODE] != identity.inode:
        return False
    words[at.STATE] = at.MOVED
    words[at.EPOCH] = words[at.EPOCH] + 1 & at.MASK64  # it is not trusted, and may be anything
    return True


def _bind(log: Log, keydir: Keydir, end: int) -> None:
    """Tie a keydir that was just built to the manifest and the tail, and put its checksums on."""
    words = keydir.words
    active = log.manifest.active.id
    words[at.COUNTERS_A + at.TAIL] = active << 32 | end
    words[at.MANIFEST] = words[at.NEXT_MANIFEST] = log.manifest.checksum
    keydir.seal(len(keydir.touched))
    keydir.rest(at.RESTING)
    log.scanned_end = 0


class _Builder:
    """Applies the log to an empty keydir, in its order."""

    def __init__(self, log: Log, keydir: Keydir) -> None:
        self.log = log
        self.keydir = keydir
        self.count = 0
        self.live: dict[int, int] = {}
        self.tombstones: dict[int, int] = {}
        self.expiring: dict[int, list[int]] = {}  # rows that hold nothing else

    def apply(self, number: int, key: Hint) -> None:
        keydir, live = self.keydir, self.live
        hashed = key_hash(key.key, keydir.table.seed)
        place = keydir.room(hashed)
        slot, old = place.free, 0
        for found in place.found:
            location = keydir.words[found]
            length = write.length_if_same(self.log, location, key.key)
            if length is not None:
                slot, old = found, location
                live[location >> 32] -= length
                break
        if key.flags & TOMBSTONE:
            self.tombstones[number] = self.tombstones.get(number, 0) + key.size
            self.count -= 1 if old else 0
            if old:
                keydir.store(slot, hashed, 0)
            return
        live[number] = live.get(number, 0) + key.size
        if key.flags & EXPIRES:
            note(self.expiring.setdefault(number, [0] * at.ROW_WORDS), 0, key.size, key.expiry)
        self.count += 0 if old else 1
        keydir.store(slot, hashed, number << 32 | key.offset)


def _build(log: Log, file: File, end: int, *, read_hints: bool = True, write_hints: bool = False) -> Keydir:
    """A keydir of everything up to `end` of the active segment, in an empty file."""
    keydir = Keydir.create(file, log.directory.boot_id())
    keydir.listed = log.entries
    log.scanned_end = end
    builder = _Builder(log, keydir)
    damage: list[contents.Damage] = []
    for entry in log.manifest.segments:
        for key in _keys(log, entry, end, damage, read_hint=read_hints, write_hint=write_hints):
            builder.apply(entry.id, key)
    keydir.add_rows(log.entries)
    _store_tallies(log, keydir, builder, end)
    words = keydir.words
    words[at.DAMAGED] = max((place.segment << 32 | place.offset for place in damage), default=0)
    return keydir


def _store_tallies(log: Log, keydir: Keydir, builder: _Builder, end: int) -> None:
    rows, words = keydir.rows(), keydir.words
    active = log.manifest.active.id
    for entry in log.manifest.segments:
        row = rows[entry.id]
        tombstones = builder.tombstones.get(entry.id, 0)
        for word, expiring in enumerate(builder.expiring.get(entry.id, ())[at.ROW_EXPIRING :], row + at.ROW_EXPIRING):
            words[word] = expiring
        length = (entry.length or end) - segment.FIRST_RECORD
        words[row + at.ROW_DEAD] = length - builder.live.get(entry.id, 0) - tombstones
        if entry.id != active:
            words[row + at.ROW_TOMBSTONES] = tombstones
    words[at.COUNTERS_A + at.COUNT] = builder.count
    words[at.COUNTERS_A + at.TOMBSTONES] = builder.tombstones.get(active, 0)


def _keys(log: Log, entry: Entry, end: int, damage: list[contents.Damage], *, read_hint: bool, write_hint: bool) -> Iterator[Hint]:
    """The keys of a segment from its hint; else from its records, and then its hint may be written."""
    if entry.length and read_hint:
        known = contents.read_keys(log.directory, entry)
        if known is not None:
            yield from known
            return
    end = entry.length or end
    file = segment.open_segment(log.directory, entry)
    reading = contents.Reading(segment.map_segment(file, end), entry, end)
    yield from reading.keys()
    damage.extend(reading.damage)
    if write_hint and entry.length and not reading.damage:
        contents.write_hint(log.directory, reading.buffer, entry, log.mode)
