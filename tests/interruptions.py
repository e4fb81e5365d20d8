"""An exception at the n-th instruction, or line, that an operation executes in the package: as a signal handler or a full memory raises it.

Left out are the instructions that hold a promise and cannot fail: those of a `with` that leaves its block, and those of a `finally`. An
exception of a signal handler is raised at the end of a call or as a function is entered: so within what these call, but not between.
Of a loop that goes on for long, the first turns are enough.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import dbm_bitcask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, FrameType

PACKAGE = Path(dbm_bitcask.__file__).parent
FOLLOWED = (str(PACKAGE / "engine"), str(PACKAGE / "database.py"), str(PACKAGE / "batch.py"), contextlib.__file__)


class Interruption:
    """Raises an exception at one step of an operation; a step is an "opcode" or a "line", and of each the first turns count."""

    def __init__(self, step: str, turns: int = 2) -> None:
        self.step, self.turns = step, turns
        self.where: tuple[str, int] | None = None
        self._passed = self._raise_at = 0
        self._seen: Counter[tuple[CodeType, int]] = Counter()
        self._exception: type[BaseException] = KeyboardInterrupt

    def run(self, action: Callable[[], object], number: int, exceptions: Sequence[type[BaseException]]) -> bool:
        """Whether `action()` has so many steps; it is interrupted at this one, by one of the exceptions or another."""
        self.where, self._passed, self._raise_at = None, 0, number
        self._exception = exception = exceptions[number % len(exceptions)]
        self._seen.clear()
        before, sys.unraisablehook = sys.unraisablehook, lambda _: None  # raised within a finalizer, it goes nowhere
        tracing = sys.gettrace()
        gc.disable()  # CPython 3.11 crashes in a collection while a trace function is called
        sys._getframe().f_trace_opcodes = self.step == "opcode"  # from CPython 3.12 on it has to be known before
        sys.settrace(self._enter)
        try:
            action()
        except exception:
            if self.where is None:
                raise
        finally:
            sys.settrace(tracing)
            gc.enable()
            sys.unraisablehook = before
        return self.where is not None

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Callable[..., object] | None:
        if not frame.f_code.co_filename.startswith(FOLLOWED):
            return None
        frame.f_trace = self._pass  # from CPython 3.13 on it has to be there before the next line
        frame.f_trace_opcodes = self.step == "opcode"
        return self._pass

    def _pass(self, frame: FrameType, event: str, _argument: object) -> Callable[..., object]:
        if event == self.step and frame.f_lineno not in promised_lines(frame.f_code):
            place = frame.f_code, frame.f_lasti
            self._seen[place] += 1
            self._passed += self._seen[place] <= self.turns
            if self._passed == self._raise_at and self.where is None:
                self.where = frame.f_code.co_filename, frame.f_lineno
                raise self._exception
        return self._pass


@cache
def promised_lines(code: CodeType) -> frozenset[int]:
    """The lines of `with`, `try` and what stands under `finally` in the file of a function."""
    lines = set()
    for node in ast.walk(_parsed(code.co_filename)):
        if isinstance(node, ast.With | ast.Try):
            lines.add(node.lineno)
        for statement in getattr(node, "finalbody", ()):
            lines.update(range(statement.lineno, statement.end_lineno + 1))
    return frozenset(lines)


@cache
def _parsed(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))
