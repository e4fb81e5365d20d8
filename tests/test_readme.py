"""README tells the truth: its examples run, in the order in which they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import dbm_bitcask

README = Path(__file__).parent.parent / "README.md"


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(dbm_bitcask.__file__).parent.parent))  # for the process that an example starts
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, README.name, "exec"), namespace)
    printed = capsys.readouterr().out
    for said in (
        "1815",
        "dbm_bitcask\n",
        """b'{"size": [800, 600], "title": null}' [800, 600]""",
        "['number 0', 'number 1', 'number 2', 'number 3', 'number 4', 'number 5']",
        "1 image of 1000000 bytes, shared by 100 pages",
        "23416728348467685 81 results",
        "[b'frost', b'ice', b'snow']",
        "neige!",
    ):
        assert said in printed
