"""README tells the truth: its examples run, in the order in which they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dbm_bitcask

README = Path(__file__).parent.parent / "README.md"


def examples():
    found = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(dbm_bitcask.__file__).parent.parent))  # for the process that an example starts
    namespace: dict[str, object] = {}
    for example in examples():
        exec(compile(example, README.name, "exec"), namespace)
    printed = capsys.readouterr().out
    for said in (
        "1815",
        "dbm_bitcask\n",
        """b'{"size": [800, 600], "title": null}' [800, 600]""",
        "['number 0', 'number 1', 'number 2', 'number 3', 'number 4', 'number 5']",
        "1 image of 1000000 bytes, shared by 100 pages",
        "23416728348467685 49 9 343 9 84 results",
        "[b'frost', b'ice', b'snow']",
        "neige!",
        "b'ada' 1800 seconds left\nNone\n",
        "31000 bytes; less than 1000 on the disk: True",
        "b'Many happy returns of the day.'",
        "True of 50 MB that were written",
        "True after all at once",
        "b'50'",
    ):
        assert said in printed


def test_cached_function_keeps_functions_and_arguments_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"dbm_bitcask": dbm_bitcask}
    exec(next(example for example in examples() if "def cached_in" in example), namespace)
    remembered: dict[str, object] = {}

    def function_of(module, result):
        def function(*args, **kwargs):
            return result, args, kwargs

        function.__module__ = module
        return namespace["cached_in"](remembered)(function)

    one, other = function_of("one", 1), function_of("other", 2)
    for _ in range(2):
        assert one(1) == (1, (1,), {})
        assert other(1) == (2, (1,), {})
        assert one("1") == (1, ("1",), {})
        assert one(1, key=2) == (1, (1,), {"key": 2})
        assert one(a=1, b=2) == one(b=2, a=1) == (1, (), {"a": 1, "b": 2})
        assert one(("a", 1)) == (1, (("a", 1),), {})
    assert len(remembered) == 6
