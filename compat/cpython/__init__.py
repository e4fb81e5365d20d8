"""The standard library's own tests of `dbm` and `shelve`, unchanged, against dbm_bitcask. See `__main__`."""
