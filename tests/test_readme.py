"""README tells the truth: its examples run, in the order in which they stand there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, README.name, "exec"), namespace)
    assert "1815" in capsys.readouterr().out
