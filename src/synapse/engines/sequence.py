"""One sequence being generated: its tokens, its place in the KV cache, and how its answer is chosen and told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synapse.callosum.message import Tract
from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool, Digest, common_length, next_digest, root_digest
from synapse.engines.choice import Choice
from synapse.engines.grammar import Constraint
from synapse.engines.lookup import PromptLookup
from synapse.engines.reference.lora import Stack
from synapse.engines.request import HIGHEST_PRIORITY, FinishReason, Request
from synapse.engines.sampling import Sampler
from synapse.engines.text import TextStream

AGEING_SECONDS = 5.0
"""For each step of priority that a request stands above another, it goes first if it came at most so much later."""

Reason = Literal["place", "layers", "prefix"]
"""What a sequence waits for: a place in the batch and the KV cache, its layers, or a prefix that another computes."""


class Sequence:
    """State of a request. `tokens` is prompt and answer; the keys and values of the first `computed` are cached."""

    def __init__(
        self,
        request_id: str,
        request: Request,
        *,
        arrived: float,
        limit: int,
        constraint: Constraint | None,
    ) -> None:
        self.id = request_id
        self.request = request
        self.stack: Stack | None = None
        """Its layers; None while they are not all in memory, or it is too far back in the queue to need them."""
        self.limit = limit
        """The most tokens, prompt and answer together."""
        self.constraint = constraint
        self.tokens = list(request.prompt)
        self.computed = 0
        self.cached = 0
        """Prompt tokens that were found in the cache when the sequence started."""
        self.started = False
        """Whether any of it has been computed."""
        self.block_table: list[int] = []
        self._digests: list[Digest] = [root_digest(request.layers)]
        self.sampler = Sampler(request.sampling, request.prompt)
        self.lookup = PromptLookup()
        self.text = TextStream(request.stop)
        self.finish: FinishReason | None = None
        self.external = request.tract is Tract.EXTERNAL
        level = request.priority + (HIGHEST_PRIORITY + 1 if self.external else 0)
        self.rank = arrived - AGEING_SECONDS * level
        """The lower goes first. It never changes, so that whoever has waited long enough is before all newcomers."""
        self.waited: dict[Reason, float] = {}
        """Seconds spent waiting, by what for."""
        self._waiting: tuple[Reason, float] | None = ("place", arrived)

    @property
    def layer_ids(self) -> set[str]:
        """The layers that it needs."""
        return {layer_id for layer_id, _ in self.request.layers}

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: one while decoding, more during prefill."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def missing_blocks(self) -> int:
        """Blocks that it has yet to take before all of its tokens are computed."""
        return max(0, -(-len(self.tokens) // BLOCK_TOKENS) - len(self.block_table))

    def table(self) -> NDArray[np.intp]:
        """The block table as an array."""
        return np.asarray(self.block_table, np.intp)

    def next_choices(self, guess: Iterable[int] = ()) -> tuple[Choice, ...]:
        """How the token after the last one is chosen, and those after each guessed token if that is right."""
        mask = self.constraint.mask() if self.constraint else None
        guess, length = tuple(guess), len(self.tokens)
        return tuple(self.sampler.choice(length + n, mask, guess[:n]) for n in range(1 + len(guess)))

    def waits_for(self, reason: Reason | None, now: float) -> None:
        """Note what it waits for from now on; None when it runs."""
        if self._waiting is not None:
            before, since = self._waiting
            self.waited[before] = self.waited.get(before, 0.0) + now - since
        self._waiting = None if reason is None else (reason, now)

    def take_prefix(self, pool: BlockPool) -> None:
        """Start from the longest prefix that the pool has. At least one token is left to compute, for its logits."""
        for end in range(BLOCK_TOKENS, len(self.tokens), BLOCK_TOKENS):
            block = pool.share(self._digest(end // BLOCK_TOKENS))
            if block is None:
                break
            self.block_table.append(block)
            self.computed = end

    def copy_part(self, pool: BlockPool, copy: Callable[[int, int, int], None]) -> None:
        """Go on from a block of another sequence that differs only further on, if there is one.

        Args:
            copy: copies from a block into another the first so many tokens.
        """
        parent = self._digest(self.computed // BLOCK_TOKENS)
        found = pool.share_part(parent, self._part(self.computed))
        if found is None:
            return
        block, count = found
        allocated = pool.allocate(1)
        if allocated is not None:
            copy(block, allocated[0], count)
            self.block_table += allocated
            self.computed += count
        pool.free([block])

    def grow(self, pool: BlockPool, tokens: int) -> bool:
        """Take blocks for so many more computed tokens; False (and nothing taken) when the pool has none left."""
        needed = -(-(self.computed + tokens) // BLOCK_TOKENS) - len(self.block_table)
        allocated = pool.allocate(max(needed, 0))
        if allocated is None:
            return False
        self.block_table += allocated
        return True

    def advance(self, pool: BlockPool, tokens: int) -> None:
        """Note that so many tokens are computed, and register what others can share."""
        before = self.computed
        self.computed += tokens
        for index in range(before // BLOCK_TOKENS, self.computed // BLOCK_TOKENS):
            self._register(pool, index)
        if before < len(self.request.prompt) <= self.computed:
            self._register(pool, self.computed // BLOCK_TOKENS)

    def release(self, pool: BlockPool) -> None:
        """Give all blocks back; what was computed is computed (or found in the cache) again if the sequence goes on."""
        self._register(pool, self.computed // BLOCK_TOKENS)
        pool.free(self.block_table)
        self.block_table = []
        self.computed = 0

    def _register(self, pool: BlockPool, index: int) -> None:
        """Register what is computed of a block."""
        start = index * BLOCK_TOKENS
        end = min(start + BLOCK_TOKENS, self.computed)
        if start < end:
            pool.register(self.block_table[index], self._digest(index), self.tokens[start:end])

    def cached_tokens(self, pool: BlockPool) -> int:
        """How many of its tokens the pool has, if it were to start now."""
        full = (len(self.tokens) - 1) // BLOCK_TOKENS
        blocks = next((index for index in range(full) if self._digest(index + 1) not in pool), full)
        start = blocks * BLOCK_TOKENS
        return start + pool.part_length(self._digest(blocks), self._part(start))

    def _part(self, start: int) -> list[int]:
        """The tokens of a block, but not the very last token, which is computed for its logits."""
        return self.tokens[start : min(start + BLOCK_TOKENS, len(self.tokens) - 1)]

    def common_tokens(self, other: Sequence) -> int:
        """With how many tokens both begin, if they have the same layers; at most all of its own but one."""
        low, high = -1, (min(len(self.tokens), len(other.tokens)) - 1) // BLOCK_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            if self._digest(middle) == other._digest(middle):
                low = middle
            else:
                high = middle - 1
        if low < 0:
            return 0
        start = low * BLOCK_TOKENS
        part = slice(start, start + BLOCK_TOKENS)
        return min(start + common_length(self.tokens[part], other.tokens[part]), len(self.tokens) - 1)

    def _digest(self, blocks: int) -> Digest:
        """The digest of the first so many blocks of tokens."""
        while len(self._digests) <= blocks:
            start = (len(self._digests) - 1) * BLOCK_TOKENS
            self._digests.append(next_digest(self._digests[-1], self.tokens[start : start + BLOCK_TOKENS]))
        return self._digests[blocks]
