"""One linear map by the kernel: what an encoder's time goes into, with weights of eight bits."""

from __future__ import annotations

import ctypes
import threading
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.engines.native.call import BLOCK, ONE_MAP, Team, matrix, padded
from synapse.engines.native.kernel import KERNEL, find
from synapse.engines.native.model import MOST_THREADS, cores
from synapse.engines.native.packed.packing import quantise_q8, unpack
from synapse.engines.native.structs import Inputs, Step
from synapse.hotpath.paths import hotpath
from synapse.hotpath.rollout.plan import Plan, Stage
from synapse.kernels.checks import load_found
from synapse.kernels.native import NativeSide
from synapse.kernels.structs import address

Array = NDArray[np.float32]
TOLERANCE = 1e-3
"""Largest distance of an answer from the reference's, as a share of its size: activations have 16 bits."""
PLAN: Plan = (Stage("full", share=1.0, compare=0.001, dwell=timedelta(days=30), min_samples=0),)
"""A build that has agreed in its burn-in answers everything; one call in a thousand is compared."""


class Int8Map:
    """A linear map whose weights have eight bits, a scale for each block of 32 inputs; the bias is float32."""

    def __init__(self, weight: Array, bias: Array, threads: int = 0) -> None:
        """Round a weight, float32[out, in], with a bias, float32[out]. So many threads compute, 0: one per core."""
        self.threads = threads
        self.shape = (weight.shape[0], weight.shape[1])
        self.records = np.ascontiguousarray(quantise_q8(weight)).view(np.uint8).reshape(-1)
        self.bias = np.zeros(padded(len(bias)), np.float32)
        self.bias[: len(bias)] = bias

    @cached_property
    def weight(self) -> Array:
        """The weights in float32, for the reference."""
        return unpack("q8", self.records, self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "weight"}

    def __call__(self, x: Array) -> Array:
        """x, float32[rows, in], becomes a fresh float32[rows, out]."""
        return apply(self, x)


class Mapper:
    """The threads and scratch memory that the maps of a process share. They come one at a time."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._team = Team(library, threads, 0)
        self._lock = threading.Lock()
        self._rows = self._width = 0
        self._codes, self._scales = np.empty((0, 0), np.int16), np.empty((0, 0), np.float32)

    def apply(self, linear: Int8Map, x: Array) -> Array:
        """The map of x, float32[rows, in]."""
        rows, width = x.shape
        out = linear.shape[0]
        if padded(width) != width:
            x = np.pad(x, ((0, 0), (0, padded(width) - width)))
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((rows, padded(out)), np.float32)
        with self._lock:
            self._make_room(rows, padded(width))
            step = Step(task=ONE_MAP, pool=self._team.address, rows=rows, x=address(x), h=address(y))
            step.inputs = Inputs(codes16=address(self._codes), scale16=address(self._scales))
            step.matrix = matrix(linear.records, "q8", linear.shape, address(linear.bias))
            self._team.run(step)
        return np.ascontiguousarray(y[:, :out])

    def _make_room(self, rows: int, width: int) -> None:
        if rows > self._rows or width > self._width:
            self._rows, self._width = max(rows, self._rows), max(width, self._width)
            self._codes = np.empty((self._rows, self._width), np.int16)
            self._scales = np.empty((self._rows, self._width // BLOCK), np.float32)


@cache
def _mapper(library: ctypes.CDLL, threads: int) -> Mapper:
    return Mapper(library, threads)


def agrees(answer: Array, expected: Array) -> bool:
    """Whether a map's result is as good as the reference's."""
    if answer.shape != expected.shape:
        return False
    return float(np.linalg.norm(answer - expected)) <= TOLERANCE * max(float(np.linalg.norm(expected)), 1e-6)


def apply_native(library: ctypes.CDLL, linear: Int8Map, x: Array) -> Array:
    """A map by the kernel."""
    return _mapper(library, min(linear.threads or cores(), MOST_THREADS)).apply(linear, x)


def bind(path: Path) -> Any:
    """The native map from a library.

    Raises:
        KernelRefused, Unavailable: it does not pass its checks, or they could not be made.
    """
    return partial(apply_native, load_found(KERNEL, path))


def examples() -> list[tuple[Int8Map, Array]]:
    """Maps of several shapes, none of them a multiple of 32."""
    random = np.random.default_rng(7)
    shapes = ((1, 40, 24), (5, 72, 100), (33, 24, 40))
    return [
        (
            Int8Map(random.standard_normal((out, width), np.float32), random.standard_normal(out, np.float32)),
            random.standard_normal((rows, width), np.float32),
        )
        for rows, width, out in shapes
    ]


@hotpath("encoder_linear", kernel=NativeSide(find, bind), agrees=agrees, plan=PLAN, burn_in=examples)
def apply(linear: Int8Map, x: Array) -> Array:
    """x, float32[rows, in], becomes a fresh float32[rows, out]."""
    y: Array = x @ linear.weight.T
    y += linear.bias[: linear.shape[0]]
    return y
