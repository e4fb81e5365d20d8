"""Writer, merger, two readers and an iterator, interleaved at every access as a seed says; in half of the seeds a writer is killed.

Every key has one process that writes it, and a history: its values so far, the one being written included. Each answer is held against
the histories: it must be one that was right between the call and the return, and what was seen once is never taken back. The end of a
key's time is a change of its history, too: the clock stands still but for the moments in which somebody makes it. A batch is judged key
by key, for readers may see it half written; only that of a writer who died in it is all there behind it, or nothing.
"""

from __future__ import annotations

import collections
import gc
import itertools
import random
import shutil
from typing import NamedTuple

import pytest

import dbm_bitcask
from crashes import every_write_pays, freeze, thaw
from dbm_bitcask.engine import header, keydir, recovery, rotation
from dbm_bitcask.engine.check import check
from dbm_bitcask.engine.page import FULL, key_hash
from expected import Clock
from schedules import Hung, Scheduler

AMOUNTS = {"sample": 300, "full": 3000, "release": 100_000}
BLOCK = 100
SEGMENT_SIZE = 4096
FUSES = ("create", "replace", "unlink", "sync")  # changes that are rare, and soon behind which a writer may die
SHOWN = 60  # steps of a schedule that failed


# What is right.


class History:
    """The values of one key, None where it is deleted. Those before `floor` are gone: a later one was acknowledged, or met by somebody."""

    def __init__(self, value):
        self.values = [value]
        self.floor = 0
        self.has_expired = False  # then it may be counted though it is not there

    def is_settled(self):
        return self.floor == len(self.values) - 1


class Ledger:
    """The histories of all keys; `recent` are those of the last writes."""

    def __init__(self, contents, fresh):
        self.histories = {key: History(contents.get(key)) for key in [*contents, *fresh]}
        self.recent = list(fresh[:4])
        self.ends = {}  # when the time of a value is over
        self.clearing = False  # a clear shows to a reader that opens before it shows to one that is open
        self._floors = None

    def now(self, key):
        """The last value of a key, for its writer."""
        return self.histories[key].values[-1]

    def begin(self, key, value):
        self.histories[key].values.append(value)
        self.recent = [*self.recent[-7:], key]

    def acknowledge(self, keys):
        self.clearing = False
        for key in keys:
            self._raise_floor(key, len(self.histories[key].values) - 1)

    def floors(self):
        """The floor of every key."""
        if self._floors is None:
            self._floors = {key: history.floor for key, history in self.histories.items()}
        return self._floors

    def _raise_floor(self, key, number):
        history = self.histories[key]
        if number > history.floor and not self.clearing:
            history.floor = number
            self._floors = None

    def judge(self, key, found, first):
        """Whether a value was right at some moment since `first` was the floor; from now on nothing older is."""
        values = self.histories[key].values
        number = next((number for number in range(first, len(values)) if values[number] == found), None)
        assert number is not None, f"{key!r} is {found!r}, and not one of {values[first:]}; before: {values[:first][-3:]}"
        self._raise_floor(key, number)

    def judge_presence(self, key, there, first):
        values = self.histories[key].values
        number = next((number for number in range(first, len(values)) if (values[number] is not None) is there), None)
        assert number is not None, f"{key!r} is {'there' if there else 'missing'}, against {values[first:]}; before: {values[:first][-3:]}"
        self._raise_floor(key, number)

    def judge_count(self, count, floors, unfinished):
        """Whether so many keys are right; those of a batch that is being published may be counted before they are seen, or after."""
        least = most = 0
        for key, history in self.histories.items():
            possible = [*history.values[floors[key] :], *unfinished.get(key, ())]
            least += None not in possible
            most += history.has_expired or any(value is not None for value in possible)
        assert least <= count <= most, f"{count} keys are counted, and there are {least} to {most}"

    def judge_walk(self, met, floors):
        """Whether whatever was there all the time has been met."""
        missed = [key for key, history in self.histories.items() if key not in met and None not in history.values[floors[key] :]]
        assert not missed, f"an iteration that met {len(met)} keys missed {missed}"

    def expire(self, now):
        """The clock was set: what is over now is gone for every call from here on, and may be for those that are under way."""
        for history in self.histories.values():
            for number in reversed(range(history.floor, len(history.values))):
                if self.ends.get(history.values[number], now + 1) <= now:
                    if history.values[number + 1 : number + 2] != [None]:
                        history.values.insert(number + 1, None)
                    history.floor += number == history.floor and not self.clearing
                    history.has_expired = True
        self._floors = None

    def judge_batch(self, changes, get):
        """Whether a batch whose writer died in it is there as a whole, or not at all; `changes` has what was there, and what is new."""
        decisive = [key for key, (old, new) in changes.items() if new not in self.ends and (new or (old and old not in self.ends))]
        done = {key: get(key) == changes[key][1] for key in decisive}
        assert len(set(done.values())) <= 1, f"a batch is there in part: {[(key, get(key), *changes[key]) for key in decisive]}"

    def settle(self, key, found):
        """See what became of the operation that the last writer of a key died in: it will stay so."""
        history = self.histories[key]
        self.judge(key, found, history.floor)
        del history.values[history.values.index(found, history.floor) + 1 :]
        self.acknowledge([key])


# Where it begins.


class Template(NamedTuple):
    """A database to begin with: its files and contents, keys that are not in it, and whether its keydir believes to be where it is."""

    files: dict[str, bytes]
    contents: dict[bytes, bytes]
    fresh: list[bytes]
    beside: dict[bytes, list[bytes]]  # to keys that are not in it, those of the pages that they will come to
    trusted: bool = True


def short(key):
    return key + b" 0"


def small(db):
    for turn in range(3):
        for number in range(turn, 14):
            db[b"k%02d" % number] = b"k%02d %d " % (number, turn) + b"." * 60
    for number in range(0, 14, 5):
        del db[b"k%02d" % number]


def fill(db, keys, deleted):
    for key in keys:
        db[key] = short(key)
    for key in keys[:deleted]:
        del db[key]


def numbered(prefix, count):
    return [b"%s%d" % (prefix, number) for number in range(count)]


def where_hashes(seed, begin, count, prefix):
    """Keys whose hashes begin with these bits."""
    bits, shift = int(begin, 2), 64 - len(begin)
    named = (b"%s%d" % (prefix, number) for number in itertools.count())
    return list(itertools.islice((key for key in named if key_hash(key, seed) >> shift == bits), count))


def make(place, work):
    """The database that `work(db, seed)` leaves, with the keys that it returns as fresh ones."""
    with dbm_bitcask.open(place, segment_size=SEGMENT_SIZE) as db:
        seed = db._log.keydir.table.seed
        fresh = work(db, seed)
        db.merge()
        if work is make_sparse:
            db._store.locked(spread)
    with dbm_bitcask.open(place, "r") as db:
        contents = dict(db.items())
    pages = collections.defaultdict(list)
    for key in contents:
        pages[key_hash(key, seed) >> 55].append(key)
    beside = {key: pages[key_hash(key, seed) >> 55] for key in fresh if key_hash(key, seed) >> 55 in pages}
    return Template(freeze(place), contents, fresh, beside if "siblings" in work.__name__ else {})


def make_small(db, _seed):
    small(db)
    return numbered(b"new", 10)


def make_sparse(db, seed):
    return make_small(db, seed)


def spread(log):
    """More pages than so few keys need: the next merge makes a new keydir, while others read by the old one."""
    log.keydir._reserve(90)
    log.keydir.words[header.PAGES] += 90


def make_full(db, _seed):
    """A page that is full but for one slot, and then is split."""
    keys = numbered(b"k", FULL - 1)
    fill(db, keys, 88)
    return numbered(b"new", 12)


def make_stale(db, _seed):
    """A page that is full but for one slot, and then is written anew without its deleted slots."""
    keys = numbered(b"k", FULL - 1)
    fill(db, keys, FULL - 20)
    return numbered(b"new", 12)


def deepen(db, seed, begin, keys, depth):
    """Fill a page, and split it until all its keys share so many bits."""
    for key in keys:
        db[key] = short(key)
    for bit in range(depth):
        key = where_hashes(seed, begin[:bit] + "10"[int(begin[bit])], 1, b"e")[0]
        db[key] = short(key)


def make_siblings(db, seed):
    """Eight deep pages without a free slot: each is written anew, in few steps, and in the place of the one before."""
    begins = [f"010110{number:03b}" for number in range(8)]
    pages = [where_hashes(seed, begin, FULL, b"s") for begin in begins]
    deepen(db, seed, begins[0], pages[0], 6)
    for keys in pages[1:]:
        for key in keys:
            db[key] = short(key)
    for keys in pages:
        for key in keys[: FULL - 5]:
            del db[key]
    fresh = [where_hashes(seed, begin, 3, b"new") for begin in begins]
    return [key for each in zip(*fresh, strict=True) for key in each]


def make_deep(db, seed):
    """A full page as deep as the directory, which is then doubled."""
    begin = "010110011"
    keys = where_hashes(seed, begin, FULL, b"d")
    deepen(db, seed, begin, keys, 9)
    for key in keys[:80]:
        del db[key]
    db._store.locked(lambda log: log.keydir._reserve(8))  # so that nothing but the doubling itself tells of it
    return where_hashes(seed, begin, 12, b"new")


def without_keydir(template, *, hints):
    kept = {name: data for name, data in template.files.items() if name != "keydir" and (hints or not name.endswith(".hint"))}
    return template._replace(files=kept, trusted=False)


def with_older_keydir(place, template):
    """The log went on by another keydir."""
    thaw(template.files, place)
    contents, fresh = dict(template.contents), list(template.fresh)
    with dbm_bitcask.open(place, "w", segment_size=SEGMENT_SIZE) as db:
        db[fresh[0]] = contents[fresh[0]] = b"later"
        key = next(iter(contents))
        db[key] = contents[key] = b"later, too"
    return Template({**freeze(place), "keydir": template.files["keydir"]}, contents, fresh, {})


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    place = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        Scheduler(0).install(patch)
        works = make_small, make_sparse, make_full, make_stale, make_siblings, make_deep
        made = {work.__name__.removeprefix("make_"): make(place / work.__name__, work) for work in works}
        made["no keydir"] = without_keydir(made["small"], hints=True)
        made["no keydir, no hints"] = without_keydir(made["small"], hints=False)
        made["untrusted"] = made["small"]._replace(trusted=False)
        made["older keydir"] = with_older_keydir(place / "older", made["small"])
    return made


# Who takes part.


class Schedule:
    """One seed: what it begins with, who takes part, and who is killed."""

    def __init__(self, seed, path, templates, *, trace=False):
        self.path = path
        self.scheduler = Scheduler(seed, trace=trace)
        self.choose = choose = random.Random(f"schedule {seed}")
        self.kind = choose.choice([*templates, "siblings", "siblings", "deep", "full"])
        self.template = templates[self.kind]
        self.clears = choose.random() < 0.15
        self.ledger = Ledger(self.template.contents, self.template.fresh)
        keys = self.keys_of_all = list(self.ledger.histories)
        self.keys = {"writer": keys, "merger": []}
        if not self.clears:
            self.keys = {"writer": [key for n, key in enumerate(keys) if n % 4], "merger": keys[::4]}
        self.writing = 0
        self.batches = {}  # for each kind of writer the batch that it is in, or died in
        self.clock = Clock()
        self.jumps = choose.choice((0, 1, 3))  # of the clock that are still to come
        self.compress = choose.choice((None, None, "zlib"))
        self.deaths = 0
        self.counter = 0
        self.eager = choose.choice((0.2, 0.5, 0.9))  # to write new keys
        self.stops = choose.choice((0, 0.2, 0.8))  # how often readers stop in the middle of a search until others have written
        self.gossip = choose.choice((0.2, 0.7))  # how often readers look at what was just written
        self.comes_back = choose.random() < 0.6
        self.rebuilds_at_end = choose.random() < 0.5

    def run(self):
        if self.template.trusted:
            thaw(self.template.files, self.path)
        else:
            self.path.mkdir()
            for name, data in self.template.files.items():
                (self.path / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            self.scheduler.install(patch)
            self.clock.install(patch)
            if self.choose.random() < 0.5:
                every_write_pays(patch)
            self.start()
            self.scheduler.run()
            self.scheduler.install_for_nobody(patch)
            patch.setattr(recovery, "is_alive", lambda _: False)  # whoever held the lock had this process id, too
            self.verify()

    def start(self):
        spawn, choose = self.scheduler.spawn, self.choose
        writers = [self.start_writer(kind, after=choose.choice((0, 0, 100))) for kind in ("writer", "merger")]
        spawn("reader 1", self.reader)
        spawn("reader 2", self.reader, after=choose.choice((0, 500)))
        spawn("iterator", self.iterator, after=choose.choice((0, 0, 500)))
        if self.jumps:
            spawn("clock", self.tick)
        if choose.random() < 0.6:
            victim = choose.choice((writers[0], writers[0], writers[1]))
            if choose.random() < 0.3:
                victim.fuse, victim.fuse_length = choose.choice(FUSES), choose.randrange(20)
            else:
                victim.lives = choose.choice((30, 150, 150, 600, 600)) * choose.random()
            self.scheduler.died = self.after_death

    def start_writer(self, kind, *, after=0, again=False):
        self.writing += 1
        work = self.writer if kind == "writer" else self.merger

        def program(task):
            try:
                self.open(task, self.choose.choice("wwc"))
                if again:
                    self.settle(task, kind)
                work(task)
                self.close(task)
            finally:
                self.writing -= 1

        return self.scheduler.spawn(kind + " again" * again, program, after=after)

    def after_death(self, task):
        """A writer comes back, which may die in its turn; or none that lived is left."""
        self.deaths += 1
        if self.comes_back:
            again = self.start_writer(task.name.split()[0], after=int(1000 * self.choose.random()), again=True)
            if self.deaths < 3 and self.choose.random() < 0.4:
                again.lives = self.choose.choice((10, 40, 150)) * self.choose.random()
        elif self.deaths == 1:
            for other in list(self.scheduler.tasks):
                if other.name in ("writer", "merger"):
                    self.scheduler.kill(other)

    # What a process does.

    def open(self, task, flag):
        task.doing = f"open {flag}"
        task.db = dbm_bitcask.open(self.path, flag, segment_size=SEGMENT_SIZE, compress=self.compress)

    def close(self, task):
        task.doing = "close"
        task.db.close()

    def settle(self, task, kind):
        task.doing = "look at what a dead one left"
        self.ledger.judge_batch(self.batches.get(kind, {}), task.db.get)
        self.batches.pop(kind, None)
        for key in self.keys[kind]:
            if not self.ledger.histories[key].is_settled():
                self.ledger.settle(key, task.db.get(key))

    def tick(self, _task):
        while self.jumps:
            self.scheduler.pause(self.choose.randrange(1500))
            self.jumps -= 1
            self.clock.seconds += 10
            self.ledger.expire(self.clock.seconds)

    def writer(self, task):
        for _ in range(self.choose.randrange(6, 16)):
            self.write(task, self.choose.choice(self.keys["writer"]))
            if self.choose.random() < self.eager:
                self.write_new(task, self.keys["writer"])
                continue
            kind = self.choose.random()
            if kind < 0.1:
                self.close(task)
                self.open(task, "w")
            elif kind < 0.2:
                task.doing = "sync"
                task.db.sync()
            elif kind < 0.4 and self.clears:
                self.clear(task)
            elif kind < 0.6:
                self.get(task)
            elif kind < 0.8:
                self.batch(task, self.keys["writer"])

    def merger(self, task):
        for _ in range(self.choose.randrange(1, 4)):
            for _ in range(self.choose.randrange(4)):
                if self.keys["merger"]:
                    self.write(task, self.choose.choice(self.keys["merger"]))
                    self.write_new(task, self.keys["merger"])
                    if self.choose.random() < 0.3:
                        self.batch(task, self.keys["merger"])
            task.doing = "merge"
            task.db.merge()
            self.scheduler.pause(self.choose.randrange(300))

    def write_new(self, task, keys):
        absent = [key for key in self.template.fresh if key in keys and self.ledger.now(key) is None]
        if absent:
            self.set(task, absent[0])

    def write(self, task, key):
        """Some operation on a key of this writer, whose answer is known."""
        db, kind, now = task.db, self.choose.randrange(10), self.ledger.now(key)
        if kind < 5 or (now in self.ledger.ends and self.jumps):  # whether it is still there then, nobody knows
            self.set(task, key, ttl=self.choose.choice((None, None, 5, 15)))
        elif kind < 7:
            task.doing = f"delete {key!r}"
            if now is None:
                with pytest.raises(KeyError):
                    del db[key]
            else:
                self.ledger.begin(key, None)
                del db[key]
                self.ledger.acknowledge([key])
        elif kind < 9:
            task.doing = f"pop {key!r}"
            if now is not None:
                self.ledger.begin(key, None)
            assert db.pop(key, None) == now
            self.ledger.acknowledge([key])
        else:
            task.doing = f"setdefault {key!r}"
            value = self.value(key)
            if now is None:
                self.ledger.begin(key, value)
            assert db.setdefault(key, value) == (value if now is None else now)
            self.ledger.acknowledge([key])

    def set(self, task, key, ttl=None):
        value = self.value(key, ttl)
        task.doing = f"set {key!r}"
        self.ledger.begin(key, value)
        task.db.set(key, value, ttl)
        self.ledger.acknowledge([key])

    def batch(self, task, keys):
        """Set some keys and delete others, also absent ones; or set them by `update`, few and small enough for one batch."""
        ledger, kind, ttl = self.ledger, task.name.split()[0], self.choose.choice((None, None, 5))
        chosen = self.choose.sample(keys, min(len(keys), self.choose.choice((2, 4, 8))))
        is_update = len(chosen) == 2 and ttl is None
        values = {key: self.value(key, ttl) if is_update or self.choose.random() < 0.7 else None for key in chosen}
        task.doing = f"batch of {chosen!r}"
        self.batches[kind] = {key: (ledger.now(key), value) for key, value in values.items()}
        for key, value in values.items():
            ledger.begin(key, value)
        if is_update:
            task.db.update(values)
        else:
            with task.db.batch():
                for key in sorted(values, key=lambda key: values[key] is None):  # a pop looks, and then the clock may go on
                    if values[key] is None:
                        task.db.pop(key, None)
                    else:
                        task.db.set(key, values[key], ttl)
        ledger.acknowledge(chosen)
        del self.batches[kind]

    def value(self, key, ttl=None):
        """One that nobody has written before."""
        self.counter += 1
        value = b"%s %d " % (key, self.counter) + b"." * self.choose.choice((0, 5, 50, 150, 400))
        if ttl is not None:
            self.ledger.ends[value] = self.clock.seconds + ttl
        return value

    def clear(self, task):
        task.doing = "clear"
        self.ledger.clearing = True
        for key in self.ledger.histories:
            self.ledger.begin(key, None)
        task.db.clear()
        self.ledger.acknowledge(self.ledger.histories)

    def reader(self, task):
        self.open(task, "r")
        more = 6
        for _ in range(80):
            kind = self.choose.random()
            if kind < 0.5:
                self.get(task)
            elif kind < 0.8:
                self.contains(task)
            elif kind < 0.9:
                self.count(task)
            elif kind < 0.95:
                task.doing = "pause"
                self.scheduler.pause(self.choose.randrange(1000))
            else:
                self.close(task)
                self.open(task, "r")
            more -= not self.writing
            if not more:
                break
            if kind < 0.3:
                self.scheduler.pause(self.choose.randrange(400))
        self.close(task)

    def some_key(self):
        """One that was just written, one beside the next that will be, or any."""
        kind = self.choose.random()
        if kind < self.gossip:
            return self.choose.choice(self.ledger.recent)
        absent = [key for key in self.template.beside if self.ledger.now(key) is None]
        if absent and kind < 0.9:
            return self.choose.choice(self.template.beside[absent[0]])
        return self.choose.choice(self.keys_of_all)

    def stop_within(self, share=1.0):
        if self.choose.random() < self.stops * share:
            self.scheduler.wait_within(self.choose.randrange(self.choose.choice((6, 20))), self.choose.randint(1, 5))

    def get(self, task):
        key = self.some_key()
        task.doing = f"get {key!r}"
        self.stop_within()
        first = self.ledger.histories[key].floor
        self.ledger.judge(key, task.db.get(key), first)

    def contains(self, task):
        key = self.some_key()
        task.doing = f"look for {key!r}"
        self.stop_within()
        first = self.ledger.histories[key].floor
        self.ledger.judge_presence(key, key in task.db, first)

    def count(self, task):
        task.doing = "len"
        self.stop_within()
        floors = self.ledger.floors()
        unfinished = {key: values for changes in self.batches.values() for key, values in changes.items()}
        self.ledger.judge_count(len(task.db), floors, unfinished)

    def iterator(self, task):
        self.open(task, "r")
        for _ in range(self.choose.randrange(1, 4)):
            self.walk(task, values=self.choose.random() < 0.5)
            self.scheduler.pause(self.choose.randrange(1000))
        self.close(task)

    def walk(self, task, *, values):
        """A reader with a keydir of its own walks what was there when it began."""
        task.doing = "items" if values else "keys"
        start = floors = self.ledger.floors()
        met = set()
        for item in task.db.items() if values else task.db:
            key = item[0] if values else item
            assert key not in met, f"an iteration met {key!r} twice"
            met.add(key)
            self.stop_within(0.2)
            if values:
                self.ledger.judge(key, item[1], floors[key])
                floors = start if task.db._log.beside else self.ledger.floors()
            else:
                self.ledger.judge_presence(key, True, start[key])
        self.ledger.judge_walk(met, start)

    # What is left.

    def verify(self):
        if self.deaths and not self.comes_back:
            with dbm_bitcask.open(self.path, "r") as db:
                self.compare(db)
        self.compare_and_check()
        if self.rebuilds_at_end:
            (self.path / "keydir").unlink(missing_ok=True)
            self.compare_and_check()

    def compare_and_check(self):
        with dbm_bitcask.open(self.path, "w", segment_size=SEGMENT_SIZE) as db:
            self.compare(db)
        assert check(self.path) == []

    def compare(self, db):
        found = dict(db.items())
        expired = {key for key, history in self.ledger.histories.items() if history.has_expired}
        assert 0 <= len(db) - len(found) <= len(expired - found.keys())
        for changes in self.batches.values():
            self.ledger.judge_batch(changes, found.get)
        assert found.keys() <= self.ledger.histories.keys()
        for key, history in self.ledger.histories.items():
            self.ledger.judge(key, found.get(key), history.floor)
            assert db.get(key) == found.get(key)


def play(seed, place, templates, *, trace=False):
    """Run the schedule of a seed; what it was, and how it failed."""
    path = place / "schedule"
    schedule = Schedule(seed, path, templates, trace=trace)
    try:
        schedule.run()
    except Exception as failure:  # noqa: BLE001  (it is shown with what came before it)
        return schedule, failure
    except Hung as failure:
        return schedule, failure
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return schedule, None


def show(seed, schedule, failure):
    """What a failed seed did last, and how to see it again."""
    ended = "is right" if failure is None else f"fails: {type(failure).__name__}: {failure}"
    steps = [f"    {task:12} {what} {where}" for task, what, where in schedule.scheduler.trace[-SHOWN:]]
    replay = f"replay: pytest tests/test_schedules.py --schedule={seed}"
    head = f"schedule {seed}, of the template {schedule.kind!r}, {ended}\n{replay}\n"
    return "\n".join([head, f"the last of {len(schedule.scheduler.trace)} steps:", *steps])


def pytest_generate_tests(metafunc):
    if "seeds" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    if option("schedule") is not None:
        blocks = [range(option("schedule"), option("schedule") + 1)]
    else:
        count = option("schedules") or AMOUNTS[option("harness")]
        blocks = [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]
    metafunc.parametrize("seeds", blocks, ids=[f"{block[0]}-{block[-1]}" for block in blocks])


@pytest.fixture
def without_gc():
    """Nothing is collected in the middle of a schedule, and what was there before is not looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.harness
@pytest.mark.usefixtures("without_gc")
def test_every_answer_is_right_whatever_the_interleaving_and_whoever_dies(seeds, place, templates, request, capsys, tally):
    replayed = request.config.getoption("schedule") is not None
    for seed in seeds:
        if seed % 20 == 0:
            gc.collect()
        schedule, failure = play(seed, place, templates, trace=replayed)
        if failure is not None and not replayed:
            schedule, failure = play(seed, place, templates, trace=True)
        if failure is not None:
            raise AssertionError(show(seed, schedule, failure)) from failure
        if replayed:
            with capsys.disabled():
                print("\n" + show(seed, schedule, failure))
    tally("schedules", len(seeds))


# The scheduler itself.


def test_same_seed_gives_the_same_interleaving(tmp_path, templates):
    for seed in range(8):
        first, second = (play(seed, tmp_path, templates, trace=True)[0].scheduler.trace for _ in range(2))
        assert first == second
        assert len(first) > 500
        assert len({task for task, _, _ in first}) >= 5


def test_trace_does_not_change_the_interleaving(tmp_path, templates):
    for seed in range(20):
        traced, untraced = (play(seed, tmp_path, templates, trace=trace)[0].scheduler for trace in (True, False))
        assert (traced.now(), traced.switches) == (untraced.now(), untraced.switches)
        assert len(traced.trace) > untraced.taken() // 2


def steps_of(action, path, templates, flag):
    """What one process does in `action(db)`."""
    thaw(templates["small"].files, path)
    scheduler = Scheduler(0, trace=True)
    steps = []

    def program(task):
        task.db = dbm_bitcask.open(path, flag, segment_size=SEGMENT_SIZE)
        action(task.db)
        start = len(scheduler.trace)
        action(task.db)
        steps.extend((what, where) for _, what, where in scheduler.trace[start:])
        task.db.close()

    with pytest.MonkeyPatch.context() as patch:
        scheduler.install(patch)
        scheduler.spawn("one", program)
        scheduler.run()
    return steps


def test_each_access_of_a_get_is_a_step(tmp_path, templates):
    steps = steps_of(lambda db: db.get(b"absent"), tmp_path / "db", templates, "r")
    assert steps[1] == ("load", "EPOCH")
    assert ("load", "EPOCH") in steps[2:]
    assert steps[0] == steps[-2]
    assert steps[0][1].endswith("of page 2"), "the entry of the directory, before and after"
    assert any(where.endswith("of page 4") for _, where in steps), "a slot"


def test_each_access_of_a_set_of_a_new_key_is_a_step(tmp_path, templates):
    keys = iter(numbered(b"of a length", 4))
    steps = steps_of(lambda db: db.__setitem__(next(keys), b"value"), tmp_path / "db", templates, "w")
    names = [f"{what} {where}" for what, where in steps]
    active = next(where for what, where in steps if what == "write")
    order = ["lock ", "load EPOCH", "load STATE", f"lseek {active}", f"write {active}", f"write the rest of {active}"]
    places = [names.index(name) for name in [*order, "store CURRENT", "unlock "]]
    assert places == sorted(places)
    assert sum(what == "store" for what, _ in steps) == 2 + 7 + 3 + 1, "holder, counters, slot, and CURRENT"


def test_schedules_kill_split_and_rebuild(tmp_path, templates, monkeypatch):
    counts = collections.Counter()
    for owner, name in COUNTED:
        monkeypatch.setattr(owner, name, counting(counts, name, getattr(owner, name)))
    for seed in range(100):
        schedule, failure = play(seed, tmp_path, templates)
        assert failure is None
        counts["killed"] += schedule.deaths > 0
    assert 35 <= counts["killed"] <= 65
    assert all(counts[name] >= 5 for _, name in COUNTED), counts


COUNTED = [
    (keydir.Keydir, "split"),
    (keydir.Keydir, "_double"),
    (rotation, "rotate"),
    (rotation, "drop"),
    (recovery, "rebuild"),
    (recovery, "_repair"),
    (recovery, "open_private_keydir"),
]


def counting(counts, name, function):
    def counted(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


def test_schedule_that_does_not_end_is_a_failure_that_says_what_each_process_does(monkeypatch, tmp_path, templates):
    monkeypatch.setattr(keydir.Keydir, "counter", spin)
    _, failure = play(1, tmp_path, templates)
    assert isinstance(failure, Hung)
    assert "reader 1 (" in str(failure)
    assert "spin:" in str(failure)


def spin(held, _which):
    """Wait for what never comes."""
    while held.words[header.CURRENT]:
        pass
