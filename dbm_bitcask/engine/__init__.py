"""Bitcask: bytes in, bytes out.

The engine knows files and records. It knows nothing of dbm, str or pickle; it never unpickles, evaluates or imports what it reads.

    store                                   the operations, each under the lock or lock-free
    walk, merge, check                      procedures over the whole log
    log, write, rotation, recovery          the log with its index; how it changes; how it is made whole again
    segment, keydir, lookup, lock           one segment; the index; the hot path of a read; the writer lock
    record, hint, manifest, header          the bytes
    names, files, errors                    file names; the operating system; what is raised

Imports go down only.
"""
