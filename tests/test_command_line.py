"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import pytest

import dbm_bitcask
from dbm_bitcask.__main__ import main


@pytest.fixture
def run(capsys):
    def run(*argv):
        status = main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def damaged(tmp_path):
    path = tmp_path / "db"
    with dbm_bitcask.open(path, segment_size=4096) as db:
        for number in range(100):
            db[b"%d" % number] = b"v" * 100
    with (path / "00000002.data").open("r+b") as file:
        file.seek(300)
        file.write(b"damage")
    return path


def test_check_and_repair_of_a_whole_database(run, tmp_path):
    with dbm_bitcask.open(tmp_path / "db") as db:
        db[b"key"] = b"value"
    assert run("check", tmp_path / "db") == (0, f"{tmp_path / 'db'}: no problem found\n", "")
    assert run("repair", tmp_path / "db") == (0, f"{tmp_path / 'db'}: there was nothing to repair\n", "")


def test_check_says_file_and_offset_of_damage_and_has_status_1(run, damaged):
    status, out, err = run("check", damaged)
    assert (status, err) == (1, "")
    assert f"{damaged / '00000002.data'} at offset 288: 128 bytes are no record" in out


def test_repair_says_what_it_did_and_leaves_nothing_to_repair(run, damaged):
    status, out, _ = run("repair", damaged)
    assert status == 0
    assert "key b'33' is lost" in out
    assert run("check", damaged)[0] == 0
    with dbm_bitcask.open(damaged, "r") as db:
        assert len(db) == 99


@pytest.mark.parametrize("command", ["check", "repair"])
def test_what_is_no_database_is_one_line_on_stderr(run, tmp_path, command):
    status, out, err = run(command, tmp_path / "nothing")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "no database here" in err


@pytest.mark.parametrize("argv", [[], ["check"], ["repair"], ["no such command"], ["check", "a", "b"]])
def test_wrong_usage_has_status_2(run, argv, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
