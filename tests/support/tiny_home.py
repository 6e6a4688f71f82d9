"""A home whose default model is a tiny random one: it says nonsense, quickly, and greedily without end."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf

from support.peft_layers import save_layer
from support.tiny_models import CONTROL_TOKENS, build_tiny_model
from synapse.commands import Context
from synapse.config import Settings
from synapse.genome.opening import open_layers
from synapse.models.library import open_library

MODEL = "tiny"
LAYERS = ("first", "second")
CONTEXT = 8192


@dataclass(frozen=True)
class TinyHome:
    """A home folder with the model `tiny` and the layers `first` and `second` for it. Copy it before changing it."""

    path: Path

    def copy(self, target: Path) -> Path:
        shutil.copytree(self.path, target)
        return target


def build_tiny_home(folder: Path) -> TinyHome:
    """Make one; takes a few seconds, so make it once a session."""
    folder.mkdir()
    home = folder / "home"
    model = build_tiny_model(folder / "tiny.gguf", context=CONTEXT)
    _never_end(model.path)
    layers = [save_layer(folder / name, seed=seed, model=model.reference) for seed, name in enumerate(LAYERS[:1])]
    second = build_tiny_model(folder / "again.gguf", context=CONTEXT)
    layers.append(save_layer(folder / LAYERS[1], seed=5, model=second.reference))
    asyncio.run(_fill(home, model.path, layers))
    return TinyHome(home)


def _never_end(path: Path) -> None:
    """Give the tokens that end a text a logit of 0, so that greedy decoding never finds one the likeliest."""
    reader = gguf.GGUFReader(path, "r+")
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    output.data[: len(CONTROL_TOKENS)] = 0
    output.data.flush()


async def _fill(home: Path, model: Path, layers: list[Path]) -> None:
    async with Context(Settings(home=home, default_model=MODEL)) as context:
        await (await context.get(open_library)).pull(str(model), name=MODEL)
        registry = await context.get(open_layers)
        for layer in layers:
            await registry.add(str(layer))
