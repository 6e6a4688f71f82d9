"""How far quantised models are from the float32 one: divergence of their logits, and perplexity.

The text is the documentation of the language that every Python carries (`pydoc_data.topics`), so that it is there
wherever this runs. It is cut into windows of `WINDOW` tokens, each computed from an empty context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.errors import InvalidInput
from synapse.models.tokenizer import Tokenizer

WINDOW = 512
ROWS = 64
"""Positions compared at a time: a whole window of a large vocabulary would take hundreds of megabytes more."""

Tokens = Sequence[int]
Logits = NDArray[np.float32]
Model = Callable[[Tokens, bool], Logits]
"""Tokens, and whether the layer is on, to the logits after each of them, float32[len(tokens), vocab]."""


def text() -> str:
    """English with some code in it, the same in every run of one version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    """The beginning of the text in whole windows, of so many tokens in all or a little more.

    Raises:
        InvalidInput: the text is not so long.
    """
    ids = tokenizer.encode(text())
    count = -(-tokens // WINDOW)
    if len(ids) < count * WINDOW:
        raise InvalidInput(f"the text has {len(ids)} tokens; {count * WINDOW} are needed")
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """The natural logarithms of the probabilities, [positions, vocab]."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


@dataclass
class Comparison:
    """What one model's logits came to, beside those of float32.

    Attributes:
        divergence: sum over positions of the Kullback-Leibler divergence from the float32 model, in nats.
        positions: how many there were.
        agreed: where both find the same token likeliest.
    """

    divergence: float = 0.0
    positions: int = 0
    agreed: int = 0

    def add(self, truth: Logits, logits: Logits) -> None:
        for start in range(0, len(truth), ROWS):
            p, q = log_softmax(truth[start : start + ROWS]), log_softmax(logits[start : start + ROWS])
            self.divergence += float((np.exp(p) * (p - q)).sum())
            self.agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            self.positions += len(p)


@dataclass
class Surprise:
    """What a text cost a model: `nats` over so many predicted `tokens`, the first of each window left out."""

    nats: float = 0.0
    tokens: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def add(self, window: Tokens, logits: Logits) -> None:
        following = np.asarray(window[1:])
        for start in range(0, len(following), ROWS):
            part = following[start : start + ROWS]
            self.nats -= float(log_softmax(logits[start : start + len(part)])[np.arange(len(part)), part].sum())
        self.tokens += len(following)


@dataclass
class Quality:
    """Everything that is measured; the keys are (contender, whether the layer is on)."""

    comparisons: dict[tuple[str, bool], Comparison] = field(default_factory=dict)
    surprises: dict[str, Surprise] = field(default_factory=dict)

    def divergence_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "contender": name,
                "layer": "rank 16, all maps" if layer else "none",
                "positions": c.positions,
                "mean_divergence": c.divergence / c.positions,
                "same_likeliest_token": c.agreed / c.positions,
            }
            for (name, layer), c in self.comparisons.items()
        ]

    def perplexity_rows(self) -> list[dict[str, Any]]:
        truth = next(iter(self.surprises.values())).perplexity
        return [
            {"contender": name, "tokens": s.tokens, "perplexity": s.perplexity, "to_float32": s.perplexity / truth}
            for name, s in self.surprises.items()
        ]


def measure(
    truth: Model,
    ours: Mapping[str, Model],
    peers: Mapping[str, Model],
    texts: Sequence[Tokens],
    *,
    compared: int,
    say: Callable[[str], None],
) -> Quality:
    """Perplexity of the float32 model and of ours on all windows; divergence of all on the first `compared`."""
    quality = Quality(surprises={name: Surprise() for name in ("float32", *ours)})
    everybody = {**ours, **peers}
    quality.comparisons = {(name, layer): Comparison() for layer in (False, True) for name in everybody}
    for index, window in enumerate(texts):
        if index % 10 == 0:
            say(f"quality: window {index} of {len(texts)}")
        expected = truth(window, False)
        quality.surprises["float32"].add(window, expected)
        for name, model in _taking_part(ours, peers, index < compared):
            logits = model(window, False)
            if name in ours:
                quality.surprises[name].add(window, logits)
            if index < compared:
                quality.comparisons[name, False].add(expected, logits)
    for window in texts[:compared]:
        expected = truth(window, True)
        for name, model in everybody.items():
            quality.comparisons[name, True].add(expected, model(window, True))
    return quality


def _taking_part(ours: Mapping[str, Model], peers: Mapping[str, Model], compared: bool) -> Iterable[tuple[str, Model]]:
    yield from ours.items()
    if compared:
        yield from peers.items()
