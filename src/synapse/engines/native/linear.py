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

from synapse.engines.native.call import (
    BLOCK,
    FIRST_SCRATCH,
    KINDS,
    ONE_MAP,
    SCRATCH,
    STEP_FIELDS,
    Team,
    address,
    padded,
)
from synapse.engines.native.kernel import KERNEL, find
from synapse.engines.native.layers import GROUP
from synapse.engines.native.model import MOST_THREADS, cores
from synapse.engines.native.packed.packing import quantise_q8, unpack
from synapse.hotpath.paths import hotpath
from synapse.hotpath.rollout.plan import Plan, Stage
from synapse.kernels.checks import load_found
from synapse.kernels.native import NativeSide

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
        self._arrays: dict[str, NDArray[Any]] = {}

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
            fields = np.zeros(STEP_FIELDS, np.int64)
            fields[0], fields[2], fields[3] = ONE_MAP, self._team.address, rows
            places = {"x": x, "h": y, **self._arrays}
            for index, name in enumerate(SCRATCH):
                if name in places:
                    fields[FIRST_SCRATCH + index] = address(places[name])
            matrix = FIRST_SCRATCH + len(SCRATCH)
            fields[matrix : matrix + 6] = (
                *(address(linear.records), KINDS["q8"], padded(out) // GROUP, padded(width) // BLOCK),
                *(address(linear.bias), 1),
            )
            self._team.run(address(fields))
        return np.ascontiguousarray(y[:, :out])

    def _make_room(self, rows: int, width: int) -> None:
        if rows > self._rows or width > self._width:
            self._rows, self._width = max(rows, self._rows), max(width, self._width)
            self._arrays = {
                "codes16": np.empty((self._rows, self._width), np.int16),
                "scale16": np.empty((self._rows, self._width // BLOCK), np.float32),
            }


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
