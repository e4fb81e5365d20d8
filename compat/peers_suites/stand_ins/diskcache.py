"""In the place of diskcache: `Index`, a mapping that has a directory, of its own choice if none is given."""

import tempfile

import dbm_bitcask


class Index(dbm_bitcask.Shelf):
    def __init__(self, directory=None, *args, **kwargs):
        self.directory = directory or tempfile.mkdtemp()
        super().__init__(dbm_bitcask.open(self.directory))
        self.update(*args, **kwargs)
