"""Any bytes at all for each parser, and any bytes in each file of a store: only the exceptions that are documented.

A case is named by its seed, as `again` takes it. The mutations know where the fields of a format are, and can make its checksum right
again, so that what is behind the checksum is looked at, too.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from time import process_time
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given

import dbm_bitcask
from damage import Copy, Foreign, Small, _ask, alarm, ask_all, fast_disk, make, report
from dbm_bitcask.engine import header, manifest, names, page
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.repair import repair
from forged import FORMATS, U32, U64, as_it_is, reseal_hint, reseal_manifest, reseal_records
from parsers import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

INTERESTING = [0, 1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 255, 256, 511, 512, 4095, 4096, 65535, 65536]
INTERESTING += [number for power in (31, 32, 40, 41, 48, 63) for number in (2**power - 8, 2**power - 1, 2**power, 2**power + 1)] + [
    U64 - 8,
    U64 - 1,
]

# Mutations.


def set_field(data: bytes, chance: random.Random, width: int) -> bytes:
    """A field to another number, mostly near the beginning, where the heads are."""
    width = chance.choice([1, 2, width, width])
    at = chance.randrange(max(1, chance.choice([len(data), min(len(data), 256)]) // width)) * width
    old = int.from_bytes(data[at : at + width], "little")
    number = chance.choice([chance.choice(INTERESTING), old + chance.choice([-8, -1, 1, 8]), chance.randrange(U64), len(data) - at])
    return data[:at] + (number % 256**width).to_bytes(width, "little") + data[at + width :]


def flip(data: bytes, chance: random.Random, _: int) -> bytes:
    at = chance.randrange(len(data) or 1)
    return data[:at] + bytes([byte ^ 1 << chance.randrange(8) for byte in data[at : at + 1]]) + data[at + 1 :]


def cut(data: bytes, chance: random.Random, _: int) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def remove(data: bytes, chance: random.Random, width: int) -> bytes:
    at, count = width * chance.randrange(len(data) // width + 1), width * chance.randrange(1, 9)
    return data[:at] + data[at + count :]


def repeat(data: bytes, chance: random.Random, width: int) -> bytes:
    at, count = width * chance.randrange(len(data) // width + 1), width * chance.randrange(1, 17)
    return data[:at] + data[at : at + count] * chance.choice([2, 3, 10]) + data[at + count :]


def splice(data: bytes, chance: random.Random, width: int) -> bytes:
    at, other = width * chance.randrange(len(data) // width + 1), chance.randrange(len(data) + 1)
    return data[:at] + data[other:]


def append(data: bytes, chance: random.Random, _: int) -> bytes:
    return data + chance.choice([bytes(8), b"\xff" * 8, chance.randbytes(chance.randrange(64)), data[-64:]])


def overwrite(data: bytes, chance: random.Random, width: int) -> bytes:
    at, piece = width * chance.randrange(len(data) // width + 1), chance.choice([bytes(64), b"\xff" * 64, chance.randbytes(64)])
    return data[:at] + piece + data[at + 64 :]


MUTATIONS = [set_field, set_field, set_field, flip, cut, remove, repeat, splice, append, overwrite]


def mutated(data: bytes, chance: random.Random, width: int) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 3, 5])):
        data = chance.choice(MUTATIONS)(data, chance, width)
    return data


def an_input(name: str, seed: int) -> bytes:
    """The input that a seed stands for: valid, mutated, mutated and valid again as to the checksum, or of nothing."""
    chance, how = random.Random(f"{name} {seed}"), FORMATS[name]
    turn = seed % 20
    if turn == 0:
        return chance.randbytes(chance.randrange(400))
    data = how.valid(chance)
    if turn == 1:
        return data
    data = mutated(data, chance, how.width)
    return how.reseal(data) if turn % 2 else data


def again(name: str, seed: int) -> None:
    """One case again."""
    TARGETS[name](an_input(name, seed))


def complaint(name: str, data: bytes) -> str:
    start = process_time()
    try:
        TARGETS[name](data)
    except Exception as failure:  # noqa: BLE001  (whatever a target lets out is what is looked for)
        return f"{failure!r}"
    took = process_time() - start
    return f"it took {took:.1f} s" if took > 1 else ""


pytestmark = pytest.mark.usefixtures("watched")


AMOUNT = {"sample": 60, "full": 1000, "release": 20_000}


@pytest.mark.parametrize("name", TARGETS)
def test_parser_raises_nothing_but_what_is_documented(name, amount):
    count = FORMATS[name].share * amount(**AMOUNT)
    failures = []
    alarm(3600)
    for seed in range(count):
        data = an_input(name, seed)
        told = complaint(name, data)
        if told:
            failures.append(f"{name} seed {seed} {data[:200].hex()}: {told}")
    report(failures, count)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=600))
def test_parser_takes_any_bytes(name, data):
    TARGETS[name](data)
    TARGETS[name](FORMATS[name].reseal(data))


@pytest.mark.parametrize("name", TARGETS)
@given(seed=st.integers(0, 2**32), more=st.binary(max_size=64), at=st.integers(0, 400))
def test_parser_takes_any_bytes_within_valid_ones(name, seed, more, at):
    data = FORMATS[name].valid(random.Random(seed))
    TARGETS[name](FORMATS[name].reseal(data[:at] + more + data[at + len(more) :]))


@pytest.mark.parametrize("name", TARGETS)
def test_memory_is_in_proportion_to_the_input(name, amount):
    """Whatever a length says."""
    failures, count = [], amount(sample=300, full=3000, release=30_000)
    tracemalloc.start()
    try:
        for seed in range(count):
            data = an_input(name, seed)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            complaint(name, data)
            taken = tracemalloc.get_traced_memory()[1] - before
            if taken > 64 * 1024 + 32 * len(data):
                failures.append(f"{name} seed {seed}: {taken} bytes of memory for {len(data)}")
    finally:
        tracemalloc.stop()
    report(failures, count)


# Whole stores.

WHOLE = {"sample": 30, "full": 300, "release": 20_000}
FILES = ["MANIFEST", "00000001.hint", "00000002.data", "00000003.data", "keydir"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    with pytest.MonkeyPatch.context() as patch:
        fast_disk(patch)
        return make(tmp_path_factory.mktemp("made") / "store", patch)


def salts(small: Small) -> dict[str, int]:
    return {names.segment_name(entry.id): entry.salt for entry in manifest.decode(small.files["MANIFEST"]).segments}


def resealed(small: Small, name: str, data: bytes) -> bytes:
    """The checksums of a file made right again; those of a keydir are made so where it is put."""
    if name in salts(small):
        return reseal_records(data, salts(small)[name])
    return {"MANIFEST": reseal_manifest, "keydir": as_it_is}.get(name, reseal_hint)(data)


def fuzzed(small: Small, name: str, seed: int, *, forged: bool) -> dict[str, bytes]:
    """The files of a store of which one is of this seed; every fourth without its keydir, so that everything is read from log and hints."""
    chance = random.Random(f"{name} {seed}")
    data = mutated(small.files[name], chance, 8)
    files = {**small.files, name: resealed(small, name, data) if forged else data}
    if seed % 4 == 0 and name != "keydir":
        del files["keydir"]
    return files


class BelievingCopy(Copy):
    """A copy in which all checksums of the keydir are right, whatever its words are."""

    def _believing(self, fd: int, data: bytes) -> bytes:
        image = bytearray(data[: len(data) & -header.PAGE_SIZE])
        if len(image) < 5 * header.PAGE_SIZE:
            return data
        status = os.fstat(fd)
        with memoryview(image).cast("Q") as words:
            words[header.DEVICE], words[header.INODE] = status.st_dev, status.st_ino
            directory = words[2 * header.PAGE_WORDS : 2 * header.PAGE_WORDS + 513]
            directory[512] = page.chunk_checksum(directory, 0)
            directory.release()
            words[4 * header.PAGE_WORDS + page.PAGE_CHECKSUM] = page.page_checksum(words, 4)
            words[header.SEAL] = header.header_checksum(words)
        return bytes(image)


def values_ever(small: Small) -> dict[bytes, set[bytes | None]]:
    found: dict[bytes, set[bytes | None]] = {}
    for each in small.log:
        found.setdefault(each.key, set()).add(each.value)
    return found


def all_that_is_told(path: Path, small: Small) -> dict[object, object]:
    """What readers, writers, `check` and `repair` say of a store."""
    told: dict[object, object] = {}
    for flag in "rw":
        db = told[flag, "open"] = _ask(lambda flag=flag: dbm_bitcask.open(path, flag))
        if isinstance(db, dbm_bitcask.Database):
            told |= {(flag, what): answer for what, answer in ask_all(db, small.keys).items()}
            told["set"] = _ask(lambda db=db: db.__setitem__(b"key 0", b"set"))
            told[flag, "close"] = _ask(db.close)
        told["check"] = _ask(lambda: check(path))
    told["repair"] = _ask(lambda: repair(path))
    told["after"] = _ask(lambda: dbm_bitcask.open(path, "r").close())
    return told


def never_written(told: dict[object, object], ever: dict[bytes, set[bytes | None]]) -> list[str]:
    """The values that no record of the log ever had."""
    asked = [(what[1][1], answer) for what, answer in told.items() if isinstance(what[1], tuple) and what[1][0] in ("[]", "get")]
    return [f"{key!r}: {value!r}" for key, value in asked if isinstance(value, bytes) and value not in ever.get(key, ())]


def complaints_of(copy: Copy, small: Small, files: dict[str, bytes]) -> list[str]:
    copy.put(files)
    alarm()
    start = process_time()
    told = all_that_is_told(copy.path, small)
    took = process_time() - start
    foreign = [f"{what}: {answer}" for what, answer in told.items() if isinstance(answer, Foreign)]
    return [*foreign, *never_written(told, values_ever(small)), *([f"it took {took:.1f} s"] if took > 1 else [])]


@pytest.mark.parametrize("name", FILES)
def test_store_with_a_file_of_any_bytes_raises_errors_and_returns_what_was_written(name, small, tmp_path, monkeypatch, amount):
    fast_disk(monkeypatch)
    copy, failures, count = Copy(tmp_path / "copy"), [], amount(**WHOLE)
    for seed in range(count):
        found = complaints_of(copy, small, fuzzed(small, name, seed, forged=False))
        failures += [f"{name} seed {seed}: {each}" for each in found[:1]]
    report(failures, count)


@pytest.mark.parametrize("name", FILES)
def test_store_with_a_file_of_any_bytes_under_right_checksums_raises_errors(name, small, tmp_path, monkeypatch, amount):
    """Values are what the forger says, but for a keydir, which cannot invent any."""
    fast_disk(monkeypatch)
    copy, failures, count = BelievingCopy(tmp_path / "copy"), [], amount(**WHOLE)
    for seed in range(count):
        found = complaints_of(copy, small, fuzzed(small, name, seed, forged=True))
        found = [each for each in found if "Foreign" in each or "it took" in each or name == "keydir"]
        failures += [f"{name} seed {seed}: {each}" for each in found[:1]]
    report(failures, count)


@pytest.mark.parametrize("length", [1, 8, 31])
def test_manifest_that_lists_a_segment_shorter_than_its_header_is_an_error(small, tmp_path, length):
    listed = manifest.decode(small.files["MANIFEST"])
    first = listed.segments[0]._replace(length=length)
    data, _ = manifest.encode(listed._replace(segments=(first, *listed.segments[1:])))
    copy = Copy(tmp_path / "copy")
    copy.put({**small.files, "MANIFEST": data})
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(copy.path, "r")


@pytest.mark.parametrize("keydir", [True, False])
def test_record_of_a_store_that_promises_four_gigabytes_takes_no_memory(small, tmp_path, monkeypatch, keydir, amount):
    fast_disk(monkeypatch)
    copy = Copy(tmp_path / "copy")
    for each in [*small.log[:: amount(sample=9, full=2, release=1)], small.log[-1]]:
        data = bytearray(small.files[each.file])
        data[each.offset + 8 : each.offset + 12] = (U32 - 8).to_bytes(4, "little")
        copy.put({name: kept for name, kept in {**small.files, each.file: bytes(data)}.items() if keydir or name != "keydir"})
        alarm()
        tracemalloc.start()
        told = all_that_is_told(copy.path, small)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not [answer for answer in told.values() if isinstance(answer, Foreign)]
        assert peak < 2**20, f"{each.file} at {each.offset}: {peak} bytes of memory"


def test_full_amount_is_that_of_the_issue():
    assert sum(each.share for each in FORMATS.values()) * AMOUNT["full"] + 2 * WHOLE["full"] * len(FILES) >= 200_000
