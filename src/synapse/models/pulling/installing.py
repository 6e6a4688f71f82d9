"""The part of a pull that reads models: fetch the files, check that an engine can run them, put them in their place."""

from __future__ import annotations

import shutil
from pathlib import Path

from synapse.errors import NotFound, SynapseError, Unavailable
from synapse.models.encoder.file import open_encoder_file
from synapse.models.errors import PreTokenizerUnsaid
from synapse.models.gguf_file import open_model_file
from synapse.models.manifest import Manifest, ManifestFile, Source
from synapse.models.pre_tokenizers import HOW_TO_SAY, UNSAID, pre_tokenizer_name
from synapse.models.pulling.sources import fetch
from synapse.models.pulling.transfer import DiskFull, Transfer, check_file, flush, sha256_of
from synapse.models.pulling.wanted import shown_source
from synapse.models.record import RECORD, FileRecord, LibraryModel, Record


def install(manifest: Manifest, work: Path, target: Path, transfer: Transfer) -> LibraryModel:
    """Fetch the files of a model into `work`, check them, and move them to `target` in one step.

    Raises:
        as `ModelLibrary.pull`.
    """
    ready = work / "ready"
    for left_over in (ready, work / "damaged"):
        shutil.rmtree(left_over, ignore_errors=True)
    ready.mkdir()
    records, sources, arrived = [], {}, {}
    for file in manifest.files:
        fetched = _fetch_checked(manifest, file, work, transfer)
        if fetched is None:
            continue
        path, sources[file.name] = fetched
        sha256 = file.sha256 or sha256_of(path, transfer)
        records.append(FileRecord(name=file.name, sha256=sha256, size=path.stat().st_size))
        arrived[file.name] = path
        (ready / file.name).parent.mkdir(exist_ok=True)
        path.replace(ready / file.name)
    try:
        description, licence, pre_tokenizer = _open(manifest, ready)
    except PreTokenizerUnsaid:
        for name, path in arrived.items():
            (ready / name).replace(path)  # where the next pull, which says it, finds what it need not fetch again
        raise
    record = Record(
        name=manifest.name,
        description=(manifest.description or description)[:200],
        licence=(manifest.licence or licence)[:100],
        source=shown_source(manifest.kind, sources),
        files=records,
        kind=manifest.kind,
        pre_tokenizer=pre_tokenizer,
    )
    _write(record, ready / RECORD)
    if target.exists():
        target.replace(work / "damaged")
    ready.replace(target)
    return LibraryModel.of(record, target)


def say_pre_tokenizer(model: LibraryModel, said: str, work: Path) -> LibraryModel:
    """Note in the record of a model that is here how its text is cut into words.

    Raises:
        InvalidInput: that cannot be said of it.
    """
    said = pre_tokenizer_name(open_model_file(model.path).metadata, said)
    place = model.folder / RECORD
    record = Record.model_validate_json(place.read_bytes()).model_copy(update={"pre_tokenizer": said})
    work.mkdir(parents=True, exist_ok=True)
    _write(record, work / RECORD)
    shutil.copystat(place, work / RECORD)  # its time says since when the files are as they were
    (work / RECORD).replace(place)
    return LibraryModel.of(record, model.folder)


def _write(record: Record, path: Path) -> None:
    with path.open("wb") as out:
        out.write(record.model_dump_json(indent=2).encode())
        flush(out)


def _open(manifest: Manifest, folder: Path) -> tuple[str, str, str]:
    """Check that an engine can run what has arrived; the description, licence and pre-tokenizer that it gives itself.

    Raises:
        ModelFileCorrupt, UnsupportedModel: none can.
        InvalidInput: the pre-tokenizer that was said is not one that it can have.
    """
    if manifest.kind == "encoder":
        config = open_encoder_file(folder, manifest.name).config
        return f"a {config.architecture} encoder with {config.hidden} dimensions", "unknown", ""
    opened = open_model_file(folder / manifest.files[0].name)
    pre_tokenizer = pre_tokenizer_name(opened.metadata, manifest.pre_tokenizer)
    if opened.metadata.get("tokenizer.ggml.model") == "gpt2" and not pre_tokenizer:
        raise PreTokenizerUnsaid(f"{opened.path.name}: {UNSAID}", hint=HOW_TO_SAY)
    return opened.config.name, str(opened.metadata.get("general.license", "unknown")), pre_tokenizer


def _fetch_checked(
    manifest: Manifest, file: ManifestFile, work: Path, transfer: Transfer
) -> tuple[Path, Source] | None:
    """The file from the first source that has it, with the sha256 that the manifest demands.

    None when no source has it and it is optional.
    """
    failures: list[SynapseError] = []
    for source in file.sources:
        try:
            path = fetch(source, work, transfer)
            if file.sha256:
                check_file(path, f"{file.name} from {source}", file.size, file.sha256, transfer)
        except DiskFull:
            raise
        except SynapseError as error:
            failures.append(error)
        else:
            return path, source
    last = failures[-1]
    if isinstance(last, NotFound) and file.optional:
        return None
    if isinstance(last, Unavailable) and file.sha256:
        what = "a folder with its files" if manifest.kind == "encoder" else file.name
        place = "folder" if manifest.kind == "encoder" else file.name
        last.hint = (
            f"{last.hint}; or fetch {what} on another machine and run"
            f" `synapse model pull /path/to/{place} --name {manifest.name}`"
        )
    raise last
