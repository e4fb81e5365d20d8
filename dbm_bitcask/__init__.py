"""A persistent dict: as large as the disk, behind the interface of the standard library's dbm and shelve.

>>> import dbm_bitcask, tempfile, os
>>> path = os.path.join(tempfile.mkdtemp(), "example")
>>> with dbm_bitcask.open(path) as db:
...     db["key"] = "value"
...     db[b"key"]
b'value'
>>> with dbm_bitcask.open_shelf(path) as shelf:
...     shelf["numbers"] = [1, 2, 3]
...     shelf["numbers"]
[1, 2, 3]
"""

from .database import Database, open, whichdb
from .engine.errors import CorruptionError, LockTimeout, error
from .registration import register, registered, unregister
from .shelf import Shelf, open_shelf

__all__ = [
    "CorruptionError",
    "Database",
    "LockTimeout",
    "Shelf",
    "error",
    "open",
    "open_shelf",
    "register",
    "registered",
    "unregister",
    "whichdb",
]
