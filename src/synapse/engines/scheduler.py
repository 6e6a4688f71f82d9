"""Which sequences a step computes, and how much of each.

Decoding sequences come first, one token each; what is left of the step's token budget goes to prefill, in chunks, so
a long prompt never holds up the answers that are already streaming. When the KV cache is full, the sequence that
arrived last gives its blocks back and waits; it loses time, never tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool
from synapse.engines.sequence import Sequence


class Scheduler:
    """Sequences waiting (first come, first served) and running."""

    def __init__(self, pool: BlockPool, *, max_batch: int, step_tokens: int) -> None:
        self._pool = pool
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> dict[Sequence, int]:
        """The sequences of the next step and how many tokens of each; their blocks are taken."""
        work: dict[Sequence, int] = {}
        budget = self._step_tokens
        for seq in sorted(self.running, key=lambda seq: seq.pending > 1):
            if seq in self.running and budget > 0:
                count = min(seq.pending, budget)
                if self._make_room(seq, count, work):
                    work[seq] = count
                    budget -= count
        while self.waiting and budget > 0 and len(self.running) < self._max_batch:
            seq = self.waiting[0]
            seq.take_prefix(self._pool)
            if -(-len(seq.tokens) // BLOCK_TOKENS) - len(seq.blocks) > self._pool.available:
                seq.release(self._pool)
                break
            count = min(seq.pending, budget)
            seq.grow(self._pool, count)
            self.running.append(self.waiting.popleft())
            work[seq] = count
            budget -= count
        return work

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        seq.release(self._pool)
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def _make_room(self, seq: Sequence, count: int, work: dict[Sequence, int]) -> bool:
        """Grow `seq`, sending back to waiting whoever arrived last until there is room (in the end `seq` itself)."""
        while not seq.grow(self._pool, count):
            last = self.running.pop()
            last.release(self._pool)
            work.pop(last, None)
            self.waiting.appendleft(last)
            self.preemptions += 1
            if last is seq:
                return False
        return True
