"""llama.cpp at work for `benchmarks.engine --peers`: one JSON request a line in, one JSON answer a line out.

It runs under the Python of an environment that has llama-cpp-python, so it imports nothing of this project, and it
uses only llama.cpp's own C API, as `llama_cpp` declares it for ctypes. Tokens are chosen greedily and never end a text.

| request | fields | answer |
| --- | --- | --- |
| version | | version, system |
| quantise | source, target, format | |
| open | name, path, adapters | |
| decode | name, prompts, tokens: one batch for all | seconds |
| decode_apart | name, prompts, adapters, tokens, lanes: one after another | seconds |
| prefill | name, prompt | seconds |
| logits | name, prompt, adapter, target: a .npy file | |

Seconds of decoding leave out the prompts, and setting the adapters.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

llama: Any = importlib.import_module("llama_cpp.llama_cpp")

THREADS = 2
CAPACITY = 512
"""Tokens of one call of llama_decode (n_batch and n_ubatch)."""
FORMATS = {name: f"LLAMA_FTYPE_MOSTLY_{name}" for name in ("Q4_0", "Q8_0", "F16", "BF16")}


class Context:
    """A llama.cpp context for `sequences` sequences of at most `length` tokens."""

    def __init__(self, model: Any, *, sequences: int, length: int, threads: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_batch = params.n_ubatch = CAPACITY
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._pointer = llama.llama_init_from_model(model, params)
        if not self._pointer:
            raise RuntimeError("llama.cpp cannot make this context")
        self._memory = llama.llama_get_memory(self._pointer)
        self._batch = llama.llama_batch_init(CAPACITY, 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def clear(self) -> None:
        llama.llama_memory_clear(self._memory, True)

    def wear(self, adapter: Any) -> None:
        """Use this adapter, or None."""
        pointers = (llama.llama_adapter_lora_p_ctypes * 1)(adapter)
        count = 0 if adapter is None else 1
        if llama.llama_set_adapters_lora(self._pointer, pointers, count, (ctypes.c_float * 1)(1.0)):
            raise RuntimeError("llama.cpp refused the adapter")

    def compute(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of rows (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama.llama_decode(self._pointer, batch):
            raise RuntimeError("llama_decode failed")

    def prompt(self, tokens: list[int], sequence: int = 0) -> int:
        """Compute a prompt and choose the token after it."""
        last = len(tokens) - 1
        for start in range(0, len(tokens), CAPACITY):
            part = list(enumerate(tokens))[start : start + CAPACITY]
            self.compute([(token, position, sequence, position == last) for position, token in part])
        return self.best(-1)

    def best(self, row: int) -> int:
        """The likeliest token of a row of the last computation."""
        logits = llama.llama_get_logits_ith(self._pointer, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def continue_all(self, tokens: list[int], position: int, steps: int) -> None:
        """Decode all sequences together from `position` on, of which these are the next tokens."""
        for step in range(position, position + steps):
            self.compute([(token, step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [self.best(row) for row in range(len(tokens))]

    def all_logits(self, tokens: list[int]) -> Any:
        """float32[len(tokens), vocab], for at most `CAPACITY` tokens."""
        self.clear()
        self.compute([(token, position, 0, True) for position, token in enumerate(tokens)])
        return np.ctypeslib.as_array(llama.llama_get_logits(self._pointer), (len(tokens), self.vocab))


class Model:
    """A model file with its adapters. Contexts are made when they are first needed, and kept."""

    def __init__(self, path: str, adapters: list[str]) -> None:
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self._adapters = [llama.llama_adapter_lora_init(self._model, adapter.encode()) for adapter in adapters]
        if not all(self._adapters):
            raise RuntimeError("llama.cpp cannot open an adapter")
        self._contexts: dict[tuple[int, ...], Context] = {}

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        context = self._context(sequences=len(prompts), length=len(prompts[0]) + tokens)
        context.clear()
        chosen = [context.prompt(prompt, i) for i, prompt in enumerate(prompts)]
        start = time.perf_counter()
        context.continue_all(chosen, len(prompts[0]), tokens)
        return time.perf_counter() - start

    def decode_apart(self, prompts: list[list[int]], adapters: list[int | None], tokens: int, lanes: int) -> float:
        """Each sequence to its end before the next; with several lanes, so many at a time, which share the threads."""
        length = len(prompts[0]) + tokens
        contexts = [self._context(length=length, threads=THREADS // lanes, lane=i) for i in range(lanes)]
        seconds = 0.0
        with ThreadPoolExecutor(lanes) as pool:
            for first in range(0, len(prompts), lanes):
                chosen = []
                for context, prompt, adapter in zip(contexts, prompts[first:], adapters[first:], strict=False):
                    context.clear()
                    context.wear(None if adapter is None else self._adapters[adapter])
                    chosen.append(context.prompt(prompt))
                start = time.perf_counter()
                list(pool.map(lambda c, t: c.continue_all([t], len(prompts[0]), tokens), contexts, chosen))
                seconds += time.perf_counter() - start
        for context in contexts:
            context.wear(None)
        return seconds

    def prefill(self, prompt: list[int]) -> float:
        context = self._context(length=1024)
        context.clear()
        start = time.perf_counter()
        context.prompt(prompt)
        return time.perf_counter() - start

    def logits(self, prompt: list[int], adapter: int | None, target: str) -> None:
        context = self._context(length=1024)
        context.wear(None if adapter is None else self._adapters[adapter])
        np.save(target, context.all_logits(prompt))
        context.wear(None)

    def _context(self, *, sequences: int = 1, length: int, threads: int = THREADS, lane: int = 0) -> Context:
        key = (sequences, length, threads, lane)
        if key not in self._contexts:
            self._contexts[key] = Context(self._model, sequences=sequences, length=length, threads=threads)
        return self._contexts[key]


def quantise(source: str, target: str, name: str) -> None:
    params = llama.llama_model_quantize_default_params()
    params.nthread = THREADS
    params.ftype = getattr(llama, FORMATS[name])
    params.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot make {name} of {source}")


def answer(request: dict[str, Any], models: dict[str, Model]) -> dict[str, Any]:
    """Do what a request says."""
    match request:
        case {"do": "version"}:
            version = importlib.import_module("llama_cpp").__version__
            return {"version": version, "system": llama.llama_print_system_info().decode()}
        case {"do": "quantise", "source": source, "target": target, "format": name}:
            quantise(source, target, name)
        case {"do": "open", "name": name, "path": path, "adapters": adapters}:
            models[name] = Model(path, adapters)
        case {"do": "logits", "name": name, "prompt": prompt, "adapter": adapter, "target": target}:
            models[name].logits(prompt, adapter, target)
        case {"do": "decode", "name": name, "prompts": prompts, "tokens": tokens}:
            return {"seconds": models[name].decode(prompts, tokens)}
        case {"do": "decode_apart", "name": name, "prompts": prompts, "adapters": adapters, **rest}:
            return {"seconds": models[name].decode_apart(prompts, adapters, rest["tokens"], rest["lanes"])}
        case {"do": "prefill", "name": name, "prompt": prompt}:
            return {"seconds": models[name].prefill(prompt)}
        case _:
            raise ValueError(f"there is no request {request.get('do')!r}")
    return {}


def main() -> None:
    silence = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silence, None)
    llama.llama_backend_init()
    models: dict[str, Model] = {}
    for line in sys.stdin:
        try:
            said = answer(json.loads(line), models)
        except Exception as error:  # told to whoever asked
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
