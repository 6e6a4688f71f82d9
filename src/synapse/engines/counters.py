"""What an engine has done since it was opened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was opened.

    Attributes:
        prompt_tokens: of the prompts that have started; `cached_tokens` of them were found in the KV cache.
        evicted_blocks: blocks of the KV cache whose contents gave way to others.
        guessed_tokens: tokens that were computed before it was known whether they are chosen; `right_guesses` were.
        preemptions: how often a sequence gave its place back and waited again.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    grammar_failures: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    guessed_tokens: int = 0
    right_guesses: int = 0
    evicted_blocks: int = 0
    preemptions: int = 0

    @property
    def hit_rate(self) -> float:
        """The part of the prompts' tokens that did not have to be computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
