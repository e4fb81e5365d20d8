"""Every single bit of a small store is flipped, in a copy that is otherwise what it was: an answer is right, or it is an error.

    RESTING  closed after a short session, and on the same machine since: there are checksums and no clean mark
    CLEAN    closed with a clean mark: trusted after a restart of the machine, too
    DIRTY    its process was killed
    LOST     closed, and the keydir is not there: hints and log are all there is

A case is named `state flag file bit`, as `replay` takes it.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import dbm_bitcask
from crashes import freeze
from damage import LOOKS, Copy, Small, alarm, as_of, is_never_right, make, report
from dbm_bitcask.engine import header, page, record
from dbm_bitcask.engine.header import MASK32, PAGE_WORDS, ROW_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from damage import Look

    Complaint = Callable[["Bench", "Flip", dbm_bitcask.error], str]

STATES = {"RESTING": header.RESTING, "CLEAN": header.CLEAN, "DIRTY": header.DIRTY, "LOST": header.RESTING}
HEADER_NAMES = [
    "MAGIC",
    "STATE",
    "EPOCH",
    "CURRENT",
    "SEED",
    "DEVICE",
    "INODE",
    "BOOT_LOW",
    "BOOT_HIGH",
    "MANIFEST",
    "NEXT_MANIFEST",
    "ROOT",
    "PAGES",
    "CAPACITY",
    "FREE",
    "TABLE",
    "SPLIT_OLD",
    "SPLIT_LOW",
    "SPLIT_HIGH",
    "SPLIT_PAGES",
    "SPLIT_FREE",
    "SPLIT_HASH",
    "CLEANED_AT",
    "HOLDER",
    "HELD_SINCE",
    "UNSYNCED_SINCE",
    "MERGE_CURSOR",
    "MERGED_AT",
    "RECLAIMED",
    "DAMAGED",
    "UNSEALED",
    "SEAL",
    "POISON",
    "SYNCED_TO",
]
COUNTER_NAMES = ["TAIL", "COUNT", "TOMBSTONES", "CHECKSUM", "ROW", "DEAD", "START"]


class Flip(NamedTuple):
    """One bit of one file."""

    file: str
    bit: int
    where: str  # for people


# What there is to flip.


def log_bits(small: Small) -> Iterator[Flip]:
    for name in sorted(small.files):
        if name.endswith(".data"):
            yield from (Flip(name, bit, "log") for bit in range(8 * len(small.files[name])))


def side_bits(small: Small) -> Iterator[Flip]:
    for name in sorted(small.files):
        if name.endswith(".hint") or name == "MANIFEST":
            yield from (Flip(name, bit, "side") for bit in range(8 * len(small.files[name])))


def used_words(small: Small) -> dict[int, str]:
    """The words of the keydir that hold something, with names."""
    words = memoryview(small.files["keydir"]).cast("Q")
    used = {number: f"header {name}" for number, name in enumerate(HEADER_NAMES)}
    for copy, start in (("A", header.COUNTERS_A), ("B", header.COUNTERS_B)):
        current = "current" if words[header.CURRENT] == start else "other"
        used |= {start + number: f"counters {copy} ({current}) {name}" for number, name in enumerate(COUNTER_NAMES)}
    table = (words[header.TABLE] & MASK32) * PAGE_WORDS
    rows = sum(1 for name in small.files if name.endswith(".data"))
    used |= {table + number: f"row {number // ROW_WORDS} word {number % ROW_WORDS}" for number in range(rows * ROW_WORDS)}
    directory = (words[header.ROOT] & MASK32) * PAGE_WORDS
    used[directory + PAGE_WORDS] = "directory checksum"
    [start] = {words[directory + index] & header.BASE for index in range(PAGE_WORDS)}
    used |= {start + number: f"page {name}" for number, name in enumerate(("magic", "counts", "depth", "checksum"))}
    seed = words[header.SEED]
    used |= {directory + (page.key_hash(key, seed) >> 55): "directory entry" for key in small.keys}
    for slot in range(start + page.FIRST_SLOT, start + PAGE_WORDS, 2):
        if words[slot]:
            used |= {slot: "slot hash", slot + 1: "slot location"}
    return used


def keydir_bits(small: Small) -> list[Flip]:
    return [Flip("keydir", 64 * word + bit, name) for word, name in used_words(small).items() for bit in range(64)]


def other_keydir_bits(small: Small, count: int) -> list[Flip]:
    """A sample of the rest: empty slots, entries of the directory that no key needs, spare pages, and words without a meaning."""
    used = used_words(small)
    others = [word for word in range(len(small.files["keydir"]) // 8) if word not in used]
    chance = random.Random(5)
    return [Flip("keydir", 64 * chance.choice(others) + chance.randrange(64), "other") for _ in range(count)]


def some(flips: list[Flip], count: int, seed: int = 5) -> list[Flip]:
    return flips if len(flips) <= count else random.Random(seed).sample(flips, count)


# Flipping it.


class Bench:
    """A store of one state, and a copy of it to be damaged."""

    def __init__(self, tmp_path: Path, patch: pytest.MonkeyPatch, state: str) -> None:
        self.state = state
        self.small = make(tmp_path / "made", patch, STATES[state])
        if state == "LOST":
            del self.small.files["keydir"]
        self.copy = Copy(tmp_path / state)
        self.copy.put(self.small.files)

    def try_flip(self, flag: str, flip: Flip) -> Look:
        look = self._try(flag, flip, self.small.items)
        if look.wrong and self.may_be_torn(flip):
            return self._try(flag, flip, as_of(self.small.log[:-1]))
        return look

    def _try(self, flag: str, flip: Flip, items: dict[bytes, bytes]) -> Look:
        if flag == "w":
            self.copy.put(self.small.files)
        self.copy.flip(flip.file, flip.bit)
        alarm()
        look = LOOKS[flag](self.copy.path, self.small, items)
        if flag == "r":
            self.copy.flip(flip.file, flip.bit)
        return look

    def may_be_torn(self, flip: Flip) -> bool:
        """Whether this looks like a torn tail: a keydir without a seal is trusted by the checksum of the last record, which is this."""
        last = self.small.log[-1]
        return self.state == "DIRTY" and flip.file == last.file and last.offset <= flip.bit // 8 < last.offset + record.CHECKSUM_SIZE

    def case(self, flag: str, flip: Flip) -> str:
        return f"{self.state} {flag} {flip.file} {flip.bit} ({flip.where})"


def replay(tmp_path: Path, patch: pytest.MonkeyPatch, state: str, flag: str, file: str, bit: int) -> Look:
    """One case again."""
    return Bench(tmp_path, patch, state).try_flip(flag, Flip(file, bit, "again"))


pytestmark = pytest.mark.usefixtures("fast_disk", "watched")


@pytest.fixture
def bench(tmp_path, monkeypatch, state):
    return Bench(tmp_path, monkeypatch, state)


def run(bench: Bench, flag: str, flips: list[Flip], complaint: Complaint) -> None:
    before = freeze(bench.copy.path)
    failures = []
    for flip in flips:
        look = bench.try_flip(flag, flip)
        complaints = [*look.wrong, *(complaint(bench, flip, failure) for failure in look.errors)]
        failures.extend(f"{bench.case(flag, flip)}: {each}" for each in complaints[:1] if each)
    if flag == "r":
        assert freeze(bench.copy.path) == before, "a reader has written"
    report(failures, len(flips))


def not_at_all(_bench: Bench, _flip: Flip, failure: dbm_bitcask.error) -> str:
    return f"an index is rebuilt, and not complained of: {failure!r}"


def names_the_place(bench: Bench, flip: Flip, failure: dbm_bitcask.error) -> str:
    """Complains of an error that does not name file and offset of what was flipped."""
    if flip.file == "MANIFEST":
        return "" if getattr(failure, "path", "").endswith("MANIFEST") else f"the manifest is not named: {failure!r}"
    if flip.file.endswith(".hint"):
        return not_at_all(bench, flip, failure)
    named = isinstance(failure, dbm_bitcask.CorruptionError) and Path(failure.path).name == flip.file
    return "" if named and failure.offset in starts_of(bench.small, flip) else f"it does not name file and offset: {failure!r}"


def starts_of(small: Small, flip: Flip) -> list[int]:
    """Where the record begins that has this bit, and the batch that the record is in; 0 for the header of the segment."""
    byte = flip.bit // 8
    return [each.offset for each in small.log if each.file == flip.file and each.offset <= byte < each.end] or [0]


both_flags = pytest.mark.parametrize("flag", ["r", "w"])
EVERY = 100_000  # more than there are


@both_flags
@pytest.mark.parametrize("state", ["RESTING", "DIRTY", "LOST"])
def test_flipped_bit_of_the_log_gives_the_right_value_or_an_error_that_names_the_place(bench, flag, state, amount):
    flips = some(list(log_bits(bench.small)), amount(sample=120, full=EVERY if state == "RESTING" else 1000, release=EVERY))
    run(bench, flag, flips, names_the_place)
    assert len(flips) >= (amount(sample=120, full=16_000, release=16_000) if state == "RESTING" else 120)


@both_flags
@pytest.mark.parametrize("state", ["RESTING", "LOST"])
def test_flipped_bit_of_hint_and_manifest_changes_nothing_or_is_an_error(bench, flag, amount):
    flips = some(list(side_bits(bench.small)), amount(sample=80, full=800, release=EVERY))
    run(bench, flag, flips, names_the_place)


TO_POISONED = Flip("keydir", 64 * header.STATE + 2, "header STATE")  # makes POISONED of RESTING


@both_flags
@pytest.mark.parametrize("state", ["RESTING", "CLEAN"])
def test_flipped_bit_of_a_keydir_that_was_closed_is_never_noticed(bench, flag, state, amount):
    every = EVERY if (state, flag) == ("RESTING", "r") else 4000 if state == "RESTING" else 1500
    flips = some([flip for flip in keydir_bits(bench.small) if flip != TO_POISONED], amount(sample=120, full=every, release=EVERY))
    flips += other_keydir_bits(bench.small, amount(sample=30, full=500, release=200_000))
    run(bench, flag, flips, not_at_all)


@pytest.mark.parametrize("state", ["RESTING"])
def test_flipped_bit_that_calls_a_keydir_poisoned_is_never_noticed(bench):
    run(bench, "w", [TO_POISONED], not_at_all)


# The keydir of a killed process has no checksum on what that process touched, so that these cannot be known to be wrong.
UNKNOWABLE = {
    "header SEED": "no key is where it is looked for",
    "slot hash": "the key is not found",
    "slot location": "it leads to a segment that is not there, which is what the slots of merged segments do; or to another record",
    "page depth": "bit 63, without which the word is 0: the end of a search",
    "counters COUNT": "it is what len() says, unless it is more than the slots that there are",
}


def kind(flip: Flip) -> str:
    """The word, without a number or a copy."""
    words = flip.where.replace("counters A", "counters").replace("counters B", "counters").replace(" (current)", "").split()
    return "row" if words[0] == "row" else " ".join(words)


@both_flags
@pytest.mark.parametrize("state", ["DIRTY"])
def test_flipped_bit_of_the_keydir_of_a_killed_process_is_found_where_that_is_possible(bench, flag, amount):
    flips = some(keydir_bits(bench.small), amount(sample=150, full=2000, release=EVERY))
    flips += other_keydir_bits(bench.small, amount(sample=30, full=500, release=200_000))
    missed: Counter[str] = Counter()
    failures = []
    for flip in flips:
        look = bench.try_flip(flag, flip)
        if look.wrong:
            missed[kind(flip)] += 1
            found = [each for each in look.wrong if kind(flip) not in UNKNOWABLE or is_never_right(each, bench.small)]
            failures += [f"{bench.case(flag, flip)}: {each}" for each in found[:1]]
    print(f"{len(flips) - missed.total()} of {len(flips)} flips are harmless or found; not found: {dict(missed)}")
    report(failures, len(flips))


def is_as_counted(answer: object, flip: Flip) -> bool:
    """Whether a number of keys is one that the index has slots for."""
    return isinstance(answer, int) and flip.bit % 64 < 12


@pytest.mark.parametrize("state", ["DIRTY"])
@pytest.mark.parametrize("word", ["counters TAIL", "counters COUNT", "row", "header TABLE"])
def test_flipped_bit_of_what_a_killed_process_counted_is_no_exception_of_python_and_no_wrong_list(bench, word):
    flips = some([flip for flip in keydir_bits(bench.small) if kind(flip) == word], 256)
    failures = []
    for flip in flips:
        bench.copy.put(bench.small.files)  # a reader leaves it as it was, a writer does not
        complaints = [*bench.try_flip("r", flip).wrong, *bench.try_flip("w", flip).wrong]
        found = [each for each in complaints if word != "counters COUNT" or each.what != "len" or not is_as_counted(each.answer, flip)]
        failures += [f"{bench.case('rw', flip)}: {each}" for each in found[:1]]
    report(failures, len(flips))


@both_flags
@pytest.mark.parametrize("state", ["RESTING", "DIRTY"])
@pytest.mark.parametrize("number", [2**64 - 1, 0, 1 << 63])
def test_word_of_the_keydir_that_is_anything_is_no_exception_of_python_and_no_value_that_never_was(bench, flag, number):
    failures = []
    for word, name in used_words(bench.small).items():
        image = bytearray(bench.small.files["keydir"])
        image[8 * word : 8 * word + 8] = number.to_bytes(8, "little")
        bench.copy.put({**bench.small.files, "keydir": bytes(image)})
        alarm()
        look = LOOKS[flag](bench.copy.path, bench.small)
        failures += [f"{bench.state} {flag} {name}: {each}" for each in look.wrong if is_never_right(each, bench.small)][:1]
    report(failures, len(used_words(bench.small)))


@pytest.mark.parametrize("state", ["DIRTY"])
def test_slot_that_leads_to_the_record_of_another_key_never_gives_its_value(bench):
    good = bench.small.files["keydir"]
    places = [word for word, name in used_words(bench.small).items() if name == "slot location"]
    for one, other in pairwise(places):
        image = bytearray(good)
        image[8 * one : 8 * one + 8], image[8 * other : 8 * other + 8] = good[8 * other : 8 * other + 8], good[8 * one : 8 * one + 8]
        bench.copy.put({**bench.small.files, "keydir": bytes(image)})
        alarm()
        look = LOOKS["r"](bench.copy.path, bench.small)
        assert look.wrong, "the exchange took no effect"
        assert not [str(each) for each in look.wrong if is_never_right(each, bench.small)], f"words {one} and {other}"
