"""What each parser promises for any bytes at all: one function a parser, which takes the bytes and fails if the promise is broken.

`test_fuzz` calls them with seeded mutations. For a fuzzer that is led by coverage, from the checkout, on a Python that atheris has a wheel
for (3.11 to 3.14, Linux and macOS), by the name of a parser in `TARGETS`:

    pip install atheris xxhash
    mkdir -p corpus/record
    PYTHONPATH=. python tests/parsers.py record corpus/record -max_total_time=600

It ends with a traceback and a file `crash-...` when a promise is broken, which `python tests/parsers.py record crash-...` runs again.
Without `-max_total_time`, in seconds, it goes on for ever. What it found interesting stays in the corpus, where the next run begins.
"""

from __future__ import annotations

import contextlib
import random
import sys
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from dbm_bitcask.engine import contents, header, hint, manifest, names, record, segment
from dbm_bitcask.engine.files import Identity
from dbm_bitcask.engine.manifest import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

SALT = 0x0123456789ABCDEF
INODE, DEVICE, BOOT = 7, 3, 1 << 100 | 5


def require_covered(data: bytes, offset: int, seed: int, found: record.Record) -> None:
    """Key and value are bytes under the checksum, and the checksum is right."""
    assert offset + record.HEADER.size <= found.end <= len(data)
    body = data[offset + record.CHECKSUM_SIZE : found.end]
    assert xxh3_64_intdigest(body, seed) == int.from_bytes(data[offset : offset + record.CHECKSUM_SIZE], "little")
    assert body.endswith(found.value)
    assert found.key in body[16:]
    assert len(found.key) + len(found.value) + 16 <= len(body)


def fuzz_record(data: bytes) -> None:
    for offset in (0, 8, len(data) // 2):
        head = record.decode_head(data, offset)
        if head is not None:
            assert record.HEADER.size <= head.key_start <= head.key_end <= head.length <= record.LIMIT + record.CHECKSUM_SIZE
            assert head.length % record.ALIGNMENT == 0
        with contextlib.suppress(record.BadRecord):
            found = record.decode(data, offset, SALT ^ offset)
            if found is not None:
                require_covered(data, offset, SALT ^ offset, found)


def fuzz_segment(data: bytes) -> None:
    """`Reading`, `torn_tail_at`, `scan` and `next_valid` on the bytes of a segment."""
    entry, end = Entry(1, SALT, len(data)), len(data)
    reading = contents.Reading(data, entry, end)
    for offset, found in reading.records():
        require_covered(data, offset, SALT ^ offset, found)
    assert all(segment.FIRST_RECORD <= place.offset < place.end <= end for place in reading.damage)
    for key in contents.Reading(data, entry, end).keys():  # noqa: SIM118  (a method of that name, not a mapping)
        assert segment.FIRST_RECORD <= key.offset < key.offset + key.size <= end
    assert segment.FIRST_RECORD <= contents.torn_tail_at(data, entry, end) <= max(end, segment.FIRST_RECORD) or end < segment.FIRST_RECORD
    found_at = segment.next_valid(data, SALT, 1, end)
    assert found_at is None or record.decode(data, found_at, SALT ^ found_at) is not None


def fuzz_manifest(data: bytes) -> None:
    manifest.is_newer(data)
    with contextlib.suppress(manifest.BadManifest):
        listed = manifest.decode(data)
        assert manifest.encode(listed) == (data, listed)


def fuzz_hint(data: bytes) -> None:
    """`is_bound`, and `decode` of a hint that is. The segment is what the bytes say it is, so that more of them are looked at."""
    entry = Entry(*(int.from_bytes(data[at : at + 8], "little") for at in (8, 16, 24)))
    if hint.is_bound(data, entry):
        behind = segment.FIRST_RECORD
        for key in hint.decode(data):
            assert key.key in data
            assert behind <= key.offset
            behind = key.offset + key.size
        assert behind <= max(entry.length, segment.FIRST_RECORD)


def fuzz_names(data: bytes) -> None:
    for text in (data.decode("utf-8", "surrogateescape"), data.decode("utf-16-le", "surrogatepass" if len(data) % 2 == 0 else "ignore")):
        number = names.parse_segment(text)
        assert number is None or (names.segment_name(number) == text and 0 < number < 2**32)
        number = names.parse_hint(text)
        assert number is None or (names.hint_name(number) == text and 0 < number < 2**32)
        if names.is_temporary(text):
            assert text.isascii()
            assert text.endswith(".tmp")


def fuzz_header(data: bytes) -> None:
    """`is_sound` on whole pages of words, of a file that is as large, or larger, or smaller."""
    pages = max(4, len(data) // header.PAGE_SIZE)
    words = memoryview(data.ljust(pages * header.PAGE_SIZE, b"\0")[: pages * header.PAGE_SIZE]).cast("Q")
    for size in (len(words) * 8, 1 << 50, header.PAGE_SIZE):
        sound = header.is_sound(words, Identity(DEVICE, INODE, 1, size, 0o100644), BOOT)
        assert isinstance(sound, bool)
        if sound:
            assert words[header.CURRENT] in (header.COUNTERS_A, header.COUNTERS_B)
            assert ((words[header.ROOT] & header.MASK32) + (1 << (words[header.ROOT] >> 32) - 9)) * header.PAGE_SIZE <= len(words) * 8


TARGETS: dict[str, Callable[[bytes], None]] = {
    "record": fuzz_record,
    "segment": fuzz_segment,
    "manifest": fuzz_manifest,
    "hint": fuzz_hint,
    "names": fuzz_names,
    "header": fuzz_header,
}


def main() -> None:
    import atheris  # no dependency: see above

    atheris.instrument_all()  # what is imported so far: the parsers, and not what makes the inputs
    from forged import FORMATS

    name = sys.argv.pop(1)
    valid, reseal, *_ = FORMATS[name]

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        """Some inputs are made of valid ones, and half get a right checksum, which no fuzzer would ever hit upon."""
        data = atheris.Mutate(valid(random.Random(seed))[:size] if seed % 16 == 1 else data, size)
        return reseal(data)[:size] if seed % 2 else data

    longest = [] if any(each.startswith("-max_len=") for each in sys.argv) else [f"-max_len={8 * header.PAGE_SIZE}"]
    atheris.Setup([*sys.argv, *longest], TARGETS[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
