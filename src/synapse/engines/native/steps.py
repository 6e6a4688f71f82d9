"""Who computes the steps of a native engine: the hot path `engine`, or the kernel alone."""

from __future__ import annotations

import ctypes
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

import numpy as np

from synapse.config import Settings
from synapse.engines.answering import NATIVE, Answering
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.examples import examples
from synapse.engines.native.kernel import KERNEL, agrees, bind, find, forward_native
from synapse.engines.native.model import NativeModel
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.errors import Unavailable
from synapse.hotpath.paths import PATHS, hotpath, ready, standing
from synapse.hotpath.rollout.plan import Plan, Stage
from synapse.kernels.cache import find_build
from synapse.kernels.checks import FOLDER, KernelRefused, has_passed, load_build
from synapse.kernels.native import NativeSide, python_forced

PATH = "engine"
COMPARED = 1e-5
"""Of the steps, how many are compared with the reference before their tokens are chosen: one takes it a second."""
PLAN: Plan = (Stage("full", share=1.0, compare=COMPARED, dwell=timedelta(days=30), min_samples=0),)
"""A build that has agreed in its burn-in answers every step: the reference is too slow to stand in for weeks."""


def _burn_in() -> list[tuple[Any, ...]]:
    return list(islice(examples(), 4))


@hotpath(PATH, kernel=NativeSide(find, bind), agrees=agrees, plan=PLAN, burn_in=_burn_in)
def forward(model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
    """One step: see `Transformer.forward`. Keys and values are written where the chunks say, whoever computes them.

    What the kernel has written for the same step is kept, in case its answer is the one that is given.
    """
    if model.computed is chunks:
        model.put_back = cache.keep(np.concatenate([chunk.slots() for chunk in chunks]))
    return model.reference.forward(chunks, cache)


class Steps(Protocol):
    """Who computes the steps of a native engine."""

    def forward(self, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
        """One step: see `Transformer.forward`."""
        ...

    def answering(self) -> Answering:
        """Which engine computes the steps now."""
        ...

    def check(self) -> None:
        """Raises `Unavailable` when the kernel does not answer in this process; the message says why."""
        ...


class Supervised:
    """Steps through the hot path: the kernel is watched, and the reference takes its place where it must.

    That takes a store, and for a new build a process in which it is tried.
    """

    def __init__(self, *, patient: bool = False) -> None:
        """Nothing is begun yet.

        Args:
            patient: be content with a kernel that is not ready yet, when that may change by itself (a store that is
                locked, a burn-in that goes on): the reference computes the steps until then.
        """
        self._patient = patient

    def prepare(self) -> None:
        """Begin in the background what `check` waits for."""
        ready(PATH, timeout=0)

    def check(self) -> None:
        state = ready(PATH)
        if not state.native and (state.final or not self._patient):
            raise Unavailable(
                f"the native engine is not ready: {state.why}",
                hint=state.hint or "`synapse hotpath status` says how it stands",
            )

    def answering(self) -> Answering:
        """The reference computes, on the same weights, while it is not decided that the kernel can."""
        state = standing(PATH)
        return NATIVE if state.native else Answering("reference", state.why, state.hint)

    def forward(self, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
        answer = forward(model, chunks, cache)
        if model.put_back is not None and PATHS[PATH].native_answered:
            model.put_back()
        return answer


class Unsupervised:
    """Steps by the kernel alone, for a program that opens one engine: no store is opened and no process started.

    Only a build that has passed its checks before is used, which `synapse kernels build` and a server see to.
    """

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened yet. The settings say where the kernels are."""
        self._settings = settings
        self._library: ctypes.CDLL | None = None

    def check(self) -> None:
        if python_forced():
            raise Unavailable("Python is forced", hint="unset SYNAPSE_FORCE_PYTHON")
        folder = self._settings.home / FOLDER
        try:
            build = find_build(KERNEL, self._settings)
            if build is not None and has_passed(KERNEL, build, folder):
                self._library = load_build(KERNEL, build, folder)
                return
        except KernelRefused as error:
            raise Unavailable(error.message, hint=error.hint) from error
        why = "is not built" if build is None else "has not passed its checks on this machine yet"
        raise Unavailable(f"the kernel {KERNEL.name} {why}", hint=f"synapse kernels build {KERNEL.name}")

    def answering(self) -> Answering:
        return NATIVE

    def forward(self, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
        assert self._library is not None  # noqa: S101 (`check` comes first)
        return forward_native(self._library, model, chunks, cache)
