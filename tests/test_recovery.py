"""What is found when a database is opened, or written next, after somebody died or something was lost."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

import dbm_bitcask
from crashes import Machine, abandon, edited, freeze, thaw
from dbm_bitcask.engine import files, record, recovery, rotation, segment, store
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.header import MASK32, PAGE_SIZE
from dbm_bitcask.engine.page import key_hash, probe
from dbm_bitcask.engine.record import SEAL, TOMBSTONE
from dbm_bitcask.engine.repair import repair

ITEMS = {b"key %d" % number: b"value %d" % number for number in range(8)}
TINY = {"segment_size": 4096}


pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture
def left(path):
    """A database that was not closed: its writer is as if it had been killed. Its active segment holds `ITEMS`."""
    db = dbm_bitcask.open(path, "c")
    db.update(ITEMS)
    abandon(db)
    return path


@pytest.fixture
def closed(path):
    """The path of a closed database."""
    with dbm_bitcask.open(path, "c") as db:
        db.update(ITEMS)
    return path


@pytest.fixture
def several(path):
    """A closed database of several segments, with overwritten and deleted keys."""
    with dbm_bitcask.open(path, "c", **TINY) as db:
        for number in range(30):
            db[b"key %d" % (number % 20)] = b"%d " % number * 300
        for number in range(0, 20, 3):
            del db[b"key %d" % number]
    return path


def active(path):
    return max(path.glob("*.data"))


def sealed(path):
    return sorted(path.glob("*.data"))[:-1]


def contents(path, flag="r"):
    """Everything, as one handle finds it in every way."""
    with dbm_bitcask.open(path, flag) as db:
        found = dict(db)
        assert len(db) == len(found)
        assert {key: db[key] for key in found} == found
        return found


def require_contents(path, expected, flags="rwrw"):
    """The same by readers and writers, again and again; and the next key is no problem."""
    for flag in flags:
        assert contents(path, flag) == expected
        assert check(path) == []
    with dbm_bitcask.open(path, "w") as db:
        db[b"next"] = b"one"
    assert contents(path) == {**expected, b"next": b"one"}
    assert check(path) == []


# Torn tails

LAST = (b"the last key", b"the last value, which is a little longer")


def with_last(path):
    """Add one more record; the bytes of the active segment, and where that record begins."""
    db = dbm_bitcask.open(path, "w")
    start = active(path).stat().st_size
    db[LAST[0]] = LAST[1]
    abandon(db)
    return active(path).read_bytes(), start


def torn(path, data, keydir):
    """As a kill leaves it (the keydir does not know of the record), or a power cut (the keydir is lost)."""
    active(path).write_bytes(data)
    if not keydir:
        (path / "keydir").unlink(missing_ok=True)


lost_or_not = pytest.mark.parametrize("keydir", [True, False], ids=["keydir", "no keydir"])


def state_without(path):
    """The files of a database that knows nothing of its last record, the bytes of that record, and where it would begin."""
    before = freeze(path)
    data, start = with_last(path)
    return before, data[start:], start


@lost_or_not
def test_every_prefix_of_the_last_record_is_cut_and_reopens(left, tmp_path, keydir):
    before, last, start = state_without(left)
    for length in range(len(last) + 1):
        path = thaw(before, tmp_path / f"length {length}")
        torn(path, before[active(path).name] + last[:length], keydir)
        expected = ITEMS if length < len(last) else {**ITEMS, LAST[0]: LAST[1]}
        for flag in "rwrw":
            assert contents(path, flag) == (expected if flag == "w" or not keydir else contents(path))
        require_contents(path, expected)
        assert active(path).stat().st_size >= start or not keydir
        shutil.rmtree(path)


TAILS = {
    "one zero": b"\0",
    "zeros": bytes(64),
    "a page of zeros": bytes(4096),
    "an odd number of zeros": bytes(37),
    "ones": b"\xff" * 64,
    "a header that promises four gigabytes": record.HEADER.pack(1, 2**32 - 8, 20, 0, 0, 0),
    "a header that promises nothing": record.HEADER.pack(1, 0, 0, 0, 0, 0),
    "text": b"somebody wrote here by hand\n" * 5,
}


@lost_or_not
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_tail_that_is_no_record_is_cut_and_reopens(left, tail, keydir):
    torn(left, active(left).read_bytes() + tail, keydir)
    assert contents(left) == ITEMS
    require_contents(left, ITEMS, "wrw")


@lost_or_not
def test_record_with_a_wrong_checksum_is_cut_and_reopens(left, tmp_path, keydir):
    before, last, _ = state_without(left)
    for byte in range(len(last)):
        path = thaw(before, tmp_path / str(byte))
        bad = bytearray(last)
        bad[byte] ^= 0x10
        torn(path, before[active(path).name] + bad, keydir)
        require_contents(path, ITEMS, "rw")
        shutil.rmtree(path)


@lost_or_not
def test_record_of_another_place_is_cut_and_reopens(left, keydir):
    """A whole record that was written elsewhere: the first of this very segment."""
    data = active(left).read_bytes()
    first = record.decode_head(data, segment.FIRST_RECORD)
    torn(left, data + data[segment.FIRST_RECORD : segment.FIRST_RECORD + first.length], keydir)
    require_contents(left, ITEMS, "rwrw" if not keydir else "rww")


def encoded(path, offset, key, value, flags=0):
    """The bytes of a record for this offset of the active segment."""
    header = active(path).read_bytes()[: segment.FIRST_RECORD]
    return record.encode(flags, key, value, int.from_bytes(header[16:24], "little") ^ offset, 1_700_000_000)


@lost_or_not
def test_good_record_behind_a_bad_one_is_cut_with_it(left, keydir):
    """What was written last reaches the disk in any order: a hole makes everything behind it a state that never was."""
    data = active(left).read_bytes()
    bad = bytes(40)
    good = encoded(left, len(data) + len(bad), b"key 1", b"of a state that never was")
    torn(left, data + bad + good, keydir)
    require_contents(left, ITEMS, "rw")


@lost_or_not
def test_whole_records_at_the_tail_that_were_not_indexed_are_published(left, keydir):
    data = active(left).read_bytes()
    for flags, key, value in [
        (0, b"new", b"1"),
        (0, b"key 1", b"again"),
        (TOMBSTONE, b"key 2", b""),
        (0, b"new", b"22"),
        (TOMBSTONE, b"gone", b""),
    ]:
        data += encoded(left, len(data), key, value, flags)
    torn(left, data + b"and a torn one", keydir)
    expected = {**ITEMS, b"new": b"22", b"key 1": b"again"}
    del expected[b"key 2"]
    require_contents(left, expected, "wrw")


def test_writer_that_is_open_finds_what_another_left_behind_the_tail(left):
    with dbm_bitcask.open(left, "w") as db:
        data = active(left).read_bytes()
        with active(left).open("ab") as file:
            file.write(encoded(left, len(data), b"whole", b"record") + b"torn")
        db[b"mine"] = b"value"
        assert dict(db) == {**ITEMS, b"whole": b"record", b"mine": b"value"}


def test_torn_tail_is_cut_in_place_if_the_machine_did_not_restart(left):
    size = active(left).stat().st_size
    torn(left, active(left).read_bytes() + b"torn", keydir=True)
    dbm_bitcask.open(left, "w").close()
    assert len(list(left.glob("*.data"))) == 1
    assert active(left).read_bytes()[size : size + 4] != b"torn"


def test_nothing_is_appended_to_a_segment_that_is_cut_after_a_restart(left):
    data = active(left).read_bytes() + b"torn"
    torn(left, data, keydir=False)
    with dbm_bitcask.open(left, "w") as db:
        db[b"new"] = b"value"
    [old] = sealed(left)
    records = slice(segment.FIRST_RECORD, None)
    assert old.read_bytes()[records] == data[records]  # not even cut: the manifest says where it ends
    assert contents(left) == {**ITEMS, b"new": b"value"}


@pytest.mark.parametrize("flags", [0, TOMBSTONE])
def test_unfinished_write_is_finished_by_opening_for_writing(left, flags):
    """And not by the first write: a reader in between must not see it appear after it was absent."""
    data = active(left).read_bytes()
    torn(left, data + encoded(left, len(data), b"key 1", b"" if flags else b"new", flags), keydir=True)
    db = dbm_bitcask.open(left, "w")
    expected = {key: value for key, value in ITEMS.items() if key != b"key 1"} if flags else {**ITEMS, b"key 1": b"new"}
    assert contents(left) == dict(db) == expected
    assert len(db) == len(expected)
    db.close()


# Damage in what had been synced


def flip(file, offset, bit=3):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(bytes(data))


def offsets(file):
    """Where the records of a segment begin, with their keys."""
    data = file.read_bytes()
    offset, found = segment.FIRST_RECORD, {}
    while (head := record.decode_head(data, offset)) is not None:
        found[data[offset + head.key_start : offset + head.key_end]] = offset
        offset += head.length
    return found


@pytest.fixture
def synced(path):
    """A killed writer that had synced, and written a little more."""
    db = dbm_bitcask.open(path, "c")
    for key, value in ITEMS.items():
        db[key] = value
    db.sync()
    db[b"behind"] = b"the sync"
    abandon(db)
    yield path
    shutil.rmtree(path)  # it stays damaged


@lost_or_not
@pytest.mark.parametrize("key", [b"key 0", b"key 3", b"key 7"])
def test_flipped_bit_before_a_sync_is_reported_and_nothing_is_cut(synced, key, keydir):
    """Redteam 7."""
    where = offsets(active(synced))
    flip(active(synced), where[key] + 20)
    size = active(synced).stat().st_size
    if not keydir:
        (synced / "keydir").unlink(missing_ok=True)
    for flag in "rwrw":
        with dbm_bitcask.open(synced, flag) as db:
            with pytest.raises(dbm_bitcask.CorruptionError) as failure:
                db[key]
            assert failure.value.path.endswith(active(synced).name)
            assert failure.value.offset == where[key]
            for other, value in {**ITEMS, b"behind": b"the sync"}.items():
                if other != key and (keydir or where[other] > where[key]):
                    assert db[other] == value
    assert active(synced).stat().st_size >= size
    assert check(synced) != []


def test_without_keydir_what_is_older_than_damage_is_an_error_and_never_an_old_value(synced):
    """Nobody knows which key the lost record had: maybe a newer value of this one."""
    where = offsets(active(synced))
    flip(active(synced), where[b"key 3"] + 20)
    (synced / "keydir").unlink(missing_ok=True)
    with dbm_bitcask.open(synced, "w") as db:
        for key in [b"key 0", b"key 2", b"never there"]:
            with pytest.raises(dbm_bitcask.CorruptionError):
                db[key]
        db[b"key 0"] = b"set anew"
        assert db[b"key 0"] == b"set anew"
        assert db[b"key 5"] == ITEMS[b"key 5"]


def test_flipped_bit_behind_the_last_sync_is_a_torn_tail_if_the_keydir_is_lost(path):
    db = dbm_bitcask.open(path, "c")
    db.update(ITEMS)
    db.sync()
    db[b"first behind"] = b"the sync"  # carries the mark
    db[b"second behind"] = b"the sync"
    db[b"third behind"] = b"the sync"
    abandon(db)
    flip(active(path), offsets(active(path))[b"second behind"] + 20)
    (path / "keydir").unlink(missing_ok=True)
    require_contents(path, {**ITEMS, b"first behind": b"the sync"})


def test_everything_of_a_closed_database_is_vouched_for(closed):
    for key, offset in offsets(active(closed)).items():
        if key:  # all but the mark itself
            flip(active(closed), offset + 20)
            shutil.copy(closed / "keydir", closed / "spare")
            (closed / "keydir").unlink(missing_ok=True)
            with dbm_bitcask.open(closed, "r") as db, pytest.raises(dbm_bitcask.CorruptionError):
                db[key]
            shutil.move(closed / "spare", closed / "keydir")
            flip(active(closed), offset + 20)


@lost_or_not
def test_damage_in_a_sealed_segment_is_reported_and_everything_else_can_be_read(several, keydir):
    expected = contents(several)
    file = sealed(several)[2]
    good = file.read_bytes()
    with dbm_bitcask.open(several, "r") as db:
        live = {key: db._log.find(key) & MASK32 for key in expected if db._log.find(key) >> 32 == int(file.stem)}
        victim = min(live, key=live.get)
        # Without the keydir nobody knows whose record was lost: what is older may be a value of before.
        is_older = {key: db._log.find(key) < db._log.find(victim) for key in expected}
    for hint in several.glob("*.hint"):
        hint.unlink()
    flip(file, live[victim] + 40)
    if not keydir:
        (several / "keydir").unlink(missing_ok=True)
    for flag in "rw":
        with dbm_bitcask.open(several, flag) as db:
            for key, value in expected.items():
                if key == victim:
                    with pytest.raises(dbm_bitcask.CorruptionError) as failure:
                        db[key]
                    assert os.fsdecode(failure.value.path).endswith(file.name)
                    assert failure.value.offset == live[victim]
                else:
                    assert (is_older[key] and not keydir) or db[key] == value
    assert [problem.offset for problem in check(several) if problem.file.endswith(file.name)] == [live[victim]]
    file.write_bytes(good)
    (several / "keydir").unlink(missing_ok=True)
    assert contents(several, "w") == expected


def test_sealed_segment_that_is_too_short_is_reported(several):
    file = sealed(several)[-1]
    good = file.read_bytes()
    with dbm_bitcask.open(several, "r") as db:
        there = [key for key in db if db._log.find(key) >> 32 == int(file.stem)]
        others = {key: value for key, value in db.items() if key not in there}
    file.write_bytes(good[:-100])
    with dbm_bitcask.open(several, "r") as db:
        assert there
        for key in there:
            with pytest.raises(dbm_bitcask.CorruptionError, match=file.name):
                db[key]
        assert {key: db[key] for key in others} == others
    assert any(problem.file.endswith(file.name) for problem in check(several))
    file.write_bytes(good)


def test_sealed_segment_that_is_too_long_is_read_up_to_its_length(several):
    expected = contents(several)
    with sealed(several)[1].open("ab") as file:
        file.write(b"something behind the end" * 100)
    (several / "keydir").unlink(missing_ok=True)
    for hint in several.glob("*.hint"):
        hint.unlink()
    require_contents(several, expected)


# The keydir is lost, foreign, or of another time


def delete_it(path):
    (path / "keydir").unlink(missing_ok=True)


def empty_it(path):
    (path / "keydir").write_bytes(b"")


def truncate_it(path):
    os.truncate(path / "keydir", (path / "keydir").stat().st_size // 2 & -PAGE_SIZE)


def cut_it_within_a_page(path):
    os.truncate(path / "keydir", (path / "keydir").stat().st_size - 1)


def copy_it(path):
    """As `cp -r` does: the same bytes, another file."""
    shutil.copy(path / "keydir", path / "copy")
    (path / "copy").replace(path / "keydir")


def link_it(path):
    os.link(path / "keydir", path.with_name("backup of the keydir"))


def fill_it_with_zeros(path):
    (path / "keydir").write_bytes(bytes((path / "keydir").stat().st_size))


def fill_it_with_ones(path):
    (path / "keydir").write_bytes(b"\xff" * (path / "keydir").stat().st_size)


def swap_its_bytes(path):
    data = (path / "keydir").read_bytes()
    (path / "keydir").write_bytes(b"".join(data[at : at + 8][::-1] for at in range(0, len(data), 8)))


def take_that_of_another_database(path):
    other = path.with_name("other")
    with dbm_bitcask.open(other, "n") as db:
        db.update(dict.fromkeys(ITEMS, b"wrong"))
    (other / "keydir").replace(path / "keydir")


LOSSES = [
    delete_it,
    empty_it,
    truncate_it,
    cut_it_within_a_page,
    copy_it,
    link_it,
    fill_it_with_zeros,
    fill_it_with_ones,
    swap_its_bytes,
    take_that_of_another_database,
]


@pytest.mark.parametrize("flags", ["rw", "wr"])
@pytest.mark.parametrize("lose", LOSSES, ids=[lose.__name__ for lose in LOSSES])
@pytest.mark.parametrize("how", ["left", "several"])
def test_keydir_that_cannot_be_trusted_is_made_anew(request, how, lose, flags):
    path = request.getfixturevalue(how)
    expected = contents(path)
    lose(path)
    require_contents(path, expected, flags)


def test_keydir_of_an_older_state_is_made_anew(several):
    """A keydir that a backup brought back: of this database, and of before."""
    shutil.copy(several / "keydir", several / "old")
    with dbm_bitcask.open(several, "w") as db:
        db[b"new"] = b"value"
        del db[b"key 1"]
        expected = dict(db)
    with open(several / "old", "rb") as old, open(several / "keydir", "r+b") as now:  # noqa: PTH123
        now.write(old.read())
    (several / "old").unlink()
    require_contents(several, expected)


def test_log_of_an_older_state_makes_the_keydir_anew(several):
    """A backup of manifest and segments under the newer keydir."""
    expected = contents(several)
    old = freeze(several)
    with dbm_bitcask.open(several, "w") as db:
        db[b"new"] = b"value"
        del db[b"key 1"]
    for name, data in old.items():
        if name != "keydir":
            (several / name).write_bytes(data)
    require_contents(several, expected)


def test_linked_keydir_is_left_alone(several, tmp_path):
    backup = tmp_path / "backup"
    os.link(several / "keydir", backup)
    before = backup.read_bytes()
    with dbm_bitcask.open(several, "w") as db:
        db[b"new"] = b"value"
    assert backup.stat().st_ino != (several / "keydir").stat().st_ino
    assert backup.read_bytes()[PAGE_SIZE:] == before[PAGE_SIZE:]


@pytest.fixture
def restart(monkeypatch):
    """Have the machine restart: everything is as it was, but for the boot id."""
    return lambda boot=4711: monkeypatch.setattr(files, "boot_id", lambda: boot)


def inode(path):
    return (path / "keydir").stat().st_ino


def test_keydir_is_trusted_within_a_boot(several):
    before = inode(several)
    expected = contents(several, "w")
    require_contents(several, expected)
    assert inode(several) == before


def test_keydir_that_is_not_clean_is_made_anew_after_a_restart(several, restart):
    expected, before = contents(several), inode(several)
    restart()
    assert contents(several, "r") == expected
    assert inode(several) == before
    require_contents(several, expected, "wr")
    assert inode(several) != before


def test_killed_writer_and_a_restart_lose_nothing_that_reached_the_disk(left, restart):
    restart()
    require_contents(left, ITEMS)


def test_without_a_boot_id_nothing_but_a_clean_keydir_is_trusted(closed, restart):
    before = inode(closed)
    restart(0)
    contents(closed, "w")
    assert inode(closed) != before
    require_contents(closed, ITEMS)


def test_torn_tail_after_a_restart_starts_a_new_segment(left, restart):
    torn(left, active(left).read_bytes() + bytes(20), keydir=True)
    restart()
    require_contents(left, ITEMS)
    assert len(sealed(left)) == 1


# States


def state_of(path):
    return int.from_bytes((path / "keydir").read_bytes()[8 * at.STATE : 8 * at.STATE + 8], "little")


def set_state(path, state):
    with edited(path / "keydir") as words:
        words[at.STATE] = state


def test_clean_keydir_is_trusted_after_a_restart(closed, restart):
    set_state(closed, at.CLEAN)
    before = inode(closed)
    restart()
    assert contents(closed, "r") == contents(closed, "w") == ITEMS
    assert (inode(closed), state_of(closed)) == (before, at.CLEAN)
    require_contents(closed, ITEMS)
    assert inode(closed) == before


def test_clean_keydir_says_dirty_durably_before_its_first_change(closed, monkeypatch):
    set_state(closed, at.CLEAN)
    states = []
    with dbm_bitcask.open(closed, "w") as db:
        keydir = db._log.keydir
        sync = keydir.file.sync
        monkeypatch.setattr(keydir.file, "sync", lambda: states.append(keydir.words[at.STATE]) or sync())
        db[b"one"] = b"1"
        assert (states, keydir.words[at.STATE]) == ([at.DIRTYING], at.DIRTY)
        db[b"two"] = b"2"
        assert states == [at.DIRTYING]


def test_dirtying_keydir_is_made_durable_by_whoever_comes_next(closed, monkeypatch):
    """Whoever marked it may have died before the mark was durable (redteam 2 d)."""
    set_state(closed, at.DIRTYING)
    synced = []
    with dbm_bitcask.open(closed, "w") as db:
        keydir = db._log.keydir
        sync = keydir.file.sync
        monkeypatch.setattr(keydir.file, "sync", lambda: synced.append(keydir.words[at.STATE]) or sync())
        db[b"one"] = b"1"
        assert synced == [at.DIRTYING]
    require_contents(closed, {**ITEMS, b"one": b"1"})


@pytest.mark.parametrize("state", [at.DIRTYING, at.DIRTY, at.CHANGING])
def test_unfinished_state_is_trusted_within_a_boot_only(closed, state, restart):
    set_state(closed, state)
    before = inode(closed)
    require_contents(closed, ITEMS, "rw")
    assert inode(closed) == before
    set_state(closed, state)
    restart()
    require_contents(closed, {**ITEMS, b"next": b"one"}, "rw")
    assert inode(closed) != before


@pytest.mark.parametrize("state", [0, at.MOVED, 8, 2**64 - 1])
def test_unknown_state_is_made_anew(closed, state):
    set_state(closed, state)
    require_contents(closed, ITEMS, "rw")


@pytest.mark.parametrize("state", [at.CLEAN, at.RESTING])
def test_flipped_bit_of_a_sealed_header_makes_the_keydir_anew(closed, tmp_path, state):
    set_state(closed, state)
    good = freeze(closed)
    for bit in [*range(0, 64 * 24, 23), *range(64 * 64, 64 * 72, 23), *range(64 * 500, 64 * 512, 197)]:
        path = thaw(good, tmp_path / str(bit))
        flip(path / "keydir", bit // 8, bit % 8)
        assert contents(path, "r") == ITEMS
        assert contents(path, "w") == ITEMS
        shutil.rmtree(path)


def test_changing_before_the_manifest_was_replaced_goes_back(left):
    with edited(left / "keydir") as words:
        words[at.STATE], words[at.NEXT_MANIFEST] = at.CHANGING, 12345
    require_contents(left, ITEMS)


def test_changing_keydir_that_fits_neither_manifest_is_made_anew(left):
    with edited(left / "keydir") as words:
        words[at.STATE], words[at.NEXT_MANIFEST], words[at.MANIFEST] = at.CHANGING, 12345, 54321
    before = inode(left)
    require_contents(left, ITEMS)
    assert inode(left) != before


@pytest.fixture
def lossy(path):
    """A record is lost, the only one of b"lost", or maybe a newer one of any older key; the index knew, and is not there either."""
    with dbm_bitcask.open(path, "c") as db:
        db[b"older"] = db[b"another"] = b"older"
        db._store.locked(rotation.rotate)
        db[b"lost"] = b"lost value"
        db[b"newer"] = b"newer"
    (path / "keydir").unlink(missing_ok=True)
    file = active(path)
    file.write_bytes(file.read_bytes().replace(b"lost value", b"lost_value"))
    yield path
    repair(path)
    assert contents(path) == {b"older": b"older", b"another": b"older", b"newer": b"newer"}


def raises_corruption(action):
    try:
        action()
    except dbm_bitcask.CorruptionError as failure:
        return failure.path.endswith(".data")
    return False


@pytest.mark.parametrize("flag", ["r", "w"])
def test_where_a_record_of_an_unknown_key_is_lost_what_is_behind_it_is_sure_and_nothing_else(lossy, flag):
    with dbm_bitcask.open(lossy, flag) as db:
        assert (db[b"newer"], db.get(b"newer"), b"newer" in db) == (b"newer", b"newer", True)
        for key in (b"older", b"lost", b"never there"):
            assert all(map(raises_corruption, (lambda key=key: db[key], lambda key=key: db.get(key), lambda key=key: key in db)))
        for things, sure in ((db, [b"newer"]), (db.items(), [(b"newer", b"newer")]), (db.values(), [b"newer"])):
            walk = iter(things)
            assert [next(walk) for _ in sure] == sure
            assert raises_corruption(lambda walk=walk: next(walk))
        assert all(map(raises_corruption, (lambda: len(db), db.keys, lambda: dict(db), lambda: list(db))))


def test_where_a_record_of_an_unknown_key_is_lost_nothing_is_handed_out_or_moved_that_may_be_older(lossy):
    with dbm_bitcask.open(lossy, "w") as db:
        for act in (lambda: db.pop(b"older"), lambda: db.pop(b"lost", None), lambda: db.setdefault(b"older", b"x"), db.reorganize):
            assert raises_corruption(act)
        assert raises_corruption(lambda: db[b"older"])
        db[b"another"] = b"set again"
        assert db[b"another"] == b"set again"
        assert db.setdefault(b"newer", b"x") == b"newer"
        db[b"another"] = b"older"


def steps_of(action):
    """How many bytecodes an action takes."""
    steps = 0

    def trace(frame, event, _):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return steps


def test_rebuilding_is_linear_in_the_number_of_segments(tmp_path):
    steps = []
    for count in (40, 160):
        path = tmp_path / str(count)
        with dbm_bitcask.open(path, "c", **TINY) as db:
            for number in range(count):
                db[b"%d" % number] = bytes(3900)
        assert len(sealed(path)) == count - 1
        (path / "keydir").unlink(missing_ok=True)
        steps.append(steps_of(lambda path=path: dbm_bitcask.open(path, "w").close()))
        assert check(path) == []
    assert steps[1] < 4.4 * steps[0]


def test_seal_at_the_tail_is_a_rotation_to_be_finished(left):
    data = active(left).read_bytes()
    torn(left, data + encoded(left, len(data), b"", b"", SEAL), keydir=True)
    contents(left, "w")
    assert [file.stat().st_size for file in sealed(left)] == [len(data) + rotation.SEAL_LENGTH]
    require_contents(left, ITEMS)


def test_seal_at_the_tail_is_no_rotation_if_the_keydir_is_lost_and_nothing_is_lost_behind_it(left):
    data = active(left).read_bytes()
    torn(left, data + encoded(left, len(data), b"", b"", SEAL), keydir=False)
    require_contents(left, ITEMS)


# Dying at every step of every operation


def some(db):
    db.update(ITEMS)
    db[b"key 1"] = b"overwritten"
    del db[b"key 2"]


def with_dead_segments(db):
    for turn in range(2):
        for number in range(6):
            db[b"key %d" % number] = b"%d %d" % (turn, number) * 180
    del db[b"key 3"]


def nearly_full_segment(db):
    some(db)
    db[b"filler"] = bytes(4096 - active_tail(db) - 24 - 6 - 40)


def nearly_full_page(db):
    """The next key of a certain beginning splits its page."""
    words = db._log.keydir.words
    seed = words[at.SEED]
    alike = (key for number in range(10**9) if key_hash(key := b"%d" % number, seed) >> 58 == 0)
    for key in alike:
        table = db._log.keydir.table
        page = probe(table, key_hash(key, seed)).page
        if db._log.keydir.words[page * 512 + 1] & 0xFFFF == 190 and table.words[page * 512 + 2] & MASK32 > 6:
            db._next = key
            return
        db[key] = b"value"


def active_tail(db):
    return db._log.keydir.counter(at.TAIL) & MASK32


def put_next(db):
    seed = db._log.keydir.words[at.SEED]
    for number in range(10**9):
        key = b"%d" % number
        if key_hash(key, seed) >> 58 == 0 and key not in db:
            db[key] = b"the key that splits"
            return


class Operation:
    """Something that is done to a database, and what was there before."""

    def __init__(self, prepare, do, **options):
        self.prepare, self.do, self.options = prepare, do, options


def mixed_batch(db):
    with db.batch():
        db[b"new 1"] = db[b"new 2"] = b"value"
        db[b"key 1"] = b"of another length"
        db[b"new 3"] = b""
        db.pop(b"key 5", None)
        db[b"new 4"] = b"value" * 20


OPERATIONS = {
    "set a new key": Operation(some, lambda db: db.__setitem__(b"new", b"value")),
    "set the first key": Operation(lambda _: None, lambda db: db.__setitem__(b"new", b"value")),
    "overwrite": Operation(some, lambda db: db.__setitem__(b"key 1", b"of another length")),
    "overwrite with the same": Operation(some, lambda db: db.__setitem__(b"key 5", ITEMS[b"key 5"])),
    "set a deleted key": Operation(some, lambda db: db.__setitem__(b"key 2", b"here again")),
    "delete": Operation(some, lambda db: db.__delitem__(b"key 5")),
    "delete the only key": Operation(lambda db: db.__setitem__(b"new", b""), lambda db: db.__delitem__(b"new")),
    "pop": Operation(some, lambda db: db.pop(b"key 5")),
    "setdefault": Operation(some, lambda db: db.setdefault(b"new", b"value")),
    "set for some time": Operation(some, lambda db: db.set(b"key 1", b"value", 10**6)),
    "touch": Operation(some, lambda db: db.touch(b"key 5", 10**6)),
    "set that rotates": Operation(nearly_full_segment, lambda db: db.__setitem__(b"new", b"value" * 20), **TINY),
    "overwrite that rotates": Operation(nearly_full_segment, lambda db: db.__setitem__(b"key 1", b"value" * 20), **TINY),
    "delete that rotates": Operation(nearly_full_segment, lambda db: db.__delitem__(b"key 5"), **TINY),
    "overwrite in a sealed segment": Operation(with_dead_segments, lambda db: db.__setitem__(b"key 0", b"value"), **TINY),
    "delete in a sealed segment": Operation(with_dead_segments, lambda db: db.__delitem__(b"key 0"), **TINY),
    "clear": Operation(with_dead_segments, lambda db: db.clear(), **TINY),
    "merge": Operation(with_dead_segments, lambda db: db.reorganize(), **TINY),
    "sync": Operation(some, lambda db: db.sync()),
    "set behind a sync": Operation(lambda db: (some(db), db.sync()), lambda db: db.__setitem__(b"new", b"value")),
    "set that splits a page": Operation(nearly_full_page, put_next),
    "set that is synced": Operation(some, lambda db: db.__setitem__(b"new", b"value"), sync="always"),
}
BATCHES = {
    "batch": Operation(some, mixed_batch),
    "batch of new keys": Operation(some, lambda db: db.update({b"new %d" % number: b"value" for number in range(5)})),
    "batch that rotates": Operation(nearly_full_segment, mixed_batch, **TINY),
    "batch over sealed segments": Operation(with_dead_segments, mixed_batch, **TINY),
    "batch that splits a page": Operation(nearly_full_page, lambda db: db.update({b"new %d" % number: b"" for number in range(5)})),
    "batch that is synced": Operation(some, mixed_batch, sync="always"),
}
OPERATIONS |= BATCHES
RESTING = ["set a new key", "overwrite", "delete", "clear"]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """The files of a database before each operation, the writer being still at it; made once."""
    made = {}

    def get(name):
        if name not in made:
            operation = OPERATIONS[name.removesuffix(", first in its process")]
            path = tmp_path_factory.mktemp("frozen") / "db"
            db = dbm_bitcask.open(path, "c", **operation.options)
            operation.prepare(db)
            if name.endswith(", first in its process"):
                db.close()
            else:
                abandon(db)
            made[name] = freeze(path)
        return made[name]

    return get


NAMES = [*OPERATIONS, *(f"{name}, first in its process" for name in RESTING)]


def states(db, do):
    """What the database holds before an operation and after it."""
    before = dict(db)
    do(db)
    return before, dict(db)


def ways_to_die(tmp_path, machine, frozen, name, *, killed):
    """For each step of the operation: (path, a handle beside, the handle that died, what there may be now)."""
    operation = OPERATIONS[name.removesuffix(", first in its process")]
    files_before = frozen(name)
    path = thaw(files_before, tmp_path / "whole")
    with dbm_bitcask.open(path, "w", **operation.options) as db:
        possible = states(db, operation.do)
    died, step = True, 0
    while died:
        step += 1
        path = thaw(files_before, tmp_path / str(step))
        beside = dbm_bitcask.open(path, "w", **operation.options)
        dying = dbm_bitcask.open(path, "w", **operation.options)
        died = machine.run(lambda dying=dying: operation.do(dying), step, killed=killed)
        try:
            yield path, beside, dying, possible
        finally:
            abandon(beside)
            abandon(dying)
        shutil.rmtree(path)
    assert step > 1


@pytest.mark.parametrize("name", NAMES)
def test_operation_that_is_interrupted_at_any_step_is_done_or_not_and_the_handle_goes_on(tmp_path, machine, frozen, name):
    for path, _, dying, possible in ways_to_die(tmp_path, machine, frozen, name, killed=False):
        require_continuation(dying, possible, path)


@pytest.mark.parametrize("name", NAMES)
def test_operation_that_is_killed_at_any_step_is_done_or_not_and_another_handle_goes_on(tmp_path, machine, frozen, name):
    for path, beside, _, possible in ways_to_die(tmp_path, machine, frozen, name, killed=True):
        require_continuation(beside, possible, path)


@pytest.mark.parametrize("name", NAMES)
def test_operation_that_is_killed_at_any_step_is_done_or_not_and_the_next_one_goes_on(tmp_path, machine, frozen, name):
    for path, _, _, possible in ways_to_die(tmp_path, machine, frozen, name, killed=True):
        db = dbm_bitcask.open(path, "w")
        found = dict(db)
        assert found in possible
        assert len(db) == len(found)
        assert check(path) == []
        require_continuation(db, [found], path)


@pytest.mark.parametrize("name", NAMES)
def test_operation_that_is_killed_at_any_step_is_seen_as_done_or_not_by_those_who_only_read(tmp_path, machine, frozen, name, monkeypatch):
    monkeypatch.setattr(recovery, "is_alive", lambda _: False)
    for path, beside, _, possible in ways_to_die(tmp_path, machine, frozen, name, killed=True):
        keys = possible[0].keys() | possible[1].keys()
        with dbm_bitcask.open(path, "r") as reader:
            # A handle that was open may see a half of a batch, until somebody writes.
            for db in (beside, reader) if name not in BATCHES else (reader,):
                found = {key: db[key] for key in keys if key in db}
                assert found in possible
                assert dict(db) == found
                assert dict(db.items()) == found
                assert len(db) == len(found)
        assert check(path) == []


def require_continuation(db, possible, path):
    """A handle goes on: it writes, closes, and all is well for ever after."""
    db[b"later"] = b"value"
    now = dict(db)
    assert now in [{**state, b"later": b"value"} for state in possible]
    assert len(db) == len(now)
    assert check(path) == []
    db.close()
    assert contents(path, "w") == now
    assert check(path) == []
    if len(now) < 50:
        (path / "keydir").unlink(missing_ok=True)
        assert contents(path, "r") == now


# Dying while finishing, rebuilding, healing and closing


def open_and_die(machine, path, step):
    """Whether a writer died at this step of opening the database."""
    opened = []
    died = machine.run(lambda: opened.append(dbm_bitcask.open(path, "w")), step, killed=True)
    for db in opened:
        abandon(db)
    return died


def reopened_by_somebody_who_dies_too(machine, frozen, path, possible, every=1):
    """A writer opens the database, and dies at each step of that; then another one opens it."""
    died, step = True, 1
    while died:
        copy = thaw(frozen, path.with_name(f"{path.name} again {step}"))
        died = open_and_die(machine, copy, step)
        assert contents(copy, "r") in possible
        with dbm_bitcask.open(copy, "w") as db:
            found = dict(db)
            assert found in possible
            db[b"later"] = b"value"
        assert check(copy) == []
        assert contents(copy) == {**found, b"later": b"value"}
        shutil.rmtree(copy)
        step += every
    return step


@pytest.mark.parametrize(
    ("name", "every"), [("set a new key", 1), ("overwrite", 1), ("delete", 1), ("set that rotates", 4), ("clear", 4), ("batch", 7)]
)
def test_finishing_that_is_killed_at_any_step_is_finished(tmp_path, machine, frozen, name, every, monkeypatch):
    """Two kills in a row: the second within the repair of what the first left."""
    monkeypatch.setattr(recovery, "is_alive", lambda _: False)  # else a reader may see a half of a batch
    before = frozen(name)
    operation = OPERATIONS[name]
    with dbm_bitcask.open(thaw(before, tmp_path / "whole"), "w", **operation.options) as db:
        possible = states(db, operation.do)
    died, step, twice = True, 1, 0
    while died:
        path = thaw(before, tmp_path / str(step))
        dying = dbm_bitcask.open(path, "w", **operation.options)
        died = machine.run(lambda dying=dying: operation.do(dying), step, killed=True)
        abandon(dying)
        twice += reopened_by_somebody_who_dies_too(machine, freeze(path), path, possible, every)
        shutil.rmtree(path)
        step += every
    assert twice > 2 * step


@pytest.mark.parametrize("torn", [b"", b"torn"], ids=["whole", "torn"])
def test_rebuilding_that_is_killed_at_any_step_is_done_again(left, tmp_path, machine, torn):
    with active(left).open("ab") as file:
        file.write(torn)
    (left / "keydir").unlink(missing_ok=True)
    before = freeze(left)
    for step in range(1, 10**9):
        path = tmp_path / str(step)
        path.mkdir()
        for name, data in before.items():
            (path / name).write_bytes(data)
        died = open_and_die(machine, path, step)
        require_contents(path, ITEMS, "rw")
        shutil.rmtree(path)
        if not died:
            break
    assert step > 50


@pytest.mark.parametrize("clean", [False, True], ids=["resting", "clean"])
def test_close_that_is_killed_at_any_step_loses_nothing(tmp_path, machine, frozen, monkeypatch, clean):
    if clean:
        monkeypatch.setattr(store, "_CLEAN_KEYS", 0)
    before = frozen("overwrite in a sealed segment")
    for step in range(1, 10**9):
        path = thaw(before, tmp_path / str(step))
        dying = dbm_bitcask.open(path, "w", **TINY)
        dying[b"last"] = b"value"
        expected = dict(dying)
        died = machine.run(dying.close, step, killed=True)
        abandon(dying)
        if step % 2:  # the first to come reads, or writes
            assert contents(path, "r") == expected
        require_contents(path, expected, "wr")
        shutil.rmtree(path)
        if not died:
            break
    assert step > 15


def test_healing_after_a_failed_sync_that_is_killed_at_any_step_is_done_again(path, tmp_path, machine, monkeypatch):
    def fail(_fd):
        raise OSError(5, "Input/output error")

    db = dbm_bitcask.open(path, "c")
    db.update(ITEMS)
    db.sync()
    db[b"behind"] = b"in doubt"
    del db[b"key 1"]
    expected = dict(db)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_fdatasync", fail)
        with pytest.raises(dbm_bitcask.error):
            db.sync()
    abandon(db)
    frozen_state = freeze(path)
    assert reopened_by_somebody_who_dies_too(machine, frozen_state, tmp_path / "db again", [expected]) > 50
    contents(path, "w")
