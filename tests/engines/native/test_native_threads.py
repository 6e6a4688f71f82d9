"""The kernel's threads: late ones do no harm, none waits for ever, and all go home."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.native_engine import by_kernel, engine_build, feed, new_cache, pieces, some_tokens, tiny_native
from synapse.engines.native.model import NativeModel
from synapse.errors import Unavailable

Closing = Callable[[NativeModel], NativeModel]

STEPS = """
import os, sys, threading
import numpy as np
from support.native_engine import by_kernel, feed, new_cache, pieces, some_tokens, tiny_native

core, turns = int(sys.argv[1]), int(sys.argv[2])
teams, *batches = [eval(lengths) for lengths in sys.argv[3:]]
if core >= 0:
    os.sched_setaffinity(0, {core})
shape = dict(kind="q4", heads=1, kv_heads=1, hidden=40, intermediate=33, vocab=12000)

def answers(model, turn):
    lengths = batches[turn % len(batches)]
    tokens = [some_tokens(model.packed.config, length, n) for n, length in enumerate(lengths)]
    sequences = [pieces(ids, [2 * n + 1, 2 * n], (1, 1, 5)) for n, ids in enumerate(tokens)]
    return np.concatenate(feed(by_kernel(model), new_cache(model, 48), *sequences))

def work(number):
    model = tiny_native(threads=number, **shape)
    for turn in range(turns):
        right[number] += np.array_equal(answers(model, turn), expected[turn % len(batches)])
    model.close()

alone = tiny_native(threads=1, **shape)
expected = [answers(alone, turn) for turn in range(len(batches))]
right = dict.fromkeys(teams, 0)
threads = [threading.Thread(target=work, args=(number,)) for number in right]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(right)
"""
LATE_SLEEPER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <time.h>
#include <sys/syscall.h>
/* A thread that has decided to sleep loses its core before it does. */
long syscall(long number, ...) {
    static long (*next)(long, ...);
    static int calls;
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_futex && (a[1] & 127) == 0) {
        struct timespec moment = {0, 50000 * (calls++ % 8)};
        nanosleep(&moment, 0);
    }
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


def run_steps(core: int, turns: int, teams: tuple[int, ...], *batches: tuple[int, ...], **environment: str) -> None:
    """Compute batches of sequences of these lengths in a process of its own: what goes wrong is a crash, or no end.

    Each of the teams, of so many threads, has its model, and they all compute at once.
    """
    engine_build()
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *map(str, (core, turns, teams, *batches))],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    right = dict.fromkeys(teams, turns)
    assert (done.returncode, done.stdout.strip()) == (0, str(right)), done.stderr[-2000:]


@pytest.mark.parametrize("core", [-1, 0])
def test_threads_that_lose_their_core_at_any_moment_change_nothing(core: int) -> None:
    """With one core for all of them, most are late for most of what there is to do."""
    if core >= 0 and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not tie a process to a core")
    run_steps(min(os.sched_getaffinity(0)) if core >= 0 else core, 60, (2, 3, 5), (3,), (61, 33, 9), (1,) * 24)


def test_a_thread_that_is_slow_to_fall_asleep_is_not_left_asleep(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler (cc) for what delays a thread, or this is not Linux")
    source, library = tmp_path / "late.c", tmp_path / "late.so"
    source.write_text(LATE_SLEEPER)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    run_steps(-1, 1500, (2,), (1,), LD_PRELOAD=str(library))


def test_closing_sends_every_thread_home_and_a_step_after_it_is_refused() -> None:
    before, model = threading.active_count(), tiny_native(threads=4)
    sequence = pieces(some_tokens(model.packed.config, 3), [0])
    feed(by_kernel(model), new_cache(model, 1), sequence)
    assert threading.active_count() == before + 3
    model.close()
    assert threading.active_count() == before
    with pytest.raises(Unavailable, match="the engine is closed"):
        feed(by_kernel(model), new_cache(model, 1), sequence)
    model.close()


def test_a_model_that_is_forgotten_without_closing_leaves_no_thread_behind() -> None:
    gc.collect()
    before = threading.active_count()
    for _ in range(3):
        model = tiny_native(threads=3)
        feed(by_kernel(model), new_cache(model, 1), pieces(some_tokens(model.packed.config, 3), [0]))
    del model
    gc.collect()
    assert threading.active_count() == before


def test_models_of_two_threads_compute_at_once(close: Closing) -> None:
    """Two engines of one process, as a host has them."""
    found: list[list[bool]] = [[], []]
    models = [close(tiny_native(threads=2, seed=seed)) for seed in (0, 1)]

    def work(number: int) -> None:
        model = models[number]
        sequence = pieces(some_tokens(model.packed.config, 40, number), [1, 0], (30, 1))
        (expected,) = feed(by_kernel(model), new_cache(model, 2), sequence)
        for _ in range(60):
            (again,) = feed(by_kernel(model), new_cache(model, 2), sequence)
            found[number].append(np.array_equal(again, expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[True] * 60, [True] * 60]


def test_idle_threads_take_no_time(close: Closing) -> None:
    model = close(tiny_native(threads=4))
    feed(by_kernel(model), new_cache(model, 1), pieces(some_tokens(model.packed.config, 3), [0]))
    threading.Event().wait(0.1)
    before = os.times()
    threading.Event().wait(1.0)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.1
