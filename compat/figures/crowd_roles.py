"""The processes of `crowd`: the ledger that they share, the writer and the reader.

The ledger is a file of 64-bit words beside the database, mapped by every process: it survives whoever is killed. Each key has an owner, the
only writer of it, and two words: BEGUN, the sequence number that the owner is about to write, and ACKNOWLEDGED, the last one that it wrote.
What a sequence number does to its key (set it, or delete it) follows from both, and the value from both, too. So a reader that looks at
ACKNOWLEDGED before a get and at BEGUN behind it knows every answer that is right.

Some sequence numbers set their key for a short time only. So an answer stands for a place in the history of its key: the sequence number
doubled, and one more if what it set has expired since. Nobody ever goes back to an earlier place.

The last keys of each writer are written in batches, and in no other way. Readers may see a batch half written, and judge key by key; but
the writer who comes after one that was killed in a batch finds all of it there, or nothing.
"""

import mmap
import random
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import dbm_bitcask

DELETES = 5  # every so many sequence numbers a key that may be deleted is deleted
INDELIBLE = 3  # every so many keys one is never deleted
EXPIRES = 7  # every so many sequence numbers a key that may be deleted is set for a short time
TTL = 0.5  # seconds, which is a short time
BATCH = 12  # keys of one batch
BATCHED = 10 * BATCH  # keys of each writer that are written in batches
HOT_KEYS = 16  # that every writer writes
HOT_BITS = 48  # of a sequence number of a hot key: below the number of its writer
RESOURCES = 4  # words in which a process leaves what it uses
FIRST_HALF, SECOND_HALF, STOP = range(3)

Range = tuple[int, int]


class Plan(NamedTuple):
    """What all processes of a run agree on."""

    place: Path
    writers: int
    readers: int
    keys: int  # of each writer
    segment_size: int

    @property
    def database(self) -> Path:
        return self.place / "crowd.bitcask"


class Ledger:
    """Words that all processes share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.total = plan.writers * plan.keys
        roles = plan.writers + plan.readers
        size = 8 * (1 + 2 * self.total + plan.writers + roles * (1 + RESOURCES))
        path = plan.place / "ledger"
        with path.open("a+b") as file:
            file.truncate(size)
            self.words = memoryview(mmap.mmap(file.fileno(), size)).cast("Q")
        self.phase, self.begun, self.acknowledged = 0, 1, 1 + self.total
        self.hot = self.acknowledged + self.total
        self.beats = self.hot + plan.writers
        self.resources = self.beats + roles

    def beat(self, role: int) -> bool:
        """Show that a process lives, and tell whether it may go on."""
        self.words[self.beats + role] += 1
        return bool(self.words[self.phase] != STOP)

    def leave_resources(self, role: int) -> None:
        """Note the most descriptors, beyond one for each segment, and anonymous memory that a process had in this half of the run."""
        start = self.resources + role * RESOURCES + 2 * (self.words[self.phase] != FIRST_HALF)
        segments = sum(1 for _ in self.plan.database.glob("*.data"))
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        for word, now in zip((start, start + 1), (max(0, descriptors - segments), anonymous()), strict=True):
            self.words[word] = max(self.words[word], now)


def anonymous() -> int:
    """The anonymous memory of this process in KiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0])


def name(number: int) -> bytes:
    """The key with a number."""
    return b"%c%07d" % (b"i" if number % INDELIBLE == 0 else b"d", number)


def hot_name(number: int) -> bytes:
    """A key that every writer writes."""
    return b"hot%d" % number


def deletes(number: int, sequence: int) -> bool:
    """Whether a sequence number deletes its key; 0 stands for a key that was never written."""
    return not sequence or bool(number % INDELIBLE and (number + sequence) % DELETES == 0)


def expires(number: int, sequence: int) -> bool:
    """Whether a sequence number sets its key for a short time."""
    return bool(number % INDELIBLE and (number + sequence) % EXPIRES == 0) and not deletes(number, sequence)


def place(first: int, last: int) -> Range:
    """The places in the history of a key from one sequence number to another."""
    return 2 * first, 2 * last + 1


def is_there(number: int, position: int) -> bool:
    """Whether a key is there at a place in its history."""
    return not position % 2 and not deletes(number, position // 2)


def is_missing(number: int, position: int) -> bool:
    """Whether a key is not there at a place in its history."""
    return expires(number, position // 2) if position % 2 else deletes(number, position // 2)


def value(key: bytes, sequence: int) -> bytes:
    """The value of a key for a sequence number: both, a filler, and a checksum."""
    body = b"%s %d %s" % (key, sequence, b"." * (zlib.crc32(b"%d" % sequence, len(key)) % 400))
    return body + b"%08x" % zlib.crc32(body)


def sequence_of(key: bytes, found: bytes) -> int:
    """The sequence number in a value; ValueError if it is not a whole value of this key."""
    parts = found.split(b" ", 2)
    if len(parts) != 3 or parts[0] != key or not parts[1].isdigit() or found != value(key, int(parts[1])):
        raise ValueError(f"{key!r} has a wrong value: {found!r}")
    return int(parts[1])


class Writer:
    """Writes its own keys, and the hot ones, for ever."""

    def __init__(self, plan: Plan, role: int, seed: int) -> None:
        self.plan, self.role = plan, role
        self.ledger = Ledger(plan)
        self.choose = random.Random(seed)
        self.db = self._open()
        self.short: dict[int, tuple[int, float, float]] = {}  # keys set for a short time: as what, and between which moments it ends

    def _open(self) -> dbm_bitcask.Database:
        compress = "zlib" if self.role % 2 else None
        return dbm_bitcask.open(self.plan.database, "w", segment_size=self.plan.segment_size, compress=compress)

    def run(self) -> None:
        count = 0
        while self.ledger.beat(self.role):
            count += 1
            self.step()
            if count % 500 == 0:
                self.now_and_then()

    def step(self) -> None:
        kind = self.choose.randrange(20)
        plain = self.plan.keys - BATCHED
        if kind > 2:
            self.write(self.role * self.plan.keys + min(self.choose.randrange(plain) for _ in range(self.choose.choice((1, 4)))))
        elif kind == 2:
            self.write_batch(batches(self.plan, self.role)[self.choose.randrange(BATCHED // BATCH)])
        else:
            self.write_hot(hot_name(self.choose.randrange(HOT_KEYS)))

    def now_and_then(self) -> None:
        kind = self.choose.randrange(8)
        if kind < 4:
            self.db.merge(lambda _done, _total: self.ledger.beat(self.role))
        elif kind == 4:
            self.db.close()
            self.db = self._open()
        elif kind == 5:
            self.db.sync()
        self.ledger.leave_resources(self.role)

    def write(self, number: int) -> None:
        """Do the next operation on a key of this writer; first see what became of the one that a predecessor died in."""
        words, key = self.ledger.words, name(number)
        begun, acknowledged = self.ledger.begun + number, self.ledger.acknowledged + number
        if words[begun] != words[acknowledged]:
            judge(number, self.db.get(key), place(words[acknowledged], words[begun]))
        elif number in self.short:
            self.look_at_short(number)
        sequence = words[begun] + 1
        words[begun] = sequence
        earliest = time.time() + TTL
        self.put(number, sequence)
        if expires(number, sequence):
            self.short[number] = sequence, earliest, time.time() + TTL
        words[acknowledged] = sequence
        if self.choose.randrange(4) == 0:
            judge(number, self.db.get(key), place(sequence, sequence))

    def put(self, number: int, sequence: int) -> None:
        key = name(number)
        if deletes(number, sequence):
            self.db.pop(key, None)
        elif expires(number, sequence):
            self.db.set(key, value(key, sequence), ttl=TTL)
        else:
            self.db[key] = value(key, sequence)

    def look_at_short(self, number: int) -> None:
        """A key that was set for a short time is there up to its end, and not from then on; the clock is precise to the millisecond."""
        sequence, earliest, latest = self.short.pop(number)
        before = time.time()
        found = self.db.get(name(number))
        after = time.time()
        judge(number, found, place(sequence, sequence))
        if (found is None and after < earliest - 0.001) or (found is not None and before > latest + 0.001):
            raise ValueError(f"{name(number)!r} is {found!r}, {before - earliest} s after its time was over")

    def write_batch(self, numbers: range) -> None:
        """The same for all keys of a batch."""
        require_whole(self.ledger, self.db, numbers)
        words, begun, acknowledged = self.ledger.words, self.ledger.begun, self.ledger.acknowledged
        sequences = {number: words[begun + number] + 1 for number in numbers}
        for number, sequence in sequences.items():
            words[begun + number] = sequence
        with self.db.batch():
            for number, sequence in sequences.items():
                self.put(number, sequence)
        for number, sequence in sequences.items():
            words[acknowledged + number] = sequence

    def write_hot(self, key: bytes) -> None:
        words, counter = self.ledger.words, self.ledger.hot + self.role
        kind = self.choose.randrange(4)
        words[counter] += 1
        sequence = self.role << HOT_BITS | words[counter]
        if kind == 0:
            found = self.db.pop(key, None)
            if found is not None:
                sequence_of(key, found)
        elif kind == 1:
            sequence_of(key, self.db.setdefault(key, value(key, sequence)))
        else:
            self.db[key] = value(key, sequence)


def batches(plan: Plan, role: int) -> list[range]:
    """The numbers of the keys that a writer writes together."""
    end = (role + 1) * plan.keys
    return [range(first, first + BATCH) for first in range(end - BATCHED, end, BATCH)]


def require_whole(ledger: Ledger, db: Mapping[bytes, bytes], numbers: range) -> None:
    """ValueError if a batch that was begun and never acknowledged is there in part. No writer of it may be at work."""
    words, done = ledger.words, {}
    for number in numbers:
        before, after = words[ledger.acknowledged + number], words[ledger.begun + number]
        found = db.get(name(number))
        position = judge(number, found, place(before, after))
        if before != after and not expires(number, before) and not expires(number, after) and (before or not deletes(number, after)):
            done[number] = position >= 2 * after
    if len(set(done.values())) > 1:
        raise ValueError(f"a batch is there in part: {done}")


def judge(number: int, found: bytes | None, right: Range) -> int:
    """The first place within a range of the history that a value, or its absence, can be from; ValueError if there is none."""
    key, (first, last) = name(number), right
    if found is not None:
        position = 2 * sequence_of(key, found)
        if first <= position <= last:
            return position
        raise ValueError(f"{key!r} has sequence number {position / 2}, and not one of {first / 2} to {last / 2}")
    for position in range(first, last + 1):
        if is_missing(number, position):
            return position
    raise ValueError(f"{key!r} is missing, and {first / 2} to {last / 2} neither delete it nor expire")


def may_miss(number: int, first: int, last: int) -> bool:
    """Whether a sequence number within a range deletes the key, or sets it for a short time."""
    return any(deletes(number, sequence) or expires(number, sequence) for sequence in range(first, last + 1))


class Reader:
    """Gets, tests and iterates, and holds every answer against the ledger and against its earlier ones."""

    def __init__(self, plan: Plan, role: int, seed: int) -> None:
        self.plan, self.role = plan, role
        self.ledger = Ledger(plan)
        self.choose = random.Random(seed)
        self.seen = array("Q", bytes(8 * self.ledger.total))
        self.hot: dict[tuple[bytes, int], int] = {}
        self.db = dbm_bitcask.open(plan.database, "r")

    def run(self) -> None:
        count = 0
        while self.ledger.beat(self.role):
            count += 1
            self.get(self.choose.randrange(self.ledger.total))
            if count % 10 == 0:
                self.get_hot(hot_name(self.choose.randrange(HOT_KEYS)))
                self.contains(self.choose.randrange(self.ledger.total))
            if count % 5000 == 0:
                self.walk(values=bool(self.choose.randrange(2)))
                self.ledger.leave_resources(self.role)
            if count % 20000 == 0 and self.choose.randrange(2):
                self.db.close()
                self.db = dbm_bitcask.open(self.plan.database, "r")

    def get(self, number: int) -> None:
        first = self.ledger.words[self.ledger.acknowledged + number]
        self.accept(number, self.db.get(name(number)), first)

    def accept(self, number: int, found: bytes | None, first: int) -> None:
        last = self.ledger.words[self.ledger.begun + number]
        self.seen[number] = judge(number, found, (max(2 * first, self.seen[number]), 2 * last + 1))

    def contains(self, number: int) -> None:
        words = self.ledger.words
        first = words[self.ledger.acknowledged + number]
        there = name(number) in self.db
        last = words[self.ledger.begun + number]
        is_right = is_there if there else is_missing
        if not any(is_right(number, position) for position in range(max(2 * first, self.seen[number]), 2 * last + 2)):
            raise ValueError(f"{name(number)!r} {'is' if there else 'is not'} in the database, against {first} to {last}")

    def get_hot(self, key: bytes) -> None:
        found = self.db.get(key)
        if found is None:
            return
        writer, sequence = divmod(sequence_of(key, found), 1 << HOT_BITS)
        if sequence < self.hot.get((key, writer), 0):
            raise ValueError(f"{key!r} went back to sequence number {sequence} of writer {writer}")
        self.hot[key, writer] = sequence

    def walk(self, *, values: bool) -> None:
        """Iterate: whatever is there all the time comes exactly once."""
        words, ledger = self.ledger.words, self.ledger
        before = words[ledger.acknowledged : ledger.acknowledged + ledger.total].tolist()
        met: set[int] = set()
        for key, found in pairs(self.db, values=values):
            if key.startswith(b"hot"):
                continue
            number = int(key[1:])
            if number in met:
                raise ValueError(f"{key!r} came twice in one iteration")
            met.add(number)
            if found is not None:
                self.accept(number, found, before[number])
            ledger.beat(self.role)
        after = words[ledger.begun : ledger.begun + ledger.total].tolist()
        lost = [number for number in range(ledger.total) if number not in met and not may_miss(number, before[number], after[number])]
        if lost:
            raise ValueError(f"{len(lost)} keys did not come in an iteration of {len(met)}, as {name(lost[0])!r}: {lost[:20]}")
        if len(self.db) < ledger.total // INDELIBLE:
            raise ValueError(f"the database has {len(self.db)} keys, less than were never deleted")


def pairs(db: Mapping[bytes, bytes], *, values: bool) -> Iterator[tuple[bytes, bytes | None]]:
    """The keys, each with its value or without."""
    if values:
        yield from db.items()
    else:
        for key in db:
            yield key, None
