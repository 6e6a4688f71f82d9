"""Topics and patterns of topics.

A topic is one to eight words of ``a-z 0-9 _ -`` joined by dots, at most 200 characters: ``persona.turn.finished``.
In a pattern ``*`` stands for one word and a last ``**`` for one or more: ``persona.*.finished``, ``persona.**``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from synapse.errors import InvalidInput

MOST_CHARACTERS = 200
_WORD = r"[a-z0-9_-]+"
_TOPIC = re.compile(rf"{_WORD}(?:\.{_WORD}){{0,7}}")
_PATTERN = re.compile(rf"(?:{_WORD}|\*)(?:\.(?:{_WORD}|\*)){{0,7}}(?:\.\*\*)?|\*\*")


@lru_cache(maxsize=4096)
def checked_topic(topic: str) -> str:
    """The topic itself.

    Raises:
        InvalidInput: it is not a topic.
    """
    if not isinstance(topic, str) or len(topic) > MOST_CHARACTERS or not _TOPIC.fullmatch(topic):
        raise InvalidInput(
            f"a topic is one to eight words of a-z, 0-9, _ and - joined by dots, not {str(topic)[:60]!r}",
            hint="write it like persona.turn.finished",
        )
    return topic


@lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    """What says whether a topic matches the pattern.

    Raises:
        InvalidInput: it is not a pattern.
    """
    if not isinstance(pattern, str) or len(pattern) > MOST_CHARACTERS or not _PATTERN.fullmatch(pattern):
        raise InvalidInput(
            f"a pattern is words joined by dots, * for any word, a last ** for the rest, not {str(pattern)[:60]!r}",
            hint="write it like persona.*.finished or persona.**",
        )
    words = {"*": _WORD, "**": rf"{_WORD}(?:\.{_WORD})*"}
    wanted = re.compile(r"\.".join(words.get(word) or re.escape(word) for word in pattern.split(".")))
    return lambda topic: wanted.fullmatch(topic) is not None
