"""llama.cpp as a contender: a worker process in its own environment, which is asked to do one thing at a time."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.lora_gguf import write_lora_gguf
from synapse.errors import Unavailable
from synapse.models.config import ModelConfig

WORKER = Path(__file__).with_name("llama_worker.py")
QUANTISED = ("Q4_0", "Q8_0", "BF16", "F16")
"""What is made from the shipped file, beside the file as it is."""
HOW_TO_GET = """llama.cpp is not here, so only Synapse is measured. To compare, install it where it does not touch
this project (pip compiles it for this machine's CPU, with a C++ compiler, in some minutes), and name its Python:

    python3 -m venv ~/llama-env && ~/llama-env/bin/pip install llama-cpp-python
    python -m benchmarks.engine --peers --peer-python ~/llama-env/bin/python"""


class LlamaCpp:
    """A running worker.

    Raises:
        Unavailable: this Python has no llama-cpp-python.
    """

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            about = self.ask("version")
        except OSError as error:
            raise Unavailable(f"{python} cannot be run: {error.strerror}", hint=HOW_TO_GET) from error
        self.version: str = about["version"]
        self.system: str = about["system"]
        self.process: int = self._process.pid

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Have the worker do something, and wait for its answer.

        Raises:
            Unavailable: it could not, or is not there any more.
        """
        assert self._process.stdin and self._process.stdout and self._process.stderr
        line = ""
        try:
            print(json.dumps({"do": do, **fields}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended, and said why on stderr
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
            raise Unavailable(f"the llama.cpp worker ended: {last[0]}", hint=HOW_TO_GET)
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise Unavailable(f"llama.cpp failed to {do}: {said['error']}")
        return said


@dataclass(frozen=True)
class Peer:
    """llama.cpp with the model in one of its formats. Speeds are tokens per second, over all sequences."""

    worker: LlamaCpp
    format: str

    @property
    def name(self) -> str:
        return f"llama.cpp {self.format}"

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """All sequences in one batch, without adapters."""
        seconds = self.worker.ask("decode", name=self.format, prompts=prompts, tokens=tokens)["seconds"]
        return float(len(prompts) * tokens / seconds)

    def decode_apart(self, prompts: Sequence[Sequence[int]], tokens: int, lanes: int) -> float:
        """Sequence i with adapter i, each to its end before the next; `lanes` of them at a time share the threads."""
        adapters = list(range(len(prompts)))
        said = self.worker.ask(
            "decode_apart", name=self.format, prompts=prompts, adapters=adapters, tokens=tokens, lanes=lanes
        )
        return float(len(prompts) * tokens / said["seconds"])

    def prefill(self, prompt: Sequence[int]) -> float:
        return float(len(prompt) / self.worker.ask("prefill", name=self.format, prompt=prompt)["seconds"])

    def logits(self, tokens: Sequence[int], adapter: int | None) -> NDArray[np.float32]:
        """float32[len(tokens), vocab]."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "logits.npy"
            self.worker.ask("logits", name=self.format, prompt=tokens, adapter=adapter, target=str(target))
            logits: NDArray[np.float32] = np.load(target)
        return logits


def open_peers(
    worker: LlamaCpp, model: Path, layers: Sequence[Path], config: ModelConfig, *, folder: Path, formats: Sequence[str]
) -> list[Peer]:
    """The model as it is and in other formats, each with all layers; files are made in `folder`.

    Args:
        formats: of `QUANTISED`.
    """
    adapters = [
        str(write_lora_gguf(layer, folder / f"{i}.lora.gguf", config, np.float16)) for i, layer in enumerate(layers)
    ]
    paths = {"as shipped": model}
    for name in formats:
        paths[name] = folder / f"{name}.gguf"
        worker.ask("quantise", source=str(model), target=str(paths[name]), format=name)
    for name, path in paths.items():
        worker.ask("open", name=name, path=str(path), adapters=adapters)
    return [Peer(worker, name) for name in paths]
