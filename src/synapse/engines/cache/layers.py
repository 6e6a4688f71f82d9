"""The LoRA layers in an engine's memory: read when they are needed, evicted when others need the room."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Set
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from synapse.callosum.publish.publishing import publish
from synapse.engines.cache.loader import LayerLoader
from synapse.engines.events import LayerInMemory
from synapse.engines.reference.lora import Layer
from synapse.errors import Conflict, Corrupt, NotFound
from synapse.models.adapters.adapter import Adapter, read_adapter
from synapse.models.config import ModelConfig

SETTLED_SECONDS = 2.0
"""A file that changed less than this before it was read may change once more with the same times."""


class LayerNotLoaded(NotFound):
    """A layer id that `load_layer` has not returned, or that was unloaded since."""

    code = "layer_not_loaded"


@dataclass(frozen=True, slots=True)
class Signature:
    """The files of a folder (name, size, times, inode) at some time: what tells that it has changed."""

    files: tuple[tuple[str, int, int, int, int], ...]
    taken: float

    def same_files(self, other: Signature) -> bool:
        return self.files == other.files

    @property
    def settled(self) -> bool:
        """Whether equal files mean equal contents."""
        latest = max((max(mtime, ctime) for _, _, mtime, ctime, _ in self.files), default=0)
        return self.taken - latest / 1e9 > SETTLED_SECONDS


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer that was read from a folder, as that was before it was read."""

    path: Path
    signature: Signature
    layer: Layer


class LayerCache:
    """Layers by id, least recently used first.

    A layer stays known by its folder after it was evicted, and is read from there again when it is asked for, beside
    the engine. Layers that sequences use are never evicted, so the limits can be exceeded for as long as they all are
    in use. Any thread may call `known`, `read` and `load`; the rest is for the engine's.
    """

    def __init__(
        self,
        config: ModelConfig,
        names: tuple[str, ...],
        prepare: Callable[[Adapter], Layer],
        *,
        max_layers: int,
        max_bytes: int,
    ) -> None:
        self._config = config
        self._prepare = prepare
        self._names = names
        self._max_layers = max_layers
        self._max_bytes = max_bytes
        self._folders: dict[Path, tuple[str, Signature]] = {}
        self._paths: dict[str, Path] = {}
        self._layers: OrderedDict[str, Layer] = OrderedDict()
        self._loader = LayerLoader(self.read)
        self._fetched: SimpleQueue[tuple[str, Future[LoadedLayer]]] = SimpleQueue()
        self._fetching: set[str] = set()
        self.on_fetched: Callable[[], None] = _nobody_waits
        """Called in the loader's thread when `take_fetched` has something to give."""
        self.reads = 0
        self.evictions = 0

    def sizes(self) -> dict[str, int]:
        """The layers in memory and their bytes, least recently used first."""
        return {layer.id: layer.bytes for layer in list(self._layers.values())}

    def known(self, path: Path) -> str | None:
        """The id of the layer in this folder, if it has been read and has not changed since."""
        layer_id, signature = self._folders.get(path, ("", None))
        if signature is None or layer_id not in self._paths or not signature.same_files(_signature(path)):
            return None
        return layer_id

    def read(self, path: Path) -> LoadedLayer:
        """Read and check a layer without keeping it. What has not changed since is not hashed again.

        Raises:
            LayerRefused, LayerCorrupt: the folder does not hold an adapter that fits the model.
        """
        signature = _signature(path)
        layer_id, before = self._folders.get(path, ("", None))
        sha256 = layer_id if before is not None and before.settled and before.same_files(signature) else None
        adapter = read_adapter(path, self._config, names=self._names, sha256=sha256)
        return LoadedLayer(path, signature, self._prepare(adapter))

    def load(self, path: Path) -> Future[LoadedLayer]:
        """As `read`, beside the caller, one folder after another. The future is shared: nobody may cancel it."""
        return self._loader.load(path)

    def put(self, loaded: LoadedLayer, *, in_use: Set[str]) -> None:
        """Keep a layer, and remember where it is."""
        self._paths[loaded.layer.id] = loaded.path
        self._folders[loaded.path] = (loaded.layer.id, loaded.signature)
        self._keep(loaded.layer, in_use)

    def get(self, layer_id: str) -> Layer | None:
        """A layer by its id; None if it was evicted.

        Raises:
            LayerNotLoaded: there is no such layer.
        """
        layer = self._layers.get(layer_id)
        if layer is not None:
            self._layers.move_to_end(layer_id)
        else:
            self._path(layer_id)
        return layer

    def read_again(self, layer_id: str, *, in_use: Set[str]) -> Layer:
        """A layer by its id, read now if it was evicted.

        Raises:
            LayerNotLoaded: there is no such layer.
            Corrupt: its files have changed since it was read.
            LayerRefused, LayerCorrupt, NotFound: they cannot be read any more.
        """
        layer = self.get(layer_id)
        if layer is None:
            loaded = self._checked(layer_id, self.read(self._path(layer_id)))
            self.put(loaded, in_use=in_use)
            layer = loaded.layer
        return layer

    def fetch(self, layer_id: str) -> None:
        """Have an evicted layer read beside the engine. It is given by `take_fetched` then."""
        if layer_id in self._fetching:
            return
        self._fetching.add(layer_id)

        def note(future: Future[LoadedLayer]) -> None:
            self._fetched.put((layer_id, future))
            self.on_fetched()

        self._loader.load(self._path(layer_id)).add_done_callback(note)

    @property
    def fetching(self) -> bool:
        """Whether any layer is on its way."""
        return bool(self._fetching)

    @property
    def has_fetched(self) -> bool:
        """Whether `take_fetched` has something to give. Any thread may ask."""
        return not self._fetched.empty()

    def take_fetched(self, *, in_use: Set[str], timeout: float | None = 0) -> dict[str, Exception]:
        """Keep what was fetched, and return which layers could not be read, and why.

        Args:
            timeout: seconds to wait for the first, None for as long as it takes.
        """
        failed: dict[str, Exception] = {}
        while True:
            try:
                layer_id, future = self._fetched.get(timeout != 0, timeout)
            except Empty:
                return failed
            timeout = 0
            self._fetching.discard(layer_id)
            if layer_id not in self._paths:
                continue  # it was unloaded meanwhile
            try:
                self.put(self._checked(layer_id, future.result()), in_use=in_use)
            except Exception as error:  # for the requests that need the layer
                failed[layer_id] = error

    def fits(self, layer_ids: Set[str]) -> bool:
        """Whether these layers are within the limits. One that is not in memory counts as the largest that is."""
        largest = max((layer.bytes for layer in self._layers.values()), default=0)
        sizes = [layer.bytes if (layer := self._layers.get(each)) else largest for each in layer_ids]
        return len(sizes) <= self._max_layers and sum(sizes) <= self._max_bytes

    def forget(self, layer_id: str, *, in_use: Set[str]) -> None:
        """Let go of a layer and of where it was.

        Raises:
            LayerNotLoaded: there is no such layer.
            Conflict: it is in use.
        """
        self._path(layer_id)
        if layer_id in in_use:
            raise Conflict(f"the layer {layer_id} is in use", hint="wait for its requests, or cancel them")
        del self._paths[layer_id]
        self._layers.pop(layer_id, None)

    def close(self) -> None:
        """Stop reading, and let go of all layers."""
        self._loader.close()
        self._layers.clear()
        self._fetched = SimpleQueue()
        self.on_fetched = _nobody_waits  # whoever waited refers to the engine, which else waits for the collector

    def _path(self, layer_id: str) -> Path:
        path = self._paths.get(layer_id)
        if path is None:
            raise LayerNotLoaded(f"there is no layer {layer_id}", hint="load it first; load_layer gives the id")
        return path

    def _checked(self, layer_id: str, loaded: LoadedLayer) -> LoadedLayer:
        if loaded.layer.id != layer_id:
            raise Corrupt(
                f"the files in {loaded.path} have changed since the layer was loaded", hint="add the layer again"
            )
        return loaded

    def _keep(self, layer: Layer, in_use: Set[str]) -> None:
        if layer.id not in self._layers:
            self.reads += 1
            self._tell("layer.loaded", layer)
        self._layers[layer.id] = layer
        self._layers.move_to_end(layer.id)
        for candidate in list(self._layers):
            held = sum(kept.bytes for kept in self._layers.values())
            if len(self._layers) <= self._max_layers and held <= self._max_bytes:
                break
            if candidate != layer.id and candidate not in in_use:
                evicted = self._layers.pop(candidate)
                self.evictions += 1
                self._tell("layer.evicted", evicted)

    def _tell(self, topic: str, layer: Layer) -> None:
        publish(topic, LayerInMemory(layer=layer.id, model=", ".join(self._names), bytes=layer.bytes))


def _nobody_waits() -> None:
    """Nothing is to be told."""


def _signature(folder: Path) -> Signature:
    files: tuple[tuple[str, int, int, int, int], ...] = ()
    if folder.is_dir():
        stats = [(file.name, file.stat()) for file in folder.iterdir()]
        files = tuple(
            sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats)
        )
    return Signature(files, time.time())
