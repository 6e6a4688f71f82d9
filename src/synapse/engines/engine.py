"""An engine is a batch that steps: `add`, `step`, `cancel`, with layers loaded and evicted beside it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.engines.answering import ASKED_FOR, Answering
from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool
from synapse.engines.cache.layers import LayerCache, LoadedLayer
from synapse.engines.cache.memory import SHARE, default_cache_tokens, machine_memory
from synapse.engines.checking import ContextOverflow, check_budget, check_request, check_stack
from synapse.engines.choice import UNDECIDED
from synapse.engines.counters import Counters
from synapse.engines.grammar import Constraint, GrammarFailed, Grammars
from synapse.engines.limits import Limits
from synapse.engines.reference.lora import Stack
from synapse.engines.reference.transformer import Chunk, StepLogits, Transformer
from synapse.engines.request import (
    DeadlineExceeded,
    Delta,
    Event,
    Finished,
    FinishReason,
    Grammar,
    Request,
    TokenLogprob,
    layers_overflow,
)
from synapse.engines.sampling import choose, token_logprob
from synapse.engines.scheduler import Scheduler, Work
from synapse.engines.sequence import Reason, Sequence
from synapse.errors import Conflict, InternalError, InvalidInput, SynapseError, Unavailable
from synapse.log import Logger
from synapse.models.chat_template import ChatTemplate
from synapse.models.config import ModelConfig
from synapse.models.tokenizer import Tokenizer

log = Logger(__name__)

GUESSED_ROWS = 8
"""Rows of a step that has guesses: as many as one tile of the matrix products computes together."""
GUESSED_SEQUENCES = 2
"""With more sequences than these a step has no arithmetic to spare for guesses."""
LOGITS_CHUNK = 256
"""Tokens computed at once by `Engine.logits`."""
WAITED_FOR: dict[Reason, str] = {
    "place": "a place in the batch",
    "layers": "its layers to be read",
    "prefix": "another request that computes the same prompt",
}


class Engine:
    """One base model and everything that is being generated with it.

    Not thread safe: one thread calls `add`, `step` and `cancel` (`EngineRunner` is that thread for asyncio).
    `compile_grammar` and what `LayerCache` says of its own may run beside it.
    """

    def __init__(
        self,
        transformer: Transformer[Any],
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        limits: Limits,
        name: str | None = None,
        *,
        release: Callable[[], None] = lambda: None,
        answering: Callable[[], Answering] = lambda: ASKED_FOR,
    ) -> None:
        """An engine of a model.

        Args:
            name: what the model is called here.
            answering: says who computes the steps, as of now.
            release: called when the engine is closed.
        """
        self.config: ModelConfig = transformer.config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.limits = limits
        self.context = transformer.context
        self.weight_bytes = transformer.weight_bytes
        self._transformer = transformer
        self._pool = BlockPool(cache_tokens(limits, self.context, transformer.kv_token_bytes) // BLOCK_TOKENS)
        self._cache = transformer.new_cache(self._pool.blocks)
        self._scheduler = Scheduler(
            self._pool, max_batch=limits.max_batch, step_tokens=limits.step_tokens, copy=self._cache.copy
        )
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[Event] = []
        self._stalled = False
        self._closed = False
        self._wanted: set[str] = set()
        self._ids = itertools.count(1)
        names = (name,) if name else ()
        self.layers = LayerCache(
            self.config,
            names,
            transformer.prepare,
            max_layers=limits.max_layers,
            max_bytes=layer_bytes(limits),
        )
        self.counters = Counters()
        self._release = release
        self.answering = answering

    # Requests

    def add(self, request: Request, request_id: str | None = None) -> str:
        """Queue a request.

        Args:
            request_id: what it is called, if no request that has not ended is called so; made up when left out.

        Returns:
            Its id, which its events carry.

        Raises:
            ContextOverflow: prompt, or prompt and `max_tokens` together, do not fit the context.
            LayerNotLoaded: the stack names an unknown layer.
            InvalidInput: a token, a sampling setting, a stop string or the grammar does not make sense.
            Conflict: another request has this id.
        """
        if request_id in self._sequences:
            raise Conflict(f"there is a request {request_id} already")
        limit = check_request(request, self.config.vocab, self.context)
        check_stack(request.layers)
        for layer_id, _ in request.layers:
            self.layers.get(layer_id)
        constraint = self.compile_grammar(request.grammar) if request.grammar else None
        if constraint is not None:
            limit = check_budget(request, limit, constraint.shortest)
        seq = Sequence(
            request_id or f"r{next(self._ids)}",
            request,
            arrived=time.monotonic(),
            limit=limit,
            constraint=constraint,
        )
        finish = self._go_on(seq, request.answered)
        self._sequences[seq.id] = seq
        self._scheduler.add(seq)
        self._stalled = False
        self.counters.requests += 1
        if finish:
            self._ended.append(self._end(seq, finish))
        return seq.id

    def _go_on(self, seq: Sequence, answered: SequenceOf[int]) -> FinishReason | None:
        """Put a new sequence where another engine has left it; returns why it has ended there, if it has."""
        finish: FinishReason | None = None
        for token in answered:
            if finish:
                raise InvalidInput("the answer has tokens behind its end", param="answered")
            _, _, finish = self._take(seq, token)
        return finish

    def cancel(self, request_id: str) -> bool:
        """Stop a request; its `Finished` event comes with the next step. False when it has ended already."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._ended.append(self._end(seq, "cancelled"))
        return True

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._sequences or self._ended)

    @property
    def ready(self) -> bool:
        """Whether there is anything to do before a layer has been read or `next_deadline` has passed."""
        return bool(self._ended) or self.layers.has_fetched or (bool(self._sequences) and not self._stalled)

    @property
    def next_deadline(self) -> float | None:
        """The first deadline of those that wait."""
        return min((d for seq in self._scheduler.waiting if (d := seq.request.deadline) is not None), default=None)

    @property
    def running(self) -> int:
        """Sequences that share the current steps."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that have not started, or gave their place in the KV cache back."""
        return len(self._scheduler.waiting)

    @property
    def kv_tokens_held(self) -> int:
        """Tokens of KV cache that sequences hold, in whole blocks."""
        return self._pool.held * BLOCK_TOKENS

    @property
    def kv_tokens_cached(self) -> int:
        """Tokens of KV cache that no sequence holds, kept for those that begin alike, in whole blocks."""
        return self._pool.cached * BLOCK_TOKENS

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache has room for."""
        return self._pool.blocks * BLOCK_TOKENS

    def step(self, *, block: bool = True) -> list[Event]:
        """Compute one step for every running sequence, each with its own layers, and tell what came of it.

        Args:
            block: when all wait for layers that are being read, wait for the first, or until a deadline passes.

        Raises:
            Unavailable: the engine is closed.
        """
        events = self._begin_step()
        work = self._scheduler.schedule(time.monotonic())
        self.counters.preemptions = self._scheduler.preemptions
        self.counters.evicted_blocks = self._pool.evictions
        self._stalled = not work and self.layers.fetching
        if not work:
            if block and not events and self._stalled:
                deadline = self.next_deadline
                self._take_in_layers(None if deadline is None else max(deadline - time.monotonic(), 0.001))
            return events
        chunks, guesses = [], []
        for seq, guess in zip(list(work), self._guesses(work), strict=True):
            count = work[seq]
            try:
                choices = seq.next_choices(guess) if count == seq.pending else ()
            except Exception as error:
                del work[seq]
                events.append(self._fail(seq, error))
                continue
            tokens = np.array(seq.tokens[seq.computed : seq.computed + count] + guess, np.intp)
            chunks.append(Chunk(tokens, seq.computed, seq.table(), seq.stack or (), len(choices), choices))
            guesses.append(guess)
        if not chunks:
            return events
        logits = self._transformer.forward(chunks, self._cache)
        self.counters.steps += 1
        row = 0
        for (seq, count), chunk, guess in zip(work.items(), chunks, guesses, strict=True):
            if not seq.started:
                seq.started = True
                self.counters.prompt_tokens += len(seq.request.prompt)
                self.counters.cached_tokens += seq.cached
            decoding = seq.generated > 0 and count == 1
            self.counters.decode_tokens += count if decoding else 0
            self.counters.prefill_tokens += 0 if decoding else count
            seq.advance(self._pool, count)
            if chunk.wanted:
                events += self._continue_safely(seq, logits, row)
                right = 0
                while right < len(guess) and seq.id in self._sequences and seq.tokens[-1] == guess[right]:
                    right += 1
                    self.counters.decode_tokens += 1
                    seq.advance(self._pool, 1)
                    events += self._continue_safely(seq, logits, row + right)
                if guess:
                    self.counters.guessed_tokens += len(guess)
                    self.counters.right_guesses += right
                    seq.lookup.judge(len(guess), right, len(seq.tokens))
                row += chunk.wanted
        return events

    def _begin_step(self) -> list[Event]:
        """Take in what has come since the last step; returns the events that this brings."""
        if self._closed:
            raise Unavailable("the engine is closed", hint="open it again")
        self._take_in_layers()
        self._end_overdue()
        events, self._ended = self._ended, []
        self._want_layers()
        return events

    def _guesses(self, work: Work) -> list[list[int]]:
        """What each sequence of a step computes beyond its own tokens. What is wrong of it is overwritten later."""
        if not self.limits.prompt_lookup or len(work) > GUESSED_SEQUENCES:
            return [[] for _ in work]
        return [
            self._guess(seq, GUESSED_ROWS // len(work) - 1) if all(n == 1 for n in work.values()) else []
            for seq in work
        ]

    def _guess(self, seq: Sequence, most: int) -> list[int]:
        if not seq.generated or seq.constraint is not None:
            return []
        guess = seq.lookup.guess(seq.tokens, min(most, seq.limit - len(seq.tokens) - 1))
        return guess if seq.grow(self._pool, 1 + len(guess)) else []

    def reset(self) -> None:
        """Drop every sequence without events, after a step has raised."""
        for seq in list(self._scheduler):
            self._scheduler.remove(seq)
        self._sequences.clear()
        self._ended.clear()

    def close(self) -> None:
        """Give back memory, threads and files, whoever still refers to the engine. No step may follow."""
        self._closed = True
        self.reset()
        self.layers.close()
        self._transformer.close()
        self._cache.close()
        self._release()

    def _continue_safely(self, seq: Sequence, logits: StepLogits, row: int) -> list[Event]:
        """As `_continue`; what fails there ends this sequence and none of those that share the step."""
        try:
            return self._continue(seq, logits, row)
        except Exception as error:
            return [self._fail(seq, error)]

    def _fail(self, seq: Sequence, error: Exception) -> Finished:
        """End a sequence whose next token could not be chosen."""
        if isinstance(error, GrammarFailed):
            self.counters.grammar_failures += 1
            log.error("engine.grammar_failed", request=seq.id, reason=error.message, exc_info=error)
        if isinstance(error, SynapseError):
            return self._end(seq, "error", error)
        log.error("choosing a token failed", request=seq.id, exc_info=error)  # a defect
        failure = InternalError(f"choosing the next token failed: {error}", hint="the details are in the log")
        failure.__cause__ = error
        return self._end(seq, "error", failure)

    def _continue(self, seq: Sequence, logits: StepLogits, row: int) -> list[Event]:
        """Choose the next token of a sequence and say what that adds to its answer."""
        request = seq.request
        if not logits.finite[row]:
            raise _not_finite(seq.stack or ())
        values = logits.values[row]
        token = int(logits.chosen[row])
        if token == UNDECIDED:
            (choice,) = seq.next_choices()
            token = choose(values, choice)
        token, text, finish = self._take(seq, token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            logprobs = (token_logprob(values, token, request.logprobs),)
        events: list[Event] = [Delta(seq.id, text, (token,), logprobs)]
        if finish:
            events.append(self._end(seq, finish))
        return events

    def _take(self, seq: Sequence, token: int) -> tuple[int, str, FinishReason | None]:
        """Add a token to an answer; returns it (a grammar may put another in its place), what text is certain now, and
        why the answer ends with it, if it does.
        """
        remaining = seq.limit - len(seq.tokens) - 1
        if seq.constraint:
            token = seq.constraint.accept(token, remaining)
        seq.sampler.note(token)
        seq.tokens.append(token)
        finish: FinishReason | None = None
        ends = token in self.tokenizer.eos_ids and not seq.request.ignore_eos
        if ends or (seq.constraint and seq.constraint.complete):
            finish = "stop"
        elif remaining <= 0:
            finish = "stop" if seq.constraint and seq.constraint.accepting else "length"
        if seq.constraint and finish == "stop":
            seq.constraint.check_answer()
        text = seq.text.push(b"" if ends else self.tokenizer.token_bytes(token), last=finish is not None)
        if seq.text.stopped:
            finish = "stop"
        return token, text, finish

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Finished:
        self._scheduler.remove(seq)
        del self._sequences[seq.id]
        return Finished(seq.id, reason, len(seq.request.prompt), seq.generated, seq.cached, error)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.context)

    def compile_grammar(self, grammar: Grammar) -> Constraint:
        """Compile a grammar (kept, so that `add` finds it ready). A complex one takes some seconds.

        Raises:
            BadGrammar: it cannot be compiled.
        """
        return self._grammars.compile(grammar)

    # Layers

    def load_layer(self, path: Path | str) -> str:
        """Make a PEFT LoRA adapter known by its folder. An unchanged folder is not read twice.

        Returns:
            The layer id: the sha256 of its contents.

        Raises:
            LayerRefused, LayerCorrupt: the folder does not hold an adapter that fits this model.
        """
        path = Path(path)
        return self.layers.known(path) or self.put_layer(self.layers.read(path))

    def put_layer(self, loaded: LoadedLayer) -> str:
        """Keep a layer that was read (with `layers.read` or `layers.load`, in any thread)."""
        self.layers.put(loaded, in_use=self._layers_in_use())
        return loaded.layer.id

    def unload_layer(self, layer_id: str) -> None:
        """Forget a layer.

        Raises:
            LayerNotLoaded: there is no such layer.
            Conflict: a sequence that has not ended uses it.
        """
        self.layers.forget(layer_id, in_use={each for seq in self._scheduler for each in seq.layer_ids})

    def _want_layers(self) -> None:
        """Give their layers to those that may start soon, and have the missing ones read.

        Soon is: who finds a place in the batch, and others in the queue as far as their layers fit the cache beside
        those in use. The rest let go of theirs.
        """
        wanted = self._running_layers()
        places = max(self._scheduler.places, 1)
        for position, seq in enumerate(self._scheduler.waiting):
            needed = wanted | seq.layer_ids
            if position < places or needed == wanted or self.layers.fits(needed):
                wanted = needed
                seq.stack = seq.stack if seq.stack is not None else self._stack_in_memory(seq)
            else:
                seq.stack = None
                seq.waits_for("place", time.monotonic())
        self._wanted = wanted

    def _stack_in_memory(self, seq: Sequence) -> Stack | None:
        """The layers of a waiting sequence; None, and they are being read, if some are not there."""
        stack = []
        for layer_id, weight in seq.request.layers:
            layer = self.layers.get(layer_id)
            if layer is None:
                self.layers.fetch(layer_id)
            else:
                stack.append((layer, float(weight)))
        if len(stack) == len(seq.request.layers):
            return tuple(stack)
        seq.waits_for("layers", time.monotonic())
        return None

    def _take_in_layers(self, timeout: float | None = 0) -> None:
        """Keep the layers that were read; end the requests whose layers could not be."""
        failed = self.layers.take_fetched(in_use=self._layers_in_use(), timeout=timeout)
        for seq in list(self._scheduler.waiting) if failed else ():
            error = next((failed[layer_id] for layer_id, _ in seq.request.layers if layer_id in failed), None)
            if error is not None and seq.stack is None:
                self._ended.append(self._end(seq, "error", error))

    def _end_overdue(self) -> None:
        """End those that waited until their deadline."""
        now = time.monotonic()
        for seq in list(self._scheduler.waiting):
            if seq.request.deadline is not None and seq.request.deadline <= now:
                self._ended.append(self._end(seq, "error", overdue(seq, now)))

    def _layers_in_use(self) -> set[str]:
        """The layers of those that run or may start soon."""
        waiting = {layer_id for seq in self._scheduler.waiting for layer_id in seq.layer_ids}
        return self._running_layers() | (self._wanted & waiting)

    def _running_layers(self) -> set[str]:
        return {layer_id for seq in self._scheduler.running for layer_id in seq.layer_ids}

    # Inspection

    def logits(self, token_ids: SequenceOf[int], layers: SequenceOf[tuple[str, float]] = ()) -> NDArray[np.float32]:
        """The logits after every token of a sequence, computed apart from the batch.

        Args:
            token_ids: at least one token, at most the context.
            layers: (layer id, weight) pairs.

        Returns:
            float32[len(token_ids), vocab].

        Raises:
            ContextOverflow, InvalidInput, LayerNotLoaded: as `add` does.
        """
        count = len(token_ids)
        if not count or not all(0 <= token < self.config.vocab for token in token_ids):
            raise InvalidInput(f"expected at least one token, each of 0 to {self.config.vocab - 1}")
        if count > self.context:
            raise ContextOverflow(f"{count} tokens do not fit the context of {self.context}")
        check_stack(layers)
        in_use = self._layers_in_use() | {layer_id for layer_id, _ in layers}
        stack = tuple((self.layers.read_again(layer_id, in_use=in_use), float(weight)) for layer_id, weight in layers)
        tokens = np.asarray(token_ids, np.intp)
        table = np.arange(-(-count // BLOCK_TOKENS))
        cache = self._transformer.new_cache(len(table))
        logits = np.empty((count, self.config.vocab), np.float32)
        for start in range(0, count, LOGITS_CHUNK):
            part = tokens[start : start + LOGITS_CHUNK]
            logits[start : start + len(part)] = self._transformer.forward(
                [Chunk(part, start, table, stack, len(part))], cache
            ).values
        return logits


def cache_tokens(limits: Limits, context: int, token_bytes: int) -> int:
    """Tokens of the KV cache of an engine, in whole blocks: at least one sequence of the longest length."""
    tokens = limits.kv_cache_tokens or default_cache_tokens(
        token_bytes, limits.kv_cache_bytes, context=context, max_batch=limits.max_batch
    )
    return -(-max(tokens, context) // BLOCK_TOKENS) * BLOCK_TOKENS


def layer_bytes(limits: Limits) -> int:
    """Bytes of layers that are kept: never more than an eighth of the machine's memory, as of the KV cache."""
    return min(limits.max_layer_bytes, machine_memory() // SHARE)


def overdue(seq: Sequence, now: float) -> DeadlineExceeded:
    """What the caller of a sequence is told that has waited for too long."""
    seq.waits_for("place", now)
    parts = sorted(((seconds, WAITED_FOR[reason]) for reason, seconds in seq.waited.items()), reverse=True)
    told = ", ".join(f"{seconds:.1f} s for {what}" for seconds, what in parts if seconds > 0.01 * parts[0][0])
    so_far = f", after {seq.generated} tokens" if seq.generated else ""
    return DeadlineExceeded(
        f"the deadline passed while the request waited{so_far}: {told}",
        hint="try again when less is going on, or give it more time",
        waited={reason: round(seconds, 3) for reason, seconds in seq.waited.items()},
    )


def _not_finite(stack: Stack) -> SynapseError:
    """What a step whose numbers overflow says: with layers it is most often one of them."""
    if not stack:
        return InternalError(
            "the model computed a number that is not finite", hint="pull the model again; its file may be damaged"
        )
    return layers_overflow([(layer.id, weight) for layer, weight in stack])
