"""Records as bytes: what was encoded comes back, and nothing else is ever taken for a record."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dbm_bitcask.engine import record, segment
from dbm_bitcask.engine.record import BATCH, EXPIRES, HEADER, MARK, SEAL, SYNCED, TOMBSTONE, ZLIB, ZSTD

WORDS = st.integers(0, 2**64 - 1)
KNOWN_FLAGS = [TOMBSTONE, EXPIRES, ZLIB, ZSTD, BATCH, SEAL, MARK, SYNCED]
FIELDS = st.fixed_dictionaries(
    {
        "flags": st.sets(st.sampled_from(KNOWN_FLAGS)).map(sum),
        "key": st.binary(max_size=40),
        "value": st.binary(max_size=300),
        "time": st.integers(0, 2**32 - 1),
        "expiry": WORDS,
    }
)
SMALL = [
    {"flags": 0, "key": b"k", "value": b"v"},
    {"flags": 0, "key": b"", "value": b""},
    {"flags": SYNCED, "key": b"key", "value": b"a value"},
    {"flags": TOMBSTONE, "key": b"k", "value": b""},
    {"flags": EXPIRES, "key": b"k", "value": b"v", "expiry": 12345},
    {"flags": SEAL, "key": b"", "value": b""},
    {"flags": MARK | SYNCED, "key": b"", "value": b""},
]
each_small = pytest.mark.parametrize("fields", SMALL, ids=repr)


def encode(fields, seed):
    return record.encode(**{"time": 1_700_000_000, **fields}, seed=seed)


def is_accepted(data, offset, seed):
    try:
        return record.decode(data, offset, seed) is not None
    except record.BadRecord:
        return False


@given(FIELDS, WORDS, st.binary(max_size=20), st.binary(max_size=20))
def test_record_comes_back_from_the_middle_of_other_bytes(fields, seed, before, behind):
    data = encode(fields, seed)
    expiry = fields["expiry"] if fields["flags"] & record.EXTENDED else 0
    found = record.decode(before + data + behind, len(before), seed)
    assert found == record.Record(fields["flags"], fields["key"], fields["value"], fields["time"], expiry, len(before + data))


@given(FIELDS, WORDS)
def test_length_is_known_before_and_is_a_multiple_of_8(fields, seed):
    length = len(encode(fields, seed))
    assert length == record.record_length(fields["flags"], len(fields["key"]), len(fields["value"]))
    assert length % record.ALIGNMENT == 0


@given(FIELDS, WORDS)
def test_head_tells_the_length_and_where_the_key_stands(fields, seed):
    data = encode(fields, seed)
    head = record.decode_head(data[: HEADER.size], 0)
    assert (head.flags, head.length) == (fields["flags"], len(data))
    assert data[head.key_start : head.key_end] == fields["key"]


@given(FIELDS, WORDS)
def test_every_prefix_is_incomplete(fields, seed):
    data = encode(fields, seed)
    assert [end for end in range(len(data)) if record.decode(data[:end], 0, seed) is not None] == []


@each_small
def test_every_flipped_bit_is_rejected(fields):
    data = encode(fields, 99)
    assert is_accepted(data, 0, 99)
    number = int.from_bytes(data, "little")
    flipped = [(number ^ 1 << bit).to_bytes(len(data), "little") for bit in range(8 * len(data))]
    assert [bit for bit, bad in enumerate(flipped) if is_accepted(bad + bytes(64), 0, 99)] == []


@given(FIELDS, WORDS, st.data())
def test_any_flipped_bit_of_any_record_is_rejected(fields, seed, data):
    good = bytearray(encode(fields, seed))
    good[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not is_accepted(bytes(good), 0, seed)


@given(FIELDS, WORDS, WORDS)
def test_record_of_another_salt_or_offset_is_rejected(fields, seed, other):
    data = encode(fields, seed)
    assert is_accepted(data, 0, other) == (seed == other)


@given(st.binary(max_size=200), WORDS)
def test_random_bytes_are_no_record_and_raise_nothing_but_bad_record(data, seed):
    for offset in range(0, len(data), 8):
        assert not is_accepted(data, offset, seed)


@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_zeros_and_ones_are_no_record(filling):
    assert not any(is_accepted(filling * length, 0, seed) for length in range(80) for seed in (0, 1, 2**64 - 1))


@pytest.mark.parametrize("flag", [1 << bit for bit in range(8, 16)])
def test_record_of_a_later_format_is_rejected_although_it_verifies(flag):
    assert not is_accepted(encode({"flags": flag, "key": b"k", "value": b"v"}, 7), 0, 7)


@pytest.mark.parametrize(
    ("size", "key_end", "padding"), [(2**32 - 8, 17, 0), (24, 25, 0), (24, 15, 0), (24, 20, 5), (23, 17, 0), (0, 0, 0)]
)
def test_impossible_sizes_are_no_head(size, key_end, padding):
    data = HEADER.pack(0, size, key_end, padding, 0, 0) + bytes(64)
    head = record.decode_head(data, 0)
    assert head is None or head.length > len(data)
    assert not is_accepted(data, 0, 0)


# A run of records in a segment


def run_of(fields, salt, start=0):
    """The bytes of a segment with these records from `start` on, and the offsets of each."""
    data, offsets = bytes(start), []
    for each in fields:
        offsets.append(len(data))
        data += encode(each, salt ^ len(data))
    return data, offsets


@given(st.lists(FIELDS, max_size=8), WORDS)
def test_scan_finds_every_record_where_it_is(fields, salt):
    data, offsets = run_of(fields, salt, start=32)
    found = list(segment.scan(data, salt, 32, len(data)))
    assert [place.offset for place in found] == offsets
    assert [(place.record.key, place.record.value) for place in found] == [(each["key"], each["value"]) for each in fields]


@given(st.lists(FIELDS, min_size=2, max_size=8), WORDS, st.data())
def test_scan_stops_at_a_bad_record_and_the_next_good_one_can_be_found(fields, salt, data):
    good, offsets = run_of(fields, salt, start=32)
    number = data.draw(st.integers(0, len(offsets) - 2))
    bad = bytearray(good)
    bad[data.draw(st.integers(offsets[number], offsets[number + 1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = [place.offset for place in segment.scan(bytes(bad), salt, 32, len(bad))]
    assert found == offsets[:number]
    assert segment.next_valid(bytes(bad), salt, offsets[number] + 8, len(bad)) == offsets[number + 1]


@given(st.binary(max_size=20), st.binary(max_size=20), WORDS)
def test_record_inside_a_value_is_never_found(key, value, salt):
    inner = encode({"flags": 0, "key": key, "value": value}, salt ^ 32)  # a copy of what once stood at the beginning of this segment
    data, _ = run_of([{"flags": 0, "key": b"outer", "value": inner * 3}], salt, start=32)
    bad = bytearray(data)
    bad[32] ^= 1
    assert segment.next_valid(bytes(bad), salt, 32, len(bad)) is None


def checksummed(monkeypatch, action):
    """How many bytes are put under checksums for what an action returns."""
    counted = []

    def count(data, seed):
        counted.append(len(data))
        return xxh3_64_intdigest(data, seed)

    with monkeypatch.context() as patch:
        patch.setattr(record, "xxh3_64_intdigest", count)
        return action(), sum(counted)


def behind_a_damaged_value_full_of_headers(size):
    """A segment of which one value looks everywhere like the header of a record that ends where the value does; and what follows it."""
    promised = range(size - 8, 16, -24)
    value = b"".join(HEADER.pack(1, each & -8, 17, 0, 0, 0) for each in promised)
    fields = [{"flags": 0, "key": b"made up", "value": value}, {"flags": 0, "key": b"good", "value": b"value"}]
    data, [_, good] = run_of(fields, 5, start=32)
    bad = bytearray(data)
    bad[48] ^= 1
    return bytes(bad), good


def test_search_for_the_next_record_takes_checksums_of_bytes_in_proportion_whatever_headers_promise(monkeypatch):
    taken = []
    for size in (2**18, 2**20):
        data, good = behind_a_damaged_value_full_of_headers(size)
        found, bytes_taken = checksummed(monkeypatch, lambda data=data: segment.next_valid(data, 5, 40, len(data)))
        assert found == good
        assert bytes_taken > 8 * size  # what is made up is looked at
        taken.append(bytes_taken)
    assert taken[1] < 5 * taken[0]


@pytest.mark.parametrize("size", [100, 2**14, 2**16, 2**20])
def test_long_record_behind_damage_is_found(size):
    long = {"flags": 0, "key": b"long", "value": bytes(range(100)) * (size // 100)}
    data, [damaged, good, _] = run_of([{"flags": 0, "key": b"k", "value": b"v" * 500}, long, long], 5, start=32)
    bad = bytearray(data)
    bad[damaged + 100] ^= 1
    assert segment.next_valid(bytes(bad), 5, damaged + 8, len(bad)) == good


@pytest.mark.parametrize(("place", "byte"), [(16, 8), (17, 1), (19, 0x80)], ids=["padding", "zero", "unknown flag"])
def test_header_that_no_record_has_promises_nothing(place, byte):
    data = bytearray(encode(SMALL[0], 0))
    assert record.promised_length(data, 0) == len(data)
    data[place] |= byte
    assert record.promised_length(data, 0) == 0
