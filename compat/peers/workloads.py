"""The workloads: what is done to every store, in this order, and how long one operation takes."""

import gc
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from compat import dataset
from compat.peers.adapters import Store

SET = "set"
GET = "get"
KEYS = "keys()"
WORKLOADS = (SET, GET, KEYS)


@dataclass(frozen=True)
class Keys:
    """The keys of a run, in the order in which they are set and in the one in which they are got, and their values."""

    to_set: list[bytes]
    to_get: list[bytes]
    values: list[bytes]


def make_keys(count: int, gets: int) -> Keys:
    """Return `count` distinct keys, `gets` of them to be looked up."""
    to_set = [dataset.key(number) for number in range(count)]
    to_get = random.Random(2).sample(to_set, min(gets, count))
    # Enough different objects that the processor's cache does not hold them all, as with real values.
    return Keys(to_set, to_get, [dataset.value(key) for key in to_set[:100_000]])


def run(make: Callable[[Path], Store], keys: Keys, directory: Path | None) -> dict[str, float]:
    """Run all workloads on a new store and return microseconds per operation, the loop included."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir=directory) as place:
        store = make(Path(place))
        gc.collect()
        try:
            return {
                SET: timed(lambda: set_all(store, keys), len(keys.to_set)),
                GET: timed(lambda: get_all(store, keys), len(keys.to_get)),
                KEYS: timed(lambda: list_keys(store, keys), len(keys.to_set)),
            }
        finally:
            store.close()


def timed(work: Callable[[], None], operations: int) -> float:
    """Return the microseconds that each operation of `work` took."""
    start = perf_counter()
    work()
    return (perf_counter() - start) / operations * 1e6


def set_all(store: Store, keys: Keys) -> None:
    """Set every key, all of them new, in random order."""
    values = keys.values
    count = len(values)
    for number, key in enumerate(keys.to_set):
        store[key] = values[number % count]


def get_all(store: Store, keys: Keys) -> None:
    """Get keys that are there, in another random order."""
    for key in keys.to_get:
        store[key]


def list_keys(store: Store, keys: Keys) -> None:
    """List all keys."""
    found = store.keys()
    if len(found) != len(keys.to_set):
        raise RuntimeError(f"keys() has {len(found)} of {len(keys.to_set)} keys")
