"""The bytes on disk, written out. A test here fails when the format drifts: then files of before cannot be read any more, and the
version has to go up. DO NOT adjust the bytes to the code.
"""

from __future__ import annotations

import re

import pytest

from dbm_bitcask.engine import header as at
from dbm_bitcask.engine import hint, keydir, manifest, names, record, segment
from dbm_bitcask.engine.contents import Reading
from dbm_bitcask.engine.files import Directory
from dbm_bitcask.engine.hint import Hint
from dbm_bitcask.engine.manifest import Entry, Manifest
from dbm_bitcask.engine.page import key_hash, page_slots, probe

SALT = 0x1122334455667788
TIME = 1_700_000_000
EXPIRY = TIME * 1000
SEED = 0x0123456789ABCDEF
BOOT = 2 << 64 | 1

# In a segment of this salt, at offset 32.
RECORDS = {
    "plain": (
        (0, b"key", b"value"),
        "139a7148eff7616a 18000000 13000000 00 00 0000 00f15365 6b6579 76616c7565",
    ),
    "tombstone": (
        (0x01, b"key", b""),
        "9b89b8ebc35f3207 18000000 13000000 05 00 0100 00f15365 6b6579 0000000000",
    ),
    "expiring": (
        (0x02, b"key", b"value", EXPIRY),
        "71fb6246082cda0a 20000000 1b000000 00 00 0200 00f15365 0068e5cf8b010000 6b6579 76616c7565",
    ),
    "seal": (
        (0x20, b"", b""),
        "c3647bb310f0cfdf 10000000 10000000 00 00 2000 00f15365",
    ),
    "mark that all before it was synced": (
        (0xC0, b"", b""),
        "d55943c9ef9c870a 10000000 10000000 00 00 c000 00f15365",
    ),
}

BATCH = (
    "7595e77255d220e3 50000000 10000000 00 00 1000 00f15365"
    "c660341ca87083b9 18000000 11000000 06 00 0000 00f15365 61 000000000000 31"
    "a6dd8b0fe4505658 18000000 11000000 07 00 0100 00f15365 62 00000000000000"
)
SEGMENT_HEADER = "62632e6461746101 0700000000000000 8877665544332211 6e448eaffe814b87"
HINT = (
    "62632e68696e7401 0700000000000000 8877665544332211 0010000000000000 0300000000000000"
    "20000000 20000000 03000000 0000 0000 6b6579"
    "40000000 20000000 01000000 0100 0000 6b"
    "60000000 30000000 00000000 0200 0000 0068e5cf8b010000"
    "9d6500d2387be3a4"
)
MANIFEST = (
    "64626d5f6269746361736b0d0a1a0a00 01000000 02000000 0500000000000000 0900000000000000"
    "0700000000000000 8877665544332211 0010000000000000"
    "0800000000000000 0100000000000000 0000000000000000"
    "fc5a03ffcfee0d56"
)


def encode(flags, key, value, expiry=0, *, offset=32):
    return record.encode(flags, key, value, SALT ^ offset, TIME, expiry)


def read(data):
    """The records of a segment in which these bytes follow the header."""
    return list(Reading(bytes(32) + data, Entry(7, SALT, 0), 32 + len(data)).records())


@pytest.mark.parametrize(("fields", "data"), RECORDS.values(), ids=RECORDS)
def test_record(fields, data):
    assert encode(*fields) == bytes.fromhex(data)
    flags, key, value, *expiry = fields
    [(offset, found)] = read(bytes.fromhex(data))
    assert (offset, found.flags, found.key, found.value, found.time, found.expiry) == (32, flags, key, value, TIME, *(expiry or [0]))


def test_record_in_the_docstring():
    worked = re.search(r"Worked example, salt 0, offset 0, time 0, key b\"k\", value b\"v\":\n\n((?:    [0-9a-f ]+\n)+)", record.__doc__)
    assert record.encode(0, b"k", b"v", 0, 0) == bytes.fromhex(worked[1])


def test_batch_is_a_frame_around_whole_records():
    first = encode(0, b"a", b"1", offset=56)
    second = encode(0x01, b"b", b"", offset=56 + len(first))
    assert encode(0x10, b"", first + second) == bytes.fromhex(BATCH)
    assert [(found.flags, found.key, found.value) for _, found in read(bytes.fromhex(BATCH))][1:] == [(0, b"a", b"1"), (0x01, b"b", b"")]


def test_flags_of_records():
    flags = (record.TOMBSTONE, record.EXPIRES, record.ZLIB, record.ZSTD, record.BATCH, record.SEAL, record.MARK, record.SYNCED)
    assert flags == (0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80)


def test_header_of_a_segment(tmp_path):
    directory = Directory(str(tmp_path))
    segment.create(directory, Entry(7, SALT, 0), 0o600)
    assert (tmp_path / "00000007.data").read_bytes() == bytes.fromhex(SEGMENT_HEADER)
    assert segment.open_segment(directory, Entry(7, SALT, 0)).size() == segment.FIRST_RECORD == 32


def test_generation_of_a_segment_moves_and_is_not_under_the_checksum(tmp_path):
    directory = Directory(str(tmp_path))
    file = segment.create(directory, Entry(7, SALT, 0), 0o600)
    word = segment.map_generation(file)
    before = word[0]
    segment.move_generation(file)
    assert word[0] != before
    data = bytes.fromhex(SEGMENT_HEADER)
    assert (tmp_path / "00000007.data").read_bytes() == data[:12] + bytes.fromhex("01000000") + data[16:]
    segment.open_segment(directory, Entry(7, SALT, 0))


def test_hint():
    keys = [Hint(32, 32, 0, b"key"), Hint(64, 32, 0x01, b"k"), Hint(96, 48, 0x02, b"", EXPIRY)]
    writer = hint.HintWriter(Entry(7, SALT, 4096))
    body = writer.body(keys)
    assert writer.head() + body + writer.checksum() == bytes.fromhex(HINT)
    assert hint.is_bound(bytes.fromhex(HINT), Entry(7, SALT, 4096))
    assert list(hint.decode(bytes.fromhex(HINT))) == keys


def test_manifest():
    data, listed = manifest.encode(Manifest(5, 9, (Entry(7, SALT, 4096), Entry(8, 1, 0))))
    assert data == bytes.fromhex(MANIFEST)
    assert manifest.decode(bytes.fromhex(MANIFEST)) == listed
    assert listed.checksum == 0x560DEECFFF035AFC


def test_names():
    assert (names.MANIFEST, names.KEYDIR) == ("MANIFEST", "keydir")
    assert (names.segment_name(7), names.hint_name(7)) == ("00000007.data", "00000007.hint")
    assert names.segment_name(2**32 - 1) == "4294967295.data"


# Keydir: words of 64 bits, in the order of bytes of the machine.

HEADER = {
    0: 0x0A0172696479656B,  # "keydir\1\n"
    1: 2,  # state RESTING
    2: 4,  # epoch
    3: 64,  # current counters
    4: SEED,
    5: 0xFD00,  # device
    6: 77,  # inode
    7: 1,  # boot id
    8: 2,
    9: 0x99,  # manifest
    10: 0x99,  # next manifest
    11: 9 << 32 | 2,  # root: depth 9, page 2
    12: 5,  # pages
    13: 9,  # capacity
    15: 1 << 32 | 1,  # segment table: one page, page 1
    32: 0x00474469A0184EC4,  # seal
    34: 7 << 32 | 128,  # synced to
    64: 7 << 32 | 152,  # tail
    65: 2,  # count
}
TABLE_ROW = [7, 32, 24]
PAGE = {
    0: 0x0000000165676170,  # "page\1"
    1: 1 << 16 | 3,  # one of three is deleted
    2: 1 << 63,  # depth 0
    3: 0x28B75BE389ED130B,  # checksum
    52: 0x1234,
    53: 7 << 32 | 64,
    54: 0x1235,
    110: 0x90169E50FC3FB66F,  # b"key"
    111: 7 << 32 | 32,
}
CHUNK_CHECKSUM = 0xC63C0A4922783717


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A keydir with three slots, one of them deleted, one segment and a tail."""
    monkeypatch.setattr(keydir.secrets, "randbits", lambda _: SEED)
    index = keydir.Keydir.create(Directory(str(tmp_path)).create("keydir", 0o600), BOOT)
    words = index.words
    index.listed = {7}
    index.add_rows([7])
    row = index.rows()[7]
    words[row + at.ROW_DEAD], words[row + at.ROW_TOMBSTONES] = 32, 24
    for hashed, location in [(0x90169E50FC3FB66F, 7 << 32 | 32), (0x1234, 7 << 32 | 64), (0x1235, 7 << 32 | 96)]:
        index.store(index.room(hashed).free, hashed, location)
    index.store(probe(index.table, 0x1235).found[0], 0x1235, 0)
    words[at.COUNTERS_A + at.TAIL], words[at.COUNTERS_A + at.COUNT] = 7 << 32 | 152, 2
    words[at.SYNCED_TO] = 7 << 32 | 128
    words[at.DEVICE], words[at.INODE] = 0xFD00, 77
    words[at.MANIFEST] = words[at.NEXT_MANIFEST] = 0x99
    words[at.EPOCH] = 4
    index.seal(1)
    index.rest(at.RESTING)
    return words


def without_zeros(words):
    return {number: word for number, word in enumerate(words.tolist()) if word}


def test_header_page_of_a_keydir(words):
    assert without_zeros(words[:512]) == HEADER


def test_segment_table_of_a_keydir(words):
    assert without_zeros(words[512:1024]) == dict(enumerate(TABLE_ROW))


def test_directory_of_a_keydir(words):
    assert words[1024:1536].tolist() == [4 * 512] * 512
    assert without_zeros(words[1536:2048]) == {0: CHUNK_CHECKSUM}


def test_page_of_a_keydir(words):
    assert without_zeros(words[2048:2560]) == PAGE
    assert sorted(page_slots(words, 4)) == [(0x1234, 7 << 32 | 64), (0x90169E50FC3FB66F, 7 << 32 | 32)]


def test_replaced_page_is_on_the_free_list(words, tmp_path):
    index = keydir.Keydir(Directory(str(tmp_path)).open("keydir", write=True), words, write=True)
    index.listed = {7}
    index.split(4, 0x1234)
    assert words[1024:1536].tolist() == [5 * 512 | 1 << 41] * 512
    assert (words[2048], words[2051], words[at.FREE], words[at.PAGES]) == (0x165657266, 0, 4, 6)
    assert words[5 * 512 : 5 * 512 + 4].tolist() == [0x165676170, 2, 1 << 63, 0]


def test_hash_of_a_key():
    assert key_hash(b"key", SEED) == 0x90169E50FC3FB66F


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("MAGIC STATE EPOCH CURRENT SEED DEVICE INODE BOOT_LOW BOOT_HIGH MANIFEST NEXT_MANIFEST ROOT PAGES CAPACITY FREE TABLE", range(16)),
        ("SPLIT_OLD SPLIT_LOW SPLIT_HIGH SPLIT_PAGES SPLIT_FREE SPLIT_HASH", range(16, 22)),
        ("CLEANED_AT HOLDER HELD_SINCE UNSYNCED_SINCE MERGE_CURSOR MERGED_AT RECLAIMED DAMAGED UNSEALED SEAL", range(23, 33)),
        ("POISON SYNCED_TO COUNTERS_A COUNTERS_B", [33, 34, 64, 80]),
        ("TAIL COUNT TOMBSTONES CHECKSUM ROW DEAD START", range(7)),
        ("CLEAN RESTING DIRTYING DIRTY CHANGING POISONED MOVED", range(1, 8)),
        ("ROW_ID ROW_DEAD ROW_TOMBSTONES ROW_MERGED ROW_EXPIRING", range(5)),
    ],
)
def test_words_of_the_header(names, numbers):
    assert [getattr(at, name) for name in names.split()] == list(numbers)
