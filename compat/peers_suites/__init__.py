"""Tests that others wrote for their own persistent mappings, against dbm_bitcask.

    tox -e peers-suites

Nothing of them is copied: the source distributions are fetched from PyPI at each run, and a file of `stand_ins` takes the place of the
module that is tested. It gives our `Shelf` the names that the tests use.

    sqlitedict 2.1.0     all of its tests
    diskcache 5.6.3      those of Index, the mapping
    zict 3.0.0           those of File and LMDB, the mappings on a disk, with their checks for any mapping, some of them with threads

The source distributions of semidbm and lmdbm hold no tests. `differences.txt` lists the tests that do not pass, with the reasons.
"""
