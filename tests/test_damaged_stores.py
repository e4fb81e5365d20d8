"""Stores of which a file was cut, overwritten, shuffled, lost, or is of another time: an answer is right, or it is an error.

A case is named `state flag damage`; the damages of a state always come in the same order, so that the name replays.
"""

from __future__ import annotations

import random
from itertools import combinations, permutations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import dbm_bitcask
from damage import (
    LOOKS,
    Copy,
    Failed,
    Foreign,
    Small,
    Written,
    _ask,
    alarm,
    as_of,
    is_never_right,
    make,
    report,
)
from dbm_bitcask.engine import header, record
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.repair import repair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from damage import Look

Files = dict[str, bytes]
STATES = {"RESTING": header.RESTING, "DIRTY": header.DIRTY, "LOST": header.RESTING}
BLOCK = 64


class Damage(NamedTuple):
    """A name, and the files as they are then."""

    name: str
    files: Files


class Store(NamedTuple):
    """A store, its files behind earlier sessions, and a copy of it to be damaged."""

    small: Small
    earlier: list[Files]
    copy: Copy


# What there is to damage.


def cuts(files: Files) -> Iterator[Damage]:
    for name, data in sorted(files.items()):
        lengths = range(len(data)) if name != "keydir" else sorted({*range(0, len(data), 512), *range(0, 600, 8), len(data) - 1})
        yield from (Damage(f"{name} cut to {length}", {**files, name: data[:length]}) for length in lengths)


def blocks(files: Files) -> Iterator[Damage]:
    chance = random.Random(6)
    for name, data in sorted(files.items()):
        pieces = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        for number, piece in enumerate(pieces):
            other = chance.randrange(len(pieces))
            swapped = list(pieces)
            swapped[number], swapped[other] = swapped[other], piece
            kinds = {
                "zeroed": [*pieces[:number], bytes(len(piece)), *pieces[number + 1 :]],
                "of ones": [*pieces[:number], b"\xff" * len(piece), *pieces[number + 1 :]],
                "doubled": [*pieces[: number + 1], *pieces[number:]],
                "deleted": [*pieces[:number], *pieces[number + 1 :]],
                f"swapped with {other}": swapped,
            }
            for kind, changed in kinds.items():
                yield Damage(f"{name} block {number} {kind}", {**files, name: b"".join(changed)})


def appended(files: Files) -> Iterator[Damage]:
    chance = random.Random(7)
    for name, data in sorted(files.items()):
        garbage = {
            "a zero": bytes(1),
            "zeros": bytes(64),
            "pages of zeros": bytes(8192),
            "ones": b"\xff" * 100,
            "text": b"somebody wrote here by hand\n" * 5,
            "noise": chance.randbytes(777),
            "its own end": data[-96:],
            "itself": data,
            "a promise of four gigabytes": record.HEADER.pack(1, 2**32 - 8, 20, 0, 0, 0),
        }
        for kind, more in garbage.items():
            yield Damage(f"{name} and {kind} behind it", {**files, name: data + more})


def exchanged(files: Files) -> Iterator[Damage]:
    for one, other in combinations(sorted(files), 2):
        yield Damage(f"{one} and {other} swapped", {**files, one: files[other], other: files[one]})
    for one, other in permutations(sorted(files), 2):
        yield Damage(f"{one} in the place of {other}", {**files, other: files[one]})


def missing(files: Files) -> Iterator[Damage]:
    for count in (1, 2, 3):
        for names_lost in combinations(sorted(files), count):
            yield Damage(f"{' and '.join(names_lost)} missing", {name: data for name, data in files.items() if name not in names_lost})


def restored(files: Files, earlier: list[Files]) -> Iterator[Damage]:
    for number, before in enumerate(earlier):
        for count in (1, 2, 3):
            for chosen in combinations(sorted(before), count):
                if any(before[name] != files.get(name) for name in chosen):
                    back = {name: before[name] for name in chosen}
                    yield Damage(f"{' and '.join(chosen)} as of session {number}", {**files, **back})


def damages(small: Small, earlier: list[Files], count: int) -> list[Damage]:
    """Of each kind its share: of the small kinds every one, of the large ones a sample."""
    files, chance = small.files, random.Random(8)
    kinds = [cuts(files), blocks(files), appended(files), exchanged(files), missing(files), restored(files, earlier)]
    every = sorted(map(list, kinds), key=len)
    chosen: list[Damage] = []
    for left, kind in zip(range(len(every), 0, -1), every, strict=True):
        share = (count - len(chosen)) // left
        chosen += kind if len(kind) <= share else chance.sample(kind, share)
    return chosen


# What is true then.


def is_whole(written: Written, files: Mapping[str, bytes], small: Small) -> bool:
    """Whether the bytes of a record stand where they stood."""
    where = slice(written.offset, written.end)
    return files.get(written.file, b"")[where] == small.files[written.file][where]


def torn_from(small: Small, files: Files) -> int:
    """How many records the log has before what may be a torn tail: the first bad one of the active segment that nobody vouches for."""
    first = next(number for number, each in enumerate(small.log) if each.file == small.active)
    torn = len(small.log)
    for number, each in reversed(list(enumerate(small.log))[first:]):
        if is_whole(each, files, small):
            if each.synced:
                break
        else:
            torn = number
    return torn


def silent(small: Small, files: Files) -> dict[bytes, bytes] | None:
    """What is in it if a torn tail is cut: allowed where the keydir is not there, or not of this log."""
    torn = torn_from(small, files)
    of_another = files.get("keydir") is None or files["keydir"] != small.files.get("keydir") or not is_whole(small.log[-1], files, small)
    return as_of(small.log[:torn]) if torn < len(small.log) and of_another else None


def try_damage(copy: Copy, small: Small, flag: str, damage: Damage) -> Look:
    look = _look(copy, small, flag, damage, small.items)
    cut = silent(small, damage.files) if look.wrong else None
    return look if cut is None else _look(copy, small, flag, damage, cut)


def _look(copy: Copy, small: Small, flag: str, damage: Damage, items: Mapping[bytes, bytes]) -> Look:
    copy.put(damage.files)
    alarm()
    return LOOKS[flag](copy.path, small, items)


# After a repair.


def hinted(small: Small, files: Files, segment: str) -> bool:
    """Whether the hint of a segment is as it was."""
    name = segment.replace(".data", ".hint")
    return name in small.files and files.get(name) == small.files[name]


def is_indexed(state: str, small: Small, files: Files) -> bool:
    """Whether there is a keydir that is to be trusted, which knows where the log ends, and where the newest record of each key is."""
    last = small.log[-1]
    checksum = slice(last.offset, last.offset + record.CHECKSUM_SIZE)
    same = [name for name in ("keydir", "MANIFEST") if files.get(name) == small.files.get(name)]
    headers = [name for name in small.files if name.endswith(".data") and files.get(name, b"")[:32] != small.files[name][:32]]
    short = [name for name in small.files if name.endswith(".data") and len(files.get(name, b"")) < len(small.files[name])]
    if state == "LOST" or len(same) < 2 or headers or short:
        return False
    as_long = len(files[small.active]) == len(small.files[small.active])
    return (as_long or state == "DIRTY") and files[last.file][checksum] == small.files[last.file][checksum]


def allowed(state: str, small: Small, files: Files, *, hints: bool) -> dict[bytes, set[bytes | None]]:
    """The values that each key may have after a repair; None is none at all. With `hints`, what they knew to be lost must be gone.

    What a keydir that is trusted knows to be lost must be gone, too; and then nothing that verifies is lost, synced or not.
    """
    indexed = is_indexed(state, small, files)
    torn = len(small.log) if indexed else torn_from(small, files)
    survived: dict[bytes, set[bytes | None]] = {}
    found: dict[bytes, set[bytes | None]] = {}
    for number, each in enumerate(small.log):
        if each.overhead:
            continue
        if number < torn and is_whole(each, files, small):
            survived.setdefault(each.key, set()).add(each.value)
            found[each.key] = {each.value}
        elif indexed or (hints and hinted(small, files, each.file)):
            found[each.key] = {None}
        else:
            found[each.key] = {None, *survived.get(each.key, ())}
    return found


class Repaired(NamedTuple):
    """What `check` says after a repair, and what is in the store then."""

    problems: object
    items: object


def repaired(copy: Copy, damage: Damage) -> Repaired:
    copy.put(damage.files)
    alarm()
    steps = _ask(lambda: repair(copy.path))
    if isinstance(steps, Failed | Foreign):
        return Repaired(steps, steps)
    return Repaired(_ask(lambda: check(copy.path)), _ask(lambda: _opened(copy.path)))


def misjudged(state: str, small: Small, damage: Damage, after: Repaired, *, hints: bool) -> list[str]:
    """The keys that have a value after a repair that they must not have."""
    if not isinstance(after.items, dict):
        return [f"it does not open: {after.items}"]
    right = allowed(state, small, damage.files, hints=hints)
    values = {key: after.items.get(key) for key in {*after.items, *right}}
    return [f"{key!r} is {value!r}" for key, value in sorted(values.items()) if value not in right.get(key, ())]


def _opened(path: Path) -> dict[bytes, bytes]:
    with dbm_bitcask.open(path, "r") as db:
        found = dict(db)
        assert len(db) == len(found)
        return found


# All of it.


pytestmark = pytest.mark.usefixtures("fast_disk", "watched")


@pytest.fixture
def store(tmp_path, monkeypatch, state) -> Store:
    earlier: list[Files] = []
    small = make(tmp_path / "made", monkeypatch, STATES[state], earlier)
    if state == "LOST":
        del small.files["keydir"]
    return Store(small, earlier, Copy(tmp_path / state))


every_state = pytest.mark.parametrize("state", STATES)
AMOUNT = {"sample": 60, "full": 1700, "release": 100_000}  # of each state


def is_unknowable(state: str, small: Small, damage: Damage) -> bool:
    """Whether words of a keydir are changed that carry no checksum, for its process was killed."""
    after = damage.files.get("keydir", b"")
    return state == "DIRTY" and after != small.files["keydir"] and len(after) >= len(small.files["keydir"])


def has_old_manifest(small: Small, damage: Damage) -> bool:
    return damage.files.get("MANIFEST") != small.files["MANIFEST"] and " as of session " in damage.name


def try_all(store: Store, state: str, flag: str, chosen: list[Damage]) -> None:
    small, _, copy = store
    failures = []
    for damage in chosen:
        look = try_damage(copy, small, flag, damage)
        # What the index of a killed process says is believed; but it must not be an exception, nor a hang.
        found = [each for each in look.wrong if is_never_right(each, small) or not is_unknowable(state, small, damage)]
        failures += [f"{state} {flag} {damage.name}: {each}" for each in found[:1]]
    report(failures, len(chosen))


@every_state
@pytest.mark.parametrize("flag", ["r", "w"])
def test_damaged_store_gives_right_values_or_errors(store, state, flag, amount):
    chosen = damages(store.small, store.earlier, amount(**AMOUNT))
    assert len(chosen) * len(STATES) >= amount(sample=150, full=5000, release=10_000)
    try_all(store, state, flag, chosen)


@every_state
@pytest.mark.parametrize("flag", ["r", "w"])
def test_torn_tail_of_the_active_segment_is_cut_without_a_word(store, state, flag, amount):
    small, _, copy = store
    torn = [Damage(name, files) for name, files in cuts(small.files) if name.startswith(small.active) and len(files[small.active]) >= 32]
    torn = random.Random(10).sample(torn, amount(sample=30, full=len(torn), release=len(torn)))
    torn += [damage for damage in appended(small.files) if damage.name.startswith(small.active)]
    failures = []
    for damage in torn:
        look = try_damage(copy, small, flag, damage)
        failures += [f"{state} {flag} {damage.name}: {each}" for each in [*look.wrong, *look.errors][:1]]
    report(failures, len(torn))


@every_state
@pytest.mark.parametrize("flag", ["r", "w"])
def test_store_with_an_old_manifest_gives_right_values_or_errors(store, state, flag):
    chosen = [damage for damage in restored(store.small.files, store.earlier) if has_old_manifest(store.small, damage)]
    try_all(store, state, flag, chosen)


def repair_all(store: Store, chosen: list[Damage], complaints: Callable[[Damage, Repaired], list[str]]) -> None:
    failures = []
    for damage in chosen:
        failures += [f"{damage.name}: {each}" for each in complaints(damage, repaired(store.copy, damage))[:1]]
    report(failures, len(chosen))


@every_state
def test_damaged_store_has_every_record_that_verifies_after_a_repair(store, state, amount):
    small = store.small

    def is_asked(damage: Damage) -> bool:
        return not is_unknowable(state, small, damage) and not has_old_manifest(small, damage)

    chosen = [damage for damage in damages(small, store.earlier, amount(**AMOUNT)) if is_asked(damage)]
    repair_all(store, chosen, lambda damage, after: misjudged(state, small, damage, after, hints=False))


@every_state
def test_store_with_an_old_manifest_has_every_record_that_verifies_after_a_repair(store, state):
    chosen = [damage for damage in restored(store.small.files, store.earlier) if has_old_manifest(store.small, damage)]
    repair_all(store, chosen, lambda damage, after: misjudged(state, store.small, damage, after, hints=False))


@pytest.mark.parametrize("state", ["RESTING", "DIRTY"])
def test_key_whose_record_was_lost_has_no_older_value_after_a_repair_if_the_keydir_knew_it(store, state):
    small = store.small
    chosen = [damage for damage in blocks(small.files) if damage.files.get(small.active) != small.files[small.active]]
    known = [damage for damage in chosen if is_indexed(state, small, damage.files)]
    assert len(known) > 10
    repair_all(store, known, lambda damage, after: misjudged(state, small, damage, after, hints=False))


def of_second(name):
    """Where the manifest is lost, too, nothing says that the hint belongs to anything."""
    return name.startswith("00000002.data") and "MANIFEST" not in name


@every_state
def test_key_whose_record_was_lost_has_no_older_value_after_a_repair_if_a_hint_knew_it(store, state):
    small = store.small
    lost = [damage for kind in (blocks, missing, cuts) for damage in kind(small.files) if of_second(damage.name)]
    chosen = random.Random(9).sample(lost, 60)
    repair_all(store, chosen, lambda damage, after: misjudged(state, small, damage, after, hints=True))


@pytest.mark.parametrize("state", ["RESTING", "DIRTY"])
def test_check_has_nothing_to_say_after_a_repair(store, amount):
    chosen = damages(store.small, store.earlier, amount(**AMOUNT))
    repair_all(store, chosen, lambda _, after: [str(after.problems)] if after.problems != [] else [])
