"""Registration: `dbm.open`, `shelve.open` and `dbm.whichdb` know our databases as long as somebody in this process asks for it.

The standard library has no place where a dbm module could announce itself, so two functions of `dbm` are replaced:

1. `whichdb` answers "dbm_bitcask" for a database of ours, and for everything else what it would answer without us.
2. `open` gives what is ours to us; with `default` also what is to be created where nobody's file stands. The rest goes to the `open` that
   was there before.

Our name in `dbm._modules` is for those who took `dbm.open` out of `dbm` before. Nothing else of `dbm` changes: to set its `_defaultmod`
early, for one, would keep it from ever loading its own modules.

Somebody else may have replaced the same functions after us. What they put there is left alone, and ours below does nothing from then on.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .database import open as open_database
from .database import whichdb as recognize
from .engine.store import may_be_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .database import Path

__all__ = ["register", "registered", "unregister"]

_NAME = "dbm_bitcask"
_NOBODYS = (None, "")  # what `whichdb` answers where nothing can be opened, and for a file that no module knows

_lock = threading.RLock()
_for_good: bool | None = None  # the `default` of `register`; None before it is called and after `unregister`
_blocks: list[bool] = []  # the `default` of each `with registered()` that has begun
_patches: list[_Patch] = []
_active = False
_default = False


def register(default: bool = False) -> None:
    """Let `dbm.open`, `shelve.open` and `dbm.whichdb` recognise our databases, in this process, until `unregister`.

    With `default`, what they create is ours, too: with flag "c" where there is nothing, with "n" also in place of an empty regular file. A
    file of another dbm module keeps being opened as without us, whatever the flag. A database of ours stays ours with "n".

    A second call only replaces `default`. Importing dbm_bitcask never registers it. Who did `from dbm import open` before finds databases
    of ours with it, but creates none.

    >>> import dbm, dbm_bitcask, os, shelve, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "example")
    >>> dbm_bitcask.register(default=True)
    >>> with shelve.open(path) as shelf:
    ...     shelf["numbers"] = [1, 2, 3]
    >>> dbm.whichdb(path)
    'dbm_bitcask'
    >>> dbm_bitcask.unregister()
    >>> dbm.whichdb(path) is None
    True
    """
    global _for_good
    with _lock:
        _for_good = bool(default)
        _settle()


def unregister() -> None:
    """Undo `register`; does nothing without it. A `with registered()` that has begun keeps its effect to its end."""
    global _for_good
    with _lock:
        _for_good = None
        _settle()


@contextmanager
def registered(default: bool = False) -> Iterator[None]:
    """`register` for a `with` block.

    Blocks may be nested, and overlap in several threads: databases are recognised while one of them lasts or `register` is in effect, and
    created as ours while one of those has `default`.
    """
    try:
        with _lock:
            _blocks.append(bool(default))
            _settle()
        yield
    finally:
        with _lock:
            _blocks.remove(bool(default))
            _settle()


def _settle() -> None:
    """Make `dbm` what is asked for at present."""
    global _active, _default
    import dbm  # by whoever registers, and not by everybody who imports us; and anew: it may have been imported afresh since

    asked = [*_blocks, *([] if _for_good is None else [_for_good])]
    _active, _default = bool(asked), any(asked)
    if not _active:
        while _patches:
            _patches.pop().undo()
    elif not any(patch.is_on(dbm) for patch in _patches):
        _patches.append(_Patch(dbm))


class _Patch:
    """The two functions of one `dbm` module, and those in whose place they are."""

    def __init__(self, dbm: Any) -> None:
        self.dbm = dbm
        self.former_open, self.former_whichdb = dbm.open, dbm.whichdb
        self.open, self.whichdb = _make_open(dbm, dbm.open), _make_whichdb(dbm.whichdb)
        dbm._modules.setdefault(_NAME, sys.modules[__package__])  # first: if a later version has none, nothing is replaced
        dbm.open, dbm.whichdb = self.open, self.whichdb

    def is_on(self, dbm: Any) -> bool:
        return bool(dbm.open is self.open and dbm.whichdb is self.whichdb)

    def undo(self) -> None:
        if self.dbm.open is self.open:
            self.dbm.open = self.former_open
        if self.dbm.whichdb is self.whichdb:
            self.dbm.whichdb = self.former_whichdb
        self.dbm._modules.pop(_NAME, None)


def _make_open(dbm: Any, former: Any) -> Any:
    @functools.wraps(former)
    def open(file: Path, flag: Any = "r", mode: int = 0o666, **others: Any) -> Any:
        if _active and not others:  # a keyword of a later version is not for us
            if recognize(file) or (dbm.whichdb(file) is None and _may_be_ours(file)):
                return open_database(file, flag, mode)
            if _default and (("n" in flag and dbm.whichdb(file) in _NOBODYS) or ("c" in flag and dbm.whichdb(file) is None)):
                return open_database(file, flag, mode)
        return former(file, flag, mode, **others)

    return open


def _may_be_ours(file: Path) -> bool:
    """Whether it could be a database of ours that is damaged or may not be read: our error is better than an empty one beside it."""
    try:
        return may_be_database(os.fsdecode(file))
    except (TypeError, ValueError):  # no path: for the standard library to say
        return False


def _make_whichdb(former: Any) -> Any:
    @functools.wraps(former)
    def whichdb(filename: Path) -> Any:
        return (recognize(filename) if _active else None) or former(filename)

    return whichdb
