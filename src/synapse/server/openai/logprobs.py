"""Log-probabilities in OpenAI's two shapes: chat's list of objects, and the parallel lists of completions.

Source: https://platform.openai.com/docs/api-reference/chat/object (`logprobs`) and …/completions/object. A token can
be a part of a character, so tokens are given as bytes too; as text, such a token is written with escapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from synapse.engines.request import Delta, TokenLogprob
from synapse.models.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""OpenAI's value for "never"; JSON has no infinity."""


def told_tokens(deltas: Iterable[Delta], tokenizer: Tokenizer) -> list[TokenLogprob]:
    """The log-probabilities of the tokens of an answer; the token that ends it is not a part of it."""
    return [entry for delta in deltas for entry in delta.logprobs if entry.token not in tokenizer.eos_ids]


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of one chunk of it."""
    content = [
        {
            **_described(entry.token, entry.logprob, tokenizer),
            "top_logprobs": [_described(token, logprob, tokenizer) for token, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _described(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = _bytes_of(token, tokenizer)
    return {"token": _text_of(data, ""), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}


def completion_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion choice, or of one chunk of it.

    Args:
        offset: where in the answer its first token begins, in characters.
    """
    tokens: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for entry in entries:
        data = _bytes_of(entry.token, tokenizer)
        tokens.append(_text_of(data, "bytes:"))
        logprobs.append(max(entry.logprob, LEAST_LOGPROB))
        top = {_text_of(_bytes_of(token, tokenizer), "bytes:"): max(value, LEAST_LOGPROB) for token, value in entry.top}
        tops.append({**top, tokens[-1]: logprobs[-1]})
        offsets.append(offset)
        offset += characters(tokenizer.token_bytes(entry.token))
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def length_of(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> int:
    """How many characters these tokens add to an answer."""
    return sum(characters(tokenizer.token_bytes(entry.token)) for entry in entries)


def characters(data: bytes) -> int:
    """The characters that begin in these bytes: all bytes but UTF-8's continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _bytes_of(token: int, tokenizer: Tokenizer) -> bytes:
    """The bytes of a token; a special token, which adds no text, is named as the template writes it."""
    return tokenizer.token_bytes(token) or tokenizer.decode([token]).encode()


def _text_of(data: bytes, prefix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
