"""Writers, readers and merges on one database, and a writer killed every 300 ms.

4 writers set, delete and merge, write batches, and keys that expire, and 3 readers get, test and iterate, for 60 s, in tiny segments. Every
300 ms one of the writers is killed with SIGKILL and replaced; only the first one lives on, to show what a long life uses. Values are
self-checking (key, sequence number, checksum), and a ledger beside the database says which of them are right at each moment. Bounds: no
acknowledged write is lost, no value is wrong, no reader sees a sequence number go back, a key come back that had expired, or misses a key
that is never deleted, in a get as in an iteration; of a batch whose writer was killed all is there or nothing; no process fails or hangs;
descriptors and memory of those that live on are flat; at the end the contents are exactly those of the ledger, `check` finds
nothing, and an index made anew from the log says the same.
"""

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable

import dbm_bitcask
from compat.figures.crowd_roles import (
    FIRST_HALF,
    HOT_KEYS,
    INDELIBLE,
    RESOURCES,
    SECOND_HALF,
    STOP,
    TTL,
    Ledger,
    Plan,
    Reader,
    Writer,
    batches,
    expires,
    hot_name,
    judge,
    name,
    place,
    require_whole,
    value,
)
from compat.figures.measure import Verdicts, arguments, workplace
from dbm_bitcask.engine.check import check

MEMORY_BOUND = 8 * 1024  # KiB that the second half may take more than the first
DESCRIPTORS_BOUND = 32  # beyond one for each segment, which a map of it keeps before Python 3.13
PATIENCE = 30.0  # seconds without a sign of life after which a process hangs


def main() -> int:
    """Run the crowd and print the verdicts."""
    args = arguments(
        __doc__,
        seconds=60.0,
        writers=4,
        readers=3,
        keys=(5_000, "of each writer"),
        segment_size=(32 * 1024, "in bytes"),
        kill_every=(300.0, "milliseconds"),
        seed=0,
    )
    verdicts = Verdicts()
    with workplace(args.directory) as place:
        plan = Plan(place, args.writers, args.readers, args.keys, args.segment_size)
        ledger = prepare(plan)
        crowd = Crowd(plan, ledger, random.Random(args.seed))
        crowd.run(args.seconds, args.kill_every / 1000)
        words = ledger.words
        operations = sum(words[ledger.acknowledged : ledger.acknowledged + ledger.total])
        print(f"seed {args.seed}: {operations:,} acknowledged writes, {sum(words[ledger.beats : ledger.resources]):,} steps,", end=" ")
        print(f"{crowd.kills} kills, next segment id {next_id(plan)}")
        verdicts.check(not crowd.failures, f"no process was given a wrong answer, failed or hung ({len(crowd.failures)} were)")
        verdicts.check(not crowd.failures and flat(crowd), "descriptors and memory are flat")
        verdicts.check(not list(map(print, check(plan.database))), "check finds nothing before the next writer comes")
        verdicts.check(compare(plan, ledger), "the database has exactly what was acknowledged")
        verdicts.check(not list(map(print, check(plan.database))), "check finds nothing at the end")
        (plan.database / "keydir").unlink()
        verdicts.check(compare(plan, ledger), "an index made anew from the log says the same")
    return verdicts.status


def prepare(plan: Plan) -> Ledger:
    """Make the ledger, and a database that has the keys that are never deleted."""
    ledger = Ledger(plan)
    with dbm_bitcask.open(plan.database, "n", segment_size=plan.segment_size) as db:
        for number in range(0, ledger.total, INDELIBLE):
            ledger.words[ledger.begun + number] = ledger.words[ledger.acknowledged + number] = 1
            db[name(number)] = value(name(number), 1)
    return ledger


class Crowd:
    """The processes of a run."""

    def __init__(self, plan: Plan, ledger: Ledger, choose: random.Random) -> None:
        self.plan, self.ledger, self.choose = plan, ledger, choose
        self.roles: dict[int, int] = {}  # pid -> role: the writers first
        self.killed: set[int] = set()
        self.beats: dict[int, tuple[int, float]] = {}  # pid -> its beats, and since when they are so many
        self.failures: list[str] = []
        self.kills = 0

    def run(self, seconds: float, kill_every: float) -> None:
        """Let the crowd work until the time is over or something fails."""
        plan, words, phase = self.plan, self.ledger.words, self.ledger.phase
        for role in range(plan.writers + plan.readers):
            self.start(role)
        begin = time.monotonic()
        while not self.failures and (passed := time.monotonic() - begin) < seconds:
            time.sleep(kill_every * self.choose.uniform(0.5, 1.5))
            words[phase] = FIRST_HALF if passed < seconds / 2 else SECOND_HALF
            self.kill_one()
            self.look_after()
        words[phase] = STOP
        deadline = time.monotonic() + PATIENCE
        while self.roles and time.monotonic() < deadline:
            time.sleep(0.05)
            self.reap()
        for pid in list(self.roles):
            self.give_up(pid, "did not end")

    def start(self, role: int) -> None:
        """Fork the process of a role."""
        seed = self.choose.getrandbits(32)
        pid = os.fork()
        if pid == 0:
            live(self.plan, role, seed)
        self.roles[pid] = role
        self.beats[pid] = 0, time.monotonic()

    def kill_one(self) -> None:
        """Kill a writer, but not the first, and let another one take its place."""
        chosen = [pid for pid, role in self.roles.items() if 0 < role < self.plan.writers]
        if chosen:
            pid = self.choose.choice(chosen)
            self.killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            self.kills += 1

    def look_after(self) -> None:
        """Replace who was killed, and look for a sign of life of the others."""
        self.reap()
        missing = set(range(self.plan.writers + self.plan.readers)) - set(self.roles.values())
        for role in missing if not self.failures else ():
            self.start(role)
        now = time.monotonic()
        for pid, role in list(self.roles.items()):
            beats = self.ledger.words[self.ledger.beats + role]
            if beats != self.beats[pid][0]:
                self.beats[pid] = beats, now
            elif now - self.beats[pid][1] > PATIENCE:
                self.give_up(pid, "hangs")

    def give_up(self, pid: int, what: str) -> None:
        """End a process that does not go on, after it has said where it is."""
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        self.failures.append(f"process {pid}, role {self.roles[pid]}, {what}")
        print(self.failures[-1], flush=True)
        self.killed.add(pid)
        self.reap()

    def reap(self) -> None:
        """See who has ended, and how."""
        for pid, role in list(self.roles.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self.roles[pid]
            if status and not (pid in self.killed and os.WIFSIGNALED(status)):
                self.failures.append(f"process {pid}, role {role}, ended with {os.waitstatus_to_exitcode(status)}")
                print(self.failures[-1], flush=True)


def live(plan: Plan, role: int, seed: int) -> None:
    """Be the process of a role; never returns."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = 1
    try:
        kind: Callable[[Plan, int, int], Writer | Reader] = Writer if role < plan.writers else Reader
        process = kind(plan, role, seed)
        process.run()
        process.db.close()
        status = 0
    except BaseException:  # noqa: BLE001  (whatever it is, it is a failure, and this process ends)
        print(f"process {os.getpid()}, role {role}, at {time.monotonic():.6f}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def flat(crowd: Crowd) -> bool:
    """Whether those who live on used no more in the second half than in the first."""
    plan, ledger = crowd.plan, crowd.ledger
    flat = True
    for role in (0, *range(plan.writers, plan.writers + plan.readers)):
        start = ledger.resources + role * RESOURCES
        before, memory_before, after, memory_after = ledger.words[start : start + RESOURCES]
        kind = "writer" if role < plan.writers else "reader"
        print(f"{kind}: {before} -> {after} descriptors beyond the segments, {memory_before / 1024:.1f} -> {memory_after / 1024:.1f} MiB")
        flat = flat and max(before, after) <= DESCRIPTORS_BOUND and memory_after <= memory_before + MEMORY_BOUND
    return flat


def compare(plan: Plan, ledger: Ledger) -> bool:
    """Whether the database has what the ledger says; and so it stays for the next one."""
    time.sleep(2 * TTL)  # what expires has done so
    wrong, present = 0, 0
    words, begun, acknowledged = ledger.words, ledger.begun, ledger.acknowledged
    with dbm_bitcask.open(plan.database, "w", segment_size=plan.segment_size) as db:
        for numbers in (each for role in range(plan.writers) for each in batches(plan, role)):
            try:
                require_whole(ledger, db, numbers)
            except ValueError as failure:
                print(failure)
                wrong += 1
        expired = 0
        for number in range(ledger.total):
            found = db.get(name(number))
            present += found is not None
            try:
                right = place(words[acknowledged + number], words[begun + number])
                words[acknowledged + number] = words[begun + number] = judge(number, found, right) // 2
                expired += found is None and expires(number, words[begun + number])
            except ValueError as failure:
                print(failure)
                wrong += 1
        present += sum(hot_name(number) in db for number in range(HOT_KEYS))
        listed = db.keys()
        if not len(listed) == len(set(listed)) == present or not 0 <= len(db) - present <= expired:
            print(f"len() says {len(db)}, and {len(listed)} keys are listed, {len(set(listed))} different ones;", end=" ")
            print(f"get finds {present}, and {expired} have expired")
            wrong += 1
    return not wrong


def next_id(plan: Plan) -> int:
    """One more than the segments that there have been."""
    return 1 + max(int(path.stem) for path in plan.database.glob("*.data"))


if __name__ == "__main__":
    sys.exit(main())
