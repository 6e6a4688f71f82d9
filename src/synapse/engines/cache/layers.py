"""The LoRA layers in an engine's memory: read when they are needed, evicted when others need the room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from synapse.callosum.publish.publishing import publish
from synapse.engines.events import LayerInMemory
from synapse.engines.reference.lora import Layer
from synapse.errors import Conflict, Corrupt, NotFound
from synapse.models.adapter import Adapter, read_adapter
from synapse.models.config import ModelConfig

Signature = tuple[tuple[str, int, int], ...]


class LayerNotLoaded(NotFound):
    """A layer id that `load_layer` has not returned, or that was unloaded since."""

    code = "layer_not_loaded"


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder that a layer was read from, as it was then."""

    signature: Signature
    layer_id: str


class LayerCache:
    """Layers by id, least recently used first.

    A layer stays known by its folder after it was evicted, and is read from there again when it is asked for. Layers
    that sequences use are never evicted, so the limits can be exceeded for as long as they all are in use.
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
        self._folders: dict[Path, _Folder] = {}
        self._paths: dict[str, Path] = {}
        self._layers: OrderedDict[str, Layer] = OrderedDict()
        self.reads = 0
        self.evictions = 0

    def sizes(self) -> dict[str, int]:
        """The layers in memory and their bytes, least recently used first."""
        return {layer.id: layer.bytes for layer in list(self._layers.values())}

    def known(self, path: Path) -> str | None:
        """The id of the layer in this folder, if it has been read and has not changed since. Any thread may ask."""
        folder = self._folders.get(path)
        if folder is None or folder.layer_id not in self._paths or folder.signature != _signature(path):
            return None
        return folder.layer_id

    def read(self, path: Path) -> Layer:
        """Read and check a layer without keeping it. May run in any thread.

        Raises:
            LayerRefused, LayerCorrupt: the folder does not hold an adapter that fits the model.
        """
        return self._prepare(read_adapter(path, self._config, names=self._names))

    def put(self, path: Path, layer: Layer, *, in_use: Set[str]) -> None:
        """Keep a layer, and remember where it is."""
        self._paths[layer.id] = path
        self._folders[path] = _Folder(_signature(path), layer.id)
        self._keep(layer, in_use)

    def get(self, layer_id: str, *, in_use: Set[str]) -> Layer:
        """A layer by its id, read again if it was evicted.

        Raises:
            LayerNotLoaded: there is no such layer.
            Corrupt: its files have changed since it was read.
        """
        layer = self._layers.get(layer_id)
        if layer is not None:
            self._layers.move_to_end(layer_id)
            return layer
        path = self._paths.get(layer_id)
        if path is None:
            raise LayerNotLoaded(f"there is no layer {layer_id}", hint="load it first; load_layer gives the id")
        layer = self.read(path)
        if layer.id != layer_id:
            raise Corrupt(f"the files in {path} have changed since the layer was loaded", hint="add the layer again")
        self._keep(layer, in_use)
        return layer

    def forget(self, layer_id: str, *, in_use: Set[str]) -> None:
        """Let go of a layer and of where it was.

        Raises:
            LayerNotLoaded: there is no such layer.
            Conflict: it is in use.
        """
        if layer_id not in self._paths:
            raise LayerNotLoaded(f"there is no layer {layer_id}")
        if layer_id in in_use:
            raise Conflict(f"the layer {layer_id} is in use", hint="wait for its requests, or cancel them")
        del self._paths[layer_id]
        self._layers.pop(layer_id, None)

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


def _signature(folder: Path) -> Signature:
    """Name, size and modification time of the files in a folder: what tells that it has changed."""
    if not folder.is_dir():
        return ()
    stats = [(file.name, file.stat()) for file in folder.iterdir()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
