"""What the package raises on its own account.

    OSError
     └── error                    every failure of a database
          ├── NotFoundError       no database there (also a FileNotFoundError)
          ├── FlagError           a flag that does not exist (also a ValueError)
          ├── LockTimeout         another process kept the writer lock for too long (also a TimeoutError)
          └── CorruptionError     bytes that do not verify; `path` and `offset` tell which

`KeyError`, `TypeError` and `ValueError` keep the meaning that they have for a mapping.
"""

from __future__ import annotations

import os

__all__ = ["CLOSED", "CorruptionError", "FlagError", "LockTimeout", "NotFoundError", "as_error", "error"]


CLOSED = "DBM object has already been closed"  # as the standard library words it


class error(OSError):  # noqa: N801  (the name that every dbm module gives it)
    """A failure of the database: of the file system under it, of its files, or of how it is used."""


class NotFoundError(error, FileNotFoundError):
    """There is no database at the path."""


class FlagError(error, ValueError):
    """The flag is none of those that `open` knows."""


class LockTimeout(error, TimeoutError):
    """The writer lock was not free within the `timeout` that `open` was given. Nothing has changed."""


class CorruptionError(error):
    """Bytes in a file of the database do not verify.

    `path` is the file, `offset` the byte position in it (None where the file as a whole is meant).
    """

    def __init__(self, path: str, offset: int | None, reason: str) -> None:
        where = path if offset is None else f"{path} at offset {offset}"
        super().__init__(f"{where}: {reason}")
        self.path = path
        self.offset = offset
        self.reason = reason

    def __reduce__(self) -> tuple[type[CorruptionError], tuple[str, int | None, str]]:
        return type(self), (self.path, self.offset, self.reason)


def as_error(failure: OSError, path: str) -> error:
    """A failure of the operating system as one of ours. Ours are left alone: raised from itself, an error would be a cycle."""
    name = path
    if isinstance(failure.filename, str):  # the files of a database are opened by the descriptor of their directory
        name = os.path.join(path, failure.filename)
    return error(failure.errno, failure.strerror or str(failure), name)
