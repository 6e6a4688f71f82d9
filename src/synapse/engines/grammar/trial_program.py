"""The child process of `trial`: compiles one grammar after another, within limits that end it.

It is run as a file and imports nothing of Synapse, so that it starts in a moment and is small. Each message is the
length of a grammar (8 bytes, little-endian) and the grammar; the answer to each is the same with what is wrong with it,
empty when nothing is.
"""

from __future__ import annotations

import itertools
import math
import os
import resource
import select
import sys
import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

END_OF_TEXT = 256
_PAIRED = b'"}]{[,: -.a0'
IDLE_SECONDS = 60.0
MOST_MEMORY = 2 << 30
LIMITS = {"max_grammar_size": 150_000, "max_lexer_states": 50_000, "verbose_errors": False}
LENGTH = 8


class ByteVocabulary:
    """The 256 bytes and some pairs of them, as `LLTokenizer` asks for a vocabulary."""

    eos_token_id = END_OF_TEXT
    bos_token_id = None
    special_token_ids = (END_OF_TEXT,)
    is_tokenizer_wrapper = True

    def __init__(self) -> None:
        pairs = [bytes(pair) for pair in itertools.product(_PAIRED, _PAIRED)]
        self.tokens = [*(bytes((byte,)) for byte in range(256)), b"<end>", *pairs, b"a" * 4, b"a" * 8, b"0" * 4]

    def __call__(self, text: str | bytes) -> list[int]:
        return [*(text.encode() if isinstance(text, str) else text)]


def byte_tokenizer() -> LLTokenizer:
    """The library's tokenizer over that vocabulary."""
    vocabulary = ByteVocabulary()
    return LLTokenizer(vocabulary, n_vocab=len(vocabulary.tokens), eos_token=END_OF_TEXT)  # type: ignore[arg-type]


def read_exactly(descriptor: int, size: int) -> bytes:
    """So many bytes, or fewer where the other side has gone."""
    parts = b""
    while len(parts) < size:
        part = os.read(descriptor, size - len(parts))
        if not part:
            break
        parts += part
    return parts


def serve(seconds: float) -> None:
    """Compile what comes until nothing has come for a while, each within so many seconds of the processor."""
    os.nice(10)  # whoever waits for an answer goes first
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    tokenizer, limits = byte_tokenizer(), LLParserLimits(**LIMITS)  # type: ignore[arg-type]
    _, hardest = resource.getrlimit(resource.RLIMIT_CPU)
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        size = int.from_bytes(read_exactly(0, LENGTH), "little")
        if not size:
            return
        grammar = read_exactly(0, size).decode()
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hardest))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        wrong = matcher.get_error().splitlines()[0].encode() if matcher.is_error() else b""
        del matcher
        os.write(1, len(wrong).to_bytes(LENGTH, "little") + wrong)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
