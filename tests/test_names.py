"""Names of files: ours are read exactly, and whatever is not exactly ours belongs to somebody else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbm_bitcask.engine import names

IDS = st.integers(1, 2**32 - 1)

FOREIGN = [
    "",
    ".",
    "..",
    ".data",
    "data",
    "1.data",
    "01.data",
    "0000001.data",
    "000000001.data",
    "0123456789.data",
    "00000000.data",
    "0000000000.data",
    "4294967296.data",
    "9999999999.data",
    "12345678901.data",
    "1" + "0" * 300 + ".data",
    "-0000001.data",
    "+0000001.data",
    " 0000001.data",
    "0000 001.data",
    "0000_001.data",
    "0x000001.data",
    "1e000001.data",
    "\u0661.data",  # ARABIC-INDIC DIGIT ONE, which int() reads
    "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.data",
    "0000000\u00b9.data",
    "0000000\uff11.data",
    "../00000001.data",
    "/00000001.data",
    "./00000001.data",
    "x/00000001.data",
    "00000001.data/",
    "00000001.data\n",
    "\n00000001.data",
    "00000001.data\0",
    "00000001.data~",
    "00000001.data.tmp",
    "00000001.DATA",
    "00000001.Data",
    "00000001data",
    "00000001..data",
    "00000001.dat",
    "00000001",
    "00000001.\udcff",
]
NOT_TEMPORARY = [
    "MANIFEST",
    "keydir",
    "MANIFEST.tmp",
    "MANIFEST..tmp",
    "MANIFEST.0123456789abcde.tmp",
    "MANIFEST.0123456789abcdef0.tmp",
    "MANIFEST.0123456789ABCDEF.tmp",
    "MANIFEST.0123456789abcdeg.tmp",
    "MANIFEST.0123456789abcdef.tmp\n",
    "MANIFEST.0123456789abcdef.TMP",
    "MANIFEST.0123456789abcdef",
    "manifest.0123456789abcdef.tmp",
    "Keydir.0123456789abcdef.tmp",
    "../MANIFEST.0123456789abcdef.tmp",
    "MANIFESTx0123456789abcdef.tmp",
    "MANIFEST.0123456789abcdefxtmp",
    "00000001.data.0123456789abcdef.tmp",
    "1.hint.0123456789abcdef.tmp",
    "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.hint.0123456789abcdef.tmp",
    "other.0123456789abcdef.tmp",
    ".0123456789abcdef.tmp",
]


@given(IDS)
def test_names_come_back_as_their_number(number):
    assert names.parse_segment(names.segment_name(number)) == number
    assert names.parse_hint(names.hint_name(number)) == number


@given(IDS)
def test_names_of_one_kind_are_not_of_the_other(number):
    assert names.parse_hint(names.segment_name(number)) is None
    assert names.parse_segment(names.hint_name(number)) is None


@given(IDS, IDS)
def test_names_of_two_segments_differ(one, other):
    assert (names.segment_name(one) == names.segment_name(other)) == (one == other)


@pytest.mark.parametrize("number", [1, 99999999, 100000000, 999999999, 1000000000, 2**32 - 1])
def test_ids_of_every_width_have_a_name(number):
    assert names.parse_segment(names.segment_name(number)) == number


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_name_is_no_segment_and_no_hint(name):
    assert names.parse_segment(name) is None
    assert names.parse_hint(name.replace("data", "hint")) is None
    assert not names.is_temporary(name)


@given(st.text(max_size=30))
def test_what_is_read_as_a_number_is_the_very_name_of_that_number(name):
    for text in (name, name + ".data"):
        number = names.parse_segment(text)
        assert number is None or names.segment_name(number) == text


@pytest.mark.parametrize("name", [names.MANIFEST, names.KEYDIR, names.hint_name(7), names.hint_name(2**32 - 1)])
def test_temporary_names_are_fresh_and_known_as_such(name):
    made = {names.temporary_name(name) for _ in range(100)}
    assert len(made) == 100
    assert all(names.is_temporary(each) and each.startswith(name) for each in made)
    assert not any(names.parse_segment(each) or names.parse_hint(each) for each in made)


@pytest.mark.parametrize("name", NOT_TEMPORARY)
def test_other_name_is_not_temporary(name):
    assert not names.is_temporary(name)
