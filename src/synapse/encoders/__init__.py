"""What runs an encoder: the vectors of texts."""

from __future__ import annotations

from synapse.encoders.encoder import Encoder, open_encoder
from synapse.encoders.host import Embeddings, EncoderHost, EncoderRunner, open_encoders

__all__ = ["Embeddings", "Encoder", "EncoderHost", "EncoderRunner", "open_encoder", "open_encoders"]
