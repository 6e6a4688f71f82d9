"""The kernel `engine`: where it is, how it is opened, and what it must pass."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.engines.choice import UNDECIDED, Choice
from synapse.engines.native.cache import HalfCache
from synapse.engines.native.call import choice_fields
from synapse.engines.native.examples import choice_examples, examples
from synapse.engines.native.model import NativeModel
from synapse.engines.native.structs import STRUCTS
from synapse.engines.reference.transformer import Chunk, StepLogits
from synapse.engines.sampling import choose
from synapse.kernels.cache import found_build
from synapse.kernels.checks import load_found
from synapse.kernels.native import FoundBuild
from synapse.kernels.spec import KernelSpec
from synapse.kernels.structs import address

TOLERANCE = 0.6
"""Largest distance of a row of logits from the reference's, as a share of the spread of the reference's row.

The reference computes with the same weights; what differs are activations of 8 bits (of 16 for 8-bit weights) and the
order of sums. On the default model the distance is 0.05 on average and up to 0.23 where activations have outliers; of
rows that have nothing to do with one another it is 1.4.
"""
ROUGH_TOLERANCE = 0.1
"""The same for the small models of the self-test, which have no outliers."""
MOST_UNDECIDED = 0.5
"""Largest share of the choices of a step of the self-test that the kernel may leave to the reference."""
FINE_TOLERANCE = 0.02
"""The same where all weights are of 8 bits; what a layer's factors of 8 bits read, of 8 bits too, is most of it."""


class Forward(Protocol):
    """The signature of the hot path."""

    def __call__(self, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits: ...


def distance(answer: StepLogits, expected: StepLogits) -> float:
    """The largest distance of two rows, as a share of the spread of the second. Rows that are not finite must match."""
    if answer.values.shape != expected.values.shape or not np.array_equal(answer.finite, expected.finite):
        return float("inf")
    found, wanted = answer.values[answer.finite], expected.values[answer.finite]
    if not len(found):
        return 0.0
    spread = np.linalg.norm(wanted - wanted.mean(axis=1, keepdims=True), axis=1)
    return float((np.linalg.norm(found - wanted, axis=1) / np.maximum(spread, 1e-6)).max())


def agrees(answer: StepLogits, expected: StepLogits) -> bool:
    """Whether a step's logits are as good as the reference's."""
    return distance(answer, expected) <= TOLERANCE


def forward_native(library: ctypes.CDLL, model: NativeModel, chunks: tuple[Chunk, ...], cache: HalfCache) -> StepLogits:
    """A step by the kernel."""
    return model.compute(library, chunks, cache)


def choose_native(library: ctypes.CDLL, logits: NDArray[np.float32], choice: Choice) -> int:
    """The next token of a row of finite logits by the kernel; UNDECIDED where it leaves that to the reference."""
    vocab = len(logits)
    room = np.zeros(library.engine_choice_room(vocab), np.uint8)
    fields = choice_fields(choice)
    token: int = library.engine_choose(address(logits), vocab, ctypes.addressof(fields), address(room))
    return token


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the kernel's functions take; all return 0."""
    library.engine_serve.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.engine_choice_room.restype, library.engine_choice_room.argtypes = ctypes.c_int64, [ctypes.c_int64]
    library.engine_choose.restype, library.engine_choose.argtypes = ctypes.c_int64, [ctypes.c_int64] * 4
    library.engine_step.argtypes = library.engine_stop.argtypes = [ctypes.c_int64]


def self_test(library: ctypes.CDLL) -> None:
    """Compare the kernel with the reference on small models.

    Raises:
        AssertionError: the answers differ, or the tokens that it chooses.
    """
    for threads in (1, 2):
        for model, chunks, cache in examples(threads):
            answer, expected = forward_native(library, model, chunks, cache), model.reference.forward(chunks, cache)
            _check(model, chunks, answer, expected)
    rows, choices = zip(*choice_examples(), strict=True)
    found = [choose_native(library, row, choice) for row, choice in zip(rows, choices, strict=True)]
    _check_choices(rows, found, choices)


def _check(model: NativeModel, chunks: tuple[Chunk, ...], answer: StepLogits, expected: StepLogits) -> None:
    found, exact = distance(answer, expected), model.packed.kind("token_embd.weight") == "q8"
    if not found <= (FINE_TOLERANCE if exact else ROUGH_TOLERANCE):
        raise AssertionError(f"logits of {model.packed.config.architecture} are off by {found:.3g}")
    _check_choices(answer.values, answer.chosen.tolist(), [choice for chunk in chunks for choice in chunk.choices])


def _check_choices(rows: Iterable[NDArray[np.float32]], found: Sequence[int], choices: Iterable[Choice]) -> None:
    for row, token, choice in zip(rows, found, choices, strict=True):
        if token not in (UNDECIDED, choose(row, choice)):
            raise AssertionError(f"another token than the reference by {choice}")
    if found.count(UNDECIDED) > MOST_UNDECIDED * len(found):
        raise AssertionError("most choices are left to the reference")


def find() -> FoundBuild:
    """The build of this machine.

    Raises:
        NotFound: there is none.
    """
    return found_build(KERNEL)


def bind(path: Path) -> Forward:
    """The native step from a library.

    Raises:
        KernelRefused, Unavailable: it does not pass its checks, or they could not be made.
    """
    return partial(forward_native, load_found(KERNEL, path))


KERNEL = KernelSpec(
    name="engine",
    source=Path(__file__).with_name("engine.mojo"),
    symbols=tuple(
        f"engine_{name}"
        for name in ("abi_version", "cpu_features", "struct_size", "choice_room", "choose", "step", "serve", "stop")
    ),
    abi_version=4,
    structs=STRUCTS,
    self_test=self_test,
    declare=declare,
)
