"""Random LoRA adapters in PEFT's format, for measuring speed: their answers mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from synapse.models.config import PROJECTIONS, ModelConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def random_adapter(
    folder: Path,
    config: ModelConfig,
    *,
    rank: int,
    seed: int,
    targets: tuple[str, ...] = PROJECTIONS,
    dtype: type[np.floating[Any]] = np.float32,
    strength: float = 1.0,
) -> Path:
    """Write an adapter for `config` to `folder` and return the folder. What it adds is multiplied by `strength`."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for block in range(config.blocks):
        for projection in targets:
            out, width = config.linear_shape(projection)
            part = "self_attn" if projection in ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{block}.{part}.{projection}"
            tensors[f"{name}.lora_A.weight"] = (rng.standard_normal((rank, width)) * 0.02).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = (rng.standard_normal((out, rank)) * 0.02).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": strength * rank,
        "target_modules": list(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
