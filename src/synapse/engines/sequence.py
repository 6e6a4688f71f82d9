"""One sequence being generated: its tokens, its place in the KV cache, and how its answer is chosen and told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool, Digest, next_digest, root_digest
from synapse.engines.grammar import Constraint
from synapse.engines.reference.lora import Stack
from synapse.engines.request import FinishReason, Request
from synapse.engines.sampling import Sampler
from synapse.engines.text import TextStream


class Sequence:
    """State of a request. `tokens` is prompt and answer; the keys and values of the first `computed` are cached."""

    def __init__(
        self, request_id: str, request: Request, *, stack: Stack, limit: int, vocab: int, constraint: Constraint | None
    ) -> None:
        self.id = request_id
        self.request = request
        self.stack = stack
        self.limit = limit
        """The most tokens, prompt and answer together."""
        self.constraint = constraint
        self.tokens = list(request.prompt)
        self.computed = 0
        self.cached = 0
        """Prompt tokens that were found in the cache when the sequence started."""
        self.blocks: list[int] = []
        self._digests: list[Digest] = [root_digest(request.layers)]
        self.sampler = Sampler(request.sampling, request.prompt, vocab)
        self.text = TextStream(request.stop)
        self.finish: FinishReason | None = None

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: one while decoding, more during prefill."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    def table(self) -> NDArray[np.intp]:
        """The block table as an array."""
        return np.asarray(self.blocks, np.intp)

    def take_prefix(self, pool: BlockPool) -> None:
        """Start from the longest prefix that the pool has. At least one token is left to compute, for its logits."""
        for end in range(BLOCK_TOKENS, len(self.tokens), BLOCK_TOKENS):
            block = pool.share(self._digest(end // BLOCK_TOKENS))
            if block is None:
                break
            self.blocks.append(block)
            self.computed = end
        if not self.generated:
            self.cached = self.computed

    def grow(self, pool: BlockPool, tokens: int) -> bool:
        """Take blocks for so many more computed tokens; False (and nothing taken) when the pool has none left."""
        needed = -(-(self.computed + tokens) // BLOCK_TOKENS) - len(self.blocks)
        taken = pool.take(max(needed, 0))
        if taken is None:
            return False
        self.blocks += taken
        return True

    def advance(self, pool: BlockPool, tokens: int) -> None:
        """Note that so many tokens are computed, and publish the blocks that became full."""
        full = self.computed // BLOCK_TOKENS
        self.computed += tokens
        for index in range(full, self.computed // BLOCK_TOKENS):
            pool.publish(self.blocks[index], self._digest(index + 1))

    def release(self, pool: BlockPool) -> None:
        """Give all blocks back; what was computed is computed (or found in the cache) again if the sequence goes on."""
        pool.release(self.blocks)
        self.blocks = []
        self.computed = 0

    def _digest(self, blocks: int) -> Digest:
        """The digest of the first so many blocks of tokens."""
        while len(self._digests) <= blocks:
            start = (len(self._digests) - 1) * BLOCK_TOKENS
            self._digests.append(next_digest(self._digests[-1], self.tokens[start : start + BLOCK_TOKENS]))
        return self._digests[blocks]
