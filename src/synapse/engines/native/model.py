"""A packed model with what the kernel needs to compute with it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence

from synapse.engines.native.cache import HalfCache
from synapse.engines.native.call import LANES, ModelTable, Team, Workspace
from synapse.engines.native.packed.file import PackedModel
from synapse.engines.reference.transformer import Chunk, ReferenceTransformer, StepLogits
from synapse.engines.reference.weights import packed_weights
from synapse.errors import Unavailable
from synapse.models.config import ModelConfig

MOST_THREADS = 64


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeModel:
    """Packed weights, and the threads and scratch memory that compute with them once the kernel is there.

    Steps of one model come one at a time. It is sent to the child of a burn-in as its weights and settings only.

    Attributes:
        computed: the chunks of the kernel's last step, until `forget`.
        put_back: writes the keys and values of that step into the cache again, after the reference has replaced them.
    """

    def __init__(self, packed: PackedModel, context: int, threads: int = 0) -> None:
        """A model ready for steps.

        Args:
            context: longest sequence, in tokens.
            threads: that compute a step; 0 means one per core.

        Raises:
            Unavailable: the kernel cannot run a model of this shape.
        """
        check_shape(packed.config)
        self.packed = packed
        self.context = context
        self.threads = min(threads or cores(), MOST_THREADS)
        self.reference = ReferenceTransformer(packed_weights(packed), context)
        self._table = ModelTable(packed, self.reference.cos, self.reference.sin)
        self._lock = threading.Lock()
        self._workspace: Workspace | None = None
        self._team: Team | None = None
        self._closed = False
        self.computed: Sequence[Chunk] | None = None
        self.put_back: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[NativeModel], tuple[PackedModel, int, int]]:
        return NativeModel, (self.packed, self.context, self.threads)

    def compute(self, library: ctypes.CDLL, chunks: Sequence[Chunk], cache: HalfCache) -> StepLogits:
        """One step by the kernel. The result is valid until the next one.

        Raises:
            Unavailable: the model is closed.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the engine is closed")
            if self._team is None or self._workspace is None or self._team.library is not library:
                if self._team is not None:
                    self._team.close()
                self._team = Team(library, self.threads, self.packed.config.blocks, self._table)
                self._workspace = Workspace(self._table, self._team)
            answer = self._workspace.compute(chunks, cache)
            self.computed = chunks
            return answer

    def forget(self) -> None:
        """Let go of the last step, and of the layers in it."""
        self.computed = self.put_back = None

    @property
    def scratch_bytes(self) -> int:
        """Memory of the scratch arrays."""
        return self._workspace.bytes if self._workspace is not None else 0

    def close(self) -> None:
        """Send the threads home and let go of the weights. Waits for a step that is under way."""
        with self._lock:
            self._closed = True
            if self._team is not None:
                self._team.close()
            self._team = self._workspace = None
            self.packed.close()


def check_shape(config: ModelConfig) -> None:
    """Refuse what the kernel cannot run.

    Raises:
        Unavailable: says what is expected and what was found.
    """
    if config.head_dim % LANES:
        raise Unavailable(
            f"the native engine needs heads of a multiple of {LANES} dimensions; this model's have {config.head_dim}",
            hint="use the backend reference",
        )
