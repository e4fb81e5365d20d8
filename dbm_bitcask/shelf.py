"""Shelf: `shelve.Shelf` over a database of ours, with what the latest Python has on every version."""

from __future__ import annotations

import pickle
import shelve
from collections.abc import ItemsView, Iterator, ValuesView
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .database import Database, open

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping
    from typing import SupportsIndex

    from typing_extensions import Buffer

    from .database import Flag, Path

__all__ = ["Shelf", "open_shelf"]

_MISSING: Any = object()


class _MissingArgument(TypeError, getattr(shelve, "ShelveError", Exception)):  # type: ignore[misc]
    """One of `serializer` and `deserializer` without the other: a TypeError, and from Python 3.15 on a `shelve.ShelveError`, too."""


class Shelf(shelve.Shelf[Any]):
    """A `shelve.Shelf` over a database of ours, as `open_shelf` opens it; over another mapping it does what `shelve.Shelf` does.

    Keys are str, values any objects. `serializer(value, protocol)` returns the bytes of a value, as bytes, bytearray or str, and
    `deserializer(data)` makes the value of the bytes again; both or neither are given. Without them values are pickled: whoever can write
    the database can run code in the process that reads it.

    A walk over all values reads the database once, in the order of its log. `protocol`, `writeback` and `keyencoding` are those of
    `shelve.Shelf`, and so is what happens with `writeback`: each value that was read is kept in memory, and written by `sync` and `close`,
    all or nothing if it fits a batch of the database.
    A `sync` that fails can be called again. What a subclass does in `__getitem__` is not asked by `get`, `items`, `values` and `pop`.
    """

    dict: Database  # whatever else it was made over
    cache: MutableMapping[str, Any]
    keyencoding: str
    writeback: bool
    _protocol: int

    def __init__(
        self,
        dict: MutableMapping[bytes, bytes],
        protocol: int | None = None,
        writeback: bool = False,
        keyencoding: str = "utf-8",
        *,
        serializer: Callable[[Any, int], Buffer | str] | None = None,
        deserializer: Callable[[bytes], Any] | None = None,
    ) -> None:
        if (serializer is None) != (deserializer is None):
            raise _MissingArgument("serializer and deserializer must be given together")
        super().__init__(dict, pickle.DEFAULT_PROTOCOL if protocol is None else protocol, writeback, keyencoding)
        self.serializer: Callable[[Any, int], Any] = pickle.dumps if serializer is None else serializer
        self.deserializer: Callable[[bytes], Any] = pickle.loads if deserializer is None else deserializer

    def __getitem__(self, key: str) -> Any:
        """The value of a key; KeyError if it is not there."""
        try:
            return self.cache[key]
        except KeyError:
            return self._loaded(key, self.dict[key.encode(self.keyencoding)])

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a key. TypeError if the serializer returns neither a bytes-like object nor a str; nothing has changed then."""
        self.dict[key.encode(self.keyencoding)] = self._dumped(value)
        if self.writeback:
            self.cache[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` if it is not there: one look into the database."""
        if not self._ours:
            return super().get(key, default)
        if key in self.cache:
            return self.cache[key]
        data = self.dict.get(key.encode(self.keyencoding))
        return default if data is None else self._loaded(key, data)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is set to `default` if it is not there; nobody else's value is overwritten."""
        if not self._ours:
            return super().setdefault(key, default)
        if key in self:
            with suppress(KeyError):  # deleted meanwhile
                return self[key]
        data = self._dumped(default)
        found = self.dict.setdefault(key.encode(self.keyencoding), data)
        if found != data:
            return self._loaded(key, found)
        if self.writeback:
            self.cache[key] = default
        return default

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Delete a key and return its value; `default`, or a KeyError, if it is not there. What cannot be deserialized stays."""
        if not self._ours:
            return super().pop(key) if default is _MISSING else super().pop(key, default)
        stored = key.encode(self.keyencoding)
        data = self.dict.pop(stored, None)
        if data is None:
            self.cache.pop(key, None)
            if default is _MISSING:
                raise KeyError(key)
            return default
        return self._taken(key, stored, data)

    def __iter__(self) -> Iterator[str]:
        """The keys, without a list of them."""
        keys = self.dict if self._ours else self.dict.keys()
        return (key.decode(self.keyencoding) for key in keys)

    def items(self) -> ItemsView[str, Any]:
        """A view of the keys with their values."""
        return _Items(self) if self._ours else super().items()

    def values(self) -> ValuesView[Any]:
        """A view of the values."""
        return _Values(self) if self._ours else super().values()

    def popitem(self) -> tuple[str, Any]:
        """Delete some key and return it with its value; KeyError if there is none. What cannot be deserialized stays."""
        if not self._ours:
            return super().popitem()
        stored, data = self.dict.popitem()
        key = stored.decode(self.keyencoding, "replace")
        return key, self._taken(key, stored, data)

    def _taken(self, key: str, stored: bytes, data: bytes) -> Any:
        """The value of an entry that was deleted; if it cannot be read, the entry is put back."""
        try:
            stored.decode(self.keyencoding)
            value = self.cache[key] if key in self.cache else self.deserializer(data)
        except BaseException:
            self.dict.setdefault(stored, data)
            raise
        self.cache.pop(key, None)
        return value

    def clear(self) -> None:
        """Delete every key. O(1)."""
        if self._ours:
            self.dict.clear()
            self.cache.clear()
        else:
            super().clear()

    def sync(self) -> None:
        """Write what `writeback` keeps, and make everything durable. If it fails, a later call tries all of it again."""
        writeback = self.writeback
        try:
            if self._ours and type(self).__setitem__ is Shelf.__setitem__:  # else a subclass wants to see each value
                self._write_back()
            super().sync()
        finally:
            self.writeback = writeback  # which the standard library forgets then

    def _write_back(self) -> None:
        """Write what is kept, as one batch if it fits one, and keep it no more."""
        self.dict._outside_of_a_batch("sync")
        if self.writeback and self.cache:
            cache = self.cache
            self.dict._write_back((key.encode(self.keyencoding), self._dumped(value)) for key, value in cache.items())
            self.cache = {}

    def close(self) -> None:
        """`sync`, and close the database, also if that fails. A second call does nothing."""
        ours, database = self._ours, self.dict
        try:
            super().close()
        finally:
            self.cache = {}
            if ours:
                database.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle as a shelf over the database, opened again. TypeError with `writeback`: two would overwrite what the other has kept."""
        if self.writeback:
            raise TypeError("a shelf with writeback cannot be copied or pickled: open it a second time")
        return super().__reduce_ex__(protocol)

    def reorganize(self) -> None:
        """Write what `writeback` keeps, make it durable, and give back the space of what was overwritten and deleted."""
        len(self.dict)  # a ValueError if the shelf is closed
        self.sync()
        reorganize = getattr(self.dict, "reorganize", None)
        if reorganize is not None:
            reorganize()

    @property
    def _ours(self) -> bool:
        """Whether there is more to be had than a mapping promises."""
        return isinstance(self.dict, Database)

    def _dumped(self, value: Any) -> bytes:
        data = self.serializer(value, self._protocol)
        if isinstance(data, str):
            return data.encode()
        try:
            return data if type(data) is bytes else memoryview(data).tobytes()
        except TypeError:
            raise TypeError(f"values must be bytes or strings, and the serializer returned {type(data).__name__}") from None

    def _loaded(self, key: str, data: bytes) -> Any:
        value = self.deserializer(data)
        if self.writeback:
            self.cache[key] = value
        return value


class _Items(ItemsView[str, Any]):
    _mapping: Shelf

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        shelf = self._mapping
        for stored, data in shelf.dict.items():
            key = stored.decode(shelf.keyencoding)
            yield key, shelf.cache[key] if key in shelf.cache else shelf._loaded(key, data)


class _Values(ValuesView[Any]):
    _mapping: Shelf

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping.items())


def open_shelf(
    file: Path,
    flag: Flag = "c",
    protocol: int | None = None,
    writeback: bool = False,
    *,
    keyencoding: str = "utf-8",
    serializer: Callable[[Any, int], Buffer | str] | None = None,
    deserializer: Callable[[bytes], Any] | None = None,
    **options: Any,
) -> Shelf:
    """Open the database at `file` as a shelf: str keys, and values of any type that can be serialized, by default pickled.

    `protocol`, `writeback`, `keyencoding`, `serializer` and `deserializer` are those of `Shelf`; everything else is for
    `dbm_bitcask.open`.

    >>> import dbm_bitcask, json, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "example")
    >>> with dbm_bitcask.open_shelf(path, serializer=lambda value, protocol: json.dumps(value), deserializer=json.loads) as shelf:
    ...     shelf["numbers"] = [1, 2, 3]
    ...     shelf["numbers"], shelf.dict[b"numbers"]
    ([1, 2, 3], b'[1, 2, 3]')
    """
    if (serializer is None) != (deserializer is None):  # before a database is created, or emptied, for nothing
        raise _MissingArgument("serializer and deserializer must be given together")
    database: Database = open(file, flag, **options)
    return Shelf(database, protocol, writeback, keyencoding, serializer=serializer, deserializer=deserializer)
