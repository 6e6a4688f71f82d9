"""An engine is a batch that steps: `add`, `step`, `cancel`, with layers loaded and evicted beside it."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from synapse.engines.grammar import Constraint, Grammars
from synapse.engines.kv_cache import BLOCK_TOKENS, BlockPool
from synapse.engines.lora import LoraLayer, Stack, lora_layer
from synapse.engines.request import Delta, Event, Finished, FinishReason, Grammar, Request, TokenLogprob
from synapse.engines.sampling import MAX_LOGPROBS, check_sampling, token_logprob
from synapse.engines.scheduler import Scheduler
from synapse.engines.sequence import Sequence
from synapse.engines.transformer import Chunk, ReferenceTransformer
from synapse.engines.weights import load_weights
from synapse.errors import Conflict, Corrupt, InternalError, InvalidInput, NotFound, SynapseError, Unavailable
from synapse.models.adapter import read_adapter
from synapse.models.chat_template import ChatTemplate, load_chat_template
from synapse.models.config import ModelConfig
from synapse.models.gguf_file import open_model_file
from synapse.models.tokenizer import Tokenizer, load_tokenizer

Backend = Literal["reference", "native", "auto"]
LOGITS_CHUNK = 256
"""Tokens computed at once by `Engine.logits`."""
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


class ContextOverflow(InvalidInput):
    """More tokens than the context holds."""

    code = "context_length_exceeded"


class LayerNotLoaded(NotFound):
    """A layer id that `load_layer` has not returned, or that was unloaded since."""

    code = "layer_not_loaded"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an engine may hold.

    Attributes:
        max_context: longest sequence, in tokens; the model's own context when that is shorter.
        max_batch: sequences that share one step.
        kv_cache_tokens: tokens the KV cache holds; 0 means one sequence of the longest length.
        step_tokens: tokens computed in one step, over all sequences.
        max_layers, max_layer_bytes: layers kept in memory; the least recently used that no sequence needs goes first.
        threads: threads of the matrix products of this process; 0 means one per core but one. BLAS threads wait for
            one another by spinning, so a single other busy process on the last core would slow them many times over.
    """

    max_context: int = 8192
    max_batch: int = 16
    kv_cache_tokens: int = 0
    step_tokens: int = 256
    max_layers: int = 20
    max_layer_bytes: int = 500 * 2**20
    threads: int = 0


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was opened."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    layers_read: int = 0
    layers_evicted: int = 0


class Engine:
    """One base model and everything that is being generated with it.

    Not thread safe: one thread calls `add`, `step` and `cancel` (`EngineRunner` is that thread for asyncio).
    `compile_grammar`, `read_layer` and `logits` may run beside it.
    """

    def __init__(
        self,
        transformer: ReferenceTransformer,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        limits: Limits,
        name: str | None = None,
    ) -> None:
        self.config: ModelConfig = transformer.config
        self._names = (name,) if name else ()
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
        self._layer_paths: dict[str, Path] = {}
        self._known_folders: dict[Path, tuple[tuple[tuple[str, int, int], ...], str]] = {}
        self._layers: OrderedDict[str, LoraLayer] = OrderedDict()
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
                events += self._continue(seq, logits[row])
                row += 1
        return events

    def reset(self) -> None:
        """Drop every sequence without events, after a step has raised."""
        for seq in list(self._scheduler):
            self._scheduler.remove(seq)
        self._sequences.clear()
        self._ended.clear()

    def _continue(self, seq: Sequence, logits: NDArray[np.float32]) -> list[Event]:
        """Choose the next token of a sequence and say what that adds to its answer."""
        request = seq.request
        if not np.isfinite(logits).all():
            error = InternalError("the model produced a number that is not finite", hint="try without its layers")
            return [self._end(seq, "error", error)]
        remaining = seq.limit - len(seq.tokens) - 1
        try:
            token = seq.sampler.choose(logits, seq.constraint.allowed() if seq.constraint else None)
            if seq.constraint:
                token = seq.constraint.accept(token, remaining)
        except SynapseError as error:
            return [self._end(seq, "error", error)]
        seq.sampler.note(token)
        seq.tokens.append(token)

        finish: FinishReason | None = None
        ends = token in self.tokenizer.eos_ids and not request.ignore_eos
        if ends or (seq.constraint and seq.constraint.complete):
            finish = "stop"
        elif remaining <= 0:
            finish = "length"
        text = seq.text.push(b"" if ends else self.tokenizer.token_bytes(token), last=finish is not None)
        if seq.text.stopped:
            finish = "stop"
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None:
            logprobs = (token_logprob(logits, token, request.logprobs),)
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

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    def compile_grammar(self, grammar: Grammar) -> Constraint:
        """Compile a grammar (kept, so that `add` finds it ready). A complex one takes up to a second.

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
        return self.known_layer(path) or self.put_layer(path, self.read_layer(path))

    def known_layer(self, path: Path) -> str | None:
        """The id of the layer in this folder, if it has been loaded and has not changed since. Any thread may ask."""
        known = self._known_folders.get(path)
        return known[1] if known and known[0] == _signature(path) and known[1] in self._layer_paths else None

    def read_layer(self, path: Path | str) -> LoraLayer:
        """Read and check a layer without keeping it. May run in any thread."""
        return lora_layer(read_adapter(Path(path), self.config, names=self._names))

    def put_layer(self, path: Path, layer: LoraLayer) -> str:
        """Keep a layer that was read, and remember where it is, so that it can be evicted and read again."""
        self._layer_paths[layer.id] = path
        self._known_folders[path] = (_signature(path), layer.id)
        self._keep(layer)
        return layer.id

    def unload_layer(self, layer_id: str) -> None:
        """Forget a layer.

        Raises:
            LayerNotLoaded: there is no such layer.
            Conflict: a sequence that has not ended uses it.
        """
        if layer_id not in self._layer_paths:
            raise LayerNotLoaded(f"there is no layer {layer_id}")
        if layer_id in self._layers_in_use():
            raise Conflict(f"the layer {layer_id} is in use", hint="wait for its requests, or cancel them")
        del self._layer_paths[layer_id]
        self._layers.pop(layer_id, None)

    @property
    def layers(self) -> dict[str, int]:
        """The layers in memory and their bytes, least recently used first."""
        return {layer.id: layer.bytes for layer in self._layers.values()}

    def _stack(self, layers: SequenceOf[tuple[str, float]]) -> Stack:
        if len({layer_id for layer_id, _ in layers}) < len(layers):
            raise InvalidInput("a layer stands in the stack twice", hint="add the two weights up")
        for layer_id, weight in layers:
            if not np.isfinite(weight):
                raise InvalidInput(f"the weight of layer {layer_id} is {weight}, not a finite number")
        return tuple((self._layer(layer_id), float(weight)) for layer_id, weight in layers)

    def _layer(self, layer_id: str) -> LoraLayer:
        layer = self._layers.get(layer_id)
        if layer is not None:
            self._layers.move_to_end(layer_id)
            return layer
        path = self._layer_paths.get(layer_id)
        if path is None:
            raise LayerNotLoaded(f"there is no layer {layer_id}", hint="load it first; load_layer gives the id")
        layer = self.read_layer(path)
        if layer.id != layer_id:
            raise Corrupt(f"the files in {path} have changed since the layer was loaded", hint="add the layer again")
        self._keep(layer)
        return layer

    def _keep(self, layer: LoraLayer) -> None:
        if layer.id not in self._layers:
            self.counters.layers_read += 1
        self._layers[layer.id] = layer
        self._layers.move_to_end(layer.id)
        in_use = self._layers_in_use() | {layer.id}
        for candidate in list(self._layers):
            within_bytes = sum(kept.bytes for kept in self._layers.values()) <= self.limits.max_layer_bytes
            if len(self._layers) <= self.limits.max_layers and within_bytes:
                break
            if candidate not in in_use:
                del self._layers[candidate]
                self.counters.layers_evicted += 1

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
            )
        return logits


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of the files in a folder: what tells that it has changed."""
    if not folder.is_dir():
        return ()
    stats = [(file.name, file.stat()) for file in folder.iterdir()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def open_engine_file(
    path: Path, backend: Backend = "auto", limits: Limits | None = None, name: str | None = None
) -> Engine:
    """Open a GGUF file.

    Args:
        name: what the model is called here; a layer may name it so, or as the file does.
        backend: `reference` is the NumPy engine; `native` needs kernels; `auto` takes the fastest there is.

    Raises:
        ModelFileCorrupt, UnsupportedModel: the file cannot be used.
        Unavailable: `native` was asked for and this version has no native kernels.
    """
    if backend not in ("reference", "native", "auto"):
        raise InvalidInput(f"the backend is reference, native or auto, not {backend!r}")
    if backend == "native":
        raise Unavailable("this version of Synapse has no native engine", hint="use the backend auto or reference")
    limits = limits or Limits()
    threadpool_limits(limits.threads or max(1, (os.cpu_count() or 1) - 1), user_api="blas")
    file = open_model_file(path)
    tokenizer = load_tokenizer(file)
    transformer = ReferenceTransformer(load_weights(file), min(file.config.context, limits.max_context))
    return Engine(transformer, tokenizer, load_chat_template(file), limits, name)
