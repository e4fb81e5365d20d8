"""Imports go down only: the interface stands on the engine, and in the engine each row stands on the rows below it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import dbm_bitcask
from children import run_python

# From the top. A module imports from the rows below its own, and from nowhere else.
ROWS = [
    {"store"},
    {"walk", "merge", "syncer", "check", "repair", "backup"},
    {"recovery"},
    {"batch"},
    {"write"},
    {"rotation"},
    {"log", "contents"},
    {"ticker"},
    {"segment", "keydir", "lookup", "lock"},
    {"page", "hint", "compression"},
    {"portable", "expiry"},
    {"record", "manifest", "header"},
    {"names", "files"},
    {"errors"},
]

# What the interface may know of the engine.
FACE = {"store", "check", "repair", "errors"}

# What the engine needs beside the standard library.
REQUIRED = {"xxhash"}

# What one of its modules may use where it is there: zstd, of the standard library from Python 3.14 on and of the package index before.
OPTIONAL = {"compression": {"compression", "backports"}}

# The modules that do I/O, and what nobody else may import or call.
DOES_IO = {"files", "portable"}
IO_MODULES = {
    "mmap",
    "fcntl",
    "io",
    "pathlib",
    "shutil",
    "tempfile",
    "socket",
    "subprocess",
    "msvcrt",
    "ctypes",
    "glob",
    "stat",
    "resource",
}
OS_WITHOUT_IO = {"PathLike", "fsdecode", "getpid", "register_at_fork", "path.dirname", "path.join"}

# The modules of the interface that know them: nothing else unpickles, or is near to what registration changes.
KNOW = {"pickle": {"shelf", "demo"}, "shelve": {"shelf", "demo"}, "dbm": {"registration"}}

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
def test_module_imports_from_rows_below_its_own_only(module):
    assert [other for other in siblings(module) if row_of(other) <= row_of(module)] == []


@every_module
def test_engine_knows_nothing_of_the_interface(module):
    ours = {name for name in engine_imports(module) if name.split(".")[0] == "dbm_bitcask"}
    assert {name for name in ours if not name.startswith("dbm_bitcask.engine")} == set()


@every_module
def test_engine_needs_the_standard_library_and_xxhash_only(module):
    used = {name.split(".")[0] for name in engine_imports(module, types=False)}
    assert used - set(sys.stdlib_module_names) - REQUIRED - OPTIONAL.get(module, set()) - {"dbm_bitcask"} == set()


def dotted(node):
    """What is written as `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("module", sorted(set(ENGINE) - DOES_IO))
def test_only_files_touches_the_operating_system(module):
    assert {name.split(".")[0] for name in engine_imports(module, types=False)} & IO_MODULES == set()
    from_os = {name.removeprefix("os.") for name in engine_imports(module, types=False) if name.startswith("os.")}
    nodes = list(ast.walk(tree(ENGINE[module])))
    used = {dotted(node) for node in nodes if isinstance(node, ast.Attribute)}
    from_os |= {name.removeprefix("os.") for name in used if name.startswith("os.")}
    assert from_os - OS_WITHOUT_IO - {"path"} == set()
    calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "open" not in calls


@pytest.mark.parametrize("module", sorted(INTERFACE))
def test_interface_knows_only_the_face_of_the_engine(module):
    known = imports(INTERFACE[module], "dbm_bitcask")
    parts = {name.split(".")[2] for name in known if name.startswith("dbm_bitcask.engine.")}
    assert parts & set(ENGINE) <= FACE


@pytest.mark.parametrize("other", KNOW)
def test_only_these_modules_of_the_interface_know(other):
    assert {module for module, file in INTERFACE.items() if other in imports(file, "dbm_bitcask")} == KNOW[other]


def test_import_of_the_package_does_not_import_dbm():
    script = "import dbm_bitcask, sys; print([name for name in sys.modules if name.partition('.')[0] == 'dbm'])"
    assert run_python(script).strip() == "[]"
