"""Compression: the value of a record made smaller, and made of that again. No I/O here.

    value of a record flagged ZLIB := one zlib stream, and nothing behind it
    value of a record flagged ZSTD := one Zstandard frame without a dictionary, and nothing behind it

Values are compressed one by one, so that each can be read by itself; small ones have too little in them that is repeated, and are stored
as they are, as is whatever does not get an eighth smaller: reading it would take longer for nothing. The flags tell a reader what to do,
so that it needs no option, and a database may hold values of all three kinds.

The levels are the fast ones: zlib's 1 is five times as fast as its 6 on large texts and takes a fifth more space; zstd's 3 takes less
space than that, and half the time of zlib's 1 (`python -m compat.figures.compression`).
"""

from __future__ import annotations

import sys
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import error
from .record import ZLIB, ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["COMPRESSED", "SMALLEST", "BadValue", "packer", "unpack"]

COMPRESSED = ZLIB | ZSTD
SMALLEST = 256  # bytes of a value that is compressed
_WORTH = 8  # a value is stored compressed if that saves this part of it
_ZLIB_LEVEL = 1
_ZSTD_LEVEL = 3


class BadValue(Exception):
    """The bytes are no compressed value, or one of more bytes than it may have."""


def packer(name: str | None) -> Callable[[bytes], tuple[int, bytes]]:
    """A function that makes of a value the flags and the bytes to be stored, for "zlib", "zstd" or None.

    `error` if there is no module for it.
    """
    if name is None:
        return _as_it_is
    if name == "zlib":
        return partial(_smaller, ZLIB, partial(zlib.compress, level=_ZLIB_LEVEL))
    return partial(_smaller, ZSTD, partial(_zstd().compress, level=_ZSTD_LEVEL))


def _as_it_is(value: bytes) -> tuple[int, bytes]:
    return 0, value


def _smaller(flag: int, compress: Callable[[bytes], bytes], value: bytes) -> tuple[int, bytes]:
    size = len(value)
    if size < SMALLEST:
        return 0, value
    packed = compress(value)
    return (flag, packed) if len(packed) <= size - size // _WORTH else (0, value)


def unpack(flags: int, data: Buffer, limit: int) -> bytes:
    """The value that was compressed; `BadValue` if the bytes are none, or one of more than `limit` bytes, of which no more are made.

    `error` if there is no module for it.
    """
    if flags & COMPRESSED == ZLIB:
        decompressor, failures = zlib.decompressobj(), zlib.error
    elif flags & COMPRESSED == ZSTD:
        zstd = _zstd()
        decompressor, failures = zstd.ZstdDecompressor(), zstd.ZstdError
    else:
        raise BadValue
    try:
        value: bytes = decompressor.decompress(data, limit + 1)
    except failures as bad:
        raise BadValue from bad
    if len(value) > limit or not decompressor.eof or decompressor.unused_data:
        raise BadValue
    return value


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            import compression.zstd as zstd
        else:
            import backports.zstd as zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise error("there is no module for zstd before Python 3.14: install dbm-bitcask[zstd], or backports.zstd") from None
    return zstd
