"""Prompt lookup: guessing the next tokens from what the sequence has said before, to compute several in one step.

Where the last tokens stand somewhere earlier in the sequence, what followed there is likely to follow again: answers
that quote, edit or continue their prompt are full of it. The guesses are computed in one step with the token they
follow, and each position then chooses its own token as it would have anyway, so the text is the same as without; a
guess that was not chosen costs its arithmetic. The idea is that of prompt lookup decoding (Saxena, 2023) and of
speculative decoding (Leviathan et al., 2023, arXiv:2211.17192), with the prompt as the draft model.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3
"""Tokens that must be the same before what followed them is guessed."""
FIRST_GUESSES = 2
"""How many tokens the first guess of a sequence has: a wrong one costs little."""
LONGEST_PAUSE = 64
"""Tokens that a sequence whose guesses are wrong goes on without any, at most."""


class PromptLookup:
    """The guesses of one sequence: more after right ones, and pauses that double after wrong ones."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}
        """Where what followed a gram begins, the latest place it stood at."""
        self._seen = 0
        """Tokens whose grams are known."""
        self._length = FIRST_GUESSES
        self._pause = 1
        self._resume = 0
        """The length of the sequence from which on there are guesses again."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow these tokens, at most `most` of it; nothing where that would hardly pay.

        Args:
            tokens: those of the last call, and what has followed since.
        """
        for end in range(max(self._seen, GRAM), len(tokens)):
            self._followed[tuple(tokens[end - GRAM : end])] = end
        self._seen = max(self._seen, len(tokens))
        if most < 1 or len(tokens) < max(self._resume, GRAM):
            return []
        start = self._followed.get(tuple(tokens[-GRAM:]))
        return [] if start is None else list(tokens[start : start + min(most, self._length)])

    def judge(self, guessed: int, right: int, length: int) -> None:
        """Learn from a guess.

        Args:
            guessed, right: tokens of the guess, and how many of them were chosen.
            length: of the sequence, now.
        """
        if right == guessed:
            self._length = 2 * guessed + 1
            self._pause = 1
        elif right > 0:
            self._length = right + 1
            self._pause = 1
        else:
            self._length = FIRST_GUESSES
            self._resume = length + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
