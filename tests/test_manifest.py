"""Manifests as bytes: the list of segments comes back, and everything else is `BadManifest`."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dbm_bitcask.engine import manifest
from dbm_bitcask.engine.manifest import BadManifest, Entry, Manifest

WORDS = st.integers(0, 2**64 - 1)
GOOD = Manifest(5, 9, (Entry(3, 0x1122334455667788, 4096), Entry(7, 1, 33), Entry(8, 2**64 - 1, 0)))


@st.composite
def manifests(draw):
    ids = sorted(draw(st.sets(st.integers(1, 2**32 - 2), min_size=1, max_size=6)))
    sealed = [Entry(number, draw(WORDS), draw(st.integers(32, 2**33 - 1))) for number in ids[:-1]]
    return Manifest(draw(st.integers(0, 2**63 - 1)), draw(st.integers(ids[-1] + 1, 2**32)), (*sealed, Entry(ids[-1], draw(WORDS), 0)))


def is_refused(data):
    try:
        manifest.decode(data)
    except BadManifest:
        return True
    return False


def with_checksum(body):
    return body + struct.pack("<Q", xxh3_64_intdigest(body))


@given(manifests())
def test_manifest_comes_back_with_its_checksum(listed):
    data, with_its_checksum = manifest.encode(listed)
    assert manifest.decode(data) == with_its_checksum
    assert with_its_checksum._replace(checksum=0) == listed
    assert with_its_checksum.checksum == int.from_bytes(data[-8:], "little")
    assert with_its_checksum.active == listed.segments[-1]


@given(manifests())
def test_checksum_that_was_held_before_does_not_matter(listed):
    assert manifest.encode(listed._replace(checksum=1)) == manifest.encode(listed)


@given(manifests())
def test_every_prefix_is_refused(listed):
    data, _ = manifest.encode(listed)
    assert [end for end in range(len(data)) if not is_refused(data[:end])] == []


def test_every_flipped_bit_is_refused():
    data, _ = manifest.encode(GOOD)
    number = int.from_bytes(data, "little")
    assert [bit for bit in range(8 * len(data)) if not is_refused((number ^ 1 << bit).to_bytes(len(data), "little"))] == []


@given(manifests(), st.binary(min_size=1, max_size=40))
def test_what_follows_a_manifest_spoils_it(listed, behind):
    data, _ = manifest.encode(listed)
    assert is_refused(data + behind)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    assert is_refused(data)
    assert is_refused(manifest.MARKER + data)
    assert is_refused(with_checksum(manifest.MARKER + struct.pack("<I", manifest.VERSION) + data))


@pytest.mark.parametrize("length", [0, 1, 16, 40, 47, 48, 72, 4096])
@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_zeros_and_ones_are_refused(filling, length):
    assert is_refused(filling * length)


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_other_version_is_refused_by_name_before_anything_else_is_looked_at(version):
    data, _ = manifest.encode(GOOD)
    body = data[:16] + struct.pack("<I", version) + data[20:-8]
    for other in (with_checksum(body), body[:40] + bytes(8), body + b"more of a later format"):
        with pytest.raises(BadManifest, match=f"version {version} is not known"):
            manifest.decode(other)


@pytest.mark.parametrize(
    "listed",
    [
        Manifest(1, 1, ()),
        Manifest(1, 9, (Entry(7, 0, 40), Entry(3, 0, 0))),
        Manifest(1, 9, (Entry(3, 0, 40), Entry(3, 0, 0))),
        Manifest(1, 9, (Entry(0, 0, 40), Entry(3, 0, 0))),
        Manifest(1, 3, (Entry(3, 0, 0),)),
        Manifest(1, 2**32 + 1, (Entry(3, 0, 0),)),
        Manifest(1, 2**40, (Entry(2**33, 0, 0),)),
        Manifest(1, 9, (Entry(3, 0, 0), Entry(7, 0, 0))),
        Manifest(1, 9, (Entry(3, 0, 40), Entry(7, 0, 40))),
        Manifest(1, 9, (Entry(3, 0, 31), Entry(7, 0, 0))),
        Manifest(1, 9, (Entry(3, 0, 2**33), Entry(7, 0, 0))),
        Manifest(2**63, 9, (Entry(3, 0, 0),)),
    ],
    ids=[
        "no segments",
        "ids descend",
        "an id twice",
        "id 0",
        "next id taken",
        "next id too large",
        "id too large",
        "two active",
        "none active",
        "shorter than its header",
        "longer than a segment can be",
        "no number for the next one",
    ],
)
def test_contradiction_is_refused_although_the_checksum_verifies(listed):
    data, _ = manifest.encode(listed)
    assert is_refused(data)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 2**31, 2**32 - 1])
def test_wrong_count_is_refused_at_once_although_the_checksum_verifies(count):
    data, _ = manifest.encode(GOOD)
    assert is_refused(with_checksum(data[:20] + struct.pack("<I", count) + data[24:-8]))
