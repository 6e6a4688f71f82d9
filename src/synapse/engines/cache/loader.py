"""Reads LoRA layers beside the engine, in a thread of low priority."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from synapse.errors import Unavailable

T = TypeVar("T")

NICENESS = 10
"""Where threads have their own: the kernel's threads, which use all cores, go before a layer that is being packed."""


class LayerLoader(Generic[T]):
    """Reads one folder after another, each once however many ask for it meanwhile.

    The thread ends when there is nothing left to read, so an engine that is dropped leaves none behind.
    """

    def __init__(self, read: Callable[[Path], T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._queue: OrderedDict[Path, Future[T]] = OrderedDict()
        self._current: tuple[Path, Future[T]] | None = None
        self._thread: threading.Thread | None = None

    def load(self, path: Path) -> Future[T]:
        """What `read` will return, or raise, for a folder. It is shared: nobody may cancel it. Any thread may ask."""
        with self._lock:
            if self._current is not None and self._current[0] == path:
                return self._current[1]
            if path not in self._queue:
                self._queue[path] = Future()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="synapse-layers", daemon=True)
                self._thread.start()
            return self._queue[path]

    def close(self) -> None:
        """Finish what is being read and give up the rest."""
        with self._lock:
            given_up, self._queue = self._queue, OrderedDict()
            thread = self._thread
        for future in given_up.values():
            future.set_exception(Unavailable("the engine was stopped before the layer was read"))
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere it would be the priority of the whole process
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                self._current = path, future = self._queue.popitem(last=False)
            try:
                result = self._read(path)
            except BaseException as error:  # raised again by whoever waits for it
                failure: BaseException | None = error
            else:
                failure = None
            with self._lock:
                self._current = None
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
