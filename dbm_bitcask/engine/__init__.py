"""Bitcask: bytes in, bytes out.

The engine knows files and records. It knows nothing of dbm, str or pickle; it never unpickles, evaluates or imports what it reads.

    store                           the operations, each under the lock or lock-free
    walk, merge, syncer             iteration; giving back space; when the log becomes durable
    check, repair                   what is wrong with a database, and what can be done about it
    recovery                        how the log and its index are made whole again
    batch                           how several operations change them as one
    write, rotation                 how one operation changes them; how the list of segments changes
    log, contents                   the log with its index, as one handle holds them; what is in a segment
    ticker                          a thread that does something now and then
    segment, keydir, lookup, lock   one segment; the index; the hot path of a read; the writer lock
    page, hint                      a page of the index; the keys of a sealed segment
    expiry, compression             when a record counts as deleted; a value made smaller, and back
    record, manifest, header        the bytes of the others
    names, files, errors            file names; the operating system; what is raised

Imports go down only.
"""
