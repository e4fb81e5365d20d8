"""A file system that is really full: what was acknowledged stays, and everything goes on when there is space again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dbm_bitcask

FILL = """
import errno, os, random, sys
from pathlib import Path
import dbm_bitcask
from dbm_bitcask.engine.check import check

place, seed = Path(sys.argv[1]), int(sys.argv[2])
choose = random.Random(seed)
options = dict(segment_size=choose.choice([4096, 20000, 2**20]), sync=choose.choice(["never", "never", "always"]))
path, ballast = place / "db", place / "ballast"
ballast.write_bytes(bytes(choose.randrange(20000, 60000)))
size = choose.choice([10, 300, 5000])
model, refused = {}, 0
db = dbm_bitcask.open(path, **options)
for number in range(100000):
    key = b"%d" % (choose.randrange(60) if choose.randrange(2) else number)
    value = bytes([choose.randrange(256)]) * choose.randrange(size)
    try:
        db[key] = value
        model[key] = value
    except dbm_bitcask.error as failure:
        assert failure.errno == errno.ENOSPC, failure
        refused += 1
        assert dict(db) == model, "a write that was refused changed something"
        if refused == 20:
            break
        if choose.randrange(4) == 0:
            db._store.closed = True  # this process dies
            db = dbm_bitcask.open(path, "w", **options)
            assert dict(db) == model
assert refused == 20
with dbm_bitcask.open(path, "r") as reader:
    assert dict(reader) == model
if choose.randrange(2):
    try:
        db.close()
    except dbm_bitcask.error as failure:
        assert failure.errno == errno.ENOSPC, failure
    with dbm_bitcask.open(path, "r") as reader:
        assert dict(reader) == model
    db = dbm_bitcask.open(path, "w", **options)
assert dict(db) == model
ballast.unlink()
for key in list(model)[:100]:
    del db[key], model[key]
db[b"new"] = model[b"new"] = b"value"
try:
    db.reorganize()
except dbm_bitcask.error as failure:  # it takes the space of what it copies, before it gives any back
    assert failure.errno == errno.ENOSPC, failure
assert dict(db) == model
db.close()
assert check(path) == []
with dbm_bitcask.open(path, "r") as reader:
    assert dict(reader) == model
print(len(model))
"""

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="this machine lets nobody mount a file system of a few hundred KiB")
def test_full_file_system_loses_nothing_and_goes_on_when_there_is_space(tmp_path, amount, tally):
    fills = amount(sample=3, full=20, release=200)
    package = str(Path(dbm_bitcask.__file__).parent.parent)
    for seed in range(fills):
        script = f'mount -t tmpfs -o size={200 + seed % 7 * 100}k none "$1" && exec "$2" -c "$3" "$1" {seed}'
        done = subprocess.run(
            [*NAMESPACE, "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL],
            env={**os.environ, "PYTHONPATH": package},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    tally("full file systems", fills)
