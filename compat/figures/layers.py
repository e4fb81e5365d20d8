"""What the portable layer of files costs beside the native one.

The same keys in both, in alternating rounds in one process: set, open with the first get, get. And what their indexes take: memory of the
process in one layer, mapped pages of a file in the other. There is no bound: the portable layer is for where the native one cannot be had.
"""

import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import dbm_bitcask
from compat import dataset
from compat.figures.measure import arguments, workplace

LAYERS = ("native", "portable")


def main() -> int:
    """Measure and print."""
    args = arguments(__doc__, keys=100_000, rounds=5)
    taken: dict[tuple[str, str], list[float]] = {}
    index = {}
    with workplace(args.directory) as place:
        for number in range(args.rounds):
            for layer in LAYERS:
                path = place / f"{layer} {number}.bitcask"
                times, index[layer] = one_round(path, layer, args.keys)
                for what, seconds in times.items():
                    taken.setdefault((what, layer), []).append(seconds)
    for what, unit, scale in (("set", "us", 1e6 / args.keys), ("get", "us", 1e6 / args.keys), ("open", "ms", 1e3)):
        native, portable = (sorted(seconds * scale for seconds in taken[what, layer]) for layer in LAYERS)
        ratios = sorted(after / before for before, after in zip(taken[what, "native"], taken[what, "portable"], strict=True))
        spread = f"{ratios[0]:.1f}-{ratios[-1]:.1f}"
        print(f"{what}: native {median(native):.2f} {unit}, portable {median(portable):.2f} {unit}: {median(ratios):.1f} x ({spread})")
    print("index, bytes a key:", ", ".join(f"{layer} {size / args.keys:.0f}" for layer, size in index.items()))
    return 0


def one_round(path: Path, layer: str, keys: int) -> tuple[dict[str, float], int]:
    """The seconds of each part, and the bytes of the index."""
    start = perf_counter()
    with dbm_bitcask.open(path, "n", files=layer) as db:  # type: ignore[arg-type]
        dataset.fill(db, keys)
    filled = perf_counter()
    with dbm_bitcask.open(path, files=layer) as db:  # type: ignore[arg-type]
        db[dataset.key(1)]
        opened = perf_counter()
        for number in dataset.shuffled(keys):
            db[dataset.key(number)]
        return {"set": filled - start, "open": opened - filled, "get": perf_counter() - opened}, db.stats().index_bytes


if __name__ == "__main__":
    sys.exit(main())
