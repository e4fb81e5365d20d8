"""What users may rely on. A change here is a change for them: it belongs in the CHANGELOG."""

from __future__ import annotations

import inspect

import pytest

import dbm_bitcask

NAMES = [
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

METHODS = """
    __contains__ __delitem__ __enter__ __eq__ __exit__ __getitem__ __ior__ __iter__ __len__ __reduce__ __setitem__
    backup batch clear close firstkey get items iterkeys keys merge nextkey pop popitem reorganize set setdefault stats sync touch ttl
    update values
""".split()  # noqa: SIM905

EMPTY = inspect.Parameter.empty
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
BY_NAME = inspect.Parameter.KEYWORD_ONLY


def parameters(function):
    return [(it.name, it.default, it.kind) for it in inspect.signature(function).parameters.values()]


def test_public_names_are_these():
    assert sorted(dbm_bitcask.__all__) == NAMES
    assert all(hasattr(dbm_bitcask, name) for name in NAMES)


def test_signature_of_open():
    assert parameters(dbm_bitcask.open) == [
        ("file", EMPTY, POSITIONAL),
        ("flag", "c", POSITIONAL),
        ("mode", 0o666, POSITIONAL),
        ("sync", "never", BY_NAME),
        ("segment_size", 64 * 2**20, BY_NAME),
        ("timeout", None, BY_NAME),
        ("files", "auto", BY_NAME),
        ("merge", "auto", BY_NAME),
        ("compress", None, BY_NAME),
    ]


def test_signature_of_open_shelf():
    assert parameters(dbm_bitcask.open_shelf) == [
        ("file", EMPTY, POSITIONAL),
        ("flag", "c", POSITIONAL),
        ("protocol", None, POSITIONAL),
        ("writeback", False, POSITIONAL),
        ("keyencoding", "utf-8", BY_NAME),
        ("serializer", None, BY_NAME),
        ("deserializer", None, BY_NAME),
        ("options", EMPTY, inspect.Parameter.VAR_KEYWORD),
    ]


def test_signature_of_shelf_is_that_of_the_latest_standard_library():
    assert parameters(dbm_bitcask.Shelf) == [
        ("dict", EMPTY, POSITIONAL),
        ("protocol", None, POSITIONAL),
        ("writeback", False, POSITIONAL),
        ("keyencoding", "utf-8", POSITIONAL),
        ("serializer", None, BY_NAME),
        ("deserializer", None, BY_NAME),
    ]


def test_signatures_of_registration():
    assert parameters(dbm_bitcask.register) == parameters(dbm_bitcask.registered) == [("default", False, POSITIONAL)]
    assert parameters(dbm_bitcask.unregister) == []


@pytest.mark.parametrize("name", ["clear", "close", "get", "items", "popitem", "reorganize", "sync", "update", "values"])
def test_shelf_has_the_methods_of_the_latest_standard_library(name):
    assert callable(getattr(dbm_bitcask.Shelf, name))


def test_signature_of_whichdb():
    assert parameters(dbm_bitcask.whichdb) == [("file", EMPTY, POSITIONAL)]


@pytest.mark.parametrize("name", METHODS)
def test_database_has_the_methods_of_a_mapping_and_of_a_dbm_object(name):
    assert callable(getattr(dbm_bitcask.Database, name))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(dbm_bitcask, name))
