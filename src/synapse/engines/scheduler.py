"""Which sequences a step computes, and how much of each.

Decoding sequences come first, one token each; what is left of the step's token budget goes to prefill, in chunks, so
a long prompt never holds up the answers that are already streaming. Places are given by rank: external before internal,
the higher priority first, and who has waited long before who has just come. When the KV cache is full, the sequence of
the lowest rank gives its blocks back and waits, and an internal one makes place for an external one that ranks above
it; it loses time, never tokens.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool
from synapse.engines.sequence import Sequence

Work = dict[Sequence, int]
WORTH_WAITING = BLOCK_TOKENS // 2
"""Tokens of a prefix for whose computation by another sequence one waits: fewer are computed sooner than waited for."""


class Scheduler:
    """Sequences waiting (by rank) and running."""

    def __init__(
        self, pool: BlockPool, *, max_batch: int, step_tokens: int, copy: Callable[[int, int, int], None]
    ) -> None:
        """A scheduler for sequences that share a pool; `copy` is as in `Sequence.copy_part`."""
        self._pool = pool
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._copy = copy
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def places(self) -> int:
        """How many more sequences the batch has room for."""
        return self._max_batch - len(self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        insort(self.waiting, seq, key=lambda seq: seq.rank)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        seq.release(self._pool)
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def schedule(self, now: float) -> Work:
        """The sequences of the next step and how many tokens of each; their blocks are taken."""
        work: Work = {}
        for seq in sorted((seq for seq in self.running if seq.pending == 1), key=lambda seq: seq.rank):
            self._go_on(seq, work, now)
        turned_away = False
        for seq in sorted([*(seq for seq in self.running if seq.pending > 1), *self.waiting], key=lambda s: s.rank):
            if seq in self.running:
                self._go_on(seq, work, now)
            elif seq.stack is None:
                continue  # its layers are on their way, or nothing is free for it anyway
            elif self._is_computed_elsewhere(seq):
                seq.waits_for("prefix", now)
            else:
                # Whoever finds no place holds up all that rank below, else many small ones could starve a large one.
                turned_away = turned_away or not self._start(seq, work, now)
                if turned_away:
                    seq.waits_for("place", now)
        return work

    def _left(self, work: Work) -> int:
        """Tokens that the step still has room for."""
        return self._step_tokens - sum(work.values())

    def _go_on(self, seq: Sequence, work: Work, now: float) -> None:
        """Compute more of a running sequence, unless it has just made place for another."""
        count = min(seq.pending, self._left(work))
        if seq not in self.running or count < 1:
            return
        while not seq.grow(self._pool, count):
            last = max(self.running, key=lambda seq: seq.rank)
            self._preempt(last, work, now)
            if last is seq:
                return
        work[seq] = count

    def _start(self, seq: Sequence, work: Work, now: float) -> bool:
        """Give a waiting sequence a place in the batch; False if it has to wait."""
        if self._left(work) < 1:
            return False
        seq.take_prefix(self._pool)
        if not self._has_room(seq) and not self._make_room(seq, work, now):
            seq.release(self._pool)
            return False
        seq.copy_part(self._pool, self._copy)
        if not seq.generated:
            seq.cached = seq.computed
        count = min(seq.pending, self._left(work))
        seq.grow(self._pool, count)
        seq.waits_for(None, now)
        self.waiting.remove(seq)
        self.running.append(seq)
        work[seq] = count
        return True

    def _has_room(self, seq: Sequence, but: tuple[Sequence, ...] = ()) -> bool:
        """Whether a sequence fits the batch and the KV cache, if some others were not there."""
        running = [other for other in self.running if other not in but]
        free = self._pool.available + sum(
            self._pool.ref_count[block] == 1 for other in but for block in other.block_table
        )
        promised = sum(other.missing_blocks for other in running)
        return len(running) < self._max_batch and seq.missing_blocks + promised <= free

    def _make_room(self, seq: Sequence, work: Work, now: float) -> bool:
        """Send internal sequences back to waiting for an external one that ranks above them; False if none would do."""
        below = [other for other in self.running if not other.external and other.rank > seq.rank]
        below.sort(key=lambda other: other.rank, reverse=True)
        for count in range(1, len(below) + 1 if seq.external else 0):
            if self._has_room(seq, tuple(below[:count])):
                for other in below[:count]:
                    self._preempt(other, work, now)
                return True
        return False

    def _preempt(self, seq: Sequence, work: Work, now: float) -> None:
        seq.release(self._pool)
        seq.waits_for("place", now)
        work.pop(seq, None)
        self.running.remove(seq)
        self.add(seq)
        self.preemptions += 1

    def _is_computed_elsewhere(self, seq: Sequence) -> bool:
        """Whether a running sequence that ranks above computes a prefix of this one right now, to be shared then.

        It is looked at anew in every step, so whatever becomes of the other one, nobody waits for it in vain.
        """
        for other in self.running:
            if other.pending > 1 and other.rank <= seq.rank:
                common = seq.common_tokens(other)
                worth = 1 if common == len(seq.tokens) - 1 else WORTH_WAITING
                if common > other.computed and common - seq.cached_tokens(self._pool) >= worth:
                    return True
        return False
