"""The default model as the reference computes it, and as transformers does; each is loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synapse.engines import Engine, Limits
from synapse.engines.opening import open_engine_file


@pytest.fixture(scope="session")
def engine(default_model: Path) -> Engine:
    return open_engine_file(default_model, "reference", Limits(max_context=1024))


@pytest.fixture(scope="session")
def transformers_model(default_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = default_model.parent, default_model.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
