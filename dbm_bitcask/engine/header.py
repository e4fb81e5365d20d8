"""Header: the first page of the keydir, as 512 words of 64 bits, and the rule by which a keydir is trusted.

The words are little-endian and shared by every process that maps the file; each is read and written by one aligned 8-byte access.

    state        CLEAN      header and every page are durable and match the log: trusted after a restart of the machine, too
                 RESTING    header and pages are right, but maybe not durable: trusted until the machine restarts
                 DIRTYING   somebody began to write on a clean keydir; the mark is not known to be durable yet
                 DIRTY      somebody writes, or died writing; the counters say how far the last write came
                 CHANGING   the same, within a change of the directory or of the manifest: SPLIT_OLD and NEXT_MANIFEST tell
                 POISONED   an fsync failed: nobody writes until somebody reopens the database
                 MOVED      another keydir has taken this one's name
    counters     two copies, of which CURRENT names the valid one. A write prepares the other copy, its START last; stores its slot; and
                 makes the copy current. So a copy whose START is the current TAIL tells what the unfinished write wanted.

In the states CLEAN and RESTING the header page and the segment table carry a checksum. In the others they change with every write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from .files import Identity

PAGE_SIZE = 4096
PAGE_WORDS = PAGE_SIZE // 8

MAGIC_WORD = int.from_bytes(b"keydir\x01\n", "little")  # doubles as the check of the byte order

# Words of the header page.
MAGIC, STATE, EPOCH, CURRENT, SEED = range(5)
DEVICE, INODE, BOOT_LOW, BOOT_HIGH = range(5, 9)
MANIFEST, NEXT_MANIFEST = 9, 10  # checksums: of the manifest this keydir belongs to, and of the one being committed
ROOT = 11  # directory: page | depth << 32
PAGES, CAPACITY, FREE = 12, 13, 14  # pages handed out; pages the file has; first page of the free list (0: none)
TABLE = 15  # segment table: page | pages << 32
SPLIT_OLD, SPLIT_LOW, SPLIT_HIGH, SPLIT_PAGES, SPLIT_FREE, SPLIT_HASH = range(16, 22)
CLEANED_AT = 23  # when the last clean mark was made, in seconds since 1970
HOLDER, HELD_SINCE = 24, 25  # pid of the last holder of the writer lock, and since when
UNSYNCED_SINCE = 26
MERGE_CURSOR, MERGED_AT, RECLAIMED = 27, 28, 29
DAMAGED = 30  # a record with an unknown key was lost at or before this location (0: none)
UNSEALED = 31  # pages without a checksum: at least so many
SEAL = 32  # checksum of header and segment table (0: none)
# Words that are stored without the lock, and so are not under the checksum.
POISON = 33  # an fsync failed: every state that is entered becomes POISONED
SYNCED_TO = 34  # the log is durable up to this location
_REST = 40
COPIED = 40  # bytes that merges have appended again
BATCH = 41  # where the batch begins whose records are being published (0: none)
COUNTERS_A, COUNTERS_B = 64, 80
OTHER = COUNTERS_A ^ COUNTERS_B  # CURRENT ^ OTHER is the copy that is not valid

# Words of one copy of the counters, from its CURRENT. TAIL and START are locations; TOMBSTONES are bytes in the active segment;
# CHECKSUM is that of the record between START and TAIL; ROW is the word that counts dead bytes and gets DEAD (0: none).
TAIL, COUNT, TOMBSTONES, CHECKSUM, ROW, DEAD, START = range(7)

CLEAN, RESTING, DIRTYING, DIRTY, CHANGING, POISONED, MOVED = range(1, 8)

# Words of a row of the segment table.
ROW_WORDS = 8
ROW_ID, ROW_DEAD, ROW_TOMBSTONES, ROW_MERGED, ROW_EXPIRING = range(5)  # id, bytes, bytes, how far a merge came, see EXPIRING_ROWS
EXPIRING_ROWS = 4  # words from ROW_EXPIRING on, by time to live: bytes | second since 1970 by which all of them have expired << 32

MASK32 = 0xFFFFFFFF
BASE = (1 << 41) - PAGE_WORDS  # of an entry of the directory: the word at which its page begins
VERSION = 1 << 41
MASK64 = 0xFFFFFFFFFFFFFFFF
ABSURD = 1 << 48  # bytes in one segment
NEVER = 1 << 63  # epochs

Words = memoryview  # of unsigned 64-bit integers


def enter(words: Words, state: int) -> None:
    """Enter a state, unless a sync has failed: it sets POISON before it enters POISONED, so that neither store can hide the other."""
    words[STATE] = state
    if words[POISON]:
        words[STATE] = POISONED


def header_checksum(words: Words) -> int:
    """The checksum of header page and segment table, but for STATE, SEAL and what is stored without the lock. Never 0.

    STATE is left out so that SEAL can be stored first: who dies in between leaves a keydir that can be trusted. No single bit turns
    another state with a checksum into CLEAN.
    """
    table = words[TABLE]
    start = (table & MASK32) * PAGE_WORDS
    rows = words[start : start + (table >> 32) * PAGE_WORDS]
    before = xxh3_64_intdigest(words[STATE + 1 : SEAL], words[MAGIC])
    return xxh3_64_intdigest(words[_REST:PAGE_WORDS], xxh3_64_intdigest(rows, before)) or 1


def is_sound(words: Words, identity: Identity, boot: int) -> bool:
    """Whether this file is a keydir of this place, whose words were last written in this boot, or in full.

    What is left to compare is the log: its manifest, its length and its last record.
    """
    if words[MAGIC] != MAGIC_WORD or words[INODE] != identity.inode or identity.links != 1:
        return False
    if not _fits(words, identity.size // PAGE_SIZE):
        return False
    state = words[STATE]
    if state in (CLEAN, RESTING) and words[SEAL] != header_checksum(words):
        return False
    if state == CLEAN:
        return True
    if state == POISONED and not words[POISON]:
        return False  # POISON is stored first
    same_boot = boot != 0 and boot == words[BOOT_LOW] | words[BOOT_HIGH] << 64 and words[DEVICE] == identity.device
    return same_boot and state in (RESTING, DIRTYING, DIRTY, CHANGING, POISONED)


def _fits(words: Words, pages: int) -> bool:
    """Whether what the header points at lies within the file, and what it counts can be: a keydir in use has no checksum that says so."""
    root, table = words[ROOT], words[TABLE]
    depth = root >> 32
    if not 9 <= depth <= 40 or words[CURRENT] not in (COUNTERS_A, COUNTERS_B):
        return False
    ends = ((root & MASK32) + (1 << depth - 9), (table & MASK32) + (table >> 32))
    if not max(ends) <= words[PAGES] <= words[CAPACITY] <= min(pages, len(words) // PAGE_WORDS):
        return False
    counts = max(words[copy + COUNT] for copy in (COUNTERS_A, COUNTERS_B))
    sizes = max(words[copy + which] for copy in (COUNTERS_A, COUNTERS_B) for which in (TOMBSTONES, DEAD))
    return bool(max(counts, words[UNSEALED]) <= words[PAGES] * PAGE_WORDS and sizes < ABSURD and words[EPOCH] < NEVER)
