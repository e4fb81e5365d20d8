"""Hints as bytes: the keys of a segment come back, and a hint that is damaged or of another segment is not used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbm_bitcask.engine import hint
from dbm_bitcask.engine.hint import Hint, HintWriter
from dbm_bitcask.engine.manifest import Entry
from dbm_bitcask.engine.record import BATCH, EXPIRES, MARK, SEAL, SYNCED, TOMBSTONE, ZLIB

NUMBERS = st.integers(0, 2**32 - 1)
WORDS = st.integers(0, 2**64 - 1)


@st.composite
def keys(draw, start=32):
    """Some keys of records that stand one behind the other."""
    found = []
    for before, size in draw(st.lists(st.tuples(st.integers(0, 1000), st.integers(24, 2**26)), max_size=10)):
        flags = draw(st.sets(st.sampled_from([TOMBSTONE, EXPIRES])).map(sum))
        expiry = draw(WORDS) if flags & EXPIRES else 0
        found.append(Hint(start + before, size, flags, draw(st.binary(max_size=40)), expiry))
        start += before + size
    return found


SEGMENTS = st.builds(Entry, st.integers(1, 2**32 - 1), WORDS, st.integers(2**32 - 1000, 2**32 + 100))
SEGMENT = Entry(7, 0x1122334455667788, 4096)
KEYS = [Hint(32, 40, 0, b"key"), Hint(72, 32, TOMBSTONE, b""), Hint(104, 48, EXPIRES, b"k", 1_700_000_000_000)]


def encode(segment, *blocks):
    writer = HintWriter(segment)
    bodies = [writer.body(block) for block in blocks]
    return b"".join([writer.head(), *bodies, writer.checksum()])


@given(SEGMENTS, keys(), keys(2**31))
def test_keys_come_back_in_their_order_however_they_were_handed_in(segment, first, second):
    data = encode(segment, first, second)
    assert data == encode(segment, first + second)
    assert hint.is_bound(data, segment)
    assert list(hint.decode(data)) == first + second


def test_hint_of_a_segment_without_keys_is_a_hint():
    assert hint.is_bound(encode(SEGMENT, []), SEGMENT)
    assert list(hint.decode(encode(SEGMENT))) == []


@given(SEGMENTS, keys())
def test_every_prefix_is_refused(segment, found):
    data = encode(segment, found)
    assert [end for end in range(len(data)) if hint.is_bound(data[:end], segment)] == []


def test_every_flipped_bit_is_refused():
    data = encode(SEGMENT, KEYS)
    number = int.from_bytes(data, "little")
    flipped = [(number ^ 1 << bit).to_bytes(len(data), "little") for bit in range(8 * len(data))]
    assert [bit for bit, bad in enumerate(flipped) if hint.is_bound(bad, SEGMENT)] == []


@given(SEGMENTS, keys(), st.binary(min_size=1, max_size=20))
def test_what_follows_a_hint_spoils_it(segment, found, behind):
    assert not hint.is_bound(encode(segment, found) + behind, segment)


@pytest.mark.parametrize(
    "other", [SEGMENT._replace(id=8), SEGMENT._replace(salt=1), SEGMENT._replace(length=4104)], ids=["id", "salt", "length"]
)
def test_hint_of_another_segment_is_refused(other):
    assert not hint.is_bound(encode(SEGMENT, KEYS), other)


def resealed(body):
    """A hint with these bytes in the place of its keys, under a right checksum."""
    writer = HintWriter(SEGMENT)
    writer._hash.update(body)
    return writer.head() + body + writer.checksum()


KEY = HintWriter(SEGMENT).body([Hint(32, 40, 0, b"key")])


@pytest.mark.parametrize(
    "body",
    [
        KEY[:8] + b"\xff" + KEY[9:],
        KEY[:8] + b"\4" + KEY[9:],
        KEY[:12] + bytes([EXPIRES]) + KEY[13:],
        KEY + KEY[:15],
        KEY[:15],
    ],
    ids=["long key", "key of one more byte", "expiry that is not there", "half a second key", "half a key"],
)
def test_hint_whose_keys_do_not_fill_it_is_refused_under_a_right_checksum(body):
    assert hint.is_bound(resealed(KEY), SEGMENT)
    assert not hint.is_bound(resealed(body), SEGMENT)


@pytest.mark.parametrize(
    "found",
    [[Hint(0, 40, 0, b"k")], [Hint(4064, 40, 0, b"k")], [Hint(32, 2**32 - 1, 0, b"k")], [KEYS[0], KEYS[0]], [KEYS[1], KEYS[0]]],
    ids=["within the header", "across the end", "longer than the segment", "twice", "backwards"],
)
def test_hint_whose_records_cannot_stand_in_the_segment_is_refused_under_a_right_checksum(found):
    assert not hint.is_bound(encode(SEGMENT, found), SEGMENT)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_hint(data):
    assert not hint.is_bound(data, SEGMENT)


@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_zeros_and_ones_are_no_hint(filling):
    assert not any(hint.is_bound(filling * length, SEGMENT) for length in range(200))


@pytest.mark.parametrize("flags", [SYNCED, BATCH, SEAL, MARK])
def test_flags_are_kept_as_they_are(flags):
    assert [key.flags for key in hint.decode(encode(SEGMENT, [Hint(32, 40, flags, b"k")]))] == [flags]


def test_compressed_record_has_its_expiry_in_the_record_only():
    key = Hint(32, 40, ZLIB, b"key")
    assert list(hint.decode(encode(SEGMENT, [key, *KEYS]))) == [key, *KEYS]
