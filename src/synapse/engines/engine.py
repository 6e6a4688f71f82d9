"""An engine is a batch that steps: `add`, `step`, `cancel`, with layers loaded and evicted beside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from synapse.config import load_settings
from synapse.engines.cache.blocks import BLOCK_TOKENS, BlockPool
from synapse.engines.cache.layers import LayerCache
from synapse.engines.grammar import BadGrammar, Constraint, GrammarFailed, Grammars
from synapse.engines.native.layers import Precision
from synapse.engines.native.model import cores
from synapse.engines.native.packed.file import Quantisation
from synapse.engines.native.transformer import open_native, prepare_native
from synapse.engines.reference.lora import Layer, Stack
from synapse.engines.reference.transformer import Chunk, ReferenceTransformer, StepLogits, Transformer
from synapse.engines.reference.weights import load_weights
from synapse.engines.request import Delta, Event, Finished, FinishReason, Grammar, Request, TokenLogprob
from synapse.engines.sampling import MAX_LOGPROBS, check_sampling, token_logprob
from synapse.engines.scheduler import Scheduler
from synapse.engines.sequence import Sequence
from synapse.errors import Corrupt, InternalError, InvalidInput, SynapseError, Unavailable
from synapse.models.chat_template import ChatTemplate, load_chat_template
from synapse.models.config import ModelConfig
from synapse.models.gguf_file import ModelFile, open_model_file
from synapse.models.tokenizer import Tokenizer, load_tokenizer

log = structlog.get_logger(__name__)

Backend = Literal["reference", "native", "auto"]
LOGITS_CHUNK = 256
"""Tokens computed at once by `Engine.logits`."""
GRAMMAR_TOKENS = 1024
"""Longest answer under a grammar when the request says nothing: a string that a model goes on with has no other end."""
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


class ContextOverflow(InvalidInput):
    """More tokens than the context holds."""

    code = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine may hold.

    Attributes:
        max_context: longest sequence, in tokens; the model's own context when that is shorter.
        max_batch: sequences that share one step.
        kv_cache_tokens: tokens the KV cache holds; 0 means one sequence of the longest length.
        step_tokens: tokens computed in one step, over all sequences.
        max_layers, max_layer_bytes: layers kept in memory; the least recently used that no sequence needs goes first.
        threads: threads that compute; 0 means one per core for the kernel, and one per core but one for the reference:
            BLAS threads wait for one another by spinning, so a single other busy process on the last core would slow
            them many times over.
        quantisation: how exactly the native engine keeps weights: `auto` as the file has them, else `int8` or `4bit`.
        layer_precision: how exactly it keeps LoRA layers: `int8`, or `float16` in twice the memory.
    """

    max_context: int = 8192
    max_batch: int = 16
    kv_cache_tokens: int = 0
    step_tokens: int = 256
    max_layers: int = 20
    max_layer_bytes: int = 500 * 2**20
    threads: int = 0
    quantisation: Quantisation = "auto"
    layer_precision: Precision = "int8"


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was opened."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    grammar_failures: int = 0


class Engine:
    """One base model and everything that is being generated with it.

    Not thread safe: one thread calls `add`, `step` and `cancel` (`EngineRunner` is that thread for asyncio).
    `compile_grammar`, `layers.read` and `layers.known` may run beside it.
    """

    def __init__(
        self,
        transformer: Transformer[Any],
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        limits: Limits,
        name: str | None = None,
    ) -> None:
        self.config: ModelConfig = transformer.config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.limits = limits
        self.context = transformer.context
        self.weight_bytes = transformer.weight_bytes
        self._transformer = transformer
        self._pool = BlockPool(-(-max(limits.kv_cache_tokens, self.context) // BLOCK_TOKENS))
        self._cache = transformer.new_cache(self._pool.blocks)
        self._scheduler = Scheduler(self._pool, max_batch=limits.max_batch, step_tokens=limits.step_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[Event] = []
        self._ids = itertools.count(1)
        names = (name,) if name else ()
        self.layers = LayerCache(
            self.config,
            names,
            transformer.prepare,
            max_layers=limits.max_layers,
            max_bytes=limits.max_layer_bytes,
        )
        self.counters = Counters()

    # Requests

    def add(self, request: Request) -> str:
        """Queue a request.

        Returns:
            Its id, which its events carry.

        Raises:
            ContextOverflow: prompt, or prompt and `max_tokens` together, do not fit the context.
            LayerNotLoaded: the stack names an unknown layer.
            InvalidInput: a token, a sampling setting, a stop string or the grammar does not make sense.
        """
        limit = self._check(request)
        stack = self._stack(request.layers)
        constraint = self.compile_grammar(request.grammar) if request.grammar else None
        if constraint is not None:
            limit = self._check_budget(request, limit, constraint.shortest)
        seq = Sequence(
            f"r{next(self._ids)}",
            request,
            stack=stack,
            limit=limit,
            vocab=self.config.vocab,
            constraint=constraint,
        )
        self._sequences[seq.id] = seq
        self._scheduler.waiting.append(seq)
        self.counters.requests += 1
        return seq.id

    def cancel(self, request_id: str) -> bool:
        """Stop a request; its `Finished` event comes with the next step. False when it has ended already."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._ended.append(self._end(seq, "cancelled"))
        return True

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._ended)

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

    def step(self) -> list[Event]:
        """Compute one step for every running sequence, each with its own layers, and tell what came of it."""
        events, self._ended = self._ended, []
        work = self._scheduler.schedule()
        if not work:
            return events
        chunks = [
            Chunk(
                tokens=np.asarray(seq.tokens[seq.computed : seq.computed + count], np.intp),
                start=seq.computed,
                table=seq.table(),
                stack=seq.stack,
                wanted=int(count == seq.pending),
            )
            for seq, count in work.items()
        ]
        logits = self._transformer.forward(chunks, self._cache)
        self.counters.steps += 1
        row = 0
        for (seq, count), chunk in zip(work.items(), chunks, strict=True):
            decoding = seq.generated > 0 and count == 1
            self.counters.decode_tokens += count if decoding else 0
            self.counters.prefill_tokens += 0 if decoding else count
            seq.advance(self._pool, count)
            if chunk.wanted:
                events += self._continue_safely(seq, logits, row)
                row += 1
        return events

    def reset(self) -> None:
        """Drop every sequence without events, after a step has raised."""
        for seq in list(self._scheduler):
            self._scheduler.remove(seq)
        self._sequences.clear()
        self._ended.clear()

    def close(self) -> None:
        """Give back threads and memory maps. No step may follow."""
        self._transformer.close()

    def _continue_safely(self, seq: Sequence, logits: StepLogits, row: int) -> list[Event]:
        """As `_continue`; what fails there ends this sequence and none of those that share the step."""
        try:
            return self._continue(seq, logits, row)
        except SynapseError as error:
            if isinstance(error, GrammarFailed):
                self.counters.grammar_failures += 1
                log.exception("engine.grammar_failed", request=seq.id, reason=error.message)
            return [self._end(seq, "error", error)]
        except Exception as error:  # a defect, which its caller and the log are told of
            log.exception("choosing a token failed", request=seq.id)
            failure = InternalError(f"choosing the next token failed: {error}", hint="the details are in the log")
            failure.__cause__ = error
            return [self._end(seq, "error", failure)]

    def _continue(self, seq: Sequence, logits: StepLogits, row: int) -> list[Event]:
        """Choose the next token of a sequence and say what that adds to its answer."""
        request = seq.request
        if not logits.finite[row]:
            raise _not_finite(seq.stack)
        remaining = seq.limit - len(seq.tokens) - 1
        values = logits.values[row]
        if seq.constraint:
            token = seq.sampler.choose(values, seq.constraint.allowed())
        else:
            token = seq.sampler.choose(values, best=(logits.best_tokens[row], logits.best_values[row]))
        if seq.constraint:
            token = seq.constraint.accept(token, remaining)
        seq.sampler.note(token)
        seq.tokens.append(token)

        finish: FinishReason | None = None
        ends = token in self.tokenizer.eos_ids and not request.ignore_eos
        if ends or (seq.constraint and seq.constraint.complete):
            finish = "stop"
        elif remaining <= 0:
            finish = "stop" if seq.constraint and seq.constraint.accepting else "length"
        if seq.constraint and finish == "stop":
            seq.constraint.check_answer()
        text = seq.text.push(b"" if ends else self.tokenizer.token_bytes(token), last=finish is not None)
        if seq.text.stopped:
            finish = "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            logprobs = (token_logprob(values, token, request.logprobs),)
        events: list[Event] = [Delta(seq.id, text, (token,), logprobs)]
        if finish:
            events.append(self._end(seq, finish))
        return events

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Finished:
        self._scheduler.remove(seq)
        del self._sequences[seq.id]
        return Finished(seq.id, reason, len(seq.request.prompt), seq.generated, seq.cached, error)

    def _check(self, request: Request) -> int:
        """Refuse what makes no sense; otherwise the most tokens the sequence may reach."""
        prompt = len(request.prompt)
        if not prompt:
            raise InvalidInput("the prompt is empty; at least one token is needed", param="prompt")
        if not all(0 <= token < self.config.vocab for token in request.prompt):
            raise InvalidInput(f"the prompt has a token outside 0 to {self.config.vocab - 1}", param="prompt")
        if prompt >= self.context:
            raise ContextOverflow(
                f"the prompt has {prompt} tokens; the context holds {self.context}, and the answer needs some of them",
                hint="shorten the prompt, or raise SYNAPSE_MAX_CONTEXT if the model allows",
                param="messages",
            )
        limit = self.context
        if request.max_tokens is not None:
            if request.max_tokens < 1:
                raise InvalidInput(f"max_tokens must be at least 1, not {request.max_tokens}", param="max_tokens")
            limit = prompt + request.max_tokens
            if limit > self.context:
                raise ContextOverflow(
                    f"the prompt's {prompt} tokens and max_tokens {request.max_tokens} make {limit}; "
                    f"the context holds {self.context}",
                    hint=f"ask for at most {self.context - prompt} tokens, or shorten the prompt",
                    param="max_tokens",
                )
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
            raise InvalidInput(f"logprobs must lie between 0 and {MAX_LOGPROBS}", param="top_logprobs")
        if len(request.stop) > MAX_STOP_STRINGS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in request.stop):
            raise InvalidInput(
                f"stop takes up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters", param="stop"
            )
        check_sampling(request.sampling, self.config.vocab)
        return limit

    def _check_budget(self, request: Request, limit: int, shortest: int) -> int:
        """Refuse a grammar whose shortest answer does not fit; otherwise the most tokens the sequence may reach."""
        prompt = len(request.prompt)
        if shortest > limit - prompt:
            what = "max_tokens allows" if request.max_tokens is not None else "the context has room for"
            raise BadGrammar(
                f"the shortest answer that fits the {(request.grammar or Grammar('regex')).kind.replace('_', ' ')}"
                f" has {shortest} tokens; {what} {limit - prompt}",
                hint=f"ask for at least {shortest} tokens, or simplify the schema",
                param="max_tokens",
            )
        if request.max_tokens is None:
            limit = min(limit, prompt + max(GRAMMAR_TOKENS, 2 * shortest))
        return limit

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
        return self.layers.known(path) or self.put_layer(path, self.layers.read(path))

    def put_layer(self, path: Path, layer: Layer) -> str:
        """Keep a layer that was read (with `layers.read`, in any thread)."""
        self.layers.put(path, layer, in_use=self._layers_in_use())
        return layer.id

    def unload_layer(self, layer_id: str) -> None:
        """Forget a layer.

        Raises:
            LayerNotLoaded: there is no such layer.
            Conflict: a sequence that has not ended uses it.
        """
        self.layers.forget(layer_id, in_use=self._layers_in_use())

    def _stack(self, layers: SequenceOf[tuple[str, float]]) -> Stack:
        if len({layer_id for layer_id, _ in layers}) < len(layers):
            raise InvalidInput("a layer stands in the stack twice", hint="add the two weights up")
        for layer_id, weight in layers:
            if not np.isfinite(weight):
                raise InvalidInput(f"the weight of layer {layer_id} is {weight}, not a finite number")
        in_use = self._layers_in_use() | {layer_id for layer_id, _ in layers}
        return tuple((self.layers.get(layer_id, in_use=in_use), float(weight)) for layer_id, weight in layers)

    def _layers_in_use(self) -> set[str]:
        return {layer.id for seq in self._scheduler for layer, _ in seq.stack}

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
        stack = self._stack(layers)
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


def _not_finite(stack: Stack) -> SynapseError:
    """What a step whose numbers overflow says: with layers it is most often one of them."""
    if not stack:
        return InternalError(
            "the model computed a number that is not finite", hint="pull the model again; its file may be damaged"
        )
    layers = ", ".join(f"{layer.id[:12]} (weight {weight:g})" for layer, weight in stack)
    return Corrupt(
        f"the answer cannot be computed: with its layers the model's numbers overflow; they are {layers}",
        hint="give the layers less weight, or leave them out one by one to find which; `synapse layer list` names them",
        layers=[layer.id for layer, _ in stack],
    )


def open_engine_file(
    path: Path, backend: Backend = "auto", limits: Limits | None = None, name: str | None = None
) -> Engine:
    """Open a GGUF file.

    Args:
        name: what the model is called here; a layer may name it so, or as the file does.
        backend: `reference` is the NumPy engine in float32, `native` the kernel on packed weights; `auto` is `native`
            where that works, and the log says why where it does not.

    Raises:
        ModelFileCorrupt, UnsupportedModel: the file cannot be used.
        Unavailable: `native` was asked for and does not work here; the message says why.
        DiskFull: there is no room for the packed weights.
    """
    if backend not in ("reference", "native", "auto"):
        raise InvalidInput(f"the backend is reference, native or auto, not {backend!r}")
    limits = limits or Limits()
    threadpool_limits(limits.threads or max(1, cores() - 1), user_api="blas")
    if backend != "reference":
        prepare_native()
    file = open_model_file(path)
    tokenizer, template = load_tokenizer(file), load_chat_template(file)
    transformer = _open_transformer(file, backend, limits)
    return Engine(transformer, tokenizer, template, limits, name)


def _open_transformer(file: ModelFile, backend: Backend, limits: Limits) -> Transformer[Any]:
    context = min(file.config.context, limits.max_context)
    if backend != "reference":
        try:
            return open_native(
                file,
                load_settings().folder("packed"),
                context,
                threads=limits.threads,
                quantisation=limits.quantisation,
                precision=limits.layer_precision,
            )
        except Unavailable as error:
            if backend == "native":
                raise
            log.info("engine.reference", model=file.path.name, reason=error.message, hint=error.hint)
    return ReferenceTransformer(load_weights(file), context)
