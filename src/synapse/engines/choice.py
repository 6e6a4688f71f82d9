"""What is said of a row of logits whose next token is to be chosen beside them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Edits(NamedTuple):
    """What bias and penalties do: the logit of `tokens[i]` plus `bias[i]` is divided by `factor[i]` if it is above
    zero, else multiplied with it; then `less[i]` is subtracted. No token is named twice.
    """

    tokens: NDArray[np.int32]
    bias: NDArray[np.float32]
    factor: NDArray[np.float32]
    less: NDArray[np.float32]


class Choice(NamedTuple):
    """How the next token is chosen; see `Sampling`. `uniform` is the draw, from [0, 1).

    `mask` has a bit for each token that a grammar allows, uint32[vocab / 32], lowest bit first; None allows all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0
    edits: Edits | None = None
    mask: NDArray[np.uint32] | None = None


UNDECIDED = -1
"""In the place of a token: nobody has chosen, or could with certainty; the logits have to be looked at."""
