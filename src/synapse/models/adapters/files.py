"""The two files of a layer, as bytes: what they are called, how large they may be, and the address of their content.

Reading what is in them is the part of `models/adapters/adapter.py`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from synapse.errors import NotFound
from synapse.models.adapters.errors import LayerRefused

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LAYER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
LAYERS_FOLDER = "layers"
"""In a home: each layer that was added lies there in a folder named by its content address."""
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 500 * 10**6
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def content_address(config: bytes, weights: bytes) -> str:
    """The sha256, in hex, that names a layer: over `adapter_config.json`, then `adapter_model.safetensors`.

    Of each file the name, a zero byte, the length as eight little-endian bytes, and the bytes as they are: equal
    addresses mean that both files are equal byte for byte.
    """
    digest = hashlib.sha256()
    for name, data in zip(LAYER_FILES, (config, weights), strict=True):
        digest.update(name.encode() + b"\0" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def read_layer_files(folder: Path, *, max_bytes: int = MAX_WEIGHTS_BYTES) -> tuple[bytes, bytes]:
    """The bytes of a layer's config and weights, not yet checked.

    Raises:
        NotFound: there is no such folder.
        LayerRefused: ``pickle``, ``missing_file``, ``unreadable`` or ``too_large``.
    """
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", hint="give the folder that PEFT's save_pretrained wrote")
    for name in LAYER_FILES:
        if not (folder / name).exists():
            _refuse_pickle(folder)
            raise LayerRefused(
                "missing_file", f"{folder} has no {name}", hint="give the folder that PEFT's save_pretrained wrote"
            )
    return _read(folder / CONFIG_FILE, MAX_CONFIG_BYTES), _read(folder / WEIGHTS_FILE, max_bytes)


def _refuse_pickle(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise LayerRefused(
            "pickle",
            f"{pickles[0]} is a pickle file, which can run any code when it is opened; only safetensors are read",
            hint="save it again with PEFT's save_pretrained(..., safe_serialization=True)",
        )


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LayerRefused("missing_file", f"{path} is not a regular file")
        with path.open("rb", buffering=0) as file:
            # Asked for its size it is read several times as fast as for the limit; it may have grown since.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
            while len(data) <= limit and (more := file.read(min(limit + 1 - len(data), 2**20))):
                data += more
    except OSError as error:
        raise LayerRefused("unreadable", f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise LayerRefused("too_large", f"{path.name} has more than {limit} bytes, the most that are read")
    return data
