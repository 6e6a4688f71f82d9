"""What a model file says of its model without the weights, worked out once: another process can do that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from synapse.models.chat_template import ChatTemplate, load_chat_template
from synapse.models.config import ModelConfig
from synapse.models.gguf_file import ModelFile, open_model_file
from synapse.models.tokenizer import TokenizerParts, tokenizer_parts


@dataclass(frozen=True)
class ModelHead:
    """All of a model file but its weights; see `ModelFile`. It pickles."""

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, GGMLQuantizationType]
    tokenizer: TokenizerParts
    chat_template: ChatTemplate
    _file: ModelFile | None = field(repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def file(self) -> ModelFile:
        """The file, with its weights; opened again in another process than the one that has read the head.

        Raises:
            as `open_model_file`.
        """
        return self._file or open_model_file(self.path)


def read_head(path: Path) -> ModelHead:
    """Open a GGUF file and work out all but the weights.

    Raises:
        NotFound, ModelFileCorrupt, UnsupportedModel: the file cannot be used.
    """
    file = open_model_file(path)
    tokenizer, template = tokenizer_parts(file), load_chat_template(file)
    return ModelHead(path, file.config, file.shapes, file.types, tokenizer, template, file)
