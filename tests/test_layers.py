"""Imports go down only: the interface stands on the engine, and in the engine each row stands on the rows below it."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import dbm_bitcask

# From the top. A module imports from rows below its own, or from its own row as long as there is no circle.
ROWS = [
    {"store"},
    {"walk", "merge", "check"},
    {"log", "write", "rotation", "recovery", "syncer"},
    {"contents", "segment", "keydir", "lookup", "lock"},
    {"record", "hint", "manifest", "header", "page"},
    {"names", "files", "errors"},
]

# What the interface may know of the engine.
FACE = {"store", "check", "errors"}

# What the engine needs beside the standard library.
REQUIRED = {"xxhash"}

# The modules that may do I/O, and what nobody else may import or call.
DOES_IO = {"files", "lock"}
IO_MODULES = {"mmap", "fcntl", "io", "pathlib", "shutil", "tempfile", "socket", "subprocess", "msvcrt", "ctypes"}
OS_WITHOUT_IO = {
    "fspath",
    "fsencode",
    "fsdecode",
    "getpid",
    "register_at_fork",
    "PathLike",
    "path",
    "environ",
    "strerror",
}

RUNS_WHAT_IT_READS = {"pickle", "marshal", "shelve", "dbm", "copyreg", "importlib", "runpy"}

PACKAGE = Path(dbm_bitcask.__file__).parent
ENGINE = {file.stem: file for file in (PACKAGE / "engine").glob("*.py") if file.stem != "__init__"}
INTERFACE = {file.stem: file for file in PACKAGE.glob("*.py")}

every_module = pytest.mark.parametrize("module", sorted(ENGINE))


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def is_for_types_only(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(root, *, types):
    """Every node; without those that only a type checker sees unless `types`."""
    for child in ast.iter_child_nodes(root):
        if is_for_types_only(child) and not types:
            continue
        yield child
        yield from statements(child, types=types)


def imports(file, package, *, types=True):
    """The absolute names of the modules that a file imports, of `from a import b` both `a` and `a.b`."""
    found = set()
    for node in statements(tree(file), types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def engine_imports(module, *, types=True):
    return imports(ENGINE[module], "dbm_bitcask.engine", types=types)


def siblings(module):
    """The modules of the engine that this one imports, for types or for use."""
    found = {name.split(".")[2] for name in engine_imports(module) if name.startswith("dbm_bitcask.engine.")}
    return found & set(ENGINE)


def row_of(module):
    return next((number for number, row in enumerate(ROWS) if module in row), -1)


def test_every_module_of_the_engine_has_a_row():
    assert set(ENGINE) == set().union(*ROWS)


@every_module
def test_module_imports_nothing_from_above(module):
    assert [other for other in siblings(module) if row_of(other) < row_of(module)] == []


def test_imports_do_not_go_round():
    list(graphlib.TopologicalSorter({module: siblings(module) for module in ENGINE}).static_order())


@every_module
def test_engine_knows_nothing_of_the_interface(module):
    ours = {name for name in engine_imports(module) if name.split(".")[0] == "dbm_bitcask"}
    assert {name for name in ours if not name.startswith("dbm_bitcask.engine")} == set()


@every_module
def test_engine_needs_the_standard_library_and_xxhash_only(module):
    used = {name.split(".")[0] for name in engine_imports(module, types=False)}
    assert used - set(sys.stdlib_module_names) - REQUIRED - {"dbm_bitcask"} == set()


@every_module
def test_engine_never_runs_what_it_reads(module):
    assert {name.split(".")[0] for name in engine_imports(module)} & RUNS_WHAT_IT_READS == set()
    names = {node.id for node in ast.walk(tree(ENGINE[module])) if isinstance(node, ast.Name)}
    assert names & {"eval", "exec", "compile", "__import__"} == set()


@pytest.mark.parametrize("module", sorted(set(ENGINE) - DOES_IO))
def test_only_files_touches_the_operating_system(module):
    assert {name.split(".")[0] for name in engine_imports(module, types=False)} & IO_MODULES == set()
    from_os = {name.split(".")[1] for name in engine_imports(module, types=False) if name.startswith("os.")}
    nodes = list(ast.walk(tree(ENGINE[module])))
    from_os |= {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert from_os - OS_WITHOUT_IO == set()
    calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "open" not in calls


@pytest.mark.parametrize("module", sorted(INTERFACE))
def test_interface_knows_only_the_face_of_the_engine(module):
    known = imports(INTERFACE[module], "dbm_bitcask")
    parts = {name.split(".")[2] for name in known if name.startswith("dbm_bitcask.engine.")}
    assert parts & set(ENGINE) <= FACE
    assert not any(module.startswith("dbm_bitcask.engine.") and module.count(".") > 3 for module in known)
