"""Where a layer comes from: a folder, the Hugging Face hub (``hf:ORG/REPO``), or the package (``starter:NAME``)."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from synapse.commands import Progress
from synapse.errors import Forbidden, InvalidInput, NotFound, Unavailable
from synapse.genome.cards import CARD_FILE, MAX_CARD_BYTES, Card, parse_card
from synapse.genome.entities import TrainingMetrics
from synapse.models.adapters.errors import LayerRefused
from synapse.models.adapters.files import (
    CONFIG_FILE,
    LAYER_FILES,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    read_layer_files,
)

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

STARTERS = Path(__file__).parent / "starters"
HUB, STARTER = "hf:", "starter:"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
HUB_SECONDS = 30
DOWNLOADING = ".download-"
LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_WEIGHTS_BYTES, CARD_FILE: MAX_CARD_BYTES}
OFFLINE = "check the network, or add the layer from a folder on this machine"


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """The files of a layer as they were found, not yet checked. `readme` is None where there is no model card."""

    config: bytes
    weights: bytes
    readme: bytes | None
    name: str
    creator: str
    metrics: TrainingMetrics | None = None

    @property
    def card(self) -> Card:
        return parse_card(self.readme or b"")


def is_folder(source: str) -> bool:
    """Whether a source is a folder of this machine."""
    return not source.startswith((STARTER, HUB))


def starter_names() -> list[str]:
    """The layers that ship with the package."""
    return sorted(path.name for path in STARTERS.iterdir() if path.is_dir()) if STARTERS.is_dir() else []


async def read_source(source: str, scratch: Path, progress: Progress) -> LayerFiles:
    """The files behind a source; `scratch` is a folder for what has to be downloaded first.

    Raises:
        NotFound: there is no such folder, repository or starter.
        LayerRefused: there is something, but not a layer, or it is too large.
        InvalidInput, Forbidden, Unavailable: the hub does not know, give, or answer.
    """
    if source.startswith(STARTER):
        return await asyncio.to_thread(_read_starter, source.removeprefix(STARTER))
    if source.startswith(HUB):
        async with _downloaded(source, scratch, progress) as (folder, organisation, name):
            return await asyncio.to_thread(_read_folder, folder, name, organisation)
    return await asyncio.to_thread(_read_local, source)


def _read_local(source: str) -> LayerFiles:
    folder = Path(source).expanduser()
    return _read_folder(folder, folder.resolve().name, "")


def _read_folder(folder: Path, name: str, creator: str) -> LayerFiles:
    config, weights = read_layer_files(folder)
    return LayerFiles(config, weights, _read_readme(folder), name, creator)


def _read_readme(folder: Path) -> bytes | None:
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_CARD_BYTES + 1)
    if len(data) > MAX_CARD_BYTES:
        raise LayerRefused("too_large", f"{CARD_FILE} has more than {MAX_CARD_BYTES} bytes, the most that are kept")
    return data


def _read_starter(name: str) -> LayerFiles:
    if name not in starter_names():
        raise NotFound(f"there is no starter layer {name!r:.70}", hint=f"there are {', '.join(starter_names())}")
    found = _read_folder(STARTERS / name, name, "synapse")
    measured = json.loads((STARTERS / name / "metrics.json").read_bytes())
    metrics = TrainingMetrics(
        loss=measured["final_loss"], epochs=measured.get("epochs"), performance=measured["score_after"]
    )
    return LayerFiles(found.config, found.weights, found.readme, found.name, found.creator, metrics)


@asynccontextmanager
async def _downloaded(source: str, scratch: Path, progress: Progress) -> AsyncIterator[tuple[Path, str, str]]:
    """A folder with the layer's files from the hub, for as long as the block runs."""
    found = HUB_ID.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise InvalidInput(
            f"{source!r:.120} does not name a repository of the hub", hint="write hf:ORG/REPO or hf:ORG/REPO@REVISION"
        )
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=DOWNLOADING, dir=scratch))
    try:
        await asyncio.to_thread(_download, found["repo"], found["revision"], folder, progress)
        organisation, _, name = found["repo"].partition("/")
        yield folder, organisation, name
    finally:
        await asyncio.to_thread(shutil.rmtree, folder)


def _download(repo: str, revision: str | None, folder: Path, progress: Progress) -> None:
    """Fetch the two files and the model card of a repository, at one commit, with sizes checked before."""
    from huggingface_hub import HfApi, errors  # noqa: PLC0415 (slow to import, and most layers are not on the hub)

    transport_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of the client the hub uses
    api = HfApi()
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
        sizes = _wanted(repo, info)
        total, done = sum(sizes.values()), 0
        for name, size in sizes.items():
            progress(f"hf:{repo} {name}", done, total)
            api.hf_hub_download(repo, name, revision=info.sha, local_dir=folder)
            done += size
        progress(f"hf:{repo}", total, total)
    except errors.GatedRepoError as error:
        raise Forbidden(
            f"{repo} is only for those who accepted its terms",
            hint=f"accept them on the page of {repo}, and set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision!r:.70}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"the hub has no model {repo}, or you may not see it", hint="for a private one set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise InvalidInput(f"{repo!r:.120} cannot be the name of a repository: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unavailable(f"{repo} is not fetched: HF_HUB_OFFLINE is set", hint=OFFLINE) from error
    except (transport_error, OSError) as error:
        raise Unavailable(f"the hub did not give {repo}: {error}", hint=OFFLINE) from error


def _wanted(repo: str, info: ModelInfo) -> dict[str, int]:
    """The files to fetch and their sizes in bytes."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    lost = [name for name in LAYER_FILES if name not in sizes]
    if lost:
        pickles = [name for name in sizes if name.endswith((".bin", ".pt", ".pkl"))]
        if pickles:
            raise LayerRefused("pickle", f"{repo} has {pickles[0]}, a pickle file; only safetensors are read")
        raise LayerRefused("missing_file", f"{repo} has no {lost[0]}", hint="a layer is a repository that PEFT saved")
    wanted = {name: size for name, size in sizes.items() if name in LIMITS}
    for name, size in wanted.items():
        if size > LIMITS[name]:
            raise LayerRefused("too_large", f"{name} of {repo} has {size} bytes; at most {LIMITS[name]} are read")
    return wanted
