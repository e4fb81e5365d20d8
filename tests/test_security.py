"""Files that somebody else made: none of them runs code, takes memory, hangs, or leads to a write elsewhere.

Names are in `test_names`, bytes in `test_damaged_stores`, `test_bit_flips` and `test_fuzz`, modes and the umask in `test_open`.
"""

from __future__ import annotations

import ast
import itertools
import os
import pickle
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

import dbm_bitcask
from by_hand import ITEMS, TINY, active, everything, fill, lose_index, poke, rotate
from children import fork_and_wait
from crashes import Machine, abandon, freeze, thaw
from damage import LOOKS, Copy, Failed, Foreign, _ask, alarm, ask_all, fast_disk, make, report
from dbm_bitcask.__main__ import main
from dbm_bitcask.engine import header, manifest, segment
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.files import Directory
from dbm_bitcask.engine.page import key_hash
from dbm_bitcask.engine.repair import repair
from forged import reseal_hint, reseal_manifest

pytestmark = pytest.mark.usefixtures("fast_disk", "watched")

ENGINE = sorted((Path(dbm_bitcask.__file__).parent / "engine").glob("*.py"))


@pytest.fixture(scope="module", params=["keydir", "no keydir"])
def small(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        fast_disk(patch)
        small = make(tmp_path_factory.mktemp("made") / "store", patch)
    if request.param == "no keydir":
        del small.files["keydir"]
    return small


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path / "copy")


# Code.

RUN_WHAT_THEY_READ = {"ast", "code", "copyreg", "dbm", "importlib", "json", "marshal", "pickle", "runpy", "shelve", "subprocess"}
RUN_TEXT = {"__import__", "eval", "exec", "find_class", "import_module", "literal_eval", "load", "loads", "system"}


@pytest.mark.parametrize("file", ENGINE, ids=lambda file: file.stem)
def test_engine_never_runs_what_it_reads(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert {name.split(".")[0] for name in names}.isdisjoint(RUN_WHAT_THEY_READ)
            assert names.isdisjoint(RUN_TEXT)
        elif isinstance(node, ast.Attribute):
            assert node.attr not in RUN_TEXT
        elif isinstance(node, ast.Name):
            assert node.id not in RUN_TEXT | {"compile", "__builtins__"}


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_is_loaded_by_a_shelf_only(path, tmp_path):
    target = tmp_path / "it went off"
    bomb = pickle.dumps(Bomb(target))
    with dbm_bitcask.open(path, **TINY) as db:
        fill(db)
        db["key"] = db[bomb] = bomb
        assert db[bomb] == db.setdefault("key", b"") == bomb
        db.reorganize()
    lose_index(path)
    with dbm_bitcask.open(path, "r") as db:
        assert dict(db.items())[bomb] == bomb
    poke(active(path), active(path).stat().st_size, bomb)  # behind the last record
    assert [check(path), repair(path), dbm_bitcask.whichdb(path)] == [[], [], "dbm_bitcask"]
    assert main(["check", str(path)]) == main(["repair", str(path)]) == 0
    assert not target.exists()
    with dbm_bitcask.open_shelf(path) as shelf:
        shelf["key"]
    assert target.exists()


# What is no file of ours.


def put_directory(path: Path, _outside: Path) -> None:
    path.mkdir()
    (path / "precious").write_bytes(b"precious")


def put_fifo(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path, _outside: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # for the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


def put_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious")


def put_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


def put_link_to_directory(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def put_loop(path: Path, _outside: Path) -> None:
    path.symlink_to(path.name)


def put_device(path: Path, _outside: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null
    except PermissionError:
        pytest.skip("only root makes devices")


def put_file(path: Path, _outside: Path) -> None:
    path.write_bytes(b"precious")


def put_empty_file(path: Path, _outside: Path) -> None:
    path.touch()


IRREGULAR = [put_directory, put_fifo, put_socket, put_link, put_dangling_link, put_link_to_directory, put_loop, put_device]


def all_there(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is there, by its number, kind and contents."""
    return {str(each): (each.lstat().st_ino, each.lstat().st_mode, _contents(each)) for each in sorted(path.rglob("*"))}


def _contents(path: Path) -> bytes:
    mode = path.lstat().st_mode
    return path.read_bytes() if stat.S_ISREG(mode) else bytes(path.readlink()) if stat.S_ISLNK(mode) else b""


@pytest.fixture
def outside(tmp_path):
    """A directory that links lead to, and that nobody may touch."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious" * 1000)
    before = all_there(outside)
    yield outside
    assert all_there(outside) == before


def use(path: Path, flag: str) -> dict[str, object]:
    """Do everything that may delete or write a file."""
    db = _ask(lambda: dbm_bitcask.open(path, flag))
    if not isinstance(db, dbm_bitcask.Database):
        return {"open": db}
    acts = {
        "set": lambda: db.__setitem__(b"new", b"value"),
        "get": lambda: db[b"new"],
        "rotate": lambda: db._call(rotate, db),
        "reorganize": db.reorganize,
        "clear": db.clear,
        "set again": lambda: db.__setitem__(b"new", b"again"),
        "get again": lambda: db[b"new"],
        "close": db.close,
    }
    return {name: _ask(act) for name, act in acts.items()}


RIGHT = {"get": b"value", "get again": b"again"}


def misused(answers: dict[str, object]) -> list[str]:
    """What is no error, and not what it should be."""
    return [f"{name}: {answer!r}" for name, answer in answers.items() if not isinstance(answer, Failed) and answer != RIGHT.get(name)]


def complaints_about(irregular, name, flag, copy, small, outside):
    """What is wrong when something irregular has a name, and the database is opened with a flag."""
    copy.put({other: data for other, data in small.files.items() if other != name})
    irregular(copy.path / name, outside)
    alarm()
    look = LOOKS[flag.replace("c", "w")](copy.path, small) if flag != "n" else None
    complaints = [str(each) for each in look.wrong] if look else []
    complaints += [] if flag == "r" else misused(use(copy.path, flag))
    return [f"{irregular.__name__} {flag} {name}: {each}" for each in complaints]


@pytest.mark.parametrize("irregular", IRREGULAR)
def test_what_is_no_regular_file_in_the_place_of_one_is_an_error_or_ignored(small, copy, outside, irregular):
    failures, done = [], 0
    for name in sorted({*small.files, "keydir"}):
        for flag in "rwcn":
            failures += complaints_about(irregular, name, flag, copy, small, outside)
            if irregular is put_directory:
                assert (copy.path / name / "precious").read_bytes() == b"precious"
            done += 1
    report(failures, done)


@pytest.mark.parametrize("irregular", IRREGULAR)
def test_error_about_what_is_no_regular_file_says_so_and_which(tmp_path, outside, irregular):
    irregular(tmp_path / "name", outside)
    alarm()
    for write in (False, True):
        with pytest.raises(dbm_bitcask.error, match="not a regular file") as failure:
            Directory(str(tmp_path)).open("name", write=write)
        assert failure.value.filename == str(tmp_path / "name")


def test_link_to_the_very_file_is_an_error_or_ignored_and_nothing_is_written_through_it(small, copy, tmp_path):
    real = Copy(tmp_path / "real")
    real.put(small.files)
    before, failures, done = all_there(real.path), [], 0
    for name in sorted(small.files):
        for flag in "rwcn":
            copy.put({other: data for other, data in small.files.items() if other != name})
            (copy.path / name).symlink_to(real.path / name)
            alarm()
            complaints = [] if flag == "n" else list(map(str, LOOKS[flag.replace("c", "w")](copy.path, small).wrong))
            complaints += [] if flag == "r" else misused(use(copy.path, flag))
            complaints += ["it was written through"] if all_there(real.path) != before else []
            failures += [f"{flag} {name}: {each}" for each in complaints[:1]]
            done += 1
    report(failures, done)


ARABIC = "".join(chr(0x660 + int(digit)) for digit in "00000001")
WIDE = "".join(chr(0xFF10 + int(digit)) for digit in "12345678")
ODD_NAMES = [
    "1.data", "0000001.data", "00000001.DATA", "00000001.Data", f"{ARABIC}.data", f"{WIDE}.data", "..data", ".data", f"{10**30}.data",
    "00000000.data", "000000001.data", "0000000001.data", "4294967296.data", "9999999999.data", "-0000001.data", "+0000001.data",
    " 00000001.data", "00000001.data ", "00000001.data\n", "00000001.data.bak", "00000001.data~", "00000001", "00000001.", "0x000001.data",
    "1.hint", "00000001.HINT", f"{ARABIC}.hint", "00000000.hint", "4294967296.hint", "00000001.hint.tmp",
    "00000001.data.0123456789abcdef.tmp",
    "MANIFEST.tmp", "MANIFEST.0123456789ABCDEF.tmp", "MANIFEST.0123456789abcde.tmp", "manifest", "MANIFEST ", "keydir.old", "KEYDIR",
    "keydir.tmp", "keydir.0123456789abcdef.tmp2", "lock", ".git", "00000001.data.01234567.damaged",
]  # fmt: skip


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize("foreign", [put_file, put_empty_file, *IRREGULAR])
def test_odd_names_beside_a_store_are_ignored_and_never_deleted(small, copy, outside, foreign, flag):
    copy.put(small.files)
    for name in ODD_NAMES:
        foreign(copy.path / name, outside)
    before = {name: each for name, each in all_there(copy.path).items() if Path(name).name not in small.files}
    alarm()
    look = LOOKS["r" if flag == "r" else "w"](copy.path, small) if flag != "n" else None
    assert look is None or (look.wrong, look.errors) == ([], [])
    if flag != "r":
        answers = use(copy.path, flag)
        assert (misused(answers), [each for each in answers.values() if isinstance(each, Failed)]) == ([], [])
    after = all_there(copy.path)
    assert {name: after.get(name) for name in before} == before


OUR_NAMES = ["00000002.hint", "00000004.hint", "00000004.data", "00000077.data", "00000001.hint", "keydir.0123456789abcdef.tmp"]


@pytest.mark.parametrize("irregular", IRREGULAR)
def test_what_is_no_regular_file_under_a_name_that_could_be_ours_is_an_error_or_ignored(small, copy, outside, irregular):
    failures, done = [], 0
    for name in OUR_NAMES:
        for flag in "rwcn":
            failures += complaints_about(irregular, name, flag, copy, small, outside)
            done += 1
    report(failures, done)


TOOLS = [check, repair, dbm_bitcask.whichdb]


@pytest.mark.parametrize("irregular", IRREGULAR)
def test_tools_go_through_nothing_that_is_no_regular_file(small, copy, outside, irregular):
    failures, done = [], 0
    for name in sorted({*small.files, "keydir", *OUR_NAMES}):
        for tool in TOOLS:
            copy.put({other: data for other, data in small.files.items() if other != name})
            irregular(copy.path / name, outside)
            alarm()
            answer = _ask(lambda tool=tool: tool(copy.path))
            failures += [f"{tool.__name__} {name}: {answer!r}"] if isinstance(answer, Foreign) else []
            done += 1
    report(failures, done)


@pytest.mark.parametrize("irregular", IRREGULAR)
def test_database_is_not_made_of_what_is_no_regular_file(tmp_path, outside, irregular):
    failures, done = [], 0
    for name in ("MANIFEST", "keydir", "00000001.data", "00000001.hint", f"MANIFEST.{'0' * 16}.tmp"):
        for flag in "rwcn":
            path = tmp_path / f"{name} {flag}"
            path.mkdir()
            irregular(path / name, outside)
            alarm()
            answers = use(path, flag)
            failures += [f"{flag} {name}: {each}" for each in misused(answers)]
            done += 1
    report(failures, done)


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize("target", ["nothing", "precious", "empty"])
def test_link_in_the_place_of_the_directory_leads_to_a_directory_or_nowhere(tmp_path, outside, flag, target):
    """To a database it does: see `test_open`."""
    (outside / "empty").touch()
    before = all_there(outside)
    (tmp_path / "link").symlink_to(outside / target)
    with pytest.raises(dbm_bitcask.error):
        dbm_bitcask.open(tmp_path / "link", flag)
    assert all_there(outside) == before
    (outside / "empty").unlink()


# Descriptors.


def use_every_file(path):
    """Everything that opens or makes a file."""
    with dbm_bitcask.open(path, **TINY) as db:
        fill(db)
        fill(db, turn=1)
        db.reorganize()
        (path / "keydir").unlink(missing_ok=True)
        assert everything(path) == dict(db)  # by an index of its own
        db.clear()
    dbm_bitcask.open(path, "n").close()
    assert check(path) == repair(path) == []


def test_files_are_opened_without_following_links_and_made_new(path, monkeypatch):
    opened, open_file = [], os.open

    def spy(name, flags, mode=0o777, *, dir_fd=None):
        opened.append((name, flags, dir_fd is not None))
        return open_file(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", spy)
    use_every_file(path)
    within = [(name, flags) for name, flags, is_within in opened if is_within]
    assert {name for name, _ in within} >= {"MANIFEST", "keydir", "00000001.data"}
    for name, flags in within:
        assert flags & (os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK) == os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, name
        assert bool(flags & os.O_CREAT) == bool(flags & os.O_EXCL), name
        assert not flags & os.O_TRUNC, name
    # By its path nothing is opened but the directory, whose descriptor leads to all others.
    by_path = {str(name) for name, _, is_within in opened if not is_within}
    assert {name for name in by_path if name.startswith(str(path))} == {str(path)}


LIST_DESCRIPTORS = "import glob, os; print([os.path.realpath(fd) for fd in glob.glob('/proc/self/fd/*')])"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_programs_that_are_started_inherit_nothing(path):
    with dbm_bitcask.open(path, **TINY) as db, dbm_bitcask.open(path, "r") as reader:
        fill(db)
        assert dict(reader) == dict(db)
        done = subprocess.run([sys.executable, "-I", "-c", LIST_DESCRIPTORS], close_fds=False, capture_output=True, text=True, check=True)
    assert str(path) not in done.stdout


# Lengths.


def with_number(data, offset, number, size=8):
    return data[:offset] + number.to_bytes(size, "little") + data[offset + size :]


def sealed_keydir(data):
    image = bytearray(data)
    with memoryview(image).cast("Q") as words:
        words[header.SEAL] = header.header_checksum(words)
    return bytes(image)


HUGE = (2**60, 2**63, 2**64 - 1)
FORGED = {
    **{
        f"size of a record in {name}": (name, lambda data: with_number(data, segment.FIRST_RECORD + 8, 2**32 - 8, 4))
        for name in ("00000001.data", "00000003.data")
    },
    "size of a key": ("00000003.data", lambda data: with_number(data, segment.FIRST_RECORD + 12, 2**32 - 1, 4)),
    "number of segments": ("MANIFEST", lambda data: reseal_manifest(with_number(data, 20, 2**32 - 1, 4))),
    **{
        f"word {place} of the manifest {number:x}": (
            "MANIFEST",
            lambda data, place=place, number=number: reseal_manifest(with_number(data, 8 * place, number)),
        )
        for place in (3, 4, 5, 7)  # its number, the next id, the first id, its length
        for number in HUGE
    },
    **{
        f"word {place} of a hint {number:x}": (
            "00000001.hint",
            lambda data, place=place, number=number: reseal_hint(with_number(data, 8 * place, number)),
        )
        for place in (1, 3, 4)  # id, length, number of keys
        for number in HUGE
    },
    "size of a key in a hint": ("00000001.hint", lambda data: reseal_hint(with_number(data, 48, 2**32 - 1, 4))),
    **{
        f"word {place} of the keydir {number:x}": (
            "keydir",
            lambda data, place=place, number=number: sealed_keydir(with_number(data, 8 * place, number)),
        )
        for place in (header.ROOT, header.TABLE, header.PAGES, header.CAPACITY)
        for number in (*HUGE, 40 << 32)
    },
}


def limit_memory(more):
    """Let this process take so many bytes beside what it has, maps of files aside."""
    taken = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + more,) * 2)


def foreign_answers(path, small):
    """What is no right answer and no error, asked in every way."""
    told = {}
    for flag in "rw":
        db = told[flag] = _ask(lambda flag=flag: dbm_bitcask.open(path, flag))
        if isinstance(db, dbm_bitcask.Database):
            told |= {(flag, what): answer for what, answer in ask_all(db, small.keys).items()}
            told["set"] = _ask(lambda db=db: db.__setitem__(b"key 0", b"set"))
            told["merge"] = _ask(lambda db=db: db.reorganize())
            told["close"] = _ask(db.close)
    told |= {tool.__name__: _ask(lambda tool=tool: tool(path)) for tool in TOOLS}
    return [f"{what}: {answer!r}" for what, answer in told.items() if isinstance(answer, Foreign)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that leaves out maps of files")
def test_forged_length_takes_no_memory_although_its_checksum_is_right(small, copy):
    def ask():
        limit_memory(16 * 2**20)
        failures = []
        for name, (file, forge) in FORGED.items():
            if file in small.files:
                copy.put({**small.files, file: forge(small.files[file])})
                alarm()
                failures += [f"{name}: {each}" for each in foreign_answers(copy.path, small)]
        report(failures, len(FORGED))

    fork_and_wait(ask)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that leaves out maps of files")
def test_file_that_somebody_made_huge_takes_no_memory(small, copy):
    def ask():
        limit_memory(16 * 2**20)
        failures = []
        for name in small.files:
            copy.put(small.files)
            # What may be a torn tail is looked through, so that it is not that large.
            os.truncate(copy.path / name, 2**26 if name == small.active else 2**40)
            alarm()
            failures += [f"{name}: {each}" for each in foreign_answers(copy.path, small)]
        report(failures, len(small.files))

    fork_and_wait(ask)


def test_no_record_is_looked_for_where_none_can_be(small, copy):
    copy.put(small.files)
    os.truncate(copy.path / small.active, 2**40)
    file = Directory(str(copy.path)).open(small.active)
    assert file.size() == 2**40
    assert segment.readable_size(file) < 2**32 + 100


def test_gigabytes_of_zeros_behind_the_log_are_passed_over_at_once(path):
    """A power cut may leave a file longer than what was written to it."""
    db = dbm_bitcask.open(path)
    db.update(ITEMS)
    abandon(db)
    os.truncate(active(path), 2**27)
    (path / "keydir").unlink(missing_ok=True)
    alarm(10)  # it was more than a second for 8 MB
    assert everything(path, "r") == everything(path, "w") == ITEMS
    alarm(0)


# Newer formats.


def newer_manifest(data):
    return reseal_manifest(with_number(data, 16, manifest.VERSION + 1, 4))


def newer_segment(data):
    changed = data[:7] + bytes([segment.MARKER[7] + 1]) + data[8:]
    unmoved = changed[:12] + bytes(4) + changed[16:24]
    return changed[:24] + xxh3_64_intdigest(unmoved).to_bytes(8, "little") + changed[32:]


def read_all(path, flag):
    with dbm_bitcask.open(path, flag) as db:
        return dict(db)


@pytest.mark.parametrize(
    ("name", "make_newer", "flags"),
    [
        ("MANIFEST", newer_manifest, "rwcn"),
        ("00000001.data", newer_segment, "rwc"),  # which flag n does not look at
        ("00000003.data", newer_segment, "rwcn"),
    ],
)
def test_newer_format_is_refused_and_nothing_is_touched(small, copy, name, make_newer, flags):
    copy.put({**small.files, name: make_newer(small.files[name])})
    before = freeze(copy.path)
    for flag in flags:
        with pytest.raises(dbm_bitcask.error, match="version"):
            read_all(copy.path, flag)
    with pytest.raises(dbm_bitcask.error, match="version"):
        repair(copy.path)
    assert isinstance(_ask(lambda: check(copy.path)), list | Failed)
    assert {name: data for name, data in freeze(copy.path).items() if name != "keydir"} == {
        name: data for name, data in before.items() if name != "keydir"
    }


@pytest.mark.parametrize("name", ["00000001.hint", "keydir"])
def test_newer_format_of_what_is_only_derived_is_not_used(small, copy, name):
    data = small.files.get(name)
    if data is None:
        pytest.skip("it is not there")
    place = 7 if name.endswith("hint") else 6
    newer = data[:place] + bytes([data[place] + 1]) + data[place + 1 :]
    copy.put({**small.files, name: reseal_hint(newer) if name.endswith("hint") else sealed_keydir(newer)})
    before = freeze(copy.path)
    assert read_all(copy.path, "r") == small.items
    assert freeze(copy.path) == before
    assert read_all(copy.path, "w") == small.items


def test_record_of_a_later_format_is_never_taken_for_one_of_this(path):
    """It does not come without a newer manifest; if it does, its value is not handed out."""
    with dbm_bitcask.open(path) as db:
        db.update(ITEMS)
        place = db._log.find(b"key 3") & 0xFFFFFFFF
        rotate(db)
    file = path / "00000001.data"
    good = file.read_bytes()
    data = with_number(good, place + 18, 0x100, 2)
    end = place + 8 + int.from_bytes(good[place + 8 : place + 12], "little")
    checksum = xxh3_64_intdigest(data[place + 8 : end], int.from_bytes(good[16:24], "little") ^ place)
    file.write_bytes(with_number(data, place, checksum))
    for flag in "rw":
        with dbm_bitcask.open(path, flag) as db:
            with pytest.raises(dbm_bitcask.CorruptionError):
                db[b"key 3"]
            if flag == "w":
                db.reorganize()
    assert file.exists()
    file.write_bytes(good)


# Chosen keys.


def test_keys_that_collide_in_one_index_do_not_in_another(path):
    """The hash has a seed that nobody knows; with a known one every operation on such keys takes longer and longer."""
    with dbm_bitcask.open(path) as db:
        seed = db._log.keydir.words[header.SEED]
        keys = [key for key in (b"%d" % number for number in range(20_000)) if key_hash(key, seed) >> 58 == 0]
        db.update(dict.fromkeys(keys, b""))
    seeds = {seed}
    for _ in range(4):
        lose_index(path)
        with dbm_bitcask.open(path, "w") as db:
            assert len(db) == len(keys) > 200
            seeds.add(seed := db._log.keydir.words[header.SEED])
            assert sum(key_hash(key, seed) >> 58 == 0 for key in keys) < len(keys) / 8
    assert len(seeds) == 5


# Flag n.


def test_new_database_in_the_place_of_an_old_one_is_there_or_it_is_not(path, tmp_path, monkeypatch):
    """Whenever it is killed: never a half of either."""
    with dbm_bitcask.open(path, **TINY) as db:
        fill(db, 20)
        expected = dict(db)
    frozen, machine, seen = freeze(path), Machine(), []
    machine.install(monkeypatch)
    for step in itertools.count(1):
        place = thaw(frozen, tmp_path / str(step))
        opened = []
        died = machine.run(lambda place=place, opened=opened: opened.append(dbm_bitcask.open(place, "n")), step, killed=True)
        for db in opened:
            abandon(db)
        found = everything(place, "r")
        assert everything(place, "w") == found
        assert found in ({}, expected)
        seen.append(bool(found))
        assert check(place) == []
        shutil.rmtree(place)
        if not died:
            break
    assert seen == sorted(seen, reverse=True)
    assert {True, False} == set(seen)
