"""In the place of zict.file and zict.lmdb: a mapping of str to bytes in a directory."""

import dbm_bitcask


class File(dbm_bitcask.Shelf):
    """A shelf whose values are bytes as they are; keys that are no str are a TypeError, or just not there."""

    def __init__(self, directory, *_others, **_more):
        super().__init__(dbm_bitcask.open(directory), serializer=lambda value, _: value, deserializer=bytes)

    def __contains__(self, key):
        return isinstance(key, str) and super().__contains__(key)

    def __getitem__(self, key):
        if not isinstance(key, str):
            raise KeyError(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        if not isinstance(key, str):
            raise TypeError(key)
        super().__setitem__(key, value)

    def __delitem__(self, key):
        if not isinstance(key, str):
            raise KeyError(key)
        super().__delitem__(key)


class LMDB(File):
    pass


class MapFullError(Exception):
    """What one test expects of py-lmdb."""
