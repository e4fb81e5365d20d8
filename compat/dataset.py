"""The keys and values that all measurements use: the same ones in every process, without keeping them in memory."""

import random
from array import array
from collections.abc import MutableMapping
from hashlib import blake2b

KEY_SIZE = 16
VALUE_SIZE = 100


def key(number: int) -> bytes:
    """Return a key of 16 bytes; consecutive numbers give keys in random order."""
    return blake2b(number.to_bytes(8, "little"), digest_size=KEY_SIZE).digest()


def value(key: bytes) -> bytes:
    """Return the value of 100 bytes that belongs to a key."""
    return (key * 7)[:VALUE_SIZE]


def shuffled(count: int) -> "array[int]":
    """Return the numbers below `count` in a random order, 4 bytes each."""
    numbers = array("I", range(count))
    random.Random(1).shuffle(numbers)
    return numbers


def fill(db: MutableMapping[bytes, bytes], count: int) -> None:
    """Set the first `count` keys."""
    for number in range(count):
        fresh = key(number)
        db[fresh] = value(fresh)
