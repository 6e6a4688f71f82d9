"""The kernel's own threads: how they wait for work, share it, and never wait for one that is not there.

The threads belong to the caller: each is inside one call of `engine_serve` for its whole life, so this library needs no
runtime. Between two jobs a thread spins for a moment and then sleeps in the system (a futex), so that an engine with
nothing to do costs nothing.

A job is a row of phases, and a phase a number of pieces. A phase is over when all of its pieces are done, whoever did
them: a thread that the system has taken the core away from delays the others only while it holds a piece. One that
comes late finds nothing to take in the phases that are over. So that it takes nothing of a later job either, counters
carry the number of the job, and older ones count as zero.
"""

from std.atomic import Atomic
from std.ffi import external_call
from std.sys import CompilationTarget, llvm_intrinsic

comptime Flag = Pointer[Int32, MutUntrackedOrigin]
comptime Counter = Pointer[Int64, MutUntrackedOrigin]

comptime SPINS_FOR_WORK = 20_000
"""Looks at the flag before a thread without work goes to sleep: a fraction of a millisecond."""
comptime SPINS_FOR_OTHERS = 2_000
"""Looks at a phase that others are finishing before a thread sleeps: its core may be what they need."""
comptime FUTEX = 202 if CompilationTarget.is_x86() else 98
comptime FUTEX_WAIT = 128
comptime FUTEX_WAKE = 129
comptime EVERYBODY = 0x7FFF_FFFF
comptime FOR_EVER = 0
comptime LINE = 8  # counters of a cache line: those of a phase share one


@fieldwise_init
struct Pool(Copyable, Movable):
    """What the threads of one engine share. Each flag has a cache line of its own."""

    var threads: Int
    var jobs: Flag  # twice the number of jobs there have been, one more while the next is written; a futex
    var sleeping: Flag  # threads asleep until there is a job
    var stop: Flag
    var waiting: Flag  # threads asleep until a phase is over
    var limit: Int  # the address of a timespec: how long a thread sleeps before it looks again whether a phase is over
    var step: Int  # the address of a copy of the job, which outlives it
    var phases: Counter  # [phases, LINE]: pieces taken, pieces done, each below the number of its job


@always_inline
def pause():
    """Tells the core that this is a loop that waits."""
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType]()


@always_inline
def look(flag: Flag) -> Int32:
    return Atomic[Int32].load(flag)


def sleep(flag: Flag, value: Int32, sleepers: Flag, limit: Int):
    """Sleeps until the flag has another value than this, and at most for `limit` (the address of a timespec); may return
    early. Whoever changes the flag looks at `sleepers` afterwards, and this sets it before the system compares the flag: one of
    the two sees the other.
    """
    _ = Atomic[Int32].fetch_add(sleepers, Int32(1))
    _ = external_call["syscall", Int](Int(FUTEX), flag, Int(FUTEX_WAIT), Int(value), limit, Int(0), Int(0))
    _ = Atomic[Int32].fetch_add(sleepers, Int32(-1))


def wake(flag: Flag):
    """Wakes all who sleep until this flag changes."""
    _ = external_call["syscall", Int](Int(FUTEX), flag, Int(FUTEX_WAKE), Int(EVERYBODY), Int(0), Int(0), Int(0))


def wait_for_job(pool: Pool, seen: Int32) -> Int32:
    """Returns when there is another job than the one numbered `seen`, with its number."""
    var spins = 0
    while True:
        var number = look(pool.jobs)
        if number != seen and number % 2 == 0:
            return number
        spins += 1
        if spins < SPINS_FOR_WORK:
            pause()
        else:
            sleep(pool.jobs, number, pool.sleeping, FOR_EVER)


def begin_job(pool: Pool):
    """From here on nobody may read the job: it is being written."""
    _ = Atomic[Int32].fetch_add(pool.jobs, Int32(1))


def announce_job(pool: Pool) -> Int32:
    """Sets the other threads to work. Returns the number of the job."""
    var number = Atomic[Int32].fetch_add(pool.jobs, Int32(1)) + 1
    if look(pool.sleeping) != 0:
        wake(pool.jobs)
    return number


@always_inline
def is_current(pool: Pool, number: Int32) -> Bool:
    """Whether the job of this number is still the one that can be read. What was read before is then whole."""
    return Atomic[Int32].fetch_add(pool.jobs, Int32(0)) == number


@fieldwise_init
struct Work(Copyable, Movable):
    """One thread's part in one job."""

    var pool: Pointer[Pool, MutUntrackedOrigin]
    var job: Int32
    var thread: Int

    @always_inline
    def threads(self) -> Int:
        return self.pool[].threads

    @always_inline
    def stamped(self, count: Int) -> Int64:
        """A counter of this job."""
        return Int64(Int(self.job)) << 32 | Int64(count)

    @always_inline
    def take(self, phase: Int, pieces: Int) -> Int:
        """The number of the next piece of a phase, which no other thread has; -1 when all are taken."""
        var counter = self.pool[].phases.unsafe_offset(phase * LINE)
        var found = Atomic[Int64].load(counter)
        while True:
            var number = 0
            if Int32(found >> 32) == self.job:
                number = Int(found & 0xFFFF_FFFF)
            elif Int32(found >> 32) - self.job > 0:
                return -1  # a later job: this one is over
            if number >= pieces:
                return -1
            if Atomic[Int64].compare_exchange(counter, found, self.stamped(number + 1)):
                return number

    @always_inline
    def done(self, phase: Int):
        """A piece that was taken is done."""
        var counter = self.pool[].phases.unsafe_offset(phase * LINE + 1)
        var found = Atomic[Int64].load(counter)
        while True:
            var count = Int(found & 0xFFFF_FFFF) if Int32(found >> 32) == self.job else 0
            if Atomic[Int64].compare_exchange(counter, found, self.stamped(count + 1)):
                break
        if look(self.pool[].waiting) != 0:
            wake(Flag(unsafe_from_address=Int(counter)))

    @always_inline
    def wait(self, phase: Int, pieces: Int):
        """Returns when every piece of a phase is done: what others wrote in it can be read."""
        var counter = self.pool[].phases.unsafe_offset(phase * LINE + 1)
        var spins = 0
        while pieces > 0:
            var found = Atomic[Int64].load(counter)
            if found == self.stamped(pieces) or Int32(found >> 32) - self.job > 0:
                return
            spins += 1
            if spins < SPINS_FOR_OTHERS:
                pause()
            else:  # The lower half is what a sleeper watches. It may get the same value in a later job: hence the limit.
                var word = Flag(unsafe_from_address=Int(counter))
                sleep(word, Int32(found & 0xFFFF_FFFF), self.pool[].waiting, self.pool[].limit)
