"""Why a LoRA layer is not taken in."""

from __future__ import annotations

from typing import Any

from synapse.errors import Corrupt, InvalidInput


class LayerRefused(InvalidInput):
    """An adapter that cannot be used as a layer.

    `details["reason"]` is a stable code for programs and tests: ``dora``, ``shape_mismatch``, ``base_mismatch`` …
    """

    code = "layer_refused"

    def __init__(self, reason: str, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message, hint=hint, reason=reason, **details)

    @property
    def reason(self) -> str:
        return str(self.details["reason"])


class LayerCorrupt(Corrupt, LayerRefused):
    """An adapter whose bytes are not what they claim to be. `Corrupt` comes first: that is the kind surfaces show."""

    code = "layer_corrupt"
