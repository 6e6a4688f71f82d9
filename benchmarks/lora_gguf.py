"""PEFT adapters as GGUF files, which is how llama.cpp reads them.

The format is that of llama.cpp's convert_lora_to_gguf.py: `general.type` is adapter, `adapter.type` is lora, and each
weight W of the model has W.lora_a [rank, in] and W.lora_b [out, rank]. llama.cpp multiplies by alpha / rank, the rank
being the tensor's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from synapse.models.adapters.adapter import read_adapter
from synapse.models.config import ModelConfig
from synapse.models.gguf_file import PARTS


def write_lora_gguf(folder: Path, target: Path, config: ModelConfig, dtype: type[np.floating[Any]]) -> Path:
    """Write the adapter in `folder` for the model of `config` to `target`, and return that.

    Args:
        dtype: float16 or float32.

    Raises:
        LayerRefused, LayerCorrupt: the folder holds no adapter that fits the model.
    """
    factors = read_adapter(folder, config).factors
    first = next(iter(factors.values()))
    alpha = first.scale * len(first.A)
    writer = gguf.GGUFWriter(target, config.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for (block, projection), factor in factors.items():
        up = factor.B.astype(np.float32) * np.float32(factor.scale * len(factor.A) / alpha)
        if config.architecture == "llama" and projection in ("q_proj", "k_proj"):
            up = interleaved(up, config.heads if projection == "q_proj" else config.kv_heads)
        name = f"blk.{block}.{PARTS[projection]}"
        writer.add_tensor(f"{name}.lora_a", factor.A.astype(dtype))
        writer.add_tensor(f"{name}.lora_b", up.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k in the order of Llama files: row j * (head_dim / 2) + i of a head becomes row 2i + j."""
    by_half = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(rows.shape)
