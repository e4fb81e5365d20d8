"""Many processes in one thread, interleaved at every access to a file or to a shared word, as a seed says.

Each process is a greenlet with handles of its own. Before every load, store and system call it may be made to wait while others go on.
Nothing but the seed decides who goes on and for how long, so that a seed always gives the same interleaving.

The lock is the real one: every handle has its own description of the directory, which flock keeps apart in one process, too. Who finds
it taken waits until somebody has let it go. A process that is killed stops before one of its changes: whatever it would still do raises
`Died`, and its lock is dropped, as the kernel does it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import random
import secrets
import traceback
from typing import TYPE_CHECKING

from greenlet import getcurrent, greenlet

from crashes import Counters, Died, abandon
from dbm_bitcask.engine import files, header, keydir, log, page, recovery, rotation, store, write
from dbm_bitcask.engine.lock import WriterLock

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    import dbm_bitcask

__all__ = ["Hung", "Scheduler", "Task"]

LONGEST = 200_000  # steps: more than any schedule takes
_SLICES = (1, 2, 5, 20, 100)  # mean number of steps until another process goes on
_STALLS = (math.inf, 100, 500, 2000)  # mean number of steps between two times that a process falls behind
_DELAYS = (100, 400, 2000, 10_000)  # and for how many steps, on the average
_ENTRIES_A_CHANGE = 64  # so many stores of the directory are as good a moment to die as one of another word

_map_words = keydir.map_words
_xxh3 = page.xxh3_64_intdigest
_HEADER = {number: name for name, number in vars(header).items() if name.isupper() and isinstance(number, int) and number < 64}
_HEADER |= {getattr(header, name): name for name in ("MAGIC", "STATE", "EPOCH", "CURRENT", "SEED", "DEVICE", "INODE")}


class Hung(BaseException):
    """A schedule that does not end."""


class Task:
    """One process."""

    def __init__(self, name: str, program: Callable[[Task], None]) -> None:
        self.name = name
        self.program = program
        self.doing = "nothing yet"
        self.dead = False
        self.lives = math.inf  # changes that it still makes before it is killed
        self.fuse: str | None = None  # the kind of a change behind which it makes so many more
        self.fuse_length = 0
        self.wake = 0  # the step before which it is not to go on
        self.patience = 0  # operations of others that it is to wait for when its turn ends
        self.patient_until = 0  # how often a lock has to be let go before it goes on, if others can
        self.blocked_at = -1  # how often a lock had been let go when it found its own taken
        self.locked: set[int] = set()  # descriptors that have the lock
        self.db: dbm_bitcask.Database
        self.greenlet: greenlet

    def __repr__(self) -> str:
        return f"{self.name} ({self.doing})"


class Scheduler:
    """Says who goes on. `left` is how many steps the current task still has before it is asked."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.choose = random.Random(seed)
        self.mean = self.choose.choice(_SLICES)
        self.slices = [int(self.choose.expovariate(1 / self.mean)) for _ in range(64)]
        self.stall, self.delay = self.choose.choice(_STALLS), self.choose.choice(_DELAYS)
        self.stalled = self.choose.choice(("", "", "reader", "iterator"))  # those whose names hold this fall behind
        self.trace: list[tuple[str, str, str]] | None = [] if trace else None
        self.names: dict[int, str] = {}  # of descriptors, for the trace
        self.main = getcurrent()
        self.nobody = self.current = Task("nobody", lambda _task: None)
        self.tasks: list[Task] = []
        self.ready: list[Task] = []
        self.died: Callable[[Task], None] = lambda _task: None
        self.failure: BaseException | None = None
        self.unlocks = 0
        self.steps = 0
        self.switches = 0
        self._skipped = 0  # steps in which nobody did anything
        self.left = self._granted = self._traced_left = 0
        self._stall_at = self.choose.expovariate(1 / self.stall) if self.stall < math.inf else math.inf
        self._look_at = 0.0  # the step at which the list of those who are ready has to be made anew

    # Tasks.

    def spawn(self, name: str, program: Callable[[Task], None], *, after: int = 0) -> Task:
        """Another process, that starts so many steps from now."""
        task = Task(name, program)
        task.greenlet = greenlet(lambda: self._run(task), parent=self.main)
        task.wake = self.now() + after
        self.tasks.append(task)
        self._look_at = 0
        return task

    def _run(self, task: Task) -> None:
        try:
            if not task.dead:
                task.program(task)
        except Died:
            pass
        except BaseException as failure:  # noqa: BLE001  (it is raised where all of them were started)
            self.failure = self.failure or failure
        if task.dead and hasattr(task, "db"):
            abandon(task.db)
        self.tasks.remove(task)
        self._look_at = 0

    def run(self) -> None:
        """Until every process has come to its end; the first failure of one is raised."""
        try:
            while self.tasks and self.failure is None:
                self.steps = self.now()
                self._go_on(self._next())
        finally:
            for task in list(self.tasks):
                task.dead = True
                while not task.greenlet.dead:
                    self._go_on(task)
            self.current = self.nobody
            self.steps = self.now()
            self.left = self._granted = self._traced_left = 0
        if self.failure is not None:
            raise self.failure

    def now(self) -> int:
        """The number of steps so far."""
        return self.steps + self._granted - (self.left if self.trace is None else self._traced_left)

    def taken(self) -> int:
        """The same, without those in which all of them did nothing."""
        return self.now() - self._skipped

    def _next(self) -> Task:
        """Whose turn it is, and for how long."""
        if self.steps >= self._look_at:
            self._find_ready()
        number, part = divmod(self.choose.random() * len(self.ready), 1)
        granted = self.slices[int(part * 64)]
        self._granted = self._traced_left = granted
        self.left = granted if self.trace is None else 0
        return self.ready[int(number)]

    def _find_ready(self) -> None:
        free = [task for task in self.tasks if task.blocked_at != self.unlocks and task.patient_until <= self.unlocks]
        if not free:
            free = [task for task in self.tasks if task.blocked_at != self.unlocks]
        if not free:
            free = self.tasks  # somebody has closed the descriptor of a lock, or they wait for each other
        awake = [task for task in free if task.wake <= self.steps]
        if not awake:
            earliest = min(task.wake for task in free)
            self._skipped += earliest - self.steps
            self.steps = earliest
            awake = [task for task in free if task.wake <= self.steps]
        self.ready = awake
        self._look_at = min((task.wake for task in free if task.wake > self.steps), default=math.inf)

    def _go_on(self, task: Task) -> None:
        self.current = task
        self.switches += 1
        task.greenlet.switch()

    # What tasks call. `turn` only when `left` is below 0.

    def turn(self, what: str, where: object, words: Words | None = None) -> None:
        """The current task is about to do this; it may be made to wait."""
        task = self.current
        if task is self.nobody:
            self.left = 0
            return
        if self.trace is not None:
            self.left = 0
            self._traced_left -= 1
        if self.trace is None or self._traced_left < 0:
            if task.dead:
                raise Died
            self._let_others_go_on(task)
        if self.trace is None:
            return
        self.trace.append((task.name, what, words.describe(where) if words is not None else str(where)))

    def _let_others_go_on(self, task: Task) -> None:
        self.steps = self.now()
        if task.patience:
            task.patient_until, task.patience = self.unlocks + task.patience, 0
            self._look_at = 0
        elif self.steps >= self._stall_at and self.stalled in task.name:
            self._stall_at = self.steps + self.choose.expovariate(1 / self.stall)
            task.wake = self.steps + int(self.choose.expovariate(1 / self.delay))
            self._look_at = 0
        self._switch(task)

    def pause(self, steps: int) -> None:
        """Have the current task do nothing for so many steps."""
        task = self.current
        self.steps = self.now()
        task.wake = self.steps + steps
        self._look_at = 0
        self._switch(task)

    def wait_within(self, steps: int, operations: int) -> None:
        """Have the current task go on for so many steps, and there wait until others have ended so many operations."""
        self.steps = self.now()
        self._granted = self._traced_left = steps
        self.left = steps if self.trace is None else 0
        self.current.patience = operations

    def _switch(self, task: Task) -> None:
        if self.taken() > LONGEST:
            raise Hung(f"{self.taken()} steps, and no end:\n" + "\n".join(self.report()))
        chosen = self._next()
        if chosen is not task:
            self._go_on(chosen)
        if task.dead:
            raise Died

    def step(self, what: str, where: object) -> None:
        self.left -= 1
        if self.left < 0:
            self.turn(what, where)

    def change(self, what: str, where: object, words: Words | None = None, weight: float = 1) -> None:
        """The current task is about to change something that others see, unless this is where it dies."""
        self.left -= 1
        if self.left < 0:
            self.turn(what, where, words)
        task = self.current
        if what == task.fuse:
            task.lives, task.fuse = task.fuse_length, None
        task.lives -= weight
        if task.dead or task.lives < 0:
            self.kill(task)
            raise Died

    def kill(self, task: Task) -> None:
        """Nothing of a task takes effect any more, and its lock is free."""
        if task.dead:
            return
        task.dead = True
        task.wake, task.patient_until, task.blocked_at = 0, 0, -1
        for fd in task.locked:
            fcntl.flock(fd, fcntl.LOCK_UN)
        task.locked.clear()
        self.unlocks += 1
        self._look_at = 0
        if self.trace is not None:
            self.trace.append((task.name, "dies", task.doing))
        self.died(task)

    def flock(self, fd: int, how: int) -> None:
        task = self.current
        if how == fcntl.LOCK_UN:
            self.change("unlock", "")
            fcntl.flock(fd, how)
            task.locked.discard(fd)
            self.unlocks += 1
            self._look_at = 0
            return
        while True:
            self.step("lock", "")
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if how & fcntl.LOCK_NB:
                    raise
                assert task is not self.nobody, "the lock is held, and all processes have ended"
                self._wait_for_lock(task)
                continue
            task.locked.add(fd)
            return

    def _wait_for_lock(self, task: Task) -> None:
        self.steps = self.now()
        task.blocked_at = self.unlocks
        self._look_at = 0
        self._switch(task)
        task.blocked_at = -1

    def report(self) -> list[str]:
        """What every task does at this moment."""
        lines = []
        for task in self.tasks:
            frame = task.greenlet.gr_frame
            stack = traceback.extract_stack(frame)[-8:] if frame is not None else traceback.extract_stack()[-12:-4]
            places = " > ".join(f"{entry.name}:{entry.lineno}" for entry in stack)
            waits = "waits for the lock, " if task.blocked_at == self.unlocks else ""
            lines.append(f"{task}: {waits}{places}")
        return lines

    # Standing between the engine and what its processes share.

    def install_for_nobody(self, patch: pytest.MonkeyPatch) -> None:
        """The same where all processes have ended: words are bare then, and nothing has to stand between them and their checksums."""
        for module in (header, page):
            patch.setattr(module, "xxh3_64_intdigest", _xxh3)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have every access of the engine be a step, and nothing depend on anything but the seed."""
        chance = random.Random(self.choose.random())

        def map_words(file: files.File, size: int, *, write: bool) -> Words | memoryview:
            view = _map_words(file, size, write=write)
            return view if self.current is self.nobody else Words(view, self)

        for module in (keydir, recovery):
            patch.setattr(module, "map_words", map_words)
        for module in (header, page):
            patch.setattr(module, "xxh3_64_intdigest", _digest)
        for module in (write, rotation, log, store, recovery):
            patch.setattr(module, "time", lambda: 1e9)
        system = _System(self)
        patch.setattr(write, "_COUNTERS", Counters)
        patch.setattr(files, "os", system)
        patch.setattr(files, "_fdatasync", system.fsync)
        patch.setattr(files, "fcntl", _Fcntl(self))
        patch.setattr(files, "mmap", _Mmap(self))
        patch.setattr(files, "boot_id", lambda: 1)
        patch.setattr(files, "_remote_kind", lambda _device: None)
        patch.setattr(log, "lock_of", lambda directory, *, alone: WriterLock(directory, alone=alone))
        patch.setattr(secrets, "randbits", chance.getrandbits)
        patch.setattr(secrets, "token_hex", lambda size: f"{chance.getrandbits(8 * size):0{2 * size}x}")


class Words:
    """Shared words of which each load and each store is a step; in the middle of several, others may go on, or the task dies."""

    __slots__ = ("_scheduler", "_start", "_weight", "view")

    def __init__(self, view: memoryview, scheduler: Scheduler, start: int = 0, weight: float = 1) -> None:
        self.view = view
        self._scheduler = scheduler
        self._start = start
        self._weight = weight

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, where: int | slice) -> int | Words:
        if type(where) is slice:
            start = self._start + (where.start or 0)
            return Words(self.view[where], self._scheduler, start, 1 / _ENTRIES_A_CHANGE)
        scheduler = self._scheduler
        scheduler.left -= 1
        if scheduler.left < 0:
            scheduler.turn("load", where, self)
        return self.view[where]

    def __setitem__(self, where: int | slice, what: object) -> None:
        self._scheduler.change("store", where, self, self._weight)
        if type(where) is not slice:
            self.view[where] = what
            return
        target, source = self.view[where], memoryview(what.view if isinstance(what, Words) else what)
        half = len(target) // 2
        target[:half] = source[:half]
        self._scheduler.change("store the rest of", where, self)
        target[half:] = source[half:]

    def tolist(self) -> list[int]:
        first, second = self._halves()
        numbers = first.tolist()
        self._scheduler.step("load the rest of", "")
        return numbers + second.tolist()

    def tobytes(self) -> bytes:
        first, second = self._halves()
        data = first.tobytes()
        self._scheduler.step("load the rest of", "")
        return data + second.tobytes()

    def _halves(self) -> tuple[memoryview, memoryview]:
        half = len(self.view) // 2
        self._scheduler.left -= 1
        if self._scheduler.left < 0:
            self._scheduler.turn("load", slice(0, len(self.view)), self)
        return self.view[:half], self.view[half:]

    def describe(self, where: object) -> str:
        """A word as the format calls it."""
        if isinstance(where, slice):
            return f"words {self._start + (where.start or 0)} to {self._start + (where.stop or 0)}"
        assert isinstance(where, int)
        number = self._start + where
        if number < header.PAGE_WORDS:
            return _HEADER.get(number, f"word {number} of the header")
        return f"word {number % header.PAGE_WORDS} of page {number // header.PAGE_WORDS}"


def _digest(data: object, seed: int = 0) -> int:
    return _xxh3(data.tobytes() if isinstance(data, Words) else data, seed)


class _System:
    """The module `os`, of which each call that touches a file is a step; a write may be seen, or end, in its middle."""

    _LOOKS = ("fstat", "stat", "lstat", "lseek", "pread", "read")
    _CHANGES = ("replace", "unlink", "ftruncate", "posix_fallocate", "mkdir")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        for name in self._LOOKS:
            setattr(self, name, self._stepping(name, scheduler.step))
        for name in self._CHANGES:
            setattr(self, name, self._stepping(name, scheduler.change))

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _stepping(self, name: str, step: Callable[[str, object], None]) -> Callable[..., object]:
        call, names = getattr(os, name), self._scheduler.names

        def stepping(*args: object, **kwargs: object) -> object:
            step(name, names.get(args[0], args[0]))
            return call(*args, **kwargs)

        return stepping

    def open(self, name: str, flags: int, *args: int, **kwargs: int) -> int:
        step = self._scheduler.change if flags & os.O_CREAT else self._scheduler.step
        step("create" if flags & os.O_CREAT else "open", name)
        fd = os.open(name, flags, *args, **kwargs)
        self._scheduler.names[fd] = name.rpartition("/")[2]
        return fd

    def dup(self, fd: int) -> int:
        copy = os.dup(fd)
        self._scheduler.names[copy] = "a keydir of its own"
        return copy

    def listdir(self, fd: int) -> list[str]:
        self._scheduler.step("list", "")
        return sorted(os.listdir(fd))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        name = self._scheduler.names.get(fd, fd)
        self._scheduler.change("write", name)
        half = os.pwrite(fd, data[: len(data) // 2], offset)
        self._scheduler.change("write the rest of", name)
        return half + os.pwrite(fd, data[half:], offset + half)

    def pwritev(self, fd: int, parts: list[bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(parts), offset)

    def fsync(self, fd: int) -> None:
        """Takes no time: a kill does not ask what has reached the disk."""
        self._scheduler.change("sync", self._scheduler.names.get(fd, fd))


class _Fcntl:
    """The module `fcntl`, whose lock lets others go on while it waits."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.flock = scheduler.flock

    def __getattr__(self, name: str) -> object:
        return getattr(fcntl, name)


class _Mmap:
    """The module `mmap`: a map is a step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> object:
        return getattr(mmap, name)

    def mmap(self, fd: int, length: int, **kwargs: int) -> mmap.mmap:
        self._scheduler.step("map", self._scheduler.names.get(fd, fd))
        return mmap.mmap(fd, length, **kwargs)
