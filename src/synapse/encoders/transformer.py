"""The reference encoder: the forward pass of BERT and XLM-RoBERTa in NumPy, float32.

It is the specification that native kernels must agree with, so it is written to be read. The architecture is that of
BERT (Devlin et al., 2018, arXiv:1810.04805): learned positions, attention over the whole text, a layer norm after each
residual, GELU. Texts of different lengths lie one after another without padding; only attention tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from synapse.encoders.weights import EncoderWeights, Norm
from synapse.models.encoder.config import EncoderConfig

Array = NDArray[np.float32]
Ids = NDArray[np.int32]

MOST_SCORES = 2**22
"""Attention scores that are held at once (16 MiB), which bounds the memory of a long text."""
GELU_NUMBERS = 2**14
"""Numbers put through GELU at once: few calls, and the temporaries stay in the cache."""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The tokens of several texts.

    Attributes:
        ids: int32[rows], text after text.
        lengths: how many rows each text has, at least one.
    """

    ids: Ids
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[Ids]) -> TextBatch:
        """The batch of texts that are given one by one."""
        return cls(np.concatenate(texts), tuple(map(len, texts)))

    @property
    def starts(self) -> NDArray[np.intp]:
        """The first row of each text."""
        return np.cumsum((0, *self.lengths[:-1]))


class EncoderKernel(Protocol):
    """What computes an encoder's blocks. Native code has this form; `ReferenceEncoder` is what it must agree with.

    Safe to use from several threads. A text's result depends on its company in the batch by no more than float
    rounding.
    """

    def forward(self, batch: TextBatch) -> Array:
        """The hidden state of every token after the last block, float32[rows, hidden], in the order of `batch.ids`.

        The ids are within the vocabulary, and no text is longer than the encoder's `max_tokens`.
        """
        ...


class ReferenceEncoder:
    """The encoder behind the batch: weights that never change, and one method."""

    def __init__(self, weights: EncoderWeights) -> None:
        self._weights = weights

    @np.errstate(over="ignore", invalid="ignore")
    def forward(self, batch: TextBatch) -> Array:
        """As `EncoderKernel.forward`. Weights that make numbers overflow show in the result."""
        weights, config = self._weights, self._weights.config
        x = weights.words[batch.ids]
        x += weights.positions[position_rows(batch, config)]
        x = layer_norm(x, weights.embedding_norm, config.norm_eps)
        for block in weights.blocks:
            y = block.attention_output(attend_all(block.qkv(x), batch, config.heads))
            y += x
            x = layer_norm(y, block.attention_norm, config.norm_eps)
            y = block.down(gelu(block.up(x)))
            y += x
            x = layer_norm(y, block.output_norm, config.norm_eps)
        return x


def position_rows(batch: TextBatch, config: EncoderConfig) -> NDArray[np.intp]:
    """The row of the position table for each token.

    BERT counts from 0. XLM-RoBERTa counts from `padding_id` + 1, skips tokens that are the padding token, and gives
    those the row `padding_id` (`create_position_ids_from_input_ids` of transformers).
    """
    starts = np.repeat(batch.starts, batch.lengths)
    rows: NDArray[np.intp]
    if config.architecture == "bert":
        rows = np.arange(len(batch.ids)) - starts
    else:
        counted = batch.ids != config.padding_id
        before = np.cumsum(counted) - counted  # tokens that count before each row
        rows = np.where(counted, before - before[starts] + config.first_position, config.padding_id)
    return rows


def layer_norm(x: Array, norm: Norm, eps: float) -> Array:
    """Layer normalisation over the last axis (Ba et al., 2016, arXiv:1607.06450)."""
    centred: Array = x - x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", centred, centred)[..., None] / np.float32(x.shape[-1])
    centred /= np.sqrt(variance + np.float32(eps))
    centred *= norm.weight
    centred += norm.bias
    return centred


def gelu(x: Array) -> Array:
    """x Φ(x) with the exact normal distribution Φ (Hendrycks and Gimpel, 2016, arXiv:1606.08415); x is used up."""
    x = np.ascontiguousarray(x)
    flat = x.reshape(-1)
    for start in range(0, len(flat), GELU_NUMBERS):
        part = flat[start : start + GELU_NUMBERS]
        share = erf(part * np.float32(0.5**0.5))
        share += 1
        share *= 0.5
        part *= share
    return x


# P and Q of erf(x) ≈ x P(x²) / Q(x²) on |x| ≤ 3.8325, beyond which erf is ±1 in float32: as in XLA and Eigen
# (openxla/xla, xla/hlo/builder/lib/math.cc, ErfImpl32). Highest power first.
_ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_ERF_Q = (
    -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667,
    0.11098505178285362, 0.49746925110067538, 1.0,
)  # fmt: skip
_ERF_END = np.float32(3.832506856900711)


def erf(x: Array) -> Array:
    """The error function, to about 1e-7, float32 of any shape."""
    x = np.clip(x, -_ERF_END, _ERF_END)
    square = x * x
    x *= _polynomial(square, _ERF_P)
    x /= _polynomial(square, _ERF_Q)
    return x


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += np.float32(coefficient)
    return y


def attend_all(qkv: Array, batch: TextBatch, heads: int) -> Array:
    """Attention of every text over itself: qkv, [rows, 3 x hidden], becomes [rows, hidden].

    Neighbours of one length are computed together.
    """
    rows, hidden = qkv.shape[0], qkv.shape[1] // 3
    out = np.empty((rows, hidden), np.float32)
    row = index = 0
    while index < len(batch.lengths):
        length = batch.lengths[index]
        most = max(MOST_SCORES // (heads * length * length), 1)
        count = 1
        while count < most and batch.lengths[index + count : index + count + 1] == (length,):
            count += 1
        end = row + count * length
        q, k, v = qkv[row:end].reshape(count, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        out[row:end] = attend(q, k, v).transpose(0, 2, 1, 3).reshape(end - row, hidden)
        row, index = end, index + count
    return out


def attend(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention (Vaswani et al., 2017, arXiv:1706.03762): each argument and the result [texts, heads, n, d]."""
    texts, heads, n, d = q.shape
    out = np.empty((texts, heads, n, d), np.float32)
    step = max(MOST_SCORES // (texts * heads * n), 1)
    for start in range(0, n, step):
        scores: Array = q[:, :, start : start + step] @ k.swapaxes(-1, -2)
        scores *= np.float32(d**-0.5)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        np.matmul(scores, v, out=out[:, :, start : start + step])
    return out
