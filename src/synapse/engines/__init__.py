"""What runs a model. An engine is a batch that steps; sequences with different layers share every step."""

from __future__ import annotations

from synapse.engines.answering import Answering
from synapse.engines.cache.layers import LayerNotLoaded
from synapse.engines.checking import ContextOverflow
from synapse.engines.client import EngineClient
from synapse.engines.counters import Counters
from synapse.engines.engine import Engine
from synapse.engines.front_end import FrontEnd, open_front_end
from synapse.engines.grammar import BadGrammar
from synapse.engines.host import EngineHost, open_engine, open_engines
from synapse.engines.limits import Backend, Limits, limits_from
from synapse.engines.request import (
    DeadlineExceeded,
    Delta,
    Event,
    Finished,
    FinishReason,
    Grammar,
    LayersOverflow,
    Request,
    Sampling,
    TokenLogprob,
    layers_overflow,
)
from synapse.engines.runner import EngineRunner, EngineStats

__all__ = [
    "Answering",
    "Backend",
    "BadGrammar",
    "ContextOverflow",
    "Counters",
    "DeadlineExceeded",
    "Delta",
    "Engine",
    "EngineClient",
    "EngineHost",
    "EngineRunner",
    "EngineStats",
    "Event",
    "FinishReason",
    "Finished",
    "FrontEnd",
    "Grammar",
    "LayerNotLoaded",
    "LayersOverflow",
    "Limits",
    "Request",
    "Sampling",
    "TokenLogprob",
    "layers_overflow",
    "limits_from",
    "open_engine",
    "open_engines",
    "open_front_end",
]
