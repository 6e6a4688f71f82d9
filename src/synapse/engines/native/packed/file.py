"""The packed model on disk: made once from a GGUF file, checked whenever it is opened, mapped by every process.

`<folder>/<sha256 of the GGUF file>-<quantisation>-v2.pack`, little-endian:

8 bytes     "SYNPACK1"
8 bytes     length of the header
header      JSON: version, source (that sha256), quantisation, payload_sha256, payload_bytes, and for each tensor its
            kind (q4, q4_0, q8 or f32), shape, offset from the start of the payload, and bytes
zeros       up to a multiple of 4096
payload     the tensors in the order of the header, each from the next multiple of 64 on; matrices as in `packing`

All of the header but payload_sha256 follows from the GGUF file and the quantisation, so nothing in it has to be
believed: a file is sound when the sha256 of its payload gives the very header that it begins with. One that is not is
made anew.

The map is shared and read-only. A file is never written in place, only replaced, so a map stays as it was checked.
Where somebody cuts the file short all the same, `PackedModel.check` refuses what is computed from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from synapse.engines.native.packed.model import ALIGNMENT, Checked, PackedModel, Quantisation, Slot, TensorKind
from synapse.engines.native.packed.packing import FOUR_BIT, Kind, pack_matrix, packed_bytes
from synapse.engines.native.packed.quantising import HINT
from synapse.errors import Corrupt, Unavailable
from synapse.kernels.mapped_file import MappedFile
from synapse.log import Logger
from synapse.models.errors import ModelFileCorrupt
from synapse.models.gguf_file import ModelFile, open_model_file
from synapse.models.head import ModelHead
from synapse.models.pulling.transfer import DiskFull, disk_errors, flush, sha256_of

__all__ = ["PackedFileDamaged", "PackedModel", "Quantisation", "open_packed"]

log = Logger(__name__)

MAGIC = b"SYNPACK1"
VERSION = 2
PAGE = 4096
_OUTER = ("token_embd.weight", "output.weight")


class PackedFileDamaged(Corrupt):
    """A packed model is not as it was written."""

    code = "packed_file_damaged"


def packed_size(file: ModelFile | ModelHead, quantisation: Quantisation = "auto") -> int:
    """Bytes of the tensors of a model file when they are packed."""
    return _Layout(file, "", quantisation).payload_bytes


def prepare_packed(path: Path, sha256: str, folder: Path, quantisation: Quantisation = "auto") -> Checked:
    """As `open_packed`, for another process to open without checking it again."""
    packed = open_packed(open_model_file(path), sha256, folder, quantisation)
    packed.close()
    assert packed.checked is not None  # noqa: S101 (it was opened from a file)
    return packed.checked


def open_packed(
    file: ModelFile | ModelHead,
    sha256: str,
    folder: Path,
    quantisation: Quantisation = "auto",
    checked: Checked | None = None,
) -> PackedModel:
    """The packed form of a model file, made first if it is not in `folder`, or not sound there.

    Processes that start at once make it once. What a process leaves that dies while it writes is written over.

    Args:
        sha256: of the GGUF file, in hexadecimal; see `source_sha256`.
        folder: where packed models are.
        checked: what `prepare_packed` returned in another process. As long as the file still looks so, its bytes need
            not be read again.

    Raises:
        ModelFileCorrupt: a weight is not finite, or the file does not have that sha256 (which is only looked at when
            the packed form is made).
        DiskFull: there is no room. What was written is removed.
        Unavailable: the folder cannot be written.
    """
    layout = _Layout(file, sha256, quantisation)
    path = folder / f"{sha256}-{quantisation}-v{VERSION}.pack"
    with suppress(FileNotFoundError, PackedFileDamaged):
        return layout.open(path, checked)
    with _disk_errors(folder):
        lock = folder / ".locks" / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                return layout.open(path)  # another process has made it meanwhile
            except FileNotFoundError:
                pass
            except PackedFileDamaged as error:
                log.warning("a packed model is made anew", file=str(path), reason=error.message)
            layout.make(path)
            return layout.open(path)


class _Layout:
    """What the packed form of a model file has to be, to the byte, but for the weights.

    Attributes:
        payload_bytes: of all tensors.
    """

    def __init__(self, file: ModelFile | ModelHead, sha256: str, quantisation: Quantisation) -> None:
        self._file = file
        self._sha256 = sha256
        self._quantisation = quantisation
        self._slots: dict[str, Slot] = {}
        self.payload_bytes = 0
        for name, shape in file.shapes.items():
            kind, size = self._store(name, shape)
            self._slots[name] = Slot(kind, shape, self.payload_bytes, size)
            self.payload_bytes += size + -size % ALIGNMENT

    def _store(self, name: str, shape: tuple[int, ...]) -> tuple[TensorKind, int]:
        if len(shape) == 1:
            return "f32", 4 * prod(shape)
        kind: Kind = FOUR_BIT.get(self._file.types[name].name, "q8")
        if self._quantisation == "int8":
            kind = "q8"
        elif self._quantisation == "4bit" and kind == "q8" and name not in _OUTER:
            kind = "q4"
        return kind, packed_bytes(kind, (shape[0], shape[1]))

    def front(self, payload_sha256: str) -> bytes:
        """Everything before the payload; always of the same length."""
        header = json.dumps(
            {
                "version": VERSION,
                "source": self._sha256,
                "quantisation": self._quantisation,
                "payload_sha256": payload_sha256,
                "payload_bytes": self.payload_bytes,
                "tensors": {name: asdict(slot) for name, slot in self._slots.items()},
            }
        ).encode()
        front = MAGIC + len(header).to_bytes(8, "little") + header
        return front + bytes(-len(front) % PAGE)

    def open(self, path: Path, checked: Checked | None = None) -> PackedModel:
        """Map a file and check every byte of it, unless that was done since it was made.

        Raises:
            FileNotFoundError: there is none.
            PackedFileDamaged: it is not what it has to be, or cannot be read.
        """
        start = len(self.front("0" * 64))
        expected = start + self.payload_bytes
        try:
            with path.open("rb") as opened:
                stat = os.fstat(opened.fileno())
                if stat.st_size != expected:
                    raise PackedFileDamaged(f"{path} must have {expected} bytes, but has {stat.st_size}")
                mapped = MappedFile(opened)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PackedFileDamaged(f"{path} cannot be read: {error.strerror}") from error
        content = np.frombuffer(mapped.memory, np.uint8)
        payload = content[start:]
        look = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if checked is None or checked.look != look:
            checked = Checked(hashlib.sha256(payload.data).hexdigest(), look)
        if content[:start].tobytes() != self.front(checked.payload_sha256):
            raise PackedFileDamaged(f"{path} is not as it was written")
        return PackedModel(self._file.config, self._quantisation, self._slots, payload, mapped, checked=checked)

    def make(self, path: Path) -> None:
        """Write the file, in one step for whoever looks at it."""
        found = sha256_of(self._file.path)
        if found != self._sha256:
            raise ModelFileCorrupt(
                f"{self._file.path} must have the sha256 {self._sha256}, but has {found}",
                hint="the file has changed: remove the model and pull it again",
            )
        file = self._file.file() if isinstance(self._file, ModelHead) else self._file
        partial = path.with_suffix(".partial")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as out:
                out.write(self.front("0" * 64))
                for name, slot in self._slots.items():
                    for piece in self._pack(file, name, slot):
                        out.write(piece)
                        digest.update(piece)
                out.seek(0)
                out.write(self.front(digest.hexdigest()))
                flush(out)
            file.check_whole()
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _pack(self, file: ModelFile, name: str, slot: Slot) -> Iterator[bytes]:
        try:
            if slot.kind == "f32":
                yield _finite(file.tensor(name)).astype("<f4").tobytes()
            else:
                raw = file.stored(name)
                for records in pack_matrix(slot.kind, file.types[name], raw, slot.shape[1]):
                    yield records.tobytes()
        except ModelFileCorrupt as error:
            message = f"{file.path.name}: the tensor {name} {error.message}"
            raise ModelFileCorrupt(message, hint=error.hint, path=str(file.path)) from error
        yield bytes(-slot.bytes % ALIGNMENT)


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise ModelFileCorrupt("has values that are not finite; all must be", hint=HINT)
    return values


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        with disk_errors(folder):
            yield
    except DiskFull as error:
        hint = "make room, or set SYNAPSE_HOME to a folder on a larger disk; then start again"
        raise DiskFull(error.message, hint=hint) from error
    except OSError as error:
        raise Unavailable(f"the packed model cannot be written to {folder}: {error.strerror}") from error
