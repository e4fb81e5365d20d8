"""The report: for each workload and peer the median and the spread, our ratio to it, and the bounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from compat.peers.adapters import GNU, LMDB, OURS
from compat.peers.workloads import GET, KEYS, SET, WORKLOADS

Rounds = list[dict[str, dict[str, float]]]
"""For each round, for each peer, microseconds per operation of each workload."""


@dataclass(frozen=True)
class Bound:
    """How much slower than a peer a workload may be, for runs of at least `least` and fewer than `below` keys."""

    workload: str
    peer: str
    ratio: float
    least: int = 0
    below: int = 2_000_000


BOUNDS = (
    Bound(GET, LMDB, 1.2),
    Bound(GET, GNU, 2.5),
    Bound(SET, GNU, 1.1),
    Bound(GET, LMDB, 1.0, 2_000_000, 2**63),
    Bound(GET, GNU, 1.0, 2_000_000, 2**63),
)
# Microseconds a key, from a million keys on.
KEYS_BOUND = 1.5
KEYS_LEAST = 1_000_000


def table(rounds: Rounds) -> Iterator[str]:
    """Yield the lines of the table: microseconds per operation, and how many times a peer's time we took."""
    yield f"{'':12}{'':10}{'median us':>10}{'fastest':>10}{'slowest':>10}{'ours/peer':>11}{'spread':>14}"
    for workload in WORKLOADS:
        for peer in rounds[0]:
            times = [measured[peer][workload] for measured in rounds]
            row = f"{peer:12}{workload:10}{median(times):10.2f}{min(times):10.2f}{max(times):10.2f}"
            ratios = our_ratios(rounds, workload, peer)
            if ratios and peer != OURS:
                row += f"{median(ratios):11.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}"
            yield row


def our_ratios(rounds: Rounds, workload: str, peer: str) -> list[float]:
    """Return our time over the peer's, round by round; empty if one of the two did not run."""
    return [measured[OURS][workload] / measured[peer][workload] for measured in rounds if OURS in measured and peer in measured]


def verdicts(rounds: Rounds, count: int) -> Iterator[tuple[bool, str]]:
    """Yield for each bound that applies to `count` keys whether it holds, and a line that says so."""
    for bound in BOUNDS:
        if not bound.least <= count < bound.below:
            continue
        what = f"{bound.workload} at most {bound.ratio} x {bound.peer}"
        ratios = our_ratios(rounds, bound.workload, bound.peer)
        if ratios:
            yield verdict(median(ratios) <= bound.ratio, f"{what}: {median(ratios):.2f}")
        else:
            yield True, f"----  {what}: not measured, a peer is missing"
    if count >= KEYS_LEAST and OURS in rounds[0]:
        took = median(measured[OURS][KEYS] for measured in rounds)
        yield verdict(took < KEYS_BOUND, f"{KEYS} under {KEYS_BOUND} us a key: {took:.2f}")


def verdict(passed: bool, what: str) -> tuple[bool, str]:
    """Return the verdict and its line."""
    return passed, f"{'PASS' if passed else 'MISS'}  {what}"
