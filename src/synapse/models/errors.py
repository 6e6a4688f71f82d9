"""What can be wrong with a model file."""

from __future__ import annotations

from synapse.errors import Corrupt, InvalidInput


class ModelFileCorrupt(Corrupt):
    """The file is truncated, altered, or contradicts itself."""

    code = "model_file_corrupt"


class UnsupportedModel(InvalidInput):
    """The file is sound, but describes something that no engine here can run."""

    code = "unsupported_model"


class PreTokenizerUnsaid(UnsupportedModel):
    """Neither the file nor anybody else says how its text is cut into words."""

    code = "pre_tokenizer_unsaid"
