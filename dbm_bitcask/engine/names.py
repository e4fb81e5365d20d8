"""The names of the files of a database: made and parsed here, and nowhere else.

Names that are not exactly ours belong to somebody else: they are ignored and never deleted.
"""

from __future__ import annotations

import re
import secrets

__all__ = [
    "KEYDIR",
    "LOCK",
    "MANIFEST",
    "damaged_name",
    "hint_name",
    "is_temporary",
    "parse_segment",
    "segment_name",
    "temporary_name",
    "parse_hint",
]

MANIFEST = "MANIFEST"
KEYDIR = "keydir"
LOCK = "lock"  # where a directory cannot be locked itself: never deleted, or two would lock two files

_SEGMENT = re.compile(r"([0-9]{8}|[1-9][0-9]{8,9})\.(data|hint)", re.ASCII)
_TEMPORARY = re.compile(r"(MANIFEST|keydir|[0-9]{8,10}\.hint)\.[0-9a-f]{16}\.tmp", re.ASCII)


def segment_name(segment: int) -> str:
    """The file name of a segment.

    >>> segment_name(7)
    '00000007.data'
    """
    return f"{segment:08d}.data"


def hint_name(segment: int) -> str:
    """The file name of a segment's hint."""
    return f"{segment:08d}.hint"


def parse_segment(name: str) -> int | None:
    """The id of the segment whose file has this name, or None.

    >>> parse_segment("00000007.data"), parse_segment("7.data"), parse_segment("00000000.data")
    (7, None, None)
    """
    return _parse(name, "data")


def parse_hint(name: str) -> int | None:
    """The id of the segment whose hint has this name, or None."""
    return _parse(name, "hint")


def temporary_name(name: str) -> str:
    """A fresh name to write a file under before it takes its place as `name`."""
    return f"{name}.{secrets.token_hex(8)}.tmp"


def damaged_name(name: str) -> str:
    """A fresh name for a file that `repair` sets aside: it is nobody's from then on."""
    return f"{name}.{secrets.token_hex(4)}.damaged"


def is_temporary(name: str) -> bool:
    """Whether this is a name that `temporary_name` makes: what a killed process may have left behind."""
    return _TEMPORARY.fullmatch(name) is not None


def _parse(name: str, suffix: str) -> int | None:
    match = _SEGMENT.fullmatch(name)
    if match is None or match[2] != suffix:
        return None
    number = int(match[1])
    return number if 0 < number < 2**32 else None
