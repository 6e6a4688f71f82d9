"""transformers' own reading of the default model, which takes it seconds: once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def default_reference(default_model: Path) -> Any:
    """The default model's tokenizer, with its chat template, as transformers reads it from the same file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
