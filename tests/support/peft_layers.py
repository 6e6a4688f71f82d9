"""Real layers from peft, on a tiny random Llama: what the adapter and registry tests read, damage and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from synapse.models.config import ModelConfig, RopeConfig

HIDDEN, INTERMEDIATE, BLOCKS, HEADS, KV_HEADS, VOCAB = 32, 48, 2, 4, 2, 64
BASE_NAME = "tiny-llama"


def tiny_config(**changes: Any) -> ModelConfig:
    """The base model that `save_layer` trains on."""
    fields: dict[str, Any] = {
        "architecture": "llama",
        "name": BASE_NAME,
        "blocks": BLOCKS,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab": VOCAB,
        "context": 128,
        "norm_eps": 1e-5,
        "rope": RopeConfig(theta=10000.0, dimensions=HIDDEN // HEADS, kind="default"),
        "tied": True,
        "qkv_bias": False,
        "qk_norm": False,
    }
    return ModelConfig(**(fields | changes))


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A random transformers Llama of that shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    return LlamaForCausalLM(LlamaConfig(**(fields | changes)))


def save_layer(folder: Path, *, seed: int = 0, model: Any = None, **config: Any) -> Path:
    """Save a LoRA adapter with random factors (B is not zero), as `PeftModel.save_pretrained` writes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    peft_model = get_peft_model(model or tiny_llama(), LoraConfig(**(options | config)))
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    peft_model.save_pretrained(str(folder))
    return folder


def copy_layer(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Change the tensors and save them again, properly."""
    path = folder / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)
    return folder
