"""Reading LoRA layers: a folder in PEFT's format becomes checked factors.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` writes them. It
comes from a stranger: sizes are bounded, every claim of both files is checked, and pickle files are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synapse.models.adapters.base_names import says_another_model
from synapse.models.adapters.config import AdapterConfig, parse_config
from synapse.models.adapters.errors import LayerCorrupt, LayerRefused
from synapse.models.adapters.files import CONFIG_FILE, MAX_WEIGHTS_BYTES, content_address, read_layer_files
from synapse.models.config import PROJECTIONS, ModelConfig
from synapse.models.safetensors_file import not_finite, read_header, read_stored

__all__ = ["Adapter", "LayerCorrupt", "LayerRefused", "LoraFactors", "content_address", "read_adapter"]

# PEFT prefixes the module's path in the base model; `AutoModel` (without a head) has no "model." of its own.
TENSOR = re.compile(
    r"base_model\.model\."
    r"(?P<module>(?:model\.)?layers\.(?P<block>0|[1-9][0-9]{0,5})\.(?P<part>self_attn|mlp)\.(?P<projection>[a-z_]+))"
    r"\.lora_(?P<factor>[AB])\.weight"
)
PART = {name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for name in PROJECTIONS}
FIT = "train the layer on the base model it is added to, or name that model with --base-model"


Factor = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The update of one linear projection: y += weight * scale * B (A x), for x of length in and y of length out.

    Attributes:
        A: shape (rank, in), C-contiguous; float16 where the file holds that, else float32.
        B: shape (out, rank), likewise.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    A: Factor
    B: Factor
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked layer.

    Attributes:
        sha256: the content address, see `content_address`.
        rank, alpha, rslora: the config's defaults; a projection's own rank (`rank_pattern`) is `A.shape[0]`.
        targets: the projections that have factors, in the order of `PROJECTIONS`.
        base_model: `base_model_name_or_path` as written, or None.
        size_bytes: both files together.
        factors: by (block index, projection name).
    """

    sha256: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    base_model: str | None
    size_bytes: int
    factors: Mapping[tuple[int, str], LoraFactors]


@dataclass(frozen=True, slots=True)
class _Place:
    """What the name of a tensor says."""

    module: str
    block: int
    projection: str
    factor: Literal["A", "B"]


def read_adapter(
    folder: Path,
    config: ModelConfig | None,
    *,
    names: Iterable[str] = (),
    max_bytes: int = MAX_WEIGHTS_BYTES,
    sha256: str | None = None,
) -> Adapter:
    """Read and check the layer in `folder`; with `config` also whether it fits that base model.

    Args:
        names: other names of the base model, such as the one it has in the library.
        max_bytes: the largest weights file that is read; about three times as much memory is used while reading.
        sha256: the content address, if the caller knows that the files have not changed since they were hashed.

    Raises:
        NotFound: there is no such folder.
        LayerRefused: it cannot be used as a layer, or not with this base model; `reason` says why. `LayerCorrupt`,
            one of them, when the files are damaged.
    """
    return check_adapter(*read_layer_files(folder, max_bytes=max_bytes), config, names=names, sha256=sha256)


def check_adapter(
    config_bytes: bytes,
    weight_bytes: bytes,
    config: ModelConfig | None,
    *,
    names: Iterable[str] = (),
    sha256: str | None = None,
) -> Adapter:
    """`read_adapter` for bytes that were read already."""
    said = parse_config(config_bytes)
    if config is not None and said.base_model is not None:
        known = (config.name, *names)
        if says_another_model(said.base_model, known):
            raise LayerRefused(
                "base_mismatch",
                f"the layer was trained on {said.base_model!r:.120}, not on {' / '.join(filter(None, known))}",
                hint=f"{FIT}; if the name is wrong, mend base_model_name_or_path in {CONFIG_FILE}",
            )
    slots = read_header(weight_bytes)
    if not slots:
        raise LayerRefused("empty", "the layer has no weights at all")
    tensors: dict[tuple[int, str], dict[str, Factor]] = {}
    modules: dict[tuple[int, str], str] = {}
    for name, slot in slots.items():
        place = _place(name)
        key = (place.block, place.projection)
        if key not in tensors:
            _check_place(place, said, config)
            tensors[key], modules[key] = {}, place.module
        pair = tensors[key]
        if place.factor in pair or modules[key] != place.module:
            raise LayerCorrupt("duplicate_tensor", f"{name!r:.120} is the second {place.factor} of {place.module}")
        _check_shape(name, slot.shape, place, said, config)
        pair[place.factor] = read_stored(weight_bytes, slot)
    bad = not_finite(weight_bytes, slots)
    if bad is not None:
        raise LayerCorrupt("not_finite", f"tensor {bad!r:.120} holds NaN or infinite values")
    factors: dict[tuple[int, str], LoraFactors] = {}
    for key in sorted(tensors, key=lambda key: (key[0], PROJECTIONS.index(key[1]))):
        pair = tensors[key]
        if pair.keys() != {"A", "B"}:
            lost = "B" if "A" in pair else "A"
            raise LayerCorrupt("unpaired", f"{modules[key]} has lora_{min(pair)} without lora_{lost}")
        factors[key] = LoraFactors(pair["A"], pair["B"], said.scale_of(modules[key]))
    return Adapter(
        sha256=sha256 or content_address(config_bytes, weight_bytes),
        rank=said.rank,
        alpha=said.alpha,
        rslora=said.rslora,
        targets=tuple(name for name in PROJECTIONS if any(projection == name for _, projection in factors)),
        base_model=said.base_model,
        size_bytes=len(config_bytes) + len(weight_bytes),
        factors=factors,
    )


def _place(name: str) -> _Place:
    """Where a tensor belongs, if it belongs anywhere."""
    found = TENSOR.fullmatch(name)
    projection = found["projection"] if found else ""
    if found is None or PART.get(projection) != found["part"]:
        reason = "unknown_target"
        if "lora_magnitude_vector" in name:
            reason = "dora"
        raise LayerRefused(
            reason,
            f"tensor {name!r:.120} is not a LoRA factor of {', '.join(PROJECTIONS)}",
            hint="train the layer on those projections only",
        )
    return _Place(found["module"], int(found["block"]), projection, "A" if found["factor"] == "A" else "B")


def _check_place(place: _Place, said: AdapterConfig, config: ModelConfig | None) -> None:
    module, block = place.module, place.block
    if not said.targets(module) or (said.blocks is not None and block not in said.blocks):
        raise LayerRefused("unknown_target", f"the weights adapt {module}, which adapter_config.json does not list")
    if config is not None and block >= config.blocks:
        raise LayerRefused(
            "shape_mismatch", f"the layer adapts block {block}; the base model has {config.blocks} blocks", hint=FIT
        )


def _check_shape(
    name: str, shape: tuple[int, ...], place: _Place, said: AdapterConfig, config: ModelConfig | None
) -> None:
    rank = said.rank_of(place.module)
    found_rank = shape[0 if place.factor == "A" else 1] if len(shape) == 2 else 0
    if found_rank != rank:
        raise LayerRefused(
            "rank_mismatch", f"{name!r:.120} has the shape {list(shape)}; adapter_config.json says rank {rank}"
        )
    if config is None:
        return
    out, size = config.linear_shape(place.projection)
    expected = (rank, size) if place.factor == "A" else (out, rank)
    if shape != expected:
        raise LayerRefused(
            "shape_mismatch",
            f"{name!r:.120} has the shape {list(shape)}; the base model needs {list(expected)}",
            hint=FIT,
        )
