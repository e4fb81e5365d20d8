"""`compat/peers_suites` reports what is not as it is listed. The suites themselves are fetched by `tox -e peers-suites`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "compat" / "peers_suites"


@pytest.fixture
def suites(monkeypatch):
    spec = importlib.util.spec_from_file_location("peers_suites", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("found", "listed", "status", "said"),
    [
        ({"zict a": "passed", "zict b": "skipped"}, {}, 0, "2 tests: 1 passed, 0 differ"),
        ({"zict a": "passed", "zict b": "an error"}, {"zict b": "a reason"}, 0, "1 passed, 1 differ\n    differs: zict b: a reason"),
        ({"zict a": "passed", "zict b": "an error"}, {}, 1, "ERROR: zict b fails and is not listed:\nan error"),
        ({"zict a": "passed"}, {"zict a": "a reason"}, 1, "ERROR: zict a is listed and does not fail"),
        ({"zict a": "passed"}, {"zict gone": "a reason"}, 1, "ERROR: zict gone is listed and does not fail"),
        ({"zict a": "passed"}, {"diskcache b": "a reason"}, 0, "1 passed"),
        ({}, {}, 1, "0 tests"),
    ],
)
def test_what_is_not_as_listed_is_an_error(suites, capsys, found, listed, status, said):
    assert suites.report(suites.SUITES["zict"], found, listed) == status
    assert said in capsys.readouterr().out


def test_every_difference_has_a_reason_and_a_suite(suites, tmp_path):
    listed = suites.differences(suites.DIFFERENCES)
    assert {name.split()[0] for name in listed} == set(suites.SUITES)
    (tmp_path / "listed").write_text("zict test\n")
    with pytest.raises(ValueError, match="suite test: reason"):
        suites.differences(tmp_path / "listed")
