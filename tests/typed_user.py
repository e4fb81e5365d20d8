"""Code of a user, for type checkers: mypy --strict and pyright find nothing in it, and need no cast; each `ignore` is one that they miss.

It is checked by `tox -e types`, and never run.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import json
import shelve
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, assert_type

import dbm_bitcask


def open_in_every_way(path: Path) -> None:
    assert_type(dbm_bitcask.open(path), dbm_bitcask.Database)
    dbm_bitcask.open(str(path), "cf").close()
    dbm_bitcask.open(bytes(path), "wsu", 0o600).close()
    dbm_bitcask.open(path, sync="always", timeout=1.5, segment_size=4096).close()
    dbm_bitcask.open(path, sync=10).close()
    dbm_bitcask.open(path, compress="zlib").close()
    dbm_bitcask.open(path, compress="gzip")  # type: ignore[arg-type]
    dbm_bitcask.open(path, "x")  # type: ignore[arg-type]
    dbm_bitcask.open(path, sync="sometimes")  # type: ignore[arg-type]
    assert_type(dbm_bitcask.whichdb(path), str | None)


def use_a_database(path: Path) -> None:
    with dbm_bitcask.open(path, "c") as db:
        db["key"] = "value"
        db[b"key"] = bytearray(b"value")
        db["key"] = 5  # type: ignore[assignment]
        assert_type(db["key"], bytes)
        assert_type(db.get("key"), bytes | None)
        assert_type(db.get("key", 0), bytes | int)
        assert_type("key" in db, bool)
        assert_type(b"key" not in db, bool)
        assert_type(db.setdefault("key", "value"), bytes)
        assert_type(db.pop("key"), bytes)
        assert_type(db.pop("key", None), bytes | None)
        assert_type(db.pop(b"key", 0), bytes | int)
        assert_type(db.keys(), list[bytes])
        assert_type(db.popitem(), tuple[bytes, bytes])
        for key in db:
            assert_type(key, bytes)
        assert_type(list(db), list[bytes])
        assert_type(dict(db.items()), dict[bytes, bytes])
        for key, value in db.items():
            assert_type((key, value), tuple[bytes, bytes])
        for value in db.values():
            assert_type(value, bytes)
        db.set("key", b"value")
        db.set(b"key", "value", ttl=1.5)
        db.set("key", "value", "10")  # type: ignore[arg-type]
        assert_type(db.ttl("key"), float | None)
        db.touch("key", 10)
        db.touch("key", None)
        db.update({b"key": b"value"})
        db.update({"key": "value"}, other="value")
        db.update([("key", b"value"), (b"key", "value")])
        mixed: dict[str | bytes, str] = {"key": "value", b"key": "value"}
        db.update(mixed)
        db |= mixed
        db.update({"key": 1})  # type: ignore[arg-type]
        db |= {"key": "value"}
        del db["key"]
        take_a_mapping(db)
        take_a_mapping_of_str(db)  # type: ignore[arg-type]


def take_a_mapping(mapping: MutableMapping[bytes, bytes]) -> int:
    return len(mapping)


def take_a_mapping_of_str(mapping: MutableMapping[str, bytes]) -> int:
    return len(mapping)


def use_a_shelf_of_the_standard_library(path: Path) -> None:
    shelf: shelve.Shelf[list[int]] = shelve.Shelf(dbm_bitcask.open(path))
    with shelf:
        shelf["numbers"] = [1, 2]
        shelf["numbers"] = ["1"]  # type: ignore[list-item]
        assert_type(shelf["numbers"], list[int])
        for key, value in shelf.items():
            assert_type((key, value), tuple[str, list[int]])
    with shelve.Shelf[str](dbm_bitcask.open(path)) as texts:
        assert_type(texts["text"], str)


def use_a_shelf_of_ours(path: Path) -> None:
    with dbm_bitcask.open_shelf(path, "cf", 5, writeback=True, timeout=1) as shelf:
        assert_type(shelf, dbm_bitcask.Shelf)
        assert_type(shelf.dict, dbm_bitcask.Database)
        shelf["numbers"] = [1, 2]
        for key in shelf:
            assert_type(key, str)
        for key, _value in shelf.items():
            assert_type(key, str)
        shelf.update({"more": 1})
        shelf.clear()
        shelf.reorganize()
    with dbm_bitcask.open_shelf(path, serializer=as_json, deserializer=json.loads) as shelf:
        assert_type(shelf.get("key", 0), Any)
    with dbm_bitcask.Shelf(dbm_bitcask.open(path), serializer=lambda _value, protocol: bytes(protocol), deserializer=len) as shelf:
        shelf["key"] = 1


def as_json(value: object, _protocol: int) -> str:
    return json.dumps(value)


def register() -> None:
    dbm_bitcask.register(default=True)
    dbm_bitcask.unregister()
    with dbm_bitcask.registered():
        pass
